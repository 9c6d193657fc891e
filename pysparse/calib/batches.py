"""Calibration data as batches, and the caller's own tokens turned into them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOGGER = logging.getLogger("pysparse")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One call of the model: ``model(*args, **kwargs)``, without padding."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Any]

    @property
    def sequences(self) -> int:
        """Number of sequences (rows of the first tensor)."""
        return len(self._first)

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences; 0 for inputs that are no token ids."""
        return self._first.numel() if self.is_text else 0

    @property
    def length(self) -> int | None:
        """Tokens in a sequence, None for inputs that are no token ids."""
        return int(self._first.shape[1]) if self.is_text else None

    @property
    def is_text(self) -> bool:
        """Tell whether the first tensor holds token ids [B, T]."""
        return self._first.dim() == 2 and not self._first.is_floating_point()

    @property
    def ids(self) -> Tensor:
        """Token ids [B, T]; of other inputs, the first tensor."""
        return self._first

    @property
    def _first(self) -> Tensor:
        if self.args:
            return self.args[0]
        ids = self.kwargs.get("input_ids")
        tensors = (value for value in self.kwargs.values() if isinstance(value, Tensor))
        return ids if isinstance(ids, Tensor) else next(tensors)

    def rows(self, rows: slice | Tensor, columns: slice = slice(None)) -> Batch:
        """Return some sequences, and of tensors of the token ids' shape [B, T] some columns."""
        shape = self._first.shape

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != shape[0]:
                return value
            return value[rows][:, columns] if self.is_text and value.shape[:2] == shape else value[rows]

        return Batch(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()})

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(tuple(map(move, self.args)), {name: move(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a model is run on to see how strong its inputs are, and where that came from."""

    batches: tuple[Batch, ...]
    source: str
    seed: int | None = None  # of the windows that were drawn; None when nothing was
    warnings: tuple[str, ...] = ()

    @property
    def sequences(self) -> int:
        """Number of sequences in all batches."""
        return sum(batch.sequences for batch in self.batches)

    def describe(self) -> dict[str, Any]:
        """Return where the data came from and how much it is, with a hash of all inputs and their batches."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for name, value in (*enumerate(batch.args), *sorted(batch.kwargs.items())):
                digest.update(
                    f"{name} {getattr(value, 'dtype', value)} {getattr(value, 'shape', '')};".encode()
                )
                if isinstance(value, Tensor):
                    digest.update(value.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        lengths = sorted({batch.length for batch in self.batches if batch.length is not None})
        return {
            "source": self.source, "sequences": self.sequences, "batches": len(self.batches),
            "tokens": sum(batch.tokens for batch in self.batches),
            "tokens_per_sequence": [lengths[0], lengths[-1]] if lengths else None,
            "seed": self.seed, "sha256": digest.hexdigest(),
        }  # fmt: skip

    def check_positions(self, limit: int | None) -> Calibration:
        """Return self; ValueError when a sequence is longer than the ``limit`` positions of the model."""
        for index, batch in enumerate(self.batches):
            if limit is not None and batch.length is not None and batch.length > limit:
                raise ValueError(
                    f"calibration batch {index} has sequences of {batch.length} tokens, longer than the {limit} "
                    f"positions of this model; pass max_length={limit} or less"
                )
        return self


def own_batches(items: Iterable[Any], num_samples: int | None, max_length: int | None) -> Calibration:
    """Take tensors, mappings or tuples as they come: see :func:`pysparse.calib.load_calibration`."""
    batches: list[Batch] = []
    count, limit = 0, num_samples or 1 << 62
    warnings: list[str] = []
    for index, item in enumerate(items):
        batch = _as_batch(item, index)
        batch = batch.rows(slice(limit - count), slice(max_length))
        count += batch.sequences
        batches += _without_padding(batch, index, warnings)
        if count >= limit:
            break
    if num_samples is not None and count < num_samples:
        warnings.append(f"calibration holds {count} sequences, fewer than num_samples={num_samples}")
    for text in warnings:
        _LOGGER.warning(text)
    return Calibration(tuple(batches), "the caller's batches", None, tuple(warnings))


def _as_batch(item: Any, index: int) -> Batch:
    if isinstance(item, Mapping):
        batch = Batch((), _named(item, index))
    else:
        first = item[0] if isinstance(item, tuple | list) and item and not isinstance(item[0], int) else item
        value = _tensor(first, index)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"calibration batch {index} is a {type(item).__name__}, expected a tensor of tokens or a dict "
                "with input_ids"
            )
        batch = Batch((value[None] if value.dim() == 1 else value,), {})
    if batch._first.numel() == 0:
        raise ValueError(f"calibration batch {index} is empty: shape {tuple(batch._first.shape)}")
    return batch


def _named(item: Mapping[Any, Any], index: int) -> dict[str, Any]:
    """Return the arguments of a mapping; a single sequence [T] becomes a batch of one."""
    named = {str(name): _tensor(value, index) for name, value in item.items()}
    if not any(isinstance(value, Tensor) and value.dim() > 0 for value in named.values()):
        raise ValueError(f"calibration batch {index} holds no tensor; its keys are {', '.join(named)}")
    ids = named.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 1:
        return named
    return {n: v[None] if isinstance(v, Tensor) and v.shape == ids.shape else v for n, v in named.items()}


def _tensor(value: Any, index: int) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__ == "numpy":
        return torch.from_numpy(value)
    if not (isinstance(value, list) and value and isinstance(value[0], int | list)):
        return value
    try:
        return torch.tensor(value)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"calibration batch {index} has lists that are no tensor ({error}): give sequences of one length "
            "or pad them, with an attention_mask"
        ) from None


def _without_padding(batch: Batch, index: int, warnings: list[str]) -> list[Batch]:
    """Cut padding off both ends, so that no layer sees it; sequences of one extent stay together.

    Masking the statistics alone would not do: experts and fused layers see rows that no mask maps to.
    """
    mask = batch.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return [batch]
    real = mask != 0
    counts, first = real.sum(dim=1), real.int().argmax(dim=1)
    if not bool(counts.any()):
        raise ValueError(f"calibration batch {index} is padding only: its attention_mask has no 1")
    last = real.shape[1] - real.flip(1).int().argmax(dim=1)
    if bool((counts != last - first)[counts > 0].any()):
        raise ValueError(
            f"calibration batch {index} has an attention_mask with holes: only padding at the ends can be cut; "
            "give each part as a sequence of its own"
        )
    if not bool(counts.all()):
        warnings.append(
            f"calibration batch {index}: {int((counts == 0).sum())} sequences are padding only, left out"
        )
    extents = sorted({(int(a), int(b)) for a, b, n in zip(first, last, counts, strict=True) if n})
    return [
        batch.rows(((first == a) & (last == b) & (counts > 0)).nonzero()[:, 0], slice(a, b))
        for a, b in extents
    ]
