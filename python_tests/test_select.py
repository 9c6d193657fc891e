"""The compiled selection against a stable sort: every kernel, odd sizes, ties, signs, damaged scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend, ops
from pysparse.methods import Wanda
from pysparse.pruning import NM, Keep, Unstructured

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ["normal", "ties", "constant", "zeros", "sorted", "heavy", "infinite", "tiny"]


def keys(format):
    return [
        pytest.param(
            key,
            id=str(key),
            marks=() if key.supported else pytest.mark.skip(reason=f"this CPU lacks {key.isa}"),
        )
        for key in backend.kernels(op="select", format=format)
    ]


def matrix(kind, rows, cols, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    if kind == "ties":
        weight = weight.round()
    elif kind == "constant":
        weight = torch.full((rows, cols), -1.5)
    elif kind == "zeros":
        weight = weight * (torch.rand(rows, cols, generator=generator) < 0.3) * -1.0
    elif kind == "sorted":
        weight = weight.sort(dim=1).values
    elif kind == "heavy":
        weight = weight**9
    elif kind == "infinite":
        weight[:, ::5] = float("inf")
        weight[:, 1::7] = float("-inf")
    elif kind == "tiny":
        weight = weight * 1e-44  # denormals
    return weight.to(dtype)


def scores_of(weight, scale):
    return weight.float() if scale is None else weight.float().abs() * scale


def stable_rows(scores, count):
    order = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.ones(scores.shape, dtype=torch.bool).scatter_(1, order, False)


def stable_nm(scores, n, m):
    keep = torch.ones(scores.shape, dtype=torch.bool)
    whole = scores.shape[1] // m * m
    if whole and len(scores):
        groups = scores[:, :whole].reshape(-1, m)
        keep[:, :whole] = stable_rows(groups, m - n).reshape(len(scores), whole)
    return keep


def rows_of(weight, scale, count):
    """Mask and weight, the latter by the kernel where it writes one."""
    if scale is not None:
        return ops.select_rows(weight, scale, count)
    keep = ops.row_mask(weight, count)
    return keep, weight.masked_fill(~keep, 0)


def groups_of(weight, scale, n, m):
    if scale is not None:
        return ops.select_nm(weight, scale, n, m)
    keep = ops.nm_mask(weight, n, m)
    return keep, weight.masked_fill(~keep, 0)


def assert_same(result, weight, keep):
    assert torch.equal(result[0], keep)
    assert torch.equal(result[1], weight.masked_fill(~keep, 0))


@pytest.mark.parametrize("key", keys("row"))
@pytest.mark.parametrize("kind", KINDS)
def test_rows_match_the_stable_sort(key, kind):
    for rows, cols in [(0, 5), (3, 0), (2, 1), (3, 15), (2, 16), (3, 17), (2, 63), (3, 257), (2, 4096)]:
        weight = matrix(kind, rows, cols, DTYPES[key.dtype])
        for scale in (None, torch.rand(cols) + 0.1):
            for count in {0, 1, cols // 3, cols // 2, cols - 1, cols}:
                if 0 <= count <= cols:
                    with backend.force_isa(key.isa):
                        result = rows_of(weight, scale, count)
                    assert_same(result, weight, stable_rows(scores_of(weight, scale), count))


@pytest.mark.parametrize("key", keys("nm"))
@pytest.mark.parametrize("kind", KINDS)
def test_groups_match_the_stable_sort(key, kind):
    for n, m in [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8), (3, 7), (8, 16), (2, 16), (31, 64)]:
        for rows, cols in [(0, 8), (3, 0), (3, 5), (2, 16), (3, 33), (2, 130)]:
            weight = matrix(kind, rows, cols, DTYPES[key.dtype])
            for scale in (None, torch.rand(cols) + 0.1):
                with backend.force_isa(key.isa):
                    result = groups_of(weight, scale, n, m)
                assert_same(result, weight, stable_nm(scores_of(weight, scale), n, m))


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 5), cols=st.integers(1, 300), fraction=st.floats(0, 1), seed=st.integers(0, 999),
       kind=st.sampled_from(KINDS), dtype=st.sampled_from(list(DTYPES.values())), scaled=st.booleans())  # fmt: skip
def test_every_level_agrees(rows, cols, fraction, seed, kind, dtype, scaled):
    weight = matrix(kind, rows, cols, dtype, seed)
    scale = torch.rand(cols, generator=torch.Generator().manual_seed(seed)) if scaled else None
    scale = scale if kind != "infinite" or scale is None else scale + 0.1
    count = int(fraction * cols)
    expected = stable_rows(scores_of(weight, scale), count)
    for isa, supported in backend.isa_levels():
        if supported:
            with backend.force_isa(isa):
                assert torch.equal(ops.row_mask(weight, count, scale), expected)


@pytest.mark.parametrize("format", ["row", "nm"])
def test_one_thread_and_two_select_the_same(format):
    weight, scale = matrix("ties", 600, 700, torch.float32), torch.rand(700)
    call = (
        (lambda: ops.select_rows(weight, scale, 300))
        if format == "row"
        else (lambda: ops.select_nm(weight, scale, 2, 4))
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    for keep, pruned in results[1:]:
        assert torch.equal(keep, results[0][0])
        assert torch.equal(pruned, results[0][1])


@pytest.mark.parametrize("isa", [name for name, ok in backend.isa_levels() if ok])
def test_damaged_scores_and_wrong_arguments_are_refused(isa):
    weight = torch.randn(3, 21)
    weight[0, 20] = weight[2, 3] = float("nan")
    with backend.force_isa(isa):
        for call in (lambda: ops.row_mask(weight, 5), lambda: ops.nm_mask(weight, 2, 4)):
            with pytest.raises(ValueError, match="2 of 63 scores are NaN: is the weight damaged"):
                call()
    good = torch.randn(3, 21)
    with pytest.raises(ValueError, match="cannot prune 22 of 21 columns"):
        ops.row_mask(good, 22)
    with pytest.raises(ValueError, match="cannot prune -1 of 21 columns"):
        ops.row_mask(good, -1)
    with pytest.raises(ValueError, match="keeps 0 < n < m <= 64 weights, got 4:4"):
        ops.nm_mask(good, 4, 4)
    with pytest.raises(ValueError, match="scale -1 of column 0 is negative"):
        ops.select_rows(good, -torch.ones(21), 5)
    with pytest.raises(ValueError, match=r"scale is contiguous float32 \[21\], got torch.float32 \(20,\)"):
        ops.select_rows(good, torch.ones(20), 5)
    with pytest.raises(
        ValueError, match="contiguous float32 or bfloat16 matrices on the CPU, got torch.float16"
    ):
        ops.row_mask(good.half(), 5)
    with pytest.raises(ValueError, match="contiguous float32 or bfloat16 matrices on the CPU"):
        ops.row_mask(torch.randn(21, 3).T, 5)


@pytest.mark.parametrize("structure", [Unstructured("row"), NM(2, 4), NM(4, 8), NM(3, 7)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_structures_choose_the_same_with_and_without_kernels(structure, kind, monkeypatch):
    weight, norms = matrix(kind, 9, 75, torch.bfloat16), torch.rand(75) + 0.1
    stats = {"squared_norm": norms.square()}
    sparsity = structure.fixed_sparsity or 0.4
    fused = Keep().solve(weight, stats, Wanda(), structure, sparsity)
    signed = structure.keep(weight.float(), sparsity)
    monkeypatch.setattr(ops, "can_select", lambda weight: False)
    plain = Keep().solve(weight, stats, Wanda(), structure, sparsity)
    assert torch.equal(fused.keep, plain.keep)
    assert torch.equal(fused.weight, plain.weight)
    assert torch.equal(signed, structure.keep(weight.float(), sparsity))
