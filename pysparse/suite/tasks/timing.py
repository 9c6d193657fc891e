"""Dense and sparse timed in turns, as records show it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pysparse.measure.latency import DecodeTiming, PrefillTiming, decode_benchmark, prefill_benchmark
from pysparse.measure.quality import evaluating
from pysparse.measure.rounds import Spread, percentile, ratios, round_robin, torch_threads
from pysparse.suite.tasks.protocol import Speed


def decode_and_prefill(
    dense: nn.Module, sparse: nn.Module, prompt_len: int, new_tokens: int, rounds: int, threads: int
) -> list[Speed]:
    """Time generation token by token, and a whole prompt at once, batch 1, on random tokens."""
    models = {"dense": dense, "sparse": sparse}
    decode = decode_benchmark(models, prompt_len, new_tokens, rounds=rounds, threads=threads)
    return [
        _speed("decode", prompt_len, decode),
        prefill(dense, sparse, prompt_len, rounds, threads),
    ]


def prefill(
    dense: nn.Module, sparse: nn.Module, tokens: int, rounds: int, threads: int, repeats: int = 1
) -> Speed:
    """Time one forward pass over ``tokens`` random tokens, batch 1, without the head."""
    models = {"dense": dense, "sparse": sparse}
    timings = prefill_benchmark(models, tokens, rounds=rounds, repeats=repeats, threads=threads)
    return _speed("prefill", tokens, timings)


def per_second(
    workload: tuple[str, str, int], dense: nn.Module, sparse: nn.Module, call: Callable[[nn.Module], Any],
    *, rounds: int, threads: int, repeats: int = 1,
) -> Speed:  # fmt: skip
    """Time ``call(model)`` for a workload (name, unit, items in one call), in eval mode without gradients.

    ``repeats`` calls make one sample, for models that take less than a millisecond.
    """
    name, unit, batch = workload

    def sampler(model: nn.Module) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            for _ in range(repeats):
                call(model)
            return (time.perf_counter() - start) / repeats

        return sample

    with torch_threads(threads), evaluating(dense, sparse):
        run = round_robin({"dense": sampler(dense), "sparse": sampler(sparse)}, rounds, warmup=1)
    seconds = run.results
    speeds = {engine: batch / percentile(times, 50) for engine, times in seconds.items()}
    return _made(name, unit, batch, None, speeds, ratios(seconds["dense"], seconds["sparse"]))


def _speed(
    name: str, tokens: int, timings: Mapping[str, DecodeTiming] | Mapping[str, PrefillTiming]
) -> Speed:
    speeds = {engine: timing.tokens_per_second for engine, timing in timings.items()}
    return _made(name, "tokens/s", 1, tokens, speeds, timings["sparse"].speedup)


def _made(
    name: str, unit: str, batch: int, tokens: int | None, speeds: Mapping[str, float], ratio: Spread
) -> Speed:
    return Speed(
        name, unit, batch, tokens, speeds["dense"], speeds["sparse"], ratio.median, ratio.p10, ratio.p90
    )
