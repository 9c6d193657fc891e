"""Reconstruction by gradients: surviving weights are tuned until each unit's outputs are the dense model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pysparse.pruning.batchnorm import first_tensor, run_batch
from pysparse.pruning.layout import BlockLayout, PrunableLayer
from pysparse.pruning.recipe import MaskStructure
from pysparse.pruning.units import Unit, units_of

Granularity = Literal["op", "layer", "block"]
ForwardOf = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class OutputMatching:
    """How units are tuned: Adam on the mean over positions of the squared error summed over channels (PTSBench).

    A unit is the weight's own operation ("op"), it with the modules that follow until the next weight ("layer"),
    or a block of the layout ("block"). Its inputs come from the "sparse" model as it is by then, so that errors
    made before are compensated, or from the "dense" one; its targets always from the dense one.
    """

    granularity: Granularity = "block"
    inputs: Literal["sparse", "dense"] = "sparse"
    steps: int = 20000  # at most, a unit; each on one batch
    weight_lr: float = 1e-5
    bias_lr: float = 1e-4
    stop_loss: float = 1e-5
    dynamic_mask: bool = False  # choose the mask anew by |w| at every step, at the layer's own sparsity
    seed: int = 1024

    def __post_init__(self) -> None:
        if self.granularity not in ("op", "layer", "block"):
            raise ValueError(f"granularity is 'op', 'layer' or 'block', got {self.granularity!r}")
        if self.inputs not in ("sparse", "dense"):
            raise ValueError(f"inputs is 'sparse' or 'dense', got {self.inputs!r}")
        if self.steps < 0 or min(self.weight_lr, self.bias_lr, self.stop_loss) < 0:
            raise ValueError(
                f"steps, learning rates and stop_loss are not negative, got {self.steps}, {self.weight_lr}, "
                f"{self.bias_lr}, {self.stop_loss}"
            )


@dataclass(frozen=True, slots=True)
class TunedUnit:
    """What became of one unit."""

    path: str
    layers: tuple[str, ...]  # paths of the weights in it
    before: float  # loss over all batches: per position, summed over channels
    after: float
    steps: int  # that were taken; 0 and ``after`` = ``before`` where tuning did not help and was undone


def match_outputs_(
    layout: BlockLayout,
    dense: nn.Module,
    batches: Sequence[Any],
    settings: OutputMatching,
    structure: MaskStructure | None = None,
    forward: ForwardOf | None = None,
    on_unit: Callable[[int, int], None] | None = None,
) -> list[TunedUnit]:
    """Tune the pruned model of ``layout`` towards ``dense``, unit by unit, in place; weights that are zero stay zero.

    ``dense`` has the same modules under the same paths. ``forward(model, batch)`` runs a batch; by default
    ``model(batch)``, with keywords for a mapping. A mask is where a weight is not zero; with ``dynamic_mask``
    ``structure`` chooses it. A unit whose loss did not fall gets its weights back. Everything else (modes,
    ``requires_grad``, normalisation statistics) stays as it was. Inputs and targets of one unit are held at a time.

    Raises ValueError for no batches, for a dynamic mask without a structure, and for models that do not match.
    """
    if not batches:
        raise ValueError("no calibration batch to match outputs on")
    if settings.dynamic_mask and structure is None:
        raise ValueError("a dynamic mask is chosen by a structure: pass one")
    call = forward or run_batch
    generator = torch.Generator().manual_seed(settings.seed)
    result = []
    with _still(layout.model), _still(dense):
        units = units_of(layout, lambda: call(layout.model, batches[0]), settings.granularity)
        for index, unit in enumerate(units):
            source = layout.model if settings.inputs == "sparse" else dense
            inputs = [_inputs(source, unit, call, batch) for batch in batches]
            targets = [_output(dense, unit, call, batch) for batch in batches]
            result.append(_tune(layout, unit, inputs, targets, settings, structure, generator))
            if on_unit is not None:
                on_unit(index + 1, len(units))
    return result


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block."""
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires in grads.items():
            parameter.requires_grad_(requires)


class _Enough(Exception):
    """Ends a forward pass once what was looked for is at hand."""


@torch.no_grad()
def _inputs(
    model: nn.Module, unit: Unit, call: ForwardOf, batch: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which ``batch`` reaches the unit's first module."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((copy.copy(args), dict(kwargs)))
        raise _Enough

    handle = model.get_submodule(unit.paths[0]).register_forward_pre_hook(hook, with_kwargs=True)
    _until(handle, model, call, batch)
    return found[0]


@torch.no_grad()
def _output(model: nn.Module, unit: Unit, call: ForwardOf, batch: Any) -> Tensor:
    """Return what the unit's last module gives for ``batch``."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.append(first_tensor(output).detach())
        raise _Enough

    _until(model.get_submodule(unit.paths[-1]).register_forward_hook(hook), model, call, batch)
    return found[0]


def _until(handle: Any, model: nn.Module, call: ForwardOf, batch: Any) -> None:
    try:
        call(model, batch)
    except _Enough:
        return
    finally:
        handle.remove()
    raise ValueError("the model did not call a module that it called before: its path depends on the input")


def _tune(
    layout: BlockLayout,
    unit: Unit,
    inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    targets: Sequence[Tensor],
    settings: OutputMatching,
    structure: MaskStructure | None,
    generator: torch.Generator,
) -> TunedUnit:
    modules = [layout.model.get_submodule(path) for path in unit.paths]

    def loss_of(index: int) -> Tensor:
        args, kwargs = inputs[index]
        output: Any = modules[0](*args, **kwargs)
        for module in modules[1:]:
            output = module(output)
        return mean_squared_error(first_tensor(output), targets[index], unit.channels_last)

    def total() -> float:
        with torch.no_grad():
            return float(torch.stack([loss_of(i).double() for i in range(len(inputs))]).mean())

    before = total()
    masks = [_Mask(layer, structure if settings.dynamic_mask else None) for layer in unit.layers]
    weights, biases = _parameters(unit.layers)
    kept = [parameter.detach().clone() for parameter in (*weights, *biases)]
    steps = _descend(loss_of, weights, biases, masks, len(inputs), settings, generator) if before > 0 else 0
    after = total()
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip((*weights, *biases), kept, strict=True):
                parameter.copy_(value)
        steps, after = 0, before
    return TunedUnit(unit.path, tuple(layer.path for layer in unit.layers), before, after, steps)


def mean_squared_error(output: Tensor, target: Tensor, channels_last: bool) -> Tensor:
    """Return the squared error summed over channels, averaged over all else; a scalar in float32.

    Channels are the last dimension, or (``channels_last`` False) the second, as in images [B, C, H, W].
    """
    dim = -1 if channels_last or output.dim() < 3 else 1
    return (output.float() - target.float()).square().sum(dim=dim).mean()


class _Mask:
    """Keeps a layer's zeros where they are, or, given a structure, where its smallest weights are by now."""

    def __init__(self, layer: PrunableLayer, structure: MaskStructure | None) -> None:
        self._layer, self._structure = layer, structure
        self._keep = layer.weight != 0
        self._sparsity = 1.0 - int(self._keep.sum()) / max(1, layer.size)

    @torch.no_grad()
    def apply(self) -> None:
        if self._structure is not None:
            self._keep = self._structure.keep(self._layer.weight.abs().float(), self._sparsity)
        self._layer.write(self._layer.weight * self._keep)


def _parameters(layers: Sequence[PrunableLayer]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    weights = {
        id(p): p for layer in layers if (p := layer.module._parameters.get(layer.parameter)) is not None
    }
    biases = {id(p): p for layer in layers if (p := layer.module._parameters.get("bias")) is not None}
    return list(weights.values()), list(biases.values())


def _descend(
    loss_of: Callable[[int], Tensor],
    weights: list[nn.Parameter],
    biases: list[nn.Parameter],
    masks: Sequence[_Mask],
    batches: int,
    settings: OutputMatching,
    generator: torch.Generator,
) -> int:
    """Take Adam steps on random batches until the loss is small or the steps are done; return how many."""
    groups = [{"params": weights, "lr": settings.weight_lr}, {"params": biases, "lr": settings.bias_lr}]
    parameters = [*weights, *biases]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    try:
        for step in range(settings.steps):
            index = int(torch.randint(batches, (), generator=generator))
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = loss_of(index)
            if float(loss.detach()) < settings.stop_loss:
                return step
            loss.backward()
            optimizer.step()
            for mask in masks:
                mask.apply()
        return settings.steps
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
