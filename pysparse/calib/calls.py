"""How a model calls its blocks: recorded without computing them, and repeated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.calib.batches import Batch


class _Stop(BaseException):
    """Ends a recorded pass at the last block; a BaseException, so that no model's own handler swallows it."""


@dataclass(frozen=True, slots=True)
class Call:
    """How the model called one block: everything but the hidden states, which are put back at replay."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str | None  # where the hidden states go; None when no argument is a float tensor

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor | None]:
        """Part a call into what stays the same and the hidden states."""
        slot = _hidden_slot(args, kwargs)
        if slot is None:
            return cls(args, dict(kwargs), None), None
        if isinstance(slot, int):
            return cls((*args[:slot], None, *args[slot + 1 :]), dict(kwargs), slot), args[slot]
        return cls(args, {**kwargs, slot: None}, slot), kwargs[slot]

    def to(self, device: torch.device) -> Call:
        """Return the call with its tensors on ``device``."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device), self.slot)

    def replay(self, block: nn.Module, hidden: Tensor | None) -> Any:
        """Call ``block`` as the model did, on ``hidden``."""
        if self.slot is None:
            return block(*self.args, **self.kwargs)
        if isinstance(self.slot, int):
            return block(*self.args[: self.slot], hidden, *self.args[self.slot + 1 :], **self.kwargs)
        return block(*self.args, **{**self.kwargs, self.slot: hidden})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(one, device) for one in value)
    return {name: _moved(one, device) for name, one in value.items()} if type(value) is dict else value


def _hidden_slot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return index
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    floats = (
        name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()
    )
    return next(floats, None)


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output: the tensor itself or the first of a sequence."""
    hidden = output if isinstance(output, Tensor) else output[0]
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"a block returned {type(output).__name__} of {type(hidden).__name__}, expected a tensor"
        )
    return hidden


def _with_hidden(output: Any, hidden: Tensor | None) -> Any:
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


class _Recorder:
    """Stands in for the blocks during one forward pass.

    Only the first block computes, and not even that where it is known to be ``plain``: to return nothing but
    hidden states of the shape of its input. The others note how they are called and hand their input on. That
    costs 1/L of a forward pass and still shows what each block is given: models with local and global attention
    pass different masks and rotations to different blocks, which the first block's call cannot tell.

    ``known`` are hidden states that some blocks are known to return, by the block's index: a stack that
    changes their shape on the way is recorded again behind each such block.
    """

    def __init__(
        self, blocks: Sequence[tuple[str, nn.Module]], known: Mapping[int, Tensor], plain: bool
    ) -> None:
        self._blocks = blocks
        self._known = known
        self.plain = plain
        self.stop = _Stop()
        self.calls: list[Call | None] = [None] * len(blocks)
        self.first_input: Tensor | None = None
        self._output: Any = None  # of the first block: the others return the same structure
        self._handed_on: Tensor | None = None

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        originals = [block.__dict__.get("forward") for _, block in self._blocks]
        try:
            for index, (_, block) in enumerate(self._blocks):
                block.forward = self._stand_in(index, block.forward)
            yield
        finally:
            for (_, block), original in zip(self._blocks, originals, strict=True):
                block.__dict__.pop("forward", None)
                if original is not None:
                    block.forward = original

    def _stand_in(self, index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, hidden = Call.split(args, kwargs)
            self._note(index, call, hidden)
            if index == len(self._blocks) - 1:
                raise self.stop
            if index == 0 and self.plain:
                self._output = hidden
            elif index == 0:
                self._output = original(*args, **kwargs)
                before, hidden = hidden, hidden_of(self._output)
                self.plain = before is not None and self._output is hidden and hidden.shape == before.shape
            self._handed_on = self._known.get(index, hidden)
            return _with_hidden(self._output, self._handed_on)

        return forward

    def _note(self, index: int, call: Call, hidden: Tensor | None) -> None:
        path = self._blocks[index][0]
        if self.calls[index] is not None:
            raise ValueError(
                f"the model calls its block {path} twice in one pass; such loops are not supported"
            )
        self.calls[index] = call
        if index == 0:
            self.first_input = hidden
        elif hidden is None or self._handed_on is None or not _same(hidden, self._handed_on):
            raise ValueError(
                f"the model changes the hidden states in front of {path}, outside of its blocks: blocks cannot "
                "be calibrated one by one; use a method without calibration, such as magnitude"
            )


def _same(left: Tensor, right: Tensor) -> bool:
    return left is right or (left.shape == right.shape and torch.equal(left, right))


@dataclass(frozen=True, slots=True)
class Recording:
    """What one forward pass showed."""

    calls: list[Call]  # of each block
    first_input: Tensor | None  # hidden states in front of the first block
    plain: bool  # the first block returns nothing but hidden states of the shape of its input


def record_calls(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    batch: Batch,
    known: Mapping[int, Tensor] | None = None,
    *,
    plain: bool = False,
) -> Recording:
    """Return how ``model`` calls each of its ``blocks`` (path, module) on ``batch``.

    ``known`` gives hidden states that blocks return, by index; without it all are taken to keep the shape of
    the first one's. ``plain`` says that the first block need not be computed, as an earlier recording found.
    Errors of the model pass through untouched. Raises ValueError when a block is not called exactly once, or
    when the model computes on the hidden states between two blocks.
    """
    recorder = _Recorder(blocks, known or {}, plain)
    with recorder.standing_in():
        try:
            model(*batch.args, **batch.kwargs)
        except _Stop as stop:
            if stop is not recorder.stop:
                raise
    calls = [call for call in recorder.calls if call is not None]
    if len(calls) < len(blocks):
        missing = next(path for (path, _), call in zip(blocks, recorder.calls, strict=True) if call is None)
        raise ValueError(
            f"the model ran without its block {missing}: its blocks cannot be calibrated in order"
        )
    return Recording(calls, recorder.first_input, recorder.plain)


def sharing(calls: list[Call], earlier: list[Call]) -> list[Call]:
    """Return ``calls`` with every tensor that equals the earlier batch's replaced by that one."""
    seen: dict[int, Any] = {}
    return [
        Call(_shared(new.args, old.args, seen), _shared(new.kwargs, old.kwargs, seen), new.slot)
        for new, old in zip(calls, earlier, strict=True)
    ]


def _shared(new: Any, old: Any, seen: dict[int, Any]) -> Any:
    if id(new) in seen:
        return seen[id(new)]
    result = new
    if type(new) is not type(old):
        pass
    elif isinstance(new, Tensor):
        result = old if new.dtype == old.dtype and _same(new, old) else new
    elif type(new) is tuple and len(new) == len(old):
        result = tuple(_shared(a, b, seen) for a, b in zip(new, old, strict=True))
    elif type(new) is dict and new.keys() == old.keys():
        result = {key: _shared(value, old[key], seen) for key, value in new.items()}
    if isinstance(new, Tensor):
        seen[id(new)] = result  # of tensors only: `calls` keeps them alive, so their ids stay theirs
    return result


def finish(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], batch: Batch, hidden: Tensor, like: Any
) -> Any:
    """Return what ``model`` makes of ``batch`` once the last of its ``blocks`` returned ``hidden``.

    No block computes; embeddings, masks, the final norm and the head do. ``like`` is an output of a block, whose
    structure is imitated.
    """
    originals = [block.__dict__.get("forward") for _, block in blocks]
    try:
        for _, block in blocks:
            block.forward = lambda *args, **kwargs: _with_hidden(like, hidden)
        return model(*batch.args, **batch.kwargs)
    finally:
        for (_, block), original in zip(blocks, originals, strict=True):
            block.__dict__.pop("forward", None)
            if original is not None:
                block.forward = original
