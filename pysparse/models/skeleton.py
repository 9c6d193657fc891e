"""A model without weights: its modules on the meta device, from the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from pysparse.models.sources import check_source
from pysparse.nn.structure import Structure, apply_structure


def skeleton(source: str | Path) -> nn.Module:
    """Build the modules of the model in ``source`` on the meta device; no weight is read.

    Raises FileNotFoundError when ``source`` holds no model, ValueError for an architecture that this version
    of transformers does not have.
    """
    config: Any = transformers.AutoConfig.from_pretrained(check_source(source))
    names = config.architectures or []
    kind: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise ValueError(
            f"{source} is a {names[0]}, which transformers {transformers.__version__} does not have: load the "
            "model yourself and pass the object"
        )
    structure: Any = None
    if hasattr(config, "quantization_config"):
        structure = config.quantization_config.get("structure")
        del config.quantization_config  # the dense shapes are asked for
    build = kind.from_config if kind is transformers.AutoModel else kind._from_config
    with torch.device("meta"):
        model: nn.Module = build(config, dtype=config.dtype or torch.float32)
    if structure is not None:
        apply_structure(model, Structure.from_dict(structure), f"{getattr(model, 'base_model_prefix', '')}.")
    return model
