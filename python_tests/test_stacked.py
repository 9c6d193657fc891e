"""Layers of a GPU that share an input as one weight: what of it needs no GPU, then the rest on one."""

import copy
import pickle
import shutil

import pytest
import torch
from cuda_weights import pack_for_stacking, stackable_weights
from torch import nn
from torch.nn import functional

from pysparse import backend
from pysparse.formats import PACKINGS, DeltaRows, PairBlocks
from pysparse.nn import SparseLinear, densify_, fuse_, unfuse_
from pysparse.nn.device import DeviceWeight
from pysparse.nn.stacked import RowStack, shared_inputs, why_apart
from pysparse.ops import cuda
from pysparse.ops.cuda_input import check_delta, check_pair
from pysparse.ops.equal_calls import let_inductor_merge

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
no_gpu = backend.cuda_missing_reason()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(no_gpu), reason=f"no CUDA kernels: {no_gpu}")]
NAMES = list(PACKINGS)


def by_inductor(test):
    """Mark a test that compiles for the CPU; what torch imports for it is deprecated by torch."""
    test = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")(test)
    return pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's CPU code needs g++")(test)


class Counted:
    """The products of GPU kernels, by plain matrices on the CPU: how often, and what they are."""

    def __init__(self, library):
        self.calls = 0
        library.impl("delta_linear", self.delta, "CPU")
        library.impl("pair_linear", self.pair, "CPU")

    def product(self, x, packing, bias):
        self.calls += 1
        weight = packing.to_bitmap().to_dense().double()
        y = x.double() @ weight.T
        return (y if bias is None else y + bias.double()).to(x.dtype)

    def delta(self, x, values, deltas, row_groups, chunk_cols, bias, rows, cols):
        check_delta(values, deltas, row_groups, chunk_cols, rows)
        return self.product(x, DeltaRows(values, deltas, row_groups, chunk_cols, (rows, cols)), bias)

    def pair(self, x, stream, bias, rows, cols):
        check_pair(stream, (rows, cols))
        return self.product(x, PairBlocks(stream, (rows, cols)), bias)

    def since(self):
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def counted():
    library = torch.library.Library("pysparse", "IMPL")
    yield Counted(library)
    library._destroy()


def on_device(linear, name="delta"):
    """Return a sparse layer in a GPU's packing, on the CPU: as a layer is after it has moved to a GPU."""
    layer = SparseLinear.from_dense(linear)
    if name == "dense":
        weight, arrays = (
            DeviceWeight("dense", layer.nnz, (), 0, 0, "asked for"),
            (linear.weight.data.clone(),),
        )
    else:
        packed = pack_for_stacking(name, linear.weight.data)
        weight, arrays = (
            DeviceWeight(name, layer.nnz, cuda.sizes(packed), 8, 8, "asked for"),
            cuda.arrays(packed),
        )
    for field, array in zip(weight.names, arrays, strict=True):
        layer.register_buffer(field, array, persistent=False)
    layer._device_weight, layer.values, layer.masks, layer.tile_offsets = weight, None, None, None
    return layer


class Attention(nn.Module):
    """Projections that share an input, as in a transformer, and one that does not."""

    def __init__(self, name="delta", bias=True, cols=64, heights=(32, 16, 48)):
        super().__init__()
        for part, rows in zip("qkv", heights, strict=True):
            linear = nn.Linear(cols, rows, bias=bias and part != "v").bfloat16().requires_grad_(False)
            linear.weight.data = stackable_weights(name, (rows,), cols)[0]
            setattr(self, part, on_device(linear, name))
        linear = nn.Linear(cols, cols, bias=False).bfloat16().requires_grad_(False)
        linear.weight.data = stackable_weights(name, (cols,), cols)[0]
        self.o = on_device(linear, name)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(x + q.sum() + k.sum() * 0.5 + v.sum() * 0.25)

    def parts(self, x):
        return [self.q(x), self.k(x), self.v(x)]


def token(tokens=1, cols=64):
    return torch.randn(tokens, cols).bfloat16()


@pytest.mark.parametrize("name", ["delta", "pair", "dense"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_layers_that_share_an_input_are_found_and_multiplied_at_once(counted, name, bias):
    model = Attention(name, bias)
    plain, x = copy.deepcopy(model), token()
    report = fuse_(model, x)
    assert report.stacked == {"": ("q", "k", "v")}
    assert not report.apart
    assert "one kernel with q, v" in repr(model.k)
    counted.since()
    for _ in range(3):
        x = token()
        parts = model.parts(x)
        assert counted.since() == (0 if name == "dense" else 1)
        for one, alone in zip(parts, plain.parts(x), strict=True):
            assert torch.equal(one, alone)
            assert one.is_contiguous()
        assert torch.equal(model(x), plain(x))
        counted.since()
    many = token(5)
    for one, alone in zip(model.parts(many), plain.parts(many), strict=True):  # each by its own view
        assert torch.equal(one, alone)
    assert model.q.nbytes == plain.q.nbytes
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )


@torch.no_grad()
def test_a_changed_input_weight_or_bias_is_never_overlooked(counted):
    model = Attention()
    plain = copy.deepcopy(model)
    fuse_(model, token())
    x = token()
    model.q(x)
    x.add_(1)
    assert torch.equal(model.k(x), plain.k(x))
    model.q(x)
    assert torch.equal(model.k(x.clone()), plain.k(x))  # the same numbers in another tensor
    model.q(x)
    for one in (model, plain):
        one.k.bias.add_(1)  # in place: it is the stack's, too
    assert torch.equal(model.k(x), plain.k(x))
    assert all(torch.equal(a, b) for a, b in zip(model.parts(x), plain.parts(x), strict=True))
    model.q(x)
    for one in (model, plain):
        one.q.bias.data = torch.ones_like(one.q.bias)  # the next ones are other memory: the layer leaves
    assert torch.equal(model.q(x), plain.q(x))
    assert model.q._seat is None
    for one in (model, plain):
        one.k.bias = nn.Parameter(torch.zeros_like(one.k.bias), requires_grad=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parts(x), plain.parts(x), strict=True))
    state = {name: tensor.clone() for name, tensor in Attention().v.state_dict().items()}
    for one in (model, plain):
        one.v.load_state_dict(state)
    assert model.v._seat is None
    assert torch.equal(model.v.to_dense().weight, plain.v.to_dense().weight)


@torch.no_grad()
def test_a_caller_may_write_to_what_it_got(counted):
    model = Attention()
    fuse_(model, token())
    x = token()
    first, other = model.q(x), model.k(x)
    kept = other.clone()
    first.fill_(float("nan"))
    assert torch.equal(other, kept)
    assert torch.equal(model.v(x), model.v(x.clone()))
    again = model.q(x)
    assert again.isfinite().all()


def test_calls_with_gradients_go_alone(counted):
    model = Attention()
    fuse_(model, token())
    x = token().requires_grad_()
    plain = unfuse_(copy.deepcopy(model))
    for one, alone in zip(model.parts(x), plain.parts(x), strict=True):
        assert torch.equal(one, alone)
        assert one.requires_grad


@torch.no_grad()
def test_inference_tensors_and_other_dtypes_go_alone(counted):
    model = Attention()
    plain = copy.deepcopy(model)
    fuse_(model, token())
    with torch.inference_mode():
        x = token()
        counted.since()
        assert all(torch.equal(a, b) for a, b in zip(model.parts(x), plain.parts(x), strict=True))
        assert counted.since() == 6


def launches(compiled, x, counted):
    """Return what a compiled function returns, and how many products it computed."""
    compiled(x)
    counted.since()
    return compiled(x), counted.since()


@by_inductor
@torch.no_grad()
def test_the_compiler_keeps_one_product_of_the_siblings(counted):
    model = Attention()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    x, many = token(), token(5)
    expected, separate = launches(torch.compile(plain.parts, fullgraph=True), x, counted)
    fuse_(model, token())
    actual, together = launches(torch.compile(model.parts, fullgraph=True), x, counted)
    assert (separate, together) == (3, 1)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    torch._dynamo.reset()
    actual, alone = launches(torch.compile(model.parts, fullgraph=True), many, counted)
    assert alone == 3  # more than one token: each its own
    assert all(torch.equal(a, b) for a, b in zip(actual, plain.parts(many), strict=True))


@by_inductor
@torch.no_grad()
def test_a_compiled_function_may_write_to_the_input_and_to_parts(counted):
    def run(model, x):
        q = model.q(x)
        q.mul_(2)
        x.add_(1)
        return q, model.k(x), model.v(x)

    model = Attention()
    plain = copy.deepcopy(model)
    fuse_(model, token())
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    x = token()
    actual, expected = compiled(model, x.clone()), run(plain, x.clone())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    counted.since()
    compiled(model, x.clone())
    assert counted.since() == 2  # k and v share the changed x


def test_a_pass_of_the_users_stays_in_force():
    from torch._inductor import config

    seen = []
    with config.patch(post_grad_custom_pre_pass=seen.append):
        let_inductor_merge()
        once = config.post_grad_custom_pre_pass
        let_inductor_merge()
        assert config.post_grad_custom_pre_pass is once
        graph = torch.fx.Graph()
        once(graph)
        assert seen == [graph]
        assert once.uuid() is None  # the other one has no word for caches
    with config.patch(post_grad_custom_pre_pass=None):
        let_inductor_merge()
        assert config.post_grad_custom_pre_pass.uuid()


@torch.no_grad()
def test_compiled_code_sees_a_new_bias(counted):
    model = Attention()
    fuse_(model, token())
    torch._dynamo.reset()
    compiled = torch.compile(model.parts, backend="aot_eager")
    x = token()
    compiled(x)
    model.q.bias.add_(1)
    assert torch.equal(compiled(x)[0], model.q.multiply(x))
    model.q.bias = nn.Parameter(torch.randn(32).bfloat16(), requires_grad=False)
    assert torch.equal(compiled(x)[0], model.q.multiply(x))


@torch.no_grad()
def test_copies_pickles_and_moves(counted):
    model = Attention()
    fuse_(model, token())
    x = token()
    expected = model.parts(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(other.parts(x), expected, strict=True))
        assert other.q._seat is None  # it has arrays of its own
        assert model.q._seat is not None
    model.to("cpu")  # nothing moves
    counted.since()
    model.parts(x)
    assert counted.since() == 1
    unfuse_(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parts(x), expected, strict=True))
    assert counted.since() == 3
    fuse_(model, x)
    half = copy.deepcopy(model).half()
    assert half.q._seat is None
    assert torch.equal(half.q.to_dense().weight, model.q.to_dense().weight.half())
    dense = densify_(model)
    assert type(dense.q) is nn.Linear
    assert torch.equal(functional.linear(x, dense.q.weight, dense.q.bias), dense.q(x))


@torch.no_grad()
def test_threads_take_their_own_results(counted):
    from concurrent.futures import ThreadPoolExecutor

    model = Attention()
    plain = copy.deepcopy(model)
    fuse_(model, token())

    def work(seed):
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return all(torch.equal(a, b) for a, b in zip(model.parts(x), plain.parts(x), strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


@torch.no_grad()
def test_layers_that_cannot_be_one_weight_say_why(counted):
    model = Attention()
    model.k = on_device(nn.Linear(64, 16, bias=False).bfloat16(), "dense")
    report = fuse_(model, example={"x": token()})
    assert report.apart == {("q", "k", "v"): "they are delta and dense"}
    assert not report.stacked
    assert why_apart([model.q]) == "there is no other one"
    model.k = SparseLinear.from_dense(nn.Linear(64, 16, bias=False).bfloat16())
    assert why_apart([model.q, model.k]) == "they are delta and not packed for a GPU"
    with pytest.raises(
        ValueError, match="q, k cannot be one weight: they are delta and not packed for a GPU"
    ):
        RowStack(("q", "k"), (model.q, model.k))
    with pytest.raises(TypeError, match="example is a tensor, a sequence .* got a int"):
        fuse_(model, example=3)
    with pytest.raises(TypeError, match="got a str"):
        fuse_(nn.Linear(2, 2), "a prompt")  # whether there are layers on a GPU or not
    assert fuse_(Attention(), [token()]).stacked == {"": ("q", "k", "v")}


@torch.no_grad()
def test_only_calls_with_the_same_tensor_count(counted):
    class Twice(Attention):
        def forward(self, x):
            self.q(x), self.k(x), self.v(x + 0)
            y = x.clone()
            return self.q(y), self.k(x)

    model = Twice()
    layers = {name: getattr(model, name) for name in "qkvo"}
    assert (
        shared_inputs(model, layers, token()) == []
    )  # q and k differ in their second call; v got another, o none
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def tiny_llama():
    """Return a Llama whose layers are as on a GPU, all with zeros for delta."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.rand(module.weight.shape) < 0.4
            model.model.set_submodule(path, on_device(module))
    return model


@torch.no_grad()
def test_a_llama_decodes_with_four_products_a_block(counted):
    torch.manual_seed(0)
    model, prompt = tiny_llama(), torch.arange(5)[None] + 7
    plain = copy.deepcopy(model)
    report = fuse_(model, {"input_ids": prompt})
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert report.stacked == {
        **{f"{block}.self_attn": ("q_proj", "k_proj", "v_proj") for block in blocks},
        **{f"{block}.mlp": ("gate_proj", "up_proj") for block in blocks},
    }

    def generate(one):
        counted.since()
        tokens = one.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        return tokens, counted.since()

    (expected, separate), (actual, together) = generate(plain), generate(model)
    assert torch.equal(actual, expected)
    # The prompt's five tokens go through seven layers a block each way, the five steps after it through four products.
    assert (separate, together) == (2 * 7 * 6, 2 * 7 + 2 * 4 * 5)


@pytest.mark.slow
@by_inductor
@torch.no_grad()
def test_compiled_blocks_with_a_static_cache_decode_the_same(counted):
    from pysparse.models.cuda_speed import compile_blocks_
    from pysparse.models.static_decode import StaticDecoder

    torch.manual_seed(0)
    model, prompt = tiny_llama(), torch.arange(5)[None] + 7

    def steps(one, count=4):
        torch._dynamo.reset()
        decoder = StaticDecoder(compile_blocks_(one), prompt, 16)
        decoder.step()
        counted.since()
        logits = []
        for _ in range(count):
            decoder.step()
            logits.append(decoder.logits.clone())
        return logits, counted.since()

    expected, separate = steps(copy.deepcopy(model))
    fuse_(model, {"input_ids": prompt})
    actual, together = steps(model)
    assert (separate, together) == (4 * 2 * 7, 4 * 2 * 4)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(bool(no_gpu), reason=f"no CUDA kernels: {no_gpu}")
@pytest.mark.parametrize("name", [*NAMES, "dense"])
@torch.no_grad()
def test_stacked_layers_on_a_gpu(name, monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    model = Attention(name, cols=1024, heights=(512, 256, 2048)).cuda()
    plain = copy.deepcopy(model)
    x = token(cols=1024).cuda()
    assert fuse_(model, x).stacked == {"": ("q", "k", "v")}

    def check(actual, x):
        for one, alone in zip(actual, plain.parts(x), strict=True):
            assert (one.double() - alone.double()).norm() <= 4e-3 * alone.double().norm()

    check(model.parts(x), x)
    many = token(3, 1024).cuda()
    check(model.parts(many), many)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    model.q(x)  # its siblings' parts are not for the graph
    with torch.cuda.graph(graph, stream=stream):
        captured = model.parts(x)
    x.copy_(token(cols=1024))
    graph.replay()
    check(captured, x)
    with torch.cuda.stream(stream):
        model.q(x)
    check(model.parts(x), x)
    torch._dynamo.reset()
    check(torch.compile(model.parts, fullgraph=True)(x), x)
