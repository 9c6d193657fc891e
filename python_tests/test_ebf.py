"""Pruning by evidence: vectors, what it has in common with OBS and Wanda, budgets, and the engine."""

import dataclasses

import pytest
import torch

from pysparse.bayes import (
    Flat,
    HalfLaplace,
    HessianProblem,
    RowHyperprior,
    Settings,
    polish_rows,
    refit_rows,
    solve,
    solve_columns,
    solve_rows,
)
from pysparse.methods import METHODS, Columns, EbfUpdate, Emergent, Evidence, InverseHessian, ObsUpdate, Wanda
from pysparse.methods.ebf import damped, row_noise
from pysparse.pruning import NM, Keep, Unstructured


def layer(rows=24, cols=32, tokens=400, seed=0):
    """A weight of which half is small, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(tokens, cols, generator=generator) @ mix
    weight = torch.randn(rows, cols, generator=generator)
    weight[torch.rand(rows, cols, generator=generator) < 0.5] *= 0.1
    return weight, x.T @ x


def output_error(weight, pruned, gram):
    lost = (weight - pruned).double()
    return float(((lost @ gram.double()) * lost).sum() / ((weight.double() @ gram.double()) * weight).sum())


# --- the row solver ----------------------------------------------------------------------------------------


def test_two_weights():
    gram, weight = torch.tensor([[2.0, 1], [1, 1]]).double(), torch.tensor([[1.0, 0.2]]).double()
    noise = torch.tensor([[0.05]]).double()
    flat = solve_rows(gram, weight, noise, iterations=3000)
    torch.testing.assert_close(flat.gamma, torch.tensor([[1.18500, 0]]).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.mean, torch.tensor([[1.07727, 0]]).double(), atol=2e-3, rtol=0)  # lifted
    assert (flat.theta > 1).tolist() == [[True, False]]
    refit = refit_rows(gram, weight, flat.theta > 1)
    torch.testing.assert_close(refit, torch.tensor([[1.1, 0]]).double(), atol=1e-7, rtol=0)
    fixed = HessianProblem(
        gram.numpy(), (weight @ gram)[0].numpy(), float((weight @ gram @ weight.T)[0, 0]), 2
    )
    laplace = solve(fixed, HalfLaplace(3.0), 0.05, Settings(max_iterations=3000), weight[0].square().numpy())
    assert laplace.gamma[0] == pytest.approx(0.464924, abs=1e-5)
    assert laplace.x.tolist() == pytest.approx([1.04387, 0], abs=1e-5)


def test_rows_are_solved_as_the_general_solver_does():
    weight, gram = layer(4, 12)
    weight, gram = weight.double(), gram.double()
    noise = row_noise(weight, gram, 0.3)
    found = solve_rows(gram, weight, noise, iterations=400)
    for r in range(4):
        w, h = weight[r].numpy(), gram.numpy()
        problem = HessianProblem(h, h @ w, float(w @ h @ w), 400)
        one = solve(problem, Flat(), float(noise[r]), Settings(tolerance=1e-10, max_iterations=4000), w**2)
        assert ((found.theta[r] > 1).numpy() == one.support).all()
        live = one.support
        assert found.gamma[r].numpy()[live] == pytest.approx(one.gamma[live], rel=1e-3)


def test_with_all_other_weights_free_the_evidence_is_the_saliency_of_obs():
    weight, gram = layer(3, 8)
    weight, gram, noise = weight.double(), gram.double(), 0.5
    wide = torch.full((8,), 1e9, dtype=torch.float64)
    inverse = gram.inverse().diagonal()
    for r in range(3):
        problem = HessianProblem(gram.numpy(), (gram @ weight[r]).numpy(), 1e9, 400)
        moments = problem.moments(wide.numpy(), noise)
        used = 1 - wide.numpy() * moments.g  # cancels: gamma g is 1 to 1e-8, so s is checked by its inverse
        ratio = weight[r] ** 2 / (inverse * noise)
        s = 1 / (noise * inverse.numpy())
        assert moments.g == pytest.approx(s / (1 + 1e9 * s), rel=1e-9)
        q = weight[r].numpy() * s
        assert q**2 / s == pytest.approx(ratio.numpy(), rel=1e-5)
        assert abs(used).max() < 1e-6
    free = solve_rows(
        gram, 1e5 * weight, torch.full((3, 1), noise).double(), iterations=0
    )  # gamma = w^2, huge
    expected = (1e5 * weight) ** 2 / (inverse * noise)
    torch.testing.assert_close(free.theta, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kappa", [0.0, 2.841])
def test_a_diagonal_hessian_gives_wandas_threshold(kappa):
    weight = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    gram, noise = torch.diag(torch.rand(16) + 0.5), torch.full((30, 1), 0.4)
    inverse = 1 / gram.diagonal()
    found = solve_rows(gram, weight, noise, RowHyperprior(kappa), 200, inverse)
    assert torch.equal(found.theta > 1 + kappa, weight**2 * gram.diagonal() > noise * (1 + kappa))


def test_one_row_shares_with_nobody():
    weight, gram = layer(1, 16)
    weight, gram = weight.double(), gram.double()
    noise = row_noise(weight, gram, 0.3)
    alone = solve_rows(gram, weight, noise, iterations=60)
    shared = solve_columns(gram, weight, float(noise), iterations=60)
    torch.testing.assert_close(shared.gamma, alone.gamma[0], rtol=1e-3, atol=1e-9)
    assert torch.equal(shared.theta > 1, alone.theta[0] > 1)


def test_float32_and_float64_choose_alike():
    weight, gram = layer(64, 64, 2000)
    noise = row_noise(weight, gram, 0.2)
    single = solve_rows(gram, weight, noise).theta
    double = solve_rows(gram.double(), weight.double(), noise.double()).theta
    sure = (double.log() / 0.02).abs() > 1  # two per cent from the threshold
    assert sure.float().mean() > 0.95
    assert torch.equal((single > 1)[sure], (double > 1)[sure])


def test_refits_are_least_squares():
    weight, gram = layer(10, 20)
    weight, gram = weight.double(), gram.double()
    keep = torch.rand(10, 20, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[0], keep[1] = False, True
    found = refit_rows(gram, weight, keep)
    polished = polish_rows(gram, weight, keep, weight * keep, 60)
    for r in range(10):
        live = keep[r].nonzero()[:, 0]
        right = torch.zeros(20, dtype=torch.float64)
        if len(live):
            right[live] = torch.linalg.solve(gram[live][:, live], (gram @ weight[r])[live])
        torch.testing.assert_close(found[r], right, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(polished[r], right, rtol=1e-7, atol=1e-7)
    errors = [
        output_error(weight, polish_rows(gram, weight, keep, weight * keep, n), gram)
        for n in (0, 1, 2, 5, 20)
    ]
    assert errors == sorted(errors, reverse=True)


def test_bad_input_of_the_row_solver():
    weight, gram = layer(3, 8)
    noise = torch.ones(3, 1)
    for arguments, message in (
        ((gram[:7], weight, noise), r"H is \[n, n\] and the weight \[R, n\], got \(7, 8\) and \(3, 8\)"),
        ((gram, weight * float("nan"), noise), "NaN or infinite"),
        ((gram * 0, weight, noise), "diagonal entry that is not positive: damp it"),
        ((gram, weight, noise * 0), "sigma.2 is positive, the least is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            solve_rows(*arguments)
    with pytest.raises(ValueError, match="kappa is not negative, got -1"):
        RowHyperprior(-1.0)
    with pytest.raises(ValueError, match=r"power of a row hyperprior is in \(0, 1\], got 1.5"):
        RowHyperprior(1.0, 1.5)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        solve_columns(torch.tensor([[1.0, 3], [3, 1]]), torch.ones(1, 2), 0.1)


# --- the method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure", [Unstructured("matrix"), Unstructured("row"), NM(2, 4), NM(1, 4)], ids=str
)
def test_budgets_are_met_and_the_error_is_below_sparsegpts(structure):
    weight, gram = layer(40, 72)
    sparsity = structure.fixed_sparsity or 0.6
    stats = {"gram": gram, "squared_norm": gram.diagonal()}
    for width in (24, 128):
        found = EbfUpdate(block_size=width).solve(weight, stats, Evidence(), structure, sparsity)
        assert int((~found.keep).sum()) == structure.pruned_count(40, 72, sparsity)
    assert int((~found.keep).sum()) == structure.pruned_count(40, 72, sparsity)
    assert not found.weight[~found.keep].any()
    if isinstance(structure, NM):
        assert (found.keep.unflatten(1, (-1, 4)).sum(2) == structure.n).all()
    rivals = [
        Keep().solve(weight, stats, Wanda(), structure, sparsity).weight,
        ObsUpdate().solve(weight, stats, InverseHessian(), structure, sparsity).weight,
    ]
    assert output_error(weight, found.weight, gram) < min(output_error(weight, one, gram) for one in rivals)


def test_the_evidence_decides_how_much_goes():
    weight, gram = layer(40, 72)
    stats, kept, errors = {"gram": gram}, [], []
    for tau in (0.01, 0.1, 0.5):
        found = EbfUpdate(tau=tau).solve(weight, stats, Evidence(), Emergent(), 0.5)
        again = EbfUpdate(tau=tau).solve(weight, {"gram": 7 * gram}, Evidence(), Emergent(), 0.5)
        assert (
            found.keep == again.keep
        ).float().mean() > 0.995  # the amount of data cancels, but for rounding
        kept.append(float(found.keep.float().mean()))
        errors.append(output_error(weight, found.weight, gram))
    assert kept == sorted(kept, reverse=True)
    assert errors == sorted(errors)
    assert 0.2 < kept[-1] < kept[0] < 0.95
    harder = EbfUpdate(tau=0.1, kappa=2.841).solve(weight, stats, Evidence(), Emergent(), 0.5)
    assert harder.keep.float().mean() < kept[1]
    root = EbfUpdate(tau=0.1, kappa=2.841, power=0.5).solve(weight, stats, Evidence(), Emergent(), 0.5)
    assert root.keep.float().mean() < kept[1]
    shot = Keep().solve(weight, stats, Evidence(tau=0.1), Emergent(), 0.5)
    assert abs(float(shot.keep.float().mean()) - kept[1]) < 0.1


def test_one_shot_is_the_threshold_of_obs():
    weight, gram = layer()
    evidence = Evidence(tau=0.2, kappa=1.0)(weight, {"gram": gram})
    inverse = damped(gram, 0.01).double().inverse().diagonal()
    noise = row_noise(weight, gram, 0.2).double()
    torch.testing.assert_close(
        evidence.double(), weight.double() ** 2 / (inverse * noise * 2), rtol=1e-3, atol=1e-6
    )


def test_a_mask_that_is_there_is_respected_and_refit_can_be_left_out():
    weight, gram = layer()
    weight[:, ::4] = 0
    found = EbfUpdate().solve(weight, {"gram": gram}, Evidence(), Emergent(), 0.5)
    assert not found.keep[:, 0].any()
    shrunk = EbfUpdate(refit=False).solve(weight, {"gram": gram}, Evidence(), Emergent(), 0.5)
    assert output_error(weight, shrunk.weight, gram) > output_error(weight, found.weight, gram)


def test_whole_columns():
    weight, gram = layer(40, 48)
    weight[:, :16] *= 0.05
    found = EbfUpdate(polish=0).solve(weight, {"gram": gram}, Evidence(), Columns(), 1 / 3)
    gone = (~found.keep).all(dim=0)
    assert gone.sum() == 16
    assert torch.equal(gone, (~found.keep).any(dim=0))
    assert gone[:16].all()
    plain = weight * found.keep
    assert output_error(weight, found.weight, gram) < output_error(weight, plain, gram)
    with pytest.raises(ValueError, match="whole rows alone"):
        ObsUpdate().solve(weight, {"gram": gram}, InverseHessian(), Columns(), 0.5)


def test_bad_input_of_the_method():
    weight, gram = layer()
    with pytest.raises(ValueError, match="1 of 768 weights are NaN or infinite"):
        EbfUpdate().solve(
            weight.index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(float("nan"))),
            {"gram": gram}, Evidence(), Emergent(), 0.5,
        )  # fmt: skip
    for settings, message in (
        ({"tau": 0.0}, "tau is a finite number above 0, got 0.0"),
        ({"damping": -1.0}, "damping is a finite number from 0, got -1.0"),
        ({"block_size": 1000}, "block_size is a whole number from 1 to 512, got 1000"),
        ({"iterations": 1.5}, "iterations is a whole number"),
        ({"kappa": -0.1}, "kappa is not negative"),
        ({"power": 2.0}, "power of a row hyperprior"),
    ):
        with pytest.raises(ValueError, match=message):
            EbfUpdate(**settings)
    with pytest.raises(ValueError, match="1 of 4 scores are NaN"):
        Emergent().keep(torch.tensor([[1.0, float("nan"), 2, 0]]), 0.5)


@pytest.mark.parametrize("name", ["ebf", "ebf-auto", "ebf-oneshot", "ebf-columns"])
def test_the_engine_runs_every_form(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    from pysparse.calib import load_calibration
    from pysparse.methods import parse_recipe, recipe_to_yaml
    from pysparse.models.discover import discover
    from pysparse.pruning import run

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    recipe = METHODS[name]
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    rows = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    report = run(discover(model), recipe, 0.5, load_calibration(rows, batch_size=2))
    assert all(0 < one.zeros < one.shape[0] * one.shape[1] for one in report.layers)
    if name == "ebf":
        assert all(abs(one.zeros / (one.shape[0] * one.shape[1]) - 0.5) < 0.01 for one in report.layers)
    assert dataclasses.is_dataclass(recipe.reconstruction)
