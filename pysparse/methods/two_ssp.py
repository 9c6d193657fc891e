"""2SSP: narrower FFNs everywhere, then some whole attention modules less; and block removal to compare with."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from pysparse.pruning.depth import AttentionSearch, first_sequences, kept_slots, remove_attentions
from pysparse.pruning.influence import delete_blocks
from pysparse.pruning.parts import Anatomy
from pysparse.pruning.placement import on_device
from pysparse.pruning.probe import find_seats
from pysparse.pruning.split import split
from pysparse.pruning.structural import Bench, Cut
from pysparse.pruning.target import DEFAULT_SPARSITY, check_sparsity
from pysparse.pruning.width import strongest

_AGREE = 0.01  # of the blocks' parameters: widths that give a rate further off contradict the one asked for


@dataclass(frozen=True, slots=True)
class TwoSSP:
    """Two-stage structured pruning (2SSP).

    Stage 1 keeps in every block the FFN neurons with the largest activation norm, stage 2 removes the attention
    modules whose loss raises perplexity least, one after the other. The budget is split in closed form:
    N_attn = round(B * s^((P_ffn / P_attn) / alpha)) attentions go, the neurons make up the rest. Differs from the
    paper: norms are summed in float32 and float64, ``multiple_of`` and the overrides, unused norms go with their
    attention, and one attention of each kind stays, as the KV cache counts tokens by it.
    """

    alpha: float = 1.5
    multiple_of: int = 1  # widths are multiples of it; 64 or 128 suit tensor cores and packed patterns
    n_attn: int | None = None  # attentions to remove, instead of the closed form's number
    widths: tuple[int, ...] = ()  # neurons that each block keeps, instead of the same number in all
    narrow: bool = True  # False leaves the FFNs alone: attentions have to meet the rate
    search_sequences: int = 1  # calibration sequences that the perplexity of the search is measured on

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha} must be a number above 0")
        for name in ("multiple_of", "search_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.narrow and (self.widths or self.multiple_of > 1):
            raise ValueError("narrow=False leaves the FFNs alone: widths and multiple_of contradict it")

    @property
    def default_samples(self) -> int:
        """The paper's calibration: 32 sequences."""
        return 32

    def plan(self, anatomy: Anatomy, sparsity: float | None) -> tuple[float, Cut]:
        """Return the target and the widths and number of attentions to remove; ValueError if it cannot be met."""
        sizes = anatomy.sizes
        given = sparsity is not None or not self.widths
        target = check_sparsity(DEFAULT_SPARSITY if sparsity is None else sparsity) if given else 0.0
        count, widths = self.n_attn, self.widths or None
        if not self.narrow:
            widths = (sizes.width,) * sizes.blocks
            count = round(target * sizes.main / sizes.attention) if count is None else count
        elif not given and count is None:
            count = 0
        most = sizes.blocks - len({block.kind for block in anatomy.blocks})
        if count is not None and count > most and not (self.narrow and self.widths):
            raise ValueError(
                f"sparsity={target:g} cannot be met: that needs {count} attention modules to go and at most {most} of "
                f"{sizes.blocks} can (one of each kind stays), {most * sizes.attention / sizes.main:.2%} of the "
                "blocks' parameters"
            )
        share = split(sizes, target, self.alpha, n_attn=count, widths=widths, multiple_of=self.multiple_of)
        if share.n_attn > most:
            raise ValueError(
                f"n_attn={share.n_attn} is too many: at most {most} of {sizes.blocks} attentions can go"
            )
        if not given:
            target = share.achieved
        elif widths is not None and abs(share.achieved - target) > (_AGREE if self.narrow else 1):
            raise ValueError(
                f"sparsity={target:g} contradicts widths and n_attn={share.n_attn}, which remove {share.achieved:.2%}: "
                "leave sparsity out"
            )
        return target, Cut(share.widths, tuple(range(share.n_attn)))

    def cut(self, bench: Bench, sparsity: float | None) -> Cut:
        """Cut the FFNs, then search for the attentions on the narrower model."""
        anatomy, surgery = bench.anatomy, bench.surgery
        _, wanted = self.plan(anatomy, sparsity)
        count, before = len(wanted.attentions), [block.ffn.width for block in anatomy.blocks]
        batches = [one for one in bench.calibration.batches if one.is_text] or list(bench.calibration.batches)
        if count:
            batches = first_sequences(batches, self.search_sequences)
        if bench.device is not None:
            batches = [batch.to(bench.device) for batch in batches]
        # What cannot be done is found before the scores are measured and kept. Without attentions to remove it does
        # not matter how blocks would do without theirs, only how the neurons lie.
        with on_device(anatomy.model, bench.device):
            seats = find_seats(anatomy, batches[:1], removal=count > 0)
        scores = bench.neuron_scores() if list(wanted.widths) != before else []
        for block, score, width in zip(anatomy.blocks, scores, wanted.widths, strict=bool(scores)):
            block.ffn.cut(surgery, strongest(score, width))
        if not count:
            return wanted
        with on_device(anatomy.model, bench.device):
            search = AttentionSearch(anatomy, seats, batches)
            steps = remove_attentions(
                search, count, surgery,
                lambda step, compute: bench.remember(f"removal {step}", compute),
                lambda step: bench.advance("removing attention modules", step + 1, count),
            )  # fmt: skip
        slots = kept_slots(anatomy, search.left)
        for index in search.left:
            surgery.renumber(anatomy.blocks[index].attention[1], slots[anatomy.blocks[index].attention[0]])
        order = {block.attention[0]: index for index, block in enumerate(anatomy.blocks)}
        gone = tuple(order[step.path] for step in steps)
        return Cut(wanted.widths, gone, (), tuple(seats), tuple(steps), slots)


@dataclass(frozen=True, slots=True)
class ShortGPT:
    """Whole blocks go, those that change the residual stream least by cosine similarity (ShortGPT, 2024).

    The nearest number of blocks to the rate; the result is an ordinary model with fewer layers.
    """

    @property
    def default_samples(self) -> int:
        """The calibration of 2SSP's comparison: 256 sequences would be the original's."""
        return 32

    def plan(self, anatomy: Anatomy, sparsity: float | None) -> tuple[float, Cut]:
        """Return the target and as many blocks; ValueError for a rate of less than half a block, or of all."""
        target = check_sparsity(DEFAULT_SPARSITY if sparsity is None else sparsity)
        blocks = len(anatomy.blocks)
        count = round(target * blocks)
        if count == blocks or (count == 0 and target > 0):
            raise ValueError(
                f"sparsity={target:g} cannot be met by whole blocks: it is {target * blocks:.2f} of {blocks} blocks"
            )
        return target, Cut(tuple(block.ffn.width for block in anatomy.blocks), blocks=tuple(range(count)))

    def cut(self, bench: Bench, sparsity: float | None) -> Cut:
        """Delete the blocks with the least influence; among equals the first ones."""
        anatomy = bench.anatomy
        _, wanted = self.plan(anatomy, sparsity)
        influences = bench.influences()
        order = sorted(range(len(influences)), key=influences.__getitem__)
        gone = sorted(order[: len(wanted.blocks)])
        lost = Counter(anatomy.blocks[index].kind for index in gone)
        have = Counter(block.kind for block in anatomy.blocks)
        if any(lost[kind] == have[kind] for kind in lost):
            raise ValueError("the blocks with the least influence are all there are of one kind of attention")
        if gone:
            delete_blocks(anatomy, gone, bench.surgery)
        scores = {block.path: value for block, value in zip(anatomy.blocks, influences, strict=True)}
        return Cut(wanted.widths, blocks=tuple(gone), scores=scores)
