"""Trained weights beside pysparse's other cached files: trained once a machine, by whoever comes first."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pysparse.backend import cache_directory
from pysparse.suite.vision.training import Training

_LOGGER = logging.getLogger("pysparse")
_SCHEMA = (
    1  # of the data and losses: raise it when either changes, so that old weights are not taken for new ones
)


@dataclass(frozen=True, slots=True)
class Lesson:
    """A model and how it is taught: everything on which its weights depend, but the seed."""

    task: str
    name: str
    settings: dict[str, Any]  # of the architecture, JSON-ready
    training: Training
    build: Callable[[], nn.Module]
    teach: Callable[[nn.Module, Training, int], nn.Module]  # trains in place

    def identity(self, seed: int) -> dict[str, Any]:
        """Return the training recipe, JSON-ready."""
        return {
            "schema": _SCHEMA, "task": self.task, "name": self.name, "settings": self.settings,
            "training": dataclasses.asdict(self.training), "seed": seed,
        }  # fmt: skip

    def path(self, seed: int) -> Path:
        """Return where the weights are kept, under a hash of the recipe."""
        text = json.dumps(self.identity(seed), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return cache_directory() / "suite" / f"{self.task}-{self.name}-{seed}-{digest}.safetensors"


def trained(lesson: Lesson, seed: int) -> nn.Module:
    """Return the model of ``lesson`` in eval mode, from the cache or trained now (about a minute).

    The file is written beside and renamed, and a second process waits for the first one's. Raises ValueError for a
    cached file that is not such a model's, OSError where the cache cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = lesson.build()
    path = lesson.path(seed)
    with _alone(path):
        if not path.is_file():
            _LOGGER.info("training %s %s (seed %d) for %s", lesson.task, lesson.name, seed, path)
            _write(path, lesson.teach(model, lesson.training, seed), lesson.identity(seed))
    return _read(path, model).eval()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock beside ``path``; it is gone with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, model: nn.Module, identity: dict[str, Any]) -> None:
    beside = path.with_suffix(f".{os.getpid()}.part")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        save_file(state, beside, metadata={"lesson": json.dumps(identity)})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path, model: nn.Module) -> nn.Module:
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is not usable, delete it to train anew: {error}") from error
    return model
