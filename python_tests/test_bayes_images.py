"""The solver at image size: blurs and wavelets against libraries, the linear algebra, baselines, the command."""

import json
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

from pysparse.bayes import DenseProblem, Flat, HalfLaplace, OperatorSettings, Settings, solve, solve_operator
from pysparse.bayes.blur import Blur, Wavelets, disk_psf, gaussian_psf, motion_psf, parse_psf, transform_named
from pysparse.bayes.maps import BlurredCoefficients, OperatorMap, check_adjoint
from pysparse.bayes.matrix_free import conjugate_gradients

pytest.importorskip("scipy")
pywt = pytest.importorskip("pywt")
pytest.importorskip("skimage")


def random_image(side, seed=0):
    return np.random.default_rng(seed).standard_normal((side, side))


# --- operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "psf", [gaussian_psf(1.0), disk_psf(3.0), motion_psf(9)], ids=["gaussian", "disk", "motion"]
)
def test_blurs_are_convolutions(psf):
    from scipy.ndimage import convolve

    image = random_image(24)
    for boundary, mode in (("periodic", "wrap"), ("reflective", "reflect")):
        blur = Blur(psf, (24, 24), boundary)
        np.testing.assert_allclose(blur.forward(image), convolve(image, psf, mode=mode), atol=1e-12)
        batch = np.stack([image, 2 * image])
        np.testing.assert_allclose(blur.forward(batch)[1], 2 * blur.forward(image), atol=1e-12)
    assert psf.sum() == pytest.approx(1.0)


def test_a_psf_that_is_not_symmetric_is_periodic_only():
    psf = np.array([[0, 0, 0], [0.5, 0.3, 0.2], [0, 0, 0]])
    check_adjoint(BlurredCoefficients(Blur(psf, (8, 16))))
    with pytest.raises(ValueError, match="symmetric up-down and left-right"):
        Blur(psf, (8, 16), "reflective")


@pytest.mark.parametrize("name", ["haar", "db2", "db4"])
def test_wavelets_are_orthonormal(name):
    image, transform = np.stack([random_image(32, 1), random_image(32, 2)]), Wavelets(name, 2)
    found = transform.analyse(image)
    np.testing.assert_allclose(transform.synthesise(found), image, atol=1e-13)
    assert (found**2).sum() == pytest.approx((image**2).sum())
    other = random_image(32, 3)
    assert (transform.analyse(image[0]) * other).sum() == pytest.approx(
        (image[0] * transform.synthesise(other)).sum()
    )
    flat = transform.analyse(np.ones((32, 32)))
    assert np.abs(flat[8:]).max() < 1e-10  # high-pass filters do not see a constant


def test_haar_is_that_of_pywavelets():
    image = random_image(32)
    right = pywt.coeffs_to_array(pywt.wavedec2(image, "haar", mode="periodization", level=3))[0]
    np.testing.assert_allclose(np.abs(Wavelets("haar", 3).analyse(image)), np.abs(right), atol=1e-13)


@pytest.mark.parametrize("boundary", ["periodic", "reflective"])
def test_equal_variances_make_division_gradients_and_matrix_agree(boundary):
    blur = Blur(gaussian_psf(0.8), (16, 16), boundary)
    linear, y, noise, level = BlurredCoefficients(blur, Wavelets("haar", 2)), random_image(16), 0.1, 0.7
    divided = linear.divide(y.reshape(1, -1), level, noise)
    product = lambda u: noise * u + linear.forward(level * linear.adjoint(u))  # noqa: E731
    solved, steps = conjugate_gradients(product, lambda u: u, y.reshape(1, -1), 0 * divided, 1e-12, 500)
    assert steps < 500
    np.testing.assert_allclose(solved, divided, atol=1e-8)
    matrix = linear.forward(np.eye(256)).T
    sigma = noise * np.eye(256) + level * matrix @ matrix.T
    np.testing.assert_allclose(divided[0], np.linalg.solve(sigma, y.reshape(-1)), atol=1e-9)
    if boundary == "periodic":
        np.testing.assert_allclose(linear.column_energy(), (matrix**2).sum(axis=0), atol=1e-12)
        g = np.einsum("mi,mi->i", matrix, np.linalg.solve(sigma, matrix))
        np.testing.assert_allclose(linear.entry_scale(level, noise), g / (1 - level * g), rtol=1e-8)


def test_the_first_level_is_the_likeliest():
    draw = np.random.default_rng(0)
    blur = Blur(gaussian_psf(1.0), (32, 32))
    y = blur.forward(draw.standard_normal((32, 32)) * 2.0) + 0.1 * draw.standard_normal((32, 32))
    assert blur.likeliest_level(y, 0.01) == pytest.approx(
        4.0, rel=0.35
    )  # the grid's step is a factor of 1.78


def test_the_diagonal_is_estimated_at_the_rate_of_the_draws():
    """g of every coefficient within five deviations sqrt(2 / K) of the exact one."""
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((30, 20))
    problem = DenseProblem(matrix, matrix @ np.ones(20) + generator.standard_normal(30))
    for probes in (64, 1024):
        found = solve_operator(
            OperatorMap(_operator(matrix)), problem.target, Flat(), 1.0,
            OperatorSettings(iterations=1, probes=probes, cg_tolerance=1e-10),
        )  # fmt: skip
        exact = problem.moments(found.gamma, 1.0).g
        assert np.abs(found.g / exact - 1).max() < 5 * (2 / probes) ** 0.5


def _operator(matrix):
    from scipy.sparse.linalg import aslinearoperator

    return aslinearoperator(matrix)


def test_without_a_matrix_the_answer_is_that_with_one():
    generator = np.random.default_rng(1)
    matrix, x = generator.standard_normal((60, 40)) / 60**0.5, np.zeros(40)
    x[[3, 17, 30]] = 3, -2, 4
    problem = DenseProblem(matrix, matrix @ x + 0.05 * generator.standard_normal(60))
    prior = HalfLaplace.at_level(5.635, problem.column_energy, 0.05**2)
    dense = solve(problem, prior, 0.05**2, Settings(max_iterations=200))
    free = solve_operator(
        _operator(matrix), problem.target, prior, 0.05**2,
        OperatorSettings(iterations=200, probes=64, cg_tolerance=1e-8, tolerance=1e-6),
    )  # fmt: skip
    large = np.abs(dense.x) > 1
    assert large.sum() == 3
    np.testing.assert_allclose(free.x, dense.x, atol=0.05)  # one deviation of the noise
    assert (free.variance >= 0).all()
    np.testing.assert_allclose(free.variance[large], dense.variance[large], rtol=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Blur(np.ones((4, 3)), (8, 8)),
            r"odd sides, none longer than the image's \(8, 8\), got \(4, 3\)",
        ),
        (lambda: Blur(np.ones((9, 9)), (8, 8)), "odd sides"),
        (lambda: Blur(np.ones(3), (8, 8)), "the PSF has 2 dimensions"),
        (
            lambda: Blur(gaussian_psf(1), (16, 16), "zero"),
            "boundary is 'periodic' or 'reflective', got 'zero'",
        ),
        (lambda: parse_psf("gauss"), "a PSF is written gaussian:NUMBER"),
        (lambda: parse_psf("disk:"), "the number of a PSF is missing in 'disk:'"),
        (lambda: parse_psf("gaussian:-1"), "deviation of a Gaussian is a number above 0"),
        (lambda: Wavelets("sym4"), "'haar' or a Daubechies wavelet"),
        (lambda: Wavelets("haar", 0), "levels is a whole number from 1 on, got 0"),
        (
            lambda: BlurredCoefficients(Blur(gaussian_psf(1), (20, 20)), transform_named("haar", 4)),
            "divisible by 16",
        ),
        (lambda: OperatorSettings(probes=0), "probes is a number above 0"),
    ],
)
def test_bad_operators(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_data_and_a_wrong_adjoint():
    from scipy.sparse.linalg import LinearOperator

    matrix, y = np.eye(6), np.ones(6)
    wrong = LinearOperator((6, 6), matvec=lambda x: 2 * x, rmatvec=lambda u: 3 * u, dtype=np.float64)
    with pytest.raises(ValueError, match="the adjoint is wrong: <A x, u> = .*, but <x, A.T u> = "):
        solve_operator(wrong, y, Flat(), 1.0)
    good = _operator(matrix)
    with pytest.raises(ValueError, match="2 of 6 entries of y are NaN or infinite"):
        solve_operator(good, np.array([1, np.nan, 1, np.inf, 1, 1]), Flat(), 1.0)
    with pytest.raises(ValueError, match=r"y has shape \(5,\), the operator gives \(6,\)"):
        solve_operator(good, np.ones(5), Flat(), 1.0)
    with pytest.raises(ValueError, match="sigma.2 is a number above 0, got 0.0"):
        solve_operator(good, y, Flat(), 0.0)
    holed = _operator(np.diag([1.0, 0, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match="1 columns of A are zero and Flat"):
        solve_operator(holed, y, Flat(), 1.0)
    assert solve_operator(holed, y, HalfLaplace(1.0), 1.0).gamma[1] == 0


# --- images ------------------------------------------------------------------------------------------------


def experiment(**changes):
    from pysparse.bayes.deblur import Experiment, Setup, bundled_image

    setup = Setup(
        psf="gaussian:1.5",
        noise=0.003,
        size=32,
        levels=3,
        settings=OperatorSettings(iterations=12),
        **changes,
    )
    return Experiment(bundled_image("camera", 32), setup)


@pytest.mark.parametrize("boundary", ["periodic", "reflective"])
def test_every_method_restores_more_than_the_blur_left(boundary):
    from pysparse.bayes.deblur import BASELINES

    trial = experiment(boundary=boundary)
    blurred = np.linalg.norm(trial.observed - trial.truth) / np.linalg.norm(trial.truth)
    for method in ("half-laplace", *BASELINES):
        found = trial.restore(method)
        assert found.relative_error < 0.95 * blurred, method
        assert found.psnr > 15
        assert 0 < found.ssim <= 1
    assert trial.restore("tikhonov").nonzeros is None


def test_points_are_found_and_an_increasing_hyperprior_helps():
    from pysparse.bayes.deblur import Experiment, Setup

    truth = np.zeros((24, 24))
    places = np.random.default_rng(0).choice(576, 20, replace=False)
    truth.flat[places] = 1.0
    setup = Setup(psf="gaussian:1", transform="pixels", kappa=5.635, settings=OperatorSettings(40, probes=16))
    trial = Experiment(truth, setup)
    flat, laplace = trial.restore("flat"), trial.restore("half-laplace")
    for one in (flat, laplace):
        assert one.relative_error < 0.1
        assert one.solution.support[places].all()
    assert laplace.nonzeros <= flat.nonzeros


def test_bad_experiments():
    from pysparse.bayes.deblur import Experiment, Setup, bundled_image, sweep

    for call, message in (
        (lambda: Experiment(np.zeros((32, 32)), Setup()), "zero everywhere"),
        (
            lambda: Experiment(np.ones((3, 32, 32)), Setup()),
            r"the image has 2 dimensions, got shape \(3, 32, 32\)",
        ),
        (lambda: Experiment(np.ones((0, 32)), Setup()), "the image is empty"),
        (lambda: Experiment(np.full((32, 32), np.nan), Setup()), "1024 of 1024 entries of the image are NaN"),
        (lambda: Setup(noise=0.0), "noise level is a number above 0"),
        (lambda: Setup(size=4), "from 8 to 4096, got 4"),
        (lambda: Setup(kappa=-1.0), "kappa is not negative, got -1.0"),
        (lambda: bundled_image("lena", 32), "no bundled image 'lena'; known: astronaut"),
        (lambda: experiment().restore("wiener"), "method is one of flat, .*, got 'wiener'"),
        (lambda: experiment().hyperprior("wiener"), "hyperprior is one of flat"),
        (lambda: list(sweep(np.ones((32, 32)), Setup(), [], "size", [1])), "'noise' or 'psf', got 'size'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_command(tmp_path):
    from pysparse.cli import app

    command = [
        "ebf", "deblur", "coins", "--size", "16", "--psf", "gaussian:0.7", "--iterations", "3", "--probes", "2",
        "--sweep", "noise", "--no-baselines", "--out", str(tmp_path), "--json", str(tmp_path / "all.json"),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's own deprecations
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    names = {"images.png", "convergence.png", "sweep_noise.png", "results.json", "all.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    content = json.loads((tmp_path / "results.json").read_text())
    assert [one["method"] for one in content["methods"]] == ["flat", "half-laplace"]
    assert len(content["sweeps"]["noise"]) == 10
    wrong = CliRunner().invoke(app, ["ebf", "deblur", "lena"])
    assert wrong.exit_code == 2
    assert "no bundled image 'lena'" in wrong.output
