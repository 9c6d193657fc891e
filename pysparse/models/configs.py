"""Say in a model's config what structured pruning did, where the config can say it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pysparse.nn.structure import Structure, Surgery, record_structure, structure_of

_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
)  # what configs call the FFN's neurons


def state_in_config(model: nn.Module, widths: set[int], width_before: int, surgery: Surgery) -> None:
    """Put one width for all blocks in the config of ``model``, so that stock transformers builds the FFNs.

    A config has one number for it; several widths, or a config that calls it otherwise, leave the width in the
    model's structure record. Tried by building the modules on the meta device. Changes go through ``surgery``.
    """
    structure = structure_of(model)
    config: Any = getattr(model, "config", None)
    if structure is None or not structure.shapes or len(widths) > 1 or config is None:
        return
    for name in _WIDTHS:
        if getattr(config, name, 0) not in (width_before, None):
            continue
        stated = copy.deepcopy(config)
        setattr(stated, name, min(widths))
        if _fits(model, stated, structure):
            surgery.set(config, name, min(widths))
            rest = Structure(structure.removed, structure.idle, structure.slots, {}, structure.outputs)
            record_structure(model, rest or None, surgery)
            return


def state_depth(model: nn.Module, kept: list[int], surgery: Surgery) -> None:
    """Put the number of blocks, of which those at the indices ``kept`` are left, in the config of ``model``.

    Raises ValueError when the config cannot say it: the modules it then describes are built on the meta device.
    """
    config: Any = getattr(model, "config", None)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if getattr(config, "layer_types", None):
        changes["layer_types"] = [config.layer_types[index] for index in kept]
    for name, value in changes.items():
        surgery.set(config, name, value)
    wanted = {name: tensor.shape for name, tensor in _built(model, config).state_dict().items()}
    have = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if wanted != have:
        odd = min(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
        raise ValueError(
            f"the config of {type(model).__name__} cannot say that blocks are missing ({odd} does not fit)"
        )


def _fits(model: nn.Module, config: Any, structure: Structure) -> bool:
    built = _built(model, config)
    have = dict(model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in built.named_parameters()}
    return all(shapes.get(f"{path}.weight") == have[f"{path}.weight"].shape for path in structure.shapes)


def _built(model: nn.Module, config: Any) -> nn.Module:
    with torch.device("meta"):
        kind: Any = type(model)
        built: nn.Module = kind._from_config(copy.deepcopy(config))
    return built
