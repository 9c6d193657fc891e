"""Compiles a CUDA source, host side and all, for host threads (cuda_shim/shim.h) and calls it by ctypes."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent / "cuda_shim"
SOURCES = Path(__file__).parents[1] / "csrc"
POINTER, LONG, INT, FLOAT, BOOL = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_bool,
)
WORD, LONG_WORD = ctypes.c_uint32, ctypes.c_uint64
_LAUNCH = re.compile(r"(\w+(?:<[^<>]*>)?)\s*<<<(.+?)>>>\s*\((.*?)\);", re.DOTALL)


def host_source(name):
    """Return a source as g++ takes it: shared memory as globals, launches as loops over blocks."""
    text = re.sub(r"extern __shared__", "extern", (SOURCES / "cuda" / name).read_text())
    text = re.sub(r"__shared__", "static", text)
    return _LAUNCH.sub(r"shim::run([&] { \1(\3); }, \2);", text)


def build(folder, group, headers=()):
    """Return the library of ``group``: csrc/cuda/GROUP.cu behind cuda_shim/GROUP_driver.cpp."""
    for path in [*HERE.glob("*"), *(SOURCES / "cuda").glob("*.h")]:
        shutil.copy(path, folder)
    for name in ("common.cuh", f"{group}.cuh", *headers):
        (folder / name).write_text(host_source(name))
    (folder / f"{group}_host.cuh").write_text(host_source(f"{group}.cu"))
    target = folder / f"{group}.so"
    command = [
        "g++", "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas",
        "-Wno-attributes", f"-I{folder}", f"-I{SOURCES}/include", "-o", str(target),
        str(folder / f"{group}_driver.cpp"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    return ctypes.CDLL(str(target))


def structure(**fields):
    """Return a ctypes structure; field names are those of the C++ one."""
    return type("Structure", (ctypes.Structure,), {"_fields_": list(fields.items())})


def check_sizes(library, *kinds):
    """Assert that the structures are as large as those of C++."""
    assert [library.struct_bytes(i) for i in range(len(kinds))] == [ctypes.sizeof(kind) for kind in kinds]
