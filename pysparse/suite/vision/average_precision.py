"""Mean average precision at one overlap, by the definition of PASCAL VOC with every point of the curve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysparse.suite.vision.detector import iou_matrix


@dataclass(frozen=True, slots=True)
class Detections:
    """What a detector found in one image."""

    boxes: Tensor  # float32 [D, 4]
    scores: Tensor  # float32 [D]
    labels: Tensor  # int64 [D]


def detections(
    logits: Tensor, boxes: Tensor, threshold: float = 0.02, overlap: float = 0.5, most: int = 100
) -> Detections:
    """Return the boxes of one image, without those that overlap a better one of their class (greedy NMS).

    ``logits`` [L, classes] and ``boxes`` [L, 4] are a detector's output; ``threshold`` is low, so that the whole
    curve of precision over recall is seen.
    """
    scores = logits.sigmoid()
    position, label = (scores > threshold).nonzero(as_tuple=True)
    found = scores[position, label]
    order = found.argsort(descending=True, stable=True)[:most]
    position, label, found = position[order], label[order], found[order]
    overlapping = (iou_matrix(boxes[position], boxes[position]) > overlap) & (label[:, None] == label[None])
    kept: list[int] = []
    for index, row in enumerate(overlapping):
        if not row[kept].any():
            kept.append(index)
    return Detections(boxes[position[kept]], found[kept], label[kept])


def average_precision(hits: Tensor, scores: Tensor, total: int) -> float:
    """Return the area under the precision-recall curve of one class.

    ``hits`` says which of the detections [D] found an object of its own, ``total`` counts the objects. Precision at
    a recall is the best at that or any higher recall.
    """
    if total < 1:
        raise ValueError(f"total={total}: a class without objects has no average precision")
    order = scores.argsort(descending=True, stable=True)
    found = hits[order].double().cumsum(0)
    precision = found / torch.arange(1, len(found) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    return float((best * hits[order].double()).sum() / total)


def mean_average_precision(
    found: list[Detections], boxes: Tensor, labels: Tensor, classes: int, overlap: float = 0.5
) -> float:
    """Return the mean of the classes' average precisions, over classes that have objects.

    ``boxes`` [N, P, 4] and ``labels`` [N, P] are the truth, with -1 where there is no object. In each image the
    detections of a class take, best first, the object of that class that they overlap most; one that overlaps none
    by at least ``overlap``, or only one that is taken, is a false alarm. ValueError when nothing is there to find.
    """
    values = []
    for label in range(classes):
        total = int((labels == label).sum())
        if total:
            hits, scores = _matched(found, boxes, labels, label, overlap)
            values.append(average_precision(hits, scores, total))
    if not values:
        raise ValueError("no image has an object: there is no precision to measure")
    return sum(values) / len(values)


def _matched(
    found: list[Detections], boxes: Tensor, labels: Tensor, label: int, overlap: float
) -> tuple[Tensor, Tensor]:
    """Return for every detection of a class whether it is right, and its score."""
    hits: list[bool] = []
    scores: list[Tensor] = []
    for one, true_boxes, true_labels in zip(found, boxes, labels, strict=True):
        mine = (one.labels == label).nonzero()[:, 0]
        mine = mine[one.scores[mine].argsort(descending=True, stable=True)]
        overlaps = iou_matrix(one.boxes[mine], true_boxes[true_labels == label])
        taken: set[int] = set()
        for row in overlaps:
            best = int(row.argmax()) if len(row) else -1
            hit = best >= 0 and float(row[best]) >= overlap and best not in taken
            hits.append(hit)
            taken |= {best} if hit else set()
        scores.append(one.scores[mine])
    return torch.tensor(hits, dtype=torch.bool), torch.cat(scores) if scores else torch.zeros(0)
