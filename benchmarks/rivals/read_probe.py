"""No competitor but the yardstick: how fast this machine reads the dense weights, adding them up and no more.

Of torch's reductions the sum of 64-bit integers reads fastest; an engine that beats it would show that the
memory is faster than the figure says, never that it is slower.
"""

from __future__ import annotations

import torch

from rivals.engine import Engine
from rivals.torch_dense import DENSE

READ_PROBE = Engine("read probe", DENSE, lambda weight, x: weight.view(torch.int64).sum(), finish=None)
