"""Which attention modules can go: greedy removal by perplexity, computing nothing twice that can be kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pysparse.calib.batches import Batch
from pysparse.calib.calls import Call, finish, hidden_of, record_calls
from pysparse.measure.quality import next_token_logits, safe_exp, sequence_nats
from pysparse.nn.structure import Surgery
from pysparse.pruning.parts import Anatomy
from pysparse.pruning.probe import Seats

STATES_LIMIT = 2 << 30  # bytes of hidden states that may be kept between trials


@dataclass(frozen=True, slots=True)
class Removal:
    """One step of the search."""

    path: str  # of the attention that was removed
    perplexity: float  # without it, on the text of the search
    candidates: int  # that were tried
    broken: tuple[str, ...] = ()  # candidates whose perplexity was NaN or infinite: not chosen


@dataclass(slots=True, eq=False)
class _Sequences:
    """One batch of the search's text, and the hidden states that are known for it."""

    batch: Batch
    calls: list[Call]  # of each block
    prefix: list[Tensor]  # in front of each block, with what has been removed so far
    trails: dict[int, dict[int, Tensor]] = field(
        default_factory=dict
    )  # candidate -> block -> state in front of it
    like: Any = None  # an output of a block


class AttentionSearch:
    """2SSP's stage 2: which attention, if removed beside those that are, raises perplexity least.

    The straightforward search runs the whole model for each candidate. Here a candidate starts from the state in
    front of its own block, and from the last state that an earlier trial of it left behind: removing attention c
    changes nothing in front of block c, so trials of candidates before c resume at c. The perplexities are
    those of whole forward passes. ``limit`` bounds the bytes of states kept; beyond, fewer blocks keep theirs.
    """

    def __init__(
        self, anatomy: Anatomy, seats: Sequence[Seats], batches: Sequence[Batch], limit: int = STATES_LIMIT
    ) -> None:
        self._anatomy, self._seats = anatomy, seats
        self.left = list(range(len(seats)))  # blocks whose attention is there
        self._data = [self._begin(batch) for batch in batches]
        states = sum(one.prefix[0].numel() * one.prefix[0].element_size() for one in self._data)
        total = states * len(seats) * (len(seats) - 1) // 2
        # A candidate's state is kept in front of every so many blocks.
        self._every = max(1, math.ceil(total / max(1, limit)))
        self._tokens = sum(batch.tokens - batch.sequences for batch in batches)
        self.block_runs = 0  # how many times a block ran in trials, for who compares costs

    def _begin(self, batch: Batch) -> _Sequences:
        """Run the blocks once and keep the state in front of each."""
        anatomy = self._anatomy
        recorded = record_calls(anatomy.model, anatomy.stack, batch)
        assert recorded.first_input is not None  # a decoder's blocks are given hidden states
        data = _Sequences(batch, recorded.calls, [recorded.first_input])
        for index in range(len(anatomy.blocks) - 1):
            data.prefix.append(self._run(data, index, data.prefix[index]))
        return data

    def _run(self, data: _Sequences, index: int, hidden: Tensor) -> Tensor:
        data.like = data.calls[index].replay(self._anatomy.blocks[index].module, hidden)
        return hidden_of(data.like)

    @property
    def candidates(self) -> list[int]:
        """Blocks whose attention may go: the last one of its kind stays, for cache slots of that kind count tokens."""
        kinds = Counter(self._anatomy.blocks[index].kind for index in self.left)
        return [index for index in self.left if kinds[self._anatomy.blocks[index].kind] > 1]

    def perplexity_without(self, candidate: int, ceiling: float = math.inf) -> float:
        """Return the perplexity with one more attention removed, or any value above ``ceiling`` if it exceeds that."""
        nats = 0.0
        with self._removed(candidate):
            for data in self._data:
                nats += self._trial(data, candidate)
                if not nats / self._tokens <= math.log(ceiling):
                    break  # NaN, or lost: cross-entropies are not negative, so that the sum only grows
        return safe_exp(nats / self._tokens)

    @contextmanager
    def _removed(self, index: int) -> Iterator[None]:
        surgery = Surgery(self._anatomy.model)
        try:
            self._seats[index].clear(surgery)
            yield
        finally:
            surgery.undo()

    def _trial(self, data: _Sequences, candidate: int) -> float:
        trail = data.trails.setdefault(candidate, {})
        start = max(trail, default=candidate)
        hidden = trail.get(start, data.prefix[candidate]).clone()  # a block may work in place
        for index in range(start, len(self._anatomy.blocks)):
            hidden = self._run(data, index, hidden)
            self.block_runs += 1
            if (index + 1) % self._every == 0 and index + 1 < len(self._anatomy.blocks):
                trail[index + 1] = hidden.clone()
        output = finish(self._anatomy.model, self._anatomy.stack, data.batch, hidden, data.like)
        return sequence_nats(next_token_logits(self._anatomy.model, output), data.batch.ids)

    def step(self) -> tuple[int, Removal]:
        """Return the candidate that costs least, the first among equals, and how the step went.

        Raises ValueError when no candidate is left, and when none has a finite perplexity.
        """
        tried, best, lowest = self.candidates, -1, math.inf
        broken = []
        for candidate in tried:
            value = self.perplexity_without(candidate, lowest)
            if not math.isfinite(value):
                broken.append(self._seats[candidate].attention)
            elif value < lowest:
                best, lowest = candidate, value
        if best < 0:
            reason = (
                f"all {len(tried)} have NaN or infinite perplexity" if tried else
                "the last attention of each kind must stay: the cache counts tokens by it"
            )  # fmt: skip
            raise ValueError(f"no attention module can be removed as number {self._gone + 1}: {reason}")
        return best, Removal(self._seats[best].attention, lowest, len(tried), tuple(broken))

    @property
    def _gone(self) -> int:
        return len(self._seats) - len(self.left)

    def remove(self, candidate: int, surgery: Surgery) -> None:
        """Remove an attention for good, and bring the known states up to it."""
        self._seats[candidate].clear(surgery)
        self.left.remove(candidate)
        for data in self._data:
            won = data.trails.pop(candidate, {})
            for index in range(candidate + 1, len(self._anatomy.blocks)):
                known = won.get(index)
                data.prefix[index] = (
                    self._run(data, index - 1, data.prefix[index - 1]) if known is None else known
                )
            for other, trail in data.trails.items():
                stale = [index for index in trail if other > candidate or index > candidate]
                for index in stale:
                    del trail[index]


def remove_attentions(
    search: AttentionSearch,
    count: int,
    surgery: Surgery,
    remember: Callable[[int, Callable[[], Any]], Any] = lambda step, compute: compute(),
    advance: Callable[[int], None] = lambda step: None,
) -> list[Removal]:
    """Remove ``count`` attentions one after the other, in place, and return the steps.

    ``remember`` may return the JSON form of a step of an interrupted run instead of computing it.
    """
    removals = []
    for step in range(count):
        found = remember(step, lambda: _noted(*search.step()))
        search.remove(found["block"], surgery)
        removals.append(
            Removal(found["path"], found["perplexity"], found["candidates"], tuple(found["broken"]))
        )
        advance(step)
    return removals


def _noted(block: int, removal: Removal) -> dict[str, Any]:
    return {
        "block": block, "path": removal.path, "perplexity": removal.perplexity,
        "candidates": removal.candidates, "broken": list(removal.broken),
    }  # fmt: skip


def first_sequences(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return the first ``count`` sequences of ``batches``; ValueError when none has two tokens to score."""
    chosen: list[Batch] = []
    for batch in batches:
        wanted = count - sum(one.sequences for one in chosen)
        if wanted <= 0:
            break
        chosen.append(batch.rows(slice(0, wanted)) if wanted < batch.sequences else batch)
    if not all(one.is_text for one in chosen) or sum(one.tokens - one.sequences for one in chosen) < 1:
        raise ValueError(
            "the search for attention modules needs sequences of two tokens or more, as input_ids [B, T]"
        )
    return chosen


def kept_slots(anatomy: Anatomy, left: Sequence[int]) -> dict[str, int]:
    """Return a cache slot for each attention that stays: of each kind the first ones, so that these are filled."""
    slots: dict[str, int] = {}
    for kind in dict.fromkeys(block.kind for block in anatomy.blocks):
        places = [index for index, block in enumerate(anatomy.blocks) if block.kind == kind]
        stay = [index for index in left if anatomy.blocks[index].kind == kind]
        slots |= {
            anatomy.blocks[block].attention[0]: place for block, place in zip(stay, places, strict=False)
        }
    return slots
