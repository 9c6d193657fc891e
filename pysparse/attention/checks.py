"""Checks of planners' settings, before any call is computed."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from pysparse.formats.stripe import LIST_UNIT


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")


def check_block(block: Any) -> None:
    """Raise ValueError unless ``block`` is a number of tokens that the kernels' lists of blocks can have."""
    check_count("block", block, LIST_UNIT)
    if block % LIST_UNIT:
        raise ValueError(f"block={block} is not a multiple of {LIST_UNIT}")
