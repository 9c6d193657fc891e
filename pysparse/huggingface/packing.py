"""Which linear layers of a model are stored packed, and the tensors that go to disk for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pysparse.calib.offload import data_of
from pysparse.formats import BitmapTensor
from pysparse.formats.bitmap import VALUE_DTYPES
from pysparse.huggingface.layout import BITMASK, PARTS, SCALES, TRIPWIRE, Layout
from pysparse.nn import CompactLinear, DenseLinear, Packing, SparseLinear
from pysparse.nn.compact import state_of
from pysparse.nn.dispatch import MIN_SPARSITY
from pysparse.nn.packing import grid_of, row_major
from pysparse.nn.structure import Structure, structure_of

_STORED = (*PARTS[BITMASK], SCALES)
_NO_PARTS: dict[str, Tensor] = {}


def choose_layers(model: nn.Module, min_sparsity: float = MIN_SPARSITY) -> tuple[set[str], dict[str, float]]:
    """Return the paths of the layers to pack, and the sparsity of each linear layer that stays dense.

    Packed are layers that are packed already, and each ``nn.Linear`` with at least ``min_sparsity`` zeros.
    The output head, layers whose weight has a second name (tied weights) and GPT-2's Conv1D stay dense.
    """
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity is a fraction between 0 and 1, got {min_sparsity}")
    names = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    head = _output_head(model)
    packed: set[str] = set()
    dense: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, SparseLinear | CompactLinear):
            packed.add(path)
        elif isinstance(module, nn.Linear | Conv1D):
            sparsity = zero_fraction(data_of(module, "weight"))
            eligible = type(module) in (nn.Linear, DenseLinear) and module.weight.dtype in VALUE_DTYPES
            if eligible and module is not head and names[id(module.weight)] == 1 and sparsity >= min_sparsity:
                packed.add(path)
            else:
                dense[path] = round(sparsity, 6)
    return packed, dense


def zero_fraction(weight: Tensor) -> float:
    """Return the fraction of zeros in ``weight``; 0 for an empty one."""
    return 1.0 - int(torch.count_nonzero(weight)) / weight.numel() if weight.numel() else 0.0


def packed_state_dict(
    model: nn.Module,
    min_sparsity: float = MIN_SPARSITY,
    packing: Packing | None = None,
    *,
    legacy: bool = False,
) -> tuple[dict[str, Tensor], Layout]:
    """Return every tensor of ``model`` as it goes to disk, packed layers in the bitmask format, and the layout.

    ``packing`` is that of layers which are not compact yet; those that are stay as they are. An empty
    ``<layer>.weight`` stands beside each packed layer (see layout.py). ``legacy`` leaves that out, and writes
    int8 values as the numbers that they stand for. ValueError, naming the layer, for weights that cannot be
    packed so.
    """
    packed, dense = choose_layers(model, min_sparsity)
    wanted = packing or Packing()
    state: dict[str, Tensor] = {}
    nnz: dict[str, int] = {}
    packings: dict[str, Packing] = {}
    for path, name, tensor in _tensors(model):
        if path not in packed or name not in ("weight", *_STORED):
            state[_join(path, name)] = tensor
            continue
        module = model.get_submodule(path)
        parts, own = _layer_parts(path, module, name, tensor, wanted, legacy)
        state.update({f"{path}.{part}": array for part, array in parts.items()})
        if "compressed" in parts:
            nnz[path] = parts["compressed"].numel()
            if not own.is_plain:
                packings[path] = own
            if not legacy:
                state[f"{path}.{TRIPWIRE}"] = torch.empty(0, dtype=torch.uint8)
    ordered = {path: packings[path] for path in sorted(packings)}
    structure = structure_of(model)
    state |= tripwires(structure)
    return state, Layout(
        dict(sorted(nnz.items())), dict(sorted(dense.items())), packings=ordered, structure=structure
    )


def tripwires(structure: Structure | None) -> dict[str, Tensor]:
    """Return an empty tensor for each removed module, which stops a loader that does not know of the removal."""
    names = structure.tripwires if structure else ()
    return {name: torch.empty(0, dtype=torch.uint8) for name in names}


def _layer_parts(
    path: str, module: nn.Module, name: str, tensor: Tensor, wanted: Packing, legacy: bool
) -> tuple[dict[str, Tensor], Packing]:
    """Return what stands on disk for one tensor of a packed layer, and the layer's packing.

    Where the layer is packed anew, its first tensor stands for all of them.
    """
    compact = isinstance(module, CompactLinear)
    if compact and not legacy:
        return {name: tensor}, module.packing  # type: ignore[return-value]
    if isinstance(module, SparseLinear) and wanted.is_plain:
        return {name: tensor}, wanted
    if name not in ("weight", "compressed"):
        return _NO_PARTS, wanted
    rows = module.bitmap() if compact or isinstance(module, SparseLinear) else BitmapTensor.from_dense(tensor)  # type: ignore[operator]
    if wanted.is_plain:
        return state_of(rows), wanted
    own = wanted.fitted(rows.shape, rows.nnz, rows.dtype)
    try:
        # Through the kernels' packing, so that what it cannot tell from nothing is not stored either.
        return state_of(rows if own.is_plain else row_major(own.pack(rows, grid_of(module)))), own
    except ValueError as error:
        raise ValueError(f"layer '{path}': {error}") from None


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of ``model`` with packed layers written out as ordinary weights."""
    kinds = SparseLinear | CompactLinear
    sparse = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    state: dict[str, Tensor] = {}
    for path, name, tensor in _tensors(model):
        if path in sparse and name in _STORED:
            if name == "compressed":
                state[f"{path}.weight"] = sparse[path].bitmap().to_dense()
        else:
            state[_join(path, name)] = tensor
    return state | tripwires(structure_of(model))


def legacy_config(layout: Layout, sparsity: float) -> dict[str, Any]:
    """Return the ``quantization_config`` by which compressed-tensors 0.14 and earlier knows the bitmask format."""
    return {
        "quant_method": "compressed-tensors",
        "version": "0.14.0.1",
        "sparsity_config": {
            "format": layout.format,
            "global_sparsity": round(sparsity, 6),
            "ignore": list(layout.dense),
            "registry_requires_subclass": False,
            "sparsity_structure": "unstructured",
            "targets": ["Linear"],
        },
        "transform_config": {},
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (module path, tensor name, tensor) of the state dict; ValueError for what has no data.

    What accelerate has offloaded is read from where it lies, file by file as it is asked for.
    """
    for key, tensor in model.state_dict().items():
        path, _, name = key.rpartition(".")
        if tensor.is_meta:
            tensor = data_of(model.get_submodule(path), name)
        if tensor.is_meta:
            raise ValueError(
                f"'{key}' has no data (device meta): an unloaded model cannot be saved, nor one whose offloaded "
                "weights are gone"
            )
        yield path, name, tensor


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if find else None
    return head
