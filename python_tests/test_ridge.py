"""Batched ridge problems of empirical-Bayes pruning: every compiled kernel against float64."""

import pytest
import torch

from pysparse import backend, ops

KEYS = [
    pytest.param(key, id=str(key), marks=() if key.supported else pytest.mark.skip(reason=f"this CPU lacks {key.isa}"))
    for key in backend.kernels(op="ridge")
]  # fmt: skip
SIZES = [(1, 1), (3, 1), (16, 4), (17, 5), (15, 8), (33, 31), (40, 64), (2, 130)]


def problems(rows, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=generator)
    x[:, size // 2 :] += x[:, : size - size // 2]
    scale = 3 * torch.rand(rows, size, generator=generator)
    scale[scale < 1] = 0
    return x.T @ x / (3 * size), scale, torch.randn(rows, size, generator=generator)


def expected(gram, scale, target):
    """By explicit inverses in float64, one row at a time."""
    solutions, diagonals = [], []
    for d, b in zip(scale.double(), target.double(), strict=True):
        inverse = torch.linalg.inv(torch.eye(len(gram), dtype=torch.float64) + d[:, None] * gram.double() * d)
        solutions.append(d * (inverse @ (d * b)))
        diagonals.append(inverse.diagonal())
    return torch.stack(solutions), torch.stack(diagonals)


def bound(gram, scale):
    """n roundings of float32, grown by the condition of the worst B: its eigenvalues are 1 at least."""
    largest = (torch.linalg.eigvalsh(gram.double())[-1] * scale.max() ** 2 + 1).item()
    return 4 * len(gram) * 2.0**-24 * largest


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_kernels_match_the_inverse(key, rows, size):
    gram, scale, target = problems(rows, size)
    with backend.force_isa(key.isa):
        solution, diagonal = ops.ridge_rows(gram, scale, target)
    right_solution, right_diagonal = expected(gram, scale, target)
    limit = bound(gram, scale)
    assert (diagonal - right_diagonal).abs().max() <= limit
    assert (solution - right_solution).abs().max() <= limit * max(right_solution.abs().max(), 1.0)


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_torch_is_an_oracle_too(rows, size):
    gram, scale, target = (one.double() for one in problems(rows, size))
    for found, right in zip(ops.ridge_rows(gram, scale, target), expected(gram, scale, target), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("key", KEYS)
def test_what_is_pruned_stays_zero_and_decouples(key):
    gram, scale, target = problems(20, 24)
    scale[:, 5] = 0
    with backend.force_isa(key.isa):
        solution, diagonal = ops.ridge_rows(gram, scale, target)
        rest = [i for i in range(24) if i != 5]
        smaller = ops.ridge_rows(gram[rest][:, rest].contiguous(), scale[:, rest], target[:, rest])
    assert (solution[:, 5] == 0).all()
    assert (diagonal[:, 5] == 1).all()
    torch.testing.assert_close(solution[:, rest], smaller[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(diagonal[:, rest], smaller[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_bits_do_not_depend_on_threads_or_neighbours(key):
    gram, scale, target = problems(200, 36)
    before, results = torch.get_num_threads(), []
    with backend.force_isa(key.isa):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.ridge_rows(gram, scale, target))
        torch.set_num_threads(before)
        alone = ops.ridge_rows(gram, scale[50:51], target[50:51])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(alone[0][0], results[0][0][50])
    assert torch.equal(alone[1][0], results[0][1][50])


def test_no_rows():
    solution, diagonal = ops.ridge_rows(torch.eye(3), torch.empty(0, 3), torch.empty(0, 3))
    assert solution.shape == diagonal.shape == (0, 3)


def test_wrong_arguments():
    gram, scale, target = problems(4, 6)
    with pytest.raises(ValueError, match=r"square matrix with at least one row, got \(6, 5\)"):
        ops.ridge_rows(gram[:, :5], scale, target)
    with pytest.raises(ValueError, match=r"target is \[rows, 6\] for both, got \(3, 6\)"):
        ops.ridge_rows(gram, scale, target[:3])
    with pytest.raises(ValueError, match="scale is torch.float64 on cpu, the Hessian torch.float32"):
        ops.ridge_rows(gram, scale.double(), target)
    with pytest.raises(ValueError, match="not positive definite or not finite"):
        ops.ridge_rows(-gram, scale, target)
    with pytest.raises(ValueError, match="not positive definite or not finite"):
        ops.ridge_rows(-gram.double(), scale.double(), target.double())
    with pytest.raises(ValueError, match="not positive definite or not finite"):
        ops.ridge_rows(gram, scale, target * float("nan"))
    with pytest.raises(ValueError, match="ridge problems have 1 to 512 unknowns, got 513"):
        backend.core().ridge_rows(0, 0, 0, 0, 0, 1, 513)
