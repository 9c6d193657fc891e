"""Adapters in peft's file format, and what of peft's LoRA settings an adaptation can follow."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from pysparse.nn import Adapter

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."  # of every key in a file of peft's
_WEIGHTS = "adapter_model.safetensors"


def require_peft() -> Any:
    """Return the peft module; ImportError that says how to get it."""
    try:
        import peft
    except ImportError:
        raise ImportError("adapters need peft: pip install 'pysparse[peft]'") from None
    return peft


def check_lora(config: LoraConfig) -> None:
    """Raise ValueError for settings of ``config`` that a masked adapter does not have."""
    wishes = {
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "bias": config.bias != "none" and config.bias,
        "modules_to_save": config.modules_to_save,
        "layers_to_transform": config.layers_to_transform,
        "init_lora_weights": config.init_lora_weights is not True and config.init_lora_weights,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for name, value in wishes.items():
        if value:
            raise ValueError(
                f"lora: {name}={value!r} is not supported: a masked adapter takes r, lora_alpha, lora_dropout "
                "and target_modules"
            )
    if config.r < 1:
        raise ValueError(f"lora: r={config.r} must be at least 1")


def save_adapter(
    adapters: Mapping[str, Adapter],
    folder: str | Path,
    config: LoraConfig | None = None,
    *,
    base: str | Path | None = None,
    transposed: bool = False,
) -> Path:
    """Write ``adapters``, by module path, so that ``peft.PeftModel.from_pretrained`` loads them.

    Ranks and scales of each module go into the config's patterns. ``base`` is the model that they belong to;
    ``transposed`` says that the modules are GPT-2's Conv1D. The mask is the zeros of the base model: peft
    itself computes without it, ``pysparse.merge_and_sparsify`` with it. Raises ValueError for no adapters.
    """
    if not adapters:
        raise ValueError("there are no adapters to save: the kept weights themselves were trained")
    peft = require_peft()
    saved = peft.LoraConfig(task_type="CAUSAL_LM") if config is None else copy.deepcopy(config)
    saved.target_modules = set(adapters)
    saved.rank_pattern = {path: one.rank for path, one in adapters.items()}
    saved.alpha_pattern = {path: one.scale * one.rank for path, one in adapters.items()}
    saved.fan_in_fan_out, saved.inference_mode = transposed, True
    saved.base_model_name_or_path = None if base is None else str(base)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, one in adapters.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = one.down.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = one.up.contiguous()
    save_file(tensors, place / _WEIGHTS, metadata={"format": "pt"})
    saved.save_pretrained(str(place))
    return place
