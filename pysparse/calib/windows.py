"""Texts to token windows of one length, drawn at random and packed."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from pysparse.calib.batches import Batch, Calibration

_LOGGER = logging.getLogger("pysparse")


def token_batches(
    texts: Sequence[str],
    tokenizer: Any,
    num_samples: int | None,
    max_length: int,
    batch_size: int = 8,
    *,
    seed: int = 0,
    source: str = "texts",
) -> Calibration:
    """Cut ``num_samples`` windows of ``max_length`` tokens from ``texts``, drawn with ``seed``.

    Documents are taken in random order; a long one gives a window at a random place, short ones are packed
    together with the tokenizer's end-of-text token (or a blank line) between them, and what is left over is
    used again, without overlap, until there are enough. Too little text gives fewer windows, or one shorter
    one, with a warning in the log and in the result; ``num_samples`` None takes every window that there is. A
    tokenizer with ``cls`` and ``sep`` tokens frames each window with them. Raises ValueError when the texts have
    no tokens at all.
    """
    frame = _frame(tokenizer)
    length = max_length - len(frame)
    if length < 1:
        raise ValueError(f"max_length={max_length} leaves no room beside the {len(frame)} special tokens")
    order = random.Random(seed)
    shuffled = order.sample(list(texts), len(texts))
    documents = (_encode(tokenizer, text) for text in shuffled)
    drawn = list(itertools.islice(_windows(documents, length, _separator(tokenizer), order), num_samples))
    if not drawn:
        raise ValueError("calibration is empty: the tokenizer turns these texts into no tokens at all")
    if frame:
        drawn = [[frame[0], *window, frame[1]] for window in drawn]
    warnings = _shortage(len(drawn), num_samples, len(drawn[0]), max_length)
    rows = torch.tensor(drawn, dtype=torch.int64)
    batches = tuple(Batch((), {"input_ids": part}) for part in torch.split(rows, batch_size))
    return Calibration(batches, source, seed, warnings)


def _shortage(windows: int, asked: int | None, length: int, max_length: int) -> tuple[str, ...]:
    if asked in (None, windows) and length == max_length:
        return ()
    text = (
        f"the calibration text is short: {windows} of {asked or windows} sequences"
        + (f", and of {length} instead of {max_length} tokens" if length < max_length else "")
        + "; give more text, or ask for fewer or shorter sequences"
    )
    _LOGGER.warning(text)
    return (text,)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _separator(tokenizer: Any) -> list[int]:
    for name in ("eos_token_id", "sep_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return [int(getattr(tokenizer, name))]
    return _encode(tokenizer, "\n\n")


def _frame(tokenizer: Any) -> list[int]:
    ends = [getattr(tokenizer, name, None) for name in ("cls_token_id", "sep_token_id")]
    return [] if None in ends else [int(end) for end in ends if end is not None]


def _windows(
    documents: Iterable[list[int]], length: int, separator: list[int], order: random.Random
) -> Iterator[list[int]]:
    """Yield windows of ``length`` tokens until every token is used; one shorter window if there is no more."""
    packed: list[int] = []
    found = False
    while True:
        left_over: list[list[int]] = []
        for ids in documents:
            if len(ids) >= length:
                start = order.randint(0, len(ids) - length)
                left_over += [part for part in (ids[:start], ids[start + length :]) if part]
                yield ids[start : start + length]
                found = True
                continue
            packed += (separator if packed and ids else []) + ids
            if len(packed) >= length:
                yield packed[:length]
                packed, found = packed[length:], True
        if not left_over:
            break
        documents = left_over
    if packed and not found:
        yield packed
