"""The closed form by which 2SSP parts a budget between attention modules and FFN neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of a model's blocks, which are all alike."""

    blocks: int
    main: int  # parameters of all blocks, norms included
    attention: int  # of one block's attention module, biases included
    ffn: int  # of one block's FFN, biases included
    width: int  # neurons of one FFN
    neuron: int  # parameters that go with one neuron

    @property
    def ratio(self) -> float:
        """FFN parameters for one attention parameter."""
        return self.ffn / self.attention


@dataclass(frozen=True, slots=True)
class Split:
    """How many attention modules go, and how many neurons each FFN keeps."""

    n_attn: int
    widths: tuple[int, ...]  # of each block
    removed: int  # parameters
    achieved: float  # rate over all parameters of the blocks


def attention_count(sizes: Sizes, sparsity: float, alpha: float = 1.5) -> int:
    """Return N_attn = round(B * s^(ratio / alpha)), 2SSP's balance; halves round to even.

    The heavier the FFN beside the attention, the fewer attention modules go.
    """
    share: float = sparsity ** (sizes.ratio / alpha)
    return round(sizes.blocks * share)


def split(
    sizes: Sizes,
    sparsity: float,
    alpha: float = 1.5,
    *,
    n_attn: int | None = None,
    widths: Sequence[int] | None = None,
    multiple_of: int = 1,
) -> Split:
    """Return what to remove so that a fraction ``sparsity`` of the blocks' parameters goes.

    ``n_attn`` overrides the balance, ``widths`` (one a block) the uniform width K = round(d_int * (1 - rho)).
    With ``multiple_of`` > 1 widths are multiples of it; as many blocks get the larger of the two multiples
    around K as bring the total nearest to the target, the last ones first (:func:`balanced_widths`).
    Raises ValueError for settings out of range, and where the rate cannot be met so.
    """
    count = attention_count(sizes, sparsity, alpha) if n_attn is None else n_attn
    if not 0 <= count <= sizes.blocks:
        raise ValueError(f"n_attn={count} is outside [0, {sizes.blocks}], the number of attention modules")
    if widths is None:
        kept = balanced_widths(sizes, _neurons(sizes, sparsity, count), multiple_of)
    else:
        kept = _checked(sizes, widths, multiple_of)
    removed = count * sizes.attention + sum(sizes.width - k for k in kept) * sizes.neuron
    return Split(count, kept, removed, removed / sizes.main)


def _neurons(sizes: Sizes, sparsity: float, count: int) -> int:
    """Return K, the neurons that each block keeps; ValueError when the attentions overshoot or no FFN is left."""
    target = round(sparsity * sizes.main)
    if count * sizes.attention > target:
        raise ValueError(
            f"sparsity={sparsity:g} cannot be met: {count} attention modules alone are "
            f"{count * sizes.attention / sizes.main:.2%} of the blocks' parameters; lower n_attn or alpha"
        )
    per_block = round((target - count * sizes.attention) / sizes.blocks)
    kept = round(sizes.width * (1 - per_block / sizes.ffn))
    if kept < 1:
        most = (count * sizes.attention + sizes.blocks * (sizes.width - 1) * sizes.neuron) / sizes.main
        raise ValueError(
            f"sparsity={sparsity:g} cannot be met: without {count} attention modules and with one neuron in each FFN "
            f"it is {most:.2%}; raise n_attn"
        )
    return kept


def balanced_widths(sizes: Sizes, kept: int, multiple_of: int) -> tuple[int, ...]:
    """Return a width a block, multiples of ``multiple_of``, with the total nearest to blocks * ``kept``.

    Where ``multiple_of`` does not divide ``kept`` some blocks, the last ones, get the next multiple: they are the
    ones whose attention tends to go.
    """
    if not 1 <= multiple_of <= sizes.width:
        raise ValueError(f"multiple_of={multiple_of} is outside [1, {sizes.width}], the neurons of an FFN")
    low = max(multiple_of, kept // multiple_of * multiple_of)
    high = min(low + multiple_of, sizes.width)
    larger = 0
    if high > low:
        larger = min(sizes.blocks, max(0, round(sizes.blocks * (kept - low) / (high - low))))
    return (low,) * (sizes.blocks - larger) + (high,) * larger


def _checked(sizes: Sizes, widths: Sequence[int], multiple_of: int) -> tuple[int, ...]:
    if len(widths) != sizes.blocks:
        raise ValueError(f"widths has {len(widths)} entries, the model {sizes.blocks} blocks")
    for index, width in enumerate(widths):
        if type(width) is not int or not 1 <= width <= sizes.width:
            raise ValueError(f"widths[{index}]={width} is outside [1, {sizes.width}], the neurons of an FFN")
        if width % multiple_of:
            raise ValueError(f"widths[{index}]={width} is no multiple of multiple_of={multiple_of}")
    return tuple(widths)
