"""Small configurations of published image classifiers, by the names that people know them by.

Each is the class of transformers with a config that fits pictures of 32 x 32 pixels: the shape of the
architecture (its blocks, normalisations and mixing of positions) is the published one, widths and depths are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from torch import nn

from pysparse.suite.vision.pixels import CLASSES, IMAGE

SPREAD = 0.08  # of initial weights where a config has a say: 0.02 is for widths of 768, these have about 100
Family = Literal["cnn", "attention", "hybrid", "pooling"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One classifier: ``{name}Config(**settings)`` for ``{name}ForImageClassification`` of transformers."""

    family: Family
    name: str
    settings: Mapping[str, Any]
    image_size: bool = False  # whether the config asks for the pictures' size
    learning_rate: float = 3e-3
    epochs: int = 14  # of the 1200 training digits

    def build(self) -> nn.Module:
        """Return the model with the weights that its class draws from torch's generator."""
        sized = {"image_size": IMAGE} if self.image_size else {}
        config = getattr(transformers, f"{self.name}Config")(
            **{
                "num_channels": 3,
                "num_labels": CLASSES,
                "initializer_range": SPREAD,
                **sized,
                **self.settings,
            }
        )
        model: nn.Module = getattr(transformers, f"{self.name}ForImageClassification")(config)
        # transformers' mobile nets keep TensorFlow's momentum, one minus torch's: only the last batch would count
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        return model


def _cnn(name: str, **settings: Any) -> Architecture:
    return Architecture("cnn", name, settings)


def _attention(name: str, **settings: Any) -> Architecture:
    return Architecture("attention", name, settings, True, 2e-3)


def _plain(name: str, **settings: Any) -> Architecture:
    """Return a transformer that sees 16 patches and nothing of where they touch: it learns slowest."""
    return Architecture("attention", name, {**_PLAIN, **settings}, True, 2e-3, epochs=28)


_PLAIN: dict[str, Any] = {
    "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_WINDOWS: dict[str, Any] = {
    "patch_size": 4, "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4, "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [32, 64, 128], "depths": [1, 2, 1]}
_PYRAMID: dict[str, Any] = {
    **_STAGES, "num_encoder_blocks": 3, "num_attention_heads": [1, 2, 4], "strides": [4, 2, 2],
    "mlp_ratios": [2, 2, 2], "drop_path_rate": 0.0,
}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "resnet-basic": _cnn(
        "ResNet", embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"
    ),
    "resnet-bottleneck": _cnn("ResNet", embedding_size=16, hidden_sizes=[64, 128, 256], depths=[1, 2, 1]),
    "regnet-y": _cnn("RegNet", embedding_size=16, groups_width=16, **_STAGES),
    "convnext": _cnn("ConvNext", patch_size=4, num_stages=3, **_STAGES),
    "convnextv2": _cnn("ConvNextV2", patch_size=4, num_stages=3, **_STAGES),
    "mobilenet-v1": _cnn("MobileNetV1", depth_multiplier=0.25, classifier_dropout_prob=0.0),
    "mobilenet-v2": _cnn(
        "MobileNetV2", depth_multiplier=0.25, output_stride=32, classifier_dropout_prob=0.0, tf_padding=False
    ),
    "efficientnet": _cnn(
        "EfficientNet", width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, dropout_rate=0.0,
        drop_connect_rate=0.0, strides=[2, 1, 2, 1, 1, 2, 1],
    ),
    "hgnet-v2": _cnn(
        "HGNetV2", embedding_size=16, **_STAGES, stem_channels=[3, 8, 16], stem_strides=[2, 1, 1, 2, 1],
        stage_in_channels=[16, 32, 64], stage_mid_channels=[8, 16, 32], stage_out_channels=[32, 64, 128],
        stage_num_blocks=[1, 1, 1], stage_downsample=[False, True, True], stage_downsample_strides=[2, 2, 2],
        stage_light_block=[False, False, True], stage_kernel_size=[3, 3, 3], stage_numb_of_layers=[3, 3, 3],
    ),
    "focalnet": Architecture(
        "cnn", "FocalNet",
        {"patch_size": 4, "embed_dim": 48, "depths": [1, 2], "focal_levels": [2, 2], "focal_windows": [3, 3],
         "hidden_sizes": [96, 96], "mlp_ratio": 2.0, "drop_path_rate": 0.0},
        True,
    ),
    "poolformer": Architecture(
        "pooling", "PoolFormer",
        {**_STAGES, "num_encoder_blocks": 3, "patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "padding": [2, 1, 1],
         "mlp_ratio": 2.0, "layer_scale_init_value": 0.1},
    ),
    "vit": _plain("ViT", intermediate_size=192),
    "deit": _plain("DeiT", intermediate_size=192),
    "beit": _plain("Beit", intermediate_size=192, drop_path_rate=0.0, use_relative_position_bias=True),
    "dinov2": _plain("Dinov2", mlp_ratio=2, layerscale_value=0.1),
    "swin": _attention("Swin", **_WINDOWS),
    "swinv2": _attention("Swinv2", **_WINDOWS),
    "pvt": _attention("Pvt", patch_sizes=[4, 2, 2], sequence_reduction_ratios=[2, 2, 1], **_PYRAMID),
    "pvt-v2": _attention("PvtV2", patch_sizes=[7, 3, 3], sr_ratios=[2, 2, 1], **_PYRAMID),
    "cvt": _attention(
        "Cvt", patch_sizes=[7, 3, 3], patch_stride=[4, 2, 2], embed_dim=[32, 64, 128], num_heads=[1, 2, 4],
        depth=[1, 2, 3], mlp_ratio=[2.0, 2.0, 2.0], drop_path_rate=[0.0, 0.0, 0.0],
    ),
    "hiera": Architecture(
        "attention", "Hiera",
        {"image_size": [IMAGE, IMAGE], "embed_dim": 32, "patch_size": [7, 7], "patch_stride": [4, 4],
         "patch_padding": [3, 3], "mlp_ratio": 2.0, "depths": [1, 2], "num_heads": [2, 4], "num_query_pool": 1,
         "masked_unit_size": [2, 2], "masked_unit_attention": [True, False], "embed_dim_multiplier": 3.0},
        learning_rate=2e-3,
    ),
    "mobilevit": Architecture(
        "hybrid", "MobileViT",
        {"hidden_sizes": [48, 64, 80], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 128], "expand_ratio": 2.0,
         "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0, "output_stride": 16},
        True,
    ),
}  # fmt: skip
