"""Dense and sparse engines of one model side by side on a CUDA device: decoding as CUDA graphs, prefill, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pysparse.measure.comparison import BenchResult, BenchSettings
from pysparse.measure.latency import DecodeTiming, PrefillTiming, bytes_per_step, random_tokens
from pysparse.measure.machine import machine_card
from pysparse.measure.memory import model_bytes
from pysparse.measure.quality import evaluating
from pysparse.measure.results import to_jsonable
from pysparse.measure.rounds import Spread, percentile, ratios
from pysparse.models.static_decode import WARMUP_STEPS, StaticDecoder

_RECOMPILATIONS = 1 << 12  # of one function: several models of some ten blocks each
OnRound = Callable[[str, int, int], None]
OnMeasured = Callable[[str, Mapping[str, Any]], None]


def compile_blocks_(model: nn.Module) -> nn.Module:
    """Let torch.compile take each decoder block of ``model`` when it is first called; in place.

    The blocks are the longest ModuleList; ValueError when there is none. Each is compiled for itself, as its place in
    the KV cache is a constant of it; torch's limit of compilations of one function is raised for them.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks to compile")
    blocks = max(lists, key=len)
    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    for block in blocks:
        block.compile(fullgraph=True)
    return model


def compare_on_cuda(
    models: Mapping[str, nn.Module],
    settings: BenchSettings,
    *,
    title: str,
    weights: str,
    difference: dict[str, dict[str, float]],
    notes: tuple[str, ...] = (),
    on_round: OnRound | None = None,
    on_measured: OnMeasured | None = None,
) -> BenchResult:
    """Time the models (on one CUDA device, one dtype), interleaved; the first one is the baseline.

    Decoding is greedy with a static KV cache, a CUDA graph a step (:class:`StaticDecoder`), timed by events around
    each step. Prefill (the forward pass without the head) and the first token run eagerly. Model bytes are those of
    parameters and buffers. ``on_measured`` is given "decode" and "prefill" with their figures as soon as there are any,
    for a run that may be cut off. Raises ValueError when prompt and new tokens are longer than a model takes.
    """
    card = machine_card() | gpu_card()
    with evaluating(*models.values()):
        decode = _decode(models, settings, on_round)
        if on_measured is not None:
            on_measured("decode", decode)
        prefill = _prefill(models, settings, on_round)
        if on_measured is not None:
            on_measured("prefill", prefill)
    stated = {
        **to_jsonable(settings),
        "threads": torch.get_num_threads(),
        "weights": weights,
        "dtype": str(next(iter(models.values())).dtype).removeprefix("torch."),
        "engines": list(models),
        "decode": "greedy, static KV cache, one CUDA graph a step",
        "order": "round robin, turned every round; speed-up = median of per-round ratios",
    }
    sizes = {name: model_bytes(model).total for name, model in models.items()}
    memory = {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    return BenchResult(title, stated, decode, prefill, sizes, difference, memory, card, list(notes))


def gpu_card() -> dict[str, Any]:
    """Return what is known of the current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability()),
        "torch_cuda": torch.version.cuda,
    }


def _turns(names: list[str], rounds: int) -> list[list[str]]:
    return [names[i % len(names) :] + names[: i % len(names)] for i in range(rounds)]


def _timed(calls: list[Callable[[], object]]) -> list[float]:
    """Return the milliseconds of each call on the device, run back to back."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def _decode(
    models: Mapping[str, nn.Module], settings: BenchSettings, on_round: OnRound | None
) -> dict[str, DecodeTiming]:
    first = next(iter(models.values()))
    rounds = settings.rounds + settings.warmup
    capacity = settings.prompt_len + WARMUP_STEPS + rounds * settings.new_tokens
    random_tokens(first, 1, capacity, settings.seed)  # ValueError where the model takes fewer positions
    prompt = random_tokens(first, settings.batch_size, settings.prompt_len, settings.seed).cuda()
    decoders = {name: StaticDecoder(model, prompt, capacity) for name, model in models.items()}
    steps: dict[str, list[list[float]]] = {name: [] for name in models}
    for index, order in enumerate(_turns(list(models), rounds)):
        for name in order:
            times = _timed([decoders[name].step] * settings.new_tokens)
            if index >= settings.warmup:
                steps[name].append(times)
        if on_round is not None:
            on_round("decode", index + 1, rounds)
    firsts = _first_tokens(models, prompt, settings)
    medians = {name: [percentile(times, 50) for times in taken] for name, taken in steps.items()}
    baseline = next(iter(medians.values()))
    result = {}
    for name, taken in steps.items():
        every = [time for times in taken for time in times]
        p50 = percentile(every, 50)
        result[name] = DecodeTiming(
            tokens_per_second=1e3 * settings.batch_size / p50,
            milliseconds_p50=p50,
            milliseconds_p90=percentile(every, 90),
            milliseconds_p99=percentile(every, 99),
            first_token_milliseconds=firsts[name],
            speedup=ratios(baseline, medians[name]),
            waited=0.0,
            bytes_per_step=bytes_per_step(models[name]),
        )
    return result


def _first_tokens(
    models: Mapping[str, nn.Module], prompt: Tensor, settings: BenchSettings
) -> dict[str, Spread]:
    calls = {
        name: lambda model=model: model(input_ids=prompt, use_cache=False).logits[:, -1].argmax(dim=-1)
        for name, model in models.items()
    }
    return {name: Spread.of(times) for name, times in _interleaved(calls, settings).items()}


def _prefill(
    models: Mapping[str, nn.Module], settings: BenchSettings, on_round: OnRound | None
) -> dict[str, PrefillTiming]:
    first = next(iter(models.values()))
    tokens = random_tokens(first, settings.batch_size, settings.prompt_len, settings.seed).cuda()
    backbones = {name: getattr(model, "base_model", model) for name, model in models.items()}
    calls = {
        name: lambda model=model: model(input_ids=tokens, use_cache=False)
        for name, model in backbones.items()
    }
    times = _interleaved(calls, settings)
    if on_round is not None:
        on_round("prefill", settings.rounds, settings.rounds)
    baseline = next(iter(times.values()))
    return {
        name: PrefillTiming(
            tokens_per_second=1e3 * tokens.numel() / percentile(taken, 50),
            milliseconds=Spread.of(taken),
            speedup=ratios(baseline, taken),
            waited=0.0,
        )
        for name, taken in times.items()
    }


def _interleaved(
    calls: Mapping[str, Callable[[], object]], settings: BenchSettings
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index, order in enumerate(_turns(list(calls), settings.rounds + settings.warmup)):
            for name in order:
                (one,) = _timed([calls[name]])
                if index >= settings.warmup:
                    times[name].append(one)
    return times
