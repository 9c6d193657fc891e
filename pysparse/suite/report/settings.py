"""What a grid sets for its recipes beyond method, allocation and reconstruction, which records do not hold."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pysparse.suite.report.rows import Record

PLAIN = "nothing else"
_RECORDED = ("method", "allocation", "reconstruction")
_CALIBRATION = ("num_samples", "max_length")  # how much data: of no meaning to a recipe that needs none


def with_settings(records: Iterable[Record], grid: Path) -> list[dict[str, Any]]:
    """Return the records with what ``grid``, the copy that a run keeps in its folder, says of their recipes.

    ``settings`` is text such as "recalibrate=True" and ``calibration`` such as "num_samples=64". Without the file the
    records are as they were. Raises ValueError for a file that is no grid.
    """
    if not grid.is_file():
        return [dict(record) for record in records]
    try:
        recipes = tomllib.loads(grid.read_text(encoding="utf-8")).get("recipes", {})
        said = {name: _told(recipe) for name, recipe in recipes.items()}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{grid} is no grid: {error}") from None
    return [{**record, **said.get(record["recipe"], {})} for record in records]


def settings_of(record: Record) -> str:
    """Return what else the recipe sets; PLAIN when nothing, or when it is not known."""
    return str(record.get("settings") or PLAIN)


def calibration_of(record: Record) -> str:
    """Return how much calibration data the recipe asks for; "" when it does not say."""
    return str(record.get("calibration") or "")


def _told(recipe: Mapping[str, Any]) -> dict[str, str]:
    given = {key: value for key, value in sorted(recipe.items()) if value is not False}
    others = [key for key in given if key not in _RECORDED and key not in _CALIBRATION]
    amounts = [key for key in _CALIBRATION if key in given]
    return {name: ", ".join(f"{key}={given[key]}" for key in keys)
            for name, keys in (("settings", others), ("calibration", amounts))}  # fmt: skip
