"""Gated MLPs, ``down(activation(gate(x)) * up(x))``: gate, up, activation and product in one call.

What a module computes is read from its traced forward, and which activation it uses from that activation's values:
no names of models, layers or classes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from pysparse import ops
from pysparse.nn.compact import CompactLinear
from pysparse.nn.linear import SparseLinear
from pysparse.nn.mixin import Mixin
from pysparse.nn.shared_input import call_gated, is_ready, kin, prepare, shared_operands

_TRACED_NODES = 7  # input, gate, activation, up, product, down, output


@dataclass(frozen=True, slots=True)
class GatedPlan:
    """Which children of a module play which part, by name, and the activation as the kernels name it."""

    gate: str
    up: str
    down: str
    activation: str  # of ops.ACTIVATIONS
    activation_child: str  # "" where the forward calls a function
    activation_module: nn.Module | None

    @classmethod
    def of(cls, module: nn.Module) -> GatedPlan | None:
        """Return how ``module`` is a gated MLP over two packed layers of one size and dtype, or None if it is not."""
        parts = _parts(module)
        if parts is None:
            return None
        gate, up, down, activation = parts
        layers = [module._modules.get(str(node.target)) for node in (gate, up)]
        first, second = (layer if can_share(layer) else None for layer in layers)
        if first is None or second is None or first is second:
            return None
        if kin(first) != kin(second) or first.out_features != second.out_features:
            return None
        child = module.get_submodule(str(activation.target)) if activation.op == "call_module" else None
        name = _activation_name(_callable(activation, child), first.dtype)
        if name is None or (child is not None and [*child.parameters(), *child.buffers()]):
            return None  # what has a state may become another function
        child_name = str(activation.target) if child is not None else ""
        return cls(str(gate.target), str(up.target), str(down.target), name, child_name, child)

    def product(self, modules: dict[str, nn.Module | None], x: Any) -> Tensor | None:
        """Return what goes into ``down``; None where the module's own forward must be run.

        That is where a gradient is wanted, with more tokens than the decode kernel gets, and wherever someone
        would miss the calls of the parts: they have hooks, were replaced, or have a forward of their own.
        """
        gate, up = modules[self.gate], modules[self.up]
        if not (can_share(gate) and can_share(up) and isinstance(x, Tensor)):
            return None
        if self.activation_child and modules[self.activation_child] is not self.activation_module:
            return None
        if _is_watched(gate) or _is_watched(up) or _is_watched(self.activation_module):
            return None
        if torch._C._get_tracing_state() is not None:
            return None  # its graphs know no lists of optional tensors
        traced = ops.is_traced()
        prepared = None if traced else gate._gated
        if prepared is not None and is_ready(prepared, (gate, up), x):
            return prepared.gated(x, self.activation)
        operands = shared_operands((gate, up), x)
        if operands is None or gate.out_features != up.out_features or kin(gate) != kin(up):
            return None
        if not traced:
            gate._gated = prepare((gate, up), operands, x)
        return call_gated(x, operands, self.activation)

    def __str__(self) -> str:
        return f"one call for {self.activation}({self.gate}) * {self.up}"


def can_share(module: nn.Module | None) -> TypeGuard[SparseLinear | CompactLinear]:
    """Tell whether a layer's products can be part of a call shared with others: a bitmap's, whatever its values."""
    if type(module) is CompactLinear:
        return module.has_bitmap
    return type(module) is SparseLinear


class GatedMLP(Mixin):
    """Mixed into the class of a gated MLP: its forward in two calls instead of five where that is the same."""

    _pysparse_gated: GatedPlan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base class's result: see :func:`pysparse.ops.gated_linear` for how rounding may differ."""
        if len(args) + len(kwargs) == 1:  # the traced forward has one parameter
            (x,) = args or kwargs.values()
            product = self._pysparse_gated.product(self._modules, x)
            if product is not None:
                down: Any = self._modules[self._pysparse_gated.down]
                return down(product)
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """Add what is computed in one call."""
        return ", ".join(text for text in (super().extra_repr(), str(self._pysparse_gated)) if text)

    @staticmethod
    def fuse(module: nn.Module, plan: GatedPlan) -> None:
        """Let ``module`` run by ``plan``."""
        module._pysparse_gated = plan  # type: ignore[assignment]
        GatedMLP.mix(module)

    @staticmethod
    def unfuse(module: nn.Module) -> None:
        """Give ``module`` its own class back."""
        GatedMLP.unmix(module)
        del module.__dict__["_pysparse_gated"]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _parts(module: nn.Module) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """Return the nodes of gate, up, down and activation of ``module``'s traced forward, or None for other forms."""
    try:
        nodes = list(_Tracer().trace(module).nodes)
    except Exception:  # whatever a forward does to a tracer's proxy: it is then no plain chain of calls
        return None
    if len(nodes) != _TRACED_NODES or nodes[0].op != "placeholder":
        return None
    down = nodes[-1].args[0]
    product = _only_input(down, "call_module")
    is_product = isinstance(product, fx.Node) and (product.target in (operator.mul, torch.mul, "mul"))
    if not is_product or product is None or product.kwargs or len(product.args) != 2:
        return None
    for active, up in (product.args, product.args[::-1]):
        gate = _only_input(active, "call_module", "call_function", "call_method")
        if gate is None or _only_input(gate, "call_module") is not nodes[0]:
            continue
        if _only_input(up, "call_module") is nodes[0]:
            assert isinstance(active, fx.Node)
            assert isinstance(up, fx.Node)
            assert isinstance(down, fx.Node)
            return gate, up, down, active
    return None


def _only_input(node: Any, *operations: str) -> fx.Node | None:
    """Return the node that ``node``, one of ``operations``, is computed from, if it is from one alone."""
    if not isinstance(node, fx.Node) or node.op not in operations or len(node.all_input_nodes) != 1:
        return None
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _callable(node: fx.Node, child: nn.Module | None) -> Callable[[Tensor], Any]:
    rest, kwargs = node.args[1:], node.kwargs
    if child is not None:
        return lambda x: child(x, *rest, **kwargs)
    if isinstance(node.target, str):
        name = node.target
        return lambda x: getattr(x, name)(*rest, **kwargs)
    function = node.target
    return lambda x: function(x, *rest, **kwargs)


@cache
def _probe(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the 8192 bfloat16 numbers of size 2^-16 to 2^16 as ``dtype``, and each activation's values for them.

    No more, so that torch takes one thread: a probe a layer shall take no time when a model is loaded.
    """
    positive = torch.arange((127 - 16) << 7, (127 + 16) << 7).to(torch.int16).view(torch.bfloat16)
    x = torch.cat([positive, -positive]).to(dtype)
    return x, {name: known(x) for name, known in ops.ACTIVATIONS.items()}


@torch.no_grad()
def _activation_name(function: Callable[[Tensor], Any], dtype: torch.dtype) -> str | None:
    """Return which of the kernels' activations ``function`` is, by its values; None when it is none of them."""
    x, known = _probe(dtype)
    try:
        values = function(x.clone())
    except Exception:  # a part that takes no vector is none of the activations
        return None
    if not isinstance(values, Tensor) or values.dtype != dtype:
        return None
    return next((name for name, expected in known.items() if torch.equal(values, expected)), None)


def _is_watched(module: nn.Module | None) -> bool:
    """Tell whether someone would notice that ``module`` is not called."""
    return module is not None and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )
