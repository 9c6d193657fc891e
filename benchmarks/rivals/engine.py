"""What a competitor is: how it keeps a weight, and how it multiplies by it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Storage:
    """How a weight [out, in] lies in memory; engines with one storage take turns on the same copies."""

    name: str
    pack: Callable[[Tensor], Any]  # always new memory, so that copies are cold when their turn comes
    nbytes: Callable[[Any], int]  # what one product reads of it
    dtype: torch.dtype | None = None  # None: the weight's own


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to compute ``x W^T`` for x [tokens, in]; input and output conversions are not timed."""

    name: str
    storage: Storage
    multiply: Callable[[Any, Any], Any]  # (packed weight, prepared input)
    prepare: Callable[[Tensor], Any] = lambda x: x
    finish: Callable[[Any], Tensor] | None = lambda y: y  # to [tokens, out]; None: computes something else
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext  # in force while the engine runs
