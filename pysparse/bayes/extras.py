"""What the extra ``pysparse[bayes]`` brings, imported when it is needed."""

from __future__ import annotations

from typing import Any

from pysparse.calib.extras import optional


def extra(module: str) -> Any:
    """Return ``module``; ModuleNotFoundError that names the extra where its package is missing."""
    return optional(module, "bayes")
