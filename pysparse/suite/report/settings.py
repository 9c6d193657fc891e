"""What a grid sets for its recipes beyond method, allocation and reconstruction, which records do not hold."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pysparse.suite.report.rows import Record

_RECORDED = ("method", "allocation", "reconstruction")
PLAIN = "nothing else"


def with_settings(records: Iterable[Record], grid: Path) -> list[dict[str, Any]]:
    """Return the records with a key ``settings``, such as "recalibrate=True"; as they are where there is no ``grid``.

    ``grid`` is the copy that a run keeps in its folder. Raises ValueError for a file that is no grid.
    """
    if not grid.is_file():
        return [dict(record) for record in records]
    try:
        recipes = tomllib.loads(grid.read_text(encoding="utf-8")).get("recipes", {})
        said = {name: _shown(recipe) for name, recipe in recipes.items()}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{grid} is no grid: {error}") from None
    return [{**record, "settings": said.get(record["recipe"], PLAIN)} for record in records]


def settings_of(record: Record) -> str:
    """Return the settings of a record from :func:`with_settings`; PLAIN for one without."""
    return str(record.get("settings") or PLAIN)


def _shown(recipe: dict[str, Any]) -> str:
    others = sorted(
        (key, value) for key, value in recipe.items() if key not in _RECORDED and value is not False
    )
    return ", ".join(f"{key}={value}" for key, value in others) or PLAIN
