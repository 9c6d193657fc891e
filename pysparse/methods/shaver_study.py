"""One model, all scores, several budgets: how much of AUC and log loss each keeps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pysparse.calib.clicks import Clicks
from pysparse.calib.extras import optional
from pysparse.methods.ctr_training import CtrScore, CtrTraining, Report, score_ctr, train_ctr
from pysparse.methods.shaver import (
    CodebookError,
    EntryMagnitude,
    EntryTaylor,
    RandomEntries,
    Scorer,
    Shaver,
    prune_embedding,
)
from pysparse.nn import SparseEmbedding
from pysparse.nn.ctr import CtrConfig, CtrModel


def all_scorers(passes: int = 1, seed: int = 0) -> dict[str, Scorer]:
    """Return Shaver's forms and every baseline, the free codebook error among them, by name."""
    return {
        "shaver": Shaver(passes=passes, seed=seed),
        "shaver, model target": Shaver(passes=passes, target="model", seed=seed),
        "shaver, zero": Shaver(passes=passes, base="zero", seed=seed),
        "shaver, rows": Shaver(passes=passes, players="field", seed=seed),
        "codebook error": CodebookError(),
        "taylor": EntryTaylor(),
        "magnitude": EntryMagnitude(),
        "random": RandomEntries(seed=seed),
    }


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What was found; one row a score and budget."""

    dense: CtrScore
    dense_bytes: int
    train_seconds: float
    rows: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "dense": {"auc": self.dense.auc, "log_loss": self.dense.log_loss},
            "dense_bytes": self.dense_bytes, "train_seconds": self.train_seconds, "rows": self.rows,
        }  # fmt: skip


def trained_model(
    config: CtrConfig, train: Clicks, valid: Clicks, training: CtrTraining, report: Report | None = None
) -> tuple[CtrModel, float]:
    """Return a model trained from the seed of ``training``, and the seconds that it took."""
    begin = time.perf_counter()
    with torch.random.fork_rng([]):
        torch.manual_seed(training.seed)
        model = CtrModel(config)
    train_ctr(model, train, valid, training, report)
    return model, time.perf_counter() - begin


def study(
    model: CtrModel, train_seconds: float, parts: Sequence[Clicks], scorers: Mapping[str, Scorer],
    sparsities: Sequence[float], report: Report | None = None,
) -> Study:  # fmt: skip
    """Score by ``parts[0]``, cut the table to each budget and predict ``parts[-1]``."""
    rows = []
    for name, scorer in scorers.items():
        begin = time.perf_counter()
        scores = scorer(model, parts[0])
        seconds = time.perf_counter() - begin
        if report is not None:
            report(f"{name}: {seconds:.2f} s")
        for sparsity in sparsities:
            pruned = prune_embedding(model, scores, sparsity)
            found = score_ctr(pruned, parts[-1])
            assert isinstance(pruned.embedding, SparseEmbedding)
            rows.append(
                {
                    "scores": name, "sparsity": sparsity, "auc": found.auc, "log_loss": found.log_loss,
                    "score_seconds": seconds, "bytes": pruned.embedding.nbytes,
                    "disk_bytes": pruned.embedding.table.nbytes,
                }
            )  # fmt: skip
    return Study(score_ctr(model, parts[-1]), model.table.nbytes, train_seconds, rows)


def draw_study(found: Study, path: Path) -> Path:
    """Draw AUC and log loss over sparsity as a PNG, the dense model as a line; return ``path``."""
    figure = optional("matplotlib.figure", "ctr").Figure(figsize=(10, 4), layout="constrained")
    for ax, key, dense in zip(
        figure.subplots(1, 2), ("auc", "log_loss"), (found.dense.auc, found.dense.log_loss), strict=True
    ):
        for name in dict.fromkeys(row["scores"] for row in found.rows):
            mine = [row for row in found.rows if row["scores"] == name]
            ax.plot([row["sparsity"] for row in mine], [row[key] for row in mine], marker="o", label=name)
        ax.axhline(dense, color="black", linestyle=":", label="dense")
        ax.set(xlabel="sparsity", ylabel=key.replace("_", " "))
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)
    return path
