"""How much each block changes the residual stream, and the model without those that change it least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pysparse.calib import Calibration
from pysparse.calib.activations import Activations
from pysparse.calib.calls import Call, hidden_of
from pysparse.calib.replay import Replay
from pysparse.nn.structure import Surgery
from pysparse.pruning.parts import Anatomy
from pysparse.pruning.placement import on_device


class _Cosine:
    """Sums cos(x, block(x)) over tokens, in float32 within a batch."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add one batch; a forward hook with keyword arguments."""
        before = Call.split(args, kwargs)[1]
        assert before is not None  # a decoder's blocks are given hidden states
        cosine = functional.cosine_similarity(before.float(), hidden_of(output).float(), dim=-1)
        self.total += float(cosine.double().sum())
        self.tokens += cosine.numel()


def block_influences(
    anatomy: Anatomy,
    calibration: Calibration,
    activations: Activations,
    device: torch.device | None,
    advance: Callable[[int], None] = lambda index: None,
) -> list[float]:
    """Return BI = 1 - E[cos(x, block(x))] over all tokens for each block; ShortGPT, equation 1.

    Raises ValueError for activations that are not finite. Changes nothing.
    """
    replay = Replay(anatomy.model, anatomy.stack, calibration.batches, activations)
    influences = []
    for index, block in enumerate(anatomy.blocks):
        cosine = _Cosine()
        handle = block.module.register_forward_hook(cosine.hook, with_kwargs=True)
        try:
            with on_device(block.module, device):
                replay.forward(index, advance=True, device=device)
        finally:
            handle.remove()
        if cosine.total != cosine.total:  # NaN
            raise ValueError(f"{block.path}: its inputs or outputs are NaN; nothing was changed")
        influences.append(1.0 - cosine.total / cosine.tokens)
        advance(index)
    return influences


def delete_blocks(anatomy: Anatomy, gone: list[int], surgery: Surgery) -> None:
    """Take blocks out of the model and number the others, and their cache slots, anew.

    The config is the caller's to adapt. Raises ValueError when the blocks lie in several lists.
    """
    lists = {block.path.rpartition(".")[0] for block in anatomy.blocks}
    if len(lists) > 1:
        raise ValueError(f"blocks can be deleted from one list, the model has them in {sorted(lists)}")
    kept = [block for index, block in enumerate(anatomy.blocks) if index not in gone]
    for place, block in enumerate(kept):
        surgery.renumber(block.module, place)
    surgery.replace(lists.pop(), nn.ModuleList(block.module for block in kept))
