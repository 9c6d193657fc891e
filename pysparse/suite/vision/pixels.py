"""Pictures made of bundled data alone: scikit-learn's handwritten digits on photographs that scikit-image ships.

Digits and photographs are split once: a picture of the test split shows a digit and a piece of a photograph that no
training picture has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pysparse.calib.extras import optional

Split = Literal["train", "test"]
CLASSES = 10
TRAIN_DIGITS = 1200  # of 1797; the others test
IMAGE = 32  # pixels a side of a picture with one digit
_SHUFFLE = 20240101  # of the digits, before they are split
_PHOTOGRAPHS = ("astronaut", "brick", "coffee", "grass", "gravel", "chelsea", "camera", "hubble_deep_field")
_SIDE = 192  # pixels a side of a photograph's halves, after scaling
_CONTRAST = 0.5  # of the photographs: small models learn in a minute to look past them
_MEAN, _STD = 0.45, 0.25  # of the pictures, about: inputs are normalised by them


@dataclass(frozen=True, slots=True)
class Pictures:
    """Normalised images with the class of each."""

    images: Tensor  # float32 [N, 3, H, W]
    labels: Tensor  # int64 [N]


def _extra(module: str) -> Any:
    return optional(module, "suite")


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    found = _extra("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(_SHUFFLE))
    shades = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16.0
    return shades[order], torch.tensor(found.target, dtype=torch.int64)[order]


def digits(split: Split) -> tuple[Tensor, Tensor]:
    """Return the digits of a split: shades in [0, 1], float32 [N, 1, 8, 8], and their classes, int64 [N]."""
    shades, classes = _all_digits()
    part = slice(0, TRAIN_DIGITS) if _checked(split) == "train" else slice(TRAIN_DIGITS, None)
    return shades[part], classes[part]


def _checked(split: str) -> str:
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    return split


@cache
def photographs(split: Split) -> Tensor:
    """Return one half of each photograph, float32 [P, 3, 192, 192] in [0, 1]: left to train, right to test."""
    data = _extra("skimage.data")
    halves = []
    for name in _PHOTOGRAPHS:
        pixels = torch.tensor(np.atleast_3d(getattr(data, name)()), dtype=torch.float32) / 255.0
        whole = pixels.permute(2, 0, 1).expand(3, -1, -1)
        middle = whole.shape[2] // 2
        half = whole[:, :, :middle] if _checked(split) == "train" else whole[:, :, middle:]
        scaled = functional.interpolate(half[None], size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
        halves.append(scaled[0])
    return torch.stack(halves)


def backgrounds(split: Split, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Return random pieces of photographs, mirrored at random, float32 [count, 3, side, side] in [0, 1]."""
    sources = photographs(split)
    which = torch.randint(len(sources), (count,), generator=generator).tolist()
    places = torch.randint(_SIDE - side + 1, (count, 2), generator=generator).tolist()
    mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
    pieces = []
    for source, (top, left), mirror in zip(which, places, mirrored, strict=True):
        piece = sources[source, :, top : top + side, left : left + side]
        pieces.append(piece.flip(2) if mirror else piece)
    whole = torch.stack(pieces)
    mean = whole.mean(dim=(2, 3), keepdim=True)
    return mean + _CONTRAST * (whole - mean)


def colours_over(background: Tensor, generator: torch.Generator) -> Tensor:
    """Return a colour for each background [N, 3, H, W] that stands out from its mean, float32 [N, 3, 1, 1]."""
    mean = background.mean(dim=(2, 3), keepdim=True)
    bright = (mean.mean(dim=1, keepdim=True) < 0.5).float()
    strength = 0.35 + 0.2 * torch.rand(mean.shape, generator=generator)
    return (mean + (2.0 * bright - 1.0) * strength).clamp(0.0, 1.0)


def drawn(shades: Tensor, side: int, size: Tensor, centre: Tensor, turn: Tensor) -> Tensor:
    """Return each digit [N, 1, 8, 8] on a canvas of ``side`` pixels, float32 [N, 1, side, side] in [0, 1].

    ``size`` [N] is the side in pixels at which the 8 x 8 digit is drawn, ``centre`` [N, 2] its middle (x, y) in
    pixels, ``turn`` [N] its rotation in radians.
    """
    scale = side / size
    x, y = (2.0 * centre / side - 1.0).unbind(dim=1)
    cosine, sine = torch.cos(turn) * scale, torch.sin(turn) * scale
    rows = [torch.stack([cosine, sine, -(cosine * x + sine * y)], 1),
            torch.stack([-sine, cosine, sine * x - cosine * y], 1)]  # fmt: skip
    grid = functional.affine_grid(torch.stack(rows, 1), [len(shades), 1, side, side], align_corners=False)
    return functional.grid_sample(shades, grid, mode="bicubic", align_corners=False).clamp(0.0, 1.0)


def normalised(images: Tensor) -> Tensor:
    """Return images in [0, 1] with about zero mean and unit deviation."""
    return (images - _MEAN) / _STD


def pictures(split: Split, copies: int, seed: int) -> Pictures:
    """Return every digit of ``split`` ``copies`` times, each time somewhere else on another background."""
    if copies < 1:
        raise ValueError(f"copies={copies} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    shades, classes = digits(split)
    shades, classes = shades.repeat(copies, 1, 1, 1), classes.repeat(copies)
    count = len(classes)
    uniform = torch.rand(count, 4, generator=generator)
    size = 24.0 + 6.0 * uniform[:, 0]
    centre = IMAGE / 2 + 4.0 * (uniform[:, 1:3] - 0.5)
    masks = drawn(shades, IMAGE, size, centre, 0.4 * (uniform[:, 3] - 0.5))
    under = backgrounds(split, count, IMAGE, generator)
    images = under + masks * (colours_over(under, generator) - under)
    return Pictures(normalised(images), classes)
