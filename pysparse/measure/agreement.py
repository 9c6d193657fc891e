"""How far a model's predictions are from another's: top-1 agreement, KL divergence, largest logit error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pysparse.measure.quality import ModelScore, score_models
from pysparse.measure.windows import choose_window, text_windows


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models on the same tokens; identical models give 1, 0, 0."""

    top1: float  # fraction of positions whose most likely next token is the same
    kl: float  # mean KL(reference || model) in nats
    max_logit_error: float  # largest absolute difference of any logit
    tokens: int
    protocol: dict[str, Any]

    @classmethod
    def from_score(cls, score: ModelScore) -> Agreement:
        """Turn the sums of one model, compared with the first, into figures."""
        count = max(1, score.tokens)
        return cls(
            score.same_top1 / count,
            max(0.0, score.divergence / count),  # rounding may leave -1e-9 between equal models
            score.max_logit_error,
            score.tokens,
            dict(score.protocol),
        )


def agreement(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    window: int | None = None,
    batch_size: int = 4,
    *,
    max_windows: int | None = None,
    seed: int = 0,
) -> Agreement:
    """Compare ``model`` with ``reference`` (usually its dense self) on windows of ``texts``.

    Both are causal language models with one vocabulary. The windows are those of
    :func:`pysparse.measure.perplexity`, with its errors.
    """
    windows = text_windows(tokenizer, texts, choose_window(model, window), max_windows=max_windows, seed=seed)
    scores = score_models({"reference": reference, "model": model}, windows, batch_size)
    return Agreement.from_score(scores["model"])
