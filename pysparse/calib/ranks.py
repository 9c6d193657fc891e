"""Several processes that calibrate one model together, each with its share of the batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its companions; alone unless torch.distributed says otherwise."""

    index: int = 0
    count: int = 1

    @classmethod
    def present(cls) -> Ranks:
        """Return the ranks of torch.distributed's default group, or a single one."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Tell whether this is the rank that writes files and shows progress."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, in the order of the ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Return ``source``'s ``tensor``; the others pass one of its shape and dtype, which is overwritten.

        With nccl a tensor in host memory travels by way of the GPU.
        """
        if self.count == 1:
            return tensor
        home = tensor.device
        travelling = tensor.to(_device()).contiguous()
        dist.broadcast(travelling, source)
        return travelling.to(home)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)


ALONE = Ranks()


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Yield the ranks; under torchrun the process group is made here, and dissolved at the end, if there is none.

    The backend is nccl where every process of this machine has a GPU of its own, else gloo.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks.present()
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpus = dist.is_nccl_available() and torch.cuda.device_count() >= here
    if on_gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield Ranks.present()
    finally:
        dist.destroy_process_group()


def exchange_order(ranks: Ranks, mine: Sequence[Any]) -> Iterator[tuple[int, int, Any]]:
    """Yield (rank, place, entry) for the entries of all ranks: rank by rank, each in its own order."""
    for rank, entries in enumerate(ranks.gather(list(mine))):
        for place, entry in enumerate(entries):
            yield rank, place, entry
