"""The command: results on stdout, everything else on stderr, exit codes 0, 1 and 2."""

import json

import pytest
import torch
from tiny_models import save_llama
from typer.testing import CliRunner

import pysparse
from pysparse import backend, data
from pysparse.cli import app, demo


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """Return the error line of a call that the user must mend."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama with the bundled tokenizer beside it."""
    return save_llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def pruned(dense):
    folder = dense.parent / "pruned"
    result = run(
        "prune", dense, "-o", folder, "--sparsity", 0.6, "--num-samples", 4, "--max-length", 64, "--json", "-"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert "saved in" in result.stderr
    return folder


def test_help_and_version():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "prune", "eval", "bench", "report", "kernels", "doctor"):
        assert command in result.stdout
    assert run("--version").stdout.strip() == pysparse.__version__


def test_kernels_lists_the_table():
    answer = json.loads(run("kernels", "--json", "-").stdout)
    rows = answer["kernels"]
    allowed = {
        held: {held, "unpack", "pairs"} if held == "bitmap" else {held, f"{held}-unpack"}
        for held in ("bitmap", "int8", "nm", "nm-int8")
    }
    assert {row["packing"] for row in answer["choices"]} == set(allowed)
    assert all(row["way"] in allowed[row["packing"]] for row in answer["choices"])
    assert len(rows) == len(backend.kernels())
    taken = {(row["op"], row["format"], row["dtype"]) for row in rows if row["taken"]}
    assert taken == {(row["op"], row["format"], row["dtype"]) for row in rows}
    assert "active level" in run("kernels").stdout or not rows


def test_doctor_reports_and_its_code_says_whether_all_is_well():
    result = run("doctor", "--json", "-")
    findings = json.loads(result.stdout)
    assert result.exit_code == (0 if findings["ok"] else 1)
    assert {check["name"] for check in findings["checks"]} >= {"compiled core", "threads", "one OpenMP"}


def test_report_of_a_saved_model(pruned):
    layers = json.loads(run("report", pruned, "--json", "-").stdout)["layers"]
    sparse = [layer for layer in layers if layer["sparsity"] > 0.5]
    assert len(sparse) == 14
    assert all(
        layer["stored_bytes"] < layer["dense_bytes"] for layer in sparse if layer["dtype"] == "float32"
    )
    table = run("report", pruned)
    assert table.exit_code == 0
    assert "down_proj" in table.stdout


def test_eval_against_the_dense_model(dense, pruned):
    result = run("eval", pruned, "--dense", dense, "--window", 64, "--max-windows", 3, "--json", "-")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["perplexity"]["protocol"]["windows"] == 3
    assert figures["reference"]["tokens"] == figures["perplexity"]["tokens"] == 3 * 63
    assert 0 <= figures["agreement"]["top1"] <= 1


def test_bench_writes_json_and_plot(pruned, tmp_path):
    target, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--prompt-len", 8, "--new-tokens", 4, "--rounds", 2, "--json", target, "--plot", plot)
    result = run("bench", pruned, *options)
    assert result.exit_code == 0, result.stderr
    assert "decode tokens/s" in result.stdout
    assert set(json.loads(target.read_text())["decode"]) == {
        "torch dense",
        "pysparse dense",
        "pysparse sparse",
    }
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_dry_run_prints_the_plan_and_touches_nothing(dense):
    before = sorted(dense.parent.rglob("*"))
    result = run("prune", dense, "--sparsity", 0.5, "--dry-run", "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)
    assert sorted(dense.parent.rglob("*")) == before


def test_dry_run_says_what_only_a_run_can_know_and_computes_it_with_data(dense, tmp_path):
    plan = ("prune", dense, "--sparsity", 0.5, "--dry-run", "--json", "-", "--allocation", "owl:m=2")
    unknown = json.loads(run(*plan).stdout)
    assert (unknown["known"], unknown["layers"][0]["sparsity"]) == (False, None)
    assert "OWL decides from activations" in unknown["warnings"][0]
    (tmp_path / "texts.txt").write_text(data.calibration_texts()[0])
    known = json.loads(run(*plan, "--calib", tmp_path / "texts.txt", "--max-length", 64).stdout)
    assert known["known"]
    assert len({layer["sparsity"] for layer in known["layers"]}) == 2
    assert known["pruned"] == pytest.approx(unknown["pruned"], rel=0.02)


def test_prune_writes_a_report_folder(dense, tmp_path):
    options = ("--method", "magnitude", "--allocation", "atp:beta=0.2", "--targets", "*.mlp.*")
    result = run("prune", dense, "-o", tmp_path / "out", "--report", tmp_path / "report", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "report" / "prune_report.json").read_text())
    assert len(report["layers"]) == 6
    assert {layer["requested"] for layer in report["layers"]} == {0.4, 0.6}
    assert (tmp_path / "report" / "prune_report.png").read_bytes().startswith(b"\x89PNG")
    assert "prune_report.png" in result.stderr


def test_adapt_trains_merges_and_saves(dense, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(data.calibration_texts()[:2])[:4000])
    options = (
        "--method",
        "masked-lora",
        "--sparsity",
        0.5,
        "--host",
        "magnitude",
        "--max-length",
        32,
        "--rank",
        2,
    )
    result = run(
        "adapt", dense, "-o", tmp_path / "out", "--texts", tmp_path / "texts.txt", "--json", "-", *options
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report["rounds"][0]["ranks"] == [2, 2]
    assert (tmp_path / "out" / "adapt_report.json").is_file()
    assert "this model is dense" in refused("adapt", dense, "-o", tmp_path / "no", "--method", "masked-full")
    assert "mean rank" in refused("adapt", dense, "-o", tmp_path / "no", "--sparsity", 0.5, "--rounds", 12)
    assert not (tmp_path / "no").exists()


def test_demo_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_CALIBRATION_SEQUENCES", 4)  # quality is not looked at here
    monkeypatch.setattr(demo, "SPARSITIES", (0.5, 0.7))
    result = run("demo", "--no-speed", "--windows", 2, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "wanda" in result.stdout
    figures = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [row["method"] for row in figures["quality"]] == ["dense", *["magnitude"] * 2, *["wanda"] * 2]
    for row in figures["quality"][1:]:
        assert row["size"]["linears"] < 0.65 * row["size"]["linears_dense"]
    assert "quality and size" in (tmp_path / "out" / "demo.txt").read_text()


def test_wrong_input_is_one_line_and_exit_code_2(dense, tmp_path):
    output = ("-o", tmp_path / "never")
    assert "did you mean 0.7" in refused("prune", dense, *output, "--sparsity", 70)
    assert "did you mean 0.5" in refused("prune", dense, *output, "--sparsity", "50%")
    assert "got 'half'" in refused("prune", dense, *output, "--sparsity", "half")
    assert "wanda" in refused("prune", dense, *output, "--method", "wonda")
    assert "no such model folder" in refused("prune", tmp_path / "nothing", *output)
    assert "--output" in refused("prune", dense)
    assert "4:2" in refused("prune", dense, *output, "--pattern", "4:2")
    assert "did you mean 'owl'" in refused("prune", dense, *output, "--allocation", "owle")
    assert "none.json" in refused("prune", dense, *output, "--allocation", tmp_path / "none.json")
    assert "no_such.txt" in refused("prune", dense, *output, "--calib", tmp_path / "no_such.txt")
    assert "128 positions" in refused("eval", dense, "--window", 999)
    assert "choose one of llama-2-7b" in refused("bench", "--shape", "llama-9")
    assert "either a model folder or --shape" in refused("bench")
    assert "sparse enough" in refused("bench", dense)
    assert "--device cuda times --shape NAME in bf16" in refused("bench", dense, "--device", "cuda")
    assert "go with --device cuda" in refused("bench", "--shape", "tinyllama", "--compiled")
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_bench_on_a_gpu_that_is_not_there():
    message = refused("bench", "--shape", "llama-2-7b", "--device", "cuda")
    assert "device 'cuda' cannot be timed here: " in message
    assert "1.5" in refused("bench", "--shape", "llama-2-7b", "--device", "cuda", "--sparsity", 1.5)


def test_folders_that_cannot_be_written_are_refused_before_the_work(dense, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    # Nothing here may be loaded: the model named does not exist, and that would be said otherwise.
    missing = tmp_path / "no model"
    assert "neither empty nor a model that pysparse saved" in refused(
        "prune", missing, "-o", tmp_path / "full"
    )
    assert "is a file; pass a folder" in refused("prune", missing, "-o", tmp_path / "file")
    assert "file is a file" in refused("prune", missing, "-o", tmp_path / "file" / "out")
    assert "/proc takes no new folder" in refused("prune", missing, "-o", "/proc/out")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_missing_tokenizer_is_said_and_a_method_without_data_needs_none(dense, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((dense / name).read_bytes())
    message = refused("prune", bare, "-o", tmp_path / "out")
    assert "calibration texts need a tokenizer: pass tokenizer=" in message
    assert "save it in the model's folder" in message
    assert not (tmp_path / "out").exists()
    result = run("prune", bare, "-o", tmp_path / "out", "--method", "magnitude")
    assert result.exit_code == 0, result.stderr


def test_a_damaged_checkpoint_is_refused(pruned, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in pruned.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused("report", broken)
    assert weights.name in message
