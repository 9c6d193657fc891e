"""Weights that each CUDA packing can hold."""

import reference
import torch


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
