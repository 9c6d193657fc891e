"""Exact structures, and the target that they are given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse.measure import torch_threads
from pysparse.methods import Magnitude
from pysparse.pruning import (
    NM,
    Keep,
    Unstructured,
    check_sparsity,
    resolve_sparsity,
)
from pysparse.pruning import structure as structure_module


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products on two threads mostly wait for each other, and for whoever else is on the cores."""
    with torch_threads(1):
        yield


STRUCTURES = [Unstructured("row"), Unstructured("matrix"), NM(1, 4), NM(2, 4), NM(4, 8), NM(2, 8)]
MATRICES = st.tuples(
    st.integers(1, 9),
    st.integers(1, 33),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)


def matrix(shape):
    """A random matrix; in bfloat16 with few distinct values, so that ties are everywhere."""
    rows, cols, dtype, seed = shape
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return (weight if dtype == torch.float32 else (weight * 2).round() / 2).to(dtype)


def reference_keep(scores, structure, sparsity):
    """The same mask by stable sorting of every group in plain Python."""
    keep = torch.ones(scores.shape, dtype=torch.bool)
    rows, cols = scores.shape
    if isinstance(structure, NM):
        groups = [[(r, c + i) for i in range(structure.m)] for r in range(rows)
                  for c in range(0, cols - structure.m + 1, structure.m)]  # fmt: skip
        count = structure.m - structure.n
    else:
        groups = [[(r, c) for c in range(cols)] for r in range(rows)]
        if structure.group == "matrix":
            groups = [[place for group in groups for place in group]]
        count = int(sparsity * len(groups[0]) + 1e-9)
    for group in groups:
        for place in sorted(group, key=lambda place: float(scores[place]))[:count]:
            keep[place] = False
    return keep


@settings(max_examples=150, deadline=None)
@given(shape=MATRICES, structure=st.sampled_from(STRUCTURES), sparsity=st.floats(0, 0.999))
def test_masks_are_exact_and_stable(shape, structure, sparsity):
    scores = matrix(shape).float().abs()
    sparsity = sparsity if structure.fixed_sparsity is None else structure.fixed_sparsity
    keep = structure.keep(scores, sparsity)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, reference_keep(scores, structure, sparsity))
    assert int((~keep).sum()) == structure.pruned_count(*scores.shape, sparsity)


@settings(max_examples=60, deadline=None)
@given(
    shape=MATRICES, low=st.floats(0, 0.99), high=st.floats(0, 0.99), group=st.sampled_from(["row", "matrix"])
)
def test_masks_are_nested(shape, low, high, group):
    scores = matrix(shape).float().abs()
    low, high = sorted((low, high))
    fewer, more = (Unstructured(group).keep(scores, sparsity) for sparsity in (low, high))
    assert not (~fewer & more).any()


@settings(max_examples=60, deadline=None)
@given(shape=MATRICES, structure=st.sampled_from(STRUCTURES), factor=st.sampled_from([-4.0, 0.25, 2.0]))
def test_masks_do_not_see_the_scale_and_pruning_twice_changes_nothing(shape, structure, factor):
    weight = matrix(shape)
    sparsity = structure.fixed_sparsity or 0.6
    once = Keep().solve(weight, {}, Magnitude(), structure, sparsity)
    scaled = Keep().solve(weight * factor, {}, Magnitude(), structure, sparsity)
    assert torch.equal(once.keep, scaled.keep)
    twice = Keep().solve(once.weight, {}, Magnitude(), structure, sparsity)
    assert torch.equal(once.weight, twice.weight)
    assert once.weight.dtype == weight.dtype


def test_row_masks_do_not_see_the_scale_of_a_row_and_matrix_masks_do():
    scores = torch.rand(6, 20)
    scale = torch.logspace(-3, 3, 6)[:, None]
    for group, same in [("row", True), ("matrix", False)]:
        structure = Unstructured(group)
        assert torch.equal(structure.keep(scores, 0.5), structure.keep(scores * scale, 0.5)) is same


def test_vector_of_two_in_four():
    pruned = Keep().solve(torch.tensor([[0.1, -0.5, 0.3, -0.2]]), {}, Magnitude(), NM(2, 4), 0.5)
    assert pruned.weight.tolist() == [[0.0, -0.5, torch.tensor(0.3).item(), 0.0]]


def test_large_rows_are_selected_in_chunks():
    scores = torch.randint(0, 50, (5000, 1025)).float()  # more than one chunk, ties everywhere
    keep = Unstructured("row").keep(scores, 0.37)
    order = scores.argsort(dim=1, stable=True)
    expected = torch.ones_like(keep).scatter_(1, order[:, : int(0.37 * 1025)], False)
    assert torch.equal(keep, expected)


def test_large_matrices_are_selected_by_histogram():
    scores = torch.randn(1100, 4096).bfloat16().float().abs()
    for offset in (0.0, -1.0):  # scores with a sign take the slower way
        keep = Unstructured("matrix").keep(scores + offset, 0.37)
        order = (scores + offset).flatten().argsort(stable=True)
        expected = torch.ones_like(keep).flatten().scatter_(0, order[: int(0.37 * scores.numel())], False)
        assert torch.equal(keep.flatten(), expected)


@settings(max_examples=80, deadline=None)
@given(shape=MATRICES, sparsity=st.floats(0, 0.999), signed=st.booleans(), infinite=st.booleans())
def test_both_ways_of_selection_agree_at_any_size(shape, sparsity, signed, infinite):
    scores = matrix(shape).float()
    scores = scores if signed else scores.abs()
    if infinite:
        scores[0, 0] = float("inf")
    expected = reference_keep(scores, Unstructured("matrix"), sparsity)
    before = structure_module._CHUNK
    try:
        structure_module._CHUNK = 1
        assert torch.equal(Unstructured("matrix").keep(scores, sparsity), expected)
        rows = reference_keep(scores, Unstructured("row"), sparsity)
        assert torch.equal(Unstructured("row").keep(scores, sparsity), rows)
    finally:
        structure_module._CHUNK = before


def test_floor_is_of_the_exact_product():
    keep = Unstructured("row").keep(torch.rand(3, 10), 0.7)  # 0.7 * 10 is 6.999999999999999
    assert (~keep).sum(dim=1).tolist() == [7, 7, 7]


def test_wrong_structures_and_scores_are_refused():
    with pytest.raises(ValueError, match="keeps 0 < n < m <= 64 weights, got 4:4"):
        NM(4, 4)
    with pytest.raises(TypeError, match="n of an n:m pattern is a whole number, got '2'"):
        NM("2", 4)
    with pytest.raises(ValueError, match="group is 'row' or 'matrix', got 'column'"):
        Unstructured("column")
    with pytest.raises(ValueError, match="sparsity=0.6 contradicts 2:4, which is 0.5"):
        NM(2, 4).keep(torch.rand(2, 4), 0.6)
    for structure in (Unstructured(), NM(2, 4)):
        with pytest.raises(ValueError, match="1 of 8 scores are NaN"):
            structure.keep(torch.tensor([[1.0, 2, 3, 4], [1, float("nan"), 3, 4]]), 0.5)
        with pytest.raises(ValueError, match="scores are a matrix"):
            structure.keep(torch.rand(4), 0.5)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(70, "got 70; did you mean 0.7"), (50.0, "did you mean 0.5"), ("50%", "got 50%; did you mean 0.5"),
     (1, "got 1$"), (-0.1, "got -0.1$"), ("half", "got 'half'"), (True, "got True"), (float("nan"), "got nan")],
)  # fmt: skip
def test_a_sparsity_out_of_range_gets_a_hint(value, hint):
    with pytest.raises(ValueError, match=f"sparsity is a fraction between 0.*{hint}"):
        check_sparsity(value)


def test_a_pattern_brings_its_own_sparsity():
    assert resolve_sparsity(Unstructured(), None) == 0.5
    assert resolve_sparsity(Unstructured(), 0.3) == 0.3
    assert resolve_sparsity(NM(1, 4), None) == resolve_sparsity(NM(1, 4), 0.75) == 0.75
    with pytest.raises(ValueError, match="sparsity=0.5 contradicts the pattern 1:4.*sparsity 0.75"):
        resolve_sparsity(NM(1, 4), 0.5)
