"""Blocks on another device, activations on disk, and models that accelerate has spread or offloaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pysparse.calib import load_calibration
from pysparse.calib.activations import OnDisk, activations_in
from pysparse.calib.offload import data_of
from pysparse.calib.ranks import ALONE
from pysparse.huggingface import from_pretrained, save_pretrained
from pysparse.measure import torch_threads
from pysparse.methods import recipe_for
from pysparse.models.discover import discover
from pysparse.nn import SparseLinear
from pysparse.pruning import Execution, run
from pysparse.pruning.identity import model_hash
from pysparse.pruning.journal import Journal
from pysparse.pruning.placement import on_device

try:
    import accelerate
except ImportError:
    accelerate = None
ACCELERATE = pytest.mark.skipif(
    accelerate is None, reason="accelerate is not installed (pip install accelerate)"
)


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def pruned(model, method="wanda", allocation=None, **execution):
    """Prune and return the report."""
    recipe = recipe_for(method, allocation=allocation)
    data = load_calibration(tiny_models.tokens(6, 12), batch_size=2)
    return run(discover(model), recipe, 0.5, data, execution=Execution(**execution))


def same(left, right):
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


# --- activations on disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_activations_on_disk_change_no_bit(name, method, tmp_path):
    model, expected = tiny_models.tiny(name, torch.bfloat16), tiny_models.tiny(name, torch.bfloat16)
    pruned(model, method, activations="disk", scratch=tmp_path)
    pruned(expected, method)
    assert same(model, expected)
    assert not list(tmp_path.iterdir())


def test_activations_are_removed_after_an_error(tmp_path):
    model = tiny_models.tiny("llama")
    seen = []

    def fail(module, args):
        seen.extend(tmp_path.rglob("*.bin"))
        raise RuntimeError("the model's own")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the model's own"):
        pruned(model, activations="disk", scratch=tmp_path)
    assert len(seen) == 3
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(NotADirectoryError, match="folder for activations does not exist"),
        activations_in("disk", tmp_path / "none"),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_what_is_read_from_disk_is_what_was_written(dtype, tmp_path):
    store = OnDisk(tmp_path)
    value = (torch.randn(3, 5, 7) * 9).to(dtype)
    store[0], store[1], store[2] = value, None, value[:0]
    first = store[0]
    store[0] = value.transpose(0, 1) * 2  # while the old file is still mapped
    assert torch.equal(first, value)
    first.zero_()  # and a change in memory does not reach the file
    assert torch.equal(store[0], value.transpose(0, 1) * 2)
    assert store[1] is None
    assert (store.shape(0), store.shape(1), store[2].shape) == ((5, 3, 7), None, (0, 5, 7))


PEAK = """
import sys, torch
from torch import nn
from pysparse.calib import load_calibration
from pysparse.measure import peak_memory
from pysparse.methods import METHODS
from pysparse.models.discover import discover
from pysparse.nn import SparseLinear
from pysparse.pruning import Execution, run

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.linear(x)

data = load_calibration([torch.randn(1, 65536, 64)] * 24)  # one tensor of 16 MB; behind a block, 24 of them
model = nn.Sequential(Block(), Block(), Block())
run(discover(model), METHODS["magnitude"], 0.0)  # what is loaded at first use
with peak_memory() as reading:
    run(discover(model), METHODS["wanda"], 0.5, data, execution=Execution(activations=sys.argv[1], scratch=sys.argv[2]))
print(reading.growth)
"""


@pytest.mark.slow
def test_memory_holds_one_batch_when_activations_are_on_disk(tmp_path):
    """In processes of their own: the largest resident set is the process's, and cannot be reset everywhere."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    growth = {
        place: int(subprocess.run([sys.executable, "-c", PEAK, place, str(tmp_path)], env=environment, check=True,
                                  capture_output=True, text=True, timeout=300).stdout)
        for place in ("memory", "disk")
    }  # fmt: skip
    assert growth["memory"] > 24 * (16 << 20)
    assert growth["disk"] < growth["memory"] / 2


# --- blocks on a device ----------------------------------------------------------------------------------


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")


@GPU
def test_a_block_comes_back_with_its_ties_and_objects():
    block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False), "n": nn.BatchNorm1d(4)})
    block["b"].weight = block["a"].weight
    before, homes = dict(block.named_parameters()), [one.data_ptr() for one in block.parameters()]
    view = block["a"].weight.data[0]
    with on_device(block, torch.device("cuda", 0)), torch.no_grad():
        assert all(one.is_cuda for one in (*block.parameters(), *block.buffers()))
        block["a"].weight.fill_(7)
        block["n"].running_mean.fill_(3)
    assert all(block.get_parameter(name) is one for name, one in before.items())
    assert [one.data_ptr() for one in block.parameters()] == homes
    assert block["b"].weight is block["a"].weight
    assert (view == 7).all()
    assert (block["n"].running_mean == 3).all()


def test_a_block_that_is_where_it_should_be_is_left_alone():
    block = nn.Linear(4, 4)
    homes = [one.data_ptr() for one in block.parameters()]
    with on_device(block, torch.device("cpu")):
        assert [one.data_ptr() for one in block.parameters()] == homes
    model, expected = tiny_models.tiny("llama"), tiny_models.tiny("llama")
    pruned(model, device="cpu")
    pruned(expected)
    assert same(model, expected)


@GPU
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_blocks_are_pruned_on_the_gpu_one_by_one(method):
    model, expected = tiny_models.tiny("llama"), tiny_models.tiny("llama")
    devices = set()
    model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: devices.add((module.up_proj.weight.device.type, args[0].device.type))
    )
    report = pruned(model, method, device="cuda")
    pruned(expected, method)
    assert all(one.device.type == "cpu" for one in model.parameters())
    assert devices == (set() if method == "magnitude" else {("cuda", "cuda")})
    ours, theirs = ({n: p != 0 for n, p in one.named_parameters()} for one in (model, expected))
    differing = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    assert differing <= 0.01 * sum(one.numel() for one in ours.values())  # near ties of scores
    if method != "magnitude":
        assert report.memory["device_peak"] > 0


# --- accelerate ------------------------------------------------------------------------------------------


def offloaded(kind, name, folder):
    """A tiny model with its parameters in a dict, in raw files, or in the checkpoint's files."""
    model = tiny_models.tiny(name, torch.bfloat16)
    if kind == "memory":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "files":
        return accelerate.disk_offload(model, folder / "store", execution_device="cpu")
    model.save_pretrained(folder / "checkpoint")
    whole = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    blocks = {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint",
        dtype=torch.bfloat16,
        device_map={**whole, **blocks},
        offload_folder=folder / "store",
    ).eval()


def contents(model, name):
    """The weights that the model computes with, found out by computing: layer outputs of unit inputs."""
    found = {}
    for layer in discover(model).layers:
        if layer.expert is None:
            eye = torch.eye(layer.shape[1], dtype=torch.bfloat16)
            with torch.no_grad():
                found[layer.path] = layer.module(eye)
    return found


@ACCELERATE
@pytest.mark.parametrize(("kind", "name", "method"), [
    ("memory", "llama", "wanda"), ("files", "llama", "sparsegpt"), ("checkpoint", "llama", "wanda"),
    ("files", "mixtral", "wanda"), ("memory", "gpt2", "magnitude"), ("memory", "mixtral", "sparsegpt"),
])  # fmt: skip
def test_offloaded_models_are_pruned_where_their_weights_are(kind, name, method, tmp_path):
    model, expected = offloaded(kind, name, tmp_path), tiny_models.tiny(name, torch.bfloat16)
    if kind == "checkpoint":  # loading keeps the rotations in float32
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16).eval()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint/*")}
    meta = sum(one.is_meta for one in model.parameters())
    assert meta > 0
    report = pruned(model, method)
    assert report.layers
    pruned(expected, method)
    assert sum(one.is_meta for one in model.parameters()) == meta
    for (path, ours), theirs in zip(
        contents(model, name).items(), contents(expected, name).values(), strict=True
    ):
        assert torch.equal(ours, theirs), path
    rows = tiny_models.tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(rows).logits, expected(rows).logits)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint/*")}


@ACCELERATE
def test_an_offloaded_model_has_the_hash_of_a_whole_one_and_can_be_resumed(tmp_path):
    whole = discover(tiny_models.tiny("llama", torch.bfloat16))
    layout = discover(offloaded("files", "llama", tmp_path))
    assert model_hash(layout.model) == model_hash(whole.model)
    journal = Journal.open(tmp_path / "p", {}, resume=False, ranks=ALONE)
    report = pruned(layout.model, journal=journal)
    again = offloaded("memory", "llama", tmp_path)
    restored = pruned(again, journal=journal)
    journal.remove()
    assert [one.zeros for one in restored.layers] == [one.zeros for one in report.layers]
    assert model_hash(again) == model_hash(layout.model) != model_hash(whole.model)


@ACCELERATE
@pytest.mark.parametrize("kind", ["memory", "files", "checkpoint"])
def test_an_offloaded_model_is_saved_packed(kind, tmp_path):
    model = offloaded(kind, "llama", tmp_path)
    pruned(model)
    save_pretrained(model, tmp_path / "packed")
    loaded = from_pretrained(tmp_path / "packed", format="dense")
    assert sum(isinstance(one, SparseLinear) for one in from_pretrained(tmp_path / "packed").modules()) == 21
    for name, value in loaded.named_parameters():
        module, _, own = name.rpartition(".")
        assert torch.equal(value, data_of(model.get_submodule(module), own)), name


@ACCELERATE
def test_a_device_beside_a_device_map_is_refused(tmp_path):
    model = offloaded("memory", "llama", tmp_path)
    with pytest.raises(
        ValueError, match="device=cpu was given, but the model is spread or offloaded by accelerate"
    ):
        pruned(model, device="cpu")


@ACCELERATE
def test_a_checkpoint_is_never_overwritten(tmp_path):
    model = offloaded("checkpoint", "llama", tmp_path)
    store = model.model.layers[1].mlp.up_proj._hf_hook.weights_map.dataset
    store.save_folder = None
    files = {path.name: path.read_bytes() for path in Path(tmp_path / "checkpoint").iterdir()}
    with pytest.raises(ValueError, match="which is not overwritten: load the model with offload_folder="):
        pruned(model, "magnitude")
    assert files == {path.name: path.read_bytes() for path in Path(tmp_path / "checkpoint").iterdir()}
