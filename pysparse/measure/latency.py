"""Speed of whole models through their own ``generate()`` and ``forward``, beside the dense model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.measure.memory import model_bytes
from pysparse.measure.quality import evaluating
from pysparse.measure.rounds import RoundRobin, Spread, percentile, ratios, round_robin, torch_threads
from pysparse.measure.windows import max_positions

OnRound = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """Times of one ``generate()`` call, in seconds."""

    first_token: float  # from the call to the first new token: prefill and one sampling step
    per_token: tuple[float, ...]  # between consecutive further tokens


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Decode speed of one engine over all rounds."""

    tokens_per_second: float  # batch_size / median time per step
    milliseconds_p50: float  # per decode step, all rounds together
    milliseconds_p90: float
    milliseconds_p99: float
    first_token_milliseconds: Spread
    speedup: Spread  # baseline's median step over this one's, round by round
    waited: float  # fraction of the time that threads stood in the run queue: over 0.1 is a disturbed run
    bytes_per_step: int  # weights that a step reads


@dataclass(frozen=True, slots=True)
class PrefillTiming:
    """Speed of one engine over a whole sequence at once."""

    tokens_per_second: float
    milliseconds: Spread
    speedup: Spread
    waited: float


class _TokenClock:
    """What ``generate(streamer=...)`` wants: notes the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return None


def random_tokens(model: nn.Module, batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Return int64 [batch_size, length] token ids drawn below the model's vocabulary.

    ValueError when the length is outside what the model takes.
    """
    limit = max_positions(model)
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch_size={batch_size} and prompt_len={length} must be at least 1")
    if limit is not None and length > limit:
        raise ValueError(f"{length} tokens are longer than the {limit} positions of this model")
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch_size, length), generator=generator)


@contextmanager
def _never_ending(model: nn.Module) -> Iterator[None]:
    """Let ``generate`` run its full length: no end-of-sequence token inside the block."""
    config: Any = getattr(model, "generation_config", None)
    before = getattr(config, "eos_token_id", None)
    if config is not None:
        config.eos_token_id = None
    try:
        yield
    finally:
        if config is not None:
            config.eos_token_id = before


def generate_timed(model: nn.Module, prompt: Tensor, new_tokens: int) -> Generation:
    """Generate exactly ``new_tokens`` greedily after ``prompt`` [B, T] with the KV cache, timing each token.

    ValueError when the model cannot generate, or fewer than 2 tokens are asked for.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(
            f"{type(model).__name__} has no generate(): measure it with prefill_benchmark instead"
        )
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens}: at least 2 are needed to time the step between them")
    clock = _TokenClock()
    with _never_ending(model):
        start = time.perf_counter()
        generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
            max_new_tokens=new_tokens, pad_token_id=0, streamer=clock,
        )  # fmt: skip
    tokens = clock.times[1:]  # the first call hands over the prompt
    if len(tokens) != new_tokens:
        raise RuntimeError(f"generate() streamed {len(tokens)} tokens instead of {new_tokens}")
    steps = tuple(after - before for before, after in pairwise(tokens))
    return Generation(tokens[0] - start, steps)


def decode_benchmark(
    models: Mapping[str, nn.Module],
    prompt_len: int = 64,
    new_tokens: int = 32,
    batch_size: int = 1,
    *,
    rounds: int = 5,
    warmup: int = 1,
    threads: int | None = None,
    seed: int = 0,
    on_round: OnRound | None = None,
) -> dict[str, DecodeTiming]:
    """Time token-by-token generation of each model, interleaved; the first one is the baseline.

    Every round runs ``generate()`` once with every model on the same random prompt. Raises ValueError when
    prompt and new tokens together are longer than a model takes.
    """
    _check_models(models)
    first = next(iter(models.values()))
    prompt = random_tokens(first, batch_size, prompt_len, seed)
    limit = max_positions(first)
    if limit is not None and prompt_len + new_tokens > limit:
        raise ValueError(
            f"prompt_len={prompt_len} + new_tokens={new_tokens} exceeds the {limit} positions of this model"
        )
    with torch_threads(threads) as used, evaluating(*models.values()):
        calls = {name: _bind(generate_timed, model, prompt, new_tokens) for name, model in models.items()}
        run = round_robin(calls, rounds, warmup, on_round)
    return _summarise_decode(models, run, batch_size, used)


def _bind(
    function: Callable[..., Generation], model: nn.Module, prompt: Tensor, count: int
) -> Callable[[], Generation]:
    return lambda: function(model, prompt, count)


def _check_models(models: Mapping[str, nn.Module]) -> None:
    if not models:
        raise ValueError("no model to time")
    dtypes = {name: getattr(model, "dtype", None) for name, model in models.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"models of different dtypes are no fair comparison: {dtypes}")


def _summarise_decode(
    models: Mapping[str, nn.Module], run: RoundRobin[Generation], batch_size: int, threads: int
) -> dict[str, DecodeTiming]:
    medians = {
        name: [percentile(generation.per_token, 50) for generation in results]
        for name, results in run.results.items()
    }
    baseline = next(iter(medians.values()))
    summary = {}
    for name, results in run.results.items():
        steps = [seconds for generation in results for seconds in generation.per_token]
        spent = sum(steps) + sum(generation.first_token for generation in results)
        p50 = percentile(steps, 50)
        summary[name] = DecodeTiming(
            tokens_per_second=batch_size / p50,
            milliseconds_p50=1e3 * p50,
            milliseconds_p90=1e3 * percentile(steps, 90),
            milliseconds_p99=1e3 * percentile(steps, 99),
            first_token_milliseconds=Spread.of([1e3 * generation.first_token for generation in results]),
            speedup=ratios(baseline, medians[name]),
            waited=sum(run.waits[name]) / (spent * threads),
            bytes_per_step=bytes_per_step(models[name]),
        )
    return summary


def prefill_benchmark(
    models: Mapping[str, nn.Module],
    seq_len: int = 128,
    batch_size: int = 1,
    *,
    rounds: int = 5,
    warmup: int = 1,
    repeats: int = 1,
    threads: int | None = None,
    seed: int = 0,
    on_round: OnRound | None = None,
) -> dict[str, PrefillTiming]:
    """Time one forward pass over ``batch_size`` x ``seq_len`` tokens, interleaved; encoders welcome.

    ``repeats`` calls make one sample (their mean), for models that take less than a millisecond. The output
    head is left out: ``generate()`` asks it for one position, a strided slice for which torch first copies
    the whole transposed head weight (0.7 s at 32000 x 4096 in bf16, most of a short prompt's time). That
    cost belongs to no layer that sparsity speeds up; it shows in the time to first token.
    """
    _check_models(models)
    tokens = random_tokens(next(iter(models.values())), batch_size, seq_len, seed)
    with torch_threads(threads) as used, evaluating(*models.values()):
        calls = {name: _forward_call(model, tokens, repeats) for name, model in models.items()}
        run = round_robin(calls, rounds, warmup, on_round)
    baseline = next(iter(run.results.values()))
    return {
        name: PrefillTiming(
            tokens_per_second=tokens.numel() / percentile(seconds, 50),
            milliseconds=Spread.of([1e3 * value for value in seconds]),
            speedup=ratios(baseline, seconds),
            waited=sum(run.waits[name]) / (sum(seconds) * repeats * used),
        )
        for name, seconds in run.results.items()
    }


def _forward_call(model: nn.Module, tokens: Tensor, repeats: int) -> Callable[[], float]:
    backbone: nn.Module = getattr(model, "base_model", model)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens)}

    def call() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            backbone(input_ids=tokens, **options)
        return (time.perf_counter() - start) / repeats

    return call


def bytes_per_step(model: nn.Module) -> int:
    """Bytes of weights that one decode step reads: all but an embedding that is not tied to the head."""
    held = model_bytes(model)
    total = held.parameters + held.buffers
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is None or head is None or head.weight is embeddings.weight:
        return total
    weight: Tensor = embeddings.weight
    return total - weight.numel() * weight.element_size()
