"""Cells shared out over processes; one that dies takes nothing with it but the cell it was at."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from pysparse.suite.cells import Cell
from pysparse.suite.records import DiskFullError, Record, record_of

TRIES = 2  # of a cell whose process died
_SPAWN = multiprocessing.get_context("spawn")  # a forked copy of torch's threads would hang


@dataclass(slots=True, eq=False)
class Job:
    """A cell that is to be run, and since when."""

    cell: Cell
    command: str
    tries: int = 0
    began: float = field(default_factory=time.time)  # of the first try, seconds since 1970

    def died(self, how: str) -> Record:
        """Return the record of a cell whose process died each time it was tried."""
        from pysparse.suite.execute import environment

        began = datetime.datetime.fromtimestamp(self.began, datetime.UTC)
        message = f"the process that ran this cell ended {TRIES} times ({how}); too little memory, perhaps"
        return record_of(
            self.cell, status="failed", error={"type": "WorkerDied", "message": message}, command=self.command,
            environment=environment(self.cell), started=began.isoformat(timespec="seconds"),
            seconds=time.time() - self.began,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Worker:
    """A process that runs one cell at a time, and the pipe to it."""

    process: BaseProcess
    pipe: Connection
    job: Job | None = field(default=None)

    @classmethod
    def start(cls) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen when the process dies
        return cls(process, ours)

    def give(self, job: Job) -> None:
        """Send a job; a pipe that is closed shows in the next wait."""
        self.job = job
        job.began = job.began if job.tries else time.time()
        job.tries += 1
        try:
            self.pipe.send((job.cell.to_dict(), job.command))
        except OSError:
            return

    def take(self) -> Record | None:
        """Return the record that is ready, or None when the process has died; raises DiskFullError for it."""
        try:
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            return None
        if kind == "full":
            raise DiskFullError(content)
        return content  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End the process: one without a cell sees the closed pipe and leaves, one in a cell is made to."""
        self.pipe.close()
        if self.job is not None:
            self.process.terminate()
        self.process.join()


def run_in_processes(cells: Sequence[tuple[Cell, str]], workers: int) -> Iterator[Record]:
    """Yield the records of ``cells``, each with its command, as they come from ``workers`` processes.

    A cell whose process dies is run once more in a new one, and then recorded as failed. Raises DiskFullError.
    """
    waiting = deque(Job(cell, command) for cell, command in cells)
    crew: list[_Worker] = []
    try:
        while waiting or any(worker.job for worker in crew):
            while waiting and len(crew) < workers:
                crew.append(_Worker.start())
            for worker in crew:
                if worker.job is None and waiting:
                    worker.give(waiting.popleft())
            ready = wait([worker.pipe for worker in crew if worker.job])
            for worker in [one for one in crew if one.pipe in ready]:
                yield from _answer(worker, crew, waiting)
    finally:
        for worker in crew:
            worker.stop()


def _answer(worker: _Worker, crew: list[_Worker], waiting: deque[Job]) -> Iterator[Record]:
    """Yield what a worker brings; one that has died leaves the crew, and its job goes back or is given up."""
    job, record = worker.job, worker.take()
    worker.job = None
    if record is not None:
        yield record
        return
    crew.remove(worker)
    worker.process.join()
    code = worker.process.exitcode or 0
    if job is None:
        return
    if job.tries < TRIES:
        waiting.appendleft(job)
    else:
        yield job.died(f"signal {-code}" if code < 0 else f"exit code {code}")


def _serve(pipe: Connection) -> None:
    """What a process does: cells until the pipe closes."""
    from transformers.utils.logging import disable_progress_bar

    from pysparse.suite.execute import Runner

    disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runner = Runner()
    while True:
        try:
            content, command = pipe.recv()
        except EOFError:
            return
        pipe.send(_result(runner, Cell.from_dict(content), command))


def _result(runner: Any, cell: Cell, command: str) -> tuple[str, Any]:
    try:
        return "record", runner(cell, command)
    except DiskFullError as error:
        return "full", str(error)


def _end_with_parent() -> None:
    """A process whose parent was killed would go on computing for nobody, beside the run that goes on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
