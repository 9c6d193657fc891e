"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[str, int, int], None]  # (phase, done, total)
_LINE_SECONDS = 10.0  # between plain lines in a log file


@contextmanager
def progress_on_stderr(enabled: bool = True) -> Iterator[Advance]:
    """Yield ``advance(phase, done, total)``, which shows how far each phase is and the time left."""
    console = Console(stderr=True)
    if not enabled:
        yield lambda phase, done, total: None
    elif console.is_terminal:
        with _bar(console) as advance:
            yield advance
    else:
        yield _plain_lines(console)


@contextmanager
def _bar(console: Console) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, object] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)  # type: ignore[arg-type]

        yield advance


def _plain_lines(console: Console) -> Advance:
    started: dict[str, float] = {}
    printed: dict[str, float] = {}

    def advance(phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = started.setdefault(phase, now)
        if done == total or now - printed.get(phase, start) > _LINE_SECONDS:
            printed[phase] = now
            left = (now - start) / max(1, done) * (total - done)
            console.print(f"{phase}: {done}/{total}, {left:.0f} s left", highlight=False)

    return advance
