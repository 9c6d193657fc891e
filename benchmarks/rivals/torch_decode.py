"""A whole model on torch's dense layers with the best setting for each phase, switched call by call.

oneDNN multiplies many tokens and torch's own loop a single one (see torch_dense.py): no setting is good at
both, so this engine changes it around each one-token product. No user does; it is the strongest dense baseline
that torch has to offer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.measure.twins import shared_copy
from rivals.torch_dense import without_onednn


class TunedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.in_features or self.weight.dtype != torch.bfloat16:
            return functional.linear(x, self.weight, self.bias)
        with without_onednn():
            return functional.linear(x, self.weight, self.bias)


def tuned_twin(dense: nn.Module) -> nn.Module:
    """``dense`` with every ``nn.Linear`` tuned for one token; weights are shared."""
    twin = shared_copy(dense)
    for path, linear in [(p, m) for p, m in twin.named_modules() if type(m) is nn.Linear]:
        tuned = TunedLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        tuned.weight, tuned.bias = linear.weight, linear.bias
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, tuned)
    return twin
