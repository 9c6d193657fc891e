"""Calibration batches on their way through the blocks of a model, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.calib.activations import Activations, InMemory
from pysparse.calib.batches import Batch
from pysparse.calib.calls import Call, hidden_of, record_calls, sharing
from pysparse.calib.ranks import ALONE, Ranks


class Replay:
    """Batches that wait in front of a block: their hidden states, and how the model calls each block.

    Memory: one hidden state [B, T, C] a batch, in the model's dtype, unless ``activations`` keeps them on
    disk, plus the other arguments of the blocks; what is equal in several batches or blocks (masks,
    rotations) is kept once. Of several ``ranks`` each takes every n-th batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        batches: Sequence[Batch],
        activations: Activations | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._hidden = InMemory() if activations is None else activations
        self._calls: list[list[Call]] = []  # [batch][block]
        self._batches = batches[ranks.index :: ranks.count]
        self._steps = -(-len(batches) // ranks.count)  # of every rank, also where the last has no batch
        self._home = _device_of(model)
        self._plain = False
        for number, batch in enumerate(self._batches):
            found = record_calls(model, blocks, batch.to(self._home), plain=self._plain)
            self._plain = found.plain
            self._calls.append(sharing(found.calls, self._calls[-1]) if self._calls else found.calls)
            self._hidden[number] = found.first_input

    def forward(
        self,
        index: int,
        *,
        advance: bool,
        device: torch.device | None = None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Run block ``index``, which is on ``device``, on every batch; call ``after_batch`` after each.

        With ``advance`` its outputs wait in front of the next block. Every rank calls ``after_batch`` as
        often as the others.
        """
        for number in range(self._steps):
            if number < len(self._calls):
                after = self._run(index, number, device, keep=not advance)
                if advance:
                    self._move_on(index, number, after)
            after_batch()

    def waiting(self) -> Iterator[Tensor]:
        """Yield the hidden states of each of this rank's batches in front of the next block, [B, T, C].

        Raises ValueError when the first block is called without any.
        """
        for number in range(len(self._calls)):
            hidden = self._hidden[number]
            if hidden is None:
                raise ValueError(f"{self._blocks[0][0]} gets no hidden states: there is nothing to compare")
            yield hidden

    def _run(self, index: int, number: int, device: torch.device | None, keep: bool) -> Tensor:
        """Return the hidden states behind the block."""
        block, call, hidden = self._blocks[index][1], self._calls[number][index], self._hidden[number]
        if device is not None:
            call, moved = call.to(device), None if hidden is None else hidden.to(device)
        else:
            moved = hidden
        if keep and hidden is not None and moved is hidden and self._hidden.lasting:
            moved = hidden.clone()  # the block may work in place
        return hidden_of(call.replay(block, moved))

    def _move_on(self, index: int, number: int, after: Tensor) -> None:
        before = self._hidden.shape(number)
        if index + 1 < len(self._blocks) and after.shape != before:
            known = {index: after.to(self._home)}
            batch = self._batches[number].to(self._home)
            found = record_calls(self._model, self._blocks, batch, known, plain=self._plain)
            self._calls[number][index + 1 :] = found.calls[index + 1 :]
        self._hidden[number] = after.to(self._home)


def _device_of(model: nn.Module) -> torch.device:
    """Return where inputs of ``model`` go: the device of its first parameter that has data."""
    devices: list[Any] = [one.device for one in model.parameters()]
    return next((one for one in devices if one.type != "meta"), torch.device("cpu"))
