"""fuse_: sibling layers and gated MLPs of whole models in fewer calls, with the same results."""

import copy
import gc
import multiprocessing
import pickle
import threading

import pytest
import reference
import tiny_models
import torch
from fused_models import MLP, Attention, FunctionalMLP, packed
from torch import nn
from torch.nn import functional

from pysparse import backend
from pysparse.measure.twins import zero_at_random_
from pysparse.nn import SparseLinear, densify_, fuse_, unfuse_
from pysparse.nn.gated import GatedMLP
from pysparse.nn.shared_input import ALONE_CALLS, PATIENCE

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = [isa for isa, supported in backend.isa_levels() if supported]


class Counted:
    """Counts the compiled core's calls of one function, and calls it."""

    def __init__(self, monkeypatch, name):
        self.calls, function = 0, getattr(backend.core(), name)

        def call(*arguments):
            self.calls += 1
            return function(*arguments)

        monkeypatch.setattr(backend.core(), name, call)


@pytest.fixture
def counted(monkeypatch):
    """Calls of the core with arguments of their own, and of weights prepared for one token."""
    names = {"bitmap_linear": "linear", "bitmap_linear_group": "group", "bitmap_gated_linear": "gated"}
    counts = {name: Counted(monkeypatch, name) for name in names}
    core = backend.core()
    base, core_type = core.PreparedWeights, type("Counting", (core.PreparedWeights,), {})
    for name, method in names.items():
        original = getattr(base, method)

        def call(self, *arguments, _name=name, _original=original):
            counts[_name].calls += 1
            return _original(self, *arguments)

        setattr(core_type, method, call)
    monkeypatch.setattr(core, "PreparedWeights", core_type)
    return counts


def calls(counted):
    """Return the counts since the last time: alone, in groups, gated."""
    now = tuple(one.calls for one in counted.values())
    for one in counted.values():
        one.calls = 0
    return now


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_are_found_by_their_calls(counted, dtype):
    model = packed(Attention(dtype=dtype))
    expected_of = copy.deepcopy(model)
    assert fuse_(model).watched == {"": ("q", "k", "v", "o")}
    assert "watched for calls shared with k, v, o" in repr(model.q)
    for tokens in (1, 1, 1, 8, 200):  # watched; and many tokens go their own way
        x = torch.randn(tokens, 32).to(dtype)
        assert_same(model(x), expected_of(x))
    assert "one call with k, v" in repr(model.q)
    assert "call" not in repr(model.o)
    calls(counted)
    x = torch.randn(2, 32).to(dtype)
    model(x)
    assert calls(counted) == (1, 1, 0)
    model(torch.randn(200, 32).to(dtype))
    assert calls(counted) == (0, 0, 0)  # torch multiplies unpacked rows
    unfuse_(model)
    model(x)
    assert calls(counted) == (4, 0, 0)
    assert "call" not in repr(model.q)


def shared(model=None):
    """Return a model whose q, k, v are computed together."""
    model = packed(model or Attention())
    fuse_(model)
    x = torch.randn(1, model.q.in_features).to(model.q.dtype)
    for _ in range(2):
        model(x.clone())
    return model


def test_a_changed_input_weight_or_bias_is_never_overlooked(counted):
    model = shared()
    plain = unfuse_(copy.deepcopy(model))
    x = torch.randn(1, 32)
    calls(counted)
    model.q(x)
    assert calls(counted) == (0, 1, 0)
    x.add_(1)
    assert torch.equal(model.k(x), plain.k(x))  # x is another one now
    model.q(x)
    assert torch.equal(model.k(x.clone()), plain.k(x))  # the same numbers in another tensor: computed
    model.q(x)
    model.v.bias.data.add_(1)
    plain.v.bias.data.add_(1)
    model.v.bias.add_(1)
    plain.v.bias.add_(1)
    assert torch.equal(model.v(x), plain.v(x))
    model.q(x)
    model.v.values.mul_(2)
    plain.v.values.mul_(2)
    assert torch.equal(model.v(x), plain.v(x))
    model.q(x)
    other = Attention()
    other.load_state_dict(densify_(copy.deepcopy(plain)).state_dict())
    packed(other)
    other.v.bias.data.zero_()
    model.v.load_state_dict(other.v.state_dict())
    assert torch.equal(model.v(x), other.v(x))


def test_results_do_not_outlive_the_input():
    model = shared()
    x = torch.randn(1, 32)
    model.q(x)
    group = model.q._seat[0]
    results = group._calls.pending.results
    assert set(results) == {1, 2}
    del x
    gc.collect()
    assert not results
    assert group._calls.pending.input() is None


def test_a_group_whose_results_nobody_fetches_is_given_up(counted):
    model = shared()
    for _ in range(PATIENCE):
        model.q(torch.randn(1, 32))
    calls(counted)
    model(torch.randn(1, 32))
    model(torch.randn(1, 32))
    assert calls(counted) == (8, 0, 0)
    assert model.q._seat is None


class Cross(Attention):
    def forward(self, x, states):
        return self.q(x), self.k(states), self.v(states), self.o(x + 1)


def test_layers_with_inputs_of_their_own_are_left_alone(counted):
    model = packed(Cross())
    fuse_(model)
    for _ in range(ALONE_CALLS + 2):
        model(torch.randn(1, 32), torch.randn(1, 32))
    calls(counted)
    model(torch.randn(1, 32), torch.randn(1, 32))
    assert calls(counted) == (2, 1, 0)  # k and v share
    assert [model.get_submodule(n)._seat is not None for n in "qkvo"] == [False, True, True, False]


def test_hooks_see_every_call():
    model, seen = shared(), []
    for name in "qkv":
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: seen.append((name, y)))
    plain = unfuse_(copy.deepcopy(model))
    x = torch.randn(1, 32)
    outputs = model(x)
    assert [name for name, _ in seen] == ["q", "k", "v"]
    assert_same([y for _, y in seen], outputs[:3])
    model.k.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    assert torch.equal(model(x)[1], plain.k(x + 1))


def test_copies_pickles_and_state_dicts(counted):
    model = nn.ModuleList([Attention(), MLP(nn.SiLU())])
    packed(model)
    x = torch.randn(1, 32)
    expected = (*model[0](x), model[1](x))
    state = model.state_dict()
    fuse_(model)
    model[0](x)
    assert list(model.state_dict()) == list(state)
    assert_same(model.state_dict().values(), state.values())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(2):
            other[0](x)
        assert other[0].q._seat[0] is not model[0].q._seat[0]
        assert other[0].q._seat[0] is other[0].k._seat[0]
        calls(counted)
        assert_same(other[0](x), expected[:4])
        torch.testing.assert_close(other[1](x), expected[4], rtol=1e-5, atol=1e-4)
        assert calls(counted) == (2, 1, 1)
        other[0].k.bias.data.zero_()
        assert not torch.equal(other[0](x)[1], expected[1])
    assert_same(model[0](x), expected[:4])


def test_a_model_is_freed_without_the_garbage_collector():
    import weakref

    model = nn.ModuleList([shared(), packed(MLP(nn.SiLU()))])
    fuse_(model)
    model[1](torch.randn(1, 32))
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(module) for module in model.modules() if isinstance(module, SparseLinear)]
        del model
        assert [one() for one in gone] == [None] * len(gone)
    finally:
        gc.enable()


ACTIVATIONS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlps_are_found_by_what_they_compute(counted, name, dtype, bias):
    model = packed(MLP(copy.deepcopy(ACTIVATIONS[name]), dtype=dtype, bias=bias))
    plain = copy.deepcopy(model)
    assert fuse_(model).gated == {"": f"one call for {name}(gate) * up"}
    assert isinstance(model, MLP)
    assert type(model).__name__ == "MLP"
    assert f"one call for {name}(gate) * up" in repr(model)
    for tokens in (0, 1, 8, 200):
        x = torch.randn(tokens, 32).to(dtype)
        scale = plain(x).abs().max().item() if tokens else 0.0
        torch.testing.assert_close(
            model(x), plain(x), rtol=0, atol=4 * reference.EPSILON[dtype] * max(scale, 1) * 2
        )
    calls(counted)
    model(torch.randn(2, 32).to(dtype))
    assert calls(counted) == (1, 0, 1)
    unfuse_(model)
    assert type(model) is MLP
    x = torch.randn(2, 32).to(dtype)
    assert torch.equal(model(x), plain(x))


def test_a_functional_activation_and_any_order_of_factors(counted):
    model = packed(FunctionalMLP(nn.Identity()))
    expected = model(torch.ones(1, 32))
    fuse_(model)
    calls(counted)
    torch.testing.assert_close(model(torch.ones(1, 32)), expected)
    assert calls(counted) == (1, 0, 1)
    torch.testing.assert_close(model(states=torch.ones(1, 32)), expected)
    assert calls(counted) == (1, 0, 1)


class Scaled(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * 0.5)


class Dropping(MLP):
    def forward(self, x):
        return self.down(functional.dropout(self.act(self.gate(x)) * self.up(x), training=self.training))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(nn.Tanh()),
        lambda: MLP(nn.PReLU(init=0.0)),  # a relu for now, but it learns
        lambda: MLP(nn.Softmax(dim=-1)),
        lambda: Scaled(nn.SiLU()),
        lambda: Dropping(nn.SiLU()),
        lambda: Attention(),
    ],
)
def test_other_modules_are_no_gated_mlps(make):
    model = packed(make())
    assert not fuse_(model).gated
    assert not isinstance(model, GatedMLP)


def test_whoever_watches_a_part_sees_it_called(counted):
    x = torch.randn(1, 32)
    for part in ("gate", "up", "act"):
        model, seen = packed(MLP(nn.SiLU())), []
        fuse_(model)
        handle = model.get_submodule(part).register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        calls(counted)
        model(x)
        assert len(seen) == 1
        assert calls(counted) == (3, 0, 0)
        handle.remove()
        model(x)
        assert calls(counted) == (1, 0, 1)
    model.act = nn.Tanh()
    model(x)
    assert calls(counted) == (3, 0, 0)
    model.act, model.up = nn.SiLU(), densify_(nn.Sequential(copy.deepcopy(model.up)))[0]
    model(x)
    assert calls(counted) == (2, 0, 0)


def test_a_gradient_goes_through_the_separate_layers():
    for model in (Attention(), MLP(nn.SiLU(), bias=True)):
        packed(model)
        plain = copy.deepcopy(model)
        fuse_(model)
        x, y = (torch.ones(2, 32, requires_grad=True) for _ in range(2))
        for _ in range(3):
            sum(part.square().sum() for part in model(x)).backward()
            sum(part.square().sum() for part in plain(y)).backward()
        assert torch.equal(x.grad, y.grad)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


def test_inference_mode_is_right_too(counted):
    model, plain = nn.ModuleList([Attention(), MLP(nn.SiLU())]), None
    packed(model)
    plain = copy.deepcopy(model)
    fuse_(model)
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(1, 32)
            assert_same(model[0](x), plain[0](x))
            torch.testing.assert_close(model[1](x), plain[1](x), rtol=1e-5, atol=1e-4)
            calls(counted)
            model[0](x)
            assert sum(calls(counted)) == 4 - 2 * (model[0].q._seat[0]._members is not None)
            q = model[0].q(x)
            x.add_(1)  # unseen by a version counter: inference tensors have none
            assert torch.equal(model[0].k(x), plain[0].k(x))
            assert not torch.equal(q, model[0].q(x))


def test_other_dtypes_and_states_take_their_own_way():
    model = shared()
    plain = unfuse_(copy.deepcopy(model))
    x = torch.randn(1, 32)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        plain.to(dtype)
        assert_same(model(x.to(dtype)), plain(x.to(dtype)))
    model.k.bfloat16()
    assert torch.equal(model.q(x), plain.q(x))
    model.k.float()
    plain.k.bfloat16().float()
    with pytest.raises(ValueError, match="x has 31 features, the layer takes 32"):
        model.q(torch.randn(1, 31))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model(x), plain(x))


def test_two_threads_on_one_model():
    model = nn.ModuleList([shared(Attention(64)), packed(MLP(nn.SiLU(), 64, 96))])
    fuse_(model)
    for _ in range(2):
        model[0](torch.randn(1, 64))
    plain, failures = unfuse_(copy.deepcopy(model)), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(100):
                x = torch.randn(1, 64, generator=generator)
                for actual, expected in zip(model[0](x), plain[0](x), strict=True):
                    if not torch.equal(actual, expected):
                        failures.append(seed)
                if not torch.allclose(model[1](x), plain[1](x), atol=1e-4):
                    failures.append(-seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def _child(model, x, queue):
    torch.set_num_threads(1)
    queue.put([part.tolist() for part in model(x)])


def test_fork_after_use():
    model = shared()
    x = torch.randn(1, 32)
    expected = [part.tolist() for part in model(x)]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(model, x, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == expected


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_take_the_kernels(counted, mode):
    model = nn.ModuleList([shared(), packed(MLP(nn.SiLU()))])
    fuse_(model)
    x = torch.randn(1, 32)
    expected = (*model[0](x), model[1](x))
    compiled = [torch.compile(part, fullgraph=True, backend=mode) for part in model]
    for _ in range(2):
        calls(counted)
        assert_same(compiled[0](x), expected[:4])
        assert calls(counted) == (4, 0, 0)  # every layer on the decode kernel
        torch.testing.assert_close(compiled[1](x), expected[4], rtol=1e-5, atol=1e-4)
        assert calls(counted) == (1, 0, 1)
    many = torch.randn(100, 32)
    torch.testing.assert_close(compiled[1](many), model[1](many), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_a_compiled_layer_takes_the_decode_kernel(counted, tokens):
    layer = packed(nn.Sequential(reference_linear()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(tokens, 32)
    expected = layer(x)
    calls(counted)
    assert torch.equal(compiled(x), expected)
    assert calls(counted) == (1, 0, 0)


def reference_linear():
    linear = nn.Linear(32, 16)
    linear.weight.data = reference.sparse_matrix(16, 32, 0.6, torch.float32)
    return linear


# --- whole models


@pytest.mark.parametrize("name", ["llama", "gemma", "opt", "bert", "qwen2_moe"])
def test_models_generate_the_same(counted, name):
    model = tiny_models.tiny(name)
    zero_at_random_(model, 0.6)
    packed(model)
    plain = copy.deepcopy(model)
    report = fuse_(model)
    assert report.watched
    assert bool(report.gated) == (name not in ("opt", "bert"))
    ids = tiny_models.tokens(1, 4)
    for _ in range(3):
        torch.testing.assert_close(model(input_ids=ids)[0], plain(input_ids=ids)[0], rtol=1e-4, atol=1e-4)
    calls(counted)
    model(input_ids=ids)
    assert calls(counted)[1] == 3  # q/k/v of each of the three blocks
    assert list(model.state_dict()) == list(plain.state_dict())
    if name != "bert":
        settings = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
