"""The compiled core as a citizen of the process: ISA levels, one OpenMP, life without it."""

import re
import subprocess

import forked
import pytest
import torch

from pysparse import backend

LINEAR = (
    "import torch, pysparse\n"
    "from pysparse import backend\n"
    "from pysparse.nn import SparseLinear\n"
    "w = torch.nn.Linear(64, 48); w.weight.data[torch.rand(48, 64) < 0.6] = 0\n"
    "s = SparseLinear.from_dense(w); x = torch.randn(2, 64)\n"
    "assert torch.allclose(s(x), w(x), atol=1e-5)\n"
)


needs_core = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


@needs_core
def test_every_key_has_a_generic_kernel():
    keys = backend.kernels()
    assert keys
    generic = {(k.op, k.format, k.dtype) for k in keys if k.isa == "generic"}
    assert generic == {(k.op, k.format, k.dtype) for k in keys}


@needs_core
@pytest.mark.parametrize("level", [name for name, ok in backend.isa_levels() if ok])
def test_environment_forces_each_level(level):
    result = forked.run(LINEAR + f"assert backend.isa() == {level!r}; print(s.kernel)", PYSPARSE_ISA=level)
    assert result.returncode == 0, result.stderr
    assert "linear-bitmap-float32-" in result.stdout


@needs_core
def test_unknown_level_is_an_error_that_lists_the_known():
    with (
        pytest.raises(ValueError, match='unknown ISA level "avx9"; known: generic, avx2'),
        backend.force_isa("avx9"),
    ):
        pass
    result = forked.run(LINEAR, PYSPARSE_ISA="avx9")
    assert result.returncode != 0
    assert "unknown ISA level" in result.stderr


@needs_core
def test_forcing_is_undone():
    before = backend.isa()
    with backend.force_isa("generic"):
        assert backend.isa() == "generic"
    assert backend.isa() == before


@needs_core
def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert backend.num_threads() == 1
        torch.set_num_threads(2)
        assert backend.num_threads() == 2
    finally:
        torch.set_num_threads(before)


@needs_core
def test_thread_variable_is_checked():
    for count in ("0", "3x"):
        result = forked.run(LINEAR, PYSPARSE_NUM_THREADS=count)
        assert result.returncode != 0
        assert f"PYSPARSE_NUM_THREADS={count} is not a number of threads from 1 to 4096" in result.stderr
    assert forked.run(LINEAR + "assert backend.num_threads() == 1", PYSPARSE_NUM_THREADS="1").returncode == 0


@needs_core
def test_one_openmp_runtime_is_mapped():
    code = LINEAR + "print(open('/proc/self/maps').read())"
    libraries = set(re.findall(r"\S*lib(?:gomp|omp|iomp5)[^\s]*\.so\S*", forked.run(code).stdout))
    assert len(libraries) == 1, libraries


def test_import_and_answers_survive_without_the_core():
    code = LINEAR + "s(x); print(backend.available(), s.kernel)"
    result = forked.run(code, PYSPARSE_DISABLE_EXT="1")
    assert result.returncode == 0, result.stderr
    assert "False" in result.stdout
    assert (
        result.stderr.count("pysparse runs without its compiled kernels") == 1
    )  # one warning, not one a call


@pytest.mark.parametrize(
    ("text", "on"), [("", False), ("0", False), ("false", False), ("1", True), ("On", True)]
)
def test_switches_of_the_environment_say_yes_or_no(monkeypatch, text, on):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, text)
    assert backend.experimental() is on


def test_a_switch_that_says_neither_is_named(monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "banana")
    with pytest.raises(ValueError, match="PYSPARSE_EXPERIMENTAL=banana: choose 1 or 0"):
        backend.experimental()


@pytest.mark.parametrize("error", ["OSError('half written')", "RuntimeError('wrong numpy')"])
def test_import_survives_whatever_the_cuda_module_raises(error):
    code = (
        "import sys, importlib.abc, importlib.machinery\n"
        "class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'pysparse._cuda': return importlib.machinery.ModuleSpec(name, self)\n"
        f"    def exec_module(self, module): raise {error}\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from pysparse import backend\nprint(backend.cuda_missing_reason())"
    )
    done = forked.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == error.replace("('", ": ").replace("')", "")


@needs_core
def test_core_holds_no_weak_symbols_of_newer_cpus():
    """Code outside the target regions must run on any x86-64: no 512-bit register in it."""
    from pysparse import _core

    objdump = subprocess.run(["objdump", "-dC", _core.__file__], capture_output=True, text=True, check=False)
    if objdump.returncode:
        pytest.skip("objdump is not installed")
    function, offenders = "", set()
    for line in objdump.stdout.splitlines():
        if line.endswith(">:"):
            function = line
        elif "%zmm" in line or "%ymm" in line:
            offenders.add(function)
    foreign = [f for f in offenders if "pysparse::" not in f]
    assert not foreign, foreign[:3]
