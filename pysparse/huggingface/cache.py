"""A key-value cache with room ahead: a token is written beside the others, which are not copied for it.

transformers' DynamicCache concatenates all keys and values anew for each token. What is asked for here is done to
the layers of such a cache when a model is called with it, so that ``generate()`` needs no argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST_ROOM = 64  # tokens; above, a quarter of what is held
_KEYWORDS = ("cache", "past_key_values")


class _Room:
    """Tensors for keys and values of more tokens than there are, and the views of them that a layer holds."""

    __slots__ = ("capacity", "held", "length", "owner", "tensors", "token_shapes")

    def __init__(self, layer: RoomyLayer, keys: Tensor, values: Tensor) -> None:
        self.owner = id(layer)  # a copy of the layer shares these tensors
        self.length = keys.shape[2]
        self.capacity = self.length + max(_LEAST_ROOM, self.length // 4)
        self.tensors = [_enlarged(one, self.capacity) for one in (keys, values)]
        self.held = keys, values
        self.token_shapes = [torch.Size((*one.shape[:2], 1, one.shape[3])) for one in (keys, values)]

    def takes(self, layer: RoomyLayer) -> bool:
        """Tell whether what ``layer`` holds is what was put here last, and another token may be written beside it."""
        return (
            self.owner == id(layer)
            and layer.keys is self.held[0]
            and layer.values is self.held[1]
            and self.length < self.capacity
            and (not self.tensors[0].is_inference() or torch.is_inference_mode_enabled())
        )

    def append(self, *token: Tensor) -> tuple[Tensor, Tensor]:
        for tensor, new in zip(self.tensors, token, strict=True):
            tensor.narrow(2, self.length, 1).copy_(new)
        self.length += 1
        keys, values = self.tensors
        self.held = keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)
        return self.held


def _enlarged(held: Tensor, capacity: int) -> Tensor:
    batch, heads, length, dim = held.shape
    tensor = torch.empty(batch, heads, capacity, dim, dtype=held.dtype)
    tensor.narrow(2, 0, length).copy_(held)
    return tensor


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values are views of larger tensors, into which single tokens are written.

    What was handed out before never changes: after :meth:`crop`, or with tensors that came from elsewhere, the next
    token makes new room. Several tokens at once, gradients, other devices than the CPU and tracers are the base
    class's.
    """

    _layer_type = None  # or the class would stand in for its base wherever transformers makes one
    _room: _Room | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, N, D] and return all, [B, H, M, D]."""
        if torch.compiler.is_dynamo_compiling() or not self._can_write(key_states, value_states):
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if self._room is None or not self._room.takes(self):
            assert self.keys is not None
            assert self.values is not None
            self._room = _Room(self, self.keys, self.values)
        self.keys, self.values = self._room.append(key_states, value_states)
        return self.keys, self.values

    def _can_write(self, keys: Tensor, values: Tensor) -> bool:
        """Tell whether these are one token's, and like those that are held."""
        held = self.keys, self.values
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (keys, values, *held)):
            return False
        room = self._room
        if room is not None and room.held[0] is self.keys and room.held[1] is self.values:
            shapes = room.token_shapes
        elif held[0] is None or held[1] is None or held[0].dim() != 4 or held[0].numel() == 0:
            return False
        else:
            shapes = [torch.Size((*x.shape[:2], 1, x.shape[3])) for x in held if x is not None]
        return all(
            new.is_cpu and old is not None and old.is_cpu and new.dtype is old.dtype and new.shape == shape
            for new, old, shape in zip((keys, values), held, shapes, strict=True)
        )


def make_room_(model: nn.Module) -> bool:
    """Let calls of ``model`` with a DynamicCache write into room ahead; return False for what takes no cache.

    Full-attention layers alone: sliding windows, quantised, offloaded and static caches stay as they are.
    """
    if not hasattr(model, "generate"):
        return False
    if _use_room not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_use_room, with_kwargs=True)
    return True


def _use_room(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    for name in _KEYWORDS:
        cache = kwargs.get(name)
        if type(cache) is DynamicCache and not cache.offloading:
            for layer in cache.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = RoomyLayer
