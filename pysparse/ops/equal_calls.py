"""Equal calls of the products of GPU kernels in a graph of Inductor's are one call.

Inductor drops equal operations of torch's own only, and where gradients are asked for. Layers of one
:class:`pysparse.nn.stacked.RowStack` each ask for the product of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pysparse.ops import cuda

_PRODUCTS = frozenset(
    getattr(torch.ops.pysparse, name).default for name in cuda.OPERATIONS if name.endswith("_linear")
)


def merge_equal_calls(graph: fx.Graph) -> int:
    """Let later calls of a product with the same inputs use the first one's result; return how many went.

    ``graph`` is functional, as Inductor's are at this point: an input that was written to in between is another node.
    """
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _PRODUCTS:
            continue
        key = node.target, node.args, tuple(sorted(node.kwargs.items()))
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            merged += 1
    return merged


def let_inductor_merge() -> None:
    """Have Inductor run :func:`merge_equal_calls` on each graph from now on, after a pass that is there already.

    The pass holds for the whole process and concerns graphs with such products only. Once is enough; a pass that is
    set in its place later takes ours away, and equal products are then computed as often as they are asked for.
    """
    from torch._inductor import config  # not before it is needed: Inductor takes long to import
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Merge(CustomGraphPass):
        def __init__(self, before: Any) -> None:
            self.before = before

        def __call__(self, graph: fx.Graph) -> None:
            if self.before is not None:
                self.before(graph)
            merge_equal_calls(graph)

        def uuid(self) -> Any:
            """Identify the pass in Inductor's caches; None, and no caching, beside a pass that has no such word."""
            own = get_hash_for_files((__file__,))
            if self.before is None:
                return own
            others = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
            return None if others is None else (own, others)

    present = config.post_grad_custom_pre_pass
    if type(present).__qualname__ != Merge.__qualname__:
        config.post_grad_custom_pre_pass = Merge(present)
