"""Sparse-attention planners by the names that people type."""

from __future__ import annotations

from pysparse.attention import Planner
from pysparse.attention.plan import check_planner
from pysparse.methods.anchor_attention import AnchorAttention
from pysparse.methods.flexprefill import FlexPrefill
from pysparse.methods.minference import VerticalSlash
from pysparse.methods.proxy_attention import ProxyAttention
from pysparse.methods.registry import lookup
from pysparse.methods.streaming_attention import StreamingAttention
from pysparse.methods.xattention import XAttention

PLANNERS: dict[str, Planner] = {
    "anchor": AnchorAttention(),
    "proxy": ProxyAttention(),
    "streaming": StreamingAttention(),
    "vertical-slash": VerticalSlash(),
    "flexprefill": FlexPrefill(),
    "xattention": XAttention(),
}


def planner_for(value: Planner | str) -> Planner:
    """Return the planner that ``value`` names, or ``value`` itself; ValueError for what is neither."""
    if isinstance(value, str):
        return lookup("planner", value, PLANNERS)
    check_planner(value)
    return value
