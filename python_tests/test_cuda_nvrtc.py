"""Machine code for GPUs that the wheel has none for: really compiled, on a machine that has no GPU."""

import dataclasses
import io
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_budgets import BLACKWELL_STACKS, check_log

from pysparse import backend, nvrtc

ROOT = Path(__file__).parents[1]
FILES = sorted({source for group in nvrtc.SOURCES.values() for source in group})


def missing():
    """Return what keeps NVRTC from compiling here."""
    try:
        for module in ("cuda.core", "cuda.core.utils"):
            import_module(module)
        nvrtc.supported()
        nvrtc._cuda_headers()
    except (ImportError, nvrtc.NvrtcError) as error:
        return f"NVRTC cannot run: {error}"
    return ""


needs_nvrtc = pytest.mark.skipif(bool(missing()), reason=missing())


def kernels(image):
    """Return the mangled names of an image's kernels: an ELF file has a section of code for each."""
    return {name.decode() for name in re.findall(rb"\0\.text\.(_Z\w*_kernel\w*)", image)}


@pytest.fixture(scope="module")
def plain_names(tmp_path_factory):
    """A program that drops what compilers choose for themselves from mangled names, by the header that ships."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "names.cpp").write_text(
        '#include <iostream>\n#include "kernel_name.h"\nint main() {\n  std::string name;\n'
        "  while (std::cin >> name) std::cout << pysparse::cuda::plain_kernel_name(name) << '\\n';\n}\n"
    )
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{ROOT}/csrc/cuda",
        "-o",
        "names",
        "names.cpp",
    ]
    subprocess.run(command, cwd=folder, check=True)

    def plain(names):
        done = subprocess.run(
            [folder / "names"], input="\n".join(names), capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    return plain


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80,90", (9, 0), True),
        ("80,90", (8, 9), True),  # code runs on later GPUs of its generation
        ("89", (8, 6), False),
        ("100,120", (10, 3), True),
        ("100,120", (11, 0), False),
        ("80,86,89,90,100,120", (13, 0), False),
    ],
)
def test_code_runs_within_a_generation(built, capability, runs):
    assert nvrtc.has_code(built, capability) is runs


def test_files_are_those_that_a_report_vouches_for():
    cmake = (ROOT / "csrc/cuda/CMakeLists.txt").read_text()
    assert set(nvrtc.SOURCES) == set(re.search(r"foreach\(kernel IN ITEMS (.*)\)", cmake)[1].split())
    host_only = {"machine_code.cu", "versions.cu"}
    assert {*FILES, *host_only} == {path.name for path in (ROOT / "csrc/cuda").glob("*.cu")}


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(
        nvrtc.NvrtcError, match=r"cuda.core is not installed .*pip install 'pysparse\[cupy\]'"
    ):
        nvrtc.machine_code("delta.cu", (10, 3), ROOT / "csrc", tmp_path)


def test_a_wrong_choice_is_refused(monkeypatch):
    monkeypatch.setenv(backend.NVRTC_VARIABLE, "yes")
    with pytest.raises(ValueError, match=f"{backend.NVRTC_VARIABLE}=yes: choose 0, 1 or auto"):
        backend._prepare.__wrapped__("delta")


@pytest.mark.slow
def test_names_lose_the_mark_of_their_file(plain_names):
    nvcc = "_ZN8pysparse4cuda40_GLOBAL__N__74097db6_8_delta_cu_d976c14919delta_linear_kernelI6__halfLi1EEEvi"
    assert plain_names([nvcc, "_ZN1a6kernelEv", "odd_GLOBAL__N_1"]) == [
        "_ZN8pysparse4cuda19delta_linear_kernelI6__halfLi1EEEvi", "_ZN1a6kernelEv", "odd_GLOBAL__N_1"
    ]  # fmt: skip


@needs_nvrtc
def test_a_gpu_that_nvrtc_does_not_know_is_named(tmp_path):
    with pytest.raises(nvrtc.NvrtcError, match=r"NVRTC [\d.]+ does not know sm_70; it knows sm_\d+.*sm_90"):
        nvrtc.machine_code("delta.cu", (7, 0), ROOT / "csrc", tmp_path)


@needs_nvrtc
def test_what_nvrtc_says_of_a_wrong_source_is_passed_on(tmp_path):
    shutil.copytree(ROOT / "csrc/cuda", tmp_path / "cuda")
    shutil.copytree(ROOT / "csrc/include", tmp_path / "include")
    (tmp_path / "cuda" / "delta.cu").write_text(
        '#include "launch.cuh"\n__global__ void broken() { missing(); }\n'
    )
    with pytest.raises(nvrtc.NvrtcError, match=r'delta.cu for sm_90: [\s\S]*"missing" is undefined'):
        nvrtc.machine_code("delta.cu", (9, 0), tmp_path, tmp_path / "cache")


@needs_nvrtc
@pytest.mark.slow
def test_the_cache_serves_whole_files_of_these_sources_only(tmp_path, monkeypatch):
    sources, cache = tmp_path / "csrc", tmp_path / "cache"
    shutil.copytree(ROOT / "csrc/cuda", sources / "cuda")
    shutil.copytree(ROOT / "csrc/include", sources / "include")
    compilations = []
    core = import_module("cuda.core")

    class Counted(core.Program):
        def compile(self, *arguments, **named):
            compilations.append(self)
            return super().compile(*arguments, **named)

    monkeypatch.setattr(core, "Program", Counted)

    def image(capability=(9, 0)):
        nvrtc._fingerprint.cache_clear()
        return nvrtc.machine_code("embedding.cu", capability, sources, cache)

    first = image()
    assert first.startswith(b"\x7fELF")
    assert image() == first
    assert len(compilations) == 1
    (kept,) = [path for path in cache.rglob("*") if path.is_file() and first in path.read_bytes()]
    kept.write_bytes(kept.read_bytes()[:-100])  # cut off
    assert image() == first
    assert len(compilations) == 2
    assert image((8, 0)) != first
    (sources / "cuda" / "entry.cuh").write_text(
        (sources / "cuda" / "entry.cuh").read_text() + "\n// changed\n"
    )
    image()
    assert len(compilations) == 4


@needs_nvrtc
@pytest.mark.slow
def test_only_devices_without_code_get_some(tmp_path):
    (tmp_path / "cuda_sources").symlink_to(ROOT / "csrc")
    loaded = []
    module = SimpleNamespace(  # the real one loads code through the driver, which this machine need not have
        __file__=str(tmp_path / "_cuda.so"), ARCHITECTURES="80,90",
        load_code=lambda image, device: loaded.append((device, kernels(image))),
    )  # fmt: skip
    nvrtc.load(module, "embedding", [(9, 0), (11, 0), (8, 6)], tmp_path / "cache")
    assert [device for device, _ in loaded] == [1]
    assert loaded[0][1]
    nvrtc.load(module, "embedding", [(9, 0)], tmp_path / "cache", always=True)
    assert [device for device, _ in loaded] == [1, 0]


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)], ids=str)
@pytest.mark.parametrize("source", FILES)
def test_no_spills_and_registers_within_budget(source, capability):
    core, log = import_module("cuda.core"), io.StringIO()
    options = nvrtc._options(core, source, capability, ROOT / "csrc")
    options = dataclasses.replace(options, ptxas_options="-v")
    text = (ROOT / "csrc/cuda" / source).read_text()
    nvrtc._compile(core, text, options, log)
    check_log(log.getvalue(), BLACKWELL_STACKS if capability > (9, 0) else ())


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", FILES)
def test_kernels_have_the_names_and_parameters_of_those_of_nvcc(source, tmp_path, plain_names):
    command = ["nvcc", "-std=c++17", "-arch=sm_90", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cuda", "-cubin"]
    command += ["-o", str(tmp_path / "nvcc.cubin"), str(ROOT / "csrc/cuda" / source)]
    subprocess.run(command, check=True)
    wanted = plain_names(kernels((tmp_path / "nvcc.cubin").read_bytes()))
    found = plain_names(kernels(nvrtc.machine_code(source, (9, 0), ROOT / "csrc", tmp_path / "cache")))
    assert len(set(found)) == len(found)
    assert sorted(found) == sorted(wanted)
