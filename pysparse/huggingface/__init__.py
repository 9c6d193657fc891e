"""Floor 8: load and save sparse models by Hugging Face's own names and files.

``quantizer`` registers the format with transformers when it is imported. The rest comes at first use: it
pulls in transformers' model code, which ``import pysparse`` should not wait for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pysparse.huggingface.layout import CheckpointError, Layout

if TYPE_CHECKING:
    from pysparse.huggingface.loading import convert, from_pretrained
    from pysparse.huggingface.saving import save_pretrained

__all__ = ["CheckpointError", "Layout", "convert", "from_pretrained", "save_pretrained"]

_LAZY = {"convert": "loading", "from_pretrained": "loading", "save_pretrained": "saving"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
