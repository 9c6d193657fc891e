"""Recall and time of sparse-attention planners: every setting's recall, then the best of each timed in one race."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Call, Timing, time_calls
from retrieval_model.tasks import Tasks, local_text
from transformers import AutoModelForCausalLM

import pysparse
from pysparse.attention import AttentionInput, AttentionPlan, Fused, Planner, attend, dense
from pysparse.attention.quality import Quality, curves
from pysparse.attention.synthetic import Synthetic
from pysparse.measure.results import to_jsonable
from pysparse.methods import (
    AnchorAttention,
    FlexPrefill,
    ProxyAttention,
    StreamingAttention,
    VerticalSlash,
    XAttention,
)

Row = dict[str, Any]
TARGETS = (0.95, 0.99)
DENSE, RIVAL = "dense", "flexprefill"
WANTED = {
    "anchor": 1.44
}  # times faster than the FlexPrefill-like planner at equal recall: the published figure
GROUPS = (256, 512, 1024)
LONG = 16384  # tokens from which the grid is coarser: a pass over it takes minutes


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Attention calls of one kind and length; figures of a planner are means or sums over them."""

    name: str
    length: int
    inputs: list[AttentionInput]


def synthetic(length: int, seed: int) -> Source:
    return Source(
        "synthetic", length, [AttentionInput.of(*Synthetic(length, seed=seed).make(torch.bfloat16))]
    )


@torch.no_grad()
def trained(folder: Path, length: int, seed: int) -> Source:
    """Every layer's call of the retrieval model, on a text with hidden facts and on a copied passage; in bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = Seen()
    pysparse.use_attention(model, seen, min_length=0, max_density=1.0)
    tasks = Tasks(local_text(), seed)
    for tokens, _ in (tasks.facts(length), tasks.copy(length)):
        model(tokens.unsqueeze(0), use_cache=False, logits_to_keep=1)
    return Source("trained model", length, seen.inputs)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A planner that keeps what it is asked, and computes everything."""

    inputs: list[AttentionInput] = dataclasses.field(default_factory=list, compare=False)
    crossover = 0

    def plan(self, given: AttentionInput) -> AttentionPlan:
        q, k, v = (tensor.bfloat16() for tensor in (given.query, given.key, given.value))
        self.inputs.append(dataclasses.replace(given, query=q, key=k, value=v))
        return AnchorAttention(theta=float("inf")).plan(given)


def families(length: int, quick: bool) -> dict[str, list[Planner]]:
    """Each planner over its knob; AnchorAttention over its groups too: small ones cut what is always dense.

    A gamma of 1 is everything, where a planner's curve ends. Long calls take a coarser grid, without the settings
    that lose at 8k tokens.
    """
    gammas: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
    thetas: tuple[float, ...] = (0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    groups, sizes, windows = GROUPS, (64, 128, 256, 512, 1024), (256, 1024, 4096)
    if length >= LONG:
        gammas, thetas, groups = (0.9, 0.98, 0.99, 0.999, 1.0), (0.0, 4.0, 8.0), (512, 1024)
        sizes, windows = (256, 1024, 2048), (4096,)
    if quick:
        gammas, thetas, groups, sizes, windows = (0.8, 0.999), (2.0, 8.0), (512,), (128, 512), (256,)
    return {
        "anchor": [AnchorAttention(theta, group) for theta in thetas for group in groups],
        "proxy": [ProxyAttention(gamma, minimum=512) for gamma in gammas],
        "flexprefill": [FlexPrefill(gamma, minimum=512) for gamma in gammas],
        "xattention": [XAttention(gamma) for gamma in gammas],
        "vertical-slash": [VerticalSlash(size, 2 * size) for size in sizes],
        "streaming": [StreamingAttention(128, window) for window in windows],
    }


Measured = dict[str, list[list[Quality]]]  # family -> call -> setting


def measure(source: Source, planners: Mapping[str, Sequence[Planner]], rows: int) -> Measured:
    """Measure every planner on every call of ``source``."""
    by_call = [curves(given, planners, rows) for given in source.inputs]
    return {family: [call[family] for call in by_call] for family in planners}


def curve_rows(source: Source, measured: Measured) -> Iterator[Row]:
    """One row for each setting: means over the calls."""
    for family, calls in measured.items():
        for points in zip(*calls, strict=True):
            dicts = [point.to_dict() for point in points]
            means = {
                name: statistics.mean(one[name] for one in dicts)
                for name in ("density", "recall", "recall_p1", "recall_p10", "error")
            }
            yield {"what": "curve", "source": source.name, "length": source.length, "planner": family,
                   "setting": str(points[0].planner), **means,
                   "recall_by_call": [one["recall"] for one in dicts]}  # fmt: skip


def contenders(rows: Sequence[Row], target: float) -> list[Row]:
    """For each family the least dense setting that reaches ``target``; of AnchorAttention one for each group size."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        group = row["setting"].split("group_size=")[1].split(",")[0] if row["planner"] == "anchor" else ""
        held = best.get((row["planner"], group))
        if row["recall"] >= target and (held is None or row["density"] < held["density"]):
            best[row["planner"], group] = row
    anchors = sorted(
        (row for (family, _), row in best.items() if family == "anchor"), key=lambda r: r["density"]
    )
    return anchors[:2] + [row for (family, _), row in best.items() if family != "anchor"]


def race(source: Source, rows: Sequence[Row], planners: Mapping[str, Planner], rounds: int) -> list[Row]:
    """Time the contenders of every target and exact attention in turn; one row for each target and family."""
    chosen = {target: contenders(rows, target) for target in TARGETS}
    names = {row["setting"] for best in chosen.values() for row in best}
    calls = {name: _all(source, planners[name]) for name in names}
    calls[DENSE] = lambda: [dense(given) for given in source.inputs]
    timings = timed(calls, rounds)
    found = []
    for target, best in chosen.items():
        ours = {row["planner"]: row["setting"] for row in reversed(best)}
        for row in best:  # of two AnchorAttentions the faster
            held = ours[row["planner"]]
            if fastest(timings[row["setting"]].seconds) < fastest(timings[held].seconds):
                ours[row["planner"]] = row["setting"]
        for row in best:
            if ours[row["planner"]] != row["setting"]:
                continue
            timing = timings[row["setting"]]
            rival = timings[ours[RIVAL]] if RIVAL in ours else None
            found.append(
                {"what": "equal recall", "source": source.name, "length": source.length, "target": target,
                 "planner": row["planner"], "setting": row["setting"], "density": row["density"],
                 "recall": row["recall"], "error": row["error"], **timing.record(),
                 "faster_than_dense": to_jsonable(timing.speedup_over(timings[DENSE])),
                 "faster_than_flexprefill": to_jsonable(timing.speedup_over(rival)) if rival else None,
                 "wanted": WANTED.get(row["planner"]), **pieces(source, planners[row["setting"]])}
            )  # fmt: skip
    return found


def timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time one call of each a round, in turn; disturbed samples are dropped, and more taken for them.

    Planners select by torch's operations, whose threads sleep between them.
    """
    whole = {name: Call(call, own_waits=True) for name, call in calls.items()}
    return time_calls(whole, rounds, sample_seconds=0.0, warmup=1)


def fastest(seconds: Sequence[float | None]) -> float:
    return min((value for value in seconds if value is not None), default=float("inf"))


def _all(source: Source, planner: Planner) -> Callable[[], Any]:
    if isinstance(planner, Fused):
        return lambda: [planner.attend(given) for given in source.inputs]
    return lambda: [attend(given, planner) for given in source.inputs]


def pieces(source: Source, planner: Planner) -> Row:
    """Milliseconds of choosing and of computing, one after the other (AnchorAttention's first includes its region)."""
    results = [attend(given, planner) for given in source.inputs]
    return {
        "select_ms": 1e3 * sum(result.select_seconds for result in results),
        "compute_ms": 1e3 * sum(result.compute_seconds for result in results),
    }
