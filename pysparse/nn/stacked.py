"""Sparse layers on a CUDA device that get one and the same input, such as query, key and value: one kernel for all.

A launch costs microseconds, which a small layer's bytes do not. The rows of such layers are packed one after the
other, and one call multiplies them all.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from pysparse.formats.stacked import join, stack_rows, unstackable
from pysparse.nn.device import DeviceWeight
from pysparse.nn.dispatch import Dispatch
from pysparse.ops import cuda
from pysparse.ops.equal_calls import let_inductor_merge
from pysparse.ops.traced import is_traced

if TYPE_CHECKING:
    from pysparse.nn.linear import SparseLinear

Example: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
_Stamp: TypeAlias = tuple[Any, ...]


class _Last(threading.local):
    """A thread's last product: what of, in which state, and who has not fetched his part yet."""

    input: Callable[[], Tensor | None] = staticmethod(lambda: None)
    stamp: _Stamp = ()
    output: Tensor | None = None
    waiting: frozenset[int] = frozenset()


class RowStack:
    """The rows of several sparse layers as one weight; each layer has a *seat*.

    For one token the first layer called computes the outputs of all. Another one takes its own if it comes with the
    very same tensor, unchanged since, on the same stream; else it computes alone, as with more tokens and where a
    gradient is asked for. Under torch.compile every layer computes all rows and takes its own: these are the same
    operation on the same tensors, of which Inductor keeps one (:mod:`pysparse.ops.equal_calls`). Layers that stay
    dense are compiled one by one.

    Packed arrays and biases of the layers are views of the stack's: nothing is in memory twice. The kernel divides
    rows among its warps by their number, so sums may round in another order than the layer's alone.
    """

    stacked = True  # members hold views of the group's arrays, also under torch.compile

    def __init__(self, names: Sequence[str], layers: Sequence[SparseLinear]) -> None:
        """Stack ``layers``, which then hold views; ValueError where :func:`why_apart` has a reason."""
        why = why_apart(layers)
        if why:
            raise ValueError(f"{', '.join(names)} cannot be one weight: {why}")
        self.names, self.cols = tuple(names), layers[0].in_features
        self.heights = tuple(layer.out_features for layer in layers)
        self.rows = sum(self.heights)
        self.starts = tuple(self.rows - sum(self.heights[seat:]) for seat in range(len(layers)))
        self.weight, self.buffers = _stack_arrays(layers)
        self.bias = _stack_biases(layers)
        self._dispatch = Dispatch()
        self._first = self.weight.names[0]
        self._arrays = tuple(layer._buffers[self._first] for layer in layers)
        self._biases = tuple(layer._parameters["bias"] for layer in layers)
        self._addresses = tuple(_address(bias) for bias in self._biases)
        self._last = _Last()
        for seat, layer in enumerate(layers):
            layer._seat = (self, seat)
        let_inductor_merge()

    def __deepcopy__(self, memo: dict[int, Any]) -> RowStack:
        """Stay one: a copy that shares the arrays still has them here, any other leaves at its first call."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as nothing: a layer that is read again has arrays of its own."""
        return _no_stack, ()

    def linear(self, seat: int, layer: SparseLinear, x: Tensor) -> Tensor:
        """Return ``layer(x)``, as part of the product of all rows where that is right."""
        if torch.compiler.is_dynamo_compiling():
            if self.weight.packing == "dense" or not (self._takes(x) and self._holds(seat, layer)):
                return layer.multiply(x)
            return self._part(self._product(x), seat)
        if not self._holds(seat, layer) or self._addresses[seat] != _address(self._biases[seat]):
            layer._seat = None  # its weight or bias is another one by now
            return layer.multiply(x)
        if is_traced() or type(x) is not Tensor or not self._takes(x):
            return layer.multiply(x)
        if x.is_inference() or self._needs_gradient(x):
            return layer.multiply(x)
        stamp, last = self._stamp(x), self._last
        output = last.output
        if output is None or seat not in last.waiting or last.input() is not x or last.stamp != stamp:
            output = last.output = self._product(x)
            last.input, last.stamp, last.waiting = weakref.ref(x), stamp, frozenset(range(len(self.names)))
        last.waiting -= {seat}  # once: the caller may write to its part
        if not last.waiting:
            last.output = None
        return self._part(output, seat)

    def _product(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.buffers, self.bias, (self.rows, self.cols), self._dispatch)

    def _part(self, output: Tensor, seat: int) -> Tensor:
        return output.narrow(-1, self.starts[seat], self.heights[seat])

    def _takes(self, x: Tensor) -> bool:
        return x.numel() == self.cols and x.dtype is self.buffers[self._first].dtype

    def _holds(self, seat: int, layer: SparseLinear) -> bool:
        """Tell whether the layer's weight and bias are the ones that were stacked."""
        array = layer._buffers.get(self._first)
        return array is self._arrays[seat] and layer._parameters["bias"] is self._biases[seat]

    def _needs_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad or any(bias is not None and bias.requires_grad for bias in self._biases)
        )

    def _stamp(self, x: Tensor) -> _Stamp:
        """Return what must not have changed between a product and the fetching of its parts.

        Not the stream either, as nothing would make it wait, nor a capture: its graph would lack the product.
        """
        versions = [0 if bias is None else bias._version for bias in self._biases]
        if not x.is_cuda:
            return (x._version, *versions)
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        return (x._version, stream, torch.cuda.is_current_stream_capturing(), *versions)

    def forget(self) -> None:
        """Let go of the last product: a weight is about to change."""
        self._last = _Last()

    def describe(self, seat: int) -> str:
        """Tell with whom the layer at ``seat`` is computed."""
        return f"one kernel with {', '.join(name for i, name in enumerate(self.names) if i != seat)}"


class _Unstacked:
    """The seat of a layer that was pickled as part of a stack: it leaves."""

    stacked = True

    def linear(self, seat: int, layer: SparseLinear, x: Tensor) -> Tensor:
        layer._seat = None
        return layer.multiply(x)

    def forget(self) -> None:
        pass

    def describe(self, seat: int) -> str:
        return ""


def _no_stack() -> _Unstacked:
    return _Unstacked()


def why_apart(layers: Sequence[SparseLinear]) -> str:
    """Return why ``layers`` cannot be one :class:`RowStack`; "" where they can."""
    weights = [layer._device_weight for layer in layers]
    kinds = {weight.packing if weight else "not packed for a GPU" for weight in weights}
    if len(layers) < 2 or None in weights or len(kinds) > 1:
        return f"they are {' and '.join(sorted(kinds))}" if len(layers) > 1 else "there is no other one"
    if len({(layer.in_features, layer.dtype, layer._first_buffer().device) for layer in layers}) > 1:
        return "they differ in inputs, dtype or device"
    if any(weight and weight.packing != "dense" and weight.pays_to < 1 for weight in weights):
        return "for one token no gain is expected"
    return "" if kinds == {"dense"} else unstackable([_packing(layer) for layer in layers])


def _packing(layer: SparseLinear) -> Any:
    weight = layer._device_weight
    assert weight is not None
    return weight.packed(weight.arrays(layer._buffers), (layer.out_features, layer.in_features))


def _stack_arrays(layers: Sequence[SparseLinear]) -> tuple[DeviceWeight, dict[str, Tensor]]:
    """Return the weight of all rows, and let the layers hold views of its arrays."""
    weights = [layer._device_weight for layer in layers]
    first = weights[0]
    assert first is not None
    if first.packing == "dense":
        whole, views = join([layer._buffers[first.names[0]] for layer in layers])  # type: ignore[misc]
        arrays: tuple[Tensor, ...] = (whole,)
        parts: list[tuple[Tensor, ...]] = [(view,) for view in views]
        sizes: tuple[int, ...] = ()
    else:
        packing, packings = stack_rows([_packing(layer) for layer in layers])
        arrays, parts, sizes = cuda.arrays(packing), [cuda.arrays(p) for p in packings], cuda.sizes(packing)
    for layer, part in zip(layers, parts, strict=True):
        for name, array in zip(first.names, part, strict=True):
            layer._buffers[name] = array
    held = [weight for weight in weights if weight is not None]
    all_rows = DeviceWeight(
        first.packing,
        sum(weight.nnz for weight in held),
        sizes,
        min(weight.max_tokens for weight in held),
        min(weight.pays_to for weight in held),
        first.why,
    )
    return all_rows, dict(zip(all_rows.names, arrays, strict=True))


def _stack_biases(layers: Sequence[SparseLinear]) -> Tensor | None:
    """Return the biases one after the other, and let the layers' parameters be views of that.

    A layer without one gets -0.0, which changes no sum.
    """
    if all(layer.bias is None for layer in layers):
        return None
    like = next(layer.bias for layer in layers if layer.bias is not None)
    whole, views = join(
        [
            like.new_full((layer.out_features,), -0.0) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
    )
    for layer, view in zip(layers, views, strict=True):
        if layer.bias is not None:
            layer.bias.data = view
    return whole


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@torch.no_grad()
def shared_inputs(
    model: nn.Module, layers: Mapping[str, SparseLinear], example: Example
) -> list[tuple[str, ...]]:
    """Run ``model`` once and return which of ``layers`` (by path) got the same tensors, call for call.

    Only layers of one parent are grouped, in the order of their first calls. ``example`` is the input: a tensor, or
    positional or keyword arguments.
    """
    held: list[tuple[Tensor, int]] = []  # kept until the end, so that no other tensor gets one's id
    calls: dict[str, list[int]] = defaultdict(list)

    def note(path: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0] if arguments else None
        if not isinstance(x, Tensor):
            return
        version = -1 if x.is_inference() else x._version
        known = (i for i, (seen, then) in enumerate(held) if seen is x and then == version)
        index = next(known, len(held))
        if index == len(held):
            held.append((x, version))
        calls[path].append(index)

    hooks = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers.items()]
    try:
        _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for path, inputs in calls.items():
        groups[path.rpartition(".")[0], tuple(inputs)].append(path)
    return [tuple(paths) for paths in groups.values() if len(paths) > 1]


def check_example(example: object) -> None:
    """Raise TypeError unless ``example`` is an input: a tensor, a sequence of arguments or a mapping by name."""
    if isinstance(example, str) or not isinstance(example, Tensor | Mapping | Sequence):
        raise TypeError(
            f"example is a tensor, a sequence of arguments or a mapping of them by name, got a {type(example).__name__}"
        )


def _call(model: nn.Module, example: Example) -> None:
    if isinstance(example, Tensor):
        model(example)
    elif isinstance(example, Mapping):
        model(**example)
    else:
        model(*example)
