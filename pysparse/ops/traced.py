"""Whether someone other than the processor follows the operations now: addresses must then stay out of sight."""

from __future__ import annotations

import torch
from torch.compiler import is_dynamo_compiling

# By name: the question is asked several times a layer, and looking each of these up takes as long as its answer.
_modes = torch._C._len_torch_dispatch_stack
_tracer = torch._C._get_tracing_state
_transform = torch._C._functorch.maybe_current_level


def is_traced() -> bool:
    """Tell whether torch is compiling, exporting, tracing or transforming what runs in this thread.

    Plain tensors then stand for others (``torch.jit.trace``, ``make_fx``, ``torch.export``, ``torch.func.vmap``) or a
    dispatch mode counts what is called: a kernel reached past torch's dispatcher would be missing in the result.
    """
    # Under torch.compile the first answer is a constant of the graph, and nothing else is asked.
    return is_dynamo_compiling() or _modes() > 0 or _tracer() is not None or _transform() is not None
