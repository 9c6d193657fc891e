"""Scenes for detection: up to four digits on a piece of a photograph, with the box of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.suite.vision.pixels import Split, backgrounds, colours_over, digits, drawn, normalised

SCENE = 64  # pixels a side
PLACES = 4  # quarters of a scene; each holds a digit or none
_OCCUPIED = 0.7  # chance of a quarter to hold a digit
_INK = 0.3  # shade from which a pixel belongs to a digit's box


@dataclass(frozen=True, slots=True)
class Scenes:
    """Normalised images and what is in them; a place without a digit has class -1 and a box of zeros."""

    images: Tensor  # float32 [N, 3, 64, 64]
    boxes: Tensor  # float32 [N, 4 places, 4]: left, top, right, bottom in pixels
    labels: Tensor  # int64 [N, 4 places]

    def rows(self, rows: Tensor | slice) -> Scenes:
        """Return some of the scenes."""
        return Scenes(self.images[rows], self.boxes[rows], self.labels[rows])


def scenes(split: Split, count: int, seed: int) -> Scenes:
    """Return ``count`` scenes of the split's digits and photographs; ValueError for a count below 1."""
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    shades, classes = digits(split)
    images = backgrounds(split, count, SCENE, generator)
    boxes, labels = torch.zeros(count, PLACES, 4), torch.full((count, PLACES), -1)
    for place in range(PLACES):
        chosen = torch.randint(len(shades), (count,), generator=generator)
        uniform = torch.rand(count, 5, generator=generator)
        quarter = torch.tensor([16.0 + 32.0 * (place % 2), 16.0 + 32.0 * (place // 2)])
        centre = quarter + 8.0 * (uniform[:, :2] - 0.5)
        size, turn = 16.0 + 10.0 * uniform[:, 2], 0.4 * (uniform[:, 3] - 0.5)
        there = uniform[:, 4] < _OCCUPIED
        masks = drawn(shades[chosen], SCENE, size, centre, turn) * there[:, None, None, None]
        images = images + masks * (colours_over(images, generator) - images)
        boxes[:, place] = _boxes(masks[:, 0])
        labels[:, place] = torch.where(there, classes[chosen], labels[:, place])
    return Scenes(normalised(images), boxes, labels)


def _boxes(masks: Tensor) -> Tensor:
    """Return the box around the ink of each mask [N, H, W], float32 [N, 4]; zeros where there is none."""
    ink = masks > _INK
    sides = []
    for dim, extent in ((1, masks.shape[2]), (2, masks.shape[1])):
        line = ink.any(dim=dim).float()  # columns, then rows
        first = line.argmax(dim=1)
        last = extent - line.flip(1).argmax(dim=1)
        sides.append((first, last))
    (left, right), (top, bottom) = sides
    found = ink.flatten(1).any(dim=1)
    return torch.stack([left, top, right, bottom], dim=1).float() * found[:, None]
