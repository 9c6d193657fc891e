"""The build of the CUDA kernels: what it refuses, what it asks nvcc for, and that a module comes out which loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from pysparse import backend, nvrtc
from pysparse.ops.cuda import STRIP_TOKENS

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
@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("90;75", "'75' is no compute capability from 80 on"),
        ("90;999", r"nvcc [\d.]+ does not know 999; it knows [\d;]*90"),
        (
            "",
            r"PYSPARSE_CUDA_ARCHS is empty: list compute capabilities without their point, as in 80,90 \(nvcc",
        ),
        ("native", "'native' is not a number; list compute capabilities without their point, as in 80,90"),
        ("9.0", "'9.0' is not a number; list compute capabilities without their point, as in 80,90"),
    ],
)
def test_what_names_no_gpu_of_these_kernels_is_refused(archs, message, tmp_path):
    code, found = configure(tmp_path, "-DPYSPARSE_CUDA=ON", f"-DPYSPARSE_CUDA_ARCHS={archs}")
    assert code
    assert re.search(message, found), found


@needs_nvcc
def test_commas_separate_gpus_as_semicolons_do(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=ON", "-DPYSPARSE_CUDA_ARCHS=90,100,80,90")
    assert code == 0, message
    commands = (tmp_path / "compile_commands.json").read_text()
    assert set(re.findall(r"code=\[(\w+)\]", commands)) == {
        *("sm_80", "sm_90", "sm_100"),
        *("compute_80", "compute_90"),
    }
    assert re.search(r"PYSPARSE_CUDA_ARCH_LIST=\W+80,90,100\b", commands)


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
    assert "Built without CUDA kernels (PYSPARSE_CUDA=AUTO): the CUDA kernels need nvcc" in message
    assert not list((tmp_path / "csrc").rglob("*cuda*"))


def test_without_a_compiler_on_is_an_error(tmp_path):
    code, message = configure(tmp_path, "-DPYSPARSE_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert code
    assert "PYSPARSE_CUDA=ON: the CUDA kernels need nvcc, and no CUDA compiler was found" in message


@pytest.fixture
def old_nvcc(tmp_path):
    """The nvcc of this machine under a version before 12.8: CMake learns it from a source that it has compiled."""
    script = tmp_path / "nvcc"
    script.write_text(
        "#!/bin/sh\nif [ -f CMakeCUDACompilerId.cu ]; then\n"
        "  sed -i 's/DEC(__CUDACC_VER_MAJOR__)/DEC(12)/; s/DEC(__CUDACC_VER_MINOR__)/DEC(4)/' CMakeCUDACompilerId.cu\n"
        f'fi\nexec {shutil.which("nvcc")} "$@"\n'
    )
    script.chmod(0o755)
    return script


@needs_nvcc
@pytest.mark.parametrize("choice", ["AUTO", "ON"])
def test_an_nvcc_that_is_too_old(choice, old_nvcc, tmp_path):
    folder = tmp_path / "build"
    code, message = configure(folder, f"-DPYSPARSE_CUDA={choice}", f"-DCMAKE_CUDA_COMPILER={old_nvcc}")
    assert bool(code) is (choice == "ON"), message
    assert f"the CUDA kernels need nvcc 12.8 or later; {old_nvcc} is NVIDIA 12.4." in message
    assert not list((folder / "csrc").rglob("*cuda*"))


# ---- one build, linked, installed and loaded --------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the package with a CUDA half that was built for one GPU, linked and installed as a wheel's is."""
    folder = tmp_path_factory.mktemp("installed")
    build = tmp_path_factory.mktemp("build")
    code, message = configure(build, "-DPYSPARSE_CUDA=ON", "-DPYSPARSE_CUDA_ARCHS=90", "-DPYSPARSE_WERROR=ON")
    assert code == 0, message
    for command in (
        ["--build", str(build), "--target", "_cuda", "--parallel", "2"],
        ["--install", str(build / "csrc/cuda"), "--prefix", str(folder)],
    ):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    python_alone = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pysparse", folder / "pysparse", ignore=python_alone, dirs_exist_ok=True)
    shutil.copy(backend.core().__file__, folder / "pysparse")
    return folder / "pysparse"


def ask(package, code, **environment):
    """Run ``code`` over that copy of the package, which sees no GPU; return what it leaves in ``answer``."""
    path = os.pathsep.join([str(package.parent), *filter(None, sys.path)])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYSPARSE_")}
    environment = {**inherited, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environment}
    code = f"import json\nfrom pysparse import backend\n{code}\nprint(json.dumps(answer))"
    # -S: no .pth file, which could put an installed pysparse first; -P: nor the folder where the tests were started
    done = subprocess.run(
        [sys.executable, "-SP", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_nvcc
def test_the_module_needs_what_every_system_has_and_keeps_its_runtime_to_itself(installed):
    (module,) = installed.glob("_cuda*.so")
    needed = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    names = {Path(line.split()[0]).name.split(".")[0] for line in needed.splitlines()}
    system = {"linux-vdso", "libc", "libm", "libdl", "librt", "libpthread", "libgcc_s", "libstdc++"}
    assert {name for name in names if not name.startswith("ld-linux")} <= system, needed
    assert "not found" not in needed
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(module)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in shown.stdout.splitlines()]
    # The runtime inside is this module's own: it must not stand in for the one that torch brings.
    assert [name for name in names if re.search("cuda|pysparse|pybind", name)] == ["PyInit__cuda"]


@needs_nvcc
def test_the_installed_module_loads_and_says_that_there_is_no_gpu(installed):
    code = (
        "module = backend.cuda()\n"
        "answer = [module.__file__, module.ARCHITECTURES, backend.cuda_missing_reason(),\n"
        "          {name: backend.cuda_gate(name) for name in module.SOURCE_HASHES},\n"
        "          [key.supported for key in backend.cuda_kernels()]]"
    )
    for asked in ("0", "1"):
        file, architectures, reason, gates, supported = ask(installed, code, PYSPARSE_EXPERIMENTAL=asked)
        assert Path(file).parent == installed
        assert architectures == "90"
        assert reason in ("no CUDA driver is installed", "the driver shows no CUDA device")
        assert gates == dict.fromkeys(nvrtc.SOURCES, reason)
        assert supported
        assert not any(supported)


@needs_nvcc
def test_the_gate_opens_for_what_the_report_of_this_package_vouches_for(installed):
    reported = json.loads(backend.CUDA_REPORT.read_text())["source_hashes"]
    code = (
        "backend.cuda_missing_reason = lambda: ''\n"
        "hashes = backend.cuda().SOURCE_HASHES\n"
        "answer = [hashes, {name: backend.cuda_gate(name) for name in hashes}]"
    )
    hashes, gates = ask(installed, code, PYSPARSE_CUDA_NVRTC="0")
    stale = [name for name in reported if reported[name] != hashes[name]]
    assert not stale, (
        f"the report vouches for other sources: measure these anew, or take their hashes out: {stale}"
    )
    assert {name for name, reason in gates.items() if not reason} == set(reported)


@needs_nvcc
def test_the_sources_that_nvrtc_compiles_travel_with_the_module(installed):
    for group in nvrtc.SOURCES.values():
        for name in group:
            assert (installed / "cuda_sources/cuda" / name).read_bytes() == (
                ROOT / "csrc/cuda" / name
            ).read_bytes()
    for path in (installed / "cuda_sources").rglob("*.*"):
        for header in re.findall(r'#include "(?:pysparse/)?([\w./]+)"', path.read_text()):
            assert list((installed / "cuda_sources").rglob(Path(header).name)), (path.name, header)


@needs_nvcc
def test_what_cannot_run_is_refused_with_its_bound(installed):
    strip = f"strip kernels take 1 to {STRIP_TOKENS}"
    refused = {
        f"strip_workspace(0, 0, {STRIP_TOKENS + 1}, 64, 16, 512, 0)": f"tokens is {STRIP_TOKENS + 1}, {strip}",
        "strip_workspace(0, 0, 0, 64, 16, 512, 0)": f"tokens is 0, {strip}",
        f"strip_workspace(0, 0, {STRIP_TOKENS}, 64, 16, 512, 0)": "device 0 does not answer; CUDA devices that the "
        "driver shows: 0",
        "strip_unpack(0, 0, 0, 0, 16, 2**63 - 1, 32, 64, 0, 0)": f"{2**63 - 1} rows from row 16 on are outside a "
        "matrix with 32",
        "strip_unpack(0, 0, 0, 0, 8, 16, 32, 64, 0, 0)": "strips start at multiples of 16 rows, got row 8",
    }
    code = (
        f"answer = {{}}\nfor call in {list(refused)!r}:\n    try:\n        eval('backend.cuda().' + call)\n"
        "    except (ValueError, RuntimeError) as error:\n        answer[call] = str(error)"
    )
    assert ask(installed, code) == refused


def test_the_bound_on_tokens_is_that_of_the_kernels():
    source = (ROOT / "csrc/cuda/strip.cuh").read_text()
    assert int(re.search(r"kMostTokens = (\d+);", source)[1]) == STRIP_TOKENS


# ---- the run on a GPU -------------------------------------------------------------------------------------------


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
