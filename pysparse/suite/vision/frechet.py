"""How far generated digits are from real ones: Frechet distance in the features of a classifier trained here.

This is the definition of the Frechet inception distance (Heusel et al. 2017, arXiv 1706.08500) with another
network: a small convolutional classifier of these digits instead of Inception v3. Its values compare generators of
the suite with each other, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.suite.vision.checkpoints import Lesson, trained
from pysparse.suite.vision.pixels import CLASSES, digits
from pysparse.suite.vision.training import Training, fit, shuffled

_FEATURES = 32


class DigitClassifier(nn.Module):
    """Three convolutions, 32 features, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, _FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(_FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer reads, float32 [B, 32], of images [B, 1, 8, 8] in [-1, 1]."""
        result: Tensor = self.body(images)
        return result

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 10]."""
        result: Tensor = self.head(self.features(images))
        return result


def judge() -> DigitClassifier:
    """Return the trained classifier whose features the distance is measured in; always the same one."""
    training = Training(30, 3e-3)
    lesson = Lesson("generation", "judge", {"features": _FEATURES}, training, DigitClassifier, _teach)
    model = trained(lesson, 0)
    assert isinstance(model, DigitClassifier)  # as it was built
    return model


def _teach(model: nn.Module, training: Training, seed: int) -> nn.Module:
    shades, classes = digits("train")

    def batches(epoch_seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in shuffled(len(classes), training.batch_size, epoch_seed):
            yield 2.0 * shades[rows] - 1.0, classes[rows]

    def loss(classifier: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(classifier(batch[0]), batch[1])

    return fit(model, training, batches, loss, seed)


def frechet_distance(left: Tensor, right: Tensor) -> float:
    """Return the squared Frechet distance of two sets of features as normal distributions.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features [N, D] and [M, D], in float64. Raises ValueError for
    fewer than two rows or features that are no numbers.
    """
    if min(len(left), len(right)) < 2:
        raise ValueError(f"{len(left)} and {len(right)} rows: a covariance needs at least two of each")
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ValueError("features hold infinities or no numbers: what was generated is no image")
    first, second = left.double(), right.double()
    apart = (first.mean(0) - second.mean(0)).square().sum()
    one, other = first.T.cov(), second.T.cov()
    half = _root(one)
    shared = torch.linalg.eigvalsh(half @ other @ half).clamp(min=0).sqrt().sum()
    return max(0.0, float(apart + one.trace() + other.trace() - 2 * shared))


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root
