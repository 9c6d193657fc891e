"""The mask of a prompt as four integers a row: which keys are its sequence's own, where it stands, how far it sees.

transformers hands what the mask function returns to every layer. Its four-dimensional masks pass through caches
and generation untouched, so ours has four dimensions, [B, 1, N, 4], and int64 tells it from a mask of bools or
floats. A model that goes on with the last rows alone (Gemma 4) slices it like any other mask. It takes 32 bytes a
row where a mask of bools takes one a key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

# Families that choose their attention and compute with its mask as well: one joins keys of its own to it, the other
# takes some of its rows. What a mask goes through cannot be told from outside.
_OWN_MASKS = frozenset({"deepseek_v4", "informer"})
_FIELDS = 4  # first valid key, one past the last, key index of this query row, window (0: none)

MIN_KEYS = _FIELDS  # of a prompt: code that cuts a mask to the keys would cut fields away


def extent_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None,
    local_size: int | None = None, allow_is_causal_skip: bool = True, config: Any = None,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Return the extent of a causal prompt, or an additive mask where that is not all there is to say.

    Decoding steps get the additive mask, or none where every key is seen, and so do packed sequences, prefix and
    chunked patterns and padding in the middle of a sequence; so does whatever a family of models asks for that
    computes with its masks itself. Additive, as attention code of a model's own expects it: a bool would count as 1.
    """
    if config is not None and not _leaves_masks_alone(type(config)):
        kwargs.pop("allow_is_bidirectional_skip", None)
        own: Tensor = eager_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,  # type: ignore[arg-type]
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, device=device,
            dtype=dtype, config=config, **kwargs,
        )  # fmt: skip
        return own
    valid = _valid_keys(attention_mask, kv_length, kv_offset)
    window = _window(mask_function, local_size, config)
    plain = q_length > 1 and kv_length >= MIN_KEYS and allow_is_causal_skip and window is not None
    if plain and (valid is None or torch.compiler.is_compiling() or not _has_holes(valid)):
        return _extent(batch_size, q_length, kv_length, q_offset - kv_offset, valid, window or 0, device)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,  # type: ignore[arg-type]
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, device=device,
        # a missing mask would be read as one that lets every row see every key: true for one row only
        allow_is_causal_skip=allow_is_causal_skip and q_length == 1, config=config, dtype=dtype, **kwargs,
    )  # fmt: skip
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)


def _leaves_masks_alone(config: type) -> bool:
    """Tell whether models of this configuration hand masks on to an attention that can be chosen, and no more.

    Those that cannot choose do not import the table of implementations; and see ``_OWN_MASKS``.
    """
    modelling = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    if modelling is not None and not hasattr(modelling, "ALL_ATTENTION_FUNCTIONS"):
        return False
    return getattr(config, "model_type", "") not in _OWN_MASKS


def is_extent(mask: Tensor) -> bool:
    """Tell whether ``mask`` came from :func:`extent_mask` rather than from somewhere else."""
    return mask.dtype == torch.int64 and mask.dim() == 4 and mask.shape[-1] == _FIELDS


def unpack_extent(extent: Tensor, query_rows: int) -> tuple[Tensor, int, int | None]:
    """Return (key range int64 [B, 2] on the CPU, key index of query row 0, window or None).

    Raises ValueError when padding was found in the middle of a sequence, which a compiled model sees only here, and
    for an extent that is not that of ``query_rows`` rows one after the other.
    """
    ends = extent[:, 0, :: max(1, extent.shape[2] - 1)].cpu()  # the first row of each sequence, and the last
    rows, last = ends[:, 0], int(ends[0, -1, 2])
    if extent.shape[2] != query_rows or last - int(rows[0, 2]) != query_rows - 1:
        raise ValueError(
            f"the mask describes {extent.shape[2]} rows from {int(rows[0, 2])} to {last}, the query has {query_rows}: "
            "rows of a prompt must follow one another; choose attn_implementation 'sdpa' for this model"
        )
    if bool((rows[:, 0] < 0).any()):
        raise ValueError(
            "a sequence has padding between its tokens: compiled models take padding at its ends only; run the "
            "prompt without torch.compile"
        )
    return rows[:, :2].contiguous(), int(rows[0, 2]), int(rows[0, 3]) or None


def _window(mask_function: Callable[..., Any], local_size: int | None, config: Any) -> int | None:
    """Return the window of a causal pattern, 0 for none, and None for a pattern that is something else."""
    if mask_function is causal_mask_function:
        return 0
    chunked = getattr(config, "attention_chunk_size", None) is not None
    if local_size is None or chunked or local_size != getattr(config, "sliding_window", None):
        return None
    return local_size


def _valid_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    if attention_mask is None:
        return None
    missing = max(0, kv_length + kv_offset - attention_mask.shape[-1])  # the unused tail of a static cache
    padded = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
    return padded[:, kv_offset : kv_offset + kv_length]


def _first_and_count(valid: Tensor) -> tuple[Tensor, Tensor]:
    return valid.int().argmax(dim=1), valid.sum(dim=1)


def _holes(valid: Tensor) -> Tensor:
    first, count = _first_and_count(valid)
    column = torch.arange(valid.shape[1], device=valid.device)
    inside = (column >= first.unsqueeze(1)) & (column < (first + count).unsqueeze(1))
    return (valid != inside).any(dim=1)


def _has_holes(valid: Tensor) -> bool:
    return bool(_holes(valid).any())


def _extent(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor, valid: Tensor | None, window: int,
    device: torch.device | str,
) -> Tensor:  # fmt: skip
    extent = torch.zeros(batch_size, q_length, _FIELDS, dtype=torch.int64, device=device)
    extent[..., 1] = kv_length
    if valid is not None:
        first, count = _first_and_count(valid)
        extent[..., 0] = torch.where(_holes(valid), -1, first).unsqueeze(1)
        extent[..., 1] = (first + count).unsqueeze(1)
    extent[..., 2] = torch.arange(q_length, device=device) + q_offset
    extent[..., 3] = window
    return extent.unsqueeze(1)
