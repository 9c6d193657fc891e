"""A run that is killed goes on where it was, and ends with the weights of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pysparse import api, data
from pysparse.api import search
from pysparse.api.execution import progress_folder
from pysparse.calib import load_calibration
from pysparse.calib.ranks import ALONE
from pysparse.measure import torch_threads
from pysparse.methods import METHODS, recipe_for
from pysparse.models.discover import discover
from pysparse.pruning import Execution, run
from pysparse.pruning.identity import identity_of
from pysparse.pruning.journal import Journal


@pytest.fixture(autouse=True)
def _one_thread():
    """The child processes calibrate on one thread; bits are compared."""
    with torch_threads(1):
        yield


@pytest.fixture
def saved(tmp_path):
    """A folder with a small dense model of eight blocks."""
    model = tiny_models.tiny("llama", num_hidden_layers=8)
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


CHILD = """
import sys, tiny_models
from pysparse import api
source, target, method, allocation, propagate, resume = sys.argv[1:]
api.prune(source, 0.5, method, calibration=tiny_models.tokens(6, 12), batch_size=2, allocation=allocation,
          propagate=propagate, output_dir=target, resume=resume == "resume", save_format="dense", threads=1,
          activations="disk" if method == "sparsegpt" else "memory")
"""


def start(source, target, *, method="wanda", allocation="uniform", propagate="pruned", resume=True):
    command = [sys.executable, "-c", CHILD, str(source), str(target), method, allocation, propagate]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        [*command, "resume" if resume else "fresh"], env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def files(folder):
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def kill_after(process, folder, pattern, count):
    """SIGKILL the process as soon as ``count`` files of a kind are there; tell whether it was still running."""
    while process.poll() is None:
        if sum(1 for name in files(folder) if name.startswith(pattern)) >= count:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def weights_of(folder):
    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def same_bits(left, right):
    ours, theirs = weights_of(left), weights_of(right)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in ours)


# What is waited for before each kill: beginnings of file names, and how many of them.
KILLS = {
    "wanda": ({"method": "wanda"}, [("state", 1), ("block", 1), ("block", 5)]),
    "dense": ({"method": "wanda", "propagate": "dense"}, [("block", 4)]),
    "owl": (
        {"method": "wanda", "allocation": "owl"},
        [("pass", 2), ("pass", 6), ("notes", 1), ("block", 4)],
    ),
    "sparsegpt": ({"method": "sparsegpt"}, [("block", 3)]),
    "magnitude": ({"method": "magnitude"}, [("block", 2)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_run_ends_with_the_same_bits(kind, saved, tmp_path):
    settings, kills = KILLS[kind]
    finish(start(saved, tmp_path / "whole", resume=False, **settings))
    assert not progress_folder(tmp_path / "whole").exists()
    target, progress = tmp_path / "killed", progress_folder(tmp_path / "killed")
    killed = []
    for pattern, count in kills:
        killed.append(kill_after(start(saved, target, **settings), progress, pattern, count))
    assert sum(killed) >= len(kills) - 1  # the last blocks may be done before the signal arrives
    finish(start(saved, target, **settings))
    assert same_bits(tmp_path / "whole", target)
    assert not progress.exists()
    report = json.loads((target / "prune_report.json").read_text())
    assert len(report["layers"]) == 8 * 7
    assert report["sparsity"] == pytest.approx(0.5, abs=0.02)  # rows of 32 take whole weights


@pytest.mark.slow
def test_kills_at_random_moments(saved, tmp_path):
    """The moments come from a seed, but what they hit is chance: reading, pruning, writing or renaming."""
    finish(start(saved, tmp_path / "whole", resume=False))
    target, draw = tmp_path / "killed", torch.Generator().manual_seed(7)
    begin = time.perf_counter()
    finish(start(saved, tmp_path / "timed", resume=False))
    length = time.perf_counter() - begin
    for _ in range(5):
        process = start(saved, target)
        time.sleep(length * float(0.3 + 0.7 * torch.rand(1, generator=draw)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(saved, target))
    assert same_bits(tmp_path / "whole", target)


@pytest.mark.slow
def test_ctrl_c_on_the_command_and_then_resume(saved, tmp_path):
    """The bundled tokenizer and text, as a user would: the second block is done when the signal comes."""
    tokenizer = AutoTokenizer.from_pretrained(data.demo_model_path())
    model = tiny_models.tiny("llama", num_hidden_layers=8, vocab_size=4096, max_position_embeddings=128)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    finish(start_command(saved, tmp_path / "whole")[0])
    process, progress = start_command(saved, tmp_path / "out")
    while process.poll() is None and "block-00001.safetensors" not in files(progress):
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "pysparse: interrupted: " in errors
    assert f"kept in {progress}; resume goes on with them" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    again, _ = start_command(saved, tmp_path / "out")
    _, errors = again.communicate(timeout=100)
    assert again.returncode == 2
    assert "pass resume=True" in errors
    resumed, _ = start_command(saved, tmp_path / "out", "--resume")
    _, errors = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, errors
    assert same_bits(tmp_path / "whole", tmp_path / "out")
    assert not progress.exists()


# A shell's background jobs, and so their children, ignore Ctrl-C.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pysparse.cli import app
app()
"""


def start_command(source, target, *more):
    """Start ``pysparse prune`` and return the process and where it keeps its progress."""
    command = [
        sys.executable, "-c", COMMAND, "prune", source, "-o", target, "--format", "dense",
        "--num-samples", 8, "--max-length", 64, "--threads", 1, *more,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True)
    return process, progress_folder(target)


# --- in one process --------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised by a callback to end a run in the middle."""


def stopping(blocks):
    def stop(event):
        if event.index + 1 == blocks:
            raise Stop

    return stop


def prune_until(blocks, target, name="llama", **settings):
    arguments = {
        "sparsity": 0.5, "calibration": tiny_models.tokens(6, 12), "batch_size": 2, "output_dir": target,
        "save_format": "dense", "progress": False, **settings,
    }  # fmt: skip
    callbacks = [stopping(blocks)] if blocks else []
    return api.prune(tiny_models.tiny(name), callbacks=callbacks, **arguments)


@pytest.mark.parametrize("settings", [
    {"method": "wanda"}, {"method": "wanda", "propagate": "dense"}, {"method": "magnitude"},
    {"method": "sparsegpt", "pattern": "2:4"}, {"method": "sparsegpt", "allocation": "dlp", "activations": "disk"},
], ids=str)  # fmt: skip
def test_a_stopped_run_goes_on(settings, tmp_path):
    whole = prune_until(None, tmp_path / "whole", **settings)
    target = tmp_path / "stopped"
    for blocks, already in [(1, 0), (2, 1)]:
        with pytest.raises(Stop):
            prune_until(blocks, target, resume=blocks > 1, **settings)
        assert {f"block-{index:05}.safetensors" for index in range(already + 1)} <= files(
            progress_folder(target)
        )
    result = prune_until(None, target, resume=True, **settings)
    assert same_bits(tmp_path / "whole", target)
    assert [layer.path for layer in result.report.layers] == [layer.path for layer in whole.report.layers]
    assert [layer.zeros for layer in result.report.layers] == [layer.zeros for layer in whole.report.layers]
    assert not progress_folder(target).exists()
    assert files(tmp_path) == {"whole", "stopped"}


def test_experts_without_tokens_are_still_reported_after_a_resume(tmp_path):
    rows = tiny_models.tokens(1, 1)  # one token and two experts for it: of four, two see none
    settings = {"name": "mixtral", "calibration": rows}
    whole = prune_until(None, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        prune_until(2, tmp_path / "stopped", **settings)
    again = prune_until(None, tmp_path / "stopped", resume=True, **settings)
    assert any("saw no calibration token" in text for text in whole.report.warnings)
    assert again.report.warnings == whole.report.warnings
    assert [one.warnings for one in again.report.layers] == [one.warnings for one in whole.report.layers]


def test_a_search_remembers_its_trials(tmp_path, monkeypatch):
    model = tiny_models.tiny("llama", vocab_size=4096, max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(data.demo_model_path())
    scored, real = [], search.score_models

    def count(models, windows, *rest):
        scored.append(next(iter(models)))
        if len(scored) == limit:
            raise Stop
        return real(models, windows, *rest)

    monkeypatch.setattr(search, "score_models", count)
    settings = {
        "sparsity": 0.5, "method": "magnitude", "tokenizer": tokenizer, "allocation": "atp", "progress": False,
        "search_texts": data.calibration_texts()[:3], "save_format": "dense",
    }  # fmt: skip
    limit = 10**9
    whole = api.prune(model, output_dir=tmp_path / "whole", **settings).report
    everything, limit = len(scored), 4
    scored.clear()
    model = tiny_models.tiny("llama", vocab_size=4096, max_position_embeddings=128)
    with pytest.raises(Stop):
        api.prune(model, output_dir=tmp_path / "stopped", **settings)
    scored.clear()
    limit = 10**9
    again = api.prune(model, output_dir=tmp_path / "stopped", resume=True, **settings).report
    assert len(scored) == everything - 2  # two trials were done, the third was not
    assert again.search == whole.search
    assert same_bits(tmp_path / "whole", tmp_path / "stopped")


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sparsity": 0.6}, "sparsity was 0.5, is 0.6"),
        ({"method": "sparsegpt"}, "recipe was .*Wanda.*, is .*InverseHessian"),
        ({"pattern": "2:4"}, "recipe was .*Unstructured.*, is .*NM"),
        ({"calibration": tiny_models.tokens(6, 12, seed=1)}, "calibration was .*sha256.*, is .*sha256"),
        ({"batch_size": 3}, "calibration was .*batches.*, is "),
        ({"ignore": ("k_proj",)}, "layers to prune was 21, .*, is 18, "),
        ({"propagate": "dense"}, "propagate was pruned, is dense"),
        ({"threads": 2}, "threads was 1, is 2"),
        ({"name": "qwen2"}, "model was LlamaForCausalLM, .*, is Qwen2ForCausalLM"),
    ],
)
def test_another_run_is_refused_and_what_differs_is_named(changed, message, tmp_path):
    target = tmp_path / "stopped"
    with pytest.raises(Stop):
        prune_until(1, target)
    before = files(progress_folder(target))
    with pytest.raises(ValueError, match=f"belongs to another run: .*{message}"):
        prune_until(None, target, resume=True, **changed)
    assert files(progress_folder(target)) == before
    prune_until(None, target, resume=True)


def test_a_changed_weight_is_refused(tmp_path):
    model = tiny_models.tiny("llama")
    settings = {"calibration": tiny_models.tokens(), "output_dir": tmp_path / "x", "progress": False}
    with pytest.raises(Stop):
        api.prune(model, callbacks=[stopping(1)], **settings)
    with pytest.raises(
        ValueError, match="model was LlamaForCausalLM, sha256 [0-9a-f]{64}, is LlamaForCausalLM"
    ):
        api.prune(model, resume=True, **settings)  # the object that was half pruned


def test_progress_is_not_thrown_away_without_a_word(tmp_path):
    target = tmp_path / "stopped"
    with pytest.raises(Stop):
        prune_until(2, target)
    with pytest.raises(FileExistsError, match=r"stopped.pruning-progress .2 blocks done.: pass resume=True"):
        prune_until(None, target)
    with pytest.raises(ValueError, match="resume=True needs output_dir"):
        prune_until(None, None, resume=True)
    other = tmp_path / "other"
    progress_folder(other).mkdir()
    (progress_folder(other) / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="it holds other files"):
        prune_until(None, other)
    assert (progress_folder(other) / "mine.txt").read_text() == "x"


def test_an_interrupt_says_what_is_kept(tmp_path):
    def interrupt(event):
        if event.index == 1:
            raise KeyboardInterrupt

    rows = tiny_models.tokens()
    with pytest.raises(KeyboardInterrupt) as caught:
        api.prune(tiny_models.tiny("llama"), calibration=rows, output_dir=tmp_path / "x", callbacks=[interrupt],
                  progress=False)  # fmt: skip
    folder = progress_folder(tmp_path / "x")
    assert caught.value.__notes__ == [f"2 blocks are done and kept in {folder}; resume goes on with them"]


def test_nothing_is_left_of_a_run_that_did_nothing(tmp_path):
    model = tiny_models.tiny("llama")
    model.model.embed_tokens.weight.data[5] = float("inf")
    rows = tiny_models.tokens()
    rows[0, 0] = 5
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        api.prune(model, calibration=rows, output_dir=tmp_path / "x", progress=False)
    assert files(tmp_path) == set()


def test_a_damaged_state_is_refused(tmp_path):
    target = tmp_path / "stopped"
    with pytest.raises(Stop):
        prune_until(2, target)
    path = progress_folder(target) / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="block-00001.safetensors is damaged"):
        prune_until(None, target, resume=True)


def test_two_processes_do_not_share_a_state(tmp_path):
    identity = {"model": "x"}
    first = Journal.open(tmp_path / "p", identity, resume=False, ranks=ALONE)
    with pytest.raises(BlockingIOError, match="another process is pruning"):
        Journal.open(tmp_path / "p", identity, resume=True, ranks=ALONE)
    first.close()
    Journal.open(tmp_path / "p", identity, resume=True, ranks=ALONE).remove()
    assert files(tmp_path) == set()


def test_a_journal_that_was_half_removed_is_still_one(tmp_path, monkeypatch):
    folder = tmp_path / "p"
    journal = Journal.open(folder, {}, resume=False, ranks=ALONE)
    for index in range(3):
        journal.record_block(index, torch.nn.Linear(2, 2), [], {})
    real, left = Path.unlink, 2

    def unlink(path):
        nonlocal left
        if left == 0:
            raise Stop
        left -= 1
        real(path)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(Stop):
        journal.remove()
    monkeypatch.undo()
    again = Journal.open(folder, {}, resume=True, ranks=ALONE)
    assert again.done == 1
    again.remove()
    assert files(tmp_path) == set()


def test_left_overs_of_a_killed_process_are_swept(tmp_path):
    folder = tmp_path / "p"
    Journal.open(folder, {}, resume=False, ranks=ALONE).close()
    (folder / "block-00000.tmp").write_bytes(b"half")
    (folder / "pysparse-activations-abc").mkdir()
    (folder / "pysparse-activations-abc" / "batch_000000.bin").write_bytes(b"x")
    journal = Journal.open(folder, {}, resume=True, ranks=ALONE)
    assert files(folder) == {"state.json", "lock"}
    assert journal.empty
    journal.remove()


def test_the_engine_takes_a_journal_of_ones_own(tmp_path):
    """Below the public call, for models that are not transformers'."""
    model = tiny_models.tiny("resnet")
    layout = discover(model, ("Conv2d",))
    images = load_calibration([{"pixel_values": tiny_models.images(4)}])
    identity = identity_of(layout, METHODS["wanda"], 0.5, images)
    expected = tiny_models.tiny("resnet")
    run(discover(expected, ("Conv2d",)), METHODS["wanda"], 0.5, images)
    for blocks in (1, None):
        fresh = tiny_models.tiny("resnet")
        journal = Journal.open(tmp_path / "p", identity, resume=True, ranks=ALONE)
        arguments = (discover(fresh, ("Conv2d",)), recipe_for("wanda"), 0.5, images)
        if blocks:
            with pytest.raises(Stop):
                run(*arguments, callbacks=[stopping(blocks)], execution=Execution(journal=journal))
        else:
            run(*arguments, execution=Execution(journal=journal))
        journal.close()
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
