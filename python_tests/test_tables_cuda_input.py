"""What the CUDA operations on tables refuse before they reach a GPU, and what the CPU half makes of their totals."""

import numpy as np
import pytest
import torch

from pysparse import backend, ops
from pysparse.ops import embedding_cuda, pruning_cuda, shapley_cuda
from pysparse.shapley.entries import FactorisationMachine


def samples(**changes):
    arrays = {
        "table": np.ones((6, 2), np.float32), "base": np.zeros((3, 2), np.float32),
        "ids": np.array([[0, 2, 4], [1, 3, 5]], np.int32), "labels": np.array([0, 1], np.float32),
    } | changes  # fmt: skip
    return ops.EntrySamples(**arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": np.array([[0, 2, 4], [1, 6, 5]], np.int32)},
            r"id 6 of sample 1, field 1 is not in \[0, 6\)",
        ),
        ({"ids": np.array([[-1, 2, 4], [1, 3, 5]], np.int32)}, "id -1 of sample 0, field 0"),
        ({"labels": np.array([0, np.nan], np.float32)}, r"label nan of sample 1 is not in \[0, 1\]"),
    ],
)
def test_samples_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        shapley_cuda.check_values(samples(**changes))


def test_counters_out_of_range():
    with pytest.raises(ValueError, match="beyond"):
        shapley_cuda._check_draw(ops.EntryDraw(0, (1 << 40) - 1), 2)
    with pytest.raises(ValueError, match="beyond"):
        shapley_cuda._check_draw(ops.EntryDraw(0, visit=1 << 23), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_the_walk_says_what_is_missing():
    walker = FactorisationMachine(device=0)
    totals = ops.EntryTotals(6, 2)
    with pytest.raises(RuntimeError, match="no Shapley kernels on a GPU: .+"):
        walker(samples(), ops.EntryDraw(0), totals)
    with pytest.raises(RuntimeError, match="no Shapley kernels"):
        ops.draw_permutations_cuda(0, 0, 1, 4)
    assert not totals.sums.any()


def test_totals_that_are_added_spill_before_they_overflow():
    totals = ops.EntryTotals(4, 1)
    rows, step = np.array([1, 3]), np.full((2, 1), 1 << 61, np.int64)
    for _ in range(5):
        totals.add(rows, step, -step, (2.0**61, 2.0**61))
    whole = totals.sums.astype(object) + totals.sums_high.astype(object) * 2**48
    assert whole.ravel().tolist() == [0, 5 << 61, 0, 5 << 61]
    assert totals.mean_square(1)[1, 0] == -5 * 2.0**21


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (ops.SweepPattern(0, (1,)), "at least one column, got 0"),
        (ops.SweepPattern(8, (1,)), "1 counts for 2 blocks of 8 columns"),
        (ops.SweepPattern(8, (1, 5)), "cannot prune 5 of 4 weights in block 1"),
        (ops.SweepPattern(8, (25, 0), joint=True), "cannot prune 25 of 24 weights in block 0"),
        (ops.SweepPattern(8, n=4, m=4), "4:4"), (ops.SweepPattern(6, n=2, m=4), "m divides the block"),
    ],
)  # fmt: skip
def test_patterns_that_do_not_fit(pattern, message):
    with pytest.raises(ValueError, match=message):
        pruning_cuda._check_pattern(pattern, 3, 12)


def test_the_gate_keeps_unvalidated_kernels_out():
    for group in ("embedding", "pruning", "shapley"):
        assert backend.cuda_gate(group)  # no report names their sources yet
    assert not pruning_cuda.takes(torch.zeros(2, 4))
    assert "not torch.int32" in embedding_cuda.why_portable(torch.zeros(3, dtype=torch.int32))


def test_a_weight_on_another_device_is_refused():
    weight, scale = torch.zeros(2, 4), torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="scale is on meta, the weight on cpu"):
        pruning_cuda.select(weight, scale, count=1)
    with pytest.raises(ValueError, match="cannot prune 5 of 4 columns"):
        pruning_cuda.select(weight, None, count=5)
    with pytest.raises(ValueError, match="keeps 0 < n < m <= 64 weights, got 3:2"):
        pruning_cuda.select(weight, None, n=3, m=2)
