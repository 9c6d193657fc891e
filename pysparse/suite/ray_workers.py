"""Cells shared out over the machines of a Ray cluster; a worker that dies is replaced and its cell run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pysparse.calib.extras import optional
from pysparse.suite.cells import Cell
from pysparse.suite.records import DiskFullError, Record
from pysparse.suite.workers import TRIES, Job

LOCAL = "local"


def run_on_ray(cells: Sequence[tuple[Cell, str]], address: str, workers: int) -> Iterator[Record]:
    """Yield the records of ``cells``, each with its command, as Ray's workers bring them.

    ``address`` is that of a cluster ("auto", "ray://host:10001"), or "local" for one on this machine with ``workers``
    times the threads of a cell as CPUs; each cell reserves its threads. A cell whose worker died twice is recorded as
    failed. Raises ModuleNotFoundError without Ray, ConnectionError for a cluster that does not answer, DiskFullError.
    """
    ray = optional("ray", "ray")
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, workers * max(cell.threads for cell, _ in cells) if cells else 1)
    try:
        yield from _results(ray, cells)
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str, cpus: int) -> None:
    if address == LOCAL:
        ray.init(num_cpus=max(1, cpus), include_dashboard=False, log_to_driver=False)
        return
    ray.init(address=address, log_to_driver=False)


def _results(ray: Any, cells: Sequence[tuple[Cell, str]]) -> Iterator[Record]:
    """Keep twice as many cells under way as the cluster has CPUs, so that none waits for this process."""
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(cells))
    running: dict[Any, Job] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            cell, command = waiting.pop()
            task = ray.remote(_run_cell).options(
                num_cpus=cell.threads,
                max_retries=TRIES - 1,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(cell.threads)}},
            )
            running[task.remote(cell.to_dict(), command)] = Job(cell, command)
        (ready,), _ = ray.wait(list(running), num_returns=1)
        yield _record(ray, ready, running.pop(ready))


def _record(ray: Any, ready: Any, job: Job) -> Record:
    dead = ray.exceptions
    try:
        kind, content = ray.get(ready)
    except (dead.WorkerCrashedError, dead.OutOfMemoryError, dead.NodeDiedError) as error:
        return job.died(type(error).__name__)
    if kind == "full":
        raise DiskFullError(content)
    return content  # type: ignore[no-any-return]


_RUNNER: list[Any] = []  # of this worker: Ray runs one cell after the other in it, and models stay loaded


def _run_cell(content: dict[str, Any], command: str) -> tuple[str, Any]:
    """What a worker does."""
    from transformers.utils.logging import disable_progress_bar

    from pysparse.suite.execute import Runner

    disable_progress_bar()
    if not _RUNNER:
        _RUNNER.append(Runner())
    try:
        return "record", _RUNNER[0](Cell.from_dict(content), command)
    except DiskFullError as error:
        return "full", str(error)
