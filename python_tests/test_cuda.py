"""Every CUDA kernel against the float64 oracle, and the layers over them. Needs a GPU and a build with CUDA."""

import random

import pytest
import reference
import torch
from cuda_weights import groups_only, matrix_for
from torch.nn import functional

from pysparse import backend, ops
from pysparse.formats import PACKINGS, BitmapTensor, NMRows
from pysparse.nn import SparseLinear, sparsify_
from pysparse.nn.device import Prediction

reason = backend.missing_reason() or backend.cuda_missing_reason()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(reason), reason=f"no CUDA kernels: {reason}"),
]

reference.EPSILON[torch.float16] = 2.0**-11
NAMES = list(PACKINGS)
PATTERNS = [(1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (1, 16), (2, 16), (4, 16), (11, 16)]
DTYPES = [torch.bfloat16, torch.float16]
SIZES = [(1, 1), (16, 64), (17, 65), (15, 63), (33, 129), (100, 257), (3, 1000), (48, 1024), (1024, 520)]
TOKENS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 200]


def random_problem(seed):
    """Draw (rows, cols, tokens, sparsity): sizes evenly by their logarithm, odd ones as often as even ones."""
    draw = random.Random(seed)
    rows, cols = (round(2 ** draw.uniform(0, 11.5)) for _ in range(2))
    return rows, cols, round(2 ** draw.uniform(0, 6.3)), round(draw.random(), 2)


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    # torch's own product may add partial sums in 16 bits unless told not to
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)


def matrix(name, rows, cols, sparsity, dtype):
    return matrix_for(name, rows, cols, sparsity, dtype).cuda()


def pack(name, weight, keep=None):
    return PACKINGS[name].from_bitmap(BitmapTensor.from_dense(weight, keep))


def check(actual, x, weight, bias=None):
    """Compare with the oracle; for fp16 with room for results that are subnormal."""
    if actual.dtype == torch.float16:
        assert_half(actual, x, weight, bias)
    else:
        reference.assert_close(actual.cpu(), x.cpu(), weight.cpu(), None if bias is None else bias.cpu())


def assert_half(actual, x, weight, bias):
    expected = reference.linear(x, weight, bias)
    magnitude = reference.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    bound = weight.shape[1] * 2.0**-24 * magnitude + 2.0**-11 * expected.abs() * 1.01 + 2.0**-24
    assert bool(((actual.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_returns_the_very_bits(name, dtype):
    for rows, cols in SIZES:
        for sparsity in (0.0, 0.6, 0.95, 1.0):
            weight = matrix(name, rows, cols, sparsity, dtype)
            packed = pack(name, weight)
            assert torch.equal(ops.packed_unpack(packed), weight), (rows, cols, sparsity)
            if rows > 32:
                assert torch.equal(ops.packed_unpack(packed, 16, 17), weight[16:33])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_linear_matches_the_oracle(name, dtype, tokens):
    for rows, cols in SIZES:
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            weight = matrix(name, rows, cols, sparsity, dtype)
            packed = pack(name, weight)
            x, bias = torch.randn(tokens, cols).to("cuda", dtype), torch.randn(rows).to("cuda", dtype)
            for b in (None, bias):
                y = ops.packed_linear(x, packed, b)
                if tokens <= ops.max_tokens(name, cols):
                    check(y, x, weight, b)
                else:  # unpacked and multiplied by torch, whose GEMM rounds more than once
                    assert torch.equal(y, functional.linear(x, weight, b))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_pattern_matches_the_oracle(n, m, dtype):
    for rows, cols in [(1, 1), (33, 130), (100, 520), (7, 4096), (300, 1000)]:
        weight = groups_only(reference.sparse_matrix(rows, cols, 0.1, dtype), n, m).cuda()
        weight[rows // 2] = 0
        packed = NMRows.from_bitmap(BitmapTensor.from_dense(weight), n, m)
        assert torch.equal(ops.packed_unpack(packed), weight), (rows, cols)
        bias = torch.randn(rows).to("cuda", dtype)
        for tokens in (1, 2, 3, 8):
            x = torch.randn(tokens, cols).to("cuda", dtype)
            check(ops.packed_linear(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes_match_the_oracle(name, dtype, seed):
    rows, cols, tokens, sparsity = random_problem(seed)
    weight = matrix(name, rows, cols, sparsity, dtype)
    if name == "nm":
        n, m = PATTERNS[seed % len(PATTERNS)]
        weight = groups_only(reference.sparse_matrix(rows, cols, sparsity, dtype), n, m).cuda()
        packed = NMRows.from_bitmap(BitmapTensor.from_dense(weight), n, m)
    else:
        packed = pack(name, weight)
    first = rows // 2 // 16 * 16
    assert torch.equal(ops.packed_unpack(packed), weight), (rows, cols, sparsity)
    assert torch.equal(ops.packed_unpack(packed, first, rows - first), weight[first:]), (rows, cols, first)
    x, bias = torch.randn(tokens, cols).to("cuda", dtype), torch.randn(rows).to("cuda", dtype)
    bias = bias if seed % 2 else None
    y = ops.packed_linear(x, packed, bias)
    if tokens <= ops.max_tokens(name, cols):
        check(y, x, weight, bias)
    else:
        assert torch.equal(y, functional.linear(x, weight, bias))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (1024, 4096), (4096, 11008), (2048, 28672)])
def test_layers_of_real_models(name, rows, cols):
    weight = torch.randn(rows, cols, device="cuda").bfloat16()
    weight *= torch.rand(rows, cols, device="cuda") >= 0.7
    if name == "pair":
        weight[:, 1::4] = weight[:, 2::4] = 0
    if name == "nm":
        weight = groups_only(weight, 2, 8)
    packed = pack(name, weight)
    for tokens in (1, 2, 3, 8, 16, 20, 32, 64):
        x = torch.randn(tokens, cols, device="cuda").bfloat16()
        y = ops.packed_linear(x, packed)
        exact = x.double() @ weight.double().T
        assert (y.double() - exact).norm() / exact.norm() < 4e-3, tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_exceeds_the_scratch_goes_in_parts(name, monkeypatch):
    monkeypatch.setattr("pysparse.ops.cuda._UNPACK_BYTES", 1 << 20)
    weight = matrix(name, 1100, 1000, 0.6, torch.bfloat16)
    x, bias = torch.randn(64, 1000, device="cuda").bfloat16(), torch.randn(1100, device="cuda").bfloat16()
    exact = x.double() @ weight.double().T + bias.double()
    y = ops.packed_linear(x, pack(name, weight), bias)
    assert (y.double() - exact).norm() / exact.norm() < 4e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_one_full_row_among_empty_ones(name, tokens):
    weight = torch.zeros(200, 5000, device="cuda").bfloat16()
    weight[77] = torch.randn(5000).cuda().bfloat16()
    if name in ("pair", "nm"):
        weight[:, 2::4] = weight[:, 3::4] = 0
    x = torch.randn(tokens, 5000, device="cuda").bfloat16()
    check(ops.packed_linear(x, pack(name, weight)), x, weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_non_finite_inputs_are_never_lost(name, tokens):
    weight = matrix(name, 40, 300, 0.5, torch.bfloat16)
    packed = pack(name, weight)
    for value in (float("inf"), float("-inf"), float("nan")):
        x = torch.randn(tokens, 300, device="cuda").bfloat16()
        x[tokens // 2, 123] = value
        y, dense = ops.packed_linear(x, packed), x.double() @ weight.double().T
        assert not y[tokens // 2].isfinite().any()
        rest = torch.arange(tokens, device="cuda") != tokens // 2
        assert y[rest].isfinite().all()
        if name == "fragment":
            assert torch.equal(y.isnan(), dense.isnan())


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_weights_reach_their_row_only(name):
    weight = matrix(name, 40, 304, 0.5, torch.bfloat16)
    weight[7, 40:44] = torch.tensor([float("inf"), float("nan"), 0, 0]).cuda()
    x = torch.randn(3, 304, device="cuda").bfloat16()
    y = ops.packed_linear(x, pack(name, weight))
    assert y[:, 7].isnan().all()
    assert y[:, torch.arange(40) != 7].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 32, 64])
@pytest.mark.parametrize(("rows", "cols"), [(300, 1000), (512, 4096)])
def test_two_runs_agree_bit_for_bit(name, tokens, rows, cols):
    weight = matrix(name, rows, cols, 0.6, torch.bfloat16)
    packed, x = pack(name, weight), torch.randn(tokens, cols, device="cuda").bfloat16()
    first = ops.packed_linear(x, packed)
    for _ in range(20):
        assert torch.equal(ops.packed_linear(x, packed), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 4, 16, 32, 50])
def test_capture_in_a_graph(name, tokens):
    weight = matrix(name, 512, 4096, 0.6, torch.bfloat16)
    packed, x = pack(name, weight), torch.randn(tokens, 4096, device="cuda").bfloat16()
    ops.packed_linear(x, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.packed_linear(x, packed)
    x.copy_(torch.randn(tokens, 4096))
    y.fill_(float("nan"))
    graph.replay()
    if tokens <= ops.max_tokens(name, 4096):
        check(y, x, weight)
    else:
        assert torch.equal(y, functional.linear(x, weight))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_chain_of_layers_waits_for_its_inputs(name, tokens):
    """Kernels may start while the one before them drains: each must still see all of its results."""
    weights = [matrix(name, 1024, 1024, 0.5, torch.bfloat16) * 0.05 for _ in range(6)]
    packed, x = [pack(name, w) for w in weights], torch.randn(tokens, 1024, device="cuda").bfloat16()
    expected = x
    for p in packed:
        expected = ops.packed_linear(expected, p)
        torch.cuda.synchronize()

    def chain():
        y = x
        for p in packed:
            y = ops.packed_linear(y, p)
        return y

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        assert torch.equal(chain(), expected)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("name", NAMES)
def test_output_is_written_whole_and_nothing_beside_it(name):
    weight = matrix(name, 50, 130, 0.6, torch.bfloat16)
    packed, x = pack(name, weight), torch.randn(5, 130, device="cuda").bfloat16()
    arena = torch.full((4096,), float("nan"), device="cuda").bfloat16()
    stream, index = torch.cuda.current_stream().cuda_stream, x.device.index
    y = arena[1024 : 1024 + 250]
    module = backend.cuda()
    if name == "delta":
        arrays = (packed.values, packed.deltas, packed.row_groups, packed.chunk_cols)
        pointers = [t.data_ptr() for t in arrays]
        module.delta_linear(0, x.data_ptr(), 5, 130, *pointers, 0, y.data_ptr(), 50, index, stream)
    elif name == "nm":
        pattern = (packed.n, packed.m.bit_length() - 1)
        pointers = (packed.values.data_ptr(), packed.places.data_ptr())
        module.nm_linear(0, x.data_ptr(), 5, 130, *pointers, *pattern, 0, y.data_ptr(), 50, index, stream)
    else:
        largest = packed.largest_block if name == "fragment" else backend.core().PAIR_BLOCK_BYTES
        offsets = packed.offsets.data_ptr() if name == "fragment" else 0
        code = 0 if name == "fragment" else 1
        floats = module.strip_workspace(code, 0, 5, 130, 50, largest, index)
        workspace = torch.full((floats + 1,), float("nan"), device="cuda")
        module.strip_linear(
            code, 0, x.data_ptr(), 5, 130, packed.stream.data_ptr(), offsets, largest, 0, y.data_ptr(), 50,
            workspace.data_ptr(), index, stream,
        )  # fmt: skip
    check(y.view(5, 50), x, weight)
    assert arena[:1024].isnan().all()
    assert arena[1024 + 250 :].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_misaligned_inputs(name):
    weight = matrix(name, 40, 96, 0.5, torch.bfloat16)
    packed, wide = pack(name, weight), torch.randn(6, 200, device="cuda").bfloat16()
    for x in (wide[:, 3:99], wide[::2, :96], wide.view(-1)[1:97], wide[:, :96].view(2, 3, 96)):
        flat = x.reshape(-1, 96)
        check(ops.packed_linear(x, packed).reshape(-1, 40), flat, weight)
    assert ops.packed_linear(wide[:0, :96], packed).shape == (0, 40)


def test_bad_arguments_are_named():
    weight = matrix("fragment", 40, 96, 0.5, torch.bfloat16)
    packed = pack("fragment", weight)
    with pytest.raises(ValueError, match="x has 95 features, the weight takes 96"):
        ops.packed_linear(torch.zeros(1, 95, device="cuda").bfloat16(), packed)
    with pytest.raises(ValueError, match="x is torch.float16, the weight torch.bfloat16"):
        ops.packed_linear(torch.zeros(1, 96, device="cuda").half(), packed)
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        ops.packed_linear(
            torch.zeros(1, 96, device="cuda").bfloat16(), packed, bias=torch.zeros(40).bfloat16()
        )


def test_no_room_for_the_workspace_is_torchs_own_error(monkeypatch):
    packed = pack("fragment", matrix("fragment", 40, 96, 0.5, torch.bfloat16))
    monkeypatch.setattr("pysparse.ops.cuda._workspace", lambda *_: 1 << 44)
    with pytest.raises(torch.OutOfMemoryError):
        ops.packed_linear(torch.zeros(1, 96, device="cuda").bfloat16(), packed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_a_stream_of_another_device_does_not_reach_the_kernel():
    """Inside a block on another device's stream, a call still runs on its own tensors' device and stream."""
    weight = matrix("delta", 40, 96, 0.5, torch.bfloat16)
    packed, x = pack("delta", weight), torch.randn(2, 96, device="cuda:0").bfloat16()
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")):
        y = ops.packed_linear(x, packed)
    assert y.device == x.device
    check(y, x, weight)
    with pytest.raises(ValueError, match=r"must be on one device, got \['cuda:0', 'cuda:1'\]"):
        ops.packed_linear(x.to("cuda:1"), packed)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_input_and_bias(name):
    weight = matrix(name, 40, 96, 0.5, torch.bfloat16)
    packed = pack(name, weight)
    x = torch.randn(3, 96, device="cuda").bfloat16().requires_grad_()
    bias = torch.zeros(40, device="cuda").bfloat16().requires_grad_()
    grad = torch.randn(3, 40, device="cuda").bfloat16()
    ops.packed_linear(x, packed, bias).backward(grad)
    assert torch.allclose(x.grad.double(), grad.double() @ weight.double(), rtol=0.02, atol=0.05)
    assert torch.equal(bias.grad, grad.sum(dim=0))


# ---- layers and models -----------------------------------------------------------------------------------------


def pruned(rows, cols, sparsity, dtype=torch.bfloat16):
    linear = torch.nn.Linear(cols, rows).to(dtype)
    linear.weight.data[torch.rand(rows, cols) < sparsity] = 0
    return linear.requires_grad_(False)


@pytest.mark.parametrize(
    ("sparsity", "packing"), [(0.0, "dense"), (0.5, "delta"), (0.6, "fragment"), (0.8, "delta")]
)
def test_a_layer_packs_itself_when_it_moves(sparsity, packing, monkeypatch):
    if packing == "fragment":  # which decoding one sequence never asks for
        monkeypatch.setattr("pysparse.nn.device.predict", lambda *_: Prediction("fragment", 4, "asked for"))
    linear = pruned(300, 400, sparsity)
    layer = SparseLinear.from_dense(linear).to("cuda")
    assert (packing if packing == "dense" else f"linear-{packing}-bfloat16-cuda") in layer.kernel
    assert layer.nnz == int(linear.weight.count_nonzero())
    dense = linear.cuda()
    for tokens in (1, 5, 100):
        x = torch.randn(tokens, 400, device="cuda").bfloat16()
        if packing != "dense" and tokens <= ops.max_tokens(packing, 400):
            check(layer(x), x, dense.weight, dense.bias)
        else:
            assert torch.equal(layer(x), dense(x))
    state, back = layer.state_dict(), layer.to("cpu")
    assert "linear-bitmap-bfloat16" in back.kernel
    assert torch.equal(back.to_dense().weight, linear.weight.cpu())
    assert all(torch.equal(state[k].cpu(), v) for k, v in back.state_dict().items())


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (4, 8), (1, 16)])
def test_a_layer_of_a_pattern_packs_itself(n, m):
    linear = pruned(4096, 4096, 0.0)  # in smaller ones starting a kernel counts for more than bytes
    linear.weight.data = groups_only(linear.weight.data, n, m)
    layer, dense = SparseLinear.from_dense(linear).to("cuda"), linear.cuda()
    assert f"linear-nm-bfloat16-cuda ({n}:{m})" in layer.kernel
    assert layer.nnz == int(linear.weight.count_nonzero())
    for tokens in (1, 5, 100):
        x = torch.randn(tokens, 4096, device="cuda").bfloat16()
        if tokens <= 8:
            check(layer(x), x, dense.weight, dense.bias)
        else:
            assert torch.equal(layer(x), dense(x))
    back = layer.to("cpu")
    assert torch.equal(back.to_dense().weight, dense.weight.cpu())


def test_a_dense_copy_takes_over_where_it_was_asked_for():
    linear = pruned(300, 400, 0.8)
    layer, dense = SparseLinear.from_dense(linear).to("cuda"), linear.cuda()
    packed_bytes = layer.nbytes
    layer.prefill = "packed"
    assert "a dense copy beyond" in layer.kernel
    few, many = (torch.randn(n, 400, device="cuda").bfloat16() for n in (1, 100))
    check(layer(few), few, dense.weight, dense.bias)
    assert layer.nbytes == packed_bytes
    assert torch.equal(layer(many), dense(many))
    assert layer.nbytes == packed_bytes + dense.weight.nbytes
    assert layer.to("cpu").second_packing_nbytes == 0


def test_a_layer_made_on_the_device_and_changed_dtype():
    linear = pruned(100, 200, 0.8).cuda()
    layer = SparseLinear.from_dense(linear)
    assert "linear-delta-bfloat16-cuda" in layer.kernel
    x = torch.randn(2, 200, device="cuda")
    half = layer.half()
    check(half(x.half()), x.half(), linear.weight.half(), linear.bias.half())
    assert "linear-delta-float16-cuda" in half.kernel


def test_without_validation_the_layer_says_so_and_stays_right(monkeypatch):
    monkeypatch.delenv(backend.EXPERIMENTAL_VARIABLE)
    monkeypatch.setattr(backend, "_reported_hashes", dict)
    monkeypatch.setattr(backend, "_warned", set())
    linear = pruned(100, 200, 0.8)
    with pytest.warns(RuntimeWarning, match="sources differ from those that a GPU report vouches for"):
        layer = SparseLinear.from_dense(linear).to("cuda")
    assert "dense torch: the delta kernel's sources differ" in layer.kernel
    x = torch.randn(2, 200, device="cuda").bfloat16()
    assert torch.equal(layer(x), linear.cuda()(x))


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[torch.rand_like(module.weight, dtype=torch.float32) < 0.7] = 0
    return model.cuda()


@torch.no_grad()
def test_a_sparse_llama_agrees_with_the_masked_dense():
    dense = tiny_llama()
    tokens = torch.randint(0, 512, (1, 24), device="cuda")
    expected = dense(tokens).logits.float()
    sparse = tiny_llama()
    sparse.load_state_dict(dense.state_dict())
    report = sparsify_(sparse, dense_kernels=False)
    assert len(report.sparse) == 14
    assert all("cuda" in m.kernel for m in sparse.modules() if isinstance(m, SparseLinear))
    actual = sparse(tokens).logits.float()
    assert (actual - expected).norm() / expected.norm() < 2e-2
    one = sparse(tokens[:, :1]).logits.float()
    assert (one - expected[:, :1]).norm() / expected[:, :1].norm() < 2e-2
    generated = sparse.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 32)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@torch.no_grad()
def test_compile_fullgraph(sparsity):
    layer = SparseLinear.from_dense(pruned(300, 400, sparsity)).to("cuda")
    x = torch.randn(2, 400, device="cuda").bfloat16()
    compiled = torch.compile(lambda x: torch.relu(layer(x)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.relu(layer(x)) * 2)


@pytest.mark.parametrize("name", NAMES)
def test_op_registration_is_sound(name):
    weight = matrix(name, 40, 96, 0.5, torch.bfloat16)
    packed, x = pack(name, weight), torch.randn(3, 96, device="cuda").bfloat16()
    from pysparse.ops.cuda import arrays, sizes

    tail = (None, *packed.shape, *sizes(packed))
    op = getattr(torch.ops.pysparse, f"{'nm_rows' if name == 'nm' else name}_linear").default
    torch.library.opcheck(op, (x, *arrays(packed), *tail), test_utils=("test_schema", "test_faketensor"))
