"""A small anchor-free detector (after FCOS, Tian et al. 2019, arXiv 1904.01355) on backbones of transformers.

Each position of one grid of stride 4 says how likely each class has its centre there and how far the sides of its
box are. The backbone's stages are brought to that grid and added, as in a feature pyramid of one level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from pysparse.suite.vision.architectures import SPREAD, Family
from pysparse.suite.vision.pixels import CLASSES
from pysparse.suite.vision.scenes import SCENE, Scenes

STRIDE = 4
_WIDTH = 48  # channels of neck and head
_NEAR = 4.0  # pixels from a box's centre within which a position stands for it
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017, arXiv 1708.02002)
_RARE = -4.0  # logit at the start: most positions hold nothing


@dataclass(frozen=True, slots=True)
class Backbone:
    """``{name}Backbone`` of transformers with ``{name}Config(**settings)``."""

    family: Family
    name: str
    settings: Mapping[str, Any]

    def build(self) -> nn.Module:
        """Return the backbone with the weights that its class draws from torch's generator."""
        config = getattr(transformers, f"{self.name}Config")(
            **{"num_channels": 3, "initializer_range": SPREAD, **self.settings}
        )
        model: nn.Module = getattr(transformers, f"{self.name}Backbone")(config)
        return model


_STAGES = {"hidden_sizes": [32, 64, 128], "depths": [1, 2, 1], "out_features": ["stage1", "stage2", "stage3"]}
BACKBONES: dict[str, Backbone] = {
    "resnet": Backbone("cnn", "ResNet", {"embedding_size": 16, "layer_type": "basic", **_STAGES}),
    "convnextv2": Backbone("cnn", "ConvNextV2", {"patch_size": 4, "num_stages": 3, **_STAGES}),
    "swin": Backbone(
        "attention", "Swin",
        {"image_size": SCENE, "patch_size": 4, "embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4],
         "window_size": 4, "mlp_ratio": 2.0, "drop_path_rate": 0.0, "out_features": ["stage1", "stage2"]},
    ),
    "pvt-v2": Backbone(
        "attention", "PvtV2",
        {**_STAGES, "image_size": SCENE, "num_encoder_blocks": 3, "num_attention_heads": [1, 2, 4],
         "patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "sr_ratios": [4, 2, 1], "mlp_ratios": [2, 2, 2],
         "drop_path_rate": 0.0},
    ),
    "dinov2": Backbone(
        "attention", "Dinov2",
        {"image_size": SCENE, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "mlp_ratio": 2, "layerscale_value": 0.1, "out_features": ["stage2", "stage4"]},
    ),
}  # fmt: skip


class Found(NamedTuple):
    """What a detector says of a batch; a tuple, as outputs of blocks are."""

    logits: Tensor  # float32 [B, L, 10]
    boxes: Tensor  # float32 [B, L, 4]: left, top, right, bottom in pixels


class Detector(nn.Module):
    """Backbone, one level of features, and two small heads."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.build()
        channels: Any = self.backbone.channels  # a list of widths, one for each map
        self.laterals = nn.ModuleList(nn.Conv2d(width, _WIDTH, 1) for width in channels)
        self.smooth = _conv()
        self.head = _conv()
        self.classes = nn.Conv2d(_WIDTH, CLASSES, 1)
        self.sides = nn.Conv2d(_WIDTH, 4, 1)
        nn.init.constant_(_bias(self.classes), _RARE)
        nn.init.constant_(_bias(self.sides), 2.0)  # exp(2) = 7 pixels, half of a digit

    def forward(self, pixel_values: Tensor) -> Found:
        """Return ``logits`` [B, L, 10] and ``boxes`` [B, L, 4] in pixels, for L positions of the grid, by rows."""
        side = pixel_values.shape[-1] // STRIDE
        maps = self.backbone(pixel_values).feature_maps
        lateral = [layer(one) for layer, one in zip(self.laterals, maps, strict=True)]
        level = torch.stack([functional.interpolate(one, size=(side, side)) for one in lateral]).sum(0)
        features = self.head(self.smooth(level))
        logits = self.classes(features).flatten(2).transpose(1, 2)
        sides = self.sides(features).flatten(2).transpose(1, 2).clamp(max=4.5).exp()
        x, y = centres(side).unbind(1)
        boxes = torch.stack(
            [x - sides[..., 0], y - sides[..., 1], x + sides[..., 2], y + sides[..., 3]], dim=-1
        )
        return Found(logits, boxes)


def _conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.GroupNorm(8, _WIDTH), nn.ReLU())


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None  # as it was made
    return layer.bias


def centres(side: int) -> Tensor:
    """Return the middle of each position (x, y) in pixels, by rows, float32 [side * side, 2]."""
    steps = (torch.arange(side) + 0.5) * STRIDE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def detection_loss(model: nn.Module, batch: Scenes) -> Tensor:
    """Return the focal loss of the classes and one minus the generalised IoU of the boxes, a positive position."""
    found = model(batch.images)
    logits, boxes = found.logits, found.boxes
    wanted, owner = _targets(batch, centres(batch.images.shape[-1] // STRIDE))
    positive = owner >= 0
    count = max(1, int(positive.sum()))
    probability = logits.sigmoid()
    surprise = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missed = torch.where(wanted > 0, 1 - probability, probability)
    balance = torch.where(wanted > 0, _ALPHA, 1 - _ALPHA)
    focal = (balance * missed**_GAMMA * surprise).sum() / count
    true = batch.boxes[torch.arange(len(owner))[:, None].expand_as(owner)[positive], owner[positive]]
    return focal + (1 - generalised_iou(boxes[positive], true)).sum() / count


def _targets(batch: Scenes, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes wanted [B, L, 10] and the place of the digit that each position stands for, -1 for none."""
    middle = (batch.boxes[..., :2] + batch.boxes[..., 2:]) / 2  # [B, P, 2]
    distance = (grid[None, :, None] - middle[:, None]).abs().amax(dim=-1)  # [B, L, P]
    distance = distance.masked_fill((batch.labels < 0)[:, None], torch.inf)
    nearest, owner = distance.min(dim=2)
    owner = owner.masked_fill(nearest > _NEAR, -1)
    labels = batch.labels.gather(1, owner.clamp(min=0))
    wanted = functional.one_hot(labels.clamp(min=0), CLASSES) * (owner >= 0)[..., None]
    return wanted.float(), owner


def iou_matrix(left: Tensor, right: Tensor) -> Tensor:
    """Return intersection over union of boxes [N, 4] with boxes [M, 4], float32 [N, M]; 0 for empty ones."""
    low = torch.maximum(left[:, None, :2], right[None, :, :2])
    high = torch.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    union = _area(left)[:, None] + _area(right)[None] - shared
    return shared / union.clamp(min=1e-9)


def generalised_iou(found: Tensor, true: Tensor) -> Tensor:
    """Return the generalised IoU (Rezatofighi et al. 2019) of boxes pair by pair, [N, 4] each, in [-1, 1]."""
    shared = (
        (torch.minimum(found[:, 2:], true[:, 2:]) - torch.maximum(found[:, :2], true[:, :2]))
        .clamp(min=0)
        .prod(1)
    )
    union = _area(found) + _area(true) - shared
    around = (torch.maximum(found[:, 2:], true[:, 2:]) - torch.minimum(found[:, :2], true[:, :2])).prod(1)
    return shared / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
