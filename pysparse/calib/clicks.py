"""Samples of one value a field with a label of 0 or 1: checked, split, counted; small real sets from packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysparse.calib.extras import optional

RARE_RANDHIE = 10  # values seen less often share one row, as Criteo's are treated (Tran et al. 2024)


@dataclass(frozen=True, slots=True, eq=False)
class Clicks:
    """A data set; ids are rows of one table in which the fields' values lie one below the other."""

    ids: NDArray[np.int32]  # [samples, fields]
    labels: NDArray[np.float32]  # [samples], 0 or 1
    field_sizes: tuple[int, ...]  # values of each field
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape[1] != len(self.field_sizes) or self.ids.dtype != np.int32:
            raise ValueError(
                f"ids are int32 [samples, {len(self.field_sizes)} fields], got {self.ids.dtype} {self.ids.shape}"
            )
        if self.labels.shape != (len(self.ids),):
            raise ValueError(f"{len(self.ids)} samples, but labels of shape {self.labels.shape}")
        check_labels(self.labels)
        starts = self.field_starts
        wrong = (self.ids < starts[:-1]) | (self.ids >= starts[1:])
        if wrong.any():
            sample, place = np.argwhere(wrong)[0]
            raise ValueError(
                f"sample {sample} has id {self.ids[sample, place]} in field {place}, "
                f"whose rows are {starts[place]} to {starts[place + 1] - 1}"
            )

    @property
    def field_starts(self) -> NDArray[np.int64]:
        """Where each field's rows begin, then their number: int64 [fields + 1]."""
        return np.cumsum([0, *self.field_sizes])

    def take(self, index: Any) -> Clicks:
        """Return the samples that ``index`` selects."""
        ids = np.ascontiguousarray(self.ids[index])
        return Clicks(ids, np.ascontiguousarray(self.labels[index]), self.field_sizes, self.names)

    def split(self, *shares: float, seed: int = 0) -> tuple[Clicks, ...]:
        """Return disjoint random parts, one for each share and one of the rest; every part has a sample."""
        if not shares or min(shares) <= 0.0 or sum(shares) >= 1.0:
            raise ValueError(f"shares are positive and leave a rest, got {shares}")
        order = np.random.default_rng(seed).permutation(len(self.ids))
        ends = np.floor(np.cumsum(shares) * len(order)).astype(int)
        parts = np.split(order, ends)
        if min(len(part) for part in parts) == 0:
            raise ValueError(f"{len(order)} samples are too few for shares {shares}")
        return tuple(self.take(part) for part in parts)

    def counts(self) -> NDArray[np.int64]:
        """Return how often each row of the table occurs, int64 [rows]."""
        return np.bincount(self.ids.ravel(), minlength=sum(self.field_sizes))


def check_labels(labels: NDArray[Any], first: int = 0) -> None:
    """Raise ValueError, naming the first offence, unless all labels are 0 or 1; ``first`` numbers the first one."""
    wrong = ~((labels == 0) | (labels == 1))  # true for NaN
    if wrong.any():
        place = int(np.argmax(wrong))
        raise ValueError(f"labels are 0 or 1, sample {first + place} has {labels[place]}")


def encode(columns: Mapping[str, Sequence[Any]], labels: Any, rare: int = 1) -> Clicks:
    """Number the values of each column; those seen fewer than ``rare`` times share the field's last row."""
    ids, sizes, start = [], [], 0
    for values in columns.values():
        found, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        frequent = counts >= rare
        number = np.cumsum(frequent) - 1
        number[~frequent] = frequent.sum()
        size = int(frequent.sum()) + int(len(found) > frequent.sum())
        ids.append(start + number[inverse])
        sizes.append(size)
        start += size
    matrix = np.ascontiguousarray(np.stack(ids, axis=1), dtype=np.int32)
    return Clicks(matrix, np.asarray(labels, dtype=np.float32), tuple(sizes), tuple(columns))


def _fair() -> Clicks:
    frame = optional("statsmodels.datasets.fair", "ctr").load_pandas().data
    columns = {name: frame[name] for name in frame.columns if name != "affairs"}
    return encode(columns, frame["affairs"] > 0)


def _randhie() -> Clicks:
    frame = optional("statsmodels.datasets.randhie", "ctr").load_pandas().data
    columns = {name: frame[name] for name in ("lncoins", "idp", "lpi", "fmde", "physlm", "disea")}
    health = frame[["hlthg", "hlthf", "hlthp"]].to_numpy()
    columns["health"] = np.where(health.any(axis=1), health.argmax(axis=1) + 1, 0)
    return encode(columns, frame["mdvis"] > 0, RARE_RANDHIE)


def _digits() -> Clicks:
    images, digits = optional("sklearn.datasets", "ctr").load_digits(return_X_y=True)
    return encode({f"pixel{i}": images[:, i] for i in range(images.shape[1])}, digits < 5)


BUNDLED: dict[str, Callable[[], Clicks]] = {"fair": _fair, "randhie": _randhie, "digits": _digits}


def load_clicks(name: str) -> Clicks:
    """Return a real data set that ships with statsmodels (fair: affairs or none, randhie: doctor visits or none) or
    scikit-learn (digits: below five or not; every pixel a field). ValueError for another name.
    """
    if name not in BUNDLED:
        raise ValueError(f"there is no data set {name!r}; bundled are {', '.join(BUNDLED)}")
    return BUNDLED[name]()
