"""Weights that each CUDA packing can hold."""

import reference
import torch


def pairs_only(weight):
    """Zero two of every four columns, which two differing from group to group."""
    rows, cols = weight.shape
    draws = torch.rand(rows, -(-cols // 4), 4)
    keep = (draws.unsqueeze(3) > draws.unsqueeze(2)).sum(dim=3) >= 2
    return weight * keep.reshape(rows, -(-cols // 4) * 4)[:, :cols]


def matrix_for(name, rows, cols, sparsity, dtype):
    weight = reference.sparse_matrix(rows, cols, sparsity, dtype)
    return pairs_only(weight) if name == "pair" else weight
