"""Another forward for a module in place: its class becomes one that is mixed from ours and its own."""

from __future__ import annotations

from typing import Any

from torch import nn

_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def check_module(model: object) -> None:
    """Raise TypeError unless ``model`` is a module: its parts are looked for."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module: {str(model)[:80]!r}")


class Mixin(nn.Module):
    """Base of what is mixed into the class of an instance, as ``torch.nn.utils.parametrize`` does.

    Parameters, names, children, hooks and the class's name stay; copies and pickles are mixed as well.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the two classes: the mixed one has no name to be found by."""
        return _new, type(self).__bases__, self.__dict__.copy()

    @classmethod
    def mix(cls, module: nn.Module) -> None:
        """Let ``module`` run by the forward of this class."""
        module.__class__ = _mixed(cls, type(module))

    @staticmethod
    def unmix(module: nn.Module) -> None:
        """Give ``module`` its own class back."""
        module.__class__ = type(module).__bases__[1]


def _mixed(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    if (mixin, base) not in _MIXED:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _MIXED[mixin, base] = type(base.__name__, (mixin, base), names)
    return _MIXED[mixin, base]


def _new(mixin: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    mixed = _mixed(mixin, base)
    return mixed.__new__(mixed)
