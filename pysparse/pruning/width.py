"""Which FFN neurons matter: the norm of their activations, collected in one pass over the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.calib import Calibration
from pysparse.calib.activations import Activations
from pysparse.calib.replay import Replay
from pysparse.pruning.parts import Anatomy
from pysparse.pruning.placement import on_device

_CHUNK = 1 << 22  # activations widened to fp32 at a time


class NeuronNorms:
    """score_j: the mean over sequences of the L2 norm over tokens of what neuron j gives to the writer.

    2SSP, equation for stage 1. Squares are formed in float32 and summed in float64: float16 would overflow at
    256^2, which single massive activations exceed.
    """

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._rows: list[int] = []  # sequences in each batch still to come, the next one last
        self._sequences = 0

    def expect(self, sequences: list[int]) -> None:
        """Say how many sequences each of the next batches holds."""
        self._rows = sequences[::-1]

    @property
    def expected(self) -> int:
        """Number of batches that are still to come."""
        return len(self._rows)

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the inputs z [B, T, d_int] (or [B * T, d_int]) of the writer; a forward pre-hook."""
        rows = self._rows.pop()
        inputs: Tensor = args[0].detach()
        for z in inputs.reshape(rows, -1, inputs.shape[-1]):
            squares = torch.zeros(z.shape[-1], dtype=torch.float64, device=z.device)
            for part in torch.split(z, max(1, _CHUNK // z.shape[-1])):
                squares += part.float().square().sum(dim=0)
            self._sum += squares.sqrt().cpu()
        self._sequences += rows

    def value(self) -> Tensor:
        """Return the scores, float64 [d_int]."""
        return self._sum / self._sequences


def neuron_scores(
    anatomy: Anatomy,
    calibration: Calibration,
    activations: Activations,
    device: torch.device | None,
    advance: Callable[[int], None] = lambda index: None,
) -> list[Tensor]:
    """Return the scores of each block's neurons, float64 [d_int]; nothing is changed.

    One pass over the dense model, block by block; ``advance`` hears of each block that is done. Raises ValueError
    for activations that are not finite, and for a writer that is called otherwise than once a batch.
    """
    replay = Replay(anatomy.model, anatomy.stack, calibration.batches, activations)
    rows = [batch.sequences for batch in calibration.batches]
    scores = []
    for index, block in enumerate(anatomy.blocks):
        norms = NeuronNorms(block.ffn.width)
        norms.expect(rows)
        handle = block.ffn.writer[1].register_forward_pre_hook(norms.hook)
        try:
            with on_device(block.module, device):
                replay.forward(index, advance=True, device=device)
        finally:
            handle.remove()
        if norms.expected:
            raise ValueError(
                f"{block.ffn.writer[0]} is not called once for each batch: its neurons cannot be scored"
            )
        found = norms.value()
        if not bool(torch.isfinite(found).all()):
            bad = int((~torch.isfinite(found)).sum())
            raise ValueError(
                f"{block.path}: the activations of {bad} of {len(found)} neurons are NaN or infinite: the model or its "
                "dtype is broken for this text; nothing was changed"
            )
        scores.append(found)
        advance(index)
    return scores


def strongest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest ``scores``, ascending (int64); among equals the first ones."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
