"""torch's own dense product, as it comes and with the setting that is best for one token.

As it comes, one token of bf16 goes through oneDNN, which reads the weight at a fraction of the memory's speed.
Without oneDNN torch runs its own matrix-vector loop, two to three times as fast at one token and many times
slower at hundreds, so no user has it on by default; it is here because a speed-up over a weak baseline is
not worth much. For fp32 the two run the same MKL routine.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional

from rivals.engine import Engine, Storage

DENSE = Storage("dense", lambda weight: weight.clone(), lambda weight: weight.nbytes)


def without_onednn() -> AbstractContextManager[Any]:
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)


TORCH = Engine("torch", DENSE, lambda weight, x: functional.linear(x, weight))
TORCH_TUNED = Engine(
    "torch, no oneDNN", DENSE, lambda weight, x: functional.linear(x, weight), setting=without_onednn
)
