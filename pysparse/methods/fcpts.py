"""FCPTS (Gong et al. 2024, "Fast and Controllable Post-training Sparsity"): layer rates learned by gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.pruning.batchnorm import first_tensor, run_batch
from pysparse.pruning.layout import BlockLayout, PrunableLayer
from pysparse.pruning.projection import project, weighted_mean
from pysparse.pruning.target import check_sparsity
from pysparse.pruning.tuning import ForwardOf

_LOGGER = logging.getLogger("pysparse")
_BINS = 100  # of the histogram that stands for the density of a layer's weights
_HIGHEST = 0.99  # sparsity of a layer after the projection onto the budget


@dataclass(frozen=True, slots=True)
class FCPTS:
    """How the rates are learned: one threshold t_l = sigmoid(theta_l) a layer, all layers together.

    Minimises KL(dense || sparse) of the outputs at ``temperature``, times its square, plus ``strength`` *
    abs(sum n_l s_l / N - S). With ``loss`` "mse" the first term is the mean squared error over the dense outputs'
    mean square instead, for outputs that are no logits of classes (boxes, images). Masks are 1[|w| > t_l]; their
    gradient passes straight through where abs(|w| - t_l) < 1; that of a layer's sparsity is the density of its
    weights at the threshold.

    Differs from the paper: the weights stay as they are (tune them afterwards, :func:`match_outputs_`); |w| is
    divided by its layer's largest, so that one theta means the same in every layer; the density comes from a
    histogram of 100 bins as in the released code, not from a kernel estimate.
    """

    epochs: int = 10
    learning_rate: float = 0.04
    temperature: float = 1.0
    strength: float = 1.0
    theta: float = -8.0  # at the start: sigmoid(-8) = 0.0003, nearly dense
    seed: int = 1024
    loss: Literal["kl", "mse"] = "kl"

    def __post_init__(self) -> None:
        if self.loss not in ("kl", "mse"):
            raise ValueError(f"loss is 'kl' or 'mse', got {self.loss!r}")
        if self.epochs < 1 or self.learning_rate <= 0 or self.temperature <= 0 or self.strength < 0:
            raise ValueError(
                f"epochs={self.epochs} is at least 1, learning_rate={self.learning_rate} and temperature="
                f"{self.temperature} are positive, strength={self.strength} is not negative"
            )


class _Mask(torch.autograd.Function):
    """1[|w| > t] with a straight-through gradient for t, and the share of zeros with that of a histogram."""

    @staticmethod
    def forward(ctx: Any, threshold: Tensor, scaled: Tensor, histogram: Tensor) -> tuple[Tensor, Tensor]:
        keep = scaled > threshold
        ctx.save_for_backward(threshold, scaled, histogram)
        return keep.to(scaled.dtype), 1.0 - keep.float().mean()

    @staticmethod
    def backward(ctx: Any, of_mask: Tensor, of_share: Tensor) -> tuple[Tensor, None, None]:
        threshold, scaled, histogram = ctx.saved_tensors
        near = (scaled - threshold).abs() < 1.0
        return -(of_mask * near).sum() + of_share * density_at(histogram, threshold), None, None


def weight_histogram(scaled: Tensor) -> Tensor:
    """Return the probability density of ``scaled`` |w| in [0, 1] as 100 equal bins, float32 [100]."""
    counts = torch.histc(scaled.float(), _BINS, 0.0, 1.0)
    return counts * _BINS / max(1, scaled.numel())


def density_at(histogram: Tensor, threshold: Tensor) -> Tensor:
    """Return d s / d t, the density of |w| (both signs of w together) at the threshold in [0, 1]."""
    return histogram[(threshold * _BINS).long().clamp(0, _BINS - 1)].reshape(())


@dataclass(slots=True)
class _Gate:
    """A layer with its learned threshold."""

    layer: PrunableLayer
    theta: nn.Parameter
    scaled: Tensor  # |w| over the layer's largest, in the shape of the stored parameter
    histogram: Tensor

    def sparsity(self) -> tuple[Tensor, Tensor]:
        mask, share = _Mask.apply(torch.sigmoid(self.theta), self.scaled, self.histogram)  # type: ignore[no-untyped-call]
        return mask, share


def learn_rates(
    layout: BlockLayout,
    batches: Sequence[Any],
    target: float,
    settings: FCPTS | None = None,
    forward: ForwardOf | None = None,
    on_epoch: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:
    """Return a sparsity for each layer of ``layout``, by path: an allocation profile whose mean is ``target``.

    ``batches`` are inputs of the model (``forward(model, batch)``, by default ``model(batch)`` with keywords for a
    mapping); no labels. The first floating-point tensor of an output counts as logits [..., classes]. The model
    comes back as it was. The learned rates are moved onto the budget together (:func:`project`).

    Raises ValueError for a target outside (0, 1), no batches, or layers that share a parameter (fused experts).
    """
    settings = settings or FCPTS()
    target = check_sparsity(target)
    if not batches or target == 0:
        raise ValueError(
            f"{len(batches)} batches and sparsity {target:g}: there is nothing to learn a rate from"
        )
    gates = _gates(layout, settings.theta)
    sizes = [gate.layer.size for gate in gates]
    call = forward or run_batch
    with _evaluating(layout.model):
        with torch.no_grad():
            wanted = [first_tensor(call(layout.model, batch)).detach() for batch in batches]
        thetas = [gate.theta for gate in gates]
        optimizer = torch.optim.Adam(thetas, lr=settings.learning_rate)
        generator = torch.Generator().manual_seed(settings.seed)
        for epoch in range(settings.epochs):
            for index in torch.randperm(len(batches), generator=generator).tolist():
                loss, overall = _loss(
                    layout.model, gates, sizes, batches[index], wanted[index], target, settings, call
                )
                for theta, gradient in zip(thetas, torch.autograd.grad(loss, thetas), strict=True):
                    theta.grad = gradient  # of the thresholds alone: the model's parameters get none
                optimizer.step()
            if on_epoch is not None:
                on_epoch(epoch + 1, settings.epochs, overall)
    with torch.no_grad():
        learned = [float(gate.sparsity()[1]) for gate in gates]
    reached = weighted_mean(learned, sizes)
    if abs(reached - target) > 0.05:
        _LOGGER.warning("FCPTS reached sparsity %.3f and was moved to %.3f: use more epochs", reached, target)
    rates = project(learned, sizes, target, 0.0, max(_HIGHEST, target))
    return {gate.layer.path: rate for gate, rate in zip(gates, rates, strict=True)}


def _gates(layout: BlockLayout, theta: float) -> list[_Gate]:
    gates = []
    seen: set[int] = set()
    for layer in layout.layers:
        parameter = getattr(layer.module, layer.parameter)
        if id(parameter) in seen or layer.stored.shape != parameter.shape:
            raise ValueError(f"{layer.path} is a part of a parameter: its rate cannot be learned on its own")
        seen.add(id(parameter))
        magnitude = parameter.detach().abs()
        scaled = magnitude / magnitude.max().clamp_min(torch.finfo(magnitude.dtype).tiny)
        start = nn.Parameter(torch.tensor(theta, device=parameter.device))
        gates.append(_Gate(layer, start, scaled, weight_histogram(scaled)))
    return gates


def _loss(
    model: nn.Module,
    gates: Sequence[_Gate],
    sizes: Sequence[int],
    batch: Any,
    wanted: Tensor,
    target: float,
    settings: FCPTS,
    call: ForwardOf,
) -> tuple[Tensor, float]:
    """Return the loss of one batch, and the sparsity of all layers together."""
    masked: dict[str, Tensor] = {}
    shares = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for gate in gates:
        mask, share = gate.sparsity()
        parameter = getattr(gate.layer.module, gate.layer.parameter)
        masked[names[id(parameter)]] = parameter.detach() * mask
        shares.append(share)
    overall = torch.stack([share * size for share, size in zip(shares, sizes, strict=True)]).sum() / sum(
        sizes
    )
    logits = first_tensor(_functional(model, masked, batch, call))
    divergence = _divergence(logits.float(), wanted.float(), settings)
    return divergence + settings.strength * (overall - target).abs(), float(overall.detach())


def _divergence(found: Tensor, wanted: Tensor, settings: FCPTS) -> Tensor:
    """Return how far outputs are from the dense model's, a scalar."""
    if settings.loss == "mse":
        return (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
    return functional.kl_div(
        functional.log_softmax(found / settings.temperature, dim=-1),
        functional.log_softmax(wanted / settings.temperature, dim=-1),
        reduction="none", log_target=True,
    ).sum(dim=-1).mean() * settings.temperature**2  # fmt: skip


def _functional(model: nn.Module, tensors: dict[str, Tensor], batch: Any, call: ForwardOf) -> Any:
    """Run ``call(model, batch)`` with some parameters replaced by tensors that have gradients."""

    class _Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Any:
            return call(self.inner, batch)

    return torch.func.functional_call(
        _Bound(), {f"inner.{name}": value for name, value in tensors.items()}, ()
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
