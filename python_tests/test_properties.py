"""Random cases for every family of compiled kernels, on every ISA level, against float64.

A case is drawn and packed once and computed on each level: shapes around the sizes of vectors and tiles, values
that cancel, stand out, span many exponents or are not finite, activations at any address and stride.
"""

from __future__ import annotations

from dataclasses import dataclass

import families
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysparse import backend

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
FAST, SLOW = 200, 10_000  # cases a family and dtype
EDGES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]
SPECIALS = (float("inf"), float("-inf"), float("nan"))
LAYOUTS = ("contiguous", "every second", "unaligned", "transposed", "three dimensions", "same row for all")


@dataclass(frozen=True)
class Case:
    """What is multiplied by what; ``seed`` fixes the numbers."""

    rows: int
    cols: int
    tokens: int
    sparsity: float
    values: str  # "normal" | "outliers" | "cancelling" | "exponents" | "zeros"
    special: float | None  # put at one place
    special_in: str  # "weight" | "input"
    layout: str  # of the activations, one of LAYOUTS
    bias: bool
    option: int  # see families.Family
    seed: int


size = st.one_of(st.sampled_from(EDGES), st.integers(0, 150))
cases = st.builds(
    Case,
    rows=size,
    cols=st.one_of(size, st.sampled_from([511, 512, 513, 700])),
    tokens=st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 130])),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0]),
    values=st.sampled_from(["normal", "normal", "outliers", "cancelling", "exponents", "zeros"]),
    special=st.sampled_from([None, None, None, *SPECIALS]),
    special_in=st.sampled_from(["weight", "input"]),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    option=st.integers(0, 39),
    seed=st.integers(0, 2**31),
)


def numbers(rows, cols, values, generator):
    """Finite float32 numbers that test one weakness of a summation each."""
    drawn = torch.randn(rows, cols, generator=generator)
    if values == "outliers" and cols:
        drawn[:, cols // 2] = 1e4
    if values == "cancelling":
        half = cols // 2
        drawn[:, half : 2 * half] = -drawn[:, :half]
    if values == "exponents":
        drawn *= 2.0 ** torch.randint(-30, 30, drawn.shape, generator=generator)
    if values == "zeros":
        drawn[torch.rand(drawn.shape, generator=generator) < 0.5] = -0.0
    return drawn


def lay_out(x, layout):
    """The numbers of ``x`` [tokens, in] at other addresses and strides."""
    tokens, cols = x.shape
    if layout == "every second":
        wide = x.new_full((tokens, 2 * cols), float("nan"))
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "unaligned":
        flat = x.new_full((1 + tokens * cols,), float("nan"))
        flat[1:] = x.flatten()
        return flat[1:].view(tokens, cols)
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "three dimensions":
        return x[:, None, :]
    return x


def draw(case, family, dtype):
    """Return (x, laid out x, weight, bias) of a case; the weight is one that the family can hold."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens = min(case.tokens, family.max_tokens)
    weight = numbers(case.rows, case.cols, case.values, generator)
    weight[torch.rand(weight.shape, generator=generator) < case.sparsity] = 0
    weight = family.fit(weight.to(dtype), case.option)
    x = numbers(tokens, case.cols, case.values, generator).to(dtype)
    if case.values == "cancelling" and case.cols > 1:
        x[:, case.cols // 2 :] = x[:, case.cols // 2 :].abs()  # the same sign: products cancel
    if case.layout == "same row for all" and tokens:
        x = x[:1].expand(tokens, -1)
    place_special(case, family, weight, x)
    bias = torch.randn(case.rows, generator=generator).to(dtype) if case.bias else None
    return x, lay_out(x, case.layout), weight, bias


def place_special(case, family, weight, x):
    target = weight if case.special_in == "weight" else x
    if case.special is None or not target.numel() or not (family.non_finite_weights or target is x):
        return
    if target is weight:
        row, col = case.seed % case.rows, case.seed % case.cols
        if weight[row, col] != 0:  # where a pattern has room for it
            weight[row, col] = case.special
    else:
        x[case.seed % len(x), case.seed % case.cols] = case.special


def run_on_every_level(case, op, format, dtype_name):
    family, dtype = families.FAMILIES[op, format], families.DTYPES[dtype_name]
    x, laid_out, weight, bias = draw(case, family, dtype)
    packed = family.pack(weight, case.option)
    for key in families.kernels_by_family()[op, format, dtype_name]:
        with backend.force_isa(key.isa):
            actual = family.run(laid_out, packed, bias, case.option)
        if laid_out.dim() == 3 and op == "linear":
            assert actual.shape == (len(x), 1, case.rows)
            actual = actual.flatten(0, 1)
        try:
            assert actual.dtype == dtype
            family.judge(actual, x, weight, packed, bias, case.option)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Cases are too small to be shared out; waking threads for torch's part would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_compiled_kernel_belongs_to_a_family():
    assert {(key.op, key.format) for key in families.products()} == set(families.FAMILIES)


def check_cases(family, count):
    done = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(case=cases)
    def check(case):
        nonlocal done
        run_on_every_level(case, *family)
        done += 1

    check()
    assert done >= count


@pytest.mark.parametrize("family", families.kernels_by_family(), ids="-".join)
def test_random_cases(family):
    check_cases(family, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.kernels_by_family(), ids="-".join)
def test_ten_thousand_random_cases(family):
    check_cases(family, SLOW)


@pytest.mark.parametrize("key", families.kernel_params())
def test_a_wrong_answer_would_be_seen(key):
    """The judges are as sharp as they claim: one weight that is off by a hundredth fails."""
    family, dtype = families.family_of(key), families.DTYPES[key.dtype]
    weight = family.fit(reference.sparse_matrix(20, 40, 0.3, dtype), 1)
    x = torch.ones(3, 40, dtype=dtype)
    other = weight.clone()
    row, col = other.nonzero()[0].tolist()
    other[row, col] += 1.0
    packed = family.pack(weight, 1)
    with backend.force_isa(key.isa):
        actual = family.run(x, family.pack(other, 1), None, 1)
        with pytest.raises(AssertionError):
            family.judge(actual, x, weight, packed, None, 1)
        family.judge(family.run(x, packed, None, 1), x, weight, packed, None, 1)
