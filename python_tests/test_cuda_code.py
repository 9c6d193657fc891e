"""What nvcc makes of the CUDA sources: no warning, no spill, registers within budget, the instructions meant."""

import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from cuda_budgets import check_log

ROOT = Path(__file__).parents[1]
KERNELS = [
    "delta",
    "nm",
    "fragment",
    "pair",
    "strip",
    "attention",
    "stripes",
    "embedding",
    "shapley",
    "pruning",
]
HOST_ONLY = ["machine_code", "versions"]
INSTRUCTIONS = {
    "delta": ["LDG.E.EF.128"],
    "nm": ["LDG.E.EF.128", "LDG.E.EF.U16"],
    "fragment": ["HMMA.16816", "LDGSTS.E.BYPASS.128"],
    "pair": ["HMMA.SP"],
    "attention": ["HMMA.16816", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "MUFU.EX2"],
    "stripes": ["HMMA.16816", "LDSM.16.M88.4"],
    "shapley": ["IMAD.WIDE.U32", "MUFU.RCP"],
    "pruning": ["ATOMS.POPC.INC.32"],  # a histogram's equal digits in one step
}


def disassembler():
    """Return nvdisasm of the PATH or of the wheel nvidia-cuda-nvdisasm; None without either."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm")
    return shutil.which("nvdisasm") or next(map(str, wheels), None)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")

    @cache
    def compile_cuda(source, arch):
        target = folder / f"{source}-{arch}.cubin"
        command = [
            "nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cuda",
            "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-cubin",
            "-o", str(target), str(ROOT / f"csrc/cuda/{source}.cu"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return target, done.stderr

    return compile_cuda


def test_every_source_is_named_here():
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert sources == {*KERNELS, *HOST_ONLY}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", KERNELS)
def test_no_spills_and_registers_within_budget(source, arch, compiled):
    check_log(compiled(source, arch)[1])


@pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not installed (pip: nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", KERNELS)
def test_the_instructions_that_are_meant(source, arch, compiled):
    done = subprocess.run(
        [disassembler(), str(compiled(source, arch)[0])], capture_output=True, text=True, check=True
    )
    code = done.stdout
    assert not re.search(r"\b(LDL|STL)\b", code)
    for instruction in INSTRUCTIONS.get(source, []):
        assert instruction in code, instruction
    if source == "fragment":
        assert "POPC" not in code  # 16 a cycle would be the wall
    if source in (
        "delta",
        "nm",
        "fragment",
        "pair",
        "strip",
    ):  # they start early, so they wait for their inputs
        assert ("ACQBULK" in code) == (arch >= 90)


@pytest.mark.parametrize("source", HOST_ONLY)
def test_sources_without_kernels_compile(source, tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_90", f"-I{ROOT}/csrc/cuda", "-Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", "-c", "-o", str(tmp_path / "out.o")]
    done = subprocess.run([*command, str(ROOT / f"csrc/cuda/{source}.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
