"""The masked low-rank product: every compiled kernel and torch's tiles against the plain formula and its gradients."""

import pytest
import torch

from pysparse import backend
from pysparse.formats import BitmapTensor
from pysparse.nn import Adapter, MaskedLowRank
from pysparse.ops import lowrank
from pysparse.ops.lowrank import (
    LowRankTerm,
    dense_lowrank_linear,
    masked_lowrank_linear,
    masked_lowrank_weight,
)

SHAPES = [
    (1, 1, 1),
    (5, 3, 17),
    (33, 40, 16),
    (16, 31, 128),
    (48, 100, 257),
    (7, 129, 300),
]  # (tokens, rows, cols)
LEVELS = [
    pytest.param(
        key.isa,
        id=key.isa,
        marks=() if key.supported else pytest.mark.skip(reason=f"this CPU lacks {key.isa}"),
    )
    for key in backend.kernels(op="lowrank", format="bitmap")
    if key.dtype == "float32"
]


def draw(tokens, rows, cols, rank, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keep = torch.rand(rows, cols, generator=generator) < density
    keep[:: max(1, rows // 3)] = False  # rows with nothing in them
    keep[1::7] = True  # and full ones
    weight = normal(rows, cols) * keep
    return normal(tokens, cols), weight, keep, normal(rows, rank), normal(rank, cols), normal(tokens, rows)


def tiled(x, weight, keep, up, down, scale=0.5, *, values=True):
    packed = BitmapTensor.from_dense(weight, keep)
    kept = packed.values.requires_grad_() if values else None
    term = LowRankTerm(up, down, scale) if up is not None else None
    return masked_lowrank_linear(x, packed.bitmask, packed.row_offsets, kept, term), kept


def gradients(output, weights, *inputs):
    """Of sum(output * weights); those of the weight matrix are read at its kept places."""
    return torch.autograd.grad((output * weights).sum(), inputs)


def compare(shape, rank, dtype=torch.float32):
    """Against float64 with every matrix made in full; errors are measured by the sums of absolute terms."""
    x, weight, keep, up, down, out = draw(*shape, rank)
    x, out = x.to(dtype), out.to(dtype)
    leaves = [one.clone().requires_grad_() for one in (x, up, down)]
    actual, kept = tiled(leaves[0], weight, keep, leaves[1], leaves[2])
    found = [actual, *gradients(actual, out, *leaves, kept)]
    exact = [one.double().clone().requires_grad_() for one in (x, weight, up, down)]
    y = dense_lowrank_linear(exact[0], exact[1], keep, LowRankTerm(exact[2], exact[3], 0.5))
    dx, dw, dup, ddown = gradients(y, out.double(), *exact)
    bound = [one.double().abs().requires_grad_() for one in (x, weight, up, down)]
    above = dense_lowrank_linear(bound[0], bound[1], keep, LowRankTerm(bound[2], bound[3], 0.5))
    ax, aw, aup, adown = gradients(above, out.double().abs(), *bound)
    expected = [y, dx, dup, ddown, dw[keep]]
    limits = [above, ax, aup, adown, aw[keep]]
    # a float32 sum of n terms is off by up to n units in the last place, in practice by their root; tiles and
    # gradients of bfloat16 are rounded once more before they are summed
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.bfloat16 else 2 * max(shape) ** 0.5)
    for name, one, wish, limit in zip(
        ("y", "x", "up", "down", "values"), found, expected, limits, strict=True
    ):
        error = (one.double() - wish).abs()
        assert bool((error <= unit * limit + 1e-12).all()), f"{name} is off by {float((error / limit).max())}"


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
def test_every_kernel_matches_the_plain_formula_and_its_gradients(isa, dtype, rank):
    with backend.force_isa(isa):
        for shape in SHAPES:
            compare(shape, rank, dtype)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_tiles_of_a_few_rows_make_the_same(monkeypatch, compiled):
    monkeypatch.setattr(lowrank, "TILE", 16 * 300)
    if not compiled:
        monkeypatch.setattr(backend, "available", lambda: False)
    for shape in [(7, 129, 300), (9, 50, 301)]:
        for dtype in (torch.float32, torch.bfloat16):
            compare(shape, 5, dtype)


def test_gradients_of_torchs_tiles_by_finite_differences(monkeypatch):
    monkeypatch.setattr(lowrank, "TILE", 16 * 9)
    x, weight, keep, up, down, _ = draw(4, 37, 9, 2)
    packed = BitmapTensor.from_dense(weight, keep)
    inputs = [one.double().requires_grad_() for one in (x, packed.values, up, down)]

    def run(x, values, up, down):
        return masked_lowrank_linear(
            x, packed.bitmask, packed.row_offsets, values, LowRankTerm(up, down, 0.7)
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("isa", LEVELS)
def test_what_the_mask_cuts_gives_nothing_and_gets_nothing(isa):
    """Vector (f): B = 0 is no adapter at all; A and B get no gradient through masked places."""
    x, weight, keep, up, down, out = draw(6, 40, 33, 4)
    with backend.force_isa(isa):
        plain, _ = tiled(x, weight, keep, None, None)
        same, _ = tiled(x, weight, keep, torch.zeros_like(up), down)
        assert torch.equal(plain, same)
        assert not masked_weight(weight, keep, up, down)[~keep].any()
        nothing = torch.zeros_like(keep)
        leaves = [one.clone().requires_grad_() for one in (x, up, down)]
        y, _ = tiled(leaves[0], weight, nothing, *leaves[1:])
        assert not y.any()
        assert not any(one.any() for one in gradients(y, out, *leaves))


def masked_weight(weight, keep, up, down, scale=0.5):
    packed = BitmapTensor.from_dense(weight, keep)
    term = LowRankTerm(up, down, scale)
    return masked_lowrank_weight(tuple(weight.shape), packed.bitmask, packed.row_offsets, packed.values, term)


@pytest.mark.parametrize("isa", LEVELS)
def test_the_merged_weight_is_the_formula(isa):
    _, weight, keep, up, down, _ = draw(1, 64, 45, 8)
    with backend.force_isa(isa):
        merged = masked_weight(weight, keep, up, down)
    torch.testing.assert_close(merged, (weight + 0.5 * up @ down) * keep, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", LEVELS)
def test_the_term_alone(isa):
    x, weight, keep, up, down, _ = draw(6, 40, 33, 4)
    with backend.force_isa(isa):
        term, _ = tiled(x, weight, keep, up, down, values=False)
    expected = dense_lowrank_linear(x, torch.zeros_like(weight), keep, LowRankTerm(up, down, 0.5))
    torch.testing.assert_close(term, expected, rtol=1e-5, atol=1e-4)


def test_the_same_bits_for_any_number_of_threads():
    x, weight, keep, up, down, out = draw(64, 512, 700, 8)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [up.clone().requires_grad_(), down.clone().requires_grad_()]
            torch.set_num_threads(1)  # torch's own products may differ; what is ours must not
            packed = BitmapTensor.from_dense(weight, keep)
            tiles = lowrank._Tiles.of(
                (512, 700), packed.values, LowRankTerm(*leaves, 0.5), packed.bitmask, packed.row_offsets
            )
            product = out.T @ x
            torch.set_num_threads(threads)
            into = lowrank._Gradients(
                torch.zeros_like(up), torch.zeros_like(down), torch.zeros_like(packed.values)
            )
            tiles.contract(product, 0, 512, into)
            found.append((tiles.expand(0, 512, torch.float32), into.up, into.down, into.values))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_only_a_tile_exists_at_a_time(monkeypatch):
    """Nothing as large as the weight is allocated, forward or backward."""
    monkeypatch.setattr(lowrank, "TILE", 1 << 12)
    rows, cols = 512, 256
    x, weight, keep, up, down, out = draw(8, rows, cols, 4)
    leaves = [one.clone().requires_grad_() for one in (x, up, down)]
    packed = BitmapTensor.from_dense(weight, keep)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        term = LowRankTerm(leaves[1], leaves[2], 0.5)
        y = masked_lowrank_linear(leaves[0], packed.bitmask, packed.row_offsets, packed.values, term)
        y.backward(out)
    assert leaves[1].grad is not None
    assert largest <= max(4 << 12, 4 * 8 * rows, 4 * packed.nnz)
    assert largest < 4 * rows * cols / 2


def test_inputs_of_any_rank_and_without_tokens():
    x, weight, keep, up, down, _ = draw(6, 40, 33, 4)
    whole, _ = tiled(x, weight, keep, up, down)
    assert torch.equal(tiled(x.view(2, 3, 33), weight, keep, up, down)[0], whole.view(2, 3, 40))
    assert tiled(x[0], weight, keep, up, down)[0].shape == (40,)
    assert tiled(x[:0], weight, keep, up, down)[0].shape == (0, 40)


def test_shapes_that_do_not_fit_are_refused():
    x, weight, keep, up, down, _ = draw(6, 40, 33, 4)
    with pytest.raises(ValueError, match=r"up is \(40, 4\) for a weight \(40, 33\), got \(39, 4\)"):
        tiled(x, weight, keep, up[1:], down)
    with pytest.raises(ValueError, match=r"down is \(4, 33\).*got \(4, 32\)"):
        tiled(x, weight, keep, up, down[:, 1:])
    packed = BitmapTensor.from_dense(weight, keep)
    with pytest.raises(
        ValueError, match=r"bitmask is uint8 \(40, 6\) for 40 rows and x of 41 features.*\(40, 5\)"
    ):
        masked_lowrank_linear(torch.zeros(2, 41), packed.bitmask, packed.row_offsets, packed.values)
    with pytest.raises(ValueError, match="nothing to multiply"):
        tiled(x, weight, keep, None, None, values=False)


def test_a_tile_outside_of_the_weight_is_refused_by_the_core():
    _, weight, keep, *_ = draw(1, 8, 8, 1)
    packed = BitmapTensor.from_dense(weight, keep)
    tiles = lowrank._Tiles.of((8, 8), packed.values, None, packed.bitmask, packed.row_offsets)
    with pytest.raises(ValueError, match=r"rows \[4, 9\) are not within the 8 rows"):
        tiles.expand(4, 9, torch.float32)


# --- the layer -------------------------------------------------------------------------------------------


def layer_of(rank=4, *, dropout=0.0, seed=0, bias=True):
    torch.manual_seed(seed)
    _, weight, keep, *_ = draw(1, 40, 33, 1, seed=seed)
    adapter = Adapter.fresh((40, 33), rank, 2.0) if rank else None
    return (
        MaskedLowRank(weight, keep, adapter, bias=torch.randn(40) if bias else None, dropout=dropout),
        weight,
        keep,
    )


def step(layer, seed=1):
    x = torch.randn(16, 33, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW([one for one in layer.parameters() if one.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "adapter"])
def test_a_step_moves_survivors_only_and_merging_changes_no_output(rank):
    """Vector (e)."""
    layer, weight, keep = layer_of(rank)
    before = layer(torch.eye(33))
    step(layer)
    merged = layer.merged_weight()
    assert torch.equal(merged != 0, keep)
    assert not torch.equal(merged, weight)
    x = torch.randn(5, 33)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.linear(x, merged, layer.bias), rtol=1e-5, atol=1e-5
    )
    assert not torch.equal(layer(torch.eye(33)), before)
    assert layer.values.requires_grad == (rank == 0)
    assert torch.equal(layer.base_weight != 0, keep)


def test_changing_the_rank_changes_no_output():
    """The released code drops trained components when a rank falls; here they stay, in the base."""
    layer, _, keep = layer_of(6)
    step(layer)
    merged, x = layer.merged_weight(), torch.randn(5, 33)
    for rank in (2, 6, 11):
        other = MaskedLowRank(merged, keep, layer.adapter.resized(rank), bias=layer.bias)
        assert other.adapter.rank == rank
        torch.testing.assert_close(other(x), layer(x), rtol=1e-5, atol=2e-5)


def test_a_survivor_that_becomes_zero_stays_a_survivor():
    weight, keep = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[True, False, True]])
    adapter = Adapter(torch.tensor([[-0.5]]), torch.tensor([[1.0, 1.0, 1.0]]), 2.0)
    layer = MaskedLowRank(torch.tensor([[0.0, 0.0, 1.0]]), keep, adapter)
    torch.testing.assert_close(layer.base_weight, weight)
    for dtype in (torch.float32, torch.bfloat16):
        merged = layer.merged_weight(dtype)
        assert torch.equal(merged != 0, keep)
        assert float(merged[0, 0]) == torch.finfo(dtype).tiny


def test_dropout_is_of_the_adapters_input_alone():
    layer, weight, _ = layer_of(4, dropout=0.5)
    x = torch.randn(200, 33)
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)  # B = 0
    step(layer)
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_autocast_computes_in_bfloat16_with_float32_parameters():
    layer, _, _ = layer_of(4)
    x = torch.randn(8, 33)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.dtype == layer.lora_B.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.2)


def test_an_adapter_that_does_not_fit_is_refused():
    weight, keep = torch.ones(4, 6), torch.ones(4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"adapter is for a weight \(4, 5\), this one is \(4, 6\)"):
        MaskedLowRank(weight, keep, Adapter.fresh((4, 5), 2, 1.0))
    with pytest.raises(ValueError, match="x has 7 features, the layer takes 6"):
        MaskedLowRank(weight, keep)(torch.ones(1, 7))
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        Adapter.fresh((4, 6), 0, 1.0)
    assert "sparsity=0.0000, rank=2" in repr(MaskedLowRank(weight, keep, Adapter.fresh((4, 6), 2, 1.0)))
