"""Models, tokenizers and texts from what a caller has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysparse import data, huggingface
from pysparse.calib import Calibration, load_calibration, load_texts
from pysparse.measure.windows import choose_window, max_positions
from pysparse.models.sources import check_source, find_tokenizer, load_tokenizer

_LONGEST = 1 << 30  # tokens, of a tokenizer that names no limit
Texts = Sequence[str] | Iterable[str] | str | Path


def load_model(
    source: nn.Module | str | Path, dtype: torch.dtype | None = None, format: str = "sparse"
) -> nn.Module:
    """Return ``source`` itself if it is a model, else load it from its folder or hub name.

    ``format`` "sparse" keeps packed layers packed, "dense" unpacks them. Raises FileNotFoundError for a folder
    that holds no model, ValueError when a model object does not have the ``dtype`` asked for.
    """
    if not isinstance(source, nn.Module):
        return huggingface.from_pretrained(check_source(source), format=format, dtype=dtype)
    have = getattr(source, "dtype", None)
    if dtype is not None and have != dtype:
        raise ValueError(
            f"the model is {have}, not the dtype={dtype} asked for: convert it with model.to({dtype})"
        )
    return source


def tokenizer_for(source: nn.Module | str | Path, model: nn.Module, tokenizer: Any) -> Any:
    """Return the tokenizer for texts; ValueError when none was given and none is saved beside the model."""
    found = tokenizer_or_none(source, model, tokenizer)
    if found is None:
        raise ValueError("texts need a tokenizer and none is saved beside this model; pass tokenizer=...")
    return found


def tokenizer_or_none(source: nn.Module | str | Path, model: nn.Module, tokenizer: Any) -> Any | None:
    """Return the tokenizer that was given, or is saved beside the model, or None."""
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return tokenizer
    if isinstance(source, nn.Module):
        return find_tokenizer(model)
    try:
        return load_tokenizer(source)
    except FileNotFoundError:
        return None


def texts_of(source: Texts | None) -> list[str]:
    """Return the texts of ``source``; None is the bundled held-out text."""
    return load_texts(data.held_out_texts() if source is None else source)


@dataclass(frozen=True, slots=True)
class Windows:
    """How calibration texts are cut."""

    num_samples: int | None = None  # sequences; None is 128
    max_length: int | None = None  # tokens a sequence; None is 2048, or what model and tokenizer take
    batch_size: int = 8
    seed: int = 0


@contextmanager
def explaining_memory(windows: Windows) -> Iterator[None]:
    """Turn a failed allocation inside the block into a MemoryError that says what can be lowered."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        samples, length = windows.num_samples or "128", windows.max_length or "as long as the model takes"
        raise MemoryError(
            f"out of memory while pruning with num_samples={samples}, max_length={length}, "
            f"batch_size={windows.batch_size}: lower one of them, batch_size first, or pass activations='disk'"
        ) from error


def calibration_for(
    source: Any, model: nn.Module, tokenizer: Any, windows: Windows, *, bundled: bool = False
) -> Calibration:
    """Return calibration batches that fit ``model``.

    ``source`` None is the bundled calibration text; ``bundled`` says that ``source`` is a part of it.
    """
    limits = (choose_window(model, None), int(getattr(tokenizer, "model_max_length", _LONGEST)))
    found = load_calibration(
        data.calibration_texts() if source is None else source, tokenizer,
        num_samples=windows.num_samples, max_length=windows.max_length, batch_size=windows.batch_size,
        seed=windows.seed, default_length=min(limits),
    )  # fmt: skip
    if source is None or bundled:
        found = dataclasses.replace(
            found, source=f"the bundled text ({found.source}), as no calibration was given"
        )
    return found.check_positions(max_positions(model))
