"""Image classification: top-1 accuracy of small classifiers on digits over photographs, images per second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.suite.tasks.protocol import Quality, Scope, Speed
from pysparse.suite.tasks.timing import per_second
from pysparse.suite.vision.architectures import ARCHITECTURES
from pysparse.suite.vision.checkpoints import trained
from pysparse.suite.vision.classifiers import lesson, scores
from pysparse.suite.vision.pixels import pictures

VISION = Scope(targets=("Linear", "Conv2d"), ignore=(), whole=True)  # stem and classifier too, as PTSBench
TEST_SEED = 20240102  # of the test pictures: the same for every cell


@dataclass(frozen=True, slots=True)
class Classification:
    """Every test digit ``copies`` times on pieces of photographs that no training picture shows, 32 x 32 pixels."""

    copies: int = 2  # 597 test digits each
    calibration_images: int = 256  # of the training split, without labels
    batch_size: int = 32  # of calibration and of the faster of two speeds
    rounds: int = 7  # of timing

    name = "classification"
    scope = VISION
    takes_paths = False

    def __post_init__(self) -> None:
        require_positive(self, "copies", "calibration_images", "batch_size", "rounds")

    def models(self) -> tuple[str, ...]:
        """The architectures."""
        return tuple(ARCHITECTURES)

    def family(self, model: nn.Module, name: str) -> str:
        """Return "cnn", "attention", "hybrid" or "pooling"."""
        return ARCHITECTURES[name].family

    def load(self, model: str, *, seed: int) -> nn.Module:
        """Return the model trained with ``seed``: from the cache, or trained now (about half a minute)."""
        return trained(lesson(model), seed)

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of training pictures, as keywords of the model."""
        images = pictures("train", 1, TEST_SEED + 1 + seed).images[: self.calibration_images]
        return [{"pixel_values": part} for part in images.split(self.batch_size)]

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Top-1 accuracy in [0, 1]; its standard error and the cross entropy beside it."""
        test = pictures("test", self.copies, TEST_SEED)
        accuracy, cross_entropy = scores(model, test)
        error = (accuracy * (1 - accuracy) / len(test.labels)) ** 0.5
        others = {
            "cross_entropy": cross_entropy,
            "standard_error": error,
            "images": float(len(test.labels)),
        }
        return Quality("accuracy", accuracy, higher_is_better=True, others=others)

    def speed(self, dense: nn.Module, sparse: nn.Module, name: str, *, threads: int) -> list[Speed]:
        """Images per second one by one and in batches; convolutions run dense in both."""
        images = pictures("test", 1, TEST_SEED).images
        return [
            per_second(
                ("images", "images/s", size), dense, sparse, partial(_call, images=images[:size]),
                rounds=self.rounds, threads=threads, repeats=1 + 16 // size,
            )
            for size in (1, self.batch_size)
        ]  # fmt: skip


@torch.no_grad()
def _call(model: nn.Module, images: Tensor) -> Any:
    return model(pixel_values=images)


def require_positive(task: Any, *names: str) -> None:
    """Raise ValueError when one of a task's options is below 1."""
    for name in names:
        if getattr(task, name) < 1:
            raise ValueError(f"{name}={getattr(task, name)} must be at least 1")
