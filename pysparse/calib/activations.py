"""Where hidden states wait between two blocks: in memory, or in files that are gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

Place = Literal["memory", "disk"]


class Activations(Protocol):
    """Hidden states by the number of their batch."""

    lasting: bool  # what is returned is the stored tensor itself, which a block may change in place

    def __getitem__(self, number: int) -> Tensor | None: ...

    def __setitem__(self, number: int, hidden: Tensor | None) -> None: ...

    def shape(self, number: int) -> torch.Size | None:
        """Return the shape of what is stored, without reading it."""


class InMemory:
    """All of them in memory, on the device that they came from."""

    lasting = True

    def __init__(self) -> None:
        self._hidden: dict[int, Tensor | None] = {}

    def __getitem__(self, number: int) -> Tensor | None:
        return self._hidden[number]

    def __setitem__(self, number: int, hidden: Tensor | None) -> None:
        self._hidden[number] = hidden

    def shape(self, number: int) -> torch.Size | None:
        """Return the shape of what is stored."""
        hidden = self._hidden[number]
        return None if hidden is None else hidden.shape


class OnDisk:
    """One file a batch; memory holds the batch that is being worked on."""

    lasting = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kinds: dict[int, tuple[torch.Size, torch.dtype, torch.device] | None] = {}

    def __getitem__(self, number: int) -> Tensor | None:
        kind = self._kinds[number]
        if kind is None:
            return None
        shape, dtype, device = kind
        flat = torch.from_file(str(self._file(number)), size=shape.numel(), dtype=dtype) if shape.numel() else (
            torch.empty(0, dtype=dtype)
        )  # fmt: skip
        return flat.view(shape).to(device)

    def __setitem__(self, number: int, hidden: Tensor | None) -> None:
        if hidden is None:
            self._kinds[number] = None
            return
        self._kinds[number] = (hidden.shape, hidden.dtype, hidden.device)
        raw = hidden.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
        # A new file, not the old one rewritten: what was read from that one may still be mapped.
        fresh = self._file(number).with_suffix(".new")
        raw.tofile(fresh)
        fresh.replace(self._file(number))

    def shape(self, number: int) -> torch.Size | None:
        """Return the shape of what is stored."""
        kind = self._kinds[number]
        return None if kind is None else kind[0]

    def _file(self, number: int) -> Path:
        return self._folder / f"batch_{number:06}.bin"


@contextmanager
def activations_in(place: Place, folder: str | Path | None = None) -> Iterator[Activations]:
    """Yield a store; "disk" makes a folder inside ``folder`` (None: the system's) and removes it at the end.

    Raises ValueError for another place, NotADirectoryError for a ``folder`` that is none.
    """
    if place not in ("memory", "disk"):
        raise ValueError(f"activations are kept in 'memory' or on 'disk', got {place!r}")
    if place == "memory":
        yield InMemory()
        return
    if folder is not None and not Path(folder).is_dir():
        raise NotADirectoryError(f"the folder for activations does not exist: {folder}")
    own = Path(tempfile.mkdtemp(prefix="pysparse-activations-", dir=folder))
    try:
        yield OnDisk(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)
