"""llama.cpp's CPU product (ggml_mul_mat) on dense Q8_0 and Q4_0: what most people run a model of this size with.

The libraries are those inside llama-cpp-python, or those in the folder that GGML_LIB names. Q4_0 takes
the layout that llama.cpp repacks it to at load on this CPU, where it has one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = {"llama.cpp Q8_0": "q8_0", "llama.cpp Q4_0": "q4_0"}
PACKAGES = ("llama-cpp-python",)
ERROR_BOUND = {"q8_0": 0.02, "q4_0": 0.3}  # 4 bits have no exact zero: the sparser, the more of them move
LIBRARY_VARIABLE = "GGML_LIB"
TYPES = {"q8_0": 8, "q4_0": 2}  # enum ggml_type
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}  # of 32 weights and their scale
FLOAT32 = 0
OVERHEAD = 1 << 20  # bytes of a context beyond its tensors' data

Address = ctypes.c_void_p


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", Address), ("no_alloc", ctypes.c_bool))


class Plan(ctypes.Structure):
    """struct ggml_cplan, with room for fields that newer versions append."""

    _fields_ = (
        ("work_size", ctypes.c_size_t), ("work_data", Address), ("n_threads", ctypes.c_int), ("threadpool", Address),
        ("abort_callback", Address), ("abort_callback_data", Address), ("newer", Address * 8),
    )  # fmt: skip


def bytes_of(variant: str, rows: int, cols: int) -> int:
    """The bytes of a weight [rows, cols], cols a multiple of 32."""
    return rows * cols // 32 * BLOCK_BYTES[variant]


def folder() -> Path:
    if os.environ.get(LIBRARY_VARIABLE):
        return Path(os.environ[LIBRARY_VARIABLE])
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None or Path(spec.origin).parent == Path(__file__).parent:
        raise ImportError(f"no package llama_cpp, and {LIBRARY_VARIABLE} is not set")
    return Path(spec.origin).parent / "lib"


@cache
def libraries() -> tuple[Any, Any]:
    """Return (libggml-base, libggml-cpu) with the signatures that do not return int."""
    base, cpu = (
        ctypes.CDLL(str(folder() / f"libggml-{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in ("base", "cpu")
    )
    for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
        getattr(base, name).restype = Address
    for name in ("ggml_backend_reg_dev_get", "ggml_backend_reg_get_proc_address"):
        getattr(base, name).restype = Address
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in ("ggml_backend_cpu_reg", "ggml_backend_cpu_buffer_type"):
        getattr(cpu, name).restype = Address
    base.ggml_backend_cpu_buffer_type.restype = Address
    cpu.ggml_graph_plan.restype = Plan
    return base, cpu


def load() -> None:
    """Raise ImportError with the reason when it cannot run here."""
    libraries()


def context(nbytes: int, no_alloc: bool) -> Address:
    made = Address(libraries()[0].ggml_init(InitParams(nbytes + OVERHEAD, None, no_alloc)))
    if not made:
        raise MemoryError(f"ggml_init has no room for {nbytes} bytes")
    return made


def repacked_buffer_type() -> Address | None:
    """The CPU's own layout for Q4_0, or None when this build has none."""
    base, cpu = libraries()
    registry = Address(cpu.ggml_backend_cpu_reg())
    device = Address(base.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0)))
    found = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not found:
        return None
    types = ctypes.CFUNCTYPE(ctypes.POINTER(Address), Address)(found)(device)
    base.ggml_backend_buft_name.restype = ctypes.c_char_p
    index = 0
    while types and types[index]:
        if base.ggml_backend_buft_name(Address(types[index])) == b"CPU_REPACK":
            return Address(types[index])
        index += 1
    return None


def new_weight(variant: str, weight: np.ndarray) -> Address:
    """A tensor of ``weight`` [out, in] quantised, in the buffer that llama.cpp would load it to."""
    base, _ = libraries()
    rows, cols = weight.shape
    tensor = Address(
        base.ggml_new_tensor_2d(context(0, True), TYPES[variant], ctypes.c_int64(cols), ctypes.c_int64(rows))
    )
    quantised = np.empty(bytes_of(variant, rows, cols), dtype=np.uint8)
    values = np.ascontiguousarray(weight, dtype=np.float32)
    first, count, length = ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(cols)
    size = base.ggml_quantize_chunk(
        TYPES[variant], values.ctypes, quantised.ctypes, first, count, length, None
    )
    if size != quantised.nbytes:
        raise RuntimeError(f"ggml wrote {size} bytes of {variant}, expected {quantised.nbytes}")
    repacked = repacked_buffer_type() if variant == "q4_0" and rows % 8 == 0 else None
    place(tensor, repacked or Address(base.ggml_backend_cpu_buffer_type()))
    base.ggml_backend_tensor_set(
        tensor, quantised.ctypes, ctypes.c_size_t(0), ctypes.c_size_t(quantised.nbytes)
    )
    return tensor


def place(tensor: Address, buffer_type: Address) -> None:
    """Give a tensor without memory a buffer of its own; benchmarks never free it."""
    base, _ = libraries()
    base.ggml_backend_buft_get_alloc_size.restype = ctypes.c_size_t
    base.ggml_backend_buft_alloc_buffer.restype = Address
    base.ggml_backend_buffer_get_base.restype = Address
    size = base.ggml_backend_buft_get_alloc_size(buffer_type, tensor)
    buffer = Address(base.ggml_backend_buft_alloc_buffer(buffer_type, ctypes.c_size_t(size)))
    if not buffer:
        raise MemoryError(f"ggml has no buffer of {size} bytes")
    base.ggml_backend_tensor_alloc(buffer, tensor, Address(base.ggml_backend_buffer_get_base(buffer)))


def build(
    variant: str, weight: np.ndarray, x: np.ndarray, threads: int
) -> tuple[Callable[[], np.ndarray], int]:
    base, cpu = libraries()
    cpu.ggml_cpu_init()
    rows, cols = weight.shape
    held = new_weight(variant, weight)
    scratch = context(x.nbytes + 4 * rows * len(x), False)
    entry = Address(base.ggml_new_tensor_2d(scratch, FLOAT32, ctypes.c_int64(cols), ctypes.c_int64(len(x))))
    ctypes.memmove(base.ggml_get_data(entry), np.ascontiguousarray(x).ctypes.data, x.nbytes)
    product = Address(base.ggml_mul_mat(scratch, held, entry))
    graph = Address(base.ggml_new_graph(scratch))
    base.ggml_build_forward_expand(graph, product)
    plan = cpu.ggml_graph_plan(graph, threads, None)
    work = np.empty(max(1, plan.work_size), dtype=np.uint8)
    plan.work_data = work.ctypes.data
    plan.work = work  # lives as long as the plan
    y = np.ctypeslib.as_array(
        ctypes.cast(base.ggml_get_data(product), ctypes.POINTER(ctypes.c_float)), (len(x), rows)
    )

    def call() -> np.ndarray:
        status = cpu.ggml_graph_compute(graph, ctypes.byref(plan))
        if status:
            raise RuntimeError(f"ggml_graph_compute failed with {status}")
        return y

    return call, bytes_of(variant, rows, cols)
