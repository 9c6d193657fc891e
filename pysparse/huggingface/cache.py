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


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values are views of larger tensors, into which single tokens are written.

    What was handed out before never changes: after :meth:`crop`, or with tensors that came from elsewhere, the next
    token makes new room. Several tokens at once, gradients, other devices than the CPU and tracers are the base
    class's.
    """

    _layer_type = None  # or the class would stand in for its base wherever transformers makes one
    # Whose room it is (a copy of this object shares the tensors), the tokens it holds, and both tensors.
    _room: tuple[int, int, Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, N, D] and return all, [B, H, M, D]."""
        if torch.compiler.is_dynamo_compiling() or not self._can_write(key_states, value_states):
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        length = self.keys.shape[2]  # type: ignore[union-attr]
        rooms = self._rooms(length)
        for room, new in zip(rooms, (key_states, value_states), strict=True):
            room.narrow(2, length, 1).copy_(new)
        self.keys, self.values = (room.narrow(2, 0, length + 1) for room in rooms)
        self._room = (id(self), length + 1, *rooms)
        return self.keys, self.values

    def _can_write(self, *new: Tensor) -> bool:
        if not self.is_initialized or self.get_seq_length() == 0:
            return False
        for held, one in zip((self.keys, self.values), new, strict=True):
            if held is None or one.dim() != 4 or one.shape[2] != 1 or not (one.is_cpu and held.is_cpu):
                return False
            if (
                one.dtype is not held.dtype
                or one.shape[:2] != held.shape[:2]
                or one.shape[3] != held.shape[3]
            ):
                return False
            if torch.is_grad_enabled() and (one.requires_grad or held.requires_grad):
                return False
        return True

    def _rooms(self, length: int) -> tuple[Tensor, Tensor]:
        """Return tensors that begin with what is held and have room for one token more."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        if self._room is not None:
            owner, filled, *rooms = self._room
            own = owner == id(self) and filled == length < rooms[0].shape[2]
            if own and all(map(_begins_with, rooms, (keys, values))):
                return rooms[0], rooms[1]
        return _room_for(keys), _room_for(values)


def _begins_with(room: Tensor, held: Tensor) -> bool:
    """Tell whether ``held`` is the beginning of ``room``, and that may be written to."""
    if room.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return (
        room.data_ptr() == held.data_ptr()
        and room.stride() == held.stride()
        and room.shape[:2] == held.shape[:2]
    )


def _room_for(held: Tensor) -> Tensor:
    batch, heads, length, dim = held.shape
    room = torch.empty(batch, heads, length + max(_LEAST_ROOM, length // 4), dim, dtype=held.dtype)
    room.narrow(2, 0, length).copy_(held)
    return room


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
