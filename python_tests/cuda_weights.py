"""Weights that each CUDA packing can hold."""

import reference
import torch

from pysparse.formats import PACKINGS, BitmapTensor, NMRows


def groups_only(weight, n, m):
    """Zero all but n of every m columns, which n differing from group to group."""
    rows, cols = weight.shape
    draws = torch.rand(rows, -(-cols // m), m, device=weight.device)
    keep = draws.argsort(dim=2).argsort(dim=2) < n
    return weight * keep.reshape(rows, -(-cols // m) * m)[:, :cols]


def pairs_only(weight):
    """Zero two of every four columns, which two differing from group to group."""
    return groups_only(weight, 2, 4)


def matrix_for(name, rows, cols, sparsity, dtype):
    """Return a random weight that the packing ``name`` can hold: two of four for pair, three of eight for nm."""
    weight = reference.sparse_matrix(rows, cols, sparsity, dtype)
    if name == "nm":
        return groups_only(weight, 3, 8)
    return pairs_only(weight) if name == "pair" else weight


def _pattern_of(name):
    return (3, 16) if name == "nm" else None


def stackable_weights(name, heights, cols, sparsity=0.6, dtype=torch.bfloat16):
    """Return matrices that the packing ``name`` can hold; one row of each is empty, one full where it may be."""
    found = []
    for rows in heights:
        weight = matrix_for(name, rows, cols, sparsity, dtype)
        if name == "nm":
            weight = groups_only(reference.sparse_matrix(rows, cols, 0.0, dtype), *_pattern_of(name))
        weight[rows // 2] = 0
        if name in ("delta", "fragment"):
            weight[0] = torch.randn(cols).to(dtype)
        found.append(weight)
    return found


def pack_for_stacking(name, weight):
    bitmap = BitmapTensor.from_dense(weight)
    return (
        NMRows.from_bitmap(bitmap, *_pattern_of(name)) if name == "nm" else PACKINGS[name].from_bitmap(bitmap)
    )
