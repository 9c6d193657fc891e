"""One pass over the windows with every model: cross-entropy of each, and each against the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.measure.windows import TokenWindows

_POSITIONS = 256  # logits are widened to fp32 this many positions at a time: 131 MB at 128 k words


@dataclass(slots=True)
class ModelScore:
    """Sums over the scored positions of one model; the comparison fields are against the first model."""

    nats: float = 0.0
    tokens: int = 0
    same_top1: int = 0
    divergence: float = 0.0  # sum of KL(first || this), nats
    max_logit_error: float = 0.0
    protocol: dict[str, object] = field(default_factory=dict)

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy."""
        return self.nats / max(1, self.tokens)

    def add_loss(self, logits: Tensor, targets: Tensor) -> None:
        """Add the cross-entropy of fp32 ``logits`` [P, V] at ``targets`` [P]."""
        self.nats += float(functional.cross_entropy(logits, targets, reduction="sum"))
        self.tokens += len(targets)

    def add_difference(self, logits: Tensor, reference: Tensor) -> None:
        """Add the comparison of fp32 ``logits`` [P, V] with the first model's."""
        self.same_top1 += int((logits.argmax(1) == reference.argmax(1)).sum())
        self.max_logit_error = max(self.max_logit_error, float((logits - reference).abs().max()))
        theirs, ours = reference.log_softmax(1), logits.log_softmax(1)
        self.divergence += float(functional.kl_div(ours, theirs, reduction="sum", log_target=True))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put ``models`` in eval mode without gradients inside the block, and back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():  # not inference_mode: layers may pack themselves in here and be trained later
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def safe_exp(nats: float) -> float:
    """``exp`` that gives infinity instead of OverflowError: a broken model's perplexity."""
    return math.exp(nats) if nats < 700 else (math.inf if not math.isnan(nats) else math.nan)


def score_models(
    models: Mapping[str, nn.Module],
    windows: TokenWindows,
    batch_size: int = 4,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, ModelScore]:
    """Score causal language models, each called as ``model(input_ids=...).logits``, on the same windows.

    The first entry is the reference for the comparison fields. ``on_batch(done, total)`` reports windows.
    """
    if not models:
        raise ValueError("no model to score")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    scores = {name: ModelScore(protocol={**windows.protocol, "batch_size": batch_size}) for name in models}
    with evaluating(*models.values()):
        for start in range(0, len(windows.tokens), batch_size):
            batch = windows.tokens[start : start + batch_size]
            first_scored = windows.first_scored[start : start + batch_size]
            reference: Tensor | None = None
            for name, model in models.items():
                logits = _logits(model, batch)
                _accumulate(
                    scores[name], logits, logits if reference is None else reference, batch, first_scored
                )
                reference = logits if reference is None else reference
            if on_batch is not None:
                on_batch(start + len(batch), len(windows.tokens))
    return scores


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    return next_token_logits(model, model(input_ids=batch, use_cache=False))


def next_token_logits(model: nn.Module, output: object) -> Tensor:
    """Return the logits [B, T, V] in an output of ``model``; ValueError for another kind of model."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ValueError(
            f"{type(model).__name__} gives no next-token logits: perplexity needs a causal language model"
        )
    return logits


def sequence_nats(logits: Tensor, tokens: Tensor) -> float:
    """Return the summed cross-entropy of ``logits`` [B, T, V] at the ``tokens`` [B, T] that follow, in fp32."""
    score = ModelScore()
    _accumulate(score, logits, logits, tokens, (1,) * len(tokens))
    return score.nats


def _accumulate(
    score: ModelScore, logits: Tensor, reference: Tensor, batch: Tensor, first_scored: tuple[int, ...]
) -> None:
    for row, first in enumerate(first_scored):
        for start in range(first, batch.shape[1], _POSITIONS):
            end = min(start + _POSITIONS, batch.shape[1])
            ours = logits[row, start - 1 : end - 1].float()  # position p is predicted from p - 1
            score.add_loss(ours, batch[row, start:end])
            if reference is logits:  # a model against itself: nothing to compute, and most of the time saved
                score.same_top1 += end - start
            else:
                score.add_difference(ours, reference[row, start - 1 : end - 1].float())
