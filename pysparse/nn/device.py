"""How a sparse layer holds its weight on a CUDA device, and which kernel that means for how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend, ops
from pysparse.formats import PACKINGS, BitmapTensor, DeltaRows, FragmentBitmap, PairBlocks
from pysparse.formats.device import PACKED_DTYPES, keeps_pairs

# Bytes per entry against 2 of the dense weight, at density p: delta 2.5 p, fragment 2 p + 0.141, pair 1.125.
# Delta's work goes with the weights kept, the others' with the entries; measured in benchmarks/results/cuda_*.json.
DELTA_DENSITY = 0.35
# A gain below 5 % in bytes is not worth the unpacking at many tokens: the weight is kept densely.
DENSE_DENSITY = 0.88

_FIELDS = {
    "delta": ("values", "deltas", "row_groups", "chunk_cols"),
    "fragment": ("stream", "offsets"),
    "pair": ("stream",),
    "dense": ("weight",),
}


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """What is known of a weight on the device beside its arrays, which the layer holds as buffers."""

    packing: str  # "delta" | "fragment" | "pair" | "dense"
    nnz: int
    largest_block: int  # bytes, of a fragment packing
    why: str

    @classmethod
    def choose(cls, bitmap: BitmapTensor) -> tuple[DeviceWeight | None, tuple[Tensor, ...]]:
        """Pack ``bitmap`` (on a CUDA device) in the form that decoding is predicted to be fastest with.

        Returns None where no kernel may be used: no CUDA build, float32 values, kernels that no report vouches
        for. The cause is said once.
        """
        if bitmap.dtype not in PACKED_DTYPES or not backend.available():
            return None, ()
        name, why = predict(bitmap)
        if name == "dense":
            return cls(name, bitmap.nnz, 0, why), (bitmap.to_dense(),)
        closed = backend.cuda_gate(name)
        if closed:
            backend.warn_once(f"cuda-{closed}", f"sparse layers on CUDA run without sparse kernels: {closed}")
            return None, ()
        packing = PACKINGS[name].from_bitmap(bitmap)
        largest = packing.largest_block if isinstance(packing, FragmentBitmap) else 0
        return cls(name, bitmap.nnz, largest, why), tuple(getattr(packing, field) for field in _FIELDS[name])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layer's buffers."""
        return tuple(f"packed_{field}" for field in _FIELDS[self.packing])

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor | None], bias: Tensor | None, rows: int
    ) -> Tensor:
        """Return ``x @ W.T + bias``; ``x`` is [..., cols] on the weight's device."""
        arrays = self._arrays(buffers)
        if x.dtype is not arrays[0].dtype and torch.is_autocast_enabled("cuda"):
            x = x.to(arrays[0].dtype)  # packed weights keep their dtype: autocast moves the input instead
        if self.packing == "dense":
            return functional.linear(x, arrays[0], bias)
        return ops.call_arrays(self.packing, x, arrays, bias, rows, self.largest_block)

    def to_bitmap(self, buffers: Mapping[str, Tensor | None], shape: tuple[int, int]) -> BitmapTensor:
        """Return the row-major form, on the weight's device."""
        arrays = self._arrays(buffers)
        if self.packing == "dense":
            return BitmapTensor.from_dense(arrays[0])
        if self.packing == "delta":
            return DeltaRows(arrays[0], arrays[1], arrays[2], arrays[3], shape).to_bitmap()
        if self.packing == "fragment":
            return FragmentBitmap(arrays[0], arrays[1], self.largest_block, shape).to_bitmap()
        return PairBlocks(arrays[0], shape).to_bitmap()

    def describe(self, dtype: torch.dtype) -> str:
        """Name the kernel for few tokens, what happens with many, and why."""
        if self.packing == "dense":
            return f"dense torch: {self.why}"
        few = ops.DELTA_TOKENS if self.packing == "delta" else ops.STRIP_TOKENS
        return (
            f"linear-{self.packing}-{str(dtype).removeprefix('torch.')}-cuda up to {few} tokens, "
            f"unpack + torch beyond: {self.why}"
        )

    def _arrays(self, buffers: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        arrays = tuple(buffers[name] for name in self.names)
        return tuple(array for array in arrays if array is not None)


def predict(bitmap: BitmapTensor) -> tuple[str, str]:
    """Return the packing that decodes fastest by its bytes and its work, and why."""
    p = bitmap.density
    if p <= DELTA_DENSITY and ops.max_tokens("delta", bitmap.shape[1]) > 0:
        return "delta", f"{1 - p:.0%} sparse, {2.5 * p:.2f} bytes an entry for 2"
    if keeps_pairs(bitmap):
        return "pair", f"two of four, {1.125} bytes an entry for 2"
    if p <= DENSE_DENSITY:
        return "fragment", f"{1 - p:.0%} sparse, {2 * p + 0.141:.2f} bytes an entry for 2"
    return "dense", f"only {1 - p:.0%} sparse: no gain predicted"
