"""What makes two prunings the same: hashes and settings that a resumed run is compared by."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.calib import Calibration
from pysparse.calib.offload import tensors_of
from pysparse.measure.results import to_jsonable
from pysparse.pruning.layout import BlockLayout
from pysparse.pruning.recipe import Recipe
from pysparse.pruning.report import describe_recipe

_CHUNK = 1 << 26  # elements that are copied to the host and hashed at a time


def identity_of(
    layout: BlockLayout,
    recipe: Recipe,
    target: float,
    calibration: Calibration | None,
    **settings: Any,
) -> dict[str, Any]:
    """Return everything that the pruned bits depend on, JSON-ready, by names that an error message can use.

    The weights of the whole model are read once for their hash. ``settings`` are further things that matter.
    """
    layers = [(layer.path, *layer.shape) for layer in layout.layers]
    return {
        "model": f"{type(layout.model).__name__}, sha256 {model_hash(layout.model)}",
        "layers to prune": f"{len(layers)}, sha256 {_hash_of(layers)}",
        "recipe": json.dumps(describe_recipe(recipe), sort_keys=True),
        "sparsity": target,
        "calibration": None if calibration is None else json.dumps(calibration.describe(), sort_keys=True),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **settings,
    }


def method_identity(
    model: nn.Module, method: Any, target: float | None, calibration: Calibration, **settings: Any
) -> dict[str, Any]:
    """Return everything that the result of a structural method depends on, as :func:`identity_of` does."""
    return {
        "model": f"{type(model).__name__}, sha256 {model_hash(model)}",
        "method": json.dumps({"type": type(method).__name__, **to_jsonable(method)}, sort_keys=True),
        "sparsity": target,
        "calibration": json.dumps(calibration.describe(), sort_keys=True),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **settings,
    }


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers of ``model``, with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in tensors_of(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        hash_tensor(digest, tensor)
    return digest.hexdigest()


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed the bytes of ``tensor`` to a hash of hashlib's."""
    flat = tensor.detach().reshape(-1)
    for part in torch.split(flat, _CHUNK):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for each setting that differs."""
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
