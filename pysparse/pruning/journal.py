"""What a run has done so far, on disk, so that another process can go on after a crash at any moment."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pysparse.calib import Ranks
from pysparse.calib.offload import tensors_of
from pysparse.formats import Int8Grid
from pysparse.formats.tensor_file import system_errors
from pysparse.nn.packing import grid_of, set_grid
from pysparse.pruning.identity import differences
from pysparse.pruning.report import PrunedLayer

T = TypeVar("T")
_VERSION = 1
_STATE, _NOTES, _LOCK = "state.json", "notes.json", "lock"


class Journal:
    """The folder in which a run keeps its progress; every file is complete or absent.

    ``state.json`` says which run it is, ``notes.json`` holds small results such as the layers' sparsities,
    ``pass-*`` the statistics of an allocation's own pass, ``block-*`` the tensors of the blocks that are
    done. Files are written beside, flushed to disk and renamed. Of several ranks the first writes; all must
    see the folder.
    """

    def __init__(self, folder: Path, ranks: Ranks, lock: int | None) -> None:
        self.folder = folder
        self._ranks = ranks
        self._lock = lock
        path = folder / _NOTES
        self._notes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.done = self._count("block")  # blocks that are pruned
        self.passed = self._count("pass")  # blocks that the allocation's own pass has gone through

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, Any], *, resume: bool, ranks: Ranks) -> Journal:
        """Start a journal in ``folder``, or go on with the one there.

        Raises FileExistsError when there is progress and ``resume`` is False, or when ``folder`` holds other
        things; ValueError that names what differs when the progress belongs to a run with another
        ``identity``; BlockingIOError when another process is at work in the folder.
        """
        place, lock = Path(folder), None
        problem: Exception | None = None
        if ranks.first:
            try:
                lock = _prepare(place, dict(identity), resume)
            except (OSError, ValueError) as error:
                problem = error
        problem = ranks.gather(problem)[0]
        if problem is not None:
            raise problem
        journal = cls(place, ranks, lock)
        if len(set(ranks.gather((journal.done, journal.passed)))) > 1:
            raise FileNotFoundError(f"{place} is not the same folder for all processes: it must be shared")
        return journal

    def remember(self, name: str, compute: Callable[[], T]) -> T:
        """Return what was noted under ``name``, or compute it and note it; it must be JSON-ready."""
        if name not in self._notes:
            self._notes[name] = compute()
            if self._ranks.first:
                _write_json(self.folder / _NOTES, self._notes)
        result: T = self._notes[name]
        return result

    def record_pass(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the statistics of block ``index`` that an allocation asked for."""
        self._write(f"pass-{index:05}.safetensors", tensors, {})
        self.passed = index + 1

    def recall_pass(self, index: int) -> dict[str, Tensor]:
        """Return what :meth:`record_pass` kept."""
        return self._read(f"pass-{index:05}.safetensors")[0]

    def record_block(
        self, index: int, block: nn.Module, layers: Sequence[PrunedLayer], unseen: Mapping[str, str]
    ) -> None:
        """Keep block ``index`` as it is now, and what is to be reported about it."""
        report = {"layers": [dataclasses.asdict(one) for one in layers], "unseen": dict(unseen)}
        grids = {name: grid for name, module in block.named_modules() if (grid := grid_of(module))}
        tensors = {
            **dict(tensors_of(block)),
            **{_grid_key(name): grid.scales for name, grid in grids.items()},
        }
        sizes = {name: grid.group_size for name, grid in grids.items()}
        metadata = {"report": json.dumps(report), "grids": json.dumps(sizes)}
        self._write(f"block-{index:05}.safetensors", tensors, metadata)
        self.done = index + 1

    @torch.no_grad()
    def restore_block(self, index: int, block: nn.Module) -> tuple[list[PrunedLayer], dict[str, str]]:
        """Make of ``block`` what it was when it was recorded, and return its report."""
        tensors, metadata = self._read(f"block-{index:05}.safetensors")
        for name, tensor in tensors_of(block, writable=True):
            tensor.copy_(tensors[name])
        for name, size in json.loads(metadata.get("grids", "{}")).items():
            set_grid(block.get_submodule(name), Int8Grid(tensors[_grid_key(name)], size))
        report = json.loads(metadata["report"])
        layers = [
            PrunedLayer(**{**one, "shape": tuple(one["shape"]), "warnings": tuple(one["warnings"])})
            for one in report["layers"]
        ]
        return layers, report["unseen"]

    @property
    def empty(self) -> bool:
        """Tell whether there is nothing yet that a later run could go on from."""
        return not (self.done or self.passed or self._notes)

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the folder: the result is saved elsewhere.

        The last blocks go first and ``state.json`` last, so that a crash in between leaves a valid journal.
        """
        self.close()
        if not self._ranks.first:
            return
        entries = sorted(self.folder.iterdir(), key=lambda one: (one.name not in (_STATE, _LOCK), one.name))
        for entry in reversed(entries):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.folder.rmdir()

    def _count(self, kind: str) -> int:
        count = 0
        while (self.folder / f"{kind}-{count:05}.safetensors").is_file():
            count += 1
        return count

    def _write(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        if not self._ranks.first:
            return
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        own: dict[str, Tensor] = {}
        for key, value in tensors.items():  # of what several names share each gets a copy: a file has no ties
            value = value.detach().cpu().contiguous()
            shared = any(value.data_ptr() == other.data_ptr() for other in own.values() if other.numel())
            own[key] = value.clone() if shared else value
        try:
            with system_errors(path):
                save_file(own, temporary, metadata)
            _put_in_place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): remove {self.folder} and start over") from None


def _grid_key(name: str) -> str:
    return f"{name}.int8_grid"


def _prepare(folder: Path, identity: dict[str, Any], resume: bool) -> int:
    """Check or begin the folder and return the handle that locks it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _STATE).is_file() and any(
        entry.name != _LOCK and entry.suffix != ".tmp" for entry in folder.iterdir()
    ):
        raise FileExistsError(
            f"{folder} is where progress would be kept, and it holds other files: move them away"
        )
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        _check_state(folder, identity, resume)
    except BlockingIOError:
        os.close(lock)
        raise BlockingIOError(f"another process is pruning with its progress in {folder}") from None
    except BaseException:
        os.close(lock)
        raise
    for left_over in (*folder.glob("*.tmp"), *folder.glob("pysparse-activations-*")):
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    return lock


def _check_state(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    path = folder / _STATE
    progress = [*folder.glob("*.safetensors"), *folder.glob(_NOTES)]
    now = json.loads(json.dumps({"version": _VERSION, **identity}))  # as it will be read back
    if not path.is_file() or (not resume and not progress):
        _write_json(path, now)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if not resume:
        done = sum(1 for _ in folder.glob("block-*.safetensors"))
        raise FileExistsError(
            f"an interrupted run left its progress in {folder} ({done} blocks done): pass resume=True (--resume) to "
            "go on with it, or remove that folder to start over"
        )
    changed = differences(before, now)
    if changed:
        raise ValueError(
            f"the progress in {folder} belongs to another run: {'; '.join(changed)}. Resume with the same settings, "
            "or remove that folder to start over"
        )


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _put_in_place(temporary, path)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename, with the file's bytes on disk before and its name on disk after."""
    for place in (temporary, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
            if place == temporary:
                temporary.replace(path)
        finally:
            os.close(handle)
