"""Where a pruning computes, what it keeps on disk meanwhile, and with which companions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pysparse.api.search import find_beta
from pysparse.calib import Calibration, Ranks
from pysparse.calib.activations import Place
from pysparse.measure.progress import Advance
from pysparse.measure.results import to_jsonable
from pysparse.measure.windows import TokenWindows
from pysparse.pruning import BlockEvent, BlockLayout, Execution, PruneReport, Recipe, resolve_sparsity, run
from pysparse.pruning.identity import identity_of
from pysparse.pruning.journal import Journal
from pysparse.pruning.run import Propagate


@dataclass(frozen=True, slots=True)
class Running:
    """What a caller may say about how to run."""

    output_dir: str | Path | None
    resume: bool
    device: torch.device | str | None
    activations: Place
    activations_dir: str | Path | None

    def __post_init__(self) -> None:
        if self.resume and self.output_dir is None:
            raise ValueError("resume=True needs output_dir: progress is kept beside the folder of the result")


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be pruned, how, and on which data."""

    layout: BlockLayout
    recipe: Recipe
    sparsity: float | None
    calibration: Calibration | None
    windows: TokenWindows | None  # scored in the search for a setting of the allocation; None: no search
    propagate: Propagate
    seed: int

    def identity(self, device: torch.device | str | None) -> dict[str, Any]:
        """Return all that the pruned weights depend on; reads every weight of the model."""
        scored = None if self.windows is None else json.dumps(self.windows.protocol, sort_keys=True)
        target = resolve_sparsity(self.recipe.structure, self.sparsity)
        return identity_of(
            self.layout, self.recipe, target, self.calibration,
            propagate=self.propagate, device=str(device), **{"search text": scored},
        )  # fmt: skip

    def perform(
        self, execution: Execution, advance: Advance, callbacks: Sequence[Callable[[BlockEvent], None]]
    ) -> tuple[Recipe, PruneReport]:
        """Search if that is asked for, prune, and return the recipe that was used in the end and the report."""
        recipe, search, total = self.recipe, None, len(self.layout.blocks)
        if self.windows is not None:
            recipe, search = find_beta(
                self.layout,
                recipe,
                self.sparsity,
                self.calibration,
                self.windows,
                self.propagate,
                advance,
                execution,
            )
        advance("pruning blocks", 0 if execution.journal is None else execution.journal.done, total)
        report = run(
            self.layout, recipe, self.sparsity, self.calibration,
            propagate=self.propagate, seed=self.seed, execution=execution,
            callbacks=(lambda event: advance("pruning blocks", event.index + 1, total), *callbacks),
        )  # fmt: skip
        return recipe, dataclasses.replace(report, search=to_jsonable(search))


def progress_folder(output_dir: str | Path) -> Path:
    """Return where a run that will save to ``output_dir`` keeps its progress: beside it."""
    target = Path(output_dir).expanduser().absolute()
    return target.with_name(f"{target.name}.pruning-progress")


@contextmanager
def executing(
    running: Running, ranks: Ranks, identity: Callable[[torch.device | str | None], dict[str, Any]]
) -> Iterator[Execution]:
    """Yield where to compute, with a journal when the result is saved.

    The journal stays where it is after an error, unless nothing had been done yet; the caller removes it when
    the result is in place. ``identity`` is asked only when there is a journal, for it reads all weights.
    """
    if running.output_dir is None:
        yield Execution(running.device, running.activations, running.activations_dir)
        return
    place = progress_folder(running.output_dir)
    journal = Journal.open(place, identity(running.device), resume=running.resume, ranks=ranks)
    try:
        yield Execution(running.device, running.activations, running.activations_dir or place, journal)
    except (Exception, KeyboardInterrupt) as stop:  # a full disk at the very end costs no block either
        if not journal.empty:
            stop.add_note(f"{journal.done} blocks are done and kept in {place}; resume goes on with them")
        raise
    finally:
        journal.close()
        if journal.empty and place.is_dir():
            journal.remove()
