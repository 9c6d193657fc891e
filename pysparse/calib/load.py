"""One door for calibration data of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysparse.calib.batches import Calibration, own_batches
from pysparse.calib.texts import load_texts
from pysparse.calib.windows import token_batches

DEFAULT_SAMPLES = 128  # windows of text


def load_calibration(
    source: Any,
    tokenizer: Any = None,
    *,
    num_samples: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    default_length: int = 2048,
) -> Calibration:
    """Turn what a caller has into calibration batches.

    ``source``: texts, as :func:`pysparse.calib.load_texts` takes them, need a ``tokenizer`` and are cut into
    ``num_samples`` (default 128) windows of ``max_length`` (default ``default_length``) tokens by
    :func:`token_batches`; rows with a "text" field count as texts. Anything else is a tensor [N, T], or an
    iterable (a list, a DataLoader) of token tensors [T] or [B, T], of mappings with ``input_ids`` and perhaps
    an ``attention_mask``, or of tuples that start with a tensor; float tensors go to the model as they are.
    Of these at most ``num_samples`` sequences are taken, cut to ``max_length`` tokens if that is given, and
    padding is cut away. Raises ValueError for no data, padding only, or texts without a tokenizer.
    """
    for name, value in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    texts, items = _parted(source, batch_size)
    if texts is None:
        return own_batches(items, num_samples, max_length)
    if tokenizer is None:
        raise ValueError(
            "calibration texts need a tokenizer: pass tokenizer=..., save it in the model's folder, or give tokens "
            "instead of texts"
        )
    return token_batches(
        texts, tokenizer, num_samples or DEFAULT_SAMPLES, max_length or default_length, batch_size, seed=seed,
        source=f"'{source}'" if isinstance(source, str | Path) else f"{len(texts)} texts",
    )  # fmt: skip


def _parted(source: Any, batch_size: int) -> tuple[list[str] | None, Iterator[Any]]:
    """Return (texts, -) or (None, items), after a look at the first item."""
    if isinstance(source, str | Path):
        return load_texts(source), iter(())
    if isinstance(source, Tensor) and source.dim() > 1:
        source = torch.split(source, batch_size)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"calibration is a {type(source).__name__}, expected a list of texts, a file, or an iterable of "
            "token tensors or dicts"
        )
    items = iter(source)
    first = next(items, None)
    if first is None:
        raise ValueError("calibration is empty: give at least one text or one batch of tokens")
    items = itertools.chain([first], items)
    if isinstance(first, Mapping) and isinstance(first.get("text"), str):
        items = (row["text"] for row in items)
    elif not isinstance(first, str):
        return None, items
    return load_texts(items), iter(())
