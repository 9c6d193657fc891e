"""pysparse makes a model sparse, and makes the sparsity pay.

Importing it tells transformers how to read sparse checkpoints, so that plain ``AutoModel....from_pretrained``
takes them; everything else is imported at first use.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysparse.api import (
        adapt,
        attention_stats,
        benchmark,
        benchmark_shape,
        doctor,
        evaluate,
        kernel_info,
        merge_and_sparsify,
        plan_prune,
        prune,
        report,
    )
    from pysparse.huggingface import CheckpointError, convert, from_pretrained, save_pretrained
    from pysparse.huggingface.attention import attention_options, use_attention
    from pysparse.huggingface.decoding import prepare_decoding_
    from pysparse.nn import DenseLinear, Packing, SparseLinear, densify_, sparsify_

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DenseLinear",
    "Packing",
    "SparseLinear",
    "__version__",
    "adapt",
    "attention_options",
    "attention_stats",
    "benchmark",
    "benchmark_shape",
    "convert",
    "densify_",
    "doctor",
    "evaluate",
    "from_pretrained",
    "kernel_info",
    "merge_and_sparsify",
    "plan_prune",
    "prepare_decoding_",
    "prune",
    "report",
    "save_pretrained",
    "sparsify_",
    "tune_attention",
    "use_attention",
]

_ROOMS = {
    "pysparse.api": (
        "adapt", "attention_stats", "benchmark", "benchmark_shape", "doctor", "evaluate", "kernel_info",
        "merge_and_sparsify", "plan_prune", "prune", "report", "tune_attention",
    ),
    "pysparse.huggingface": ("CheckpointError", "convert", "from_pretrained", "save_pretrained"),
    "pysparse.huggingface.attention": ("attention_options", "use_attention"),
    "pysparse.huggingface.decoding": ("prepare_decoding_",),
    "pysparse.nn": ("DenseLinear", "Packing", "SparseLinear", "densify_", "sparsify_"),
}  # fmt: skip
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

logging.getLogger("pysparse").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Make the format known to transformers; a missing or too old one leaves the rest of the package usable."""
    try:
        importlib.import_module("pysparse.huggingface.quantizer")
        importlib.import_module("pysparse.huggingface.registration").register_attention()
    except Exception as error:  # whatever an unknown transformers throws: importing pysparse must not fail
        warnings.warn(
            f"sparse checkpoints cannot be loaded: transformers >= 5.0, < 6 is needed "
            f"({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=3,
        )


_register()
