"""What LoSA measures on a model: how alike the blocks' inputs are, and how far the blocks' outputs have moved."""

from __future__ import annotations

import torch
from torch import Tensor

from pysparse.calib import Calibration, Replay
from pysparse.measure.quality import evaluating
from pysparse.methods.losa import centered_gram, linear_cka
from pysparse.pruning import BlockLayout


def similarity_of_inputs(layout: BlockLayout, calibration: Calibration, sequences: int) -> Tensor:
    """Return the linear CKA of the inputs of each two blocks, float64 [L, L].

    A row of a representation is one of the first ``sequences`` calibration sequences, all its tokens
    flattened; sequences are cut to the shortest. Memory: the hidden states of these sequences in front of one
    block. Raises ValueError for fewer than 2 sequences, whose similarity is undefined.
    """
    grams = []
    with evaluating(layout.model):
        replay = Replay(layout.model, layout.blocks, calibration.batches)
        for index in range(len(layout.blocks)):
            features = _features(replay, sequences)
            if len(features) < 2:
                raise ValueError(f"similarity needs 2 sequences of calibration or more, got {len(features)}")
            grams.append(centered_gram(features))
            if index + 1 < len(layout.blocks):
                replay.forward(index, advance=True)
    return linear_cka(grams)


def _features(replay: Replay, sequences: int) -> Tensor:
    hidden = list(replay.waiting())
    tokens = min(one.shape[1] for one in hidden)
    return torch.cat([one[:, :tokens].flatten(1) for one in hidden])[:sequences]


def reconstruction_errors(dense: BlockLayout, pruned: BlockLayout, calibration: Calibration) -> list[float]:
    """Return E_i = mean over channels c of |D_ic - Y_ic|^2 / |D_ic|^2 for the outputs D, Y of each block i.

    Both models see the same batches, each its own outputs of the blocks before; norms run over all tokens, in
    float64. A channel that is always zero in the dense model does not count. Memory: hidden states of all
    batches for both models, in front of one block.
    """
    errors = []
    with evaluating(dense.model, pruned.model):
        replays = [Replay(one.model, one.blocks, calibration.batches) for one in (dense, pruned)]
        for index in range(len(dense.blocks)):
            for replay in replays:
                replay.forward(index, advance=True)
            errors.append(_error(*replays))
    return errors


def _error(dense: Replay, pruned: Replay) -> float:
    sums = []
    for wanted, got in zip(dense.waiting(), pruned.waiting(), strict=True):
        exact = wanted.double()
        sums.append(torch.stack([one.square().flatten(0, -2).sum(0) for one in (exact, exact - got)]))
    energy, distance = torch.stack(sums).sum(0)
    live = energy > 0
    return float((distance[live] / energy[live]).mean())
