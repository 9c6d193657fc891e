"""What a planner does to a model on one long prompt: densities, recall, time, fallbacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from pysparse.api.loading import Texts, load_model, texts_of, tokenizer_for
from pysparse.attention import AttentionLog, Planner
from pysparse.attention.crossover import LENGTHS, SHORTEST, crossover_file, tune_crossover
from pysparse.huggingface.attention import attention_options, use_attention
from pysparse.measure.results import Result, make_table
from pysparse.measure.rounds import torch_threads
from pysparse.methods import planner_for


def attention_stats(
    model: nn.Module | str | Path, planner: Planner | str | None = "anchor", *, prompt: Tensor | Texts | None = None,
    length: int = 8192, dtype: torch.dtype | None = None, min_length: int | None = None, max_density: float = 0.6,
    sample_rows: int = 64, threads: int | None = None, tokenizer: Any | None = None,
) -> AttentionLog:  # fmt: skip
    """Run one prompt of ``length`` tokens through ``model`` with ``planner`` and return what its attention did.

    ``planner`` is a name in ``pysparse.methods.PLANNERS``, an object, or None for exact attention. ``prompt`` is
    token ids [1, N] or texts, joined and repeated to the length; None takes the bundled held-out text. A model
    object has its own attention again afterwards. Raises ValueError for a length below 2, and
    when texts are to be read for a model without a tokenizer.
    """
    if length < 2:
        raise ValueError(f"length={length}: a prompt has at least 2 tokens")
    network = load_model(model, dtype).eval()
    tokens = prompt if isinstance(prompt, Tensor) else _tokens(model, network, tokenizer, prompt)
    repeats = -(-length // tokens.shape[1])
    tokens = tokens.repeat(1, repeats)[:, :length]
    before = str(getattr(network.config, "_attn_implementation", "sdpa"))
    use_attention(network, planner)
    with (
        torch_threads(threads),
        torch.no_grad(),
        attention_options(
            planner, min_length=min_length, max_density=max_density, sample_rows=sample_rows, profile=True
        ) as log,
    ):
        network(tokens, use_cache=False, logits_to_keep=1)
    if isinstance(model, nn.Module):
        network.set_attn_implementation(before)  # type: ignore[operator]
    return log


def _tokens(
    source: nn.Module | str | Path, network: nn.Module, tokenizer: Any, prompt: Texts | None
) -> Tensor:
    text = "\n\n".join(texts_of(prompt))
    found = tokenizer_for(source, network, tokenizer)
    tokens: Tensor = found(text, return_tensors="pt", verbose=False)["input_ids"]
    if tokens.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    return tokens


@dataclass(frozen=True, slots=True)
class TunedAttention(Result):
    """From how many keys on a planner is used, the speed over exact attention by length, and where that is kept.

    ``keys`` is None where the planner was not faster at the longest: calls of fewer than twice that stay exact.
    """

    planner: str
    keys: int | None
    speedup: dict[int, float]
    file: str

    def table(self) -> Table:
        """Return a rich table, a line for each length."""
        lines = [(length, f"{ratio:.2f}") for length, ratio in self.speedup.items()]
        used = f"used from {self.keys} keys on"
        if self.keys is None:
            used = f"no crossover found up to {max(self.speedup)} keys: calls of fewer than twice that stay exact"
        caption = f"{used}; kept in {self.file}"
        return make_table(self.planner, ("keys", "times faster than exact"), lines, caption=caption)


def tune_attention(
    planner: Planner | str = "anchor", dtype: torch.dtype = torch.bfloat16, *, longest: int = 8192,
    threads: int | None = None,
) -> TunedAttention:  # fmt: skip
    """Time ``planner`` beside exact attention to ``longest`` keys now, and keep from how many on it is faster.

    Prompts of fewer keys are exact from then on, in every process with the same threads, unless ``min_length`` says
    otherwise. Raises ValueError for an unknown planner or a ``longest`` below ``SHORTEST``.
    """
    chosen = planner_for(planner)
    if longest < SHORTEST:
        raise ValueError(f"longest={longest} keys: the longest call timed has at least {SHORTEST}")
    lengths = [length for length in LENGTHS if length < longest] + [longest]
    with torch_threads(threads):
        found = tune_crossover(chosen, dtype, lengths)
        path = crossover_file(chosen, dtype)
    return TunedAttention(str(chosen), found.keys, found.speedup, str(path))
