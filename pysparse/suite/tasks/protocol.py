"""What a task is to the suite: it loads models, feeds the pruning, and measures quality and speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from pysparse import data


@dataclass(frozen=True, slots=True)
class Quality:
    """One figure that ranks models, and what else was measured."""

    metric: str  # "perplexity", "accuracy", ...
    value: float
    higher_is_better: bool
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Speed:
    """Dense and sparse of one workload, timed in interleaved rounds."""

    name: str  # "decode", "prefill", "images", "sentences", ...
    unit: str  # "tokens/s", "images/s", ...
    batch: int
    tokens: int | None  # of a sequence; None where there are none
    dense: float  # in the unit, median of the rounds
    sparse: float
    ratio: float  # sparse over dense, median of the rounds' own ratios; over 1 is faster
    ratio_p10: float
    ratio_p90: float


@dataclass(frozen=True, slots=True)
class Scope:
    """Which layers of its models a task prunes, in the words of :func:`pysparse.models.discover.discover`."""

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    whole: bool = False  # the model is one block: stem and classifier are prunable too, as is usual in vision


class Task(Protocol):
    """A task is a frozen dataclass; its fields are the options that ``[tasks.NAME]`` of a grid sets.

    ``model`` and ``name`` are a name of :meth:`models` or, where :attr:`takes_paths`, the folder of a Hugging Face
    model. Everything but :meth:`speed` is deterministic in the name, the seed and the options.
    """

    @property
    def name(self) -> str:
        """Its name in the registry and in records."""

    @property
    def scope(self) -> Scope:
        """What is pruned."""

    @property
    def takes_paths(self) -> bool:
        """Tell whether the folder of a model is taken beside the names of :meth:`models`."""

    def models(self) -> tuple[str, ...]:
        """Return the names that need no download."""

    def family(self, model: nn.Module, name: str) -> str:
        """Return what kind of model it is: "llama", "bert", "cnn", "attention", ..."""

    def require(self, model: str) -> None:
        """Raise ModuleNotFoundError, which says what to install, where that model's packages are missing."""

    def load(self, model: str, *, seed: int) -> nn.Module:
        """Return the dense model in eval mode; a new object at each call."""

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> Any:
        """Return what :func:`pysparse.prune` takes as ``calibration=``: texts, or batches of inputs.

        Batches are tensors or mappings of the model's arguments. None where the task has none to give: a recipe
        that needs data then takes the bundled text.
        """

    def quality(self, model: nn.Module, name: str, *, seed: int) -> Quality:
        """Measure a model: the dense one, or one that was pruned from it."""

    def speed(self, dense: nn.Module, sparse: nn.Module, name: str, *, threads: int) -> list[Speed]:
        """Time both, interleaved in this process. ``sparse`` has its layers packed where that is possible."""


class OfTransformers:
    """What tasks on the layers of a transformers model share: its family by the config, the bundled texts."""

    __slots__ = ()

    scope = Scope()
    takes_paths = True

    def family(self, model: nn.Module, name: str) -> str:
        """Return transformers' word for the architecture."""
        return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))

    def require(self, model: str) -> None:
        """Nothing: transformers is there."""

    def calibration(self, model: nn.Module, name: str, *, seed: int) -> Any:
        """The bundled calibration text, which the held-out text has nothing of."""
        return data.calibration_texts()
