"""Registers our attention when transformers imports its model code: ``import pysparse`` does not wait for that."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "pysparse_"  # of all our implementations
_PLUGIN = "pysparse.huggingface.attention"
_MODELS = "transformers.modeling_utils"  # every model imports it
_FLASH_TEST = "is_flash_attention_requested"


def register_attention() -> None:
    """Register now if transformers' model code is there already, else as soon as it is."""
    if _MODELS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    try:
        _claim_names(PREFIX)
        if _PLUGIN not in sys.modules:  # it registers itself when it is imported, which may be going on
            importlib.import_module(_PLUGIN)
    except Exception as error:  # whatever an unknown transformers throws: models must load all the same
        warnings.warn(
            f"attn_implementation='pysparse_...' is not available ({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )


def _claim_names(prefix: str) -> None:
    """Let ``pysparse_flash`` be ours: transformers takes any name with "flash" in it for the flash-attn package.

    It would then look for that package and refuse. Its test is a function that several modules hold by name.
    """
    generic = importlib.import_module("transformers.utils.generic")
    original: Callable[..., bool] | None = getattr(generic, _FLASH_TEST, None)
    if original is None or hasattr(original, "__wrapped__"):
        return  # a release that asks otherwise, or done already

    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, **further: Any
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        if isinstance(name, str) and name.startswith(prefix):
            return False
        return original(config, requested_attention_implementation, **further)

    is_flash_attention_requested.__wrapped__ = original  # type: ignore[attr-defined]
    for module in [m for name, m in sys.modules.items() if name.startswith("transformers.")]:
        if vars(module).get(_FLASH_TEST) is original:
            setattr(module, _FLASH_TEST, is_flash_attention_requested)


class _Watch(MetaPathFinder):
    """Waits for the model code and then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads a module as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
