"""A linear layer in training: kept weights packed as float32, and an adapter that the mask cuts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pysparse.formats import BitmapTensor
from pysparse.formats.bitmap import VALUE_DTYPES
from pysparse.nn.conversion import converted
from pysparse.ops import LowRankTerm, masked_lowrank_linear, masked_lowrank_weight


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The two factors of a low-rank adapter; its product counts ``scale`` times."""

    up: Tensor  # B [out_features, rank], float32
    down: Tensor  # A [rank, in_features], float32
    scale: float

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.down.shape[0]

    @classmethod
    def fresh(cls, shape: tuple[int, int], rank: int, scale: float) -> Adapter:
        """Return one that does nothing yet: A as Kaiming et al. draw it (torch's random numbers), B zero.

        Raises ValueError for a rank that is not positive.
        """
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        down = torch.empty(rank, shape[1])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return cls(torch.zeros(shape[0], rank), down, scale)

    def resized(self, rank: int) -> Adapter:
        """Return one of another rank: the last components go, or fresh ones that do nothing are added."""
        if rank <= self.rank:
            return Adapter(self.up[:, :rank].clone(), self.down[:rank].clone(), self.scale)
        more = Adapter.fresh((self.up.shape[0], self.down.shape[1]), rank - self.rank, self.scale)
        return Adapter(torch.cat([self.up, more.up], 1), torch.cat([self.down, more.down]), self.scale)


class MaskedLowRank(nn.Module):
    """y = x (M * (W + s B A))^T + b with M fixed: LoSA's layer, or without an adapter a masked weight to train.

    The mask is explicit, one bit a weight: a kept weight that happens to be zero stays kept. What is kept of
    W is stored as float32 [kept], in fewer bytes than the dense weight in bfloat16 from 60 % zeros on. The
    layer computes in the dtype of its input, or of autocast. Only A and B ask for gradients, or the values
    when there is no adapter.
    """

    def __init__(
        self,
        weight: Tensor,
        keep: Tensor,
        adapter: Adapter | None = None,
        *,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Take ``weight`` [out_features, in_features] as it is to be, adapter included, and ``keep``, its mask.

        The base is what remains of ``weight`` without the adapter's masked product, so that adding an adapter,
        or changing its rank, changes no output. Raises ValueError for shapes that do not fit.
        """
        super().__init__()
        if adapter is not None and adapter.up.shape[0] * adapter.down.shape[1] != weight.numel():
            found = (adapter.up.shape[0], adapter.down.shape[1])
            raise ValueError(f"the adapter is for a weight {found}, this one is {tuple(weight.shape)}")
        base = weight.detach().float()
        if adapter is not None:
            base = base - adapter.scale * (adapter.up @ adapter.down)
        packed = BitmapTensor.from_dense(base, keep)
        self.out_features, self.in_features = packed.shape
        self.scale = 1.0 if adapter is None else adapter.scale
        self.dropout = dropout
        self.values = nn.Parameter(packed.values, requires_grad=adapter is None)
        self.lora_A = None if adapter is None else nn.Parameter(adapter.down.clone())
        self.lora_B = None if adapter is None else nn.Parameter(adapter.up.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.register_buffer("bitmask", packed.bitmask)
        self.register_buffer("row_offsets", packed.row_offsets)
        self.bitmask: Tensor
        self.row_offsets: Tensor

    @property
    def adapter(self) -> Adapter | None:
        """The adapter as it is now; views of the parameters."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return Adapter(self.lora_B.detach(), self.lora_A.detach(), self.scale)

    @property
    def keep(self) -> Tensor:
        """The mask, bool [out_features, in_features]."""
        return self._packed().keep_mask()

    @property
    def base_weight(self) -> Tensor:
        """W without the adapter, float32 [out_features, in_features]."""
        return self._packed().to_dense()

    def _packed(self) -> BitmapTensor:
        shape = (self.out_features, self.in_features)
        return BitmapTensor(self.values.detach(), self.bitmask, self.row_offsets, shape)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return M * (W + s B A) in ``dtype``, [out_features, in_features]: zero exactly where the mask is.

        A kept weight that came out as zero, or is rounded to it, becomes the smallest normal number instead,
        so that the zeros of the result are the mask.
        """
        shape = (self.out_features, self.in_features)
        dense = masked_lowrank_weight(shape, self.bitmask, self.row_offsets, self.values, self._term())
        dense = dense.to(dtype)
        lost = self.keep & (dense == 0)
        return dense.masked_fill_(lost, torch.finfo(dtype).tiny)

    def _term(self) -> LowRankTerm | None:
        if self.lora_A is None or self.lora_B is None:
            return None
        return LowRankTerm(self.lora_B, self.lora_A, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., out_features] for ``x`` [..., in_features].

        Raises ValueError for another number of features.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, the layer takes {self.in_features}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        arrays = (self.bitmask, self.row_offsets)
        if self.training and self.dropout and self.lora_A is not None:
            dropped = nn.functional.dropout(x, self.dropout)
            y = masked_lowrank_linear(x, *arrays, self.values)
            y = y + masked_lowrank_linear(dropped, *arrays, None, self._term())
        else:
            y = masked_lowrank_linear(x, *arrays, self.values, self._term())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLowRank:
        """Move or convert the layer; ValueError, before anything changes, for a dtype that it cannot compute in."""
        converted(self, fn, self.values, "merge it first", (*VALUE_DTYPES, torch.float64))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        rank = "no adapter" if self.lora_A is None else f"rank={self.lora_A.shape[0]}, scale={self.scale:g}"
        sparsity = 1 - self.values.numel() / max(1, self.out_features * self.in_features)
        return f"{self.in_features}, {self.out_features}, sparsity={sparsity:.4f}, {rank}"
