"""Image generation: Frechet distance of generated digits to real ones, images per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.suite.tasks.protocol import Quality
from pysparse.suite.tasks.vision import CALIBRATION_SEED, TEST_SEED, OfPictures
from pysparse.suite.vision import generators
from pysparse.suite.vision.checkpoints import Lesson
from pysparse.suite.vision.frechet import judge
from pysparse.suite.vision.generator import GENERATORS, LATENT, samples
from pysparse.suite.vision.generators import between, distance, real


@dataclass(frozen=True, slots=True)
class Generation(OfPictures):
    """Digits of 8 x 8 pixels out of noise; their distance is measured in the features of a classifier trained here.

    The distance is not the usual FID, which needs Inception's weights: see :mod:`pysparse.suite.vision.frechet`.
    """

    samples: int = 600  # generated, from the same noise in every cell
    steps: int = 16  # of a flow
    calibration_images: int = 256
    batch_size: int = 32
    rounds: int = 7

    name = "generation"
    table = GENERATORS
    calls = 4  # a flow takes its steps in each

    def lesson(self, name: str) -> Lesson:
        """Return how the generator is trained."""
        return generators.lesson(name)

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> list[dict[str, Tensor]]:
        """Return what a generator reads: points between noise and training digits with times, or latent numbers."""
        generator = torch.Generator().manual_seed(CALIBRATION_SEED + seed)
        if GENERATORS[name].kind == "decoder":
            latent = torch.randn(self.calibration_images, LATENT, generator=generator)
            return [{"sample": part} for part in latent.split(self.batch_size)]
        images = real()
        rows = torch.randint(len(images), (self.calibration_images,), generator=generator)
        points, times, _ = between(images[rows], generator)
        parts = zip(points.split(self.batch_size), times.split(self.batch_size), strict=True)
        return [{"sample": sample, "timestep": time} for sample, time in parts]

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """The distance to the test digits; beside it that of the training digits, which a perfect generator has."""
        made = samples(model, GENERATORS[name].kind, self.samples, TEST_SEED, self.steps)
        critic = judge()
        others = {"real": distance(real(), critic), "samples": float(self.samples)}
        return Quality("frechet", distance(made, critic), higher_is_better=False, others=others)

    def workload(self, name: str, count: int) -> Callable[[nn.Module], Any]:
        """Make images from noise, all steps of a flow included."""
        kind = GENERATORS[name].kind
        return partial(samples, kind=kind, count=count, seed=TEST_SEED, steps=self.steps)
