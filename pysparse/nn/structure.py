"""A model with narrower layers and without some attention modules: what differs from its config, and how to make it so.

A removed attention leaves :class:`NoAttention` in its seat, which computes nothing: the block's own code adds
:class:`Nothing` to the residual stream and gets the same tensor back. Norms that served the attention alone become
:class:`PassThrough`. The attentions that stay are numbered anew, so that cache slots 0, 1, ... are all filled:
transformers reads the sequence length from the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ATTRIBUTE = "pysparse_structure"  # of the model, beside its modules
_SIZES = {0: ("out_features", "nf"), 1: ("in_features", "nx")}  # of Linear and Conv1D, by side of the product
_KEYS = {"removed", "idle", "slots", "shapes", "outputs"}
_MOST_OUTPUTS = 8  # of an attention module: two in every family so far


class Nothing:
    """What a removed attention adds to the residual stream: x + nothing is x itself, not a copy of it."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDITIONS:
            return args[1] if isinstance(args[0], cls) else args[0]
        if func is functional.dropout:
            return args[0] if args else kwargs["input"]
        raise TypeError(f"the output of a removed attention is only to be added, not passed to {func}")


_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_}
NOTHING = Nothing()


class NoAttention(nn.Module):
    """In the seat of a removed attention module; takes whatever it took and returns as many values."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.outputs = outputs  # 1: the bare output, else a tuple of it and Nones

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return :data:`NOTHING`, or a zero where a compiler traces tensors only (it folds the addition)."""
        output: Any = NOTHING
        if torch.compiler.is_compiling():
            output = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).new_zeros(())
        return output if self.outputs == 1 else (output, *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return "removed"


class PassThrough(nn.Module):
    """In the seat of a norm or dropout that served a removed attention alone; returns its input."""

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ``hidden``."""
        return hidden


@dataclass(frozen=True, slots=True)
class Structure:
    """How a model differs from what its config describes."""

    removed: Mapping[str, str] = field(default_factory=dict)  # attention path -> name of its first parameter
    idle: tuple[str, ...] = ()  # norms and dropouts that served a removed attention alone
    slots: Mapping[str, int] = field(default_factory=dict)  # path of each attention that stays -> cache slot
    shapes: Mapping[str, tuple[int, int]] = field(
        default_factory=dict
    )  # linear -> (out, in), if not as configured
    outputs: int = 2  # values that an attention module returns

    def __bool__(self) -> bool:
        return bool(self.removed or self.shapes)

    @property
    def tripwires(self) -> tuple[str, ...]:
        """Names of parameters of removed modules, an empty tensor each in a file.

        A loader that does not know the structure would find no weight and make one up; so it stops.
        """
        return tuple(f"{path}.{name}" for path, name in self.removed.items())

    @classmethod
    def from_dict(cls, entries: Any) -> Structure:
        """Check ``entries`` (parsed JSON) and build a structure; ValueError names what is wrong."""
        if not isinstance(entries, Mapping) or set(entries) - _KEYS:
            raise ValueError(f"must be an object with entries of {sorted(_KEYS)}, got {_shown(entries)}")
        removed, slots, shapes = (_mapping(entries, name) for name in ("removed", "slots", "shapes"))
        idle, outputs = entries.get("idle", []), entries.get("outputs", 2)
        if not isinstance(idle, list) or not all(isinstance(path, str) and path for path in idle):
            raise ValueError(f"idle must list module paths, got {_shown(idle)}")
        if type(outputs) is not int or not 1 <= outputs <= _MOST_OUTPUTS:
            raise ValueError(f"outputs must be from 1 to {_MOST_OUTPUTS}, got {_shown(outputs)}")
        for path, name in removed.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"removed['{path}'] must name a parameter, got {_shown(name)}")
        _check_slots(slots)
        for path, shape in shapes.items():
            if not (
                isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
            ):
                raise ValueError(f"shapes['{path}'] must be two integers above 0, got {_shown(shape)}")
        return cls(removed, tuple(idle), slots, {p: (s[0], s[1]) for p, s in shapes.items()}, outputs)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "removed": dict(self.removed), "idle": list(self.idle), "slots": dict(self.slots),
            "shapes": {path: list(shape) for path, shape in self.shapes.items()}, "outputs": self.outputs,
        }  # fmt: skip


def _mapping(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = entries.get(name, {})
    if not isinstance(value, Mapping) or not all(isinstance(path, str) and path for path in value):
        raise ValueError(f"{name} must map module paths, got {_shown(value)}")
    return dict(value)


def _check_slots(slots: Mapping[str, Any]) -> None:
    for path, slot in slots.items():
        if type(slot) is not int or not 0 <= slot < 1 << 20:
            raise ValueError(f"slots['{path}'] must be an index from 0, got {_shown(slot)}")
    if len(set(slots.values())) < len(slots):
        raise ValueError("slots gives two attentions one slot of the cache")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Surgery:
    """Changes to the modules of a model that can be taken back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], Any]] = []

    def cut(self, module: nn.Module, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Keep these output and input channels of a Linear or Conv1D (None: all), in the order given."""
        stored: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        axes = (1, 0) if type(module).__name__ == "Conv1D" else (0, 1)  # of outputs and inputs
        weight = stored.detach()
        for side, index in ((0, outputs), (1, inputs)):
            if index is not None:
                weight = weight.index_select(axes[side], index.to(weight.device))
                for name in _SIZES[side]:
                    if hasattr(module, name):
                        self.set(module, name, len(index))
        self._set_parameter(module, "weight", weight.contiguous())
        bias = module._parameters.get("bias")
        if outputs is not None and bias is not None:
            self._set_parameter(module, "bias", bias.detach().index_select(0, outputs.to(bias.device)))

    def _set_parameter(self, module: nn.Module, name: str, value: Tensor) -> None:
        old: nn.Parameter = module._parameters[name]  # type: ignore[assignment]
        self._undo.append(lambda: module._parameters.__setitem__(name, old))
        module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put ``module`` in the seat of the one at ``path``."""
        parent, _, name = path.rpartition(".")
        owner = self.model.get_submodule(parent)
        old = owner._modules[name]
        assert old is not None  # get_submodule of a path that was found in the tree
        self._undo.append(lambda: owner._modules.__setitem__(name, old))
        owner._modules[name] = module.train(old.training)

    def renumber(self, attention: nn.Module, slot: int) -> None:
        """Give ``attention`` the slot ``slot`` of the cache."""
        for module in attention.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                self.set(module, "layer_idx", slot)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        old = getattr(owner, name, None)
        self._undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Take everything back, the last change first."""
        while self._undo:
            self._undo.pop()()


def structure_of(model: nn.Module) -> Structure | None:
    """Return how ``model`` differs from its config, or None; ValueError for traces without a record.

    A record lies on the whole model: a part of it, such as its decoder without the head, has none.
    """
    found: Structure | None = getattr(model, _ATTRIBUTE, None)
    if not found and any(isinstance(module, NoAttention) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} has removed attention modules but no record of its structure: it is part "
            "of another model; save that one"
        )
    return found or None


def record_structure(model: nn.Module, structure: Structure | None, surgery: Surgery | None = None) -> None:
    """Note on ``model`` how it differs from its config."""
    (surgery or Surgery(model)).set(model, _ATTRIBUTE, structure)


def apply_structure(model: nn.Module, structure: Structure, prefix: str = "") -> Structure:
    """Make ``model``, as its config describes it, what ``structure`` says, IN PLACE, and return what was applied.

    Layers keep their first channels: weights are expected to be loaded afterwards. ``prefix`` is what paths of
    a model with a head begin with and those of the bare model do not, or the reverse. Raises ValueError for a
    path that the model does not have, and for a shape larger than the config's.
    """
    modules = dict(model.named_modules())
    places = {path: _place(path, prefix, modules) for path in (*structure.removed, *structure.idle, *structure.slots,
                                                              *structure.shapes)}  # fmt: skip
    for path in structure.shapes:
        _check_shape(path, modules[places[path]], structure.shapes[path])
    surgery = Surgery(model)
    for path, (rows, cols) in structure.shapes.items():
        surgery.cut(modules[places[path]], torch.arange(rows), torch.arange(cols))
    for path, slot in structure.slots.items():
        surgery.renumber(modules[places[path]], slot)
    for path in structure.removed:
        surgery.replace(places[path], NoAttention(structure.outputs))
    for path in structure.idle:
        surgery.replace(places[path], PassThrough())
    applied = Structure(
        {places[path]: name for path, name in structure.removed.items()}, tuple(places[p] for p in structure.idle),
        {places[path]: slot for path, slot in structure.slots.items()},
        {places[path]: shape for path, shape in structure.shapes.items()}, structure.outputs,
    )  # fmt: skip
    record_structure(model, applied)
    return applied


def _place(path: str, prefix: str, modules: Mapping[str, nn.Module]) -> str:
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if candidate in modules:
            return candidate
    raise ValueError(f"the structure names '{_shown(path)[1:-1]}', which the model does not have")


def _check_shape(path: str, module: nn.Module, shape: tuple[int, int]) -> None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise ValueError(f"shapes['{path}'] is given, but a {type(module).__name__} has no weight matrix")
    have = tuple(weight.t().shape if type(module).__name__ == "Conv1D" else weight.shape)
    if any(new > old for new, old in zip(shape, have, strict=True)):
        raise ValueError(f"shapes['{path}'] is {shape}, larger than the {have} of the config")
