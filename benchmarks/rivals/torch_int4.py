"""torch's dense int4 kernel for CPUs: groups of 128 inputs with a scale and a zero each, bf16 in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from rivals.engine import Engine, Storage

GROUP = 128
Packed = tuple[Tensor, Tensor]


def pack(weight: Tensor) -> Packed:
    groups = weight.float().unflatten(1, (-1, GROUP))
    least, most = groups.aminmax(dim=2, keepdim=True)
    scale = ((most - least) / 15).clamp(min=1e-6)
    levels = ((groups - least) / scale).round().clamp(0, 15).int().flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2)
    scale_and_zero = torch.cat([scale, least + 8 * scale], dim=2).transpose(0, 1).contiguous().bfloat16()
    return packed, scale_and_zero


INT4 = Storage("torch int4", pack, lambda packed: packed[0].nbytes + packed[1].nbytes)
TORCH_INT4 = Engine(
    "torch int4pack g128", INT4,
    lambda packed, x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], GROUP, packed[1]),
    prepare=lambda x: x.bfloat16(),
)  # fmt: skip
