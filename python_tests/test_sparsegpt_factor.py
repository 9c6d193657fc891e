"""SparseGPT's factor of the inverse Hessian: vectors, compiled products, damping, what falls back."""

import pytest
import torch
from sparsegpt_cases import layer, solve

from pysparse import backend, ops
from pysparse.measure import torch_threads
from pysparse.methods import InverseHessian, Wanda, obs
from pysparse.methods.obs import NotPositiveDefiniteError, inverse_factor
from pysparse.pruning import Keep, Unstructured


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def test_vector_of_two_columns():
    gram, weight = torch.tensor([[2.0, 1], [1, 2]]), torch.ones(1, 2)
    factor = inverse_factor(gram, 0.0)
    expected = torch.tensor([[0.81649658, -0.40824829], [0, 0.70710678]])
    torch.testing.assert_close(factor.upper, expected)
    scores = InverseHessian(damping=0.0)(weight, {"gram": gram})
    torch.testing.assert_close(scores, torch.tensor([[1.5, 2.0]]))
    pruned = solve(weight, {"gram": gram}, Unstructured("matrix"), damping=0.0)
    torch.testing.assert_close(pruned.weight, torch.tensor([[0, 1.5]]))


def test_the_factor_is_that_of_the_inverse():
    _, _, stats = layer(cols=40)
    gram = stats["gram"].double()
    factor = inverse_factor(stats["gram"], 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(40).double(), rtol=0, atol=1e-3)
    assert torch.equal(upper, upper.triu())
    # U_jj^2 is the corner of the inverse of what is left when the columns before j are gone.
    corners = torch.stack([damped[j:, j:].inverse()[0, 0] for j in range(40)])
    torch.testing.assert_close(upper.diagonal().square(), corners, rtol=1e-4, atol=0)


def inverted(matrix):
    result = matrix.clone()
    return result if obs.inverse_cholesky(result) else None


@pytest.mark.parametrize("size", [1, 5, 8, 17, 100])
def test_factors_by_halves_are_those_of_the_library(size, monkeypatch):
    monkeypatch.setattr(obs, "_LEAF", 8)  # several levels, odd halves
    x = torch.randn(3 * size, size, dtype=torch.float64)
    matrix = x.T @ x + torch.eye(size)
    expected = torch.linalg.cholesky(matrix).inverse()
    lower = matrix.tril() + torch.full_like(matrix, 7.0).triu(1)  # what lies above is not read
    torch.testing.assert_close(inverted(lower), expected)
    if size > 1:
        matrix[size - 1, size - 1] = -1.0
        assert inverted(matrix) is None
        matrix[0, 0] = -1.0
        assert inverted(matrix) is None


def products():
    return [pytest.param(key, id=str(key), marks=() if key.supported else pytest.mark.skip(
        reason=f"this CPU lacks {key.isa}")) for key in backend.kernels(op="product")]  # fmt: skip


@pytest.mark.parametrize("key", products())
def test_compiled_products_match_float64(key):
    for rows, depth, cols in [(0, 3, 4), (3, 0, 4), (1, 1, 1), (7, 5, 65), (13, 300, 17), (6, 64, 64)]:
        left, target = torch.randn(rows, depth + 3)[:, 2 : depth + 2], torch.randn(rows, cols + 2)[:, 1:-1]
        for right in (torch.randn(depth, cols), torch.randn(cols, depth).T):
            expected = target.double() - 2 * left.double() @ right.double()
            bound = (depth + 3) * 2.0**-23 * (target.abs() + 2 * left.abs() @ right.abs()).double() + 1e-30
            result = target.clone()
            with backend.force_isa(key.isa):
                ops.add_product(result, left, right, -2.0)
            assert ((result.double() - expected).abs() <= bound).all()
    with pytest.raises(ValueError, match=r"\(2, 3\) @ \(4, 5\) does not give \(2, 5\)"):
        ops.add_product(torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="products are of float32 matrices on the CPU"):
        ops.add_product(torch.zeros(2, 5).double(), torch.zeros(2, 3), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="a leaf has up to 64 columns, got 65"):
        ops.inverse_cholesky_leaf(torch.eye(65))


def test_compiled_factors_have_the_same_bits_for_any_number_of_threads():
    x = torch.randn(900, 333)
    matrix = x.T @ x / 900 + 0.1 * torch.eye(333)
    results = []
    for count in (1, 2, 3):
        with torch_threads(count):
            results.append(inverted(matrix))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    expected = torch.linalg.cholesky(matrix.double()).inverse()
    scale = expected.abs().max()
    assert float((results[0].double() - expected).abs().max() / scale) < 333 * 2.0**-24
    matrix[300, 300] = -1.0
    assert inverted(matrix) is None


def test_a_factor_is_made_beside_its_hessian_and_a_few_strips():
    x = torch.randn(3000, 1500)
    gram = x.T @ x
    with ProfileMemory() as memory:
        factor = inverse_factor(gram, 0.01)
    assert factor.upper.numel() == 1500**2
    assert memory.peak <= 1.5 * gram.numel() * 4  # the factor itself, and strips of half its height


class ProfileMemory:
    """The largest sum of torch's live allocations on the CPU inside the block, over what was there before."""

    def __enter__(self):
        self._profiler = torch.profiler.profile(profile_memory=True, record_shapes=False)
        self._profiler.__enter__()
        return self

    def __exit__(self, *error):
        self._profiler.__exit__(*error)
        live, self.peak = 0, 0
        for event in self._profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                self.peak = max(self.peak, live)


def test_the_factor_is_made_once_for_layers_that_share_inputs():
    gram = layer()[2]["gram"]
    first = inverse_factor(gram, 0.01)
    assert inverse_factor(gram, 0.01) is first
    assert inverse_factor(gram, 0.02) is not first
    assert inverse_factor(gram.clone(), 0.02) is not first


def test_a_hessian_that_is_not_positive_definite_is_damped_more():
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05
    weight = torch.randn(4, 8)
    pruned = solve(weight, {"gram": gram}, Unstructured("row"))
    text = "the Hessian is not positive definite with damping 0.01; damping 0.1 was used"
    assert pruned.warnings == (text,)
    assert int((~pruned.keep).sum()) == 16
    gram[0, 1] = gram[1, 0] = 5.0
    tried = "the Hessian is not positive definite with damping 0.01, 0.1, 1, 0.01 in float64"
    with pytest.raises(NotPositiveDefiniteError, match=tried):
        InverseHessian()(weight, {"gram": gram})
    fallen = solve(weight, {"gram": gram}, Unstructured("row"))
    assert fallen.warnings == (f"{tried}: pruned by Wanda, without an update",)
    expected = Keep().solve(weight, {"squared_norm": gram.diagonal()}, Wanda(), Unstructured("row"), 0.5)
    assert torch.equal(fallen.weight, expected.weight)


def test_what_float32_cannot_factor_is_factored_in_float64():
    gram = torch.eye(4) * 3e38  # the mean diagonal overflows float32
    factor = inverse_factor(gram, 0.01)
    text = "the Hessian is not positive definite with damping 0.01, 0.1, 1; damping 0.01 in float64 was used"
    assert factor.warnings == (text,)
    expected = torch.full((4,), 3.03e38).double().rsqrt()
    torch.testing.assert_close(factor.upper.diagonal().double(), expected, rtol=1e-5, atol=0)
