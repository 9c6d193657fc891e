"""CompactLinear: a linear layer with int8 values, with an n:m pattern, or with both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, Int8Bitmap, NMInt8, NMTensor, TiledInt8
from pysparse.nn.conversion import converted, without_data
from pysparse.nn.dispatch import Dispatch
from pysparse.nn.packing import Packing, RowMajor, grid_of, row_major
from pysparse.nn.seat import Seat
from pysparse.ops import Compact
from pysparse.ops.costs import Choice

_INT8 = ("compressed", "bitmask", "row_offsets", "scales", "shape")
_FLOAT = ("compressed", "bitmask", "row_offsets", "shape")
_PACKINGS: dict[type[Compact], str] = {
    TiledInt8: "int8",
    NMTensor: "nm",
    NMInt8: "nm-int8",
}  # as costs name them


class CompactLinear(nn.Module):
    """``y = x W^T + b`` for inference on the CPU with a weight smaller than a bfloat16 bitmap.

    ``values="int8"`` keeps int8 values and a float32 scale per row (or per row and ``group_size`` inputs);
    ``pattern="2:4"`` keeps n of every m inputs with compact indices instead of a mask; together, both. With
    int8 values tokens are quantised as they arrive, to ``activation_bits`` 8 or 16 (see
    :func:`pysparse.ops.int8_linear`); the layer takes float32 and bfloat16 inputs alike.

    From 2 tokens on measured costs choose between the kernel and unpacking into the cache, which does not quantise
    tokens; with ``layer.prefill = "packed"`` also a dense copy, made at the first call that gains from it and counted
    in ``nbytes``. Inputs of another dtype than the layer's go to the kernel up to 64 tokens, and are unpacked beyond.

    ``state_dict()`` holds the tensors of the file whatever the packing: ``compressed`` (int8 or float [nnz],
    row-major), ``bitmask``, ``row_offsets``, ``shape`` as a :class:`SparseLinear` has them, and ``scales``
    (float32 [R, G]) where the values are int8. The packing itself is the layer's; a file has it in config.json.
    On the device meta these are the buffers.
    """

    bias: nn.Parameter | None
    # As in SparseLinear, for int8 values under a bitmap:
    _prepared: ops.PreparedInt8 | None = None
    _gated: ops.Prepared | None = None
    _seat: Seat | None = None

    def __init__(
        self, weight: Compact, bias: nn.Parameter | None = None, activation_bits: int = 8,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Build a layer over a packed ``weight``; ``dtype`` (of the bias, and of the dense weight it stands for)
        defaults to the bias's, then to the weight's, then to float32."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packing = Packing.of(weight, activation_bits)
        self.register_parameter("bias", bias)
        own = weight.dtype if isinstance(weight, NMTensor) else torch.float32
        self._dtype = dtype or (bias.dtype if bias is not None else own)
        self._prefill = "auto"
        self._set_weight(weight)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        values: str | None = None,
        pattern: str | None = None,
        keep: Tensor | None = None,
        *,
        group_size: int | None = None,
        activation_bits: int = 8,
    ) -> CompactLinear:
        """Pack a pruned linear layer; ``keep`` (bool, True survives) defaults to ``weight != 0``.

        ``values`` is "int8" or None for the weight's own dtype; ``pattern`` is "n:m", n KEPT of m consecutive
        inputs, or None; at least one must be given. The bias is shared. Raises ValueError for anything else,
        and for a group that keeps more than the pattern, named; RuntimeError without the compiled core.
        """
        packing = Packing(values, pattern, group_size, activation_bits)
        weight = packing.pack(BitmapTensor.from_dense(linear.weight, keep), grid_of(linear))
        return cls(weight, linear.bias, activation_bits, linear.weight.dtype)

    def _set_weight(self, weight: Compact) -> None:
        matrix = weight.matrix if isinstance(weight, NMInt8) else weight
        self._kind: type[Compact] = type(weight)
        self.pattern = None if isinstance(matrix, TiledInt8) else (matrix.n, matrix.m)
        self.group_size = None if isinstance(weight, NMTensor) else weight.group_size
        arrays = {"values": matrix.values}
        if isinstance(matrix, TiledInt8):
            arrays |= {"masks": matrix.masks, "tile_offsets": matrix.tile_offsets}
        else:
            arrays["indices"] = matrix.indices
        if not isinstance(weight, NMTensor):
            arrays |= {"scales": weight.scales, "row_sums": weight.row_sums}
        self._hold(arrays)
        self.prefill = self._prefill
        self._drop_prepared()

    def _hold(self, arrays: dict[str, Tensor]) -> None:
        """Make ``arrays`` the layer's buffers, and the only ones."""
        self._buffers.clear()
        for name, array in arrays.items():
            self.register_buffer(name, array, persistent=False)

    @property
    def _has_data(self) -> bool:
        return "values" in self._buffers

    def _drop_prepared(self) -> None:
        """Let go of the weight's arrays where a call keeps them."""
        self._prepared = self._gated = None
        if self._seat is not None:
            self._seat[0].forget()

    @property
    def has_bitmap(self) -> bool:
        """Tell whether the places are kept in a mask, as those of a :class:`SparseLinear` are."""
        return self._kind is TiledInt8

    @property
    def prefill(self) -> str:
        """What may be held beside the weight: "packed" allows a dense copy, "auto" and "unpack" nothing."""
        return self._prefill

    @prefill.setter
    def prefill(self, mode: str) -> None:
        bits = None if self._kind is NMTensor else self.activation_bits
        vectorised = self.pattern is None or backend.core().nm_has_vector_kernel(*self.pattern)
        self._dispatch = Dispatch(mode, _PACKINGS[self._kind], bits, vectorised)
        self._prefill, self._prepared = mode, None

    def packed(self) -> Compact:
        """Return the weight as a container over the layer's buffers; RuntimeError on meta."""
        if not self._has_data:
            raise without_data(self)
        b, shape = self._buffers, (self.out_features, self.in_features)
        arrays: dict[str, Any] = {name: array for name, array in b.items() if array is not None}
        if self._kind is TiledInt8:
            return TiledInt8(**arrays, group_size=self.group_size or 1, shape=shape)
        n, m = self.pattern or (0, 0)
        matrix = NMTensor(arrays["values"], arrays["indices"], n, m, shape)
        if self._kind is NMTensor:
            return matrix
        return NMInt8(matrix, arrays["scales"], arrays["row_sums"], self.group_size or 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] for ``x`` [..., in_features]."""
        seat = self._seat
        if seat is not None and not ops.is_traced():
            return seat[0].linear(seat[1], self, x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """Compute :meth:`forward` by this layer alone."""
        bias, traced = self._parameters["bias"], ops.is_traced()
        prepared = None if traced else self._prepared  # addresses are nothing for a graph
        if (
            prepared is not None
            and prepared.takes(x)
            and prepared.is_current(0, self._buffers, bias)
            and not (torch.is_grad_enabled() and ops.needs_dispatcher(x, bias))
        ):
            return prepared.linear(x)
        if x.size(-1) != self.in_features:
            raise ValueError(f"x has {x.size(-1)} features, the layer takes {self.in_features}")
        if not self._has_data:
            raise without_data(self)
        if x.dtype is not self._dtype and torch.is_autocast_enabled("cpu"):
            x = x.to(self._dtype)  # packed weights keep their dtype: autocast moves the input instead
        if self._dtype not in ops.KERNEL_DTYPES:
            return self._forward_slow(x)
        dispatch = self._dispatch
        if x.numel() > dispatch.unasked * self.in_features and not ops.needs_dispatcher(x, bias):
            tokens = x.numel() // self.in_features
            way = (dispatch.decided(tokens) or self._decide(tokens)) if x.dtype is self._dtype else ""
            if way and (way != dispatch.kernel or tokens > ops.DECODE_TOKENS):
                return dispatch.run(way, x, self.packed(), bias)
        elif dispatch.unasked and self.has_bitmap and not traced:
            self._prepare(x.dtype, bias)
        return self._multiply(x)

    def _prepare(self, dtype: torch.dtype, bias: Tensor | None) -> None:
        """Keep what one token needs, for the calls that follow; not where the kernels refuse the dtypes."""
        if self.in_features and dtype in ops.KERNEL_DTYPES and (bias is None or bias.dtype is dtype):
            self._prepared = ops.PreparedInt8((self._operand(),), self.in_features, dtype)

    def _operand(self) -> ops.Int8Operand:
        b: Any = self._buffers
        arrays = (b["values"], b["masks"], b["tile_offsets"], b["scales"], b["row_sums"])
        bias, group_size = self._parameters["bias"], self.group_size or 1
        return ops.Int8Operand(*arrays, bias, self.out_features, group_size, self.activation_bits)

    def operand(self, x: Tensor) -> ops.Int8Operand | None:
        """Return what a call shared with other layers needs of this one; None unless it would decode ``x`` itself."""
        if not self.has_bitmap or x.dtype is not self._dtype or self._dtype not in ops.KERNEL_DTYPES:
            return None
        if x.size(-1) != self.in_features or not self._has_data or ops.is_traced():
            return None
        if x.numel() > self._dispatch.unasked * self.in_features:
            tokens = x.numel() // self.in_features
            way = self._dispatch.decided(tokens) or self._decide(tokens)
            if tokens > ops.DECODE_TOKENS or way != self._dispatch.kernel:
                return None
        return self._operand()

    def _multiply(self, x: Tensor) -> Tensor:
        """Run the kernel, or with more than 64 tokens the unpacking: what autograd and torch.compile may see."""
        b, bias = self._buffers, self._parameters["bias"]
        if self._kind is TiledInt8:
            arrays: Any = (b["values"], b["masks"], b["tile_offsets"], b["scales"], b["row_sums"])
            group_size = self.group_size or 1
            return ops.call_int8_linear(x, arrays, bias, self.out_features, group_size, self.activation_bits)
        n, m = self.pattern or (0, 0)
        values: Any = b["values"]
        indices: Any = b["indices"]
        if self._kind is NMTensor:
            return ops.call_nm_linear(x, values, indices, bias, self.out_features, n, m)
        arrays = (values, indices, b["scales"], b["row_sums"])
        return ops.call_nm_int8_linear(
            x, arrays, bias, self.out_features, (n, m), self.group_size or 1, self.activation_bits
        )

    def _decide(self, tokens: int) -> str:
        """Find the way that costs least for this number of tokens; measures the costs if they are not known."""
        return self._dispatch.way((self.out_features, self.in_features), self._stored, self._dtype, tokens)

    def choice(self, tokens: int) -> Choice:
        """Tell how ``tokens`` rows are computed and why, with the expected times; measures nothing."""
        shape = self.out_features, self.in_features
        return self._dispatch.choice(shape, self._stored, self._dtype, tokens, may_measure=False)

    @property
    def _stored(self) -> int:
        """Weights that the kernels multiply: an n:m row has room for n of every m, whether it keeps so many or not."""
        if self.pattern is not None:
            return self.out_features * self.in_features * self.pattern[0] // self.pattern[1]
        offsets = self._buffers["tile_offsets"]
        return 0 if offsets is None else int(offsets[-1])

    def _forward_slow(self, x: Tensor) -> Tensor:
        backend.warn_once(
            f"slow-compact-{self._dtype}",
            f"no kernel for {self._dtype} (float32 and bfloat16 have one): int8 and n:m weights are unpacked and "
            "multiplied densely at each call",
        )
        return functional.linear(x, self.weight, self.bias)

    def bitmap(self) -> BitmapTensor:
        """Return the weight row-major in the layer's dtype, dequantised."""
        weight = self.packed()
        if isinstance(weight, NMTensor):
            return weight.to_bitmap()
        return weight.to_int8().to_bitmap(self._dtype)

    def to_dense(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same (dequantised) weight, zeros written out; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.bitmap().to_dense(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactLinear:
        """Convert dtypes; scales stay float32. On meta the tensors of the file are the buffers.

        Before anything changes: RuntimeError for a device without kernels, ValueError for a dtype that the layer
        cannot hold.
        """
        device = next(b.device for b in self._buffers.values() if b is not None)
        after = converted(self, fn, torch.empty(0, dtype=self._dtype, device=device))
        if after.device.type not in ("cpu", "meta"):
            raise RuntimeError(
                f"int8 and n:m layers have CPU kernels only, not on {after.device}: call densify_(model) first"
            )
        if after.is_meta and self._has_data:
            self._hold(state_of(row_major(self.packed())))
        scales = self._buffers.get("scales")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None:
            scales = (
                torch.empty_like(scales, device=after.device) if scales.device != after.device else scales
            )
            self._buffers["scales"] = scales
        self._dtype = after.dtype
        self._dispatch.clear()
        self._drop_prepared()
        return self

    @property
    def activation_bits(self) -> int:
        """Bits that a token is quantised to where the values are int8."""
        return self.packing.activation_bits

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], dequantised anew at each access."""
        return self.bitmap().to_dense()

    @property
    def nnz(self) -> int:
        """Number of stored weights."""
        if not self._has_data:
            return next(
                b.numel() for name, b in self._buffers.items() if name == "compressed" and b is not None
            )
        return self.bitmap().nnz

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are not stored."""
        return 1.0 - self.nnz / max(1, self.in_features * self.out_features)

    @property
    def second_packing_nbytes(self) -> int:
        """Bytes of the dense copy, 0 while there is none."""
        return self._dispatch.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory now, a dense copy counted, the bias not."""
        return sum(b.nbytes for b in self._buffers.values() if b is not None) + self._dispatch.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the bias and of the dense weight that this one stands for."""
        return self._dtype

    @property
    def kernel(self) -> str:
        """Name the kernel that a few tokens run on now, and how many are computed and why."""
        if not self._has_data:
            return "none: no data yet (device meta)"
        if self._dtype not in ops.KERNEL_DTYPES:
            return f"unpack + dense torch: no kernel for {self._dtype}"
        format = "bitmap-int8" if self._kind is TiledInt8 else _PACKINGS[self._kind]
        isa = backend.core().selected("linear", format, 0 if self._dtype == torch.float32 else 1)
        if self.pattern and not backend.core().nm_has_vector_kernel(*self.pattern):
            isa = "generic"
        many = self.choice(256)
        return (
            f"linear-{format}-{str(self._dtype).removeprefix('torch.')}-{isa}; "
            f"256 tokens: {many.way}, {many.reason}"
        )

    def extra_repr(self) -> str:
        """Describe shape, packing and sparsity in ``print(model)``."""
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        ]
        if self._kind is not NMTensor:
            parts.append(f"values=int8, activation_bits={self.activation_bits}")
        if self.pattern:
            parts.append(f"pattern={self.pattern[0]}:{self.pattern[1]}")
        calls = self._seat[0].describe(self._seat[1]) if self._seat is not None else ""
        return ", ".join(
            [*parts, f"sparsity={self.sparsity:.3f}", str(self._dispatch), *([calls] if calls else [])]
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        state: Any = state_of(row_major(self.packed())) if self._has_data else self._buffers
        for name, tensor in state.items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = (*self._state_names, *(("bias",) if self.bias is not None else ()))
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in names if name not in given)
        if strict:
            own = {prefix + name for name in names}
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in own)
        if len(given) != len(names):
            return
        try:
            self._load(given, bool(local_metadata.get("assign_to_params_buffers", False)))
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    @property
    def _state_names(self) -> tuple[str, ...]:
        return _FLOAT if self._kind is NMTensor else _INT8

    def _load(self, given: dict[str, Tensor], assign: bool) -> None:
        shape, stated = (self.out_features, self.in_features), given["shape"].flatten().tolist()
        if stated != list(shape):
            raise ValueError(f"shape says {stated}, the layer is {list(shape)}")
        if self.bias is not None and given["bias"].shape != self.bias.shape:
            raise ValueError(
                f"bias has shape {tuple(given['bias'].shape)}, expected {tuple(self.bias.shape)}"
            )
        arrays = {name: tensor.clone() for name, tensor in given.items()}
        rows = self._rows(
            arrays["compressed"], arrays["bitmask"], arrays["row_offsets"], arrays.get("scales")
        )
        rows.validate()
        self._set_weight(self.packing.pack(rows))
        if self.bias is not None and (assign or self.bias.is_meta):
            self.bias = nn.Parameter(given["bias"], requires_grad=self.bias.requires_grad)
        elif self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(given["bias"])

    def _rows(
        self, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, scales: Tensor | None
    ) -> RowMajor:
        shape = (self.out_features, self.in_features)
        if scales is None:
            return BitmapTensor(compressed.to(self._dtype), bitmask, row_offsets, shape)
        return Int8Bitmap(compressed, bitmask, row_offsets, scales, self.group_size or 1, shape)


def state_of(rows: RowMajor) -> dict[str, Tensor]:
    """Return a row-major weight as the tensors of a file."""
    state = {"compressed": rows.values, "bitmask": rows.bitmask, "row_offsets": rows.row_offsets}
    if isinstance(rows, Int8Bitmap):
        state["scales"] = rows.scales
    return {**state, "shape": torch.tensor(rows.shape)}
