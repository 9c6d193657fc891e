"""torch's dense int8: quantize_dynamic, what a user gets in one line today. Its input is fp32.

It is slated to move to torchao, which runs the same FBGEMM and oneDNN products on a CPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rivals.engine import Engine, Storage


def pack(weight: Tensor) -> Any:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what it calls is deprecated too
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


def nbytes(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


INT8 = Storage("torch int8", pack, nbytes)
TORCH_INT8 = Engine("torch int8 dynamic", INT8, lambda linear, x: linear(x), prepare=lambda x: x.float())
