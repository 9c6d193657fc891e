"""A block on the compute device while it is worked on, and back where it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pysparse.calib.offload import is_offloaded


@contextmanager
def on_device(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Keep the tensors of ``block`` on ``device`` inside the block; None leaves them alone.

    Parameters stay the same objects. What was written to a parameter meanwhile is copied into the memory it
    came from, so that ties, views and memory maps of it hold.
    """
    if device is None:
        yield
        return
    moved: list[tuple[Tensor, Tensor]] = []
    tensors = {id(one): one for one in (*block.parameters(), *block.buffers())}
    try:
        for tensor in tensors.values():
            if tensor.device != device and not tensor.is_meta:
                moved.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in moved:
            home.copy_(tensor.data)
            tensor.data = home


def check_device(model: nn.Module, device: torch.device | str | None) -> torch.device | None:
    """Return the compute device; ValueError when it is not there, or when accelerate places the model already."""
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device={device!s} cannot be used here: {reason}") from None
    if found.type == "meta":
        raise ValueError(
            "device=meta computes nothing: name the device that blocks are pruned on, e.g. 'cuda'"
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1 or is_offloaded(model):
        raise ValueError(
            f"device={device!s} was given, but the model is spread or offloaded by accelerate, which moves its blocks "
            "itself: leave device out"
        )
    return found
