"""What a recipe sets beyond method, allocation and reconstruction, as text."""

from __future__ import annotations

from collections.abc import Iterable

from pysparse.suite.report.rows import Record

PLAIN = "nothing else"
_CALIBRATION = ("num_samples", "max_length")  # how much data: of no meaning to a recipe that needs none


def settings_of(record: Record) -> str:
    """Return what else the recipe sets, such as "recalibrate=True"; PLAIN when nothing."""
    return _text(record, [key for key in record["settings"] if key not in _CALIBRATION]) or PLAIN


def calibration_of(record: Record) -> str:
    """Return how much calibration data the recipe asks for, such as "num_samples=64"; "" when it does not say."""
    return _text(record, [key for key in _CALIBRATION if key in record["settings"]])


def _text(record: Record, keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={record['settings'][key]}" for key in keys)
