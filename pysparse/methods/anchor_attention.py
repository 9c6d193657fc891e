"""AnchorAttention (Zhang et al. 2025, arXiv 2505.23520): stripes of keys near enough to the row's likely maximum."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pysparse.attention import Attended, AttentionInput, AttentionPlan, selected_density
from pysparse.attention.checks import check_count
from pysparse.ops.attention import (
    AnchorRegion,
    StripeRule,
    anchor_attention,
    anchor_state,
    check_pools,
    identify_stripes,
)


@dataclass(frozen=True, slots=True)
class AnchorAttention:
    """Compute the first keys and a local window exactly; elsewhere the keys within ``theta`` of the row maximum.

    A group of ``group_size`` query rows shares one list of single keys. A key joins it when for one of the group's
    pooled rows (means over ``step`` equal parts) its logit is at most ``theta`` (natural units) below the pooled
    maximum over the anchor region. +inf computes everything, -inf the anchor region alone.

    ``init`` and ``local`` are the keys at the start, and before the group, that are always computed. A smaller
    group makes the region that is always dense smaller, which is what limits the gain below 16k keys. With
    ``share_kv`` the query heads of one key head compute the union of their lists.

    Differs from the paper: the anchor region and the candidates are exact complements (the released kernels count
    some keys twice and never visit others), and the comparison is in float32. Rows of a group that is complete
    in the call do not depend on what follows it; with chunked prefill make chunks a multiple of the group.
    """

    theta: float = 12.0
    group_size: int = 1024
    step: int = 16  # pooled rows of a group
    init: int = 128
    local: int = 128
    share_kv: bool = False

    def __post_init__(self) -> None:
        for name in ("group_size", "step", "init", "local"):
            check_count(name, getattr(self, name))
        check_pools(self.region, self.rule)

    @property
    def region(self) -> AnchorRegion:
        """The keys that are always computed."""
        return AnchorRegion(self.group_size, self.init, self.local)

    @property
    def rule(self) -> StripeRule:
        """Which of the others are stripes."""
        return StripeRule(self.theta, self.step, self.share_kv)

    @property
    def crossover(self) -> int:
        """Two groups: before them most pairs lie in the anchor region."""
        return 2 * self.group_size + self.init + self.local

    def plan(self, given: AttentionInput) -> AttentionPlan:
        """Return the anchor region with its state, and the stripes."""
        q, k, scale, offset, valid = given.query, given.key, given.scale, given.q_offset, given.key_range
        carry = anchor_state(q, k, given.value, self.region, scale=scale, q_offset=offset, key_range=valid)
        stripes = identify_stripes(
            q, k, carry.max, self.region, self.rule, scale=scale, q_offset=offset, key_range=valid
        )
        return AttentionPlan(stripes=stripes, region=self.region, carry=carry)

    def estimate(self, given: AttentionInput) -> float:
        """Return the density to expect, from the stripes of the last group's worth of rows: a few percent of the work.

        One query head speaks for all of its key head, unless they share their stripes. Rows further up see fewer
        candidates and choose alike; where no row has a candidate all is computed: 1.
        """
        skipped = max(0, given.query.shape[2] - self.group_size)
        ratio = given.query.shape[1] // given.key.shape[1]
        rows = given.query[:, :: 1 if self.share_kv else ratio, skipped:]
        last = AttentionInput(
            rows, given.key, given.value, given.scale, given.q_offset + skipped, given.key_range
        )
        always = selected_density(last, region=self.region)
        if always >= 1:
            return 1.0
        kept = (self.plan(last).density(last) - always) / (1 - always)
        base = selected_density(given, region=self.region)
        return base + kept * (1 - base)

    def attend(self, given: AttentionInput) -> Attended:
        """Do it all in one pass, in which a group's state stays in the cache."""
        start = time.perf_counter()
        out, lse, stripes = anchor_attention(
            given.query, given.key, given.value, self.region, self.rule,
            scale=given.scale, q_offset=given.q_offset, key_range=given.key_range,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        return Attended(out, lse, selected_density(given, stripes=stripes, region=self.region), 0.0, seconds)
