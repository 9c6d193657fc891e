"""Floor 6: sparse attention for prefill: what a planner is, what is computed of its plan, and what it costs.

The planners themselves (AnchorAttention, ProxyAttn, the baselines) are floor 7: ``pysparse.methods.PLANNERS``.
"""

from pysparse.attention.dispatch import AttentionOptions, run_attention
from pysparse.attention.log import AttentionLog
from pysparse.attention.plan import (
    Attended,
    AttentionInput,
    AttentionPlan,
    Fused,
    Planner,
    attend,
    dense,
    execute,
    selected_density,
)

__all__ = [
    "Attended",
    "AttentionInput",
    "AttentionLog",
    "AttentionOptions",
    "AttentionPlan",
    "Fused",
    "Planner",
    "attend",
    "dense",
    "execute",
    "run_attention",
    "selected_density",
]
