"""The plug-in by which transformers' own ``from_pretrained`` and ``save_pretrained`` read and write our format.

While transformers loads, each packed layer is a placeholder; its tensors are left to :class:`Checkpoint`,
which checks them, and the finished :class:`SparseLinear` takes the placeholder's seat. So no release's rules
about mismatched or missing tensors stand between a file and the kernels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pysparse import backend
from pysparse.formats import BitmapTensor, Int8Bitmap
from pysparse.formats.bitmap import VALUE_DTYPES
from pysparse.huggingface.fitting import Fit, PackedLayer, PackedTensor, kept_in_float32
from pysparse.huggingface.layout import (
    BITMASK,
    PARTS,
    QUANT_METHOD,
    SCALES,
    TRIPWIRE,
    CheckpointError,
    Layout,
)
from pysparse.huggingface.packing import packed_state_dict
from pysparse.huggingface.reader import Checkpoint
from pysparse.nn import CompactLinear, DenseLinear, Packing, SparseLinear, densify_, fuse_
from pysparse.nn.convert import on_conversion
from pysparse.nn.packing import RowMajor
from pysparse.nn.structure import apply_structure, structure_of

_NAMES = (*PARTS[BITMASK], SCALES, TRIPWIRE)

# Set by from_pretrained(ignore_mismatched_sizes=True), which transformers does not tell a quantizer.
ALLOW_OTHER_SHAPES: ContextVar[bool] = ContextVar("pysparse_allow_other_shapes", default=False)

# Set by from_pretrained(fuse=...): whether layers that share an input are computed in fewer calls.
FUSE: ContextVar[bool] = ContextVar("pysparse_fuse", default=False)


@register_quantization_config(QUANT_METHOD)
class PysparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a sparse checkpoint, as an object that transformers passes around."""

    quant_method: Any = QUANT_METHOD  # transformers' own are of an enum that plug-ins cannot extend

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build the config from config.json; CheckpointError for what is not in the format."""
        config = cls(Layout.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return self.layout.to_dict()

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry of config.json: transformers asks so when it is handed the config of a loaded model."""
        return self.to_dict().get(name, default)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class Placeholder(nn.Module):
    """Holds a packed layer's seat, and its bias, until the packed weight is read."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Not a parameter, so that no loader looks for it; initialisers of parent modules may touch it.
        self.weight = linear.weight.data
        self.register_parameter("bias", linear.bias)


@register_quantizer(QUANT_METHOD)
class PysparseQuantizer(HfQuantizer):
    """Loads and saves models with packed linear layers; nothing is quantized, values keep their bits."""

    quantization_config: PysparseConfig
    requires_calibration = True  # a dense checkpoint cannot be loaded with this config: prune it first

    def __init__(self, quantization_config: PysparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._layers: list[PackedLayer] = []
        self._tensors: list[PackedTensor] = []
        self._expected: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work; without the compiled kernels a model still runs, slowly."""
        device_map = kwargs.get("device_map")
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        if "disk" in places:
            raise ValueError(
                "device_map: packed layers cannot be offloaded to disk; leave out 'disk', or load with "
                'pysparse.from_pretrained(..., format="dense") and offload that'
            )
        if "meta" in map(str, places):
            raise ValueError(
                "device_map: packed weights are read from their files, so there is no loading to 'meta'; load to 'cpu' "
                "and then model.to('meta')"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return ``dtype``; ValueError for one that packed values have no form for."""
        if dtype not in VALUE_DTYPES and self.quantization_config.layout.nnz:
            names = ", ".join(str(held).removeprefix("torch.") for held in VALUE_DTYPES)
            raise ValueError(
                f"dtype {str(dtype).removeprefix('torch.')}: packed layers hold {names}; load with one of these, then "
                f"pysparse.densify_(model).to({dtype})"
            )
        return dtype

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained: gradients flow through packed layers, their weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are custom operators on plain tensors: torch.compile takes them whole."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``model.save_pretrained`` writes the packed format again."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            raise ValueError(
                "a packed checkpoint is read from its files: from_pretrained(folder), not from state_dict=...; "
                "to fill an existing model use model.load_state_dict(...)"
            )
        layout = self.quantization_config.layout
        _restructure(model, layout)
        self._checkpoint = Checkpoint(checkpoint_files)
        fit = Fit(model, self._checkpoint, layout)
        self._layers, self._tensors = fit.packed()
        for layer in self._layers:
            model.set_submodule(layer.path, Placeholder(model.get_submodule(layer.path)))
        expected = model.state_dict()
        ours = {tensor.name for tensor in self._tensors}
        tied = {name for name, source in model.all_tied_weights_keys.items() if source in ours}
        fit.check_dense(
            {n: t for n, t in expected.items() if n not in ours}, shapes=not ALLOW_OTHER_SHAPES.get()
        )
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
        stored = [layer.stored for layer in self._layers] + [tensor.stored for tensor in self._tensors]
        _ignore(model, "_keys_to_ignore_on_load_unexpected", stored, rf"\.(?:{'|'.join(_NAMES)})")
        _ignore(model, "_keys_to_ignore_on_load_missing", ours | tied, "")
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            raise RuntimeError("weights were loaded without the step that prepares the model for them")
        _settle(model, self._expected)
        layout = self.quantization_config.layout
        for layer in self._layers:
            rows = checkpoint.read(layer.stored, layout, layer.shape)
            _seat(model, layer.path, rows, layout.packings.get(layer.stored, Packing()))
        for tensor in self._tensors:
            weight = checkpoint.read(tensor.stored, layout, tensor.shape).to_dense().view(tensor.shape)
            model.get_parameter(tensor.name).data.copy_(weight)
        if self._tensors:
            model.tie_weights()  # transformers unties what it finds in no file
        for path, module in list(model.named_modules()):
            if path and type(module) is nn.Linear:
                model.set_submodule(path, DenseLinear.from_linear(module))
        if FUSE.get():
            fuse_(model)
        # Names on disk are the model's own: nothing is to be renamed back when it is saved.
        model._weight_conversions = []
        nnz = {layer.path: layout.nnz[layer.stored] for layer in self._layers}
        packings = {
            layer.path: layout.packings[layer.stored]
            for layer in self._layers
            if layer.stored in layout.packings
        }
        self._set_layout(model, Layout(nnz, layout.dense, packings=packings, structure=structure_of(model)))
        model.is_quantized = bool(nnz)  # of a smaller dense model all weights can be trained
        self._layers, self._tensors, self._expected = [], [], {}
        return model

    def _set_layout(self, model: Any, layout: Layout) -> None:
        self.quantization_config = PysparseConfig(layout)
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, str]]:
        """Return what ``model.save_pretrained`` writes, and renew the config that goes beside it."""
        state, layout = packed_state_dict(model)
        self._set_layout(model, layout)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        packed = [
            path for path, module in model.named_modules() if isinstance(module, SparseLinear | CompactLinear)
        ]
        densify_(model)
        for path in packed:
            model.get_submodule(path).weight.requires_grad_(True)  # as transformers loads it
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions  # an ordinary model again: let transformers name things
        return model if dtype is None else model.to(dtype)


def _restructure(model: Any, layout: Layout) -> None:
    """Give the model, made from its config, the structure that the layout says; its weights are still to come."""
    if layout.structure is None:
        return
    try:
        apply_structure(model, layout.structure, f"{model.base_model_prefix}.")
    except ValueError as error:
        raise CheckpointError(f"config.json: quantization_config.structure: {error}") from None
    _ignore(model, "_keys_to_ignore_on_load_unexpected", layout.structure.removed, r"\..+")


def attach_quantizer(model: Any) -> None:
    """Let the model's own ``save_pretrained`` write its structure, if it has one that its config cannot say."""
    structure = structure_of(model)
    if structure is not None and getattr(model, "hf_quantizer", None) is None:
        model.hf_quantizer = PysparseQuantizer(PysparseConfig(Layout({}, structure=structure)))


def follow_conversion(model: nn.Module) -> None:
    """Let transformers' models in ``model`` save themselves as what :func:`pysparse.sparsify_` made of them.

    Their own ``save_pretrained`` would write packed layers under names that a loader takes for rubbish, and fill the
    layers with random numbers. A model that :func:`pysparse.densify_` made ordinary again is saved as one.
    """
    library = sys.modules.get("transformers.modeling_utils")
    models = [m for m in model.modules() if isinstance(m, library.PreTrainedModel)] if library else []
    for one in models:
        present = getattr(one, "hf_quantizer", None)
        if not any(isinstance(module, SparseLinear | CompactLinear) for module in one.modules()):
            if isinstance(present, _Following):
                present.leave(one)
        elif present is None:
            one.hf_quantizer = _Following(one)


class _Following(PysparseQuantizer):
    """The quantizer of a model that became sparse in memory: it goes when the model is an ordinary one again."""

    def __init__(self, model: Any) -> None:
        super().__init__(PysparseConfig(Layout({}, structure=structure_of(model))))
        self._renamed = vars(model).get("_weight_conversions")
        model._weight_conversions = []  # what is packed goes to disk under the model's own names

    def leave(self, model: Any) -> None:
        model.hf_quantizer = None
        if self._renamed is None:
            del model._weight_conversions
        else:
            model._weight_conversions = self._renamed
        if getattr(model.config, "quantization_config", None) is not None:  # there since it was saved
            del model.config.quantization_config
        attach_quantizer(model)


on_conversion(follow_conversion)


class _Patterns(set[str]):
    """A set that may also be added to a list: transformers 5.0 does the one with it, later releases the other."""

    def __add__(self, other: list[str]) -> list[str]:
        return [*self, *other]


def _ignore(model: Any, attribute: str, names: Iterable[str], suffix: str) -> None:
    """Let transformers' report pass over ``names``, which are ours to load; releases add or lose a prefix."""
    prefix = f"{model.base_model_prefix}."
    expressions = [rf"(?:^|\.){re.escape(name.removeprefix(prefix))}{suffix}$" for name in names]
    setattr(model, attribute, _Patterns((*(getattr(model, attribute) or ()), *expressions)))


def _settle(model: Any, expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Hold transformers to the shapes and dtypes the model was built with.

    Its release 5.0 neither compares shapes nor converts dtypes of renamed tensors where a quantizer is at work.
    """
    patterns = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, tensor in model.state_dict(keep_vars=True).items():
        shape, dtype = expected.get(name, (tensor.shape, tensor.dtype))
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor '{name}' was loaded as {tuple(tensor.shape)}, the model takes {tuple(shape)}; "
                "transformers 5.0 cannot start such a tensor anew in a packed model, later releases can"
            )
        kept = any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
        if tensor.dtype != dtype and dtype.is_floating_point and not kept:
            tensor.data = tensor.data.to(dtype)


def _seat(model: Any, path: str, rows: RowMajor, packing: Packing) -> None:
    """Put the packed layer where its placeholder is, in the dtype and on the device of its surroundings."""
    placeholder = model.get_submodule(path)
    dtype = placeholder.weight.dtype
    if kept_in_float32(model, f"{path}.weight", dtype):
        dtype = torch.float32
    device = _device_around(model, path)
    layer = build_layer(path, rows, packing, placeholder.bias, dtype, device)
    model.set_submodule(path, layer.train(placeholder.training))


def build_layer(
    path: str,
    rows: RowMajor,
    packing: Packing,
    bias: nn.Parameter | None,
    dtype: torch.dtype,
    device: torch.device,
) -> SparseLinear | CompactLinear:
    """Pack checked arrays as config.json says; CheckpointError where they do not keep its pattern."""
    if not packing.is_plain and backend.available() and device.type == "cpu":
        if isinstance(rows, BitmapTensor):
            rows = BitmapTensor(rows.values.to(dtype), rows.bitmask, rows.row_offsets, rows.shape)
        try:
            return CompactLinear(packing.pack(rows), bias, packing.activation_bits, dtype)
        except ValueError as error:
            raise CheckpointError(f"config.json: quantization_config.packings['{path}']: {error}") from None
    if isinstance(rows, Int8Bitmap):
        backend.warn_once(
            f"int8-{device.type}",
            f"int8 values have kernels on the CPU only (here: {device.type}, compiled core "
            f"{'there' if backend.available() else 'missing'}): layers are loaded as the {dtype} numbers that they "
            "stand for, and would be saved so",
        )
        rows = rows.to_bitmap(dtype)
    moved = BitmapTensor(
        rows.values.to(device, dtype), rows.bitmask.to(device), rows.row_offsets.to(device), rows.shape
    )
    return SparseLinear.from_bitmap(moved, bias)


def _device_around(model: nn.Module, path: str) -> torch.device:
    """Return the device of the nearest module above ``path`` that has a tensor."""
    while path:
        tensor: Tensor | None = next(model.get_submodule(path).parameters(), None)
        if tensor is not None:
            return tensor.device
        path = path.rpartition(".")[0]
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
