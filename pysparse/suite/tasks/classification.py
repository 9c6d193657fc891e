"""Image classification: top-1 accuracy of small classifiers on digits over photographs, images per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.suite.tasks.protocol import Quality
from pysparse.suite.tasks.vision import CALIBRATION_SEED, TEST_SEED, OfPictures
from pysparse.suite.vision import classifiers
from pysparse.suite.vision.architectures import ARCHITECTURES
from pysparse.suite.vision.checkpoints import Lesson
from pysparse.suite.vision.pixels import Pictures, pictures


@dataclass(frozen=True, slots=True)
class Classification(OfPictures):
    """Every test digit ``copies`` times on pieces of photographs that no training picture shows, 32 x 32 pixels."""

    copies: int = 2  # 597 test digits each
    calibration_images: int = 256  # of the training split, without labels
    batch_size: int = 32
    rounds: int = 7

    name = "classification"
    table = ARCHITECTURES

    def lesson(self, name: str) -> Lesson:
        """Return how the architecture is trained."""
        return classifiers.lesson(name)

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of training pictures, as keywords of the model."""
        images = pictures("train", 1, CALIBRATION_SEED + seed).images[: self.calibration_images]
        return [{"pixel_values": part} for part in images.split(self.batch_size)]

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Top-1 accuracy in [0, 1]; its standard error and the cross entropy beside it."""
        test = _test(self.copies)
        accuracy, cross_entropy = classifiers.scores(model, test)
        error = (accuracy * (1 - accuracy) / len(test.labels)) ** 0.5
        others = {
            "cross_entropy": cross_entropy,
            "standard_error": error,
            "images": float(len(test.labels)),
        }
        return Quality("accuracy", accuracy, higher_is_better=True, others=others)

    def workload(self, name: str, count: int) -> Callable[[nn.Module], Any]:
        """Classify the first test pictures."""
        return partial(_call, images=_test(1).images[:count])


@lru_cache(maxsize=2)
def _test(copies: int) -> Pictures:
    """Return the test pictures, which every cell of a process reads."""
    return pictures("test", copies, TEST_SEED)


@torch.no_grad()
def _call(model: nn.Module, images: Tensor) -> Any:
    return model(pixel_values=images)
