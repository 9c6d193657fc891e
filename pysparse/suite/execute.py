"""One cell from beginning to end, in this process."""

from __future__ import annotations

import datetime
import errno
import logging
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pysparse.huggingface import save_pretrained
from pysparse.huggingface.packing import dense_state_dict, packed_state_dict
from pysparse.measure.machine import is_busy, machine_card
from pysparse.measure.memory import peak_memory
from pysparse.measure.rounds import torch_threads
from pysparse.measure.size import checkpoint_bytes
from pysparse.measure.twins import shared_copy
from pysparse.nn import sparsify_
from pysparse.suite.cells import Cell
from pysparse.suite.locks import MachineLock
from pysparse.suite.pruning import prune_copy
from pysparse.suite.recipes import Plan, plan_for
from pysparse.suite.records import DiskFullError, Record, explaining_full_disk, record_of
from pysparse.suite.tasks import Quality, Task, task_for

_LOGGER = logging.getLogger("pysparse")
_CARD = (
    "cpu", "cpu_id", "isa_flags", "cores", "usable_cores", "memory_bytes", "platform", "python", "packages",
    "torch_cpu_capability", "environment", "pysparse_commit", "pysparse_isa",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A dense model with what is measured of it once."""

    model: nn.Module
    quality: Quality
    file_bytes: int
    parameters: int


class Runner:
    """Runs cells one after the other; the last dense model stays loaded, as cells in a row mostly share it."""

    def __init__(self, lock: MachineLock | None = None) -> None:
        self._lock = lock or MachineLock()
        self._key: tuple[Any, ...] | None = None
        self._dense: Dense | None = None

    def __call__(self, cell: Cell, command: str) -> Record:
        """Return the record of ``cell``; an error inside of it becomes a record with status "failed".

        Raises DiskFullError where there is no room to save a model for its size.
        """
        started, clock = (
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            time.perf_counter(),
        )
        try:
            with torch_threads(cell.threads):
                found = {"status": "done", **self._measure(cell)}
        except DiskFullError:
            raise
        except Exception as error:  # whatever a model or a method throws: the other cells go on
            _LOGGER.warning("cell %s (%s) failed: %s: %s", cell.id, cell, type(error).__name__, error)
            _LOGGER.debug("the failed cell's traceback", exc_info=error)
            found = {"status": "failed", "error": {"type": type(error).__name__, "message": str(error)}}
        return record_of(
            cell, **found, command=command, started=started, environment=environment(cell),
            seconds=time.perf_counter() - clock,
        )  # fmt: skip

    def _measure(self, cell: Cell) -> dict[str, Any]:
        task, plan = task_for(cell.task, dict(cell.options)), plan_for(cell)
        with self._lock.computing(), peak_memory() as memory:
            dense = self._load(cell, task)
            torch.manual_seed(cell.seed)
            clock = time.perf_counter()
            pruned = prune_copy(dense.model, task, cell, plan)
            seconds = time.perf_counter() - clock
            model = pruned.model.eval()
            found = {
                "family": task.family(dense.model, cell.model), **_named(plan),
                "quality": _compared(task.quality(model, cell.model, seed=cell.seed), dense.quality),
                "achieved_sparsity": pruned.sparsity, "layers": pruned.layers, "prune_seconds": seconds,
                "parameters": dense.parameters,
                "file_bytes": {"dense": dense.file_bytes, "sparse": file_bytes(model, packed=True)},
            }  # fmt: skip
            sparse = shared_copy(model)
            sparsify_(sparse)  # measures this machine's kernels at first, so in the lock of what computes
        return {
            **found,
            "peak_memory_bytes": memory.peak,
            "speed": self._speed(cell, task, dense.model, sparse),
        }

    def _speed(self, cell: Cell, task: Task, dense: nn.Module, sparse: nn.Module) -> list[Any]:
        if not cell.timed:
            return []
        with self._lock.timing():
            return list(task.speed(dense, sparse, cell.model, threads=cell.threads))

    def _load(self, cell: Cell, task: Task) -> Dense:
        key = (task, cell.model, cell.seed, cell.threads)
        if self._dense is None or key != self._key:
            self._key = self._dense = None  # frees the model before the next one comes
            model = task.load(cell.model, seed=cell.seed)
            quality = task.quality(model, cell.model, seed=cell.seed)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            self._dense = Dense(model, quality, file_bytes(model, packed=False), parameters)
            self._key = key
        return self._dense


def _named(plan: Plan) -> dict[str, Any]:
    return {"allocation": plan.allocation, "reconstruction": plan.reconstruction}


def _compared(quality: Quality, dense: Quality) -> dict[str, Any]:
    return {
        "metric": quality.metric, "value": quality.value, "dense": dense.value,
        "higher_is_better": quality.higher_is_better, "others": quality.others,
    }  # fmt: skip


def file_bytes(model: nn.Module, *, packed: bool) -> int:
    """Return the bytes of the weight files that ``model`` is saved in, packed or as ordinary dense weights.

    A transformers model is saved by :func:`pysparse.save_pretrained`, any other one's tensors as one safetensors
    file. Raises DiskFullError when the temporary folder has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="pysparse-suite-") as work:
        folder = Path(work) / "model"
        with explaining_full_disk(folder):
            try:
                return _saved_bytes(model, folder, packed)
            except Exception as error:
                if "No space left on device" in str(error):  # as safetensors reports it
                    raise OSError(errno.ENOSPC, str(error)) from error
                raise


def _saved_bytes(model: nn.Module, folder: Path, packed: bool) -> int:
    if isinstance(model, PreTrainedModel):
        return checkpoint_bytes(save_pretrained(model, folder, format="pysparse" if packed else "dense"))
    state = packed_state_dict(model)[0] if packed else dense_state_dict(model)
    folder.mkdir()
    save_file(_distinct(state), folder / "model.safetensors")
    return checkpoint_bytes(folder)


def _distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one name for each tensor: those that are tied go to disk once."""
    first = {(tensor.data_ptr() or name, tensor.shape): name for name, tensor in reversed(state.items())}
    return {name: state[name].contiguous() for name in reversed(first.values())}


@cache
def _card() -> dict[str, Any]:
    card = machine_card()
    return {key: card.get(key) for key in _CARD}


def environment(cell: Cell) -> dict[str, Any]:
    """Return what the machine is, how busy it is now, and the threads and options of the cell."""
    return {**_card(), "busy": is_busy(), "torch_threads": cell.threads, "options": dict(cell.options)}
