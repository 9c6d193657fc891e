"""What the build of the CUDA kernels refuses, and what it asks nvcc for."""

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
def test_code_for_the_listed_gpus_and_ptx_for_later_ones(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=AUTO", "-DPYSPARSE_WERROR=ON")
    assert code == 0, message
    commands = (tmp_path / "compile_commands.json").read_text()
    for arch in (80, 86, 89, 90, 100, 120):
        assert f"arch=compute_{arch},code=[sm_{arch}]" in commands
    assert "arch=compute_80,code=[compute_80]" in commands
    assert "-Werror=all-warnings" in commands
    assert "-fvisibility=hidden" in commands


def test_without_a_compiler_auto_leaves_the_cuda_half_out(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=AUTO", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert code == 0, message
    assert not list((tmp_path / "csrc").rglob("*cuda*"))
