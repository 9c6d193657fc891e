"""The call that measures quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from pysparse.api.loading import Texts, load_model, texts_of, tokenizer_for
from pysparse.measure.agreement import Agreement
from pysparse.measure.perplexity import Perplexity
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.quality import score_models
from pysparse.measure.results import Result, make_table
from pysparse.measure.rounds import torch_threads
from pysparse.measure.windows import choose_window, text_windows


@dataclass(frozen=True, slots=True)
class Evaluation(Result):
    """Quality of a model, beside its dense reference when one was given."""

    perplexity: Perplexity
    reference: Perplexity | None = None
    agreement: Agreement | None = None  # with the reference

    def table(self) -> Table:
        """Return a rich table, the dense reference first."""
        columns = ("", "perplexity", "bits/byte", "top-1 agreement", "KL nats", "max logit error")
        rows: list[tuple[Any, ...]] = []
        if self.reference is not None:
            rows.append(("dense", self.reference.value, self.reference.bits_per_byte, 1.0, 0.0, 0.0))
        same = self.agreement
        rows.append((
            "model", self.perplexity.value, self.perplexity.bits_per_byte,
            *((same.top1, same.kl, same.max_logit_error) if same else (None, None, None)),
        ))  # fmt: skip
        protocol = self.perplexity.protocol
        caption = (
            f"{self.perplexity.tokens} tokens in {protocol['windows']} windows of {protocol['window']}, "
            f"stride {protocol['stride']}, {protocol['window_choice']}"
        )
        return make_table("quality", columns, rows, caption=caption)


def evaluate(
    model_or_path: nn.Module | str | Path,
    tokenizer: Any = None,
    texts: Texts | None = None,
    *,
    reference: nn.Module | str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    max_windows: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure perplexity and bits per byte; with a ``reference`` (the dense model) both models' and agreement.

    ``texts`` is a list of strings, or a .txt, .json or .jsonl file; None takes the bundled held-out text.
    ``tokenizer`` defaults to the one saved beside the model. The protocol (window, stride, tokens, bytes,
    seed, ...) is part of the result; see :func:`pysparse.measure.perplexity`. Raises ValueError for a window
    longer than the model, or for less text than one window.
    """
    model = load_model(model_or_path)
    tokenizer = tokenizer_for(model_or_path, model, tokenizer)
    documents = texts_of(texts)
    windows = text_windows(
        tokenizer, documents, choose_window(model, window), stride, max_windows=max_windows, seed=seed
    )
    models = {"model": model} if reference is None else {"dense": load_model(reference), "model": model}
    with torch_threads(threads), progress_on_stderr(progress) as advance:
        scores = score_models(
            models, windows, batch_size, lambda done, total: advance("evaluate", done, total)
        )
        figures = {name: Perplexity.from_score(scores[name], windows, models[name]) for name in models}
    same = None if reference is None else Agreement.from_score(scores["model"])
    return Evaluation(figures["model"], figures.get("dense"), same)
