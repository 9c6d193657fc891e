"""Name layers: by class, by module path, by a glob or a regular expression over the path."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from torch import nn


def class_names(module: nn.Module) -> set[str]:
    """Return the names that ``module`` answers to: its class and all bases.

    GPT-2's Conv1D and packed layers are a Linear too.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    return names | {"Linear"} if names & {"Conv1D", "SparseLinear", "CompactLinear"} else names


def matches(module: nn.Module, path: str, patterns: Sequence[str]) -> bool:
    """Tell whether a class name, a module path, its last parts, a glob or a ``re:`` expression names ``module``.

    Globs (with ``*``, ``?`` or ``[``) match the whole path or its last parts; ``*`` runs across dots.

    Raises ValueError for a ``re:`` expression that does not compile.
    """
    names = class_names(module)
    return any(_matches_one(names, path, pattern) for pattern in patterns)


def _matches_one(names: set[str], path: str, pattern: str) -> bool:
    if not pattern.startswith("re:") and any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
    if not pattern.startswith("re:"):
        return pattern in names or path == pattern or path.endswith("." + pattern)
    try:
        return re.search(pattern[3:], path) is not None
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
