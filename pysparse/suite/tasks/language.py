"""Language modelling: perplexity on held-out text by the papers' protocol, decode and prefill speed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pysparse import data
from pysparse.api.loading import load_model, tokenizer_for
from pysparse.measure.perplexity import perplexity
from pysparse.suite.tasks.protocol import OfTransformers, Quality, Speed
from pysparse.suite.tasks.timing import decode_and_prefill

DEMO = "demo"  # the bundled model


def model_source(name: str) -> str:
    """Return where a causal language model lies: the bundled one's folder, or the path itself."""
    return str(data.demo_model_path()) if name == DEMO else name


class CausalModels(OfTransformers):
    """What tasks on causal language models share: where they lie, decode and prefill speed."""

    __slots__ = ()

    prompt_len: int  # of the timed prompt
    new_tokens: int  # decoded one by one
    rounds: int  # of timing

    def models(self) -> tuple[str, ...]:
        """The bundled model."""
        return (DEMO,)

    def load(self, model: str, *, seed: int) -> nn.Module:
        """Load the model in its own dtype; the seed plays no part."""
        return load_model(model_source(model), format="dense").eval()

    def speed(self, dense: nn.Module, sparse: nn.Module, name: str, *, threads: int) -> list[Speed]:
        """Decode and prefill, batch 1."""
        return decode_and_prefill(dense, sparse, self.prompt_len, self.new_tokens, self.rounds, threads)


@dataclass(frozen=True, slots=True)
class Language(CausalModels):
    """Perplexity of the bundled held-out text (arXiv 2306.11695's protocol): joined by blank lines, tokenized once,
    windows without overlap, all positions but the first of each scored.
    """

    window: int = 512  # tokens
    windows: int = 48  # at most, drawn once and for all with seed 0: the same for every cell
    batch_size: int = 4
    prompt_len: int = 64
    new_tokens: int = 32
    rounds: int = 5  # of timing

    name = "language"

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Perplexity; bits per byte beside it compare models with other tokenizers."""
        found = perplexity(
            model, tokenizer_for(model_source(name), model, None), data.held_out_texts(), self.window,
            batch_size=self.batch_size, max_windows=self.windows,
        )  # fmt: skip
        others = {
            "bits_per_byte": found.bits_per_byte,
            "nats_per_token": found.nats_per_token,
            "tokens": found.tokens,
        }
        return Quality("perplexity", found.value, higher_is_better=False, others=others)
