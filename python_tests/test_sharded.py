"""Scoring shards on a real local Ray: the bits of one process, also when a worker is killed."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pysparse import backend
from pysparse.ops import EntrySamples, fm_shapley
from pysparse.shapley import EntryRun, FactorisationMachine, Shards, entry_shapley, entry_shapley_on_ray

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


def data(samples=500, fields=4, values=12, cols=3):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(fields * values, cols)).astype(np.float32)
    base = rng.normal(size=(fields, cols)).astype(np.float32)
    ids = (rng.integers(0, values, (samples, fields)) + np.arange(fields) * values).astype(np.int32)
    return EntrySamples(table, base, ids, rng.integers(0, 2, samples).astype(np.float32))


@dataclass(frozen=True)
class DiesOnce:
    """Kills the worker that it first runs in, in the middle of its work."""

    marker: Path

    def __call__(self, samples, draw, totals):
        fm_shapley(samples, draw, totals)
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def fingerprint(self):
        return "fm"


@pytest.fixture(scope="module")
def ray():
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # on a busy machine its 30 s are too few
    found = pytest.importorskip("ray", reason="needs the package ray (the extra pysparse[ray])")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    found.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield found
    found.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_shards_have_the_bits_of_one_process(ray, tmp_path):
    samples = data()
    run = EntryRun(24 * 500 * 2 + 24 * 77, seed=3)  # two passes and a part
    alone = entry_shapley(FactorisationMachine(), samples, run)
    dies = DiesOnce(tmp_path / "died")
    state = EntryRun(run.budget, seed=3, state=tmp_path / "state")
    for walker, how in ((FactorisationMachine(), run), (dies, run), (FactorisationMachine(), state)):
        found = entry_shapley_on_ray(walker, samples, how, Shards(5, in_flight=2))
        assert np.array_equal(found.mean, alone.mean)
        assert np.array_equal(found.stderr, alone.stderr)
        assert (found.samples, found.passes) == (alone.samples, alone.passes)
    assert dies.marker.exists()
    again = entry_shapley_on_ray(FactorisationMachine(), samples, state, Shards(5))  # all of it is on disk
    assert np.array_equal(again.mean, alone.mean)
    with pytest.raises(ValueError, match="shards was 5, is 4"):
        entry_shapley_on_ray(FactorisationMachine(), samples, state, Shards(4))


def test_bad_shards():
    with pytest.raises(ValueError, match="count, in_flight and threads are at least 1"):
        Shards(0)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"ray: pip install 'pysparse\[ray\]'"):
        entry_shapley_on_ray(FactorisationMachine(), data(), EntryRun(24 * 500), Shards(2))
