"""Queries, keys and values whose attention looks like a trained model's: sinks, a local window, stripes of topics.

For quality figures without a pretrained model. Everything is set in units of logits, so the share of attention
that lies in sinks, near the diagonal and in far columns is known by construction, and each assumption that a
planner makes (that heads share their columns, that neighbouring rows do) has a knob that breaks it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SINKS = 4  # tokens at the start that every row attends to
_PERIODS = 8  # of the local part: geometric between these two
_SHORTEST, _LONGEST = 8.0, 4096.0


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A generator of attention inputs; amplitudes are logits, over a background of N(0, 1).

    Keys carry one coordinate for the sink, one per topic, a rotary-like block for the local window and noise in
    the rest; a random rotation mixes them, so no coordinate is special. Each query row attends to one topic at a
    time and changes it with probability 1/``dwell``: columns of a topic are stripes that many neighbouring rows
    share. A head follows the shared sequence of topics, or with probability ``private`` its own.

    ``structure=False`` gives independent Gaussians: the negative control, in which nothing may be skipped.
    """

    length: int
    query_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    batch: int = 1
    sink: float = 12.0
    local: float = 10.0
    stripe: tuple[float, float] = (9.0, 12.0)  # the logit of an active column lies between them
    stripe_fraction: float = 0.02  # of the keys
    topics: int = 4
    dwell: int = 512  # rows for which a topic stays active, on average
    private: float = 0.2
    sharpness: tuple[float, float] = (0.75, 1.25)  # logits of first and last query head are scaled by it
    structure: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch < 1:
            raise ValueError(f"length={self.length} and batch={self.batch} must be at least 1")
        if self.kv_heads < 1 or self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads={self.query_heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim < self._special + 8:
            raise ValueError(
                f"head_dim={self.head_dim} must be at least {self._special + 8} for topics={self.topics}"
            )
        if not 0 <= self.private <= 1 or not 0 <= self.stripe_fraction <= 1:
            raise ValueError(
                f"private={self.private} and stripe_fraction={self.stripe_fraction} must lie in [0, 1]"
            )

    @property
    def _special(self) -> int:
        return 1 + self.topics + 2 * _PERIODS  # coordinates that are not noise

    def make(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [B, Hq, N, D], key and value [B, Hk, N, D] for the scale D^-1/2, in ``dtype``."""
        random = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.kv_heads, self.length, self.head_dim)
        value = torch.randn(shape, generator=random)
        query = torch.randn((self.batch, self.query_heads, self.length, self.head_dim), generator=random)
        key = torch.randn(shape, generator=random)
        if self.structure:
            self._place_keys(key, random)
            self._place_queries(query, random)
            rotation, _ = torch.linalg.qr(torch.randn(self.head_dim, self.head_dim, generator=random))
            query, key = query @ rotation, key @ rotation
        return query.to(dtype), key.to(dtype), value.to(dtype)

    def _place_keys(self, key: Tensor, random: torch.Generator) -> None:
        key[..., : self._special] = 0
        key[:, :, :SINKS, 0] = self._amplitude(self.sink)
        topic = self._per_head(
            self.kv_heads, torch.randint(self.topics, self._draws(self.kv_heads), generator=random)
        )
        chosen = self._per_head(
            self.kv_heads, torch.rand(self._draws(self.kv_heads), generator=random) < self.stripe_fraction
        )
        low, high = self.stripe
        logit = low + (high - low) * torch.rand(topic.shape, generator=random)
        strength = chosen * logit * math.sqrt(self.head_dim) / self._amplitude(high)
        key[..., 1 : 1 + self.topics].scatter_(3, topic.unsqueeze(3), strength.unsqueeze(3))
        key[..., 1 + self.topics : self._special] = self._rotary()

    def _place_queries(self, query: Tensor, random: torch.Generator) -> None:
        query[..., self._special :] *= math.sqrt(self.head_dim / (self.head_dim - self._special))
        query[..., : self._special] = 0
        query[..., 0] = self._amplitude(self.sink)
        run = (torch.rand(self._draws(self.query_heads), generator=random) < 1 / self.dwell).cumsum(2)
        names = torch.randint(self.topics, self._draws(self.query_heads), generator=random)
        active = self._per_head(self.query_heads, names.gather(2, run)).unsqueeze(3)
        query[..., 1 : 1 + self.topics].scatter_(3, active, self._amplitude(self.stripe[1]))
        gain = self.local / _PERIODS * math.sqrt(self.head_dim)
        query[..., 1 + self.topics : self._special] = gain * self._rotary()
        query *= torch.linspace(*self.sharpness, self.query_heads).view(-1, 1, 1)

    def _draws(self, heads: int) -> tuple[int, int, int]:
        return self.batch, 1 + heads, self.length  # one sequence that heads share, then one for each head

    def _per_head(self, heads: int, draws: Tensor) -> Tensor:
        """Give head h of ``draws`` [B, 1 + H, N] its own sequence if it is among the private ones: [B, H, N]."""
        own = (torch.arange(heads) + 1) * self.private  # head by head, evenly spread, without a further draw
        private = (own.floor() > (own - self.private).floor()).view(1, heads, 1)
        return torch.where(private, draws[:, 1:], draws[:, :1])

    def _amplitude(self, logit: float) -> float:
        return math.sqrt(
            logit * math.sqrt(self.head_dim)
        )  # on both sides of a product that the scale divides

    def _rotary(self) -> Tensor:
        frequencies = (
            2
            * math.pi
            / torch.logspace(math.log10(_SHORTEST), math.log10(_LONGEST), _PERIODS, dtype=torch.float64)
        )
        phases = torch.arange(self.length, dtype=torch.float64).unsqueeze(1) * frequencies
        return torch.cat([phases.cos(), phases.sin()], dim=1).float()
