"""How the small models are trained: one plain loop, the same for every task, deterministic in its seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.measure.rounds import torch_threads

# One epoch of batches for a model: called with a seed that is another one in each epoch.
Batches = Callable[[int], Iterator[Any]]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Training:
    """AdamW with a one-cycle rate and clipped gradients, on one thread, so that a seed gives the same weights."""

    epochs: int
    learning_rate: float
    batch_size: int = 64
    weight_decay: float = 0.02
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"epochs={self.epochs} and batch_size={self.batch_size} are at least 1, "
                f"learning_rate={self.learning_rate} is positive"
            )


def fit(model: nn.Module, training: Training, batches: Batches, loss_of: Loss, seed: int) -> nn.Module:
    """Train ``model`` in place and return it in eval mode; FloatingPointError when the loss is no number."""
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout and the like, where a model has it
        steps = sum(1 for _ in batches(seed))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, training.learning_rate, total_steps=steps * training.epochs, pct_start=0.15
        )
        model.train()
        for epoch in range(training.epochs):
            for batch in batches(seed * 1_000_003 + epoch):
                loss = loss_of(model, batch)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the loss became {float(loss.detach())} in epoch {epoch}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), training.clip)
                optimizer.step()
                schedule.step()
    return model.eval()


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of ``count`` examples in random batches; the last, smaller one is left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    yield from order[: count // batch_size * batch_size].split(batch_size)
