"""The CUDA Shapley kernels' own source on host threads (cuda_shim/shim.h), against the CPU's, bit for bit."""

import ctypes
import shutil

import numpy as np
import pytest
from cuda_host_library import (
    BOOL,
    INT,
    LONG,
    LONG_WORD,
    POINTER,
    WORD,
    build,
    check_sizes,
    structure,
)  # fmt: skip

from pysparse import backend, ops
from pysparse.ops.shapley import draw_permutations, draw_words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
Draw = structure(seed=LONG_WORD, first=LONG_WORD, visit=WORD, purpose=WORD, rows=LONG, cols=LONG)
Samples = structure(
    table=POINTER,
    base=POINTER,
    ids=POINTER,
    offset=POINTER,
    labels=POINTER,
    samples=LONG,
    fields=INT,
    cols=INT,
)
Orders = structure(seed=LONG_WORD, first=LONG_WORD, visit=WORD, antithetic=BOOL, orders=POINTER)
Sums = structure(sums=POINTER, squares=POINTER)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = build(tmp_path_factory.mktemp("shapley"), "shapley")
    check_sizes(found, Draw, Samples, Orders, Sums)
    return found


def at(array):
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@pytest.mark.parametrize(("rows", "cols"), [(3, 1), (5, 39), (2, 130)])
def test_words_and_permutations_are_those_of_the_cpu(library, rows, cols):
    draw = Draw(12345678901, (1 << 33) + 5, 3, 0, rows, cols)
    out, room = np.zeros((rows, cols), np.uint32), np.zeros((rows, cols), np.uint32)
    assert library.words(ctypes.byref(draw), at(out)) == 0
    span = (12345678901, (1 << 33) + 5, rows, cols)
    assert np.array_equal(out, draw_words(*span, visit=3, purpose=0))
    orders = np.zeros((rows, cols), np.int32)
    assert library.permutations(ctypes.byref(draw), at(room), at(orders)) == 0
    assert np.array_equal(orders, draw_permutations(*span, visit=3))


def test_a_draw_beyond_the_counters_is_refused(library):
    for draw in (Draw(1, 1 << 40, 0, 0, 1, 4), Draw(1, 0, 1 << 23, 0, 1, 4), Draw(1, 0, 0, 0, -1, 4)):
        assert library.words(ctypes.byref(draw), None) == 1


def game(fields, cols, samples, *, offset=True, scale=0.3, rows_each=7):
    """Return random samples of a table in which fields have rows of their own."""
    random = np.random.default_rng(fields * cols)
    table = random.normal(0, scale, (fields * rows_each, cols)).astype(np.float32)
    base = random.normal(0, scale, (fields, cols)).astype(np.float32)
    base[:, 0] = table[0, 0]  # steps of zero
    table[:rows_each, 0] = table[0, 0]
    ids = (random.integers(0, rows_each, (samples, fields)) + np.arange(fields) * rows_each).astype(np.int32)
    labels = random.integers(0, 2, samples).astype(np.float32)
    logits = random.normal(0, 1, samples).astype(np.float32) if offset else None
    return ops.EntrySamples(table, base, ids, labels, logits)


def walk(library, samples, draw, orders=None):
    """Return (marginals, bits of the largest) as the kernel finds them."""
    count, fields = samples.ids.shape
    cols = samples.table.shape[1]
    view = Samples(
        at(samples.table), at(samples.base), at(samples.ids), at(samples.offset), at(samples.labels), count, fields,
        cols,
    )  # fmt: skip
    how = Orders(draw.seed, draw.first, draw.visit, draw.antithetic, at(orders))
    out, peak = np.full((count, fields * cols), np.nan, np.float32), np.zeros(1, np.uint32)
    assert library.marginals(ctypes.byref(view), ctypes.byref(how), at(out), at(peak)) == 0
    return out, peak


SHAPES = [(1, 1, 3), (3, 2, 5), (5, 5, 6), (7, 16, 5), (2, 40, 3), (3, 100, 2)]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_walk_is_the_cpu_walk(library, shape, antithetic):
    samples, draw = game(*shape), ops.EntryDraw(99, 17, 2, antithetic)
    found, peak = walk(library, samples, draw)
    assert peak.view(np.float32)[0] == np.abs(found).max()
    # The oracle is in double precision; thirteen float32 digits of a loss near 1 stay.
    with backend.force_isa("generic"):
        assert np.allclose(found, ops.fm_marginals(samples, draw), rtol=1e-3, atol=3e-6)
    if dict(backend.isa_levels()).get("avx512"):
        with backend.force_isa("avx512"):
            assert np.array_equal(found.view(np.int32), ops.fm_marginals(samples, draw).view(np.int32))


def test_given_orders_and_large_logits(library):
    samples = game(6, 4, 4, offset=False, scale=3.0)
    orders = draw_permutations(5, 0, 4, 24)
    found, _ = walk(library, samples, ops.EntryDraw(0, antithetic=False), orders)
    expected = ops.fm_marginals(samples, ops.EntryDraw(0, antithetic=False), orders)
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_marginal_that_is_not_finite_shows_in_the_peak(library):
    samples = game(3, 2, 2)
    samples.table[samples.ids[1, 2], 1] = 3e38
    _, peak = walk(library, samples, ops.EntryDraw(1))
    assert not peak.view(np.float32)[0] < 1024


def test_sums_are_those_of_the_cpu(library):
    samples, draw = game(4, 5, 30), ops.EntryDraw(3)
    totals = ops.EntryTotals(*samples.table.shape)
    ops.fm_shapley(samples, draw, totals)
    marginals = ops.fm_marginals(samples, draw)
    sums, squares = (np.zeros(samples.table.shape, np.int64) for _ in range(2))
    added = library.add(
        at(marginals), at(samples.ids), ctypes.c_int64(30), 4, 5, ctypes.byref(Sums(at(sums), at(squares)))
    )
    assert added == 0
    assert np.array_equal(sums, totals.sums)
    assert np.array_equal(squares, totals.squares)
