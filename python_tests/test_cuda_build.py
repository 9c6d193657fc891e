"""What the build of the CUDA kernels refuses, and what it asks nvcc for."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def configure(folder, *options):
    """Return (exit code, message on one line) of a configuration."""
    command = [
        "cmake", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_an_unknown_choice_is_refused(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=yes")
    assert code
    assert "PYSPARSE_CUDA=yes: choose ON, OFF or AUTO" in message


@needs_nvcc
def test_gpus_before_ampere_are_refused(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=ON", "-DPYSPARSE_CUDA_ARCHS=90;75")
    assert code
    assert "'75' is no compute capability from 80 on" in message


@needs_nvcc
def test_gpus_that_nvcc_does_not_know_are_refused(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=ON", "-DPYSPARSE_CUDA_ARCHS=90;999")
    assert code
    assert re.search(r"nvcc [\d.]+ does not know 999; it knows [\d;]*90", message)


@needs_nvcc
def test_code_for_the_listed_gpus_and_ptx_for_later_ones(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=AUTO", "-DPYSPARSE_WERROR=ON")
    assert code == 0, message
    commands = (tmp_path / "compile_commands.json").read_text()
    for arch in (80, 86, 89, 90, 100, 120):
        assert f"arch=compute_{arch},code=[sm_{arch}]" in commands
    assert "arch=compute_80,code=[compute_80]" in commands
    assert "arch=compute_90,code=[compute_90]" in commands  # from 90 on, launches start early and must wait
    assert "-Werror=all-warnings" in commands
    assert "-fvisibility=hidden" in commands
    # The module itself is told the whole list: compile it, as it is.
    entry = next(one for one in json.loads(commands) if one["file"].endswith("cuda_module.cpp"))
    done = subprocess.run(
        entry["command"], shell=True, cwd=entry["directory"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "80,86,89,90,100,120" in entry["command"]


def test_without_a_compiler_auto_leaves_the_cuda_half_out(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=AUTO", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert code == 0, message
    assert not list((tmp_path / "csrc").rglob("*cuda*"))


def test_a_gpu_run_without_time_leaves_a_whole_report(tmp_path):
    environment = {**os.environ, "GPU_OUT": str(tmp_path), "GPU_SECONDS": "1"}
    script = ROOT / "benchmarks/gpu_check.sh"
    done = subprocess.run(
        [str(script), "build", "end"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "failed: build end" in done.stdout
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert list(report["steps"]) == ["build", "end"]
    for step in report["steps"].values():
        assert step["exit_code"] == 124
        assert "of 1 s are left" in step["last_line"]
