"""Which kernel a product runs on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table

from pysparse import backend, ops
from pysparse.measure.results import make_table

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
) -> KernelInfo:
    """Tell which kernel multiplies ``tokens`` rows by a ``shape`` = (out, in) weight of ``format``.

    ``format`` is "bitmap" (packed sparse) or "dense". Raises ValueError for anything else, or for a size
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
    limit = ops.DECODE_TOKENS if format == "bitmap" else ops.DENSE_TOKENS
    if tokens > limit:
        return KernelInfo(slow, f"{tokens} tokens are more than {limit}: torch's product wins there")
    key = chosen_kernel("linear", format, _name(dtype))
    if key is None:
        return KernelInfo(slow, f"the kernel table has no entry for {format} {_name(dtype)}")
    return KernelInfo(str(key), _why(key))


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
    """Return a JSON-ready row per compiled kernel: does this CPU support it, does the core take it now."""
    rows: list[dict[str, object]] = []
    for key in backend.kernels():
        taken = chosen_kernel(key.op, key.format, key.dtype) == key
        row = {"op": key.op, "format": key.format, "dtype": key.dtype, "isa": key.isa}
        rows.append({**row, "supported": key.supported, "taken": taken})
    return rows


def show_kernels(rows: list[dict[str, object]]) -> Table:
    """Return :func:`kernel_table` as a rich table."""
    words = {True: "yes", False: "no"}
    cells = [[words.get(value, value) for value in row.values()] for row in rows]  # type: ignore[call-overload]
    level = f"active level: {backend.isa()}" if rows else f"no compiled core: {backend.missing_reason()}"
    return make_table("kernels", ["op", "format", "dtype", "isa", "supported", "taken"], cells, caption=level)
