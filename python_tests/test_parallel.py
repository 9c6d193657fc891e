"""Two processes calibrate and prune one model as a single one does, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import parallel_child
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from pysparse import api
from pysparse.calib import Collector, Ranks, Watched
from pysparse.measure import torch_threads

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder in which two processes of torchrun left their results."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(HERE / "parallel_child.py"), str(folder)]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.mark.parametrize("case", parallel_child.CASES)
def test_two_processes_give_the_weights_of_one(case, together):
    with torch_threads(1):
        model, report = parallel_child.pruned(case)
    alone = model.state_dict()
    for rank in range(2):
        state = torch.load(together / f"{case}.{rank}.pt")
        assert state["zeros"] == [one.zeros for one in report.layers]
        assert state["weights"].keys() == alone.keys()
        for name, value in state["weights"].items():
            assert torch.equal(value.view(torch.int16), alone[name].view(torch.int16)), name


def test_an_error_of_one_process_is_raised_by_all(together):
    texts = [(together / f"error.{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "inputs of model.layers.0.self_attn.q_proj hold NaN or infinity" in texts[0]


def test_only_the_first_process_saves_and_speaks(together, tmp_path):
    with torch_threads(1):
        api.prune(
            tiny_models.tiny("llama"), 0.5, calibration=tiny_models.tokens(7, 12), batch_size=2,
            output_dir=tmp_path / "alone", save_format="dense", progress=False,
        )  # fmt: skip
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", together / "saved")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not (together / "saved.pruning-progress").exists()
    assert (together / "stderr").read_text().count("pruning blocks: 3/3") == 1


def test_sums_keep_the_order_of_the_batches():
    """Where the order matters: partial sums that cancel in size, added on two ranks as on one."""
    batches = [torch.randn(3, 4) * 10.0**power for power in (6, -5, 3, -6)]
    linear = torch.nn.Linear(4, 4)
    watched = {"linear": Watched(linear, 4, torch.device("cpu"))}
    alone = Collector(watched, ("gram", "squared_norm"))
    with torch.no_grad(), alone.watching():
        for batch in batches:
            linear(batch)
            alone.finish_batch()
    mailbox = {}

    class Wire(Ranks):
        """Both ranks in one process: what one sends, the other finds."""

        def gather(self, value):
            return [mailbox["first"][0], value] if self.index else [value, mailbox["second"][0]]

        def broadcast(self, tensor, source):
            if source == self.index:
                return tensor
            return mailbox["second" if source else "first"][1].pop(0)

    expected = alone.values("linear", 4)[0]
    ranks = Wire(0, 2), Wire(1, 2)
    collectors = [Collector(watched, ("gram", "squared_norm"), rank) for rank in ranks]
    for step in range(2):
        for index, collector in enumerate(collectors):
            with torch.no_grad(), collector.watching():
                linear(batches[2 * step + index])
        for name, collector in zip(("first", "second"), collectors, strict=True):
            kept = collector._kept
            meta = [
                (one.keys, one.tokens, {n: (p.shape, p.dtype) for n, p in one.parts.items()}) for one in kept
            ]
            mailbox[name] = (meta, [part for one in kept for part in one.parts.values()])
        for collector in collectors:
            collector.finish_batch()
    for collector in collectors:
        for name, value in collector.values("linear", 4)[0].items():
            assert torch.equal(value, expected[name])
