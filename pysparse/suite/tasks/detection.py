"""Object detection: mean average precision at an overlap of 0.5 on scenes of digits, images per second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.suite.tasks.classification import TEST_SEED, VISION, require_positive
from pysparse.suite.tasks.protocol import Quality, Speed
from pysparse.suite.tasks.timing import per_second
from pysparse.suite.vision.checkpoints import trained
from pysparse.suite.vision.detector import BACKBONES
from pysparse.suite.vision.detectors import lesson, precision
from pysparse.suite.vision.scenes import scenes


@dataclass(frozen=True, slots=True)
class Detection:
    """Up to four digits, some twenty pixels tall, on a photograph of 64 x 64 pixels; test digits on test halves."""

    scenes: int = 300  # of the test
    calibration_scenes: int = 128
    batch_size: int = 16
    rounds: int = 7  # of timing

    name = "detection"
    scope = VISION
    takes_paths = False

    def __post_init__(self) -> None:
        require_positive(self, "scenes", "calibration_scenes", "batch_size", "rounds")

    def models(self) -> tuple[str, ...]:
        """The backbones of the detector."""
        return tuple(BACKBONES)

    def family(self, model: nn.Module, name: str) -> str:
        """Return "cnn" or "attention", by the backbone."""
        return BACKBONES[name].family

    def load(self, model: str, *, seed: int) -> nn.Module:
        """Return the detector trained with ``seed``: from the cache, or trained now (about a minute)."""
        return trained(lesson(model), seed)

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> list[dict[str, Tensor]]:
        """Return batches of training scenes, as keywords of the detector."""
        images = scenes("train", self.calibration_scenes, TEST_SEED + 1 + seed).images
        return [{"pixel_values": part} for part in images.split(self.batch_size)]

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Mean average precision at 0.5, in [0, 1], over the ten classes."""
        value = precision(model, scenes("test", self.scenes, TEST_SEED))
        return Quality("mAP@0.5", value, higher_is_better=True, others={"images": float(self.scenes)})

    def speed(self, dense: nn.Module, sparse: nn.Module, name: str, *, threads: int) -> list[Speed]:
        """Images per second through the detector, before boxes are sorted out."""
        images = scenes("test", self.batch_size, TEST_SEED).images
        return [
            per_second(
                ("images", "images/s", size), dense, sparse, partial(_call, images=images[:size]),
                rounds=self.rounds, threads=threads, repeats=1 + 16 // size,
            )
            for size in (1, self.batch_size)
        ]  # fmt: skip


@torch.no_grad()
def _call(model: nn.Module, images: Tensor) -> Any:
    return model(images)
