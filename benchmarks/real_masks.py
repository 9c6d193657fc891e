"""Real masks at the sizes of large models: those that a method finds in the bundled model, laid side by side.

A uniformly random mask is easy on a kernel: every stretch of a row holds about as many weights as any other. A
trained model's is not: inputs differ in importance and Wanda drops the columns of weak ones; SparseGPT's rows differ
too, since it cuts by blocks of columns over all rows. No large
checkpoint ships with the project, so the large mask is put together from the six blocks' masks of one kind of
layer, each in turn, which keeps their unevenness between columns.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import pysparse
from pysparse import data
from pysparse.measure.twins import linear_layers

KINDS = {  # a large shape -> the bundled model's layer of that role; the first also serves any other shape
    "4096x4096": "o_proj",  # of the four of this size the one with the most uneven columns
    "11008x4096": "gate_proj",
    "14336x4096": "up_proj",
    "4096x11008": "down_proj",
}


@cache
def small_masks(method: str, sparsity: float, samples: int) -> dict[str, list[Tensor]]:
    """Kind of layer -> the bool masks (True survives) of every block's layer of that kind."""
    model = pysparse.from_pretrained(data.demo_model_path(), format="dense")
    pysparse.prune(model, sparsity, method, num_samples=samples, max_length=512, progress=False)
    masks: dict[str, list[Tensor]] = {}
    for path, layer in linear_layers(model).items():
        masks.setdefault(path.rpartition(".")[2], []).append(layer.weight != 0)
    return masks


def tiled_mask(
    shape: str, size: tuple[int, int], sparsity: float, method: str = "wanda", samples: int = 64
) -> Tensor:
    """A bool mask of ``size`` = (out, in), True survives, for the layer that ``shape`` stands for.

    ``method`` is "wanda" or "sparsegpt".
    """
    tiles = small_masks(method, sparsity, samples)[KINDS.get(shape, KINDS["4096x4096"])]
    rows, cols = tiles[0].shape
    across, down = -(-size[1] // cols), -(-size[0] // rows)
    stripes = [
        torch.cat([tiles[(i * across + j) % len(tiles)] for j in range(across)], dim=1) for i in range(down)
    ]
    return torch.cat(stripes)[: size[0], : size[1]].contiguous()
