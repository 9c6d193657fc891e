"""The detectors of the suite: scenes of digits, trained and tested."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from pysparse.suite.vision.average_precision import detections, mean_average_precision
from pysparse.suite.vision.checkpoints import Lesson
from pysparse.suite.vision.detector import BACKBONES, Detector, detection_loss
from pysparse.suite.vision.pixels import CLASSES
from pysparse.suite.vision.scenes import Scenes, scenes
from pysparse.suite.vision.training import Training, fit, shuffled

EPOCHS = 20
_SCENES = 640  # drawn anew in each epoch
_BATCH = 32


def lesson(name: str) -> Lesson:
    """Return how the detector with the backbone of that name is trained."""
    found = BACKBONES[name]
    settings = {"name": found.name, "settings": dict(found.settings)}
    training = Training(EPOCHS, 3e-3, _BATCH)
    return Lesson("detection", name, settings, training, partial(Detector, found), _teach)


def _teach(model: nn.Module, training: Training, seed: int) -> nn.Module:
    def batches(epoch_seed: int) -> Iterator[Scenes]:
        whole = scenes("train", _SCENES, epoch_seed)
        for rows in shuffled(_SCENES, training.batch_size, epoch_seed):
            yield whole.rows(rows)

    return fit(model, training, batches, detection_loss, seed)


@torch.no_grad()
def precision(model: nn.Module, test: Scenes, batch_size: int = 50) -> float:
    """Return the mean average precision at an overlap of 0.5, in [0, 1]."""
    found = []
    for images in test.images.split(batch_size):
        output = model(images)
        found += [detections(*one) for one in zip(output.logits, output.boxes, strict=True)]
    return mean_average_precision(found, test.boxes, test.labels, CLASSES)
