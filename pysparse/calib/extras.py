"""Packages of the optional extras, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, extra: str) -> Any:
    """Return ``module``; ModuleNotFoundError that names the extra where its package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"this needs the package {package}: pip install 'pysparse[{extra}]'", name=error.name
        ) from error
