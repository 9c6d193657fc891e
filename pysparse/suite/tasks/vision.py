"""What the tasks on pictures share: models that are trained here, the scope of pruning, images per second."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import nn

from pysparse.calib.extras import require
from pysparse.suite.tasks.protocol import Scope, Speed
from pysparse.suite.tasks.timing import per_second
from pysparse.suite.vision.checkpoints import Lesson, trained

TEST_SEED = 20240102  # of the test pictures: the same for every cell
CALIBRATION_SEED = TEST_SEED + 1  # with a cell's seed added


class OfFamily(Protocol):
    """An entry of a table of models."""

    @property
    def family(self) -> str:
        """Return "cnn", "attention", "hybrid" or "pooling"."""


class OfPictures(ABC):
    """A task on the models of one table. Its fields are options that count something: each is at least 1."""

    __slots__ = ()

    scope = Scope(targets=("Linear", "Conv2d"), ignore=(), whole=True)  # stem and classifier too, as PTSBench
    takes_paths = False
    table: ClassVar[Mapping[str, OfFamily]]
    calls: ClassVar[int] = 16  # of one image that make a sample of time: models may take a millisecond

    batch_size: int  # of calibration, and of the faster of two speeds
    rounds: int  # of timing

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # each task is a dataclass
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")

    @abstractmethod
    def lesson(self, name: str) -> Lesson:
        """Return how the model of that name is trained."""

    @abstractmethod
    def workload(self, name: str, count: int) -> Callable[[nn.Module], Any]:
        """Return what is timed: a call that makes or reads ``count`` images."""

    def models(self) -> tuple[str, ...]:
        """The names of the table."""
        return tuple(self.table)

    def require(self, model: str) -> None:
        """What the bundled pictures come from."""
        require("suite", "sklearn", "skimage")

    def family(self, model: nn.Module, name: str) -> str:
        """Return the family that the table says."""
        return self.table[name].family

    def load(self, model: str, *, seed: int) -> nn.Module:
        """Return the model trained with ``seed``: from the cache, or trained now (about a minute)."""
        return trained(self.lesson(model), seed)

    def speed(self, dense: nn.Module, sparse: nn.Module, name: str, *, threads: int) -> list[Speed]:
        """Images per second one by one and in batches; convolutions run dense in both."""
        return [
            per_second(
                ("images", "images/s", count), dense, sparse, self.workload(name, count),
                rounds=self.rounds, threads=threads, repeats=1 + self.calls // count,
            )
            for count in (1, self.batch_size)
        ]  # fmt: skip
