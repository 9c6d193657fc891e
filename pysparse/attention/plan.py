"""What a planner is asked, what it answers, and the product over its answer.

A planner looks at queries and keys and says which pairs are to be computed; one set of compiled kernels computes
them. So planners differ in what they select, never in how fast their selection is multiplied.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pysparse.attention.density import Bounds, block_pairs, causal_pairs, region_pairs, stripe_pairs
from pysparse.formats.stripe import BlockIndex, StripeIndex
from pysparse.ops.attention import (
    AnchorRegion,
    block_sparse_attention,
    block_sparse_state,
    flash_attention,
    stripe_attention,
)
from pysparse.ops.attention_state import AttentionState


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInput:
    """One causal attention call: the last rows of a sequence against all of its keys.

    ``query`` [B, Hq, N, D], ``key`` and ``value`` [B, Hk, M, D]. Query row i stands at key index ``q_offset + i``;
    with ``key_range`` (int64 [B, 2] on the CPU) the keys of sequence b are [start, end), the rest is padding.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    q_offset: int
    key_range: Tensor | None = None

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        key_range: Tensor | None = None,
    ) -> AttentionInput:
        """Take the query rows as the last of the keys, and D^-1/2 for a missing ``scale``."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return cls(query, key, value, scale, key.shape[2] - query.shape[2], key_range)

    def bounds(self) -> list[Bounds]:
        """Return for each sequence where its rows and keys lie, counted from its first valid key."""
        rows, keys = self.query.shape[2], self.key.shape[2]
        ranges = [[0, keys]] * len(self.query) if self.key_range is None else self.key_range.tolist()
        found = []
        for start, stop in ranges:
            first = max(self.q_offset, start)
            end = max(first, min(self.q_offset + rows, stop))
            found.append(Bounds(start, first - start, end - start))
        return found

    def sequences(self) -> list[tuple[Tensor, Tensor, int]]:
        """Return (query [Hq, n, D], key [Hk, m, D], offset) of each sequence, without padding; n = m - offset."""
        parts = []
        for b, where in enumerate(self.bounds()):
            first = where.start + where.first - self.q_offset
            query = self.query[b, :, first : first + where.end - where.first]
            parts.append((query, self.key[b, :, where.start : where.start + where.end], where.first))
        return parts


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """The pairs to compute: key blocks, stripes, an anchor region, or several of them, which must be disjoint.

    ``carry`` is the state over ``region``, computed while planning; it is continued, not computed again.
    """

    blocks: BlockIndex | None = None
    stripes: StripeIndex | None = None
    region: AnchorRegion | None = None
    carry: AttentionState | None = None

    def __post_init__(self) -> None:
        if (self.region is None) != (self.carry is None):
            raise ValueError("an anchor region comes with the state over it")
        if self.blocks is None and self.stripes is None:
            raise ValueError("a plan without blocks or stripes computes nothing")
        if self.blocks is not None and self.region is not None:
            raise ValueError("blocks and an anchor region overlap: their keys would count twice")

    def pairs(self, given: AttentionInput) -> int:
        """Return how many (query row, key) pairs the plan computes, over all query heads."""
        return _pairs(given, self.blocks, self.stripes, self.region)

    def density(self, given: AttentionInput) -> float:
        """Return computed pairs over causal pairs; 0 where there is no pair at all."""
        return selected_density(given, self.blocks, self.stripes, self.region)


@runtime_checkable
class Planner(Protocol):
    """Chooses the pairs of one attention call."""

    @property
    def crossover(self) -> int:
        """Keys below which exact attention is at least as fast: calls that see fewer are not planned."""
        ...

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return what to compute; ValueError for inputs that the method cannot serve."""
        ...


def check_planner(value: object) -> None:
    """Raise ValueError for what is no planner: it lacks ``plan`` or ``crossover``, or is the class of one."""
    if isinstance(value, type) or not isinstance(value, Planner):
        raise ValueError(
            f"{value!r} is no planner: an object with plan(given) and crossover, or a planner's name"
        )


@runtime_checkable
class Fused(Protocol):
    """A planner that can choose and compute in one pass, faster than one after the other."""

    def attend(self, given: AttentionInput) -> Attended:
        """Return what :func:`attend` returns, with ``select_seconds`` of 0: the pass is not divided."""
        ...

    def estimate(self, given: AttentionInput) -> float:
        """Return the density to expect, at a small share of the cost: in one pass there is no time to turn back."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """Result of one call: out [B, Hq, N, D], log-sum-exp [B, Hq, N], the share computed, and where time went."""

    out: Tensor
    lse: Tensor
    density: float
    select_seconds: float
    compute_seconds: float
    dropped: bool = False  # the plan was too dense, and exact attention was computed instead


def selected_density(
    given: AttentionInput,
    blocks: BlockIndex | None = None,
    stripes: StripeIndex | None = None,
    region: AnchorRegion | None = None,
) -> float:
    """Return computed pairs over causal pairs; 0 where there is no pair at all."""
    whole = given.query.shape[1] * sum(causal_pairs(one) for one in given.bounds())
    return _pairs(given, blocks, stripes, region) / whole if whole else 0.0


def _pairs(
    given: AttentionInput, blocks: BlockIndex | None, stripes: StripeIndex | None, region: AnchorRegion | None
) -> int:
    heads, bounds = given.query.shape[1], given.bounds()
    total = 0 if region is None else heads * sum(region_pairs(region, one) for one in bounds)
    if stripes is not None:
        total += stripe_pairs(stripes, bounds) * (heads // stripes.shape[1])
    if blocks is not None:
        total += block_pairs(blocks, bounds) * (heads // blocks.shape[1])
    return total


def execute(given: AttentionInput, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Return (out [B, Hq, N, D], log-sum-exp [B, Hq, N]) of attention over the pairs of ``plan``."""
    q, k, v = given.query, given.key, given.value
    scale, offset, valid = given.scale, given.q_offset, given.key_range
    if plan.stripes is None:
        assert plan.blocks is not None
        return block_sparse_attention(q, k, v, plan.blocks, scale=scale, q_offset=offset, key_range=valid)
    state = plan.carry
    if plan.blocks is not None:
        state = block_sparse_state(q, k, v, plan.blocks, scale=scale, q_offset=offset, key_range=valid)
    return stripe_attention(q, k, v, plan.stripes, state, scale=scale, q_offset=offset, key_range=valid)


def attend(given: AttentionInput, planner: Planner, max_density: float = math.inf) -> Attended:
    """Plan and compute; a plan denser than ``max_density`` is dropped for exact attention, which is faster then."""
    start = time.perf_counter()
    plan = planner.plan(given)
    density = plan.density(given)
    chosen = time.perf_counter()
    dropped = density > max_density
    out, lse = dense(given) if dropped else execute(given, plan)
    seconds = time.perf_counter() - chosen
    return Attended(out, lse, 1.0 if dropped else density, chosen - start, seconds, dropped)


def dense(given: AttentionInput) -> tuple[Tensor, Tensor]:
    """Return (out [B, Hq, N, D], log-sum-exp [B, Hq, N]) of exact attention by the compiled kernel."""
    return flash_attention(
        given.query,
        given.key,
        given.value,
        scale=given.scale,
        q_offset=given.q_offset,
        key_range=given.key_range,
    )
