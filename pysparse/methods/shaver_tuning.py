"""What may follow Shaver's cut: training under the frozen mask and codebook."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pysparse.calib.clicks import Clicks
from pysparse.methods.ctr_training import CtrScore, CtrTraining, Report, train_ctr
from pysparse.methods.shaver import EntryScores, pack_embedding
from pysparse.nn.ctr import CtrModel


class MaskedEmbedding(nn.Module):
    """A dense table of which only the kept entries are read and trained; the others are the base's."""

    keep: Tensor
    base: Tensor
    field_of: Tensor

    def __init__(self, weight: Tensor, keep: Tensor, scores: EntryScores) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        sizes = torch.tensor(scores.field_sizes)
        self.register_buffer("keep", keep)
        self.register_buffer("base", torch.from_numpy(scores.base))
        self.register_buffer("field_of", torch.repeat_interleave(torch.arange(len(sizes)), sizes))

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., dims] for ids [...]."""
        rows = ids.long()
        kept = nn.functional.embedding(rows, self.weight)
        return torch.where(self.keep[rows], kept, self.base[self.field_of[rows]])


def fine_tune(
    model: CtrModel, scores: EntryScores, sparsity: float, train: Clicks, valid: Clicks,
    training: CtrTraining | None = None, report: Report | None = None,
) -> tuple[CtrModel, CtrScore]:  # fmt: skip
    """Train kept entries and head with mask and codebook frozen; return the packed model and its validation score.

    ``model`` is not changed. The defaults of ``training`` follow the paper's retraining: a tenth of the dense
    learning rate, at most 15 epochs, one without a better AUC ends it.
    """
    keep = scores.keep(sparsity)
    tuned = copy.deepcopy(model)
    masked = MaskedEmbedding(model.table, keep, scores)
    tuned.embedding = masked
    score = train_ctr(tuned, train, valid, training or CtrTraining(learning_rate=1e-4), report)
    dense = nn.Embedding.from_pretrained(masked.weight.detach(), freeze=False)
    tuned.embedding = dense
    return pack_embedding(tuned, keep, scores.base, scores.field_sizes), score
