"""DenseLinear: a linear layer whose plain weight the compiled dense kernel multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse import backend, ops
from pysparse.nn.dispatch import dense_kernel_tokens


class DenseLinear(nn.Linear):
    """An ``nn.Linear`` whose few-token products run on the compiled dense kernel where that is faster.

    Same parameters, same names in the state_dict. Training, many tokens and dtypes without a kernel go to
    torch's own product.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take what ``nn.Linear`` takes."""
        super().__init__(*arguments, **options)
        self._kernel_tokens: dict[tuple[torch.dtype, int, int], frozenset[int]] = {}

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> DenseLinear:
        """Wrap ``linear``, sharing its Parameters, so that tied weights stay tied."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] for ``x`` [..., in_features]."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if not _dense_kernel_applies(x, weight):
            return functional.linear(x, self.weight, bias)
        # A graph is compiled once for all machines and numbers of tokens: it keeps the compiled kernel.
        if not ops.is_traced() and x.numel() // self.in_features not in self.kernel_tokens():
            return functional.linear(x, self.weight, bias)
        return ops.dense_linear(x, self.weight, bias)

    def kernel_tokens(self) -> frozenset[int]:
        """Return the numbers of tokens that go to the compiled kernel; the others go to torch's product.

        By measured costs, where this machine's are known (see ``pysparse tune``) when it is first asked.
        """
        place = (self.weight.dtype, torch.get_num_threads(), backend.isa_epoch())
        found = self._kernel_tokens.get(place)
        if found is None:
            shape = (self.out_features, self.in_features)
            found = self._kernel_tokens[place] = dense_kernel_tokens(shape, self.weight.dtype)
        return found

    @property
    def kernel(self) -> str:
        """Tell for how many tokens the compiled kernel runs."""
        if not (backend.available() and ops.is_kernel_dtype(self.weight.dtype)):
            return "dense torch"
        counts = self.kernel_tokens()
        if not counts:
            return "dense torch: faster than the compiled dense kernel for any number of tokens"
        some = "up to" if len(counts) == max(counts) else f"for {len(counts)} numbers of tokens up to"
        return f"compiled dense kernel {some} {max(counts)} tokens, dense torch beyond"


def _dense_kernel_applies(x: Tensor, weight: Tensor | None) -> bool:
    return (
        weight is not None
        and x.numel() <= ops.DENSE_TOKENS * weight.shape[1]
        and backend.available()
        and x.device.type == "cpu"
        and x.dtype is weight.dtype
        and ops.is_kernel_dtype(weight.dtype)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
