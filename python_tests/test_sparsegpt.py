"""SparseGPT against its vectors and invariants: the sweep, the crosses with other scores, the loop."""

import copy
import dataclasses

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsegpt_cases import SCORES, STRUCTURES, error, layer, solve, sparsity_of
from torch import nn
from transformers import AutoModelForCausalLM

from pysparse import backend, data, ops
from pysparse.calib import Gram, load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import METHODS, InverseHessian, Magnitude, ObsUpdate, Wanda, recipe_for
from pysparse.methods.obs import inverse_factor
from pysparse.models.discover import discover
from pysparse.pruning import NM, Keep, Recipe, Uniform, Unstructured, plan, run


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


# --- the sweep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("importance", SCORES, ids=lambda one: type(one).__name__)
def test_counts_are_exact_and_kept_weights_are_what_the_mask_says(structure, importance):
    for rows, cols in [(1, 1), (3, 7), (24, 48), (17, 130), (9, 257)]:
        weight, _, stats = layer(rows, cols)
        sparsity = structure.fixed_sparsity or 0.7
        pruned = solve(weight, stats, structure, sparsity, importance, block_size=32)
        assert int((~pruned.keep).sum()) == structure.pruned_count(rows, cols, sparsity)
        assert torch.equal(pruned.weight == 0, ~pruned.keep)
        if structure == Unstructured("row"):
            assert ((~pruned.keep).sum(dim=1) == structure.pruned_count(1, cols, sparsity)).all()
        if isinstance(structure, NM):
            whole = cols - structure.dense_columns(cols)
            groups = (
                pruned.keep[:, :whole].reshape(rows, -1, structure.m) if whole else pruned.keep[:, :0, None]
            )
            assert (groups.sum(dim=-1) == structure.n).all()


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("importance", SCORES, ids=lambda one: type(one).__name__)
def test_the_update_never_costs_output_error(structure, importance):
    for seed in range(3):
        weight, x, stats = layer(seed=seed)
        updated = solve(weight, stats, structure, sparsity_of(structure), importance, block_size=16)
        masked = weight * updated.keep
        assert error(weight, updated.weight, x) <= error(weight, masked, x)
    assert not torch.equal(updated.weight, masked)


def test_uncorrelated_inputs_change_no_survivor():
    """H = c I: the mask is magnitude, jointly over each block of columns, and nothing is made good."""
    weight = torch.randn(16, 64)
    for scale in (1.0, 7.0):
        pruned = solve(weight, {"gram": scale * torch.eye(64)}, Unstructured("matrix"), block_size=32)
        blocks = [Unstructured("matrix").keep(part.abs(), 0.5) for part in weight.split(32, dim=1)]
        assert torch.equal(pruned.keep, torch.cat(blocks, dim=1))
        assert torch.equal(pruned.weight, weight * pruned.keep)
    whole = solve(weight, {"gram": torch.eye(64)}, Unstructured("matrix"), block_size=64)
    assert torch.equal(whole.keep, Unstructured("matrix").keep(weight.abs(), 0.5))


@dataclasses.dataclass(frozen=True)
class Chosen(Unstructured):
    """A mask that is given: what the score says does not matter."""

    keep_mask: torch.Tensor = None

    def sweep_pattern(self, shape, sparsity, block_size):
        return None  # the compiled sweep chooses masks by score

    def keep_columns(self, scores, sparsity, start):
        return self.keep_mask[:, start : start + scores.shape[1]]


def test_one_pruned_column_gives_the_least_squares_refit():
    weight, _, stats = layer(cols=20)
    gram = stats["gram"]
    for column in (0, 7, 18):
        mask = torch.ones(24, 20, dtype=torch.bool)
        mask[:, column] = False
        pruned = solve(weight, stats, Chosen("row", mask), damping=0.0)
        right = slice(column + 1, None)
        coefficients = torch.linalg.solve(gram[right, right].double(), gram[right, column].double())
        expected = weight.double() * mask
        expected[:, right] += weight[:, column : column + 1].double() * coefficients
        torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-4, atol=1e-4)
        # What the surgeon's formula predicts is what the output loses: w^2 / [H^-1]_jj of what is left to move.
        scale = inverse_factor(gram, 0.0).scale[column].double()
        predicted = float((weight[:, column].double() * scale).square().sum())
        lost = (
            (weight - pruned.weight).double() @ gram.double() @ (weight - pruned.weight).double().T
        ).trace()
        assert float(lost) == pytest.approx(predicted, rel=1e-3)


def test_with_a_given_mask_the_block_size_changes_nothing():
    weight, _, stats = layer(cols=160)
    mask = torch.rand(24, 160) < 0.5
    results = [
        solve(weight, stats, Chosen("row", mask), block_size=size).weight for size in (1, 32, 128, 160)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_the_order_of_the_rows_changes_nothing():
    weight, _, stats = layer(cols=64)
    order = torch.randperm(24)
    for structure in (Unstructured("row"), Unstructured("matrix"), NM(2, 4)):
        straight = solve(weight, stats, structure).weight[order]
        torch.testing.assert_close(solve(weight[order].contiguous(), stats, structure).weight, straight)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), cols=st.integers(1, 40), sparsity=st.floats(0, 0.999), seed=st.integers(0, 99),
       group=st.sampled_from(["row", "matrix"]), block=st.integers(1, 40))  # fmt: skip
def test_any_shape_and_sparsity(rows, cols, sparsity, seed, group, block):
    weight, _, stats = layer(rows, cols, tokens=3, seed=seed)  # fewer tokens than inputs: only damping helps
    structure = Unstructured(group)
    pruned = solve(weight, stats, structure, sparsity, block_size=block)
    assert int((~pruned.keep).sum()) == structure.pruned_count(rows, cols, sparsity)
    assert torch.isfinite(pruned.weight).all()


def test_inputs_that_are_always_zero_go_first_and_the_rest_of_them_stays():
    weight, x, _ = layer(cols=32)
    x[:, [3, 7, 20]] = 0
    gram = x.T @ x
    many = solve(weight, {"gram": gram}, Unstructured("row"))
    assert not many.keep[:, [3, 7, 20]].any()
    few = solve(weight, {"gram": gram}, Unstructured("row"), 2 / 32)
    assert ((~few.keep).sum(dim=1) == 2).all()
    assert not few.keep[:, [3, 7]].any()
    assert torch.equal(few.weight[:, 20], weight[:, 20])
    nothing = solve(weight, {"gram": torch.zeros(32, 32)}, Unstructured("row"))
    assert torch.equal(nothing.weight, weight * nothing.keep)


# --- the compiled sweep ----------------------------------------------------------------------------------


def sweeps():
    return [pytest.param(key, id=str(key), marks=() if key.supported else pytest.mark.skip(
        reason=f"this CPU lacks {key.isa}")) for key in backend.kernels(op="sweep")]  # fmt: skip


def in_torch(monkeypatch):
    monkeypatch.setattr(ops, "can_sweep", lambda weight: False)


@pytest.mark.parametrize("key", sweeps())
@pytest.mark.parametrize("structure", [*STRUCTURES, NM(8, 16), NM(20, 50)], ids=str)
def test_the_compiled_sweep_does_what_torch_does(key, structure, monkeypatch):
    for rows, cols, block in [
        (1, 1, 128),
        (3, 7, 16),
        (24, 48, 48),
        (37, 130, 128),
        (9, 300, 200),
        (5, 257, 64),
    ]:
        if isinstance(structure, NM) and structure.m > block:
            continue
        weight, x, stats = layer(rows, cols, spread=0.3)
        for importance in SCORES:
            with backend.force_isa(key.isa):
                ours = solve(weight, stats, structure, sparsity_of(structure), importance, block_size=block)
            with monkeypatch.context() as patch:
                in_torch(patch)
                oracle = solve(weight, stats, structure, sparsity_of(structure), importance, block_size=block)
            # Sums in another order may swap scores that are equal but for their last bits.
            assert float((ours.keep != oracle.keep).float().mean()) <= 2 / weight.numel()
            if torch.equal(ours.keep, oracle.keep):
                torch.testing.assert_close(ours.weight, oracle.weight, rtol=1e-3, atol=1e-4)
            assert error(weight, ours.weight, x) <= 1.001 * error(weight, oracle.weight, x) + 1e-6


@pytest.mark.parametrize("key", sweeps())
def test_ties_go_by_row_and_column(key):
    """Equal weights under uncorrelated inputs: in a joint block the first ones in row-major order go."""
    with backend.force_isa(key.isa):
        for structure in (Unstructured("matrix"), Unstructured("row"), NM(2, 4), NM(5, 8)):
            weight = torch.ones(70, 160)
            pruned = solve(weight, {"gram": torch.eye(160)}, structure, structure.fixed_sparsity or 0.3)
            parts = weight.split(128 if isinstance(structure, Unstructured) else structure.m, dim=1)
            start, expected = 0, []
            for part in parts:
                expected.append(structure.keep_columns(part, structure.fixed_sparsity or 0.3, start))
                start += part.shape[1]
            assert torch.equal(pruned.keep, torch.cat(expected, dim=1))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_one_thread_and_two_give_the_same_bits(structure):
    weight, _, stats = layer(601, 300)
    results = []
    for count in (1, 2, 3):
        stats = {**stats, "gram": stats["gram"].clone()}  # another one: it is factored anew
        with torch_threads(count):
            results.append(solve(weight, stats, structure, sparsity_of(structure)))
    for other in results[1:]:
        assert torch.equal(other.keep, results[0].keep)
        assert torch.equal(other.weight, results[0].weight)


def test_wrong_arguments_of_the_compiled_sweep():
    weight, upper, scale = torch.randn(3, 8), torch.eye(8), torch.ones(8)
    pattern = ops.SweepPattern(8, n=2, m=4)
    with pytest.raises(ValueError, match=r"upper is float32 \(8, 8\) on the CPU, got torch.float32 \(7, 8\)"):
        ops.obs_sweep(weight, upper[:7], scale, pattern)
    with pytest.raises(ValueError, match="scale is float32"):
        ops.obs_sweep(weight, upper, scale.double(), pattern)
    with pytest.raises(ValueError, match="the factor's diagonal is 0 at column 3"):
        ops.obs_sweep(weight, upper.index_fill(1, torch.tensor(3), 0.0), scale, pattern)
    with pytest.raises(ValueError, match="scale -1 of column 0 is negative"):
        ops.obs_sweep(weight, upper, -scale, pattern)
    with pytest.raises(ValueError, match="blocks of 6 columns split groups of 4"):
        ops.obs_sweep(weight, upper, scale, ops.SweepPattern(6, n=2, m=4))
    with pytest.raises(ValueError, match="counts for 1 blocks, 8 columns have 2"):
        ops.obs_sweep(weight, upper, scale, ops.SweepPattern(4, (2,)))
    with pytest.raises(ValueError, match="cannot prune 9 of 8 columns"):
        ops.obs_sweep(weight, upper, scale, ops.SweepPattern(8, (9,)))
    with pytest.raises(ValueError, match="scores are NaN"):
        ops.obs_sweep(weight * float("nan"), upper, scale, ops.SweepPattern(8, (4,)))


# --- edges -----------------------------------------------------------------------------------------------


def test_sparsity_zero_changes_no_bit():
    weight, _, stats = layer()
    weight[0, 0] = -0.0
    pruned = solve(weight.bfloat16(), stats, Unstructured("row"), 0.0)
    assert torch.equal(pruned.weight.view(torch.int16), weight.bfloat16().view(torch.int16))
    assert pruned.keep.all()


def test_damaged_weights_and_wrong_settings_are_refused():
    weight, _, stats = layer()
    for value in (float("nan"), float("inf")):
        weight[1, 2] = value
        with pytest.raises(ValueError, match="1 of 1152 weights are NaN or infinite"):
            solve(weight, stats, Unstructured("row"))
    for damping in (-0.1, float("nan"), float("inf"), "much", True):
        with pytest.raises(ValueError, match="damping is a number from 0 on"):
            ObsUpdate(damping=damping)
        with pytest.raises(ValueError, match="damping is a number from 0 on"):
            InverseHessian(damping=damping)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="block_size is a whole number of columns from 1 on"):
            ObsUpdate(block_size=size)
    with pytest.raises(ValueError, match="block_size=4 has no room for a group of 4:8"):
        solve(torch.randn(2, 16), {"gram": torch.eye(16)}, NM(4, 8), block_size=4)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, 50, float("nan")])
def test_all_or_more_is_refused(sparsity):
    model = tiny_models.tiny("llama")
    with pytest.raises(ValueError, match="sparsity is a fraction between 0"):
        run(discover(model), METHODS["sparsegpt"], sparsity, load_calibration(tiny_models.tokens()))


# --- in the loop -----------------------------------------------------------------------------------------


def weights(model):
    return {one.path: one.weight.clone() for one in discover(model).layers}


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_every_architecture_with_exact_counts(name):
    model = tiny_models.tiny(name)
    report = run(
        discover(model), METHODS["sparsegpt"], 0.5, load_calibration(tiny_models.tokens(), batch_size=4)
    )
    assert len(report.layers) == 3 * tiny_models.ARCHITECTURES[name][3]
    for one in report.layers:
        assert one.pruned == one.zeros == one.size // 2
    assert not any("positive definite" in text for text in report.warnings)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patterns_and_dtypes_in_the_loop(structure, dtype):
    model = tiny_models.tiny("llama", dtype)
    recipe = dataclasses.replace(METHODS["sparsegpt"], structure=structure)
    planned = plan(discover(model), recipe)
    report = run(discover(model), recipe, None, load_calibration(tiny_models.tokens()))
    for done, expected in zip(report.layers, planned.layers, strict=True):
        assert (done.path, done.pruned) == (expected.path, expected.pruned)
        assert done.zeros >= done.pruned
    assert all(weight.dtype == dtype for weight in weights(model).values())


def test_bfloat16_agrees_with_float32_as_far_as_the_dtype_allows():
    narrow = tiny_models.tiny("llama", torch.bfloat16)
    wide = copy.deepcopy(narrow).float()  # the same weights
    results = {}
    for dtype, model in (("narrow", narrow), ("wide", wide)):
        run(discover(model), METHODS["sparsegpt"], 0.5, load_calibration(tiny_models.tokens(16, 32)))
        results[dtype] = weights(model)
    for path, weight in results["wide"].items():
        other = results["narrow"][path].float()
        same = ((weight != 0) == (other != 0)).float().mean()
        assert same > 0.9, path  # activations of 8 bits move scores by a percent


def test_a_layer_that_falls_back_is_named():
    model = nn.Sequential(nn.Linear(8, 4))

    @dataclasses.dataclass(frozen=True)
    class Broken(ObsUpdate):
        def solve(self, weight, stats, importance, structure, sparsity):
            gram = torch.eye(8)
            gram[0, 1] = gram[1, 0] = 9.0
            return ObsUpdate.solve(self, weight, {"gram": gram}, importance, structure, sparsity)

    recipe = Recipe(InverseHessian(), Uniform(), Unstructured("row"), Broken())
    report = run(discover(model), recipe, 0.5, load_calibration([torch.randn(5, 8)]))
    (one,) = report.layers
    assert (
        "not positive definite with damping 0.01, 0.1, 1, 0.01 in float64: pruned by Wanda" in one.warnings[0]
    )
    assert report.warnings == (f"0: {one.warnings[0]}",)


def test_an_expert_without_tokens_is_pruned_by_magnitude():
    weight = torch.randn(6, 8)
    stats = {"gram": Gram(8, torch.device("cpu")).value(3)}
    expected = Keep().solve(weight, {}, Magnitude(), Unstructured("matrix"), 0.5)
    assert torch.equal(solve(weight, stats, Unstructured("matrix")).weight, expected.weight)


def test_crosses_fall_out_of_the_recipe():
    rows = tiny_models.tokens()
    for importance in SCORES:
        for reconstruction in (Keep(), ObsUpdate()):
            model = tiny_models.tiny("llama")
            recipe = Recipe(importance, Uniform(), Unstructured("row"), reconstruction)
            report = run(discover(model), recipe, 0.5, load_calibration(rows))
            assert report.sparsity == 0.5
    assert recipe_for("sparsegpt", "2:4").structure == NM(2, 4)
    assert recipe_for("sparsegpt").needs == ("gram",)
    assert Recipe(Wanda(), Uniform(), NM(2, 4), ObsUpdate()).needs == ("squared_norm", "gram")


def test_no_layer_of_the_bundled_model_loses_by_the_update(monkeypatch):
    """||W X - W' X|| with the update is at most that of the same mask without it, for every layer."""
    model = AutoModelForCausalLM.from_pretrained(data.demo_model_path()).float().eval()
    ratios, solve_one = [], ObsUpdate.solve

    def watched(self, weight, stats, *rest):
        pruned = solve_one(self, weight, stats, *rest)
        gram, losses = stats["gram"].double(), []
        for other in (pruned.weight, weight * pruned.keep):
            lost = weight.double() - other.double()
            losses.append(float(((lost @ gram) * lost).sum()))
        ratios.append(losses[0] / losses[1])
        return pruned

    monkeypatch.setattr(ObsUpdate, "solve", watched)
    ids = torch.randint(3, 500, (8, 128), generator=torch.Generator().manual_seed(0))
    report = run(discover(model), METHODS["sparsegpt"], 0.6, load_calibration(ids))
    assert len(ratios) == len(report.layers) > 10
    assert max(ratios) <= 1.0
