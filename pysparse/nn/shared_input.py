"""Sibling layers that are called with one and the same input, such as query, key and value: one call for all.

Nothing is known of a model but which sparse layers have one parent. They are watched for a few calls; those that
were seen with the same tensor, one after the other, are computed together from then on.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pysparse import ops

if TYPE_CHECKING:
    from pysparse.nn.compact import CompactLinear
    from pysparse.nn.linear import SparseLinear

    Shareable: TypeAlias = SparseLinear | CompactLinear
Operand: TypeAlias = ops.Operand | ops.Int8Operand

ALONE_CALLS = 2  # with an input of its own, after which a layer is watched no longer
PATIENCE = 16  # results that nobody fetched, after which a group is given up
COPIED_BYTES = 1 << 18  # of an inference tensor, which is compared by content


class Result(NamedTuple):
    """A sibling's output, and what it was computed from beside the input."""

    output: Tensor
    operand: Operand
    versions: tuple[tuple[int, int], ...]  # of the operand's content, with its addresses


class Pending(NamedTuple):
    """Results of one call that wait for their layers; the input is not kept alive."""

    input: weakref.ref[Tensor]
    state: int | bytes  # of the input then, see _state
    changes: int  # of the group's weights that it was told of before
    results: dict[int, Result]  # by seat


class Seen(NamedTuple):
    """The layers seen so far with one input, while a group is watched."""

    input: weakref.ref[Tensor]
    version: int
    seats: list[int]


class Calls(threading.local):
    """Where each thread stands: two threads may run one model."""

    pending: Pending | None = None
    seen: Seen | None = None


class InputGroup:
    """Sparse layers of one parent, each with a *seat*; those that share their input are computed in one call.

    The first one called computes the outputs of all. A sibling takes its own if it comes with the very same
    tensor, unchanged since (by torch's version counter, or by content where it has none), and its weight and bias are
    the same still; else it computes alone. So results never differ from separate calls, by not a bit, whatever a
    model does. Results that are not fetched are dropped with their input, and after ``PATIENCE`` of them the group is
    given up.

    Only calls that every member would run on the decode kernel are shared: no gradient, not under torch.compile,
    no inference tensors (which have no version) of over 256 KiB. A copy of a group (deepcopy, pickle) watches anew.
    """

    stacked = False

    def __init__(self, names: tuple[str, ...]) -> None:
        """Watch as many layers as there are ``names``; seats are positions in it."""
        self.names = names
        self._members: tuple[int, ...] | None = None  # seats computed together; None while they are watched
        self._layers: dict[int, weakref.ref[Shareable]] = {}
        self._moved: dict[int, tuple[InputGroup, int] | None] = {}  # seats that no longer belong here
        self._alone = dict.fromkeys(range(len(names)), 0)
        self._prepared: ops.Prepared | None = None  # all members' weights, for one token
        self._changes = 0
        self._unclaimed = [0]  # shared with what is called when an input dies
        self._calls = Calls()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as a group that has seen nothing: whom it belongs to is found out by calls."""
        return InputGroup, (self.names,)

    def linear(self, seat: int, layer: Shareable, x: Tensor) -> Tensor:
        """Return ``layer(x)``, and compute the siblings' outputs along with it where that is right."""
        if seat in self._moved:
            moved = layer._seat = self._moved[seat]
            return layer.multiply(x) if moved is None else moved[0].linear(moved[1], layer, x)
        if self._members is None:
            self._watch(seat, layer, x)
            return layer.multiply(x)
        pending = self._calls.pending
        if pending is not None and pending.input() is x and pending.changes == self._changes:
            result = pending.results.pop(seat, None)
            if result is not None and _is_current(result, layer) and _state(x) == pending.state:
                return result.output
        return self._compute(seat, layer, x)

    def _compute(self, seat: int, layer: Shareable, x: Tensor) -> Tensor:
        """Compute all members' outputs and keep the siblings'; compute one alone where not all may join."""
        members, state = self._members or (), _state(x)
        layers = [self._layers[member]() for member in members]
        if layers[members.index(seat)] is not layer or state is None:
            return layer.multiply(x)
        prepared = self._prepared
        if prepared is not None and is_ready(prepared, layers, x):
            operands: Sequence[Operand] | None = prepared.operands
            outputs = prepared.group(x)
        else:
            operands = shared_operands(layers, x)
            if operands is None:
                return layer.multiply(x)
            self._prepared = prepare(layers, operands, x)
            outputs = call_group(x, operands)
        results = {
            member: Result(output, operand, _versions(operand))
            for member, output, operand in zip(members, outputs, operands or (), strict=True)
            if member != seat
        }
        self._keep(x, state, results)
        return outputs[members.index(seat)]

    def _keep(self, x: Tensor, state: int | bytes, results: dict[int, Result]) -> None:
        before = self._calls.pending
        if before is not None and before.results:
            _drop(before.results, self._unclaimed)
        if self._unclaimed[0] > PATIENCE:
            self._disband()
        input = weakref.ref(x, partial(_drop_late, results, self._unclaimed))
        self._calls.pending = Pending(input, state, self._changes, results)

    def _watch(self, seat: int, layer: Shareable, x: Tensor) -> None:
        """Note who is called with what; decide when a sequence with one input is over."""
        version = -1 if x.is_inference() else x._version
        with self._lock:
            if self._members is not None:
                return  # another thread was faster
            self._layers[seat] = weakref.ref(layer)
            seen = self._calls.seen
            if seen is not None and seen.input() is x and seen.version == version and seat not in seen.seats:
                seen.seats.append(seat)
                if len(seen.seats) == len(self.names) - len(self._moved):
                    self._settle(seen.seats)
                return
            self._calls.seen = Seen(weakref.ref(x), version, [seat])
            if seen is not None and len(seen.seats) > 1:
                self._settle(seen.seats)
            elif seen is not None:
                self._note_alone(seen.seats[0])

    def _settle(self, seats: list[int]) -> None:
        """Compute ``seats`` together from now on; the others are watched in a group of their own."""
        self._calls.seen = None
        others = [s for s in range(len(self.names)) if s not in seats and s not in self._moved]
        rest = InputGroup(tuple(self.names[s] for s in others)) if len(others) > 1 else None
        self._moved |= {s: (rest, i) if rest else None for i, s in enumerate(others)}
        self._members = tuple(seats)

    def _note_alone(self, seat: int) -> None:
        self._alone[seat] += 1
        if self._alone[seat] >= ALONE_CALLS:
            self._moved[seat] = None
            if len(self.names) - len(self._moved) < 2:
                self._disband()

    def _disband(self) -> None:
        self._moved |= {seat: None for seat in range(len(self.names)) if seat not in self._moved}

    def forget(self) -> None:
        """Let go of the weights' arrays and of what was computed from them: one of them is about to change."""
        self._prepared = None
        self._changes += 1
        for moved in self._moved.values():
            if moved is not None:
                moved[0].forget()

    def describe(self, seat: int) -> str:
        """Tell with whom the layer at ``seat`` is computed."""
        if seat in self._moved:
            moved = self._moved[seat]
            return moved[0].describe(moved[1]) if moved else ""
        siblings = [self.names[s] for s in (self._members or range(len(self.names))) if s != seat]
        state = "watched for calls shared" if self._members is None else "one call"
        return f"{state} with {', '.join(s for s in siblings if s)}"


def kin(layer: Shareable) -> tuple[Any, ...]:
    """Return what layers must have in common to be computed in one call, beside the input itself."""
    return type(layer), layer.in_features, layer.dtype, getattr(layer, "activation_bits", None)


def shared_operands(layers: Sequence[Shareable | None], x: Tensor) -> list[Operand] | None:
    """Return the weights of ``layers`` for one call on ``x``; None where one of them would not decode ``x``.

    That is: a layer that is gone or not packed for the CPU, another dtype or size, more tokens than the decode
    kernel gets, a gradient to be computed.
    """
    if type(x) is not Tensor or not x.is_cpu:
        return None
    operands: list[Operand] = []
    for layer in layers:
        operand = None if layer is None else layer.operand(x)
        if operand is None:
            return None
        operands.append(operand)
    return None if ops.needs_gradient(x, operands) else operands


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _versions(operand: Operand) -> tuple[tuple[int, int], ...]:
    """Return what tells whether a weight has changed: assigning ``tensor.data`` leaves the version as it was."""
    return tuple(
        (_version(tensor), 0 if tensor is None else tensor.data_ptr()) for tensor in operand.content()
    )


def _state(x: Tensor) -> int | bytes | None:
    """Return what tells whether ``x`` has changed: its version, else its content; None where that is too much."""
    if not x.is_inference():
        return x._version
    nbytes = x.nbytes
    if nbytes > COPIED_BYTES or not (x.is_contiguous() and x.is_cpu):
        return None
    return ctypes.string_at(x.data_ptr(), nbytes)


def _is_current(result: Result, layer: Shareable) -> bool:
    """Tell whether no weight that ``result`` was computed from has changed."""
    return (
        layer._buffers["values"] is result.operand.values
        and layer._parameters["bias"] is result.operand.bias
        and _versions(result.operand) == result.versions
    )


def prepare(
    layers: Sequence[Shareable | None], operands: Sequence[Operand], x: Tensor
) -> ops.Prepared | None:
    """Return the operands of ``layers`` prepared for one token, if ``x`` is one that nobody has to decide about."""
    cols = x.size(-1)
    if cols == 0 or x.numel() != cols or not all(layer and layer._dispatch.unasked for layer in layers):
        return None
    if any(one.bias is not None and one.bias.dtype is not x.dtype for one in operands):
        return None
    int8, plain = _by_kind(operands)
    return ops.PreparedInt8(int8, cols, x.dtype) if int8 else ops.Prepared(plain, cols)


def call_group(x: Tensor, operands: Sequence[Operand]) -> list[Tensor]:
    """Multiply ``x`` by all weights in one call of the core; they are of one kind."""
    int8, plain = _by_kind(operands)
    return ops.call_int8_linear_group(x, int8) if int8 else ops.call_bitmap_linear_group(x, plain)


def call_gated(x: Tensor, operands: Sequence[Operand], activation: str) -> Tensor:
    """Multiply ``x`` by a gate and an up weight and join them in one call of the core; they are of one kind."""
    int8, plain = _by_kind(operands)
    if int8:
        return ops.call_int8_gated_linear(x, int8[0], int8[1], activation)
    return ops.call_gated_linear(x, plain[0], plain[1], activation)


def _by_kind(operands: Sequence[Operand]) -> tuple[list[ops.Int8Operand], list[ops.Operand]]:
    int8 = [one for one in operands if isinstance(one, ops.Int8Operand)]
    return int8, [one for one in operands if isinstance(one, ops.Operand)]


def is_ready(prepared: ops.Prepared, layers: Sequence[Shareable | None], x: Tensor) -> bool:
    """Tell whether ``prepared`` holds the present weights of ``layers``, and may take ``x`` without a gradient."""
    if not prepared.takes(x) or torch.is_grad_enabled():
        return False
    for index, layer in enumerate(layers):
        if layer is None or not layer._dispatch.unasked:
            return False
        if not prepared.is_current(index, layer._buffers, layer._parameters["bias"]):
            return False
    return True


def _drop(results: dict[int, Result], unclaimed: list[int]) -> None:
    unclaimed[0] += len(results)
    results.clear()


def _drop_late(results: dict[int, Result], unclaimed: list[int], _: weakref.ref[Tensor]) -> None:
    _drop(results, unclaimed)
