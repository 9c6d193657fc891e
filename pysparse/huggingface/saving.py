"""Save a model with zeros, or with packed layers, as a folder."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from pysparse.huggingface.card import model_card
from pysparse.huggingface.folder import MARKER, replaced_folder
from pysparse.huggingface.layout import QUANT_METHOD, Layout
from pysparse.huggingface.packing import dense_state_dict, legacy_config, packed_state_dict
from pysparse.huggingface.source import INDEX
from pysparse.nn import CompactLinear, Packing, SparseLinear
from pysparse.nn.dispatch import MIN_SPARSITY
from pysparse.nn.structure import structure_of

logger = logging.getLogger("pysparse")


@dataclass(frozen=True, slots=True)
class Export:
    """What one save writes: the tensors, and what config.json says of them."""

    state: dict[str, Tensor]
    quantization_config: dict[str, Any] | None
    packed: int  # layers
    own_names: (
        bool  # tensors carry the model's own names; False lets transformers restore a family's old ones
    )
    version: int = 1  # of the layout


def _native(model: nn.Module, min_sparsity: float, packing: Packing) -> Export:
    state, layout = packed_state_dict(model, min_sparsity, packing)
    if not layout.nnz and layout.structure is None:
        return _nothing_packed(state, min_sparsity)
    return Export(state, layout.to_dict(), len(layout.nnz), True, layout.version)


def _dense(model: nn.Module, min_sparsity: float, packing: Packing) -> Export:
    _refuse(packing, "dense")
    structure = structure_of(model)
    if structure is None:
        return Export(dense_state_dict(model), None, 0, False)
    layout = Layout(
        {}, structure=structure
    )  # ordinary weights, of modules that config.json alone cannot describe
    return Export(dense_state_dict(model), layout.to_dict(), 0, True, layout.version)


def _legacy(model: nn.Module, min_sparsity: float, packing: Packing) -> Export:
    _refuse(packing, "compressed-tensors")
    if structure_of(model) is not None:
        raise ValueError(
            'format "compressed-tensors" has no place for removed modules: use "pysparse" or "dense"'
        )
    state, layout = packed_state_dict(model, min_sparsity, legacy=True)
    if not layout.nnz:
        return _nothing_packed(state, min_sparsity)
    return Export(state, legacy_config(layout, _sparsity(model, layout)), len(layout.nnz), True)


def _refuse(packing: Packing, format: str) -> None:
    if not packing.is_plain:
        raise ValueError(f'{packing} cannot be stored in format "{format}": only "pysparse" has it')


def _nothing_packed(state: dict[str, Tensor], min_sparsity: float) -> Export:
    logger.warning(
        "no linear layer has %.0f %% zeros or more: the checkpoint is an ordinary dense one, and no smaller",
        100 * min_sparsity,
    )
    return Export(state, None, 0, False)


FORMATS: dict[str, Callable[[nn.Module, float, Packing], Export]] = {
    "pysparse": _native,
    "dense": _dense,
    "compressed-tensors": _legacy,
}


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    format: str = "pysparse",
    tokenizer: Any = None,
    extra_files: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    min_sparsity: float = MIN_SPARSITY,
    packing: Packing | None = None,
) -> Path:
    """Write ``model`` to a folder, whole or not at all, and return the folder.

    ``model`` is a transformers model whose linear layers hold zeros, or packed layers, or both. Formats:
    "pysparse" packs each linear layer with at least ``min_sparsity`` zeros (values, one mask bit a weight,
    row offsets) and loads after ``import pysparse``; "dense" writes ordinary weights that any tool reads (of a
    model without some attention modules, or with FFNs of several widths: any tool that imports pysparse);
    "compressed-tensors" is the ``sparse-bitmask`` layout of compressed-tensors up to 0.14.

    ``packing``, e.g. ``Packing("int8", group_size=128)`` or ``Packing(pattern="2:4")``, is how "pysparse" packs
    layers that are not in int8 or compact n:m already; those keep what they have. The other formats hold floats
    under a mask, so such layers are written as the numbers that they stand for.

    ``tokenizer`` is saved beside the model, ``extra_files`` maps further file names to their text. Weights
    beyond ``max_shard_size`` are split into several files with an index. A model card says how to load.
    An existing folder is replaced only when it is empty or a model that pysparse saved (FileExistsError
    otherwise), and keeps the files in it that a save does not write. Raises ValueError for an unknown
    format, a model that is not transformers', a bad file name, or weights that ``packing`` cannot hold.
    """
    if format not in FORMATS:
        raise ValueError(f'format is one of {list(FORMATS)}, got "{format}"')
    _check_model(model)
    texts = dict(extra_files or {})
    _check_names(texts)

    def add_files(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    return write_folder(model, directory, format, add_files, max_shard_size, min_sparsity, packing)


def write_folder(
    model: nn.Module,
    directory: str | Path,
    format: str,
    add_files: Callable[[Path], None],
    max_shard_size: int | str,
    min_sparsity: float = MIN_SPARSITY,
    packing: Packing | None = None,
) -> Path:
    """Write weights, config, card and what ``add_files`` adds to a folder of their own, then put it in place."""
    export = FORMATS[format](model, min_sparsity, packing or Packing())
    with replaced_folder(directory) as folder:
        _write_model(model, export, folder, max_shard_size)
        for name, text in _own_files(model, format, export).items():
            (folder / name).write_text(text, encoding="utf-8")
        add_files(folder)
    return Path(directory)


def _write_model(model: Any, export: Export, folder: Path, max_shard_size: int | str) -> None:
    """Let transformers write config, weights and index, from a stand-in that spares the caller's model."""
    stand_in = copy.copy(model)  # shares every module; only the attributes set below differ
    stand_in.config = copy.deepcopy(model.config)
    stand_in.hf_quantizer = None
    stand_in.__dict__.pop(
        "hf_device_map", None
    )  # the state is complete: nothing is to be fetched from a store
    if export.quantization_config is None:
        if hasattr(stand_in.config, "quantization_config"):
            del stand_in.config.quantization_config
    else:
        stand_in.config.quantization_config = export.quantization_config
    if export.own_names:
        stand_in._weight_conversions = []
    elif not getattr(model, "_weight_conversions", None):
        stand_in._weight_conversions = None  # transformers looks the family's conversions up
    stand_in.save_pretrained(folder, state_dict=export.state, max_shard_size=max_shard_size)
    _drop_parameter_count(folder / INDEX)


def _drop_parameter_count(index: Path) -> None:
    """Leave out of a shard index what counts the parameters in memory: packed layers have none there."""
    if not index.is_file():
        return
    entries = json.loads(index.read_text(encoding="utf-8"))
    entries.get("metadata", {}).pop("total_parameters", None)
    index.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _own_files(model: nn.Module, format: str, export: Export) -> dict[str, str]:
    facts = {
        "format": format,
        "version": export.version,
        "packed_layers": export.packed,
        "architecture": type(model).__name__,
    }
    return {
        MARKER: json.dumps(facts, indent=2, sort_keys=True) + "\n",
        "README.md": model_card(
            type(model).__name__, format if export.packed else "dense", export.packed, structure_of(model)
        ),
    }


def _sparsity(model: nn.Module, layout: Layout) -> float:
    """Return the fraction of zeros over all linear layers, packed or not."""
    zeros = total = 0.0
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | SparseLinear | CompactLinear):
            size = module.in_features * module.out_features
            zeros += size - layout.nnz[path] if path in layout.nnz else size * layout.dense.get(path, 0.0)
            total += size
    return zeros / total if total else 0.0


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"save_pretrained takes a transformers model, got {type(model).__name__}: "
            "it has no config to save; keep its state_dict() with safetensors instead"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    method = QUANT_METHOD if quantizer is None else str(quantizer.quantization_config.quant_method)
    if method != QUANT_METHOD:
        raise ValueError(f"the model is quantized ({method}): sparse and quantized together is not supported")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries adapters: merge or unload them, then save")


def _check_names(texts: Mapping[str, str]) -> None:
    for name in texts:
        if name != Path(name).name or name in ("", ".", ".."):
            raise ValueError(f"extra_files: '{name}' must be a plain file name, without folders")
        if name in ("config.json", MARKER) or Path(name).suffix == ".safetensors":
            raise ValueError(f"extra_files: '{name}' is a file that save_pretrained itself writes")
