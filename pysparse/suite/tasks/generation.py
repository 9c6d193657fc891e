"""Image generation: Frechet distance of generated digits to real ones, images per second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pysparse.suite.tasks.classification import TEST_SEED, VISION, require_positive
from pysparse.suite.tasks.protocol import Quality, Speed
from pysparse.suite.tasks.timing import per_second
from pysparse.suite.vision.checkpoints import trained
from pysparse.suite.vision.frechet import judge
from pysparse.suite.vision.generator import GENERATORS, LATENT, samples
from pysparse.suite.vision.generators import between, distance, lesson, real


@dataclass(frozen=True, slots=True)
class Generation:
    """Digits of 8 x 8 pixels out of noise; their distance is measured in the features of a classifier trained here.

    The distance is not the usual FID, which needs Inception's weights: see :mod:`pysparse.suite.vision.frechet`.
    """

    samples: int = 600  # generated, from the same noise in every cell
    steps: int = 16  # of a flow
    calibration_images: int = 256
    batch_size: int = 32
    rounds: int = 7  # of timing

    name = "generation"
    scope = VISION
    takes_paths = False

    def __post_init__(self) -> None:
        require_positive(self, "samples", "steps", "calibration_images", "batch_size", "rounds")

    def models(self) -> tuple[str, ...]:
        """The generators."""
        return tuple(GENERATORS)

    def family(self, model: nn.Module, name: str) -> str:
        """Return "cnn" or "attention"."""
        return GENERATORS[name].family

    def load(self, model: str, *, seed: int) -> nn.Module:
        """Return the generator trained with ``seed``: from the cache, or trained now (about a minute)."""
        return trained(lesson(model), seed)

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> list[dict[str, Tensor]]:
        """Return what a generator reads: points between noise and training digits with times, or latent numbers."""
        generator = torch.Generator().manual_seed(TEST_SEED + 1 + seed)
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

    def speed(self, dense: nn.Module, sparse: nn.Module, name: str, *, threads: int) -> list[Speed]:
        """Images per second from noise to digit, all steps of a flow included."""
        kind = GENERATORS[name].kind
        return [
            per_second(
                ("images", "images/s", size), dense, sparse,
                partial(samples, kind=kind, count=size, seed=TEST_SEED, steps=self.steps),
                rounds=self.rounds, threads=threads, repeats=1 + 4 // size,
            )
            for size in (1, self.batch_size)
        ]  # fmt: skip
