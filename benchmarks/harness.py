"""What the benchmarks share: cold weights, interleaved clean samples, one result file a command."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from pysparse.measure.machine import last_level_cache_bytes, machine_card
from pysparse.measure.results import to_jsonable, write_text
from pysparse.measure.rounds import Spread, ratios, round_robin

RESULTS = Path(__file__).resolve().parent / "results"
WAIT_LIMIT = 0.02  # of a sample's time in the run queue: above it, other programs are being measured
PATIENCE = 4  # times the wished rounds, when others disturb
MIN_CLEAN = 3  # samples below which a figure is withheld
COLD_BYTES = max(160_000_000, 4 * last_level_cache_bytes() + 1)  # per engine: evicts what was read last time

T = TypeVar("T")


class Rotation(Generic[T]):
    """Copies of one thing, handed out in turn; a copy comes again only when all the others have been used."""

    def __init__(self, copies: Sequence[T]) -> None:
        self._copies, self._next = list(copies), 0

    def __len__(self) -> int:
        return len(self._copies)

    def take(self) -> T:
        copy = self._copies[self._next]
        self._next = (self._next + 1) % len(self._copies)
        return copy


def cold_copies(
    make: Callable[[], T], nbytes: Callable[[T], int], working_set: int = COLD_BYTES
) -> Rotation[T]:
    """Make copies until together they exceed ``working_set`` bytes; 0 makes one, which stays in the caches."""
    copies = [make()]
    while len(copies) * nbytes(copies[0]) < working_set:
        copies.append(make())
    return Rotation(copies)


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one engine, a round an entry, in seconds a call; None where its threads had to wait for a core."""

    seconds: tuple[float | None, ...]
    calls: int  # that make one sample

    @property
    def clean(self) -> int:
        return sum(value is not None for value in self.seconds)

    def spread(self) -> Spread | None:
        """Microseconds a call over the clean samples; None when they are too few to say."""
        clean = [1e6 * value for value in self.seconds if value is not None]
        return Spread.of(clean) if len(clean) >= MIN_CLEAN else None

    def speedup_over(self, other: Timing) -> Spread | None:
        """How many times faster than ``other``, round by round where both samples are clean."""
        pairs = [
            (theirs, ours)
            for theirs, ours in zip(other.seconds, self.seconds, strict=True)
            if theirs is not None and ours is not None
        ]
        return ratios(*zip(*pairs, strict=True)) if len(pairs) >= MIN_CLEAN else None

    def record(self) -> dict[str, Any]:
        """A JSON-ready summary."""
        return {
            "microseconds": to_jsonable(self.spread()),
            "samples_clean": self.clean,
            "samples_dropped": len(self.seconds) - self.clean,
            "calls_per_sample": self.calls,
        }


@dataclass(frozen=True, slots=True)
class Call:
    """What is timed, and the setting that holds around a sample of it."""

    function: Callable[[], Any]
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    # Another process's timing of so many calls: (seconds a call, seconds that its threads waited for others).
    remote: Callable[[int], tuple[float, float]] | None = None
    own_waits: bool = False  # another library's threads sleep between its pieces: see undisturbed


def time_calls(
    calls: Mapping[str, Call], rounds: int, sample_seconds: float = 0.008, warmup: int = 2
) -> dict[str, Timing]:
    """Time ``calls`` interleaved: each round takes one sample of each, of as many calls as fill the time.

    A sample during which the engine's threads stood in the run queue for more than 2 % of its time is dropped and
    counted (:func:`undisturbed`). While less than half of the wished samples of any engine are clean, all go on, to
    at most four times ``rounds``.
    """
    counts = {name: _calls_for(call, sample_seconds) for name, call in calls.items()}
    samplers = {name: _sampler(call, counts[name]) for name, call in calls.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(PATIENCE):
        run = round_robin(samplers, rounds, warmup)
        for name in calls:
            samples[name] += [
                (one, (waited if theirs is None else theirs) / (one * counts[name]))
                for (one, theirs), waited in zip(run.results[name], run.waits[name], strict=True)
            ]
        timings = {
            name: Timing(undisturbed(samples[name], own_waits=call.own_waits), counts[name])
            for name, call in calls.items()
        }
        if all(timing.clean >= max(MIN_CLEAN, rounds / 2) for timing in timings.values()):
            break
    return timings


def undisturbed(samples: Sequence[tuple[float, float]], own_waits: bool = False) -> tuple[float | None, ...]:
    """Return the seconds of each sample (seconds, share waited), None where its threads waited for other programs.

    With ``own_waits``, the least share that any sample shows is the engine's own doing: threads of another library
    that sleep between its calls wait at every waking, on an idle machine too. What is above it comes from others.
    """
    least = min(share for _, share in samples) if own_waits else 0.0
    return tuple(one if share <= least + WAIT_LIMIT else None for one, share in samples)


def _calls_for(call: Call, sample_seconds: float) -> int:
    sample = _sampler(call, 1)
    sample()
    once = min(sample()[0], sample()[0])
    return max(1, round(sample_seconds / once))


def _sampler(call: Call, count: int) -> Callable[[], tuple[float, float | None]]:
    function, setting, remote = call.function, call.setting, call.remote
    if remote is not None:
        return lambda: remote(count)

    def sample() -> tuple[float, float | None]:
        with setting():
            start = time.perf_counter()
            for _ in range(count):
                function()
            return (time.perf_counter() - start) / count, None

    return sample


def command_line(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; one with its own adds them."""
    parser = argparse.ArgumentParser(prog=f"bench_{name}.py", description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check that it runs")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/, none if quick")
    parser.add_argument("--append", action="store_true", help="add this run to an existing result file")
    parser.add_argument("--threads", type=int, help="default: torch's number")
    return parser


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a benchmark; made before the timing, so that the card shows the load that others cause."""

    name: str
    options: argparse.Namespace
    machine: dict[str, Any]

    @classmethod
    def start(cls, name: str, options: argparse.Namespace) -> Run:
        disable_progress_bar()  # of transformers, one for each model loaded
        return cls(name, options, machine_card())

    def save(
        self,
        protocol: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        earlier: Sequence[Mapping[str, Any]] | None = None,
    ) -> Path | None:
        """Write machine, protocol and rows; None when it was a quick run without a file to write to.

        ``earlier`` are the runs that stay before this one in the file; by default those in it with --append.
        """
        path = result_path(self)
        if path is None:
            return None
        run = {"machine": self.machine, "quick": self.options.quick, "protocol": protocol, "rows": rows}
        if earlier is None:
            earlier = read_runs(path) if self.options.append and path.exists() else []
        return write_text(path, _as_json(self.name, [*earlier, run]))


def result_path(run: Run) -> Path | None:
    """Where a run is written: --output, else the results folder; None for a quick run without --output."""
    if run.options.output is not None or run.options.quick:
        output: Path | None = run.options.output
        return output
    date = datetime.date.today().isoformat()
    return RESULTS / f"{run.name}_{machine_name(run.machine)}_{date}.json"


def _as_json(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """JSON with one line a row, so that a file of hundreds of figures stays small and its diff readable."""
    texts = []
    for run in runs:
        head = json.dumps(
            to_jsonable({key: value for key, value in run.items() if key != "rows"}), allow_nan=False
        )
        rows = ",\n".join(json.dumps(_rounded(to_jsonable(row)), allow_nan=False) for row in run["rows"])
        texts.append(f'{head[:-1]}, "rows": [\n{rows}\n]}}')
    return f'{{"benchmark": {json.dumps(name)}, "runs": [\n' + ",\n".join(texts) + "\n]}\n"


def _rounded(value: Any) -> Any:
    """Figures to four significant digits: more would be noise."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine_name(card: Mapping[str, Any]) -> str:
    """The processor as part of a file name, with family and model where a hypervisor hides the rest."""
    text = " ".join([str(card.get("cpu") or "unknown"), *map(str, card.get("cpu_id") or ())])
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_runs(path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("runs", [])
    return runs


def show(*tables: Table, path: Path | None = None) -> None:
    """Print tables and where the figures went."""
    console = Console(width=None if Console().is_terminal else 140)
    for table in tables:
        console.print(table)
    if path is not None:
        console.print(f"written to {path}", markup=False, highlight=False)


def restart_for_isa(level: str | None) -> None:
    """Start this command anew with ``level`` ("avx2") forced on us, torch and oneDNN, which read it as they load."""
    if level is None or os.environ.get("PYSPARSE_ISA") == level:
        return
    forced = {"PYSPARSE_ISA": level, "ATEN_CPU_CAPABILITY": level, "ONEDNN_MAX_CPU_ISA": level.upper()}
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **forced})


def threads_of(options: argparse.Namespace) -> int:
    return options.threads or torch.get_num_threads()
