"""RMSNorm in one call, with the roundings of the eager code that models bring along."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse import backend
from pysparse.ops.linear import _DTYPE_CODES

# The position is the code that the core knows.
NORM_FORMS = ("rounded", "wide", "shifted")
_FORM_CODES = {name: code for code, name in enumerate(NORM_FORMS)}


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str = "rounded") -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (RMSNorm, arXiv 1910.07467).

    ``x`` is [..., C] and ``weight`` [C], both float32 or both bfloat16, on the CPU; the result has ``x``'s shape and
    dtype. All is computed in float32 but the sum of squares, which is summed in float64, and rounded as ``form``
    says: "rounded": to the dtype before the product with the weight and after it (Llama, Qwen, T5); "wide": once,
    at the end (OLMo 2); "shifted": once, and the factor is 1 + ``weight`` (Gemma). A row's result does not depend on
    the rows beside it. Not differentiable. Raises ValueError for other shapes, dtypes, forms and devices, and for
    an ``eps`` that is negative or not finite.
    """
    if form not in _FORM_CODES:
        raise ValueError(f"form is one of {', '.join(NORM_FORMS)}; got '{form}'")
    if x.dim() < 1 or weight.dim() != 1 or x.shape[-1] != weight.shape[0] or weight.numel() == 0:
        raise ValueError(
            f"x is {tuple(x.shape)} and the weight {tuple(weight.shape)}: it has x's last dimension, at least 1"
        )
    if x.dtype is not weight.dtype or x.dtype not in _DTYPE_CODES:
        raise ValueError(
            f"x is {x.dtype} and the weight {weight.dtype}: both must be float32 or both bfloat16"
        )
    if not (x.is_cpu and weight.is_cpu):
        raise ValueError(f"x is on {x.device} and the weight on {weight.device}: the kernels run on the CPU")
    return call_rms_norm(x.contiguous(), weight.contiguous(), eps, form)


def call_rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """Run :func:`rms_norm` on contiguous tensors of one kernel dtype; the caller has checked them."""
    y = torch.empty_like(x)
    cols = weight.numel()
    backend.core().rms_norm(
        _DTYPE_CODES[x.dtype], x.data_ptr(), x.numel() // cols, cols, weight.data_ptr(), eps, _FORM_CODES[form],
        y.data_ptr(),
    )  # fmt: skip
    return y
