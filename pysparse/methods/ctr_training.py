"""Training and scoring of click models by plain torch: Adam, early stop on the validation AUC."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pysparse.calib.clicks import Clicks
from pysparse.measure.ranking import log_loss, roc_auc
from pysparse.nn.ctr import CtrModel

Report = Callable[[str], None]
_SCORE_BATCH = 8192


@dataclass(frozen=True, slots=True)
class CtrTraining:
    """How a click model is trained; the defaults are those of the paper's dense models, but for small data."""

    epochs: int = 15
    batch_size: int = 2048
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    patience: int = 1  # epochs without a better validation AUC before it stops
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive and finite")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be finite and not negative")


@dataclass(frozen=True, slots=True)
class CtrScore:
    """How well a model predicts a data set."""

    auc: float
    log_loss: float


def logits_of(model: nn.Module, clicks: Clicks) -> NDArray[np.float32]:
    """Return the model's logits in eval mode, float32 [samples], on the CPU."""
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    with torch.inference_mode():
        ids = torch.from_numpy(clicks.ids)
        parts = [model(part.to(device)).float().cpu() for part in ids.split(_SCORE_BATCH)]
    model.train(was)
    result: NDArray[np.float32] = torch.cat(parts).numpy()
    return result


def score_ctr(model: nn.Module, clicks: Clicks) -> CtrScore:
    """Return AUC and log loss on ``clicks``. Raises ValueError when they hold only one label."""
    logits = logits_of(model, clicks)
    return CtrScore(roc_auc(logits, clicks.labels), log_loss(logits, clicks.labels))


def train_ctr(
    model: CtrModel, train: Clicks, valid: Clicks, training: CtrTraining, report: Report | None = None
) -> CtrScore:
    """Train all parameters that require a gradient, keep the epoch of the best validation AUC, and return its score.

    The order of the samples is drawn by ``training.seed``; dropout takes torch's generator, seeded for this run.
    """
    device = next(model.parameters()).device
    ids, labels = torch.from_numpy(train.ids).to(device), torch.from_numpy(train.labels).to(device)
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(parameters, training.learning_rate, weight_decay=training.weight_decay)
    order_of = torch.Generator().manual_seed(training.seed)
    best, kept, waited = score_ctr(model, valid), copy.deepcopy(model.state_dict()), 0
    with torch.random.fork_rng([]):
        torch.manual_seed(training.seed)
        for epoch in range(training.epochs):
            model.train()
            for batch in torch.randperm(len(ids), generator=order_of).split(training.batch_size):
                if len(batch) > 1:  # batch normalisation has no variance of one sample
                    _step(model, optimizer, ids[batch], labels[batch])
            score = score_ctr(model, valid)
            if report is not None:
                report(f"epoch {epoch + 1}: AUC {score.auc:.4f}, log loss {score.log_loss:.4f}")
            if score.auc > best.auc:
                best, kept, waited = score, copy.deepcopy(model.state_dict()), 0
            elif (waited := waited + 1) >= training.patience:
                break
    model.load_state_dict(kept)
    model.eval()
    return best


def _step(model: CtrModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
    loss.backward()
    optimizer.step()
