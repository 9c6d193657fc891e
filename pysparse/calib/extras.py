"""Packages of the optional extras, imported when they are needed."""

from __future__ import annotations

import importlib
import importlib.util
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


def require(extra: str, *packages: str) -> None:
    """Raise ModuleNotFoundError, naming the extra, for those of ``packages`` that are missing; imports none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        kind = "package" if len(missing) == 1 else "packages"
        raise ModuleNotFoundError(
            f"this needs the {kind} {', '.join(missing)}: pip install 'pysparse[{extra}]'", name=missing[0]
        )
