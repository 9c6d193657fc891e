"""Containers: exact round trips, compiled packing against plain torch, and refusal of damaged arrays."""

import dataclasses

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysparse import backend
from pysparse.formats import BitmapTensor, CsrTensor, TiledBitmap
from pysparse.formats.bitmap import pack_bits, unpack_bits

SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (16, 2), (17, 33), (31, 64), (40, 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trips_are_exact(shape, dtype):
    for sparsity in (0.0, 0.6, 1.0):
        weight = reference.sparse_matrix(*shape, sparsity, dtype)
        bitmap = BitmapTensor.from_dense(weight)
        bitmap.validate()
        assert torch.equal(bitmap.to_dense(), weight)
        assert torch.equal(bitmap.keep_mask(), weight != 0)
        tiled = TiledBitmap.from_bitmap(bitmap)
        back = tiled.to_bitmap()
        for name in ("values", "bitmask", "row_offsets"):
            assert torch.equal(getattr(back, name), getattr(bitmap, name))
        csr = CsrTensor.from_dense(weight)
        csr.validate()
        assert torch.equal(csr.to_dense(), weight)
        assert bitmap.nnz == tiled.nnz == csr.nnz == int((weight != 0).sum())


def test_byte_layout_is_the_published_one():
    weight = torch.zeros(2, 10)
    weight[0, 0], weight[0, 9], weight[1, 3] = 1.0, 2.0, 3.0
    bitmap = BitmapTensor.from_dense(weight)
    assert bitmap.bitmask.tolist() == [[1, 2], [8, 0]]  # column j: byte j // 8, bit j % 8
    assert bitmap.row_offsets.tolist() == [0, 2]
    assert bitmap.values.tolist() == [1.0, 2.0, 3.0]
    assert bitmap.nbytes == 3 * 4 + 4 + 2 * 8
    assert (bitmap.density, bitmap.sparsity) == (0.15, 0.85)


def test_compiled_packing_agrees_with_plain_torch(monkeypatch):
    if not backend.available():
        pytest.skip(f"no compiled core: {backend.missing_reason()}")
    weight = reference.sparse_matrix(50, 77, 0.7, torch.bfloat16)
    keep = weight != 0
    keep[7, 7] = True
    compiled = BitmapTensor.from_dense(weight, keep)
    tiled = TiledBitmap.from_bitmap(compiled)
    csr = CsrTensor.from_bitmap(compiled)
    monkeypatch.setattr(backend, "_core", None)
    plain = BitmapTensor.from_dense(weight, keep)
    plain_tiled = TiledBitmap.from_bitmap(plain)
    for name in ("values", "bitmask", "row_offsets"):
        assert torch.equal(getattr(compiled, name), getattr(plain, name))
    for name in ("values", "masks", "tile_offsets"):
        assert torch.equal(getattr(tiled, name), getattr(plain_tiled, name))
    assert torch.equal(csr.col_indices, CsrTensor.from_bitmap(plain).col_indices)
    assert torch.equal(plain_tiled.to_bitmap().values, compiled.values)
    plain.validate()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), cols=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_bits_round_trip(rows, cols, seed):
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > 0.5
    assert torch.equal(unpack_bits(pack_bits(keep), cols), keep)


def damaged():
    def offsets(b):
        wrong = b.row_offsets.clone()
        wrong[3] += 1
        return dataclasses.replace(b, row_offsets=wrong)

    def bit(b):
        wrong = b.bitmask.clone()
        wrong[2, 0] ^= 1
        return dataclasses.replace(b, bitmask=wrong)

    def tail(b):
        wrong = b.bitmask.clone()
        wrong[2, -1] |= 128
        return dataclasses.replace(b, bitmask=wrong)

    return [
        (offsets, r"row_offsets\[3\] is"),
        (bit, r"row_offsets\[3\] is .*, but the bits of the rows before it count"),
        (tail, "bits set beyond column 29"),
        (lambda b: dataclasses.replace(b, values=b.values[:-1]), "values, but .* are stored"),
        (lambda b: dataclasses.replace(b, values=b.values.double()), "values must be a float vector"),
        (lambda b: dataclasses.replace(b, bitmask=b.bitmask[:, :-1]), "bitmask must be uint8"),
        (lambda b: dataclasses.replace(b, row_offsets=b.row_offsets[1:]), "row_offsets must be int64"),
        (lambda b: dataclasses.replace(b, shape=(10, 29)), "bits set beyond|row_offsets|but .* are stored"),
        (lambda b: dataclasses.replace(b, row_offsets=b.row_offsets.int()), "row_offsets must be int64"),
    ]


@pytest.mark.parametrize("with_core", [True, False])
@pytest.mark.parametrize(("damage", "message"), damaged())
def test_damaged_bitmaps_are_refused(damage, message, with_core, monkeypatch):
    weight = reference.sparse_matrix(10, 30, 0.5, torch.float32)
    weight[:, 29] = 1.0  # so that cutting the last column off leaves a bit outside
    bitmap = damage(BitmapTensor.from_dense(weight))
    if not with_core:
        monkeypatch.setattr(backend, "_core", None)
    with pytest.raises(ValueError, match=message):
        bitmap.validate()


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 dimensions"):
        BitmapTensor.from_dense(torch.zeros(3))
    with pytest.raises(ValueError, match="float32, bfloat16, float16; got torch.int64"):
        BitmapTensor.from_dense(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="keep is a bool mask"):
        BitmapTensor.from_dense(torch.zeros(3, 3), torch.ones(2, 3, dtype=torch.bool))


def test_csr_speaks_scipy_and_torch():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    weight = reference.sparse_matrix(20, 31, 0.7, torch.float32)
    csr = CsrTensor.from_dense(weight)
    assert (csr.to_scipy().toarray() == weight.numpy()).all()
    back = CsrTensor.from_scipy(scipy_sparse.coo_array(weight.numpy()))
    assert torch.equal(back.to_dense(), weight)
    with pytest.warns(UserWarning, match="Sparse"):
        as_torch = csr.to_torch()
    assert torch.equal(as_torch.to_dense(), weight)
    assert torch.equal(CsrTensor.from_torch(as_torch).to_dense(), weight)
    with pytest.raises(ValueError, match="torch.sparse_csr"):
        CsrTensor.from_torch(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_offsets": torch.tensor([0, 2, 1, 3])}, "must ascend"),
        ({"row_offsets": torch.tensor([0, 1, 2, 4])}, "must ascend from 0 to 3"),
        ({"col_indices": torch.tensor([0, 5, 1], dtype=torch.int32)}, r"must lie in \[0, 4\)"),
        ({"col_indices": torch.tensor([2, 2, 1], dtype=torch.int32)}, "ascend within each row"),
        ({"col_indices": torch.tensor([0, -1, 1], dtype=torch.int32)}, r"must lie in \[0, 4\)"),
    ],
)
def test_damaged_csr_is_refused(change, message):
    good = CsrTensor(
        torch.tensor([0, 2, 2, 3]), torch.tensor([0, 2, 1], dtype=torch.int32), torch.ones(3), (3, 4)
    )
    good.validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change).validate()
