"""What a GPU run must show before its kernels are chosen by default, and what the file says of them: no GPU needed."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="needs the repository's benchmarks/ folder"
)
RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = json.loads((ROOT / "pysparse" / "data" / "cuda_report.json").read_text())
STEPS = ("build", "test", "nvrtc", "sanitize-memory", "sanitize-races")
LINEAR = ("delta", "fragment", "pair", "nm")
MACHINE = {
    "gpu": "a GPU", "date": "today", "gigabytes_per_second": 1000.0, "multiprocessor_gigahertz": 100.0
}  # fmt: skip


@pytest.fixture
def vouch_cuda(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import vouch_cuda

    return vouch_cuda


def row(kernel, rows, tokens=1, pattern="", **changes):
    """One figure of a linear kernel: on the line 3 + 0.25 MB."""
    size = 2 * rows * 4096
    at = {"kernel": kernel, "rows": rows, "cols": 4096, "sparsity": 0.5, "pattern": pattern, "tokens": tokens}
    return at | {"bytes": size, "microseconds": 3 + 0.25 * size / 1e6, "error": 1e-3} | changes


def linear_rows(kernels=("cublas", *LINEAR)):
    return [row(name, rows) for name in kernels for rows in (1024, 2048, 4096, 8192)]


class Folder:
    """What a run leaves: figures, the log of the tests, gpu_report.json."""

    def __init__(self, path, vouch_cuda):
        self.path, self.module, self.log = path, vouch_cuda, path / "test.log"
        self.tests("430 passed, 1 skipped in 50.00s")
        self.hashes = {name: f"{name}-1" for name in LINEAR}

    def tests(self, last, *failed):
        self.log.write_text(
            "".join(f"FAILED tests/test_x.py::{name}[2-True]\n" for name in failed) + last + "\n"
        )

    def figures(self, name="cuda.json", **content):
        whole = {"machine": MACHINE, "source_hashes": self.hashes, "rows": linear_rows(), "wrong": []}
        path = self.path / name
        path.write_text(json.dumps(whole | content))
        return path

    def run(self, last_line="430 passed, 1 skipped in 50.00s", steps=(), **content):
        codes = dict.fromkeys(STEPS, 0) | dict(steps)
        noted = {
            name: {"exit_code": code, "last_line": "the end"}
            for name, code in codes.items()
            if code != "none"
        }
        noted["test"]["last_line"] = last_line
        whole = {"commit": "abc", "source_hashes": self.hashes, "steps": noted}
        (self.path / "gpu_report.json").write_text(json.dumps(whole | content))

    def vouch(self, *paths, **options):
        return self.module.vouch(paths or [self.figures()], self.log, **options)


@pytest.fixture
def folder(tmp_path, vouch_cuda):
    found = Folder(tmp_path, vouch_cuda)
    found.run()
    return found


def test_the_committed_report_comes_out_of_the_committed_figures_again(tmp_path, vouch_cuda, capsys):
    """Of the log, which is not kept, the file itself has the last line and the test that failed."""
    (failed,) = COMMITTED["excused"]
    log = tmp_path / "test.log"
    log.write_text(f"FAILED python_tests/test_cuda.py::{failed}[1]\n" * 3 + COMMITTED["tests"])
    figures = [RESULTS / f"cuda{name}_h200.json" for name in ("", "_attention", "_tables")]
    lost = {"gpu_report": "not kept"}
    found = vouch_cuda.vouch(figures, log, excused=COMMITTED["excused"] | lost)
    assert found.pop("excused") == COMMITTED["excused"] | lost
    assert found == {key: value for key, value in COMMITTED.items() if key != "excused"}


def test_a_whole_run_vouches(folder):
    found = folder.vouch()
    assert found["source_hashes"] == folder.hashes
    assert found["tests"] == "430 passed, 1 skipped in 50.00s"
    assert found["report"] == "cuda.json"
    assert found["attention_crossover"] is None
    assert found["costs"]["nm"]["1"] == pytest.approx([3, 0.25, 0], abs=1e-3)
    assert "others" not in found


@pytest.mark.parametrize(
    ("last", "failed", "message"),
    [
        ("2 passed, 428 skipped", (), "ends with: 2 passed, 428 skipped; at least 400 must have passed"),
        ("1 passed, 429 deselected", (), "at least 400"), ("425 passed, 5 skipped", (), "at most 4 been skipped"),
        ("429 passed, 1 error", (), "without errors"), ("429 skipped", (), "at least 400"), ("", (), "is empty"),
        ("2 failed, 428 passed", ("test_a",), "names 1 of the failed tests"),
        ("1 failed, 428 passed", ("test_a",), "not excused: test_a: failed"),
    ],
)  # fmt: skip
def test_a_log_that_proves_little_is_refused(folder, last, failed, message):
    folder.tests(last, *failed)
    folder.run(last_line=last, steps={"test": int(bool(failed))})
    with pytest.raises(ValueError, match=message):
        folder.vouch()


def test_an_excuse_is_for_what_was_found_and_goes_into_the_file(folder):
    folder.tests("1 failed, 429 passed", "test_a")
    folder.run(last_line="1 failed, 429 passed", steps={"test": 1, "sanitize-races": 127})
    excused = {"test_a": "the reason", "sanitize-races": "no compute-sanitizer there"}
    assert folder.vouch(excused=excused)["excused"] == excused
    with pytest.raises(ValueError, match="not excused: sanitize-races: exit code 127: the end"):
        folder.vouch(excused={"test_a": "the reason"})
    with pytest.raises(ValueError, match="excused, but not found: test_b"):
        folder.vouch(excused=excused | {"test_b": "no such failure"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [*linear_rows(), row("delta", 4096, error=0.9)]}, "wrong: .'delta 4096 x 4096, 1 tokens: 0.9'"),
        ({"wrong": ["sweep"]}, "wrong: .'sweep'"),
        ({"skipped": ["8192x28672"]}, "the time was too short for .'8192x28672'"),
        ({"failed": {"cusparse": "no room"}}, "not excused: cusparse: no room"),
        ({"rows": linear_rows(LINEAR)}, "no row of cublas at 1 token"),
        ({"rows": linear_rows(("cublas", "delta", "fragment", "pair"))}, "no row of nm at 1 token"),
        ({"rows": [*linear_rows(), *([row("nm", 64, 8)] * 4)]}, "nm at 8 tokens: 4 rows of 1 shapes"),
        ({"rows": [*linear_rows(), *(row("nm", n, 8) for n in (1, 2, 3, 4))]}, "nm at 8 tokens without cublas"),
        ({"rows": [row("delta", 64)]}, "no row of cublas"), ({"rows": []}, "no row of cublas"),
        ({"rows": [*linear_rows(), row("delta", 64, microseconds=float("nan"))]}, "microseconds is nan"),
        ({"rows": [*linear_rows(), row("delta", 64, error="nan")]}, "error is 'nan'"),
        ({"rows": [*linear_rows(), row("delta", 64, microseconds=0)]}, "no time or no bytes"),
        ({"machine": MACHINE | {"gigabytes_per_second": 0.0}}, "the GPU tells no gigabytes_per_second"),
        ({"source_hashes": {}, "cut_off": "in shape_64x64"}, "vouches for no kernel: in shape_64x64"),
        ({"source_hashes": {"other": "1"}}, "'other' is no kernel"),
        ({"source_hashes": {"pruning": "1"}}, "vouches for pruning without a row"),
        ({"source_hashes": {"attention": "1"}}, "vouches for attention without flash, .*, a check of stripes 10%"),
        ({"errors": {"16384": {"flash": 0.02}}}, "wrong: .'flash at 16384'"),
        ({"source_hashes": dict.fromkeys(LINEAR, "other")}, "is of other sources of delta, fragment, pair, nm"),
    ],
)  # fmt: skip
def test_figures_that_prove_nothing_are_refused(folder, content, message):
    with pytest.raises(ValueError, match=message):
        folder.vouch(folder.figures(**content))


def test_nm_is_timed_on_a_pattern_and_the_others_without(folder):
    loose = [row(name, rows, pattern="1:4") for name in LINEAR for rows in (1024, 2048, 4096, 8192)]
    only_cublas = linear_rows(("cublas",))
    with pytest.raises(ValueError, match="no row of delta at 1 token"):
        folder.vouch(folder.figures(rows=[*only_cublas, *loose]))
    folder.hashes = {"nm": "nm-1"}
    folder.run()
    assert folder.vouch(folder.figures(rows=[*only_cublas, *loose]))["costs"].keys() == {"cublas", "nm"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"last_line": "431 passed in 50.00s"}, "is of other tests: they end with '431 passed in 50.00s'"),
        ({"source_hashes": {}}, "is of other sources of delta, fragment, pair, nm than the figures"),
        ({"commit": None}, "commit: the run names no commit"),
        ({"steps": {"nvrtc": "none"}}, "nvrtc: was not run"),
        ({"steps": {"sanitize-memory": 9}}, "sanitize-memory: exit code 9"),
        ({"steps": {"test": 124}}, "test: exit code 124"),
    ],
)  # fmt: skip
def test_the_steps_of_the_run_are_asked(folder, content, message):
    folder.run(**content)
    with pytest.raises(ValueError, match=message):
        folder.vouch()


def test_a_log_on_its_own_does_not_say_what_was_tested(folder):
    (folder.path / "gpu_report.json").unlink()
    with pytest.raises(ValueError, match="not excused: gpu_report: there is no .*gpu_report.json"):
        folder.vouch()
    assert folder.vouch(excused={"gpu_report": "lost"})["excused"] == {"gpu_report": "lost"}


def test_reports_of_one_run_are_of_one_gpu_and_one_build(folder):
    tables = {"rows": [{"group": "pruning"}], "source_hashes": {"pruning": "p"}}
    folder.run(source_hashes=folder.hashes | {"pruning": "p"})
    first, second = folder.figures(), folder.figures("cuda_tables.json", **tables)
    assert folder.vouch(first, second)["source_hashes"] == folder.hashes | {"pruning": "p"}
    elsewhere = folder.figures("b.json", **tables, machine=MACHINE | {"gpu": "another"})
    with pytest.raises(ValueError, match="several GPUs: GPU is a GPU and another"):
        folder.vouch(first, elsewhere)
    with pytest.raises(ValueError, match="several sources: nm is nm-1 and nm-2"):
        folder.vouch(first, folder.figures("c.json", source_hashes={"nm": "nm-2"}))


def test_a_later_run_keeps_what_it_did_not_cover(folder):
    folder.hashes = {"pruning": "p-1"}
    folder.run()
    tables = folder.figures("cuda_tables.json", rows=[{"group": "pruning"}])
    found = folder.vouch(tables, before=COMMITTED)
    assert found == COMMITTED | {
        "source_hashes": COMMITTED["source_hashes"] | folder.hashes,
        "others": [
            {
                "gpu": "a GPU",
                "date": "today",
                "tests": "430 passed, 1 skipped in 50.00s",
                "kernels": ["pruning"],
            }
        ],
    }
    with pytest.raises(ValueError, match="no report is of linear kernels"):
        folder.vouch(tables)

    # All linear kernels anew, on another GPU: costs and tests are of that run, the rest says whose it is.
    folder.hashes = {name: f"{name}-2" for name in LINEAR}
    folder.run()
    again = folder.vouch(before=found)
    assert again["gpu"] == "a GPU"
    assert "excused" not in again
    assert again["costs"].keys() == {"cublas", *LINEAR}
    assert again["attention_crossover"] == COMMITTED["attention_crossover"]
    assert again["source_hashes"] == found["source_hashes"] | folder.hashes
    ours, earlier = again["others"]
    assert ours["kernels"] == ["pruning"]
    assert earlier["kernels"] == ["attention", "embedding", "shapley"]
    assert earlier["excused"] == COMMITTED["excused"]

    # One of them alone: its costs cannot stand beside those of another GPU.
    folder.hashes = {"nm": "nm-3"}
    folder.run()
    nm = folder.figures(rows=linear_rows(("cublas", "nm")))
    with pytest.raises(
        ValueError, match="costs of delta, fragment, pair are of NVIDIA H200: measure them on a GPU too"
    ):
        folder.vouch(nm, before=COMMITTED)
    assert folder.vouch(nm, before=again)["costs"]["delta"] == again["costs"]["delta"]


def test_what_cannot_be_read_is_one_sentence_and_changes_nothing(folder, vouch_cuda, monkeypatch):
    target, whole = folder.path / "target.json", folder.figures()
    target.write_text(json.dumps(COMMITTED))
    half = folder.path / "half.json"
    half.write_text(whole.read_text()[:200])
    cut = folder.path / "cut.json"
    cut.write_text(json.dumps({"machine": MACHINE, "source_hashes": folder.hashes, "rows": []}))
    for path, message in [
        (half, "half.json is no whole JSON: "), (folder.path / "none.json", "none.json: No such file"),
        (cut, "cut.json lacks wrong: it was cut off"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            folder.vouch(path)
    monkeypatch.setattr(sys, "argv", ["vouch_cuda.py", str(half), str(folder.log), "--target", str(target)])
    with pytest.raises(SystemExit, match=r"^vouch_cuda.py: .*half.json is no whole JSON: .*$"):
        vouch_cuda.main()
    assert json.loads(target.read_text()) == COMMITTED


def test_a_fit_finds_the_line_behind_its_figures(vouch_cuda):
    rows = [
        {
            "microseconds": 3 + 0.25 * mb + 0.1 * rows * 4096 / 1e6,
            "bytes": mb * 1e6,
            "rows": rows,
            "cols": 4096,
            "sparsity": mb,
        }
        for rows in (1024, 4096, 11008)
        for mb in (5, 20)
    ]
    line, worst = vouch_cuda.fit(rows)
    assert line == pytest.approx([3, 0.25, 0.1], abs=1e-3)
    assert worst < 1e-9


def test_weights_of_a_pattern_are_fitted_for_nm_only(vouch_cuda):
    def one(kernel, pattern, rows, sparsity, entry_bytes, slow=1):
        size = entry_bytes * rows * 4096
        at = {"rows": rows, "cols": 4096, "sparsity": sparsity, "bytes": size, "tokens": 1, "kernel": kernel}
        return at | {"pattern": pattern, "microseconds": slow * (3 + 0.25 * size / 1e6)}

    run = []
    for rows in (4096, 8192, 11008):
        run += [one("nm", "1:4", rows, 0.75, 0.5625), one("nm", "4:8", rows, 0.5, 1.1875)]
        run += [one("delta", "", rows, s, 2.5 * (1 - s)) for s in (0.5, 0.7)]
        run += [one("delta", "1:4", rows, 0.75, 0.63, slow=3), one("pair", "1:4", rows, 0.75, 1.125, slow=3)]
        run += [one("pair", "", rows, 0.5, 1.125)]
    found = vouch_cuda.costs(run)
    assert found.keys() == {"nm", "delta", "pair"}
    for by_tokens in found.values():
        assert by_tokens["1"] == pytest.approx([3, 0.25, 0], abs=1e-3)


def test_the_attention_crossover_lies_between_the_lengths_that_show_it(vouch_cuda):
    def crossover(*gains):
        rows = [{"length": n, "over_cudnn": gain, "kernel": vouch_cuda.ANCHOR} for n, gain in gains]
        return vouch_cuda.attention_crossover([*rows, {"length": 1, "over_cudnn": 9.0, "kernel": "other"}])

    assert crossover((1000, 0.5), (4000, 0.9)) is None
    assert crossover((1000, 1.2), (4000, 2.0)) == 1000
    assert crossover((1000, 1.05 / 2), (4000, 1.05 * 2)) == 2000  # half way, in logarithms
    assert crossover() is None
