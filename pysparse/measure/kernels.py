"""Which kernel a product runs on this machine, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from pysparse import backend, ops
from pysparse.measure.results import make_table
from pysparse.measure.rounds import torch_threads
from pysparse.nn.dispatch import Dispatch, dense_kernel_tokens
from pysparse.ops import cost_cache
from pysparse.ops.ways import BITMAP, ways_of

_FORMATS = ("bitmap", "dense")


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """The path that a linear product takes."""

    kernel: str  # name in the kernel table, or "torch" with what is done before
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


def kernel_info(
    format: str = "bitmap",
    shape: tuple[int, int] = (4096, 4096),
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 1,
    sparsity: float = 0.7,
) -> KernelInfo:
    """Tell which kernel multiplies ``tokens`` rows by a ``shape`` = (out, in) weight of ``format``.

    ``format`` is "bitmap" (packed sparse) or "dense"; ``sparsity`` matters
    where measured costs decide. Raises ValueError for anything else, or for a size
    below 1.
    """
    if format not in _FORMATS:
        raise ValueError(f"unknown format '{format}'; choose one of {', '.join(_FORMATS)}")
    if tokens < 1 or min(shape) < 1:
        raise ValueError(f"tokens={tokens} and shape={shape} must be at least 1")
    slow = "unpack + torch" if format == "bitmap" else "torch"
    if not backend.available():
        return KernelInfo(slow, f"the compiled core is not loaded ({backend.missing_reason()})")
    if not ops.is_kernel_dtype(dtype):
        known = ", ".join(_name(one) for one in ops.KERNEL_DTYPES)
        return KernelInfo(slow, f"no kernel for {_name(dtype)}; there are kernels for {known}")
    if format == "bitmap" and tokens > 1:
        return _chosen(shape, dtype, tokens, sparsity)
    if format == "dense" and tokens not in dense_kernel_tokens(shape, dtype):
        cause = f"{tokens} tokens are more than the kernel's {ops.DENSE_TOKENS}"
        return KernelInfo(slow, cause if tokens > ops.DENSE_TOKENS else "faster by measured costs")
    key = chosen_kernel("linear", format, _name(dtype))
    if key is None:
        return KernelInfo(slow, f"the kernel table has no entry for {format} {_name(dtype)}")
    return KernelInfo(str(key), _why(key))


def _chosen(shape: tuple[int, int], dtype: torch.dtype, tokens: int, sparsity: float) -> KernelInfo:
    """Describe the way that measured costs choose."""
    nnz = round(shape[0] * shape[1] * (1.0 - sparsity))
    choice = Dispatch().choice(shape, nnz, dtype, tokens, may_measure=False)
    if choice.way in ("bitmap", "pairs"):
        return KernelInfo(str(chosen_kernel("linear", choice.way, _name(dtype))), choice.reason)
    return KernelInfo("unpack + torch", choice.reason)


def chosen_kernel(op: str, format: str, dtype: str) -> backend.KernelKey | None:
    """Return the table's entry that the core takes now: the best one at or below the active ISA level."""
    ranks = {name: rank for rank, (name, _) in enumerate(backend.isa_levels())}
    ceiling = ranks.get(backend.isa(), -1)
    usable = [
        key for key in backend.kernels(op, format, dtype, supported_only=True) if ranks[key.isa] <= ceiling
    ]
    return max(usable, key=lambda key: ranks[key.isa], default=None)


def _why(key: backend.KernelKey) -> str:
    levels = backend.isa_levels()
    forced = backend.core().forced_isa()
    if forced:
        return f"best kernel for {key.dtype} at or below the forced level {forced}"
    names = [name for name, _ in levels]
    above = levels[names.index(key.isa) + 1 :]
    reasons = []
    for name, supported in above:
        exists = bool(backend.kernels(key.op, key.format, key.dtype, name))
        if not exists:
            reasons.append(f"{name} has none for {key.dtype}")
        elif supported:
            reasons.append(f"{name} is there but does not pay on this CPU")
        else:
            reasons.append(f"this CPU lacks {name}")
    return f"best of this CPU's levels for {key.dtype}" + (f" ({'; '.join(reasons)})" if reasons else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel_table() -> list[dict[str, object]]:
    """Return a JSON-ready row per compiled kernel: does this machine support it, is it taken now.

    Kernels of a CUDA build are listed, too: supported where a device is there, taken where a GPU report vouches for
    their sources (a layer still weighs them against the dense product).
    """
    rows: list[dict[str, object]] = []
    for key in backend.kernels():
        taken = chosen_kernel(key.op, key.format, key.dtype) == key
        row = {"op": key.op, "format": key.format, "dtype": key.dtype, "isa": key.isa}
        rows.append({**row, "supported": key.supported, "taken": taken})
    for key in backend.cuda_kernels():
        row = {"op": key.op, "format": key.format, "dtype": key.dtype, "isa": key.isa}
        rows.append(
            {**row, "supported": key.supported, "taken": key.supported and not backend.cuda_gate(_group(key))}
        )
    return rows


def _group(key: backend.KernelKey) -> str:
    """Return the name of a CUDA kernel's sources in reports."""
    groups = {"select": "pruning", "sweep": "pruning"}
    return key.format if key.op in ("linear", "unpack") else groups.get(key.op, key.op)


_TOKENS = (1, 4, 16, 32, 64, 256, 1024)
# What a layer may hold, and the fraction of zeros of each: those of a pattern follow from it.
_HELD = (
    *((BITMAP, None, zeros) for zeros in (0.2, 0.5, 0.7, 0.9)),
    *(("int8", 8, zeros) for zeros in (0.5, 0.7, 0.9)),
    *((packing, bits, zeros) for packing, bits in (("nm", None), ("nm-int8", 8)) for zeros in (0.5, 0.75)),
)


def choice_table(shape: tuple[int, int] = (4096, 4096)) -> list[dict[str, object]]:
    """Return, JSON-ready, which way a sparse layer of ``shape`` takes by dtype, packing, sparsity and tokens, and why.

    ``packing`` is "bitmap", "int8" (values under a bitmap, tokens quantised to 8 bits), "nm" or "nm-int8" (2:4 where
    half is zero, 1:4 where three quarters are). ``way`` and ``reason`` hold for ``prefill`` "auto" (``sparsify_`` with
    optimize="balanced"), ``speed_way`` for "packed" ("speed"). Times are those that the measured costs predict for
    every way, dense ones too, in milliseconds; where nothing was measured for the present threads and instruction set,
    ``reason`` says so. Measures nothing.
    """
    cases = [(dtype, *held, tokens) for dtype in ops.KERNEL_DTYPES for held in _HELD for tokens in _TOKENS]
    return [_choice_row(shape, *case) for case in cases] if backend.available() else []


def _choice_row(
    shape: tuple[int, int], dtype: torch.dtype, packing: str, bits: int | None, sparsity: float, tokens: int
) -> dict[str, object]:
    nnz = round(shape[0] * shape[1] * (1.0 - sparsity))
    auto, speed = (
        Dispatch(prefill, packing, bits).choice(shape, nnz, dtype, tokens, may_measure=False)
        for prefill in ("auto", "packed")
    )
    times = {way: 1e3 * seconds for way, seconds in speed.seconds.items()}
    return {
        "dtype": _name(dtype), "packing": packing, "sparsity": sparsity, "tokens": tokens, "way": auto.way,
        "reason": auto.reason, "speed_way": speed.way, "milliseconds": times,
    }  # fmt: skip


def show_choices(rows: list[dict[str, object]]) -> Table:
    """Return :func:`choice_table` as a rich table: a layer's own kernel and unpacking in the columns of each."""
    cells = []
    for row in rows:
        times = row["milliseconds"]
        assert isinstance(times, dict)
        own = ways_of(str(row["packing"]), 1, 8)
        head = [
            f"{row['dtype']} {row['packing']}, {row['sparsity']:.0%} zeros",
            *(str(row[key]) for key in ("tokens", "way", "speed_way")),
        ]
        milliseconds = (times.get(way) for way in (*own, "pairs", "kernel", "torch"))
        cells.append([*head, *milliseconds, str(row["reason"])])
    columns = ["4096 x 4096 layer", "tokens", "way", "for speed", "its kernel ms", "unpack ms", "pairs ms",
               "dense kernel ms", "dense torch ms", "why"]  # fmt: skip
    return make_table("ways of a sparse layer", columns, cells)


def tune_kernels(
    dtypes: Sequence[torch.dtype], threads: int | None = None
) -> tuple[list[dict[str, object]], list[str]]:
    """Measure the costs for ``dtypes`` now; return :func:`choice_table`'s rows and the files that keep them.

    Raises RuntimeError without the compiled core.
    """
    backend.core()
    with torch_threads(threads):
        files = []
        for dtype in dtypes:
            cost_cache.tune(dtype)
            files.append(str(cost_cache.cost_file(dtype)))
        rows = choice_table()
    return [row for row in rows if row["dtype"] in {_name(dtype) for dtype in dtypes}], files


def show_kernels(rows: list[dict[str, object]]) -> Table:
    """Return :func:`kernel_table` as a rich table."""
    words = {True: "yes", False: "no"}
    cells = [[words.get(value, value) for value in row.values()] for row in rows]  # type: ignore[call-overload]
    level = f"active level: {backend.isa()}" if rows else f"no compiled core: {backend.missing_reason()}"
    return make_table("kernels", ["op", "format", "dtype", "isa", "supported", "taken"], cells, caption=level)
