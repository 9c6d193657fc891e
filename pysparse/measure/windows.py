"""Text to fixed token windows: the part of a perplexity protocol that numbers silently depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_WINDOW = 2048  # tokens; never the model's maximum, which may be 128 k and ask for 100 GB of logits


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of one token stream, and which of their positions are scored."""

    tokens: Tensor  # int64 [W, window]
    first_scored: tuple[int, ...]  # per window: positions first_scored..window-1 are scored
    bytes_per_token: float  # UTF-8 bytes of the documents over all their tokens
    protocol: dict[str, Any]  # everything that another program needs to get the same number

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(self.tokens.shape[1] - first for first in self.first_scored)


def max_positions(model: nn.Module) -> int | None:
    """Return the longest sequence that ``model``'s config allows, or None when it names no limit."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def choose_window(model: nn.Module, window: int | None) -> int:
    """Return ``window``, or the smaller of 2048 and the model's positions; ValueError if it does not fit."""
    limit = max_positions(model)
    if window is None:
        return min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    if window < 2:
        raise ValueError(f"window={window} scores nothing: a window needs at least 2 tokens")
    if limit is not None and window > limit:
        raise ValueError(
            f"window={window} is longer than the {limit} positions of this model; pass window={limit} or less"
        )
    return window


def text_windows(
    tokenizer: Any,
    texts: Sequence[str],
    window: int,
    stride: int | None = None,
    *,
    separator: str = "\n\n",
    max_windows: int | None = None,
    seed: int = 0,
) -> TokenWindows:
    """Join ``texts`` by ``separator``, tokenize once, cut windows of ``window`` tokens every ``stride``.

    ``stride`` defaults to ``window`` (no overlap, the papers' protocol: positions 1.. of each window are
    scored). With a smaller stride a window scores its last ``stride`` positions, so each token is scored
    once and has at least ``window - stride`` tokens of context. The remainder is dropped. ``max_windows``
    takes a random subset, drawn with ``seed``. Raises ValueError for too little text or a wrong stride.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} is outside [1, window={window}]")
    if max_windows is not None and max_windows < 1:
        raise ValueError(
            f"max_windows={max_windows} leaves nothing to score; pass 1 or more, or None for all"
        )
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("no text to evaluate: texts is empty; pass at least one non-empty string")
    joined = separator.join(texts)
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < window:
        raise ValueError(
            f"the texts give {len(ids)} tokens, fewer than one window of {window}; "
            f"give more text or pass window={max(2, len(ids))} or less"
        )
    windows = ids.unfold(0, window, stride)
    total = len(windows)
    chosen = _subset(total, max_windows, seed)
    later = 1 if stride == window else window - stride  # an overlapped head has been scored already
    text_bytes = sum(len(text.encode()) for text in texts)
    scored = "positions 1.. of each window"
    if stride < window:
        scored = f"last {stride} positions of each window (of the first: all but one)"
    protocol = {
        "window": window,
        "stride": stride,
        "windows": len(chosen),
        "windows_available": total,
        "window_choice": "all" if len(chosen) == total else f"random subset, torch generator, seed {seed}",
        "seed": seed,
        "join": separator,
        "remainder": "dropped",
        "scored": scored,
        "average": "natural-log cross-entropy, mean over scored tokens",
        "bits_per_byte": "nats per token / ln 2 * tokens / UTF-8 bytes of the texts (separators not counted)",
        "tokenizer": type(tokenizer).__name__,
        "special_tokens": "as the tokenizer adds them, once in front of the joined text",
        "documents": len(texts),
        "text_bytes": text_bytes,
        "text_tokens": len(ids),
        "text_sha256": hashlib.sha256(joined.encode()).hexdigest(),
    }  # fmt: skip
    first_scored = tuple(1 if index == 0 else later for index in chosen)
    return TokenWindows(windows[chosen].contiguous(), first_scored, text_bytes / len(ids), protocol)


def _subset(total: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= total:
        return list(range(total))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(total, generator=generator)[:limit].tolist())
