"""SparseLinear: a linear layer over the kernels that holds its weight packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse import backend, ops
from pysparse.formats import BitmapTensor, TiledBitmap
from pysparse.nn.conversion import converted, without_data
from pysparse.nn.device import DeviceWeight
from pysparse.nn.dispatch import Dispatch
from pysparse.nn.packing import check_pattern
from pysparse.nn.seat import Seat
from pysparse.ops.costs import Choice

_CANONICAL = ("compressed", "bitmask", "row_offsets", "shape")


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with W kept as a bitmap: [out_features, in_features], float32, bfloat16 or float16.

    The layer is in one of two states. *Canonical*: buffers ``compressed``, ``bitmask``, ``row_offsets`` and
    ``shape``, exactly the tensors of the file (a loader fills them in). *Packed*: buffers ``values``,
    ``masks``, ``tile_offsets``, which the kernels read; the canonical ones are dropped so that the weight
    is in memory once. ``state_dict()`` always speaks canonical, whichever state the layer is in.

    From 2 tokens on the way is chosen by measured costs. Where another packing of the weight pays, it is made
    at the first such call and counted in ``nbytes``; ``layer.prefill`` ("auto" | "packed" | "unpack") rules that.
    Moved to a CUDA device, the layer packs itself for that device's kernels, or densely where none is expected to
    gain (see :mod:`pysparse.nn.device`); there "packed" keeps a dense copy for the tokens with which they lose.
    """

    compressed: Tensor | None
    bitmask: Tensor | None
    row_offsets: Tensor | None
    shape: Tensor | None
    values: Tensor | None
    masks: Tensor | None
    tile_offsets: Tensor | None
    bias: nn.Parameter | None
    _prepared: ops.Prepared | None = None  # for one token, while the weight stays where it is
    _gated: ops.Prepared | None = None  # the same, of this layer as a gate with its up
    _seat: Seat | None = None  # among siblings called with the same input, see fuse_

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Build an all-zero layer with room for ``nnz`` values, in the canonical state (works on meta)."""
        if not 0 <= nnz <= in_features * out_features:
            raise ValueError(f"nnz={nnz} is outside [0, {in_features * out_features}]")
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._dispatch = Dispatch()
        self._device_weight: DeviceWeight | None = None
        empty = torch.zeros(nnz, dtype=dtype or torch.get_default_dtype(), device=device)
        self.register_buffer("compressed", empty)
        self.register_buffer(
            "bitmask", torch.zeros(out_features, (in_features + 7) // 8, dtype=torch.uint8, device=device)
        )
        self.register_buffer("row_offsets", torch.zeros(out_features, dtype=torch.int64, device=device))
        self.register_buffer("shape", torch.tensor([out_features, in_features], device=device))
        for name in ("values", "masks", "tile_offsets"):
            self.register_buffer(name, None, persistent=False)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=empty.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, pattern: str | None = None, keep: Tensor | None = None
    ) -> SparseLinear:
        """Pack a linear layer; ``keep`` (bool, True survives) defaults to ``weight != 0``. The bias is shared.

        ``pattern`` such as "2:4" (kept : group) is checked, not imposed: ValueError names the first group of
        consecutive inputs that keeps more.
        """
        bitmap = BitmapTensor.from_dense(linear.weight, keep)
        if pattern not in (None, "unstructured"):
            check_pattern(bitmap.keep_mask(), str(pattern))
        return cls.from_bitmap(bitmap, linear.bias)

    @classmethod
    def from_bitmap(cls, bitmap: BitmapTensor, bias: nn.Parameter | None = None) -> SparseLinear:
        """Build a packed layer over ``bitmap`` (validated here) and share ``bias``."""
        rows, cols = bitmap.shape
        layer = cls(cols, rows, 0, bias=False, dtype=bitmap.dtype, device="meta")
        layer.bias = bias
        layer._set_canonical(bitmap)
        return layer.pack()

    def _set_canonical(self, bitmap: BitmapTensor) -> None:
        self.compressed, self.bitmask, self.row_offsets = bitmap.values, bitmap.bitmask, bitmap.row_offsets
        self.shape = torch.tensor([self.out_features, self.in_features], device=bitmap.device)
        self.values = self.masks = self.tile_offsets = None
        self._dispatch.clear()
        self._drop_prepared()
        self._drop_device_weight()
        if self._seat is not None and self._seat[0].stacked:
            self._seat = None

    def _drop_prepared(self) -> None:
        """Let go of the weight's arrays where a call keeps them."""
        self._prepared = self._gated = None
        if self._seat is not None:
            self._seat[0].forget()

    def _drop_device_weight(self) -> None:
        for name in self._device_weight.names if self._device_weight else ():
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        self._device_weight = None

    @property
    def is_packed(self) -> bool:
        """Tell whether the layer holds the kernels' packing."""
        return self._buffers["masks"] is not None or self._device_weight is not None

    @property
    def is_on_device(self) -> bool:
        """Tell whether the packing is one for a CUDA device."""
        return self._device_weight is not None

    def bitmap(self) -> BitmapTensor:
        """Return the weight in its row-major form; a view of the buffers in the canonical state, else a copy."""
        if self.values is not None and self.masks is not None and self.tile_offsets is not None:
            tiled = TiledBitmap(
                self.values, self.masks, self.tile_offsets, (self.out_features, self.in_features)
            )
            return tiled.to_bitmap()
        if self._device_weight is not None:
            return self._device_weight.to_bitmap(self._buffers, (self.out_features, self.in_features))
        if self.compressed is None or self.bitmask is None or self.row_offsets is None or self.shape is None:
            raise RuntimeError("this SparseLinear has lost its buffers")
        if self.shape.device.type != "meta" and self.shape.flatten().tolist() != [
            self.out_features,
            self.in_features,
        ]:
            raise ValueError(
                f"shape says {self.shape.flatten().tolist()}, the layer is {[self.out_features, self.in_features]}"
            )
        return BitmapTensor(
            self.compressed, self.bitmask, self.row_offsets, (self.out_features, self.in_features)
        )

    def pack(self) -> SparseLinear:
        """Validate the canonical buffers and turn them into the kernels' packing; a no-op when packed.

        On the CPU without the compiled core or for float16, and on devices that are not CUDA's, the canonical buffers
        are validated and stay. Raises ValueError when they contradict each other.
        """
        if self.is_packed:
            return self
        bitmap = self.bitmap()
        if bitmap.device.type == "meta":
            raise without_data(self)
        bitmap.validate()
        if backend.available() and bitmap.device.type == "cpu" and ops.is_kernel_dtype(bitmap.dtype):
            tiled = TiledBitmap.from_bitmap(bitmap)
            self.values, self.masks, self.tile_offsets = tiled.values, tiled.masks, tiled.tile_offsets
            self.compressed = self.bitmask = self.row_offsets = self.shape = None
        elif bitmap.device.type == "cuda":
            self._pack_for_device(bitmap)
        return self

    def _pack_for_device(self, bitmap: BitmapTensor) -> None:
        """Choose a packing, which may be the dense matrix, and hold its arrays as buffers."""
        weight, arrays = DeviceWeight.choose(bitmap)
        for name, array in zip(weight.names, arrays, strict=True):
            self.register_buffer(name, array, persistent=False)
        self._device_weight = weight
        self.compressed = self.bitmask = self.row_offsets = self.shape = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Move or convert the layer; packings belong to one kind of device, so they are made again there.

        On meta the layer is canonical. ValueError, before anything changes, for a dtype that it cannot hold.
        """
        before = self._first_buffer()
        after = converted(self, fn, before)
        self._dispatch.clear()
        self._drop_prepared()
        moved = self.is_packed and after.device.type != before.device.type
        if moved or (self._device_weight is not None and after.dtype != before.dtype):
            self._set_canonical(self.bitmap())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self.pack() if moved and not after.is_meta else self

    def _first_buffer(self) -> Tensor:
        """Return a buffer of the weight's dtype, whatever the state."""
        names = ("values", "compressed", *(self._device_weight.names[:1] if self._device_weight else ()))
        for name in names:
            buffer = self._buffers[name]
            if buffer is not None:
                return buffer
        raise RuntimeError("this SparseLinear has lost its buffers")

    def to_dense(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same weight, zeros written out; the bias is shared."""
        weight = self.bitmap().to_dense()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] for ``x`` [..., in_features] of the weight's dtype."""
        seat = self._seat
        if seat is not None and (seat[0].stacked or not ops.is_traced()):
            return seat[0].linear(seat[1], self, x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """Compute :meth:`forward` by this layer alone."""
        buffers, bias, traced = self._buffers, self._parameters["bias"], ops.is_traced()
        prepared = None if traced else self._prepared  # addresses are nothing for a graph
        if (
            prepared is not None
            and prepared.takes(x)
            and prepared.is_current(0, buffers, bias)
            and not (torch.is_grad_enabled() and ops.needs_dispatcher(x, bias))
        ):
            return prepared.linear(x)
        masks, values, tile_offsets = buffers["masks"], buffers["values"], buffers["tile_offsets"]
        if masks is None or values is None or tile_offsets is None:
            return self._forward_slow(x)
        if not masks.is_cpu or values.dtype not in ops.KERNEL_DTYPES:
            return self._forward_slow(x)
        if x.size(-1) != self.in_features:
            raise ValueError(f"x has {x.size(-1)} features, the layer takes {self.in_features}")
        if x.dtype is not values.dtype and torch.is_autocast_enabled("cpu"):
            x = x.to(values.dtype)  # packed weights keep their dtype: autocast moves the input instead
        dispatch = self._dispatch
        if x.numel() > dispatch.unasked * self.in_features and not ops.needs_dispatcher(x, bias):
            tokens = x.numel() // self.in_features
            way = dispatch.decided(tokens) or self._decide(tokens)
            if way != "bitmap" or tokens > ops.DECODE_TOKENS:
                return dispatch.run(way, x, self._tiled(), bias)
        elif dispatch.unasked and x.dtype is values.dtype and not traced:
            self._prepare(ops.Operand(values, masks, tile_offsets, bias, self.out_features))
        return ops.call_bitmap_linear(x, values, masks, tile_offsets, bias, self.out_features)

    def _prepare(self, operand: ops.Operand) -> None:
        """Keep what one token needs, for the calls that follow; not where the kernels refuse the bias's dtype."""
        bias = operand.bias
        if self.in_features and (bias is None or bias.dtype is operand.values.dtype):
            self._prepared = ops.Prepared((operand,), self.in_features)

    def _decide(self, tokens: int) -> str:
        """Find the way that costs least for this number of tokens; measures the costs if they are not known."""
        weight = self._tiled()
        return self._dispatch.way(weight.shape, weight.nnz, weight.values.dtype, tokens)

    def operand(self, x: Tensor) -> ops.Operand | None:
        """Return what a call shared with other layers needs of this one; None unless it would decode ``x`` itself.

        Under torch.compile, where ways are not measured, any number of tokens may come.
        """
        b = self._buffers
        values, masks, tile_offsets = b["values"], b["masks"], b["tile_offsets"]
        if values is None or masks is None or tile_offsets is None or not masks.is_cpu:
            return None
        if x.dtype is not values.dtype or x.dtype not in ops.KERNEL_DTYPES or x.size(-1) != self.in_features:
            return None
        if x.numel() > self._dispatch.unasked * self.in_features and not ops.is_traced():
            tokens = x.numel() // self.in_features
            way = self._dispatch.decided(tokens) or self._decide(tokens)
            if tokens > ops.DECODE_TOKENS or way != "bitmap":
                return None
        return ops.Operand(values, masks, tile_offsets, self._parameters["bias"], self.out_features)

    def _tiled(self) -> TiledBitmap:
        buffers = self._buffers
        values, masks, tile_offsets = (buffers[name] for name in ("values", "masks", "tile_offsets"))
        if values is None or masks is None or tile_offsets is None:
            raise RuntimeError("this SparseLinear is not packed")
        return TiledBitmap(values, masks, tile_offsets, (self.out_features, self.in_features))

    def choice(self, tokens: int) -> Choice:
        """Tell how ``tokens`` rows are computed and why, with the expected times; measures nothing."""
        weight = self._tiled()
        return self._dispatch.choice(weight.shape, weight.nnz, weight.values.dtype, tokens, may_measure=False)

    @property
    def prefill(self) -> str:
        """What is allowed beside the bitmap for many tokens: "auto", "packed" or "unpack" (see Dispatch)."""
        return self._dispatch.prefill

    @prefill.setter
    def prefill(self, mode: str) -> None:
        self._dispatch, self._prepared = Dispatch(mode), None

    def _forward_slow(self, x: Tensor) -> Tensor:
        """Pack at first use where there are kernels; where there are none, say so once and multiply densely."""
        if self._device_weight is not None:
            if x.size(-1) != self.in_features:
                raise ValueError(f"x has {x.size(-1)} features, the layer takes {self.in_features}")
            shape = (self.out_features, self.in_features)
            return self._device_weight.linear(
                x, self._buffers, self._parameters["bias"], shape, self._dispatch
            )
        if not self.is_packed and self.pack().is_packed:
            return self.forward(x)
        if not backend.available():
            backend.warn_slow_path()
        else:
            backend.warn_once(
                f"slow-{self.dtype}-{x.device.type}",
                f"no sparse kernel for {self.dtype} on {x.device.type} (float32 and bfloat16 on cpu have one): "
                "weights are unpacked and multiplied densely at each call",
            )
        return functional.linear(x, self.bitmap().to_dense(), self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], unpacked anew at each access.

        For the few models that look at a layer's weight in their forward pass (T5 asks for its dtype).
        """
        return self.bitmap().to_dense()

    @property
    def nnz(self) -> int:
        """Number of stored weights."""
        if self.tile_offsets is not None:
            return int(self.tile_offsets[-1])
        if self._device_weight is not None:
            return self._device_weight.nnz
        return 0 if self.compressed is None else self.compressed.numel()

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are not stored."""
        return 1.0 - self.nnz / max(1, self.in_features * self.out_features)

    @property
    def second_packing_nbytes(self) -> int:
        """Bytes of the packings beside the bitmap, 0 while there is none."""
        return self._dispatch.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory now, a second packing counted, the bias not."""
        held = sum(b.numel() * b.element_size() for b in self._buffers.values() if b is not None)
        return held + self._dispatch.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self._first_buffer().dtype

    @property
    def kernel(self) -> str:
        """Name the kernel that a forward pass runs now, and why."""
        if self._device_weight is not None:
            return self._device_weight.describe(self.dtype, self.prefill)
        if self._first_buffer().is_meta:
            return "none: no data yet (device meta)"
        if not self.is_packed or self.dtype not in ops.KERNEL_DTYPES:
            cause = backend.missing_reason() or f"no kernel for {self.dtype}"
            return f"unpack + dense torch: {cause}"
        many = self.choice(256)
        return (
            f"linear-bitmap-{str(self.dtype).removeprefix('torch.')}-{backend.isa()}; "
            f"256 tokens: {many.way}, {many.reason}"
        )

    def extra_repr(self) -> str:
        """Describe shape, sparsity and kernel in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.nnz}, sparsity={self.sparsity:.3f}, dtype={str(self.dtype).removeprefix('torch.')}, "
            f"{self._dispatch}"
        ) + (f", {self._seat[0].describe(self._seat[1])}" if self._seat else "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        bitmap = self.bitmap()
        destination[prefix + "compressed"] = bitmap.values
        destination[prefix + "bitmask"] = bitmap.bitmask
        destination[prefix + "row_offsets"] = bitmap.row_offsets
        destination[prefix + "shape"] = torch.tensor(
            [self.out_features, self.in_features], device=bitmap.device
        )
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
        given = {name: state_dict[prefix + name] for name in _CANONICAL if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in _CANONICAL if name not in given)
        own = {prefix + name for name in (*_CANONICAL, "bias")}
        if strict:
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in own)
        if self.bias is not None:
            self._load_bias(state_dict.get(prefix + "bias"), prefix, local_metadata, missing_keys, error_msgs)
        if len(given) == len(_CANONICAL):
            try:
                self._load_canonical(given)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")

    def _load_bias(
        self,
        bias: Tensor | None,
        prefix: str,
        metadata: dict[str, Any],
        missing: list[str],
        errors: list[str],
    ) -> None:
        if bias is None:
            missing.append(prefix + "bias")
        elif bias.shape != (self.out_features,):
            errors.append(f"{prefix}bias has shape {tuple(bias.shape)}, expected ({self.out_features},)")
        elif metadata.get("assign_to_params_buffers", False) or self.bias is None or self.bias.is_meta:
            self.bias = nn.Parameter(bias, requires_grad=False)
        else:
            with torch.no_grad():
                self.bias.copy_(bias)

    def _load_canonical(self, given: dict[str, Tensor]) -> None:
        stated = given["shape"].flatten().tolist()
        if stated != [self.out_features, self.in_features]:
            raise ValueError(f"shape says {stated}, the layer is {[self.out_features, self.in_features]}")
        device = self.bias.device if self.bias is not None else given["compressed"].device
        arrays = (given[name].to(device).clone() for name in ("compressed", "bitmask", "row_offsets"))
        compressed, bitmask, row_offsets = arrays
        bitmap = BitmapTensor(
            compressed.to(self.dtype), bitmask, row_offsets, (self.out_features, self.in_features)
        )
        bitmap.validate()
        self._set_canonical(bitmap)
        self.pack()
