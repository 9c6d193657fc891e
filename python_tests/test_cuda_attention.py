"""The CUDA attention kernels' own source on host threads (cuda_shim/shim.h), against masked attention in float64."""

import ctypes
import shutil
import subprocess

import attention_cases as cases
import pytest
import torch
from test_attention_ops import random_blocks, random_stripes
from test_cuda_shim import HERE, SOURCES, at, host_text

from pysparse import ops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def structure(**fields):
    """Return a ctypes structure; field names are those of csrc/cuda/attention.h."""
    return type("Structure", (ctypes.Structure,), {"_fields_": list(fields.items())})


HeadRows = structure(data=POINTER, batch=LONG, head=LONG, row=LONG)
SoftmaxState = structure(mean=POINTER, max=POINTER, denominator=POINTER)
AttentionProblem = structure(
    q=HeadRows, k=HeadRows, v=HeadRows, out=POINTER, out_batch=LONG, out_head=LONG, out_row=LONG, lse=POINTER,
    before=SoftmaxState, after=SoftmaxState, first_key=POINTER, end_key=POINTER, batch=INT, heads=INT, kv_heads=INT,
    queries=INT, keys=INT, dim=INT, offset=INT, scale=FLOAT, causal=ctypes.c_bool, dtype=INT,
)  # fmt: skip
KeyChoice = structure(
    set=INT, group=INT, head_keys=INT, extra_keys=INT, offsets=POINTER, indices=POINTER, list_heads=INT, groups=INT,
    block=INT,
)  # fmt: skip
StripeSearch = structure(
    pooled=HeadRows, k=HeadRows, floor=POINTER, first_key=POINTER, bits=POINTER, batch=INT, heads=INT, kv_heads=INT,
    groups=INT, rows=INT, keys=INT, dim=INT, words=INT, group=INT, first_group=INT, head_keys=INT, extra_keys=INT,
    scale=FLOAT, dtype=INT,
)  # fmt: skip
SPANS, STRIPES, BLOCKS = range(3)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    for name in ("common.cuh", "attention.cuh"):
        (folder / name).write_text(host_text(name))
    for path in [*HERE.glob("*"), SOURCES / "cuda/api.h", SOURCES / "cuda/attention.h"]:
        shutil.copy(path, folder)
    stripes = host_text("stripes.cu", until="template <class T, int kDim>\ncudaError_t launch(")
    (folder / "stripes_host.cuh").write_text(stripes)
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wno-unknown-pragmas",
        "-Wno-attributes",
    ]
    command += [
        f"-I{folder}",
        f"-I{SOURCES}/include",
        str(folder / "attention_driver.cpp"),
        "-o",
        str(folder / "a.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    found = ctypes.CDLL(str(folder / "a.so"))
    for which, kind in enumerate((AttentionProblem, KeyChoice, StripeSearch)):
        assert found.struct_bytes(which) == ctypes.sizeof(kind)
    return found


def head_rows(x):
    return HeadRows(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def state_of(state):
    return SoftmaxState(*(None if state is None else t.data_ptr() for t in state or (None,) * 3))


def fresh_state(batch, heads, queries, dim):
    return [
        torch.full(shape, float("nan"))
        for shape in ((batch, heads, queries, dim), *((batch, heads, queries),) * 2)
    ]


def run(library, case, choice, before=None, after=None, causal=True):
    """Return (out, log-sum-exp) of the kernel; q, k and v lie as transformers hands them over."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v))
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    out = torch.full((batch, queries, heads, dim), float("nan")).to(q.dtype).transpose(1, 2)
    lse = torch.full((batch, heads, queries), float("nan"))
    first, end = (None, None) if case.key_range is None else case.key_range.T.to(torch.int32).contiguous()
    problem = AttentionProblem(
        head_rows(q), head_rows(k), head_rows(v), out.data_ptr(), out.stride(0), out.stride(1), out.stride(2),
        lse.data_ptr(), state_of(before), state_of(after), at(first), at(end), batch, heads, kv_heads, queries, keys,
        dim, case.q_offset, dim**-0.5, causal, 0 if q.dtype == torch.bfloat16 else 1,
    )  # fmt: skip
    library.run_attention(ctypes.byref(problem), ctypes.byref(choice))
    return out, lse


def close(actual, case, mask):
    cases.assert_close(actual, cases.exact(case, mask), torch.bfloat16)


def dense():
    return KeyChoice(SPANS, 0, 0, 0, None, None, 1, 1, 64)


def spans(region):
    return KeyChoice(SPANS, region.group_size, region.init, region.local, None, None, 1, 1, 64)


def stripes(index):
    _, heads, groups = index.shape
    return KeyChoice(STRIPES, index.group_size, 0, 0, at(index.offsets), at(index.keys), heads, groups, 64)


SHAPES = [
    {"rows": 70}, {"rows": 1}, {"rows": 130, "past": 70, "dim": 128, "heads": 4, "key_heads": 2},
    {"rows": 65, "dim": 256}, {"rows": 3, "past": 128, "batch": 2}, {"rows": 140, "batch": 2, "padded": True},
    {"rows": 90, "past": 45, "tail": 33},
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_dense(library, shape, causal):
    dtype = torch.bfloat16 if causal else torch.float16
    case = cases.draw(1, dtype, **shape)
    close(
        run(library, case, dense(), causal=causal), case, case.causal_mask() if causal else case.full_mask()
    )


REGION = ops.AnchorRegion(group_size=128, init=48, local=32)


@pytest.mark.parametrize(
    "shape", [{"rows": 300}, {"rows": 150, "past": 200, "batch": 2, "padded": True}], ids=str
)
def test_anchor_then_every_stripe_is_dense(library, shape):
    """Every key is met exactly once: the carried state and the lists of all candidates give full attention."""
    case = cases.draw(2, torch.bfloat16, **shape)
    state = fresh_state(*case.q.shape)
    region = cases.anchor_mask(case, REGION)
    close(run(library, case, spans(REGION), after=state), case, region)
    mean, peak, total = state
    close((mean, peak + total.log()), case, region)
    everything = ops.StripeRule(float("inf"), pools=8)
    *_, index = ops.anchor_attention(case.q, case.k, case.v, REGION, everything, **case.span)
    close(run(library, case, stripes(index), before=state), case, case.causal_mask())


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    "shape", [{"rows": 290, "dim": 128}, {"rows": 90, "past": 190, "batch": 2, "padded": True}]
)
def test_random_stripes(library, heads, shape):
    case = cases.draw(3, torch.bfloat16, **shape)
    index = random_stripes(case, 128, heads=heads)
    close(run(library, case, stripes(index)), case, cases.stripe_mask(case, index))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("block", "shape"), [(64, {"rows": 290}), (128, {"rows": 90, "past": 210, "tail": 9})]
)
def test_blocks(library, block, shape, causal):
    case = cases.draw(4, torch.bfloat16, **shape)
    index = random_blocks(case, 128, block)
    choice = KeyChoice(BLOCKS, 128, 0, 0, at(index.offsets), at(index.blocks), *index.shape[1:], block)
    close(run(library, case, choice, causal=causal), case, cases.block_mask(case, index, causal))


def test_nan_reaches_the_queries_that_see_it(library):
    case = cases.draw(5, torch.bfloat16, rows=100)
    case.k[0, 0, 50, 3] = float("nan")
    out, _ = run(library, case, dense())
    assert out[:, :, :50].isfinite().all()
    assert out[:, :, 50:].isnan().all()


@pytest.mark.parametrize(("dim", "rows", "first_group"), [(64, 16, 0), (128, 4, 3)])
def test_stripe_search(library, dim, rows, first_group):
    torch.manual_seed(rows)
    group, groups, keys, head_keys, extra = 128, 5, 128 * 5, 32, 16
    words = -(-keys // 32)
    pooled = torch.randn(2, 2, groups * rows, dim).bfloat16()
    k = torch.randn(2, keys, 1, dim).bfloat16().transpose(1, 2)
    floor = torch.rand(2, 2, groups * rows) * 3
    floor[0, 0, 3] = torch.inf
    floor.view(2, 2, groups, rows)[:, :, :first_group] = torch.inf  # groups without queries
    first = torch.tensor([0, 7], dtype=torch.int32)
    bits = torch.zeros(2, 2, groups, words, dtype=torch.int32)
    search = StripeSearch(
        head_rows(pooled), head_rows(k), floor.data_ptr(), first.data_ptr(), bits.data_ptr(), 2, 2, 1, groups, rows,
        keys, dim, words, group, first_group, head_keys, extra, dim**-0.5, 0,
    )  # fmt: skip
    library.run_search(ctypes.byref(search))
    scores = (pooled.double() @ k.double().transpose(-1, -2)) * dim**-0.5 - floor.double()[..., None]
    assert scores.abs().min() > 1e-6  # no tie that rounding could turn
    keep = (scores >= 0).view(2, 2, groups, rows, keys).any(3)
    position = torch.arange(keys) - first[:, None, None, None]
    keep &= (position < (torch.arange(groups) * group - extra)[:, None]) & (position >= head_keys)
    assert keep.any()
    found = (bits[..., None] >> torch.arange(32, dtype=torch.int32) & 1).bool().flatten(-2)[..., :keys]
    assert torch.equal(found, keep)

    flat = bits.view(-1, words)
    counts, offsets = torch.empty(20, dtype=torch.int64), torch.empty(21, dtype=torch.int64)
    indices = torch.full((int(keep.sum()),), -1, dtype=torch.int32)
    library.run_lists(at(flat), ctypes.c_int64(20), words, at(counts), at(offsets), at(indices))
    assert torch.equal(counts.view(2, 2, groups), keep.sum(-1))
    assert torch.equal(indices.long(), keep.view(20, keys).nonzero()[:, 1])
