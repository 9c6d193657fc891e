"""The GPU run without a GPU: its steps with stand-ins for the commands, its report, and what it refuses to count."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the repository's benchmarks/ folder")
SCRIPTS = [f"bench_cuda{name}" for name in ("", "_attention", "_end_to_end", "_peers", "_tables")]
HALVES = ["build test nvrtc sanitize bench", "build attention tables end"]


@pytest.fixture
def script(monkeypatch):
    """Import one of the scripts the way ``python benchmarks/NAME.py`` finds its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class Machine:
    """A copy of the scripts without history, and stand-ins for the commands that need a GPU."""

    def __init__(self, path):
        self.path, self.out, self.bin = path, path / "out", path / "bin"
        (path / "benchmarks").mkdir()
        for name in ("gpu_check.sh", "gpu_report.py"):
            shutil.copy(BENCHMARKS / name, path / "benchmarks")
        self.bin.mkdir()
        for name in ("nvidia-smi", "cmake", "compute-sanitizer"):
            self.command(name, "exit 0")
        self.python()

    def command(self, name, text):
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def python(self, *cases):
        """Only the report is written by Python itself; ``cases`` say what other calls do."""
        report = f'*gpu_report*) exec {sys.executable} "$@";;'
        self.command("python3", "\n".join(['case "$*" in', report, *cases, "esac"]))

    def run(self, *steps, **variables):
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "GPU_OUT": str(self.out), "GPU_COMMIT": "abc", **variables}
        command = ["bash", str(self.path / "benchmarks/gpu_check.sh"), *steps]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def report(self):
        return json.loads((self.out / "gpu_report.json").read_text())


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_every_step_is_noted_with_what_it_ran(machine):
    done = machine.run()
    assert done.returncode == 0, done.stdout + done.stderr
    steps = machine.report()["steps"]
    assert list(steps) == [
        "build", "test", "nvrtc", "sanitize-memory", "sanitize-races", "bench", "attention", "tables", "end"
    ]  # fmt: skip
    assert {one["exit_code"] for one in steps.values()} == {0}
    assert {one["commit"] for one in steps.values()} == {machine.report()["commit"]} == {"abc"}
    assert "failed: none" in done.stdout


def test_a_benchmark_cut_off_in_its_file_does_not_stop_the_others_from_being_noted(machine):
    machine.python('*bench_cuda.py*) printf \'{"machine": {\' >"$GPU_OUT/cuda.json"; sleep 30;;')
    machine.command("timeout", f'shift 2; exec {shutil.which("timeout")} 0.5 "$@"')
    done = machine.run("bench", "attention")
    assert done.returncode == 1
    report = machine.report()
    assert {name: one["exit_code"] for name, one in report["steps"].items()} == {"bench": 124, "attention": 0}
    assert report["unreadable"] == ["cuda.json"]
    assert "kernels" not in report
    assert "failed: bench report-of-bench report-of-attention" in done.stdout


def test_a_report_that_cannot_be_written_fails_the_run(machine):
    machine.python("*report-writer*) ;;")
    (machine.path / "benchmarks/gpu_report.py").write_text("def commit(): return 'abc'\nraise_ = 1 / 0\n")
    assert machine.run("bench").returncode == 2  # it does not even tell the commit
    (machine.path / "benchmarks/gpu_report.py").write_text(
        "def commit(): return 'abc'\nif __name__ == '__main__': raise OSError('no room')\n"
    )
    done = machine.run("bench")
    assert done.returncode == 1
    assert "failed: report-of-bench" in done.stdout


def test_an_unknown_step_is_refused_before_anything_runs(machine):
    done = machine.run("build", "tset")
    assert done.returncode == 2
    assert "unknown step 'tset': choose from build test nvrtc sanitize bench" in done.stderr
    assert not machine.out.exists()


def test_sources_without_history_need_their_commit_named(machine):
    done = machine.run("build", GPU_COMMIT="")
    assert done.returncode == 2
    assert "set GPU_COMMIT to the commit of these sources" in done.stderr


def test_without_a_gpu_the_run_ends_at_its_build(machine):
    machine.command("nvidia-smi", "echo no devices were found; exit 6")
    done = machine.run()
    assert done.returncode == 1
    steps = machine.report()["steps"]
    assert steps["build"]["exit_code"] == 6
    assert steps["build"]["last_line"] == "no devices were found"
    others = [one for name, one in steps.items() if name != "build"]
    assert len(others) == 8
    assert {(one["exit_code"], one["last_line"]) for one in others} == {(125, "left out: the build failed")}


def test_no_step_is_started_without_time_for_it(machine):
    done = machine.run("build", "end", GPU_SECONDS="1")
    assert done.returncode == 1
    assert "failed: build end" in done.stdout
    for one in machine.report()["steps"].values():
        assert one["exit_code"] == 124
        assert "of 1 s are left" in one["last_line"]


@pytest.mark.parametrize("steps", HALVES)
def test_the_limits_of_each_half_fit_into_the_time_of_one_run(machine, steps):
    """And each is above what the step has taken on an H200."""
    machine.command("timeout", f'echo "$2" >>{machine.path}/limits; shift 2; exec "$@"')
    assert machine.run(*steps.split()).returncode == 0
    limits = [int(line) for line in (machine.path / "limits").read_text().split()]
    assert sum(limits) <= 540
    taken = {"build": 62, "test": 51, "nvrtc": 39, "bench": 54, "attention": 51, "tables": 45, "end": 165}
    names = list(machine.report()["steps"])
    assert all(limit > 1.4 * taken.get(name, 20) for name, limit in zip(names, limits, strict=True))


def test_the_tests_are_told_that_there_is_a_gpu(machine):
    machine.python('*pytest*) echo "required: $PYSPARSE_REQUIRE_GPU";;')
    machine.run("test", "nvrtc")
    lines = {one["last_line"] for one in machine.report()["steps"].values()}
    assert lines == {"required: 1"}


def test_skips_for_want_of_a_gpu_fail_where_one_is_promised(tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: a\n    slow: b\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def skip(reason): return pytest.mark.skipif(True, reason=reason)\n"
        "@pytest.mark.gpu\n@skip('no CUDA kernels: no driver')\ndef test_kernel(): pass\n"
        "@pytest.mark.gpu\ndef test_inside(): pytest.skip('no NVRTC')\n"
        "@pytest.mark.gpu\n@skip('one CUDA device only')\ndef test_two(): pass\n"
        "@skip('this machine has a CUDA device')\ndef test_cpu(): pass\n"
        "@pytest.mark.gpu\ndef test_runs(): pass\n"
        "@pytest.mark.gpu\n@pytest.mark.xfail\ndef test_known(): assert False\n"
    )
    monkeypatch.setenv("PYSPARSE_REQUIRE_GPU", "1")
    seen = {}

    class Outcomes:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                seen[report.nodeid.partition("::")[2]] = report.outcome, str(report.longrepr)

    options = ["-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), str(tmp_path)]
    assert pytest.main(options, plugins=[conftest, Outcomes()]) == 1
    promised = "skipped although PYSPARSE_REQUIRE_GPU is set: "
    assert seen.pop("test_kernel") == ("failed", promised + "no CUDA kernels: no driver")
    assert seen.pop("test_inside") == ("failed", promised + "no NVRTC")
    assert {name: outcome for name, (outcome, _) in seen.items()} == {
        "test_two": "skipped", "test_cpu": "skipped", "test_runs": "passed", "test_known": "skipped"
    }  # fmt: skip


@pytest.fixture
def gather(script, tmp_path, monkeypatch):
    """Note a step of a run whose kernels and commit are given."""
    module = script("gpu_report")

    def note(step, hashes, commit="abc", code=0):
        monkeypatch.setattr(module, "source_hashes", lambda: hashes)
        monkeypatch.setenv("GPU_COMMIT", commit)
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path), step, str(code), "3"])
        exit_code = module.main()
        return exit_code, json.loads((tmp_path / "gpu_report.json").read_text())

    return note


def figures(hashes, commit="abc"):
    return {"machine": {"pysparse_commit": commit, "kernel_sources": hashes}, "rows": [1]}


def test_steps_and_figures_of_other_sources_are_dropped(gather, tmp_path):
    old, new = {"delta": "1"}, {"delta": "2"}
    (tmp_path / "cuda.json").write_text(json.dumps(figures(old)))
    gather("build", old)
    _, report = gather("bench", old)
    assert list(report["steps"]) == ["build", "bench"]
    assert report["kernels"] == figures(old)
    _, report = gather("build", new)
    assert list(report["steps"]) == ["build"]
    assert report["source_hashes"] == new
    assert "kernels" not in report
    assert report["stale"] == ["cuda.json"]
    (tmp_path / "cuda.json").write_text(json.dumps(figures(new)))
    assert gather("bench", new)[1]["kernels"] == figures(new)
    _, report = gather("attention", new, commit="def")
    assert list(report["steps"]) == ["attention"]
    assert report["commit"] == "def"
    assert report["stale"] == ["cuda.json"]


def test_what_is_damaged_or_missing_is_said_and_does_not_stop_the_report(gather, tmp_path):
    gather("build", {})
    for text in ('{"steps": {', "[1]", "\x00"):
        (tmp_path / "gpu_report.json").write_text(text)
        (tmp_path / "cuda_tables.json").write_bytes(b'{"rows": "\xff')
        exit_code, report = gather("tables", {}, code=124)
        assert exit_code == 1
        assert report["unreadable"] == ["gpu_report.json", "cuda_tables.json"]
        assert report["steps"]["tables"]["exit_code"] == 124
        assert report["steps"]["tables"]["last_line"] == "no tables.log"
    (tmp_path / "tables.log").write_text("\n")
    assert gather("tables", {})[1]["steps"]["tables"]["last_line"] == "tables.log is empty"


@pytest.fixture
def start(script, tmp_path, monkeypatch):
    """Start a run on a GPU of which nothing is known."""
    module = script("cuda_run")
    monkeypatch.setattr(module, "card", lambda: {"gpu": "none"})
    monkeypatch.setattr("pysparse.backend.cuda_missing_reason", lambda: "")
    return lambda **content: module.Run.start(tmp_path / "figures.json", **content)


def saved(run):
    return json.loads(run.out.read_text(), parse_constant=pytest.fail)


def test_the_file_of_a_run_is_whole_at_any_time_and_says_where_it_was_cut_off(start):
    run = start()
    assert saved(run)["cut_off"] == "before its first part"
    seen = []
    assert run.part("first", lambda: seen.append(saved(run)["cut_off"]) or float("nan"))
    assert seen == ["in first"]
    assert saved(run)["cut_off"] == "after first"
    assert saved(run)["first"] == "nan"
    assert not run.part("second", lambda: 1 / 0)
    assert saved(run)["failed"] == {"second": "ZeroDivisionError: division by zero"}
    with pytest.raises(KeyboardInterrupt):
        run.part("third", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert saved(run)["cut_off"] == "in third"
    assert run.close() == 1
    assert "cut_off" not in saved(run)
    assert not list(run.out.parent.glob("*.part"))


@pytest.mark.parametrize(("what", "code"), [("wrong", 1), ("failed", 1), ("skipped", 1), ("rows", 0)])
def test_what_is_wrong_or_lacks_is_an_exit_code(start, what, code):
    run = start(**{what: ["delta"]})
    assert run.close() == code


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_gpu_a_benchmark_says_so_before_it_builds_anything(script, name, tmp_path, monkeypatch):
    module = script(name)
    monkeypatch.setattr("pysparse.backend.cuda_missing_reason", lambda: "no CUDA driver is installed")
    monkeypatch.setattr(torch, "randn", lambda *_, **__: pytest.fail("it makes weights"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(tmp_path / "figures.json")])
    with pytest.raises(SystemExit, match="no CUDA kernels can be timed here: no CUDA driver is installed"):
        module.main()
    assert not list(tmp_path.iterdir())


def test_what_an_engine_has_shown_is_saved_before_the_next_measurement(script, start, tmp_path, monkeypatch):
    module = script("bench_cuda_end_to_end")

    def compare(models, settings, *, on_measured, **_):
        on_measured("decode", {"torch dense": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "engines_on_cuda", lambda *_, **__: ({"torch dense": None}, {"sparse": 0.01}))
    monkeypatch.setattr(module, "compare_on_cuda", compare)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--out", str(tmp_path / "end.json")])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    report = json.loads((tmp_path / "end.json").read_text())
    assert report["difference"] == {"sparse": 0.01}
    assert report["decode"] == {"torch dense": 1.0}
    assert report["cut_off"] == "after decode"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # torch's own, once a process
def test_cusparse_walks_through_copies_that_no_cache_holds(script, monkeypatch):
    module = script("bench_cuda")
    monkeypatch.setattr(module, "copies_of", lambda size: 3)
    weight = torch.randn(8, 16) * (torch.rand(8, 16) < 0.5)
    copies = module.csr_copies(weight)
    assert len({one.values().data_ptr() for one in copies}) == 3
    assert all(torch.equal(one.to_dense(), weight) for one in copies)
    call = module.in_turn([torch.full((1, 1), float(i)) for i in range(3)], torch.ones(1, 1))
    assert [float(call()) for _ in range(5)] == [0, 1, 2, 0, 1]
