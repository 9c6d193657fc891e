"""RMSNorm in one call: the kernels' bits, what is taken for a norm, and what stays as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from pysparse import backend, ops
from pysparse.nn import densify_, fuse_norms_, unfuse_norms_
from pysparse.nn.norm import FusedNorm

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = [torch.float32, torch.bfloat16]
FORMS = {"rounded": LlamaRMSNorm, "wide": Olmo2RMSNorm, "shifted": GemmaRMSNorm}
LEVELS = sorted({key.isa for key in backend.kernels(op="norm") if key.supported})


def oracle(x, weight, eps, form):
    """The eager code's operations in float32 and its roundings, but for the sum: that is float64's."""
    mean = x.double().square().sum(-1, keepdim=True).float() / x.shape[-1]
    normal = x.float() * torch.rsqrt(mean + eps)
    if form == "rounded":
        return (normal.to(x.dtype).float() * weight.float()).to(x.dtype)
    return (normal * (weight.float() + (1.0 if form == "shifted" else 0.0))).to(x.dtype)


def draw(rows, cols, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * torch.logspace(-4, 3, rows).unsqueeze(1)
    return x.to(dtype), torch.randn(cols, generator=generator).to(dtype)


def fused(module, dtype=torch.float32):
    module = module.to(dtype).requires_grad_(False)
    module.weight.normal_(generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(module)
    assert fuse_norms_(module)
    return module, plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", LEVELS)
def test_every_level_has_the_bits_of_a_float64_sum(isa, form, dtype):
    with backend.force_isa(isa):
        for cols in (1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 4096):
            x, weight = draw(5, cols, dtype, cols)
            assert torch.equal(ops.rms_norm(x, weight, 1e-6, form), oracle(x, weight, 1e-6, form)), cols


@pytest.mark.parametrize("isa", LEVELS)
def test_extreme_values_are_those_of_the_eager_code(isa):
    norm = LlamaRMSNorm(40).requires_grad_(False)
    rows = torch.zeros(6, 40)
    rows[1, 3], rows[2, 5], rows[3] = torch.inf, torch.nan, 3e38  # the squares of the last overflow
    rows[4], rows[5] = 1e-40, torch.arange(40) - 20.0
    for dtype in DTYPES:
        with backend.force_isa(isa):
            actual = ops.rms_norm(rows.to(dtype), norm.weight.to(dtype), norm.variance_epsilon)
        torch.testing.assert_close(actual, norm.to(dtype)(rows.to(dtype)), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other_nor_on_threads(dtype):
    x, weight = draw(70, 512, dtype)
    together, threads = ops.rms_norm(x, weight, 1e-5), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.rms_norm(x, weight, 1e-5), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.stack([ops.rms_norm(row, weight, 1e-5) for row in x]), together)
    assert ops.rms_norm(x[:0], weight, 1e-5).shape == (0, 512)
    assert torch.equal(ops.rms_norm(x.T.contiguous().T, weight, 1e-5), together)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "round"}, "form is one of rounded, wide, shifted; got 'round'"),
        ({"x": torch.ones(2, 7)}, r"x is \(2, 7\) and the weight \(8,\)"),
        ({"x": torch.ones(2, 8).half()}, "x is torch.float16 and the weight torch.float32"),
        ({"x": torch.ones(2, 8, device="meta")}, "x is on meta"),
        ({"eps": -1e-6}, "eps=-1e-06 is not a finite number of at least 0"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, "at least 1"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**({"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-6} | options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_found_by_their_values(form, dtype):
    norm, plain = fused(FORMS[form](512), dtype)
    assert fuse_norms_(norm) == {"": form}
    x, _ = draw(50, 512, dtype)
    actual, expected = norm(x), plain(x)
    # torch's float32 sum moves the factor by an ulp or two, and in bfloat16 a value over a rounding boundary.
    step = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    assert ((actual - expected).abs() <= step * expected.abs()).all()
    if dtype == torch.bfloat16:
        assert (actual == expected).float().mean() > 0.999


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Capped(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).clamp(-4, 4)


class OtherEpsilon(LlamaRMSNorm):
    """Adds another number than its attribute says."""

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Biased(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


@pytest.mark.parametrize("other", [Centred, Capped, OtherEpsilon, Biased, nn.LayerNorm, nn.RMSNorm])
def test_what_computes_something_else_is_left_alone(other):
    model = nn.Sequential(other(64), LlamaRMSNorm(64))
    assert fuse_norms_(model) == {"1": "rounded"}
    assert type(model[0]) is other


def test_a_replaced_forward_is_left_alone():
    norm = LlamaRMSNorm(8)
    norm.forward = lambda x: x
    assert fuse_norms_(norm) == {}


@pytest.fixture
def counted(monkeypatch):
    """Calls of the kernel, each as its number of values."""
    calls, function = [], backend.core().rms_norm

    def call(dtype, x, rows, cols, *rest):
        calls.append(rows * cols)
        return function(dtype, x, rows, cols, *rest)

    monkeypatch.setattr(backend.core(), "rms_norm", call)
    return calls


def test_other_calls_go_the_way_they_would_without(counted):
    norm, plain = fused(LlamaRMSNorm(64))
    counted.clear()
    x = torch.randn(3, 64)
    for given in (x.double(), x.half(), x.bfloat16(), x.T.contiguous().T, x.requires_grad_()):
        assert torch.equal(norm(given), plain(given))
    x = x.detach()
    assert torch.equal(norm(hidden_states=x), plain(x))
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), plain(x))
    with pytest.raises(RuntimeError):
        norm(torch.randn(3, 63))
    assert counted == []
    norm(x)
    assert counted == [3 * 64]


def test_training_goes_on(counted):
    norm, plain = LlamaRMSNorm(64), LlamaRMSNorm(64)
    fuse_norms_(norm)
    counted.clear()
    x = torch.randn(3, 64)
    for one in (norm, plain):
        one(x).square().sum().backward()
    assert torch.equal(norm.weight.grad, plain.weight.grad)
    assert counted == []
    with torch.no_grad():
        norm(x)
    assert counted == [3 * 64]


def test_the_epsilon_and_the_weight_of_the_moment_count():
    norm, plain = fused(LlamaRMSNorm(64))
    x = torch.randn(3, 64)
    for one in (norm, plain):
        one.variance_epsilon = 0.5
        one.weight.mul_(3)
    torch.testing.assert_close(norm(x), plain(x))


def test_the_module_stays_what_it_was(counted):
    norm = LlamaRMSNorm(64)
    seen, weight, state = [], norm.weight, list(norm.state_dict())
    norm.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert fuse_norms_(norm)
    assert norm.weight is weight
    assert list(norm.state_dict()) == state
    assert isinstance(norm, LlamaRMSNorm)
    assert "one call" in repr(norm)
    counted.clear()
    with torch.no_grad():
        for one in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(fused(LlamaRMSNorm(64))[0]))):
            assert isinstance(one, FusedNorm)
            counted.clear()
            one(torch.randn(2, 64))
            assert counted == [2 * 64]
    assert seen == [(2, 64), (2, 64)]
    for undo in (unfuse_norms_, densify_):
        other = copy.deepcopy(norm)
        assert type(undo(nn.Sequential(other))[0]) is LlamaRMSNorm
        assert "_pysparse_norm" not in other.__dict__


def test_what_a_module_calls_its_own_stays_its_own():
    norm = Gemma3RMSNorm(64)
    x = torch.randn(3, 64)
    expected = norm(x)
    assert fuse_norms_(norm)
    torch.testing.assert_close(norm(x.requires_grad_()), expected)  # by the class's own method _norm
    torch.testing.assert_close(norm(x.detach()), expected)
