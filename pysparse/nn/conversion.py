"""What a move or a conversion (``to``, ``half``, ``cuda``, ...) would make of a layer, asked before it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pysparse.formats.bitmap import VALUE_DTYPES

DENSIFY = "pysparse.densify_(model) first gives layers that hold it"


def converted(
    layer: nn.Module,
    fn: Callable[[Tensor], Tensor],
    like: Tensor,
    instead: str = DENSIFY,
    held: Sequence[torch.dtype] = VALUE_DTYPES,
) -> Tensor:
    """Return what ``fn`` makes of an empty tensor of the dtype and on the device of ``like``, the layer's values.

    Raises ValueError, naming the dtype, where the result's is none of ``held``: packed values have no such form.
    ``instead`` says what to do. torch converts a model child by child, so modules before the layer have changed.
    """
    after = fn(torch.empty(0, dtype=like.dtype, device=like.device))
    if after.dtype not in held:
        raise ValueError(
            f"{type(layer).__name__} holds {_names(held)}, not {_names([after.dtype])}, and is left as it was: "
            f"{instead}. Modules before it may be converted by now; model.to(torch.{_names([like.dtype])}) "
            "takes them back"
        )
    return after


def without_data(layer: nn.Module) -> RuntimeError:
    """Return the error of a call that needs the weight of a layer on the device meta."""
    return RuntimeError(
        f"this {type(layer).__name__} has no data yet (device meta): load a checkpoint first, "
        "as model.load_state_dict(..., assign=True) does"
    )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
