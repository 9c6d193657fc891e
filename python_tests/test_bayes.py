"""The evidence solver: vectors, optimality, invariances, and bad input."""

import forked
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from pysparse.bayes import (
    DenseProblem,
    Flat,
    Gamma,
    GeneralizedGamma,
    HalfGeneralizedGaussian,
    HalfLaplace,
    HessianProblem,
    Jeffreys,
    Settings,
    gradient,
    largest_weight,
    objective,
    path,
    solve,
)
from pysparse.bayes import hyperpriors as priors
from pysparse.bayes.problem import full_moments
from pysparse.bayes.proximal import prox_power


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Problems of a few coefficients: waking a second thread of BLAS for each product is most of the time."""
    with threadpool_limits(1):
        yield


A = np.array([[1, 0, 1, 0.5], [0, 1, 1, -0.5], [1, -1, 0, 1.0]])
Y, NOISE = np.array([1.5, 0.2, 1.3]), 0.04
EXACT = {"tolerance": 1e-12, "kkt_tolerance": 1e-8, "max_iterations": 3000}
FAMILY = [
    Flat(), HalfLaplace(2.0), HalfGeneralizedGaussian(0.5, 1.0), HalfGeneralizedGaussian(0.7, 1.0),
    HalfGeneralizedGaussian(1.5, 1.0), HalfGeneralizedGaussian(2.0, 1.0), Gamma(0.5, 1.0), Gamma(1.6, 1.0),
    GeneralizedGamma(0.5, 1.0, 1.0), GeneralizedGamma(1.5, 1.0, 2.0), Jeffreys(1e-3),
]  # fmt: skip
ids = [str(one) for one in FAMILY]


def problems():
    return DenseProblem(A, Y), HessianProblem(A.T @ A, A.T @ Y, float(Y @ Y), 3)


def random_problem(samples, size, support, seed=0, noise=0.05):
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((samples, size)) / np.sqrt(samples)
    x = np.zeros(size)
    x[generator.choice(size, support, replace=False)] = generator.choice([-1, 1], support) * 3
    return DenseProblem(matrix, matrix @ x + noise * generator.standard_normal(samples)), x


# --- vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "weight", "gamma", "x"),
    [
        (0.4, 0, 0, 0), (0.6, 0, 0.11, 0.1833333), (1.0, 0, 0.75, 0.75), (3.0, 0, 8.75, 2.9166667),
        (0.4, 1, 0, 0), (0.6, 1, 0.0310250, 0.0662396), (1.0, 1, 0.3680340, 0.5954915),
        (3.0, 1, 2.2913813, 2.7048849), (0.6, 4, 0, 0), (1.0, 4, 0.1403882, 0.3596118),
        (3.0, 4, 1.1301993, 2.4566002),
    ],
)  # fmt: skip
@pytest.mark.parametrize("algorithm", ["mm", "coordinate", "palm"])
def test_a_single_coefficient(y, weight, gamma, x, algorithm):
    prior = HalfLaplace(weight) if weight else Flat()
    found = solve(DenseProblem([[1.0]], [y]), prior, 0.25, Settings(algorithm, **EXACT))
    assert found.gamma[0] == pytest.approx(gamma, abs=2e-7)
    assert found.x[0] == pytest.approx(x, abs=2e-7)


def test_a_coordinate():
    gamma = priors.coordinate_minimum(HalfLaplace(0.7), 2.0, 3.0)
    assert gamma == pytest.approx(0.7156080123, abs=1e-10)
    level = np.log(1 + gamma * 2) - 9 * gamma / (1 + gamma * 2) + 0.7 * gamma
    assert level == pytest.approx(-1.2597572289, abs=1e-10)


VECTORS = [
    (Flat(), 0.4396076940, -2.7188794745, (1.8289322857, 0, 0.0172528352, 0), (1.3440943956, 0, 0.0824149451, 0)),
    (HalfLaplace(2.0), 8.4396076940, -0.6658683426, (0.7195346698, 0, 0.0192327688, 0),
     (1.3163971168, 0, 0.0940252973, 0)),
    (HalfGeneralizedGaussian(0.5, 1.0), 4.4396076940, -1.3997956311, (1.1821040594, 0, 0.0126048225, 0),
     (1.3427547534, 0, 0.0690544001, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("prior", "first", "last", "gamma", "x"), VECTORS, ids=["flat", "laplace", "root"])
@pytest.mark.parametrize("algorithm", ["mm", "coordinate", "reweighted-l1", "palm"])
@pytest.mark.parametrize("form", [0, 1], ids=["dense", "hessian"])
def test_four_coefficients(prior, first, last, gamma, x, algorithm, form):
    start = None if algorithm == "coordinate" else np.ones(4)
    found = solve(problems()[form], prior, NOISE, Settings(algorithm, **EXACT), start)
    if start is not None:
        assert found.objective[0] == pytest.approx(first, abs=1e-9)
    steps = np.diff(found.objective)
    assert (steps <= 1e-12 * np.abs(found.objective[0])).all()  # never up
    slow = algorithm == "palm" and not isinstance(prior, HalfLaplace)  # 3000 steps do not reach the limit
    assert found.objective[-1] == pytest.approx(last, abs=2e-4 if slow else 2e-9)
    np.testing.assert_allclose(found.gamma, gamma, atol=3e-2 if slow else 1e-8)
    np.testing.assert_allclose(found.x, x, atol=4e-4 if slow else 1e-8)
    assert found.converged is not slow


def test_the_first_steps_and_the_slack_at_zero():
    first = {0: (1.0080324624, 0.2131009671, 0.6894410398, 0.7472416236),
             2: (0.4489481409, 0.0949089306, 0.3430097375, 0.2813609690)}  # fmt: skip
    levels = {0: -0.2757773374, 2: 1.9954407770}
    for weight, gamma in first.items():
        prior = HalfLaplace(weight) if weight else Flat()
        found = solve(problems()[0], prior, NOISE, Settings(max_iterations=1), np.ones(4))
        np.testing.assert_allclose(found.gamma, gamma, atol=1e-9)
        assert found.objective[1] == pytest.approx(levels[weight], abs=1e-9)
    limit = solve(problems()[0], Flat(), NOISE, Settings(**EXACT), np.ones(4))
    moments = problems()[0].moments(limit.gamma, NOISE)
    np.testing.assert_allclose((moments.g - moments.z**2)[[1, 3]], (6.6932143, 3.3466071), atol=1e-6)


def test_the_half_laplace_minimum_is_global():
    problem, prior, levels = problems()[0], HalfLaplace(2.0), {}
    for code in range(16):
        support = np.array([bool(code >> i & 1) for i in range(4)])
        found = solve(problem, prior, NOISE, Settings(**EXACT), support * 1.0)
        levels[tuple(np.flatnonzero(support))] = found.objective[-1]
    assert min(levels.values()) == pytest.approx(-0.6658683426, abs=1e-9)
    for support, level in {(0,): -0.460518, (0, 1): -0.464534, (2, 3): 2.933939, (): 89.843373}.items():
        assert levels[support] == pytest.approx(level, abs=1e-6)


def test_gradient_hessian_and_log_determinant():
    gamma = np.array([0.3, 0.7, 0.2, 1.1])
    for problem in problems():
        expected = (-2.3249386, 0.7660454, -2.4270964, -0.1726725)
        np.testing.assert_allclose(gradient(problem, Flat(), gamma, NOISE), expected, atol=1e-7)
        found = problem.moments(gamma, NOISE)
        np.testing.assert_allclose(
            found.g, (1.2523448899, 0.8354755784, 2.2163551727, 0.4898214410), atol=1e-9
        )
        assert found.log_det == pytest.approx(-2.1615717600, abs=1e-9)
        full, z = full_moments(problem, gamma, NOISE)
        hessian = 2 * np.outer(z, z) * full - full * full
        for i in range(4):
            step = np.eye(4)[i] * 1e-5
            ahead, behind = (gradient(problem, Flat(), gamma + sign * step, NOISE) for sign in (1, -1))
            np.testing.assert_allclose((ahead - behind) / 2e-5, hessian[i], atol=1e-6)


def test_proximal_maps_of_the_root():
    for v, mu, right in ((1, 0.3, 0.8359395818), (1, 0.5, 0.7015158584), (0.9, 0.5, 0), (2, 0.5, 1.8144020186),
                         (1, 0.55, 0)):  # fmt: skip
        assert prox_power(np.array([v]), mu, 0.5)[0] == pytest.approx(right, abs=1e-9)


@pytest.mark.parametrize("prior", FAMILY, ids=ids)
def test_every_prox_is_the_global_minimum(prior):
    grid = np.concatenate([[0.0], np.geomspace(1e-9, 5, 40_000)])
    with np.errstate(divide="ignore"):
        penalty = priors.value(prior, grid)
    for step in (0.05, 0.6):
        for v in (-0.5, 0.0, 0.3, 0.9, 1.5, 3.0):
            found = float(prior.prox(np.array([v]), step)[0])
            cost = (grid - v) ** 2 / 2 + step * penalty
            with np.errstate(divide="ignore"):
                mine = (found - v) ** 2 / 2 + step * priors.value(prior, np.array([found]))[0]
            assert mine <= cost.min() + 1e-9


@pytest.mark.parametrize("prior", FAMILY, ids=ids)
def test_every_coordinate_minimum_is_global(prior):
    grid = np.concatenate([[0.0], np.geomspace(1e-9, 50, 40_000)])
    for s, q in ((2.0, 3.0), (1.0, 0.5), (0.3, 2.0), (5.0, 2.4)):
        with np.errstate(divide="ignore"):
            cost = np.log1p(grid * s) - q * q * grid / (1 + grid * s) + priors.value(prior, grid)
            found = np.array([priors.coordinate_minimum(prior, s, q)])
            mine = np.log1p(found * s) - q * q * found / (1 + found * s) + priors.value(prior, found)
        assert mine[0] <= cost.min() + 1e-9


# --- properties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", FAMILY, ids=ids)
@pytest.mark.parametrize("algorithm", ["mm", "palm", "coordinate"])
def test_the_objective_never_rises_and_ends_stationary(prior, algorithm):
    problem, _ = random_problem(15, 25, 4)
    found = solve(
        problem,
        prior,
        0.01,
        Settings(algorithm, max_iterations=400 if algorithm == "mm" else 25, tolerance=1e-7),
    )
    assert (np.diff(found.objective) <= 1e-9 * np.abs(found.objective).max()).all()
    if algorithm == "coordinate":
        assert found.kkt < 1e-2
    if algorithm == "mm" and priors.is_concave(prior):
        assert found.kkt < 1e-2
        assert found.support.sum() <= problem.samples


def test_at_most_as_many_nonzeros_as_observations():
    for seed in range(2):
        problem, _ = random_problem(8, 40, 12, seed)
        for prior in (Flat(), HalfLaplace(1.0), HalfGeneralizedGaussian(0.5, 0.5)):
            found = solve(
                problem, prior, 1e-3, Settings(max_iterations=2000, tolerance=1e-9, kkt_tolerance=1e-6)
            )
            assert found.support.sum() <= 8, (seed, prior)


def test_the_truth_is_found_with_its_error_bars():
    problem, x = random_problem(60, 40, 5)
    found = solve(problem, HalfLaplace.at_level(5.635, problem.column_energy, 0.05**2), 0.05**2)
    assert set(np.flatnonzero(x)) <= set(np.flatnonzero(found.support))
    assert found.support.sum() <= 7
    deviation = np.abs(found.x - x)[found.support] / np.sqrt(found.variance[found.support])
    assert deviation.max() < 4  # standard deviations, at most seven coefficients
    assert (found.variance[~found.support] == 0).all()
    refit = solve(problem, HalfLaplace(50.0), 0.05**2, Settings(refit=True))
    live = refit.support
    right = np.linalg.lstsq(problem.matrix[:, live], problem.target, rcond=None)[0]
    np.testing.assert_allclose(refit.x[live], right, rtol=1e-8)


def test_pure_noise_is_kept_at_the_chi_square_rate():
    generator = np.random.default_rng(1)
    target = generator.standard_normal(4000)
    for kappa, rate in ((0.0, 0.3173), (2.841, 0.05), (5.635, 0.01), (9.828, 0.001)):
        kept = np.mean([
            priors.coordinate_minimum(HalfLaplace(kappa) if kappa else Flat(), 1.0, one) > 0 for one in target
        ])  # fmt: skip
        assert abs(kept - rate) <= 3 * np.sqrt(rate * (1 - rate) / len(target)), kappa
    problem = DenseProblem(np.eye(300), target[:300])
    flat = solve(problem, Flat(), 1.0, Settings("coordinate"))
    assert np.array_equal(flat.support, target[:300] ** 2 > 1)


def test_scaling_and_order():
    t, order = 3.0, np.array([2, 0, 3, 1])
    for prior, scaled in ((Flat(), Flat()), (HalfLaplace(2.0), HalfLaplace(2.0 / t**2))):
        plain = solve(DenseProblem(A, Y), prior, NOISE, Settings(**EXACT))
        same = solve(DenseProblem(t * A, t * Y), prior, t**2 * NOISE, Settings(**EXACT))
        grown = solve(DenseProblem(A, t * Y), scaled, t**2 * NOISE, Settings(**EXACT))
        moved = solve(DenseProblem(A[:, order], Y), prior, NOISE, Settings(**EXACT))
        np.testing.assert_allclose(same.gamma, plain.gamma, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(grown.gamma, t**2 * plain.gamma, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(moved.gamma, plain.gamma[order], rtol=1e-8, atol=1e-10)


def test_duplicate_and_zero_columns():
    for prior in (Flat(), HalfLaplace(2.0)):
        single = solve(DenseProblem(A, Y), prior, NOISE, Settings(**EXACT))
        double = solve(DenseProblem(np.column_stack([A, A[:, 0]]), Y), prior, NOISE, Settings(**EXACT))
        assert double.gamma[0] + double.gamma[4] == pytest.approx(single.gamma[0], abs=1e-7)
    holed = DenseProblem(np.column_stack([A, np.zeros(3)]), Y)
    for algorithm in ("mm", "palm", "coordinate", "reweighted-l1"):
        assert solve(holed, HalfLaplace(2.0), NOISE, Settings(algorithm)).gamma[4] == 0
    with pytest.raises(ValueError, match=r"columns \[4\] of A are zero and Flat says nothing"):
        solve(holed, Flat(), NOISE)
    repeated = DenseProblem(np.column_stack([A[:, 0], A[:, 0]]), Y)
    with pytest.raises(ValueError, match="the 2 columns of the support have rank 1: a refit is not unique"):
        solve(repeated, Flat(), NOISE, Settings(refit=True))


def test_without_the_log_determinant_half_laplace_is_the_lasso():
    """Far above the noise g is small beside c: the solution solves the lasso weighted by 2 sqrt(g + c)."""
    found = solve(problems()[0], HalfLaplace(2.0), NOISE, Settings(**EXACT))
    moments = problems()[0].moments(found.gamma, NOISE)
    pull = 2 * (A.T @ (Y - A @ found.x)) / NOISE
    weights = 2 * np.sqrt(moments.g + 2.0)
    live = found.support
    np.testing.assert_allclose(pull[live], (weights * np.sign(found.x))[live], rtol=1e-6)
    assert (np.abs(pull[~live]) <= weights[~live]).all()


def test_the_path_starts_where_the_first_coefficient_enters():
    problem = problems()[0]
    entry = (problem.correlation / NOISE) ** 2 - problem.column_energy / NOISE
    np.testing.assert_allclose(entry, (4850, 706.25, 1756.25, 2339.0625))
    assert largest_weight(problem, NOISE) == pytest.approx(4850)
    steps = list(path(problem, NOISE, count=6, ratio=1e-4))
    assert not steps[0][1].support.any()
    assert all(one.support.any() for _, one in steps[1:])
    assert steps[-1][0] == pytest.approx(0.485)
    weights = [
        solution.objective[-1] - priors.value(HalfLaplace(w), solution.gamma).sum() for w, solution in steps
    ]
    assert (np.diff(weights) < 0).all()  # the data are explained better and better


def test_the_noise_is_estimated():
    problem, x = random_problem(200, 30, 4, noise=0.1)
    found = solve(problem, Flat(), 1.0, Settings(estimate_noise=True))
    assert 0.8 * 0.01 < found.noise < 1.25 * 0.01  # 200 samples: a relative deviation of 0.1
    np.testing.assert_allclose(found.x, x, atol=0.5)
    assert (np.diff(found.objective) <= 1e-9 * np.abs(found.objective).max()).all()


def test_hessian_and_data_give_the_same():
    problem, _ = random_problem(50, 20, 4)
    twin = HessianProblem(problem.gram, problem.correlation, problem.energy, 50)
    for prior in FAMILY:
        a, b = (solve(one, prior, 0.01, Settings(max_iterations=30)) for one in (problem, twin))
        np.testing.assert_allclose(a.gamma, b.gamma, rtol=1e-6, atol=1e-9 * a.gamma.max())
        assert a.objective[-1] == pytest.approx(b.objective[-1], rel=1e-9)


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenseProblem(A * np.nan, Y), "12 of 12 entries of A are NaN or infinite"),
        (lambda: DenseProblem(A, [1, np.inf, 0]), "1 of 3 entries of y are NaN or infinite"),
        (lambda: DenseProblem(Y, Y), r"A has 2 dimensions, got shape \(3,\)"),
        (lambda: DenseProblem(A[:0], Y[:0]), r"A is empty: shape \(0, 4\)"),
        (lambda: DenseProblem(A, Y[:2]), "A has 3 rows, y has 2 entries"),
        (lambda: solve(DenseProblem(A, Y), Flat(), 0.0), "sigma.2 is a number above 0, got 0.0"),
        (lambda: solve(DenseProblem(A, Y), Flat(), float("nan")), "sigma.2 is a number above 0, got nan"),
        (lambda: solve(DenseProblem(A, Y), Flat(), "x"), "sigma.2 is a number above 0, got 'x'"),
        (
            lambda: solve(DenseProblem(A, Y), Flat(), 0.1, start=-np.ones(4)),
            "4 finite variances, none negative",
        ),
        (lambda: solve(DenseProblem(A, Y), Gamma(3.0, 1.0), 0.1, Settings("reweighted-l1")), "concave phi"),
        (
            lambda: HessianProblem(-np.eye(2), [1, 1], 1.0, 3),
            "eigenvalue -1: it is not positive semidefinite",
        ),
        (lambda: HessianProblem([[1, 2], [0, 1]], [1, 1], 1.0, 3), "H is not symmetric"),
        (lambda: HessianProblem(np.eye(2), [1], 1.0, 3), r"H is \[n, n\] and b \[n\]"),
        (lambda: HessianProblem(np.eye(2), [1, 1], -1.0, 3), "not negative and samples at least 1"),
        (
            lambda: Settings("newton"),
            "algorithm is 'mm', 'palm', 'coordinate' or 'reweighted-l1', got 'newton'",
        ),
        (lambda: Settings(max_iterations=0), "max_iterations is a number above 0"),
        (lambda: HalfLaplace(-1.0), "finite and not negative, got -1.0"),
        (lambda: HalfGeneralizedGaussian(2.5, 1.0), r"power .* is in \(0, 2\], got 2.5"),
        (lambda: HalfGeneralizedGaussian(1.0, 0.0), "weight .* is a number above 0"),
        (lambda: GeneralizedGamma(0.0, 1.0, 1.0), r"power .* is in \(0, 2\], got 0.0"),
        (lambda: Gamma(0.0, 1.0), "shape of a Gamma hyperprior is a number above 0"),
        (lambda: Jeffreys(0.0), "guard of Jeffreys' hyperprior is a number above 0"),
        (lambda: list(path(DenseProblem(A, Y), 0.1, count=1)), "at least 2 weights"),
        (lambda: list(path(DenseProblem(A, 0 * Y), 0.1)), "the path is empty"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_objective_is_what_the_algorithms_report():
    found = solve(problems()[0], HalfLaplace(2.0), NOISE)
    assert objective(problems()[0], HalfLaplace(2.0), found.gamma, NOISE) == pytest.approx(
        found.objective[-1]
    )


# --- scikit-learn ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of checks that scikit-learn skips without pandas
def test_scikit_learn_accepts_the_estimator():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    from pysparse.bayes import EBFRegressor

    checks.check_estimator(EBFRegressor())


def test_the_estimator_finds_a_sparse_model():
    pytest.importorskip("sklearn")
    from pysparse.bayes import EBFRegressor

    generator = np.random.default_rng(0)
    X = generator.standard_normal((120, 30))
    X[:, 7] = 4.0  # constant
    y = 2.0 + X[:, :3] @ [1.0, -2.0, 3.0] + 0.1 * generator.standard_normal(120)
    for hyperprior in ("flat", "half-laplace", "half-root", "half-gaussian", "jeffreys", Flat()):
        model = EBFRegressor(hyperprior, refit=True).fit(X, y)
        np.testing.assert_allclose(model.coef_[:3], [1, -2, 3], atol=0.08)
        assert model.coef_[7] == 0
        assert model.intercept_ == pytest.approx(2, abs=0.1)
    sparse = EBFRegressor(kappa=9.828).fit(X, y)
    assert np.flatnonzero(sparse.coef_).tolist() == [0, 1, 2]
    np.testing.assert_allclose(sparse.coef_[:3], [1, -2, 3], atol=0.1)
    assert 0.005 < sparse.noise_variance_ < 0.02
    mean, deviation = sparse.predict(X, return_std=True)
    assert np.mean(np.abs(mean - y) < 2 * deviation) > 0.9
    with pytest.raises(ValueError, match="hyperprior is one of flat, .*, got 'cauchy'"):
        EBFRegressor("cauchy").fit(X, y)
    with pytest.raises(ValueError, match="kappa is not negative, got -1"):
        EBFRegressor(kappa=-1).fit(X, y)


def test_what_is_missing_names_the_extra():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import pysparse.bayes\n"
        "try:\n    pysparse.bayes.EBFRegressor\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = forked.run(code)
    assert done.returncode == 0, done.stderr
    assert "this needs the package sklearn: pip install 'pysparse[bayes]'" in done.stdout
