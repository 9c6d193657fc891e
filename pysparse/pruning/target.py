"""The sparsity that was asked for, checked."""

from __future__ import annotations

from typing import Any

from pysparse.pruning.recipe import MaskStructure

DEFAULT_SPARSITY = 0.5


def check_sparsity(sparsity: Any) -> float:
    """Return ``sparsity`` if it is in [0, 1); ValueError otherwise, and percentages get the fraction they meant."""
    text = str(sparsity)
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"sparsity is a fraction between 0 and 1, got {sparsity!r}") from None
    if isinstance(sparsity, str | bool) or not 0.0 <= value < 1.0:
        percent = 2.0 <= value < 100.0 and not isinstance(sparsity, bool)
        hint = f"; did you mean {value / 100:g}?" if percent else ""
        raise ValueError(f"sparsity is a fraction between 0 (all kept) and 1 (excluded), got {text}{hint}")
    return value


def resolve_sparsity(structure: MaskStructure, sparsity: float | None) -> float:
    """Return the target: ``sparsity``, or what the structure fixes, or 0.5.

    Raises ValueError when ``sparsity`` is out of range or contradicts the structure.
    """
    fixed = structure.fixed_sparsity
    if sparsity is None:
        return DEFAULT_SPARSITY if fixed is None else fixed
    value = check_sparsity(sparsity)
    if fixed is not None and abs(value - fixed) > 1e-6:
        raise ValueError(
            f"sparsity={value:g} contradicts the pattern {structure}, which keeps n of m and so has sparsity "
            f"{fixed:g}: leave sparsity out, or choose another pattern"
        )
    return value if fixed is None else fixed
