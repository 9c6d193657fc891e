"""Object detection: mean average precision at an overlap of 0.5 on scenes of digits, images per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.suite.tasks.protocol import Quality
from pysparse.suite.tasks.vision import CALIBRATION_SEED, TEST_SEED, OfPictures
from pysparse.suite.vision import detectors
from pysparse.suite.vision.checkpoints import Lesson
from pysparse.suite.vision.detector import BACKBONES
from pysparse.suite.vision.scenes import Scenes, scenes


@dataclass(frozen=True, slots=True)
class Detection(OfPictures):
    """Up to four digits, some twenty pixels tall, on a photograph of 64 x 64 pixels; test digits on test halves."""

    scenes: int = 300  # of the test
    calibration_scenes: int = 128
    batch_size: int = 16
    rounds: int = 7

    name = "detection"
    table = BACKBONES

    def lesson(self, name: str) -> Lesson:
        """Return how the detector with that backbone is trained."""
        return detectors.lesson(name)

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of training scenes, as keywords of the detector."""
        images = scenes("train", self.calibration_scenes, CALIBRATION_SEED + seed).images
        return [{"pixel_values": part} for part in images.split(self.batch_size)]

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Mean average precision at 0.5, in [0, 1], over the ten classes."""
        value = detectors.precision(model, _test(self.scenes))
        return Quality("mAP@0.5", value, higher_is_better=True, others={"images": float(self.scenes)})

    def workload(self, name: str, count: int) -> Callable[[nn.Module], Any]:
        """Read the first test scenes, up to what comes before boxes are sorted out."""
        return partial(_call, images=_test(self.batch_size).images[:count])


@lru_cache(maxsize=2)
def _test(count: int) -> Scenes:
    """Return the test scenes, which every cell of a process reads."""
    return scenes("test", count, TEST_SEED)


@torch.no_grad()
def _call(model: nn.Module, images: Tensor) -> Any:
    return model(images)
