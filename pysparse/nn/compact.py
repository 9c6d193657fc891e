"""CompactLinear: a linear layer with int8 values, with an n:m pattern, or with both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, Int8Bitmap, NMInt8, NMTensor, TiledInt8
from pysparse.nn.linear import parse_pattern

Weight = TiledInt8 | NMTensor | NMInt8
_STATE = {  # the tensors that each kind saves
    TiledInt8: ("compressed", "bitmask", "row_offsets", "scales", "shape"),
    NMTensor: ("values", "indices", "pattern", "shape"),
    NMInt8: ("values", "indices", "scales", "pattern", "shape"),
}


class CompactLinear(nn.Module):
    """``y = x W^T + b`` for inference on the CPU with a weight smaller than a bfloat16 bitmap.

    ``values="int8"`` keeps int8 values and a float32 scale per row (or per row and ``group_size`` inputs);
    ``pattern="2:4"`` keeps n of every m inputs with compact indices instead of a mask; together, both. With
    int8 values tokens are quantised as they arrive, to ``activation_bits`` 8 or 16 (see
    :func:`pysparse.ops.int8_linear`); the layer takes float32 and bfloat16 inputs alike.

    ``state_dict()`` holds, beside ``bias`` and ``shape``: for int8 ``compressed`` (int8 [nnz], row-major),
    ``bitmask``, ``row_offsets``, ``scales`` (float32 [R, G]); for a pattern ``values``, ``indices`` (as in
    NMTensor), ``pattern`` ([n, m]), and ``scales`` where the values are int8.
    """

    def __init__(
        self, weight: Weight, bias: nn.Parameter | None = None, activation_bits: int = 8,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Build a layer over a packed ``weight``; ``dtype`` (of the bias, and of the dense weight it stands for)
        defaults to the bias's, then to the weight's, then to float32."""
        if activation_bits not in ops.ACTIVATION_BITS:
            raise ValueError(f"activation_bits is 8 or 16, got {activation_bits}")
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation_bits = activation_bits
        self.bias = bias
        own = weight.dtype if isinstance(weight, NMTensor) else torch.float32
        self._dtype = dtype or (bias.dtype if bias is not None else own)
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
        if values not in (None, "int8"):
            raise ValueError(f'values is "int8" or None, got {values!r}')
        bitmap = BitmapTensor.from_dense(linear.weight, keep)
        return cls(
            _pack(bitmap, values, pattern, group_size), linear.bias, activation_bits, linear.weight.dtype
        )

    def _set_weight(self, weight: Weight) -> None:
        matrix = weight.matrix if isinstance(weight, NMInt8) else weight
        self._kind: type[Weight] = type(weight)
        self.pattern = None if isinstance(matrix, TiledInt8) else (matrix.n, matrix.m)
        self.group_size = None if isinstance(weight, NMTensor) else weight.group_size
        arrays = {"values": matrix.values}
        if isinstance(matrix, TiledInt8):
            arrays |= {"masks": matrix.masks, "tile_offsets": matrix.tile_offsets}
        else:
            arrays["indices"] = matrix.indices
        if not isinstance(weight, NMTensor):
            arrays |= {"scales": weight.scales, "row_sums": weight.row_sums}
        for name, array in arrays.items():
            self.register_buffer(name, array, persistent=False)

    def packed(self) -> Weight:
        """Return the weight as a container over the layer's buffers."""
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
        if x.size(-1) != self.in_features:
            raise ValueError(f"x has {x.size(-1)} features, the layer takes {self.in_features}")
        if x.dtype is not self._dtype and torch.is_autocast_enabled("cpu"):
            x = x.to(self._dtype)  # packed weights keep their dtype: autocast moves the input instead
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
        """Convert dtypes; scales stay float32. RuntimeError for a device without kernels."""
        moved = fn(torch.empty(0, dtype=self._dtype))
        if moved.device.type != "cpu":
            raise RuntimeError(
                f"int8 and n:m layers have CPU kernels only, not on {moved.device}: call densify_(model) first"
            )
        scales = self._buffers.get("scales")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None:
            self._buffers["scales"] = scales
        self._dtype = moved.dtype
        return self

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], dequantised anew at each access."""
        return self.bitmap().to_dense()

    @property
    def nnz(self) -> int:
        """Number of stored weights."""
        return self.bitmap().nnz

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are not stored."""
        return 1.0 - self.nnz / max(1, self.in_features * self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory, bias not counted."""
        return sum(b.nbytes for b in self._buffers.values() if b is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the bias and of the dense weight that this one stands for."""
        return self._dtype

    @property
    def kernel(self) -> str:
        """Name the kernel that a few tokens run on now."""
        format = {TiledInt8: "bitmap-int8", NMTensor: "nm", NMInt8: "nm-int8"}[self._kind]
        isa = backend.core().selected("linear", format, 0 if self._dtype == torch.float32 else 1)
        if self.pattern and not backend.core().nm_has_vector_kernel(*self.pattern):
            isa = "generic"
        return f"linear-{format}-{str(self._dtype).removeprefix('torch.')}-{isa}"

    def extra_repr(self) -> str:
        """Describe shape, packing and sparsity in ``print(model)``."""
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        ]
        if self._kind is not NMTensor:
            parts.append(f"values=int8, activation_bits={self.activation_bits}")
        if self.pattern:
            parts.append(f"pattern={self.pattern[0]}:{self.pattern[1]}")
        return ", ".join([*parts, f"sparsity={self.sparsity:.3f}"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.packed()
        tensors = {"shape": torch.tensor([self.out_features, self.in_features])}
        if isinstance(weight, TiledInt8):
            rows = weight.to_int8()
            tensors |= {"compressed": rows.values, "bitmask": rows.bitmask, "row_offsets": rows.row_offsets}
        else:
            matrix = weight if isinstance(weight, NMTensor) else weight.matrix
            tensors |= {"values": matrix.values, "indices": matrix.indices}
            tensors["pattern"] = torch.tensor([matrix.n, matrix.m])
        if not isinstance(weight, NMTensor):
            tensors["scales"] = weight.scales[:, : self.out_features].T.contiguous()
        for name in _STATE[self._kind]:
            destination[prefix + name] = tensors[name]
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
        names = (*_STATE[self._kind], *(("bias",) if self.bias is not None else ()))
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in names if name not in given)
        if strict:
            own = {prefix + name for name in names}
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in own)
        if len(given) != len(names):
            return
        try:
            self._load(given)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def _load(self, given: dict[str, Tensor]) -> None:
        shape = (self.out_features, self.in_features)
        for name, wanted in (("shape", shape), ("pattern", self.pattern)):
            if name in given and tuple(given[name].flatten().tolist()) != wanted:
                raise ValueError(
                    f"{name} says {given[name].flatten().tolist()}, the layer is {list(wanted or ())}"
                )
        if self.bias is not None and given["bias"].shape != self.bias.shape:
            raise ValueError(
                f"bias has shape {tuple(given['bias'].shape)}, expected {tuple(self.bias.shape)}"
            )
        self._set_weight(self._unpack_state({name: tensor.clone() for name, tensor in given.items()}, shape))
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(given["bias"])

    def _unpack_state(self, given: dict[str, Tensor], shape: tuple[int, int]) -> Weight:
        """Validate the tensors of a state_dict and return the weight they hold."""
        if self._kind is TiledInt8:
            arrays = given["compressed"], given["bitmask"], given["row_offsets"], given["scales"]
            int8 = Int8Bitmap(*arrays, self.group_size or 1, shape)
            int8.validate()
            return TiledInt8.from_int8(int8)
        n, m = self.pattern or (0, 0)
        values = given["values"].to(self._dtype) if self._kind is NMTensor else given["values"]
        matrix = NMTensor(values, given["indices"], n, m, shape)
        if self._kind is NMTensor:
            matrix.validate()
            return matrix
        weight = NMInt8.from_matrix(matrix, given["scales"], self.group_size or 1)
        weight.validate()
        return weight


def _pack(bitmap: BitmapTensor, values: str | None, pattern: str | None, group_size: int | None) -> Weight:
    if values is None and group_size is not None:
        raise ValueError(f'group_size={group_size} needs values="int8": other values have no scales')
    if pattern is None:
        if values is None:
            raise ValueError('give values="int8", a pattern such as "2:4", or both; else use SparseLinear')
        return TiledInt8.from_int8(Int8Bitmap.from_bitmap(bitmap, group_size))
    n, m = parse_pattern(pattern)
    if values is None:
        return NMTensor.from_bitmap(bitmap, n, m)
    return NMInt8.from_int8(Int8Bitmap.from_bitmap(bitmap, group_size), n, m)
