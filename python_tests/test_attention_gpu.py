"""The attention operations on a GPU, by the compiled kernels and by torch's own, against a float64 masked softmax."""

import math
from contextlib import contextmanager

import attention_cases as cases
import pytest
import torch
from test_attention_ops import random_blocks, random_stripes

from pysparse import backend, ops
from pysparse.ops import attention_cuda

reason = backend.missing_reason() or backend.cuda_missing_reason()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(reason), reason=f"no CUDA kernels: {reason}"),
]
MARGIN = 4096  # elements on both sides of a result: 16 rows of the widest head
REGION = ops.AnchorRegion(group_size=128, init=48, local=32)
SHAPES = [
    {"rows": 1}, {"rows": 70}, {"rows": 515, "past": 70, "dim": 128, "heads": 4, "key_heads": 2},
    {"rows": 65, "dim": 256}, {"rows": 3, "past": 128, "batch": 2}, {"rows": 300, "batch": 2, "padded": True},
    {"rows": 190, "past": 345, "tail": 33},
]  # fmt: skip


@pytest.fixture(params=["kernel", "portable"])
def path(request, monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    if request.param == "portable":
        monkeypatch.setattr(attention_cuda, "why_portable", lambda q, **needs: "asked for")
    return request.param


def on_gpu(case):
    return [x.transpose(1, 2).contiguous().transpose(1, 2).cuda() for x in (case.q, case.k, case.v)]


def index_on_gpu(index):
    lists = {"keys": index.keys} if hasattr(index, "keys") else {"blocks": index.blocks}
    moved = {name: x.cuda() for name, x in {"offsets": index.offsets, **lists}.items()}
    rest = {f: getattr(index, f) for f in index.__dataclass_fields__ if f not in moved}
    return type(index)(**moved, **rest)


def close(actual, case, mask):
    cases.assert_close([x.cpu() for x in actual], cases.exact(case, mask), torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_dense(path, shape, causal):
    case = cases.draw(1, torch.bfloat16 if causal else torch.float16, **shape)
    actual = ops.flash_attention(*on_gpu(case), causal=causal, **case.span)
    close(actual, case, case.causal_mask() if causal else case.full_mask())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_infinite_theta_counts_every_key_once(path, shape):
    case = cases.draw(2, torch.bfloat16, **shape)
    everything = ops.StripeRule(float("inf"), pools=8)
    out, lse, index = ops.anchor_attention(*on_gpu(case), REGION, everything, **case.span)
    close((out, lse), case, case.causal_mask())
    nothing = ops.StripeRule(-float("inf"), pools=8)
    out, lse, index = ops.anchor_attention(*on_gpu(case), REGION, nothing, **case.span)
    assert index.nnz == 0
    close((out, lse), case, cases.anchor_mask(case, REGION))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stripes_are_those_of_the_oracle(path, shape):
    case = cases.draw(3, torch.bfloat16, **shape)
    q, k, v = on_gpu(case)
    state = ops.anchor_state(q, k, v, REGION, **case.span)
    for share_kv in (False, True):
        rule = ops.StripeRule(theta=1.0, pools=4, share_kv=share_kv)
        found = ops.identify_stripes(q, k, state.max, REGION, rule, **case.span)
        wanted = ops.identify_stripes(case.q, case.k, state.max.cpu(), REGION, rule, **case.span)
        # A pooled row that rounds to another 16-bit value may turn a key that lies on the line.
        differ = (found.to_mask().cpu() != wanted.to_mask()).sum()
        assert differ <= max(2, 0.002 * wanted.nnz), (differ, wanted.nnz)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stripes_and_blocks(path, shape):
    case = cases.draw(4, torch.bfloat16, **shape)
    index = random_stripes(case, 128)
    close(
        ops.stripe_attention(*on_gpu(case), index_on_gpu(index), **case.span),
        case,
        cases.stripe_mask(case, index),
    )
    blocks = random_blocks(case, 128, 64)
    actual = ops.block_sparse_attention(*on_gpu(case), index_on_gpu(blocks), **case.span)
    close(actual, case, cases.block_mask(case, blocks) & case.causal_mask())


def test_two_runs_agree_bit_for_bit(path):
    case = cases.draw(5, torch.bfloat16, rows=700, dim=128)
    index = index_on_gpu(random_stripes(case, 128))
    one, two = (ops.stripe_attention(*on_gpu(case), index, **case.span)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_dense_in_a_graph(monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    case = cases.draw(6, torch.bfloat16, rows=300)
    q, k, v = on_gpu(case)
    ops.flash_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.flash_attention(q, k, v)
    out.fill_(float("nan"))
    graph.replay()
    close((out, lse), case, case.causal_mask())


@contextmanager
def guarded_results(monkeypatch):
    """Results begin as NaN and lie between margins of NaN, which must still be there at the end."""
    margins = []

    def new_empty(like, shape, dtype=None):
        size = math.prod(shape)
        whole = torch.full((size + 2 * MARGIN,), float("nan"), dtype=dtype or like.dtype, device=like.device)
        margins.extend((whole[:MARGIN], whole[MARGIN + size :]))
        return whole[MARGIN : MARGIN + size].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", lambda x: new_empty(x, x.shape))
        yield
    assert margins  # or the results came from elsewhere
    assert all(margin.isnan().all() for margin in margins)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_written_whole_and_nothing_beside_them(shape, monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    case = cases.draw(8, torch.bfloat16, **shape)
    (q, k, v), stripes = on_gpu(case), random_stripes(case, 128)
    on_device = index_on_gpu(stripes)
    with guarded_results(monkeypatch):
        alone = ops.stripe_attention(q, k, v, on_device, **case.span)
    close(alone, case, cases.stripe_mask(case, stripes))
    own_group = ops.AnchorRegion(128, 0, 0)  # disjoint from every stripe
    with guarded_results(monkeypatch):
        state = ops.anchor_state(q, k, v, own_group, **case.span)
    near = cases.anchor_mask(case, own_group)
    close((state.out, state.lse), case, near)
    with guarded_results(monkeypatch):
        both = ops.stripe_attention(q, k, v, on_device, state, **case.span)
    close(both, case, cases.stripe_mask(case, stripes) | near)
    blocks = random_blocks(case, 128, 64)
    on_device = index_on_gpu(blocks)
    with guarded_results(monkeypatch):
        chosen = ops.block_sparse_attention(q, k, v, on_device, **case.span)
    close(chosen, case, cases.block_mask(case, blocks) & case.causal_mask())


@pytest.mark.parametrize("kind", ["stripes", "blocks"])
def test_stripes_and_blocks_in_a_graph(kind):
    """The launches alone: the operations check their lists first, and that waits for the GPU."""
    before, case = (
        cases.draw(seed, torch.bfloat16, rows=515, past=70, dim=128, heads=4, key_heads=2) for seed in (9, 10)
    )
    index = random_stripes(case, 128) if kind == "stripes" else random_blocks(case, 128, 64)
    lists = index_on_gpu(index)
    q, k, v = on_gpu(before)
    scale, (_, heads, groups) = case.q.shape[-1] ** -0.5, index.shape

    def launch():
        if kind == "stripes":
            sizes = (heads, groups, 128)
            return attention_cuda._stripes(
                q, k, v, lists.offsets, lists.keys, sizes, None, None, scale, case.q_offset
            )
        return attention_cuda._launch(
            q, k, v, None, scale, True, case.q_offset, attention_cuda._BLOCKS, spans=(128, 0, 0),
            lists=(lists.offsets, lists.blocks), list_sizes=(heads, groups, 64),
        )  # fmt: skip

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = launch()
    for held, new in zip((q, k, v), on_gpu(case), strict=True):
        held.copy_(new)
    for result in (out, lse):
        result.fill_(float("nan"))
    graph.replay()
    mask = cases.stripe_mask(case, index) if kind == "stripes" else cases.block_mask(case, index)
    close((out, lse), case, mask)
