"""RMSNorm modules of whatever class, computed in one call of the core instead of seven of torch's.

Which of the kernels' forms a module computes, if one of them, is found by its values: no names of models or classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pysparse import backend, ops
from pysparse.nn.mixin import Mixin, check_module

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # as modules call what is added to the mean square
_SCALES = (1.0, 1.0, 2.0**-10, 2.0**-20)  # of probes: far above, beside and far below a usual epsilon
_OUTLIER, _LARGE = 64.0, 3.0  # an input and its weight in the first probe: what a module caps, it caps there
_EQUAL = 0.99  # of a probe's bfloat16 values: a third differs where the rounding is another


@dataclass(frozen=True, slots=True)
class NormPlan:
    """How the kernels compute a module's forward."""

    form: str  # of ops.NORM_FORMS
    epsilon: str  # name of the module's attribute, read at each call

    @classmethod
    def of(cls, module: nn.Module) -> NormPlan | None:
        """Return how ``module`` is an RMSNorm, or None where it is none, or one whose forward was replaced."""
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or weight.numel() == 0 or "forward" in module.__dict__:
            return None
        if len(module._parameters) > 1 or module._buffers or module._modules:
            return None
        name = next((n for n in _EPSILONS if isinstance(getattr(module, n, None), float)), None)
        if name is None:
            return None
        for form in ops.NORM_FORMS:
            if all(_agrees(module, form, getattr(module, name), dtype) for dtype in ops.KERNEL_DTYPES):
                return cls(form, name)
        return None


class FusedNorm(Mixin):
    """Mixed into the class of an RMSNorm: its forward in one call of the core where no one can tell but by the time.

    Any other call goes the way it would without: a gradient is wanted, ``torch.compile`` traces, another device or
    dtype, a weight of another dtype than the input.
    """

    _pysparse_norm: NormPlan  # not `_norm`, as Gemma's modules call a method of theirs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base class's result; see :func:`pysparse.ops.rms_norm` for the order of the sum."""
        if len(args) == 1 and not kwargs and not ops.is_traced():
            x, weight = args[0], self._parameters.get("weight")
            if weight is not None and _kernel_applies(x, weight):
                return ops.call_rms_norm(
                    x, weight, getattr(self, self._pysparse_norm.epsilon), self._pysparse_norm.form
                )
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """Add that it is computed in one call."""
        return ", ".join(text for text in (super().extra_repr(), "one call") if text)


def fuse_norms_(model: nn.Module) -> dict[str, str]:
    """Let each RMSNorm of ``model`` be computed in one call of the core, in place; return path -> form.

    That concerns calls without gradients on the CPU in float32 or bfloat16, with any number of tokens; any other goes
    the way it would without. Parameters, names, hooks, classes' names and ``state_dict()`` stay. A module is taken
    for an RMSNorm by its values alone: its forward of probes, with a weight of random numbers, is within one unit
    in the last place of :func:`pysparse.ops.rms_norm`'s, and in bfloat16 all but 1 % have its bits. What is fused
    already is reported again. Without the compiled core nothing is done. TypeError for what is no module.
    """
    check_module(model)
    found: dict[str, str] = {}
    if not backend.available():
        return found
    for path, module in model.named_modules():
        if not isinstance(module, FusedNorm):
            plan = NormPlan.of(module)
            if plan is None:
                continue
            module._pysparse_norm = plan
            FusedNorm.mix(module)
        found[path] = module._pysparse_norm.form
    return found


def unfuse_norms_(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_norms_`, in place, and return ``model``."""
    for module in model.modules():
        if isinstance(module, FusedNorm):
            FusedNorm.unmix(module)
            del module.__dict__["_pysparse_norm"]
    return model


def _kernel_applies(x: Any, weight: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.dtype is weight.dtype
        and x.is_cpu
        and ops.is_kernel_dtype(x.dtype)
        and x.dim() > 0
        and x.size(-1) == weight.numel()
        and x.is_contiguous()
        and weight.is_cpu
        and weight.is_contiguous()
        and backend.available()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


@cache
def _probe(cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return an input [4, cols] whose squares any order of summation adds up exactly, and a weight [cols]."""
    generator = torch.Generator().manual_seed(0)
    eighths = torch.randint(-16, 17, (len(_SCALES), cols), generator=generator) / 8
    weight = torch.randn(cols, generator=generator)
    eighths[0, 0], weight[0] = _OUTLIER, _LARGE
    return (eighths * torch.tensor(_SCALES).unsqueeze(1)).to(dtype), weight.to(dtype)


@torch.no_grad()
def _agrees(module: nn.Module, form: str, eps: float, dtype: torch.dtype) -> bool:
    """Tell whether ``module`` would compute ``form`` with any weight of ``dtype``."""
    x, weight = _probe(int(module._parameters["weight"].numel()), dtype)  # type: ignore[union-attr]
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight.clone(), requires_grad=False)}
    try:
        values = type(module).forward(twin, x.clone())
    except Exception:  # whatever a module does to what is no input of its own: it is then none of the forms
        return False
    if not isinstance(values, Tensor) or values.dtype is not dtype or values.shape != x.shape:
        return False
    expected = ops.rms_norm(x, weight, eps, form)
    step = torch.nextafter(expected.abs(), torch.full_like(expected, torch.inf)) - expected.abs()
    if not ((values - expected).abs() <= step).all():
        return False
    return dtype is torch.float32 or float((values == expected).float().mean()) >= _EQUAL
