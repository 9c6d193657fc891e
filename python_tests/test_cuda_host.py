"""The CUDA half as far as a CPU can prove it: index maps, packers, tensor-core steps, gate, machine code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend
from pysparse.formats import PACKINGS, BitmapTensor, DeltaRows, FragmentBitmap, PairBlocks
from pysparse.formats.device import keeps_pairs
from pysparse.nn import SparseLinear
from pysparse.nn.device import TOKENS_VARIABLE, DeviceWeight, expected_tokens, predict
from pysparse.nn.device_costs import DeviceCosts, device_costs

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

ROOT = Path(__file__).parents[1]
DTYPES = [torch.bfloat16, torch.float16]
SIZES = [(0, 5), (5, 0), (1, 1), (16, 64), (17, 65), (15, 63), (3, 1000), (100, 257), (48, 1024)]


def pairs_only(weight):
    """Zero two of every four columns, which two differing from group to group."""
    rows, cols = weight.shape
    draws = torch.rand(rows, -(-cols // 4), 4)
    keep = (draws.unsqueeze(3) > draws.unsqueeze(2)).sum(dim=3) >= 2
    return weight * keep.reshape(rows, -(-cols // 4) * 4)[:, :cols]


def matrix_for(name, rows, cols, sparsity, dtype):
    weight = reference.sparse_matrix(rows, cols, sparsity, dtype)
    return pairs_only(weight) if name == "pair" else weight


# ---- maps -----------------------------------------------------------------------------------------------------


def test_fragment_slots_cover_each_weight_once():
    core = backend.core()
    places = [core.fragment_place(lane, q, i) for q in range(4) for lane in range(32) for i in range(8)]
    assert sorted(places) == [(r, c) for r in range(16) for c in range(64)]


def test_pair_groups_cover_each_weight_once():
    core = backend.core()
    places = [
        core.pair_place(m, lane, i, at) for m in (0, 1) for lane in range(32) for i in (0, 2, 4, 6) for at in range(4)
    ]  # fmt: skip
    assert sorted(places) == [(r, c) for r in range(16) for c in range(64)]


@pytest.mark.parametrize("pair", [False, True])
def test_input_words_are_a_permutation(pair):
    assert sorted(backend.core().input_word(pair, w) for w in range(32)) == list(range(32))


# The operands of the tensor cores as the PTX manual draws them, without any permutation of ours.
def a_row(lane, i):
    return lane // 4 + 8 * (i // 2 % 2)


def a_col(lane, i):
    return 2 * (lane % 4) + i % 2 + 8 * (i // 4)


def staged(x, block, pair):
    """Return a token's 64 inputs of a block in the order in which shared memory holds them."""
    words = torch.nn.functional.pad(x, (0, -x.numel() % 64))[64 * block : 64 * block + 64].view(32, 2)
    order = torch.tensor([backend.core().input_word(pair, w) for w in range(32)])
    result = torch.empty_like(words)
    result[order] = words
    return result.view(-1)


def fragment_product(stream, offsets, rows, cols, x):
    """Multiply as the kernel does: masks to operands, staged inputs to operands, four m16n8k16 a block."""
    strips, blocks = -(-rows // 16), -(-cols // 64)
    y = torch.zeros(16 * strips, dtype=torch.float64)
    halves = stream.view(torch.int16)
    for strip in range(strips):
        for block in range(blocks):
            at = int(offsets[strip * blocks + block]) * 8
            masks = halves[at : at + 64].view(torch.int32).tolist()
            values, used = stream[at + 64 :].double(), 0
            inputs = staged(x, block, pair=False).double()
            for q in range(4):
                a, b = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
                for lane in range(32):
                    for i in range(8):
                        if masks[lane] >> (8 * q + i) & 1:
                            a[a_row(lane, i), a_col(lane, i)] = values[used]
                            used += 1
                for t in range(4):  # lane t of token 0: 16 staged inputs, 4 for each of the 4 products
                    b[[2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]] = inputs[16 * t + 4 * q : 16 * t + 4 * q + 4]
                y[16 * strip : 16 * strip + 16] += a @ b
    return y[:rows]


def pair_product(stream, rows, cols, x):
    """Multiply as the kernel does: two mma.sp.m16n8k32 a block, metadata from lanes 0, 1 or 2, 3 of each quad."""
    strips, blocks = -(-rows // 16), -(-cols // 64)
    y = torch.zeros(16 * strips, dtype=torch.float64)
    halves = stream.view(torch.int16)
    for strip in range(strips):
        for block in range(blocks):
            at = (strip * blocks + block) * 576
            metadata = [word & 0xFFFFFFFF for word in halves[at : at + 64].view(torch.int32).tolist()]
            values = stream[at + 64 : at + 576].view(2, 32, 8).double()
            inputs = staged(x, block, pair=True).double()
            for m in range(2):
                a, b = torch.zeros(16, 32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
                for lane in range(32):
                    for i in range(8):
                        row, compressed = a_row(lane, i), a_col(lane, i)
                        group = compressed // 2
                        word = metadata[4 * (row % 8) + 2 * m + group // 4]  # thread pair m of the quad
                        code = word >> (16 * (row // 8) + 4 * (group % 4) + 2 * (compressed % 2)) & 3
                        a[row, 4 * group + code] += values[m, lane, i]
                for t in range(4):
                    for j in range(4):
                        b[8 * j + 2 * t : 8 * j + 2 * t + 2] = inputs[16 * t + 8 * m + 2 * j :][:2]
                y[16 * strip : 16 * strip + 16] += a @ b
    return y[:rows]


@pytest.mark.parametrize(("rows", "cols"), [(16, 64), (19, 130), (1, 5)])
def test_tensor_core_steps_add_up_to_the_product(rows, cols):
    x = torch.randn(cols).bfloat16()
    weight = matrix_for("fragment", rows, cols, 0.6, torch.bfloat16)
    packed = FragmentBitmap.from_bitmap(BitmapTensor.from_dense(weight))
    exact = weight.double() @ x.double()
    assert torch.allclose(fragment_product(packed.stream, packed.offsets, rows, cols, x), exact, atol=1e-9)
    weight = matrix_for("pair", rows, cols, 0.1, torch.bfloat16)
    packed = PairBlocks.from_bitmap(BitmapTensor.from_dense(weight))
    assert torch.allclose(pair_product(packed.stream, rows, cols, x), weight.double() @ x.double(), atol=1e-9)


def delta_product(packed, x):
    """Multiply as the kernel does: each chunk from its own start, in any order."""
    rows = packed.shape[0]
    padded = torch.nn.functional.pad(x.double(), (0, 8))
    y = torch.zeros(rows, dtype=torch.float64)
    groups = packed.row_groups.tolist()
    steps = torch.stack([packed.deltas >> (4 * i) & 15 for i in range(8)], dim=1) + 1
    for row in range(rows):
        for chunk, first in enumerate(range(groups[row], groups[row + 1], 64)):
            last = min(first + 64, groups[row + 1])
            start = int(packed.chunk_cols[groups[row] // 64 + row + chunk])
            columns = start + steps[first:last].flatten().cumsum(0)
            y[row] += packed.values[8 * first : 8 * last].double() @ padded[columns]
    return y


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_delta_chunks_start_where_they_say(sparsity):
    weight = reference.sparse_matrix(40, 3000, sparsity, torch.float16)
    packed = DeltaRows.from_bitmap(BitmapTensor.from_dense(weight))
    x = torch.randn(3000).half()
    assert torch.allclose(delta_product(packed, x), weight.double() @ x.double(), atol=1e-8)


# ---- packers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_and_back_is_exact(name, dtype):
    for rows, cols in SIZES:
        for sparsity in (0.0, 0.5, 0.95, 1.0):
            weight = matrix_for(name, rows, cols, sparsity, dtype)
            bitmap = BitmapTensor.from_dense(weight)
            back = PACKINGS[name].from_bitmap(bitmap).to_bitmap()
            back.validate()
            assert torch.equal(back.values, bitmap.values)
            assert torch.equal(back.bitmask, bitmap.bitmask)
            assert torch.equal(back.row_offsets, bitmap.row_offsets)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    sparsity=st.floats(0, 1),
    name=st.sampled_from(list(PACKINGS)),
    seed=st.integers(0, 2**31),
)
def test_packing_random_shapes(rows, cols, sparsity, name, seed):
    torch.manual_seed(seed)
    weight = matrix_for(name, rows, cols, sparsity, torch.bfloat16)
    packed = PACKINGS[name].from_bitmap(BitmapTensor.from_dense(weight))
    assert torch.equal(packed.to_bitmap().to_dense(), weight)


@pytest.mark.parametrize("name", PACKINGS)
def test_kept_zeros_and_odd_bits_survive(name):
    weight = torch.tensor(
        [[0.0, -0.0, 0, 0, 0, 0, 0, 0, float("inf"), float("nan"), 0, 0, 1e-40, -1e-40, 0, 0]]
    )
    weight = weight.bfloat16().repeat(3, 20)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep[:, 0::4] = keep[:, 1::4] = True
    keep[2] = False
    bitmap = BitmapTensor.from_dense(weight, keep)
    back = PACKINGS[name].from_bitmap(bitmap).to_bitmap()
    unsigned = torch.where(bitmap.values == 0, torch.zeros_like(bitmap.values), bitmap.values)
    assert torch.equal(back.values.view(torch.int16), unsigned.view(torch.int16))
    assert torch.equal(back.bitmask, bitmap.bitmask)


def test_bytes_per_entry_are_as_promised():
    weight = reference.sparse_matrix(256, 4096, 0.7, torch.bfloat16)
    bitmap = BitmapTensor.from_dense(weight)
    p, entries = bitmap.density, weight.numel()
    assert DeltaRows.from_bitmap(bitmap).nbytes < (2.5 * p / (1 - (1 - p) ** 16) + 0.02) * entries
    assert FragmentBitmap.from_bitmap(bitmap).nbytes < (2 * p + 0.141) * entries
    pairs = BitmapTensor.from_dense(pairs_only(torch.randn(256, 4096).bfloat16()))
    assert PairBlocks.from_bitmap(pairs).nbytes == 1.125 * entries


def test_pairs_refuse_three_of_four_and_name_the_place():
    weight = torch.zeros(20, 80).bfloat16()
    weight[17, 69:72] = 1.0
    bitmap = BitmapTensor.from_dense(weight)
    assert not keeps_pairs(bitmap)
    with pytest.raises(ValueError, match=r"row 17, columns 68 to 71 keep 3 weights; .* two of four"):
        PairBlocks.from_bitmap(bitmap)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (1, 8), (1, 16)])
def test_patterns_that_embed_in_two_of_four(kept, group):
    draws = torch.rand(24, 128 // group, group)
    keep = (draws.unsqueeze(3) > draws.unsqueeze(2)).sum(dim=3) >= group - kept
    bitmap = BitmapTensor.from_dense((torch.randn(24, 128) * keep.view(24, 128)).bfloat16())
    assert keeps_pairs(bitmap)
    assert torch.equal(PairBlocks.from_bitmap(bitmap).to_bitmap().to_dense(), bitmap.to_dense())


@pytest.mark.parametrize("name", PACKINGS)
def test_float32_is_refused(name):
    with pytest.raises(ValueError, match="bfloat16 or float16 values, got torch.float32"):
        PACKINGS[name].from_bitmap(BitmapTensor.from_dense(torch.zeros(4, 4)))


@pytest.mark.parametrize("name", PACKINGS)
def test_corrupt_packings_do_not_unpack_outside_the_matrix(name):
    weight = matrix_for(name, 20, 70, 0.5, torch.bfloat16)
    packed = PACKINGS[name].from_bitmap(BitmapTensor.from_dense(weight))
    if name == "delta":
        packed.deltas.fill_(-1)
    else:
        packed.stream.view(torch.int16).fill_(-1)
        packed.stream.view(torch.int16)[::9] = 0x3F80
    with pytest.raises(ValueError, match="outside|of a matrix with"):
        packed.to_bitmap()


# ---- choice and gate ----------------------------------------------------------------------------------------------


@pytest.fixture
def roomy(monkeypatch):
    """A device that takes every kernel, and costs like a fast GPU's: delta by the weight, fragment by the entry."""
    monkeypatch.setattr("pysparse.ops.max_tokens", lambda packing, cols: 8 if packing == "delta" else 32)
    counts = (1, 2, 4, 8, 16, 32)
    costs = DeviceCosts(
        "a GPU",
        {
            "cublas": {n: (5.0, 0.24, 0.0) for n in counts},
            "delta": {n: (2.5, 0.27 + 0.04 * n, 0.015 * n) for n in counts[:4]},
            "fragment": {n: (4.0, 0.1, 0.3 + 0.01 * n) for n in counts},
            "pair": {n: (2.5, 0.28 + 0.01 * n, 0.0) for n in counts},
        },
    )
    monkeypatch.setattr("pysparse.nn.device.device_costs", lambda: costs)
    return costs


def test_the_packing_follows_density_and_pattern(roomy):
    def packing(sparsity, tokens, rows=4096, cols=4096):
        bitmap = BitmapTensor.from_dense(reference.sparse_matrix(rows, cols, sparsity, torch.bfloat16))
        return predict(bitmap, tokens).packing

    assert [packing(s, 1) for s in (0.9, 0.7, 0.5, 0.1, 0.0)] == ["delta", "delta", "delta", "dense", "dense"]
    assert [packing(s, 8) for s in (0.9, 0.5)] == ["delta", "fragment"]
    assert packing(0.9, 64) == "dense"
    assert packing(0.0, 1, 16, 64) == "dense"  # saves no memory, whatever the microseconds of a tiny layer
    pairs = BitmapTensor.from_dense(pairs_only(torch.randn(1024, 1024).bfloat16()))
    assert predict(pairs, 8).packing == "pair"


def test_a_prediction_says_where_it_loses(roomy):
    bitmap = BitmapTensor.from_dense(reference.sparse_matrix(4096, 4096, 0.5, torch.bfloat16))
    found = predict(bitmap)
    dense, delta = (roomy.microseconds(k, 1, bitmap.shape, bitmap.density) for k in ("cublas", "delta"))
    assert found.why == f"50% sparse, {dense / delta:.2g}x dense expected at 1 token (figures of a GPU)"
    assert found.pays_to == 2
    weight = DeviceWeight("delta", bitmap.nnz, 0, 8, found.pays_to, "why")
    assert weight.describe(torch.bfloat16, "auto") == (
        "linear-delta-bfloat16-cuda up to 8 tokens (expected no faster than dense from 3 on), "
        "unpack + torch beyond: why"
    )
    assert weight.describe(torch.bfloat16, "packed") == (
        "linear-delta-bfloat16-cuda up to 2 tokens, a dense copy beyond: why"
    )


def test_costs_between_and_beyond_what_was_measured(roomy):
    assert roomy.microseconds("delta", 3, (64, 64), 0.5) == roomy.microseconds("delta", 4, (64, 64), 0.5)
    assert roomy.microseconds("delta", 9, (64, 64), 0.5) == float("inf")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_expected_tokens_must_be_a_number(monkeypatch, text):
    monkeypatch.setenv(TOKENS_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{TOKENS_VARIABLE}={text} is not a number of tokens from 1"):
        expected_tokens()
    monkeypatch.delenv(TOKENS_VARIABLE)
    assert expected_tokens() == 1


def test_the_committed_costs_cover_each_kernel():
    costs = device_costs()
    assert costs.lines.keys() == {"cublas", *PACKINGS}
    for by_tokens in costs.lines.values():
        assert 1 in by_tokens
        assert all(c >= 0 for line in by_tokens.values() for c in line)
    assert costs.microseconds("delta", 1, (4096, 4096), 0.3) < costs.microseconds(
        "cublas", 1, (4096, 4096), 0.3
    )


def test_a_fit_finds_the_line_behind_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import vouch_cuda

    rows = [
        {
            "microseconds": 3 + 0.25 * mb + 0.1 * rows * 4096 / 1e6,
            "bytes": mb * 1e6,
            "rows": rows,
            "cols": 4096,
            "sparsity": mb,
        }
        for rows in (1024, 4096, 11008)
        for mb in (5, 20)
    ]
    line, worst = vouch_cuda.fit(rows)
    assert line == pytest.approx([3, 0.25, 0.1], abs=1e-3)
    assert worst < 1e-9


def test_each_report_vouches_for_what_it_ran(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import vouch_cuda

    row = {
        "kernel": "delta",
        "tokens": 1,
        "microseconds": 4,
        "bytes": 4e6,
        "rows": 64,
        "cols": 64,
        "sparsity": 0.5,
    }
    machine = {"gpu": "a GPU", "date": "today"}

    def report(name, hashes, wrong=()):
        text = {"machine": machine, "source_hashes": hashes, "rows": [row], "wrong": list(wrong)}
        path = tmp_path / name
        path.write_text(json.dumps(text))
        return path

    log = tmp_path / "test.log"
    log.write_text("== 3 passed in 1.00s ==\n")
    first, second = report("a.json", {"delta": "d"}), report("b.json", {"pruning": "p", "shapley": "s"})
    assert vouch_cuda.vouch(first, log, second)["source_hashes"] == {
        "delta": "d",
        "pruning": "p",
        "shapley": "s",
    }
    with pytest.raises(ValueError, match="wrong: \\['sweep'\\]"):
        vouch_cuda.vouch(first, log, report("c.json", {}, ["sweep"]))
    log.write_text("1 failed, 3 passed")
    with pytest.raises(ValueError, match="ends with: 1 failed"):
        vouch_cuda.vouch(first, log)


def test_without_a_device_the_gate_says_why_and_import_works():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert backend.cuda_missing_reason()
    assert backend.cuda_gate("delta") == backend.cuda_missing_reason()
    assert not any(key.supported for key in backend.cuda_kernels())


@pytest.mark.skipif(backend._cuda is None, reason="built without CUDA")
@pytest.mark.parametrize("vouched", [True, False])
def test_the_gate_opens_for_the_sources_of_a_report_only(tmp_path, vouched, monkeypatch):
    monkeypatch.delenv(backend.UNVALIDATED_VARIABLE, raising=False)
    hashes = backend.cuda().SOURCE_HASHES if vouched else {"delta": "0" * 64}
    (tmp_path / "report.json").write_text(json.dumps({"source_hashes": hashes}))
    code = (
        "from pathlib import Path\nfrom pysparse import backend\n"
        f"backend.CUDA_REPORT = Path({str(tmp_path / 'report.json')!r})\n"
        "backend.cuda_missing_reason = lambda: ''\nprint(repr(backend.cuda_gate('delta')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip() == "''") is vouched, done.stdout
    asked = {**os.environ, backend.UNVALIDATED_VARIABLE: "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=asked)
    assert done.stdout.strip() == "''"


def test_a_layer_moves_between_dtypes_and_devices_of_one_kind():
    linear = torch.nn.Linear(70, 30).bfloat16()
    linear.weight.data[torch.rand(30, 70) < 0.6] = 0
    layer = SparseLinear.from_dense(linear)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer = layer.to("cpu").half().bfloat16()
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert torch.equal(after["bitmask"], before["bitmask"])


# ---- machine code ---------------------------------------------------------------------------------------------------

# Registers at which the wanted number of threads still fits on a multiprocessor with 65536.
BUDGETS = [
    (r"delta_linear_kernel.*Li[124]E", 64),  # 1024 threads
    (r"delta_linear_kernel.*Li8E", 128),  # 512
    (r"strip_linear_kernel.*Li[12]ELi3ELi2E", 64),  # two blocks of 512
    (r"strip_linear_kernel.*Li4ELi4ELi1E", 128),  # one block of 512
    (r"attention_kernel", 255),  # two blocks of 128
    (r"find_stripes_kernel", 128),  # four of 128
    (r"unpack_kernel|add_parts_kernel|count_stripes_kernel|list_stripes_kernel", 64),
    (r"fm_walk_kernel", 128),  # 512: more do not fit into shared memory
    (r"embedding_\w+_kernel|words_kernel|swap_kernel|add_kernel", 64),  # 1024 threads
    (r"select_\w+_kernel|sweep_kernel", 64),
    (r"update_kernel", 128),  # 512
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compile_cuda(source, arch, target):
    command = [
        "nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cuda",
        "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-cubin",
        "-o", str(target), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "source",
    ["delta", "fragment", "pair", "strip", "attention", "stripes", "embedding", "shapley", "pruning"],
)
def test_no_spills_and_registers_within_budget(source, arch, tmp_path):
    log = compile_cuda(ROOT / f"csrc/cuda/{source}.cu", arch, tmp_path / "out.cubin")
    pattern = (
        r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) .*\n.*Used (\d+) registers"
    )
    found = re.findall(pattern, log)
    assert found
    for function, *numbers in found:
        stack, stores, loads, registers = map(int, numbers)
        assert stack == stores == loads == 0, function
        budget = next(limit for name, limit in BUDGETS if re.search(name, function))
        assert registers <= budget, (function, registers)
    disassembler = shutil.which("nvdisasm")
    if disassembler is None:
        return
    code = subprocess.run(
        [disassembler, str(tmp_path / "out.cubin")], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"\b(LDL|STL)\b", code)
    expected = {
        "delta": ["LDG.E.EF.128"],
        "fragment": ["HMMA.16816", "LDGSTS.E.BYPASS.128"],
        "pair": ["HMMA.SP"],
        "attention": ["HMMA.16816", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "MUFU.EX2"],
        "stripes": ["HMMA.16816", "LDSM.16.M88.4"],
        "shapley": ["IMAD.WIDE.U32", "MUFU.RCP"],
        "pruning": ["ATOMS.POPC.INC.32"],  # a histogram's equal digits in one step
    }
    for instruction in expected.get(source, []):
        assert instruction in code, instruction
    if source == "fragment":
        assert "POPC" not in code  # 16 a cycle would be the wall
