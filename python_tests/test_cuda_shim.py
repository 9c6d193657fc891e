"""The CUDA kernels' own source on host threads (cuda_shim/shim.h): control flow and indices without a GPU."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import reference
import torch
from cuda_weights import groups_only, matrix_for, pack_for_stacking, stackable_weights

from pysparse import backend, ops
from pysparse.formats import PACKINGS, BitmapTensor, NMRows
from pysparse.formats.device import place_bits
from pysparse.formats.stacked import stack_rows

HERE = Path(__file__).parent / "cuda_shim"
SOURCES = Path(__file__).parents[1] / "csrc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]

H200 = (132, 2048, 232448, 233472)  # processors, threads each, shared bytes per block and in all
TINY = (1, 1536, 101376, 102400)  # an sm_86 with one processor: strips take turns, small shared memory


def host_text(name, until=None):
    """Return a source as g++ takes it: shared memory as globals, and without what launches."""
    text = (SOURCES / "cuda" / name).read_text()
    if until is not None:
        text = text[: text.index(until)] + "}  // namespace\n}  // namespace pysparse::cuda\n"
    text = re.sub(r"extern __shared__", "extern", text)
    return re.sub(r"__shared__", "static", text)


def instances(text):
    """Keep of strip.h what the kernels' template arguments follow from."""
    line = next(line for line in text.splitlines() if "strip_stages" in line)
    return f"#pragma once\nnamespace pysparse::cuda {{\n{line}\n}}\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compile the drivers over copies of the sources."""
    folder = tmp_path_factory.mktemp("shim")
    for name in ("common.cuh", "columns.cuh", "strip.cuh", "tiles.cuh"):
        (folder / name).write_text(host_text(name))
    for path in [*HERE.glob("*"), SOURCES / "cuda/api.h"]:
        shutil.copy(path, folder)
    (folder / "strip_instances.h").write_text(instances((SOURCES / "cuda/strip.h").read_text()))
    strip = host_text("strip.cu", until="template <class T>\ncudaError_t add_parts(")
    strip = strip.replace('#include "strip.h"', '#include "strip_instances.h"')
    (folder / "strip_host.cuh").write_text(strip)
    launch = "\ncudaError_t launch("
    (folder / "delta_host.cuh").write_text(
        host_text("delta.cu", until=f"template <class T, int kTokens>{launch}")
    )
    (folder / "nm_host.cuh").write_text(
        host_text("nm.cu", until=f"template <class T, int kTokens, int kBits>{launch}")
    )
    found = []
    for driver in ("strip_driver", "delta_driver", "nm_driver"):
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
            str(folder / f"{driver}.cpp"),
            "-o",
            str(folder / f"{driver}.so"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:6000]
        found.append(ctypes.CDLL(str(folder / f"{driver}.so")))
    return tuple(found)


def at(tensor):
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def run(library, name, packed, x, bias, card=H200, team=1):
    strips, delta, nm = library
    tokens, (rows, cols) = x.shape[0], packed.shape
    y = torch.full((tokens, rows), float("nan")).to(x.dtype)
    code = 0 if x.dtype == torch.bfloat16 else 1
    if name == "delta":
        arrays = [at(t) for t in (packed.values, packed.deltas, packed.row_groups, packed.chunk_cols)]
        delta.run_delta(3, 128, team, code, *arrays, at(x), at(bias), at(y), tokens, rows, cols)
        return y
    if name == "nm":
        arrays, bits = (at(packed.values), at(packed.places)), place_bits(packed.m)
        team = min(team, nm.nm_team(packed.n, bits, cols))
        nm.run_nm(3, 128, team, code, *arrays, packed.n, bits, at(x), at(bias), at(y), tokens, rows, cols)
        return y
    largest = packed.largest_block if name == "fragment" else backend.core().PAIR_BLOCK_BYTES
    workspace = torch.full((16 * tokens * rows,), float("nan"))
    strips.run_strips(
        (ctypes.c_int * 4)(*card), 0 if name == "fragment" else 1, code, at(packed.stream),
        at(packed.offsets if name == "fragment" else None), largest, at(x), at(bias), at(y), tokens, rows, cols,
        at(workspace),
    )  # fmt: skip
    return y


CASES = [
    ("fragment", 33, 130, 1), ("fragment", 40, 136, 3), ("fragment", 17, 700, 9), ("fragment", 150, 64, 20),
    ("fragment", 16, 257, 32), ("fragment", 80, 1100, 2), ("fragment", 40, 200, 61),
    ("pair", 100, 2100, 3), ("pair", 33, 130, 1), ("pair", 40, 136, 5),
    ("pair", 20, 700, 16), ("pair", 16, 72, 29), ("pair", 33, 260, 64),
    ("delta", 20, 130, 1), ("delta", 13, 3000, 2), ("delta", 7, 700, 3), ("delta", 9, 1100, 8),
    ("nm", 20, 130, 1), ("nm", 13, 3000, 2), ("nm", 7, 700, 3), ("nm", 9, 1100, 8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "cols", "tokens"), CASES)
@pytest.mark.parametrize("card", [H200, TINY], ids=["h200", "tiny"])
def test_kernels_on_host_threads_match_the_oracle(library, name, rows, cols, tokens, card):
    weight = matrix_for(name, rows, cols, 0.6, torch.bfloat16)
    packed = PACKINGS[name].from_bitmap(BitmapTensor.from_dense(weight))
    x, bias = torch.randn(tokens, cols).bfloat16(), torch.randn(rows).bfloat16()
    team = 4 if card is TINY else 1
    reference.assert_close(run(library, name, packed, x, bias, card, team), x, weight, bias)


@pytest.mark.parametrize("name", PACKINGS)
def test_the_whole_of_a_stack_and_its_parts_are_weights_of_their_own(library, name):
    """Parts begin where their words do, not at multiples of 16 bytes, and count from their own first row."""
    dense = stackable_weights(name, (16, 48, 32), 700)
    whole, parts = stack_rows([pack_for_stacking(name, weight) for weight in dense])
    for packed, weight in ((whole, torch.cat(dense)), *zip(parts, dense, strict=True)):
        x, bias = torch.randn(2, 700).bfloat16(), torch.randn(len(weight)).bfloat16()
        reference.assert_close(run(library, name, packed, x, bias), x, weight, bias)


def test_unpacking_rows_wider_than_shared_memory(library):
    weight = groups_only(torch.randn(2, 30000).bfloat16(), 2, 16)
    packed = NMRows.from_bitmap(BitmapTensor.from_dense(weight), 2, 16)
    dense = torch.full((2, 30000), float("nan")).bfloat16()
    library[2].unpack_nm(at(packed.values), at(packed.places), 2, 4, at(dense), 0, 2, 2, 30000)
    assert torch.equal(dense, weight)


@pytest.mark.parametrize(
    "card", [H200, (84, 1536, 101376, 102400), (108, 2048, 166912, 167936)], ids=["90", "86", "80"]
)
def test_nm_plans_fit_the_card_for_as_many_tokens_as_are_sent_to_the_kernel(library, card, monkeypatch):
    monkeypatch.setattr("pysparse.ops.cuda._shared_bytes", lambda device: card[2])
    for rows, cols in [(1, 5), (1024, 4096), (11008, 4096), (4096, 11008), (8192, 28672), (33, 50000)]:
        limit = ops.max_tokens("nm", cols, 0)
        for n, m in [(1, 4), (3, 8), (1, 16), (15, 16)]:
            for tokens in range(1, limit + 1):
                plan = (ctypes.c_int * 4)()
                bits = place_bits(m)
                error = library[2].plan_nm((ctypes.c_int * 4)(*card), n, bits, tokens, rows, cols, plan)
                threads, grid, team, shared = plan
                case = (rows, cols, n, m, tokens, list(plan))
                assert not error, case
                assert shared + 1024 <= card[2], case
                assert threads in (256, 512, 1024), case
                assert 1 <= grid <= rows, case
                assert team in (1, 2, 4, 8), case
                assert team <= max(1, library[2].nm_team(n, bits, cols)), case


NM_CASES = [
    (1, 4, 21, 4100, 1), (1, 4, 9, 130, 5), (2, 4, 20, 700, 2), (3, 4, 7, 1100, 1), (1, 8, 40, 520, 3),
    (2, 8, 13, 3000, 1), (4, 8, 11, 2048, 8), (7, 8, 5, 600, 4), (1, 16, 40, 4096, 1), (2, 16, 9, 5000, 2),
    (4, 16, 20, 1030, 1), (11, 16, 6, 1000, 7), (15, 16, 3, 5, 1),
]  # fmt: skip


@pytest.mark.parametrize(("n", "m", "rows", "cols", "tokens"), NM_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_patterns_on_host_threads_match_the_oracle(library, n, m, rows, cols, tokens, dtype):
    weight = groups_only(reference.sparse_matrix(rows, cols, 0.2, dtype), n, m)
    weight[rows // 2] = 0
    packed = NMRows.from_bitmap(BitmapTensor.from_dense(weight), n, m)
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
    for team in (1, 2):
        y = run(library, "nm", packed, x, bias, team=team)
        bound = 2.0**-11 if dtype is torch.float16 else 2.0**-8
        exact, size = reference.linear(x, weight, bias), reference.linear(x.abs(), weight.abs(), bias.abs())
        assert bool(
            ((y.double() - exact).abs() <= bound * exact.abs() + cols * 2.0**-24 * size + 2.0**-24).all()
        )
    dense = torch.full((rows, cols), float("nan")).to(dtype)
    arrays = (at(packed.values), at(packed.places), n, place_bits(m))
    library[2].unpack_nm(*arrays, at(dense), 0, rows, rows, cols)
    assert torch.equal(dense, weight)


@pytest.mark.parametrize(
    ("name", "tokens"), [("delta", 3), ("nm", 3), ("fragment", 3), ("pair", 3), ("pair", 50)]
)
def test_inf_is_never_lost(library, name, tokens):
    weight = matrix_for(name, 20, 100, 0.5, torch.bfloat16)
    x, poisoned = torch.randn(tokens, 100).bfloat16(), tokens - 2
    x[poisoned, 37] = float("inf")
    y = run(library, name, PACKINGS[name].from_bitmap(BitmapTensor.from_dense(weight)), x, None)
    assert y.isfinite().all(dim=1).tolist() == [token != poisoned for token in range(tokens)]
    assert not y[poisoned].isfinite().any()


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("cols", [130, 136])
def test_unpack_on_host_threads(library, name, cols):
    weight = matrix_for(name, 40, cols, 0.6, torch.bfloat16)
    packed = PACKINGS[name].from_bitmap(BitmapTensor.from_dense(weight))
    dense = torch.full((20, cols), float("nan")).bfloat16()
    if name == "delta":
        arrays = (packed.values, packed.deltas, packed.row_groups, packed.chunk_cols)
        library[1].unpack_delta(*map(at, arrays), at(dense), 16, 20, 40, cols)
    elif name == "nm":
        arrays = (at(packed.values), at(packed.places), packed.n, place_bits(packed.m))
        library[2].unpack_nm(*arrays, at(dense), 16, 20, 40, cols)
    else:
        offsets = at(packed.offsets if name == "fragment" else None)
        code = 0 if name == "fragment" else 1
        library[0].unpack_strips(code, at(packed.stream), offsets, at(dense), 16, 20, 40, cols)
    assert torch.equal(dense, weight[16:36])


@pytest.mark.parametrize(
    "card", [H200, (84, 1536, 101376, 102400), (108, 2048, 166912, 167936)], ids=["90", "86", "80"]
)
def test_plans_fit_the_card(library, card):
    for rows, cols in [
        (16, 64),
        (1024, 4096),
        (4096, 4096),
        (4096, 11008),
        (8192, 28672),
        (11008, 4096),
        (33, 70000),
    ]:
        for tokens in (1, 2, 3, 8, 9, 16, 17, 32, 33, 64):
            for packing, largest in [(0, 144), (0, 760), (0, 1300), (0, 2176), (1, 1152)]:
                cut = (ctypes.c_int * 7)()
                library[0].plan_strips((ctypes.c_int * 4)(*card), packing, largest, tokens, rows, cols, cut)
                warps, strips, splits, blocks, staged, shared, grid = cut
                case = (rows, cols, tokens, largest, list(cut))
                team = warps // strips
                assert team >= 1, case
                assert warps % strips == blocks % team == staged % team == 0, case
                assert (splits - 1) * blocks < -(-cols // 64) <= splits * blocks, case
                assert shared <= card[2] - 1024, case
                resident = 2 if tokens <= 16 else 1
                assert resident * (shared + 1024) <= card[3], case
                assert 1 <= grid * splits <= max(splits, card[0] * resident), case
