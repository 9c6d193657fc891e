"""Whether someone other than the processor follows the operations now: addresses must then stay out of sight."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Tell whether torch is compiling, exporting, tracing or transforming what runs in this thread.

    Plain tensors then stand for others (``torch.jit.trace``, ``make_fx``, ``torch.export``, ``torch.func.vmap``) or a
    dispatch mode counts what is called: a kernel reached past torch's dispatcher would be missing in the result.
    """
    # Under torch.compile the first answer is a constant of the graph, and nothing else is asked.
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
    )
