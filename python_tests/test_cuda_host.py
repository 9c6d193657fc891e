"""The CUDA half as far as a CPU can prove it: index maps, packers, tensor-core steps."""

import itertools

import pytest
import reference
import torch
from cuda_weights import groups_only, matrix_for, pairs_only
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend
from pysparse.formats import PACKINGS, BitmapTensor, DeltaRows, FragmentBitmap, NMRows, PairBlocks
from pysparse.formats.device import keeps_pairs, most_kept, nm_bytes, nm_pattern

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

DTYPES = [torch.bfloat16, torch.float16]
PATTERNS = [(1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (7, 8), (1, 16), (2, 16), (4, 16), (11, 16)]
SIZES = [(0, 5), (5, 0), (1, 1), (16, 64), (17, 65), (15, 63), (3, 1000), (100, 257), (48, 1024)]


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


@pytest.mark.parametrize("cols", [1, 31, 64, 520, 1100, 4096])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_entry_of_a_group_has_a_place_of_its_own(bits, cols):
    core = backend.core()
    for n in range(1, 1 << bits):
        vectors = core.nm_rows_vectors(n, 1 << bits, cols)
        groups = 8 * vectors // n
        assert 0 <= (groups << bits) - cols < 8 << bits
        found = {core.nm_rows_entry(n, bits, cols, g, r): g for g in range(groups) for r in range(n)}
        assert len(found) == 8 * vectors == groups * n
        assert all(core.nm_rows_group(n, bits, cols, *place) == group for place, group in found.items())
        assert {vector for vector, _ in found} == set(range(vectors))


def test_lanes_read_neighbouring_groups_at_a_time():
    """Entry j of vectors n apart comes from groups beside each other: else all would meet in few banks."""
    core = backend.core()
    for n, bits, cols in [(1, 2, 4096), (2, 3, 4096), (4, 3, 11008), (1, 4, 4096)]:
        for j in range(8):
            groups = [core.nm_rows_group(n, bits, cols, n * run, j) for run in range(16 // n)]
            assert groups == list(range(groups[0], groups[0] + len(groups)))


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
                for half, lane in itertools.product(range(2), range(32)):
                    for i in range(4 * half, 4 * half + 4):
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


def nm_product(packed, x):
    """Multiply as the kernel does: vector after vector of a row, places to columns, the groups by the map."""
    rows, cols = packed.shape
    core, bits = backend.core(), packed.m.bit_length() - 1
    vectors = core.nm_rows_vectors(packed.n, packed.m, cols)
    padded = torch.nn.functional.pad(x.double(), (0, 8 * packed.m))
    data, total = packed.places.tolist(), rows * vectors
    y = torch.zeros(rows, dtype=torch.float64)
    for vector in range(total):
        if bits == 3:
            at = [data[2 * vector], data[2 * vector + 1], data[2 * total + vector]]
        else:
            at = data[bits * vector : bits * (vector + 1)]
        word = int.from_bytes(bytes(at), "little")
        groups = [core.nm_rows_group(packed.n, bits, cols, vector % vectors, j) for j in range(8)]
        columns = [g * packed.m + (word >> bits * j) % packed.m for j, g in enumerate(groups)]
        y[vector // vectors] += packed.values[8 * vector : 8 * vector + 8].double() @ padded[columns]
    return y


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("cols", [5, 300, 1100])
def test_nm_vectors_add_up_to_the_product(n, m, cols):
    weight = groups_only(torch.randn(5, cols).bfloat16(), n, m)
    weight[3] = 0
    x = torch.randn(cols).bfloat16()
    packed = NMRows.from_bitmap(BitmapTensor.from_dense(weight), n, m)
    assert torch.allclose(nm_product(packed, x), weight.double() @ x.double(), atol=1e-9)


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


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 20),
    cols=st.integers(0, 700),
    pattern=st.sampled_from([4, 8, 16]).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_packing_any_pattern(rows, cols, pattern, sparsity, seed):
    torch.manual_seed(seed)
    n, m = pattern
    weight = groups_only(reference.sparse_matrix(rows, cols, sparsity, torch.bfloat16), n, m)
    bitmap = BitmapTensor.from_dense(weight)
    packed = NMRows.from_bitmap(bitmap, n, m)
    assert torch.equal(packed.to_bitmap().to_dense(), weight)
    best = nm_pattern(bitmap)
    assert nm_bytes(*best) <= nm_bytes(n, m)
    assert torch.equal(NMRows.from_bitmap(bitmap).to_bitmap().to_dense(), weight)
    for size in (4, 8, 16):
        groups = torch.nn.functional.pad(weight, (0, -cols % size)).view(rows, -(-cols // size), size)
        counts = groups.count_nonzero(dim=2)
        assert most_kept(bitmap, size) == (int(counts.max()) if counts.numel() else 0)


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
    for n, m in PATTERNS:  # 4096 columns are whole runs
        groups = BitmapTensor.from_dense(groups_only(torch.randn(256, 4096).bfloat16(), n, m))
        assert nm_pattern(groups) == (n, m)
        assert NMRows.from_bitmap(groups).nbytes == nm_bytes(n, m) * entries
    assert [nm_bytes(*pattern) for pattern in [(1, 4), (2, 8), (1, 16)]] == [0.5625, 0.59375, 0.15625]


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (2, 8, r"row 17, group 8 \(columns 64 to 69\) keeps 3 weights; this packing holds 2 of 8"),
        (2, 16, r"row 17, group 4 \(columns 64 to 69\) keeps 3 weights; this packing holds 2 of 16"),
        (4, 4, "pattern 4:4 is none of n:4, n:8 and n:16 with n from 1 to m - 1"),
        (0, 4, "pattern 0:4 is none of"),
        (2, 6, "pattern 2:6 is none of"),
        (2, None, "a pattern is both n and m or neither, got n=2, m=None"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_by_name(n, m, message):
    weight = torch.zeros(20, 70).bfloat16()
    weight[17, 64:67] = 1.0
    with pytest.raises(ValueError, match=message):
        NMRows.from_bitmap(BitmapTensor.from_dense(weight), n, m)


def test_a_weight_without_pattern_is_refused():
    bitmap = BitmapTensor.from_dense(torch.ones(3, 32).bfloat16())
    assert nm_pattern(bitmap) is None
    with pytest.raises(ValueError, match="groups of 4, 8 and 16 columns are all kept whole somewhere"):
        NMRows.from_bitmap(bitmap)


def test_nm_arrays_of_wrong_lengths_are_named():
    packed = NMRows.from_bitmap(BitmapTensor.from_dense(matrix_for("nm", 4, 64, 0.0, torch.bfloat16)), 3, 8)
    short = NMRows(packed.values, packed.places[:-1], 3, 8, packed.shape)
    with pytest.raises(ValueError, match="3:8 of 4 x 64 has 96 values and 36 bytes of places, got 96 and 35"):
        short.to_bitmap()


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
    elif name == "nm":
        packed.places.fill_(255)
    else:
        packed.stream.view(torch.int16).fill_(-1)
        packed.stream.view(torch.int16)[::9] = 0x3F80
    with pytest.raises(ValueError, match="outside|of a matrix with|holds column 7 after column 7"):
        packed.to_bitmap()
