"""One layer: its weight, its statistics and its budget go in, the pruned weight comes to lie in the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pysparse.calib import Ranks
from pysparse.pruning.layout import PrunableLayer
from pysparse.pruning.mixed import pattern_of
from pysparse.pruning.recipe import MaskStructure, Pruned, Recipe, Stats
from pysparse.pruning.report import PrunedLayer


def prune_layers(
    layers: Sequence[PrunableLayer],
    stats: Mapping[PrunableLayer, Sequence[Stats]],
    budgets: Mapping[PrunableLayer, float],
    recipe: Recipe,
    ranks: Ranks,
) -> list[PrunedLayer]:
    """Prune ``layers`` in place; of several ranks each solves its share and gets the others' results.

    A ValueError of one rank is raised on all of them, before any weight travels.
    """
    found: list[PrunedLayer | None] = [None] * len(layers)
    error: ValueError | None = None
    try:
        for place in range(ranks.index, len(layers), ranks.count):
            layer = layers[place]
            found[place] = prune_layer(layer, stats[layer], recipe, budgets[layer])
    except ValueError as raised:
        error = raised
    if error is not None and ranks.count == 1:
        raise error
    shares = ranks.gather((found, [layer.grid for layer in layers], error))
    for *_, problem in shares:
        if problem is not None:
            raise problem
    results = []
    for place, layer in enumerate(layers):
        owner = place % ranks.count
        if ranks.count > 1:
            layer.write(ranks.broadcast(layer.weight.contiguous(), owner))
            layer.note_grid(shares[owner][1][place])
            if layer.bias is not None:
                layer.bias.copy_(ranks.broadcast(layer.bias, owner))
        results.append(shares[owner][0][place])
    return results


def prune_layer(layer: PrunableLayer, stats: Sequence[Stats], recipe: Recipe, sparsity: float) -> PrunedLayer:
    """Prune one layer in place; with nothing to prune it is left alone, bit for bit.

    ``stats`` holds one mapping for each group of the layer's rows: grouped convolutions are solved group by
    group, as each sees channels of its own. Raises ValueError that names the layer.
    """
    start = time.perf_counter()
    structure = pattern_of(recipe.structure, sparsity)
    removed = 0
    warnings: tuple[str, ...] = ()
    if pruned_count(layer, structure, sparsity, bool(stats[0])):
        try:
            pruned = _solve(layer.weight.to(layer.device).contiguous(), stats, recipe, structure, sparsity)
            _check_pruned(pruned, layer)
        except ValueError as error:
            raise ValueError(f"{layer.path}: {error}") from error
        layer.write(pruned.weight)
        layer.note_grid(pruned.grid)
        if layer.bias is not None and pruned.bias_shift is not None:
            layer.bias.copy_(layer.bias.double() + pruned.bias_shift)
        removed, warnings = layer.size - int(torch.count_nonzero(pruned.keep)), pruned.warnings
    zeros = layer.size - int(torch.count_nonzero(layer.weight))
    return PrunedLayer(
        layer.path, layer.block, layer.shape, str(structure), sparsity, removed, zeros,
        time.perf_counter() - start, warnings,
    )  # fmt: skip


def pruned_count(layer: PrunableLayer, structure: MaskStructure, sparsity: float, by_group: bool) -> int:
    """Return how many weights of ``layer`` are pruned; ``by_group`` when each of its groups is solved alone."""
    rows, cols = layer.shape
    groups = layer.groups if by_group else 1
    return groups * structure.pruned_count(rows // groups, cols, sparsity)


def _solve(
    weight: Tensor, stats: Sequence[Stats], recipe: Recipe, structure: MaskStructure, sparsity: float
) -> Pruned:
    groups = weight.chunk(len(stats)) if stats[0] else (weight,)  # without statistics all rows may compete
    parts = [
        recipe.reconstruction.solve(rows, one, recipe.importance, structure, sparsity)
        for rows, one in zip(groups, stats, strict=False)
    ]
    if len(parts) == 1:
        return parts[0]
    remarks = tuple(dict.fromkeys(text for one in parts for text in one.warnings))
    shifts = [one.bias_shift for one in parts if one.bias_shift is not None]
    return Pruned(
        torch.cat([one.weight for one in parts]), torch.cat([one.keep for one in parts]),
        remarks, torch.cat(shifts) if shifts else None,
    )  # fmt: skip


def _check_pruned(pruned: Pruned, layer: PrunableLayer) -> None:
    for name, tensor in (("weight", pruned.weight), ("keep", pruned.keep)):
        if tuple(tensor.shape) != layer.shape:
            raise ValueError(
                f"the reconstruction returned {name} of shape {tuple(tensor.shape)}, not {layer.shape}"
            )
    if not bool(torch.isfinite(pruned.weight).all()):
        raise ValueError("the reconstruction returned weights that are NaN or infinite")


def merged(layer: PrunableLayer, stats: Sequence[Stats]) -> Stats:
    """Return one mapping for all rows of a layer, for scores of the whole matrix.

    Statistics of groups that see different channels become rows [out_features, in_features]; ValueError for
    a grouped layer and a statistic that is no vector.
    """
    if len(stats) == 1:
        return stats[0]
    rows = layer.shape[0] // len(stats)
    for name, value in stats[0].items():
        if value.dim() != 1:
            raise ValueError(
                f"{layer.path} is a grouped convolution: '{name}' is a matrix for each of its {len(stats)} groups "
                "and cannot be scored as a whole"
            )
    return {name: torch.stack([one[name] for one in stats]).repeat_interleave(rows, 0) for name in stats[0]}
