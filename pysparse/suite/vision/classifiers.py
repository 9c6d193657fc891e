"""The classifiers of the suite: pictures of one digit each, trained and tested."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.suite.vision.architectures import ARCHITECTURES
from pysparse.suite.vision.checkpoints import Lesson
from pysparse.suite.vision.pixels import Pictures, pictures
from pysparse.suite.vision.training import Training, fit, shuffled

_BATCH = 24


def lesson(name: str) -> Lesson:
    """Return how the architecture of that name is trained."""
    found = ARCHITECTURES[name]
    settings = {"name": found.name, "settings": dict(found.settings)}
    return Lesson(
        "classification",
        name,
        settings,
        Training(found.epochs, found.learning_rate, _BATCH),
        found.build,
        _teach,
    )


def _teach(model: nn.Module, training: Training, seed: int) -> nn.Module:
    def batches(epoch_seed: int) -> Iterator[Pictures]:
        whole = pictures("train", 1, epoch_seed)  # drawn anew in each epoch
        for rows in shuffled(len(whole.labels), training.batch_size, epoch_seed):
            yield Pictures(whole.images[rows], whole.labels[rows])

    return fit(model, training, batches, _loss, seed)


def _loss(model: nn.Module, batch: Pictures) -> Tensor:
    return functional.cross_entropy(model(pixel_values=batch.images).logits, batch.labels)


@torch.no_grad()
def scores(model: nn.Module, test: Pictures, batch_size: int = 64) -> tuple[float, float]:
    """Return top-1 accuracy in [0, 1] and the cross entropy in nats."""
    logits = torch.cat([model(pixel_values=part).logits.float() for part in test.images.split(batch_size)])
    accuracy = (logits.argmax(dim=1) == test.labels).float().mean()
    return float(accuracy), float(functional.cross_entropy(logits, test.labels))
