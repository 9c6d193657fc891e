"""Perplexity and bits per byte, with the protocol inside the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pysparse.measure.quality import ModelScore, safe_exp, score_models
from pysparse.measure.windows import TokenWindows, choose_window, text_windows


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A perplexity that can be reproduced: the number and everything it depends on."""

    value: float  # exp(nats_per_token)
    bits_per_byte: float  # compares models with different vocabularies
    nats_per_token: float
    tokens: int  # scored
    bytes: int  # of UTF-8 text that the scored tokens stand for, at the texts' average bytes per token
    protocol: dict[str, Any]

    @classmethod
    def from_score(cls, score: ModelScore, windows: TokenWindows, model: nn.Module) -> Perplexity:
        """Turn the sums of one model into figures."""
        nats = score.nats_per_token
        protocol = {
            **score.protocol,
            "model_dtype": str(getattr(model, "dtype", "unknown")).removeprefix("torch."),
            "loss_dtype": "float32",
            "threads": torch.get_num_threads(),
        }
        return cls(
            value=safe_exp(nats),
            bits_per_byte=nats / math.log(2) / windows.bytes_per_token,
            nats_per_token=nats,
            tokens=score.tokens,
            bytes=round(score.tokens * windows.bytes_per_token),
            protocol=protocol,
        )


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    *,
    separator: str = "\n\n",
    max_windows: int | None = None,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Return the perplexity of a causal language model on ``texts``.

    The default is the protocol of the pruning papers: documents joined by a blank line, tokenized once,
    windows of ``window`` tokens (default: the smaller of 2048 and the model's positions) without overlap,
    remainder dropped, mean cross-entropy of all positions but the first of each window. See
    :func:`pysparse.measure.windows.text_windows` for ``stride``, ``separator``, ``max_windows`` and ``seed``.
    Raises ValueError when the window is longer than the model or the text shorter than a window.
    """
    windows = text_windows(
        tokenizer, texts, choose_window(model, window), stride,
        separator=separator, max_windows=max_windows, seed=seed,
    )  # fmt: skip
    score = score_models({"model": model}, windows, batch_size, on_batch)["model"]
    return Perplexity.from_score(score, windows, model)
