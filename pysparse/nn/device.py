"""How a sparse layer holds its weight on a CUDA device, and which kernel that means for how many tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pysparse import backend, ops
from pysparse.formats import PACKINGS, BitmapTensor, DeltaRows, FragmentBitmap, NMRows, PairBlocks
from pysparse.formats.device import PACKED_DTYPES, keeps_pairs, nm_pattern
from pysparse.nn.device_costs import Gpu, bytes_per_entry, device_costs
from pysparse.nn.dispatch import Dispatch
from pysparse.ops.cuda import Packing
from pysparse.ops.cuda import sizes as packed_sizes

TOKENS_VARIABLE = (
    "PYSPARSE_CUDA_TOKENS"  # how many tokens a call is expected to bring; 1 is decoding one sequence
)
# A sparse kernel must be expected to be so much faster than the dense product, or the weight is kept densely: fits
# are 5 to 15 % off, and no layer shall be slower than before.
GAIN = 1.05

_FIELDS = {
    "delta": ("values", "deltas", "row_groups", "chunk_cols"),
    "fragment": ("stream", "offsets"),
    "pair": ("stream",),
    "nm": ("values", "places"),
    "dense": ("weight",),
}


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """What is known of a weight on the device beside its arrays, which the layer holds as buffers."""

    packing: str  # "delta" | "fragment" | "pair" | "nm" | "dense"
    nnz: int
    sizes: tuple[int, ...]  # of the packing: fragment's largest block in bytes; n and m of nm
    max_tokens: int  # that the kernel takes; with more the weight is unpacked and multiplied by torch
    pays_to: int  # tokens up to which the kernel is expected to be faster than the dense product
    why: str

    @classmethod
    def choose(cls, bitmap: BitmapTensor) -> tuple[DeviceWeight, tuple[Tensor, ...]]:
        """Pack ``bitmap`` (on a CUDA device) in the form that decoding is predicted to be fastest with.

        Densely where no gain is predicted, and where no kernel may be used: no CUDA build, no driver, float32 values,
        kernels that no report vouches for. Such a cause is said once.
        """
        missing = _missing(bitmap.dtype)
        if missing:
            return cls._dense(bitmap, missing, warn=True)
        found = predict(bitmap, expected_tokens())
        if found.packing == "dense":
            return cls._dense(bitmap, found.why)
        closed = backend.cuda_gate(found.packing)
        if closed:
            return cls._dense(bitmap, closed, warn=True)
        packed = PACKINGS[found.packing].from_bitmap(bitmap)
        limit = ops.max_tokens(found.packing, bitmap.shape[1], bitmap.device.index)
        pays_to = min(limit, found.pays_to)
        weight = cls(found.packing, bitmap.nnz, packed_sizes(packed), limit, pays_to, found.why)
        return weight, tuple(getattr(packed, field) for field in _FIELDS[found.packing])

    @classmethod
    def _dense(
        cls, bitmap: BitmapTensor, why: str, warn: bool = False
    ) -> tuple[DeviceWeight, tuple[Tensor, ...]]:
        if warn:
            backend.warn_once(f"cuda-{why}", f"sparse layers on CUDA hold their weights densely: {why}")
        return cls("dense", bitmap.nnz, (), 0, 0, why), (bitmap.to_dense(),)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layer's buffers."""
        return tuple(f"packed_{field}" for field in _FIELDS[self.packing])

    def linear(
        self,
        x: Tensor,
        buffers: Mapping[str, Tensor | None],
        bias: Tensor | None,
        shape: tuple[int, int],
        dispatch: Dispatch,
    ) -> Tensor:
        """Return ``x @ W.T + bias`` for a weight of ``shape`` (N, K); ``x`` is [..., K] on the weight's device.

        ``dispatch.prefill`` "packed" keeps a dense copy for the tokens with which the kernel would lose.
        """
        arrays = self.arrays(buffers)
        if x.dtype is not arrays[0].dtype and torch.is_autocast_enabled("cuda"):
            x = x.to(arrays[0].dtype)  # packed weights keep their dtype: autocast moves the input instead
        if self.packing == "dense":
            return functional.linear(x, arrays[0], bias)
        if dispatch.prefill == "packed" and x.numel() > self.pays_to * shape[1]:
            if dispatch.dense is None:
                dispatch.dense = ops.packed_unpack(self.packed(arrays, shape))
            return functional.linear(x, dispatch.dense, bias)
        return ops.call_arrays(self.packing, x, arrays, bias, shape, self.sizes)

    def to_bitmap(self, buffers: Mapping[str, Tensor | None], shape: tuple[int, int]) -> BitmapTensor:
        """Return the row-major form, on the weight's device."""
        arrays = self.arrays(buffers)
        if self.packing == "dense":
            return BitmapTensor.from_dense(arrays[0])
        return self.packed(arrays, shape).to_bitmap()

    def packed(self, arrays: tuple[Tensor, ...], shape: tuple[int, int]) -> Packing:
        """Return ``arrays`` of a weight of ``shape`` as a packing; "dense" is none."""
        if self.packing == "delta":
            return DeltaRows(arrays[0], arrays[1], arrays[2], arrays[3], shape)
        if self.packing == "fragment":
            return FragmentBitmap(arrays[0], arrays[1], self.sizes[0], shape)
        if self.packing == "nm":
            return NMRows(arrays[0], arrays[1], self.sizes[0], self.sizes[1], shape)
        return PairBlocks(arrays[0], shape)

    def describe(self, dtype: torch.dtype, prefill: str) -> str:
        """Name the kernel for few tokens, where it loses to the dense product, what happens with many, and why."""
        if self.packing == "dense":
            return f"dense torch: {self.why}"
        kernel = f"linear-{self.packing}-{str(dtype).removeprefix('torch.')}-cuda"
        if self.packing == "nm":
            kernel += f" ({self.sizes[0]}:{self.sizes[1]})"
        if prefill == "packed":
            return f"{kernel} up to {self.pays_to} tokens, a dense copy beyond: {self.why}"
        loses = (
            f" (expected no faster than dense from {self.pays_to + 1} on)"
            if self.pays_to < self.max_tokens
            else ""
        )
        return f"{kernel} up to {self.max_tokens} tokens{loses}, unpack + torch beyond: {self.why}"

    def arrays(self, buffers: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        """Return the packing's arrays out of a layer's buffers."""
        arrays = tuple(buffers[name] for name in self.names)
        return tuple(array for array in arrays if array is not None)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The packing that a number of tokens is expected to be fastest with."""

    packing: str  # "delta" | "fragment" | "pair" | "nm" | "dense"
    pays_to: int  # tokens up to which it is expected to be faster than the dense product
    why: str


def expected_tokens() -> int:
    """Return the tokens per call that packings are chosen for: PYSPARSE_CUDA_TOKENS, or 1."""
    text = os.environ.get(TOKENS_VARIABLE) or "1"
    if not (text.isdecimal() and 1 <= int(text) <= 1 << 20):
        raise ValueError(f"{TOKENS_VARIABLE}={text} is not a number of tokens from 1 to {1 << 20}")
    return int(text)


def _missing(dtype: torch.dtype) -> str:
    """Return why no kernel runs a layer of ``dtype`` on the CUDA devices here, or an empty string."""
    if dtype not in PACKED_DTYPES:
        have = " and ".join(str(one).removeprefix("torch.") for one in PACKED_DTYPES)
        return f"no sparse kernel for {str(dtype).removeprefix('torch.')} on cuda ({have} have one)"
    return backend.missing_reason() or backend.cuda_missing_reason()


def predict(bitmap: BitmapTensor, tokens: int = 1) -> Prediction:
    """Return the packing that is expected to be fastest at ``tokens``, by measured costs; dense without a gain.

    The costs are those of ``bitmap``'s device; of the reported GPU for one on the CPU.
    """
    device, p, shape = bitmap.values.device, bitmap.density, bitmap.shape
    costs = device_costs(Gpu.of(device) if device.type == "cuda" else None)
    if NMRows.name not in costs.lines and backend.experimental():
        costs = costs.assuming(NMRows.name, DeltaRows.name)  # it walks rows of as many bytes the same way
    names = [n for n in costs.lines if n in PACKINGS and tokens <= ops.max_tokens(n, shape[1], device.index)]
    if "pair" in names and (p > 0.5 or not keeps_pairs(bitmap)):
        names.remove("pair")
    pattern = nm_pattern(bitmap) if NMRows.name in names else None
    # Two of four is the sparse tensor cores' own; a loose pattern, as random zeros keep to it, is mostly fillers.
    if pattern in (None, (2, 4)) or bytes_per_entry("nm", p, pattern) > GAIN * bytes_per_entry("delta", p):
        names = [name for name in names if name != NMRows.name]
    # A packing that saves no memory is none, however few microseconds a tiny layer takes.
    names = [n for n in names if bytes_per_entry(n, p, pattern) * GAIN <= bytes_per_entry("cublas", p)]
    dense = costs.microseconds("cublas", tokens, shape, p)
    times = {name: costs.microseconds(name, tokens, shape, p, pattern) for name in names}
    best = min(times, key=times.__getitem__, default="dense")
    at = f"{tokens} token{'s' if tokens > 1 else ''}"
    if best == "dense" or times[best] * GAIN > dense:
        return Prediction("dense", 0, f"{1 - p:.0%} sparse, no gain expected at {at}")
    why = f"{1 - p:.0%} sparse, {dense / times[best]:.2g}x dense expected at {at} (figures of {costs.gpu})"
    return Prediction(best, costs.pays_to(best, shape, p, GAIN, pattern), why)
