"""Parameters where their data is: in the module, or in the store that accelerate offloaded them to.

Duck-typed on accelerate's hooks, which put an offloaded parameter on the meta device between two calls of its
module and keep the data in a mapping: of tensors in memory, of raw files, or of a checkpoint's own files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def data_of(module: nn.Module, name: str, *, writable: bool = False) -> Tensor:
    """Return the data of a parameter or buffer; what is written in place to it is what the module will use.

    A tensor that lies in a checkpoint's file is copied to the offload folder when it is to be ``writable``.
    Returns the meta tensor itself when there is no data anywhere. Raises ValueError when the checkpoint would
    have to be overwritten, because there is no offload folder.
    """
    tensor: Tensor = getattr(module, name).detach()
    place = _place_of(module, name) if tensor.is_meta else None
    if place is None:
        return tensor
    store, key = place
    in_memory = getattr(store, "state_dict", store)
    if key in in_memory:
        data: Tensor = in_memory[key]
        return data.detach()
    return _on_disk(store, key, writable)


def device_of(module: nn.Module, name: str) -> torch.device:
    """Return where the module computes with the parameter."""
    tensor: Tensor = getattr(module, name)
    hooks = [hook for hook in _hooks(module) if getattr(hook, "execution_device", None) is not None]
    if not tensor.is_meta or not hooks:
        return tensor.device
    device = hooks[0].execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether accelerate keeps parameters of ``model`` outside of its modules."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in _hooks(module))


def tensors_of(root: nn.Module, *, writable: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and data of every parameter and buffer below ``root``; what is shared comes once."""
    seen: set[int] = set()
    for path, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, data_of(module, name, writable=writable)


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _place_of(module: nn.Module, name: str) -> tuple[Any, str] | None:
    """Return the mapping that holds a parameter, and its key there."""
    for hook in _hooks(module):
        store: Any = getattr(hook, "weights_map", None)
        key = name
        while hasattr(store, "prefix"):
            store, key = store.dataset, f"{store.prefix}{key}"
        if store is not None and key in list(store):
            return store, key
    return None


def _on_disk(store: Any, key: str, writable: bool) -> Tensor:
    """Return a tensor of accelerate's OffloadedWeightsLoader, mapped from its raw file where there is one."""
    info = store.index[key]
    if info.get("safetensors_file") is not None:
        if not writable:
            data: Tensor = store[key]
            return data
        if store.save_folder is None:
            raise ValueError(
                f"{key} lies in the checkpoint {info['safetensors_file']}, which is not overwritten: load the model "
                "with offload_folder=..., so that changed weights have a place"
            )
        from accelerate.utils import offload_weight

        offload_weight(store[key], key, store.save_folder, index=store.index)
        info = store.index[key]
    file, shape = Path(store.save_folder) / f"{key}.dat", torch.Size(info["shape"])
    dtype: torch.dtype = getattr(torch, info["dtype"])
    return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=dtype).view(shape)
