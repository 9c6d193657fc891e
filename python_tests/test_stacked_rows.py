"""Device packings one after the other as one packing: byte for byte that of the concatenated matrix."""

import pytest
import torch
from cuda_weights import pack_for_stacking, stackable_weights

from pysparse import backend
from pysparse.formats import PACKINGS, BitmapTensor, FragmentBitmap, NMRows, PairBlocks
from pysparse.formats.stacked import stack_rows
from pysparse.ops import cuda

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
NAMES = list(PACKINGS)
HEIGHTS = [(16, 32, 7), (48, 16), (16, 16, 16, 16)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heights", HEIGHTS, ids=str)
@pytest.mark.parametrize("cols", [1, 130, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stacked_rows_are_those_of_one_packed_matrix(name, heights, cols, dtype):
    dense = stackable_weights(name, heights, cols, dtype=dtype)
    packed = [pack_for_stacking(name, weight) for weight in dense]
    whole, parts = stack_rows(packed)
    expected = pack_for_stacking(name, torch.cat(dense))
    assert cuda.sizes(whole) == cuda.sizes(expected)
    assert whole.shape == expected.shape
    for actual, wanted in zip(cuda.arrays(whole), cuda.arrays(expected), strict=True):
        assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))
    for part, before, weight in zip(parts, packed, dense, strict=True):
        for actual, wanted in zip(cuda.arrays(part), cuda.arrays(before), strict=True):
            assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(part.to_bitmap().to_dense(), weight)


@pytest.mark.parametrize("name", NAMES)
def test_parts_hold_no_second_copy_of_the_values(name):
    whole, parts = stack_rows(
        [pack_for_stacking(name, weight) for weight in stackable_weights(name, (16, 32, 7), 200)]
    )
    storage = cuda.arrays(whole)[0].untyped_storage().data_ptr()
    assert all(cuda.arrays(part)[0].untyped_storage().data_ptr() == storage for part in parts)
    assert all(array.is_contiguous() for part in parts for array in cuda.arrays(part))
    assert all(cuda.arrays(part)[0].data_ptr() % 16 == storage % 16 for part in parts)


def test_what_cannot_be_stacked_is_named():
    def refused(*packings):
        with pytest.raises(ValueError, match="cannot be stacked: ") as caught:
            stack_rows(packings)
        return str(caught.value).partition("stacked: ")[2]

    def fragment(rows, cols, dtype=torch.bfloat16):
        return FragmentBitmap.from_bitmap(BitmapTensor.from_dense(torch.ones(rows, cols, dtype=dtype)))

    delta = pack_for_stacking("delta", torch.ones(16, 64).bfloat16())
    assert refused() == "there are none"
    assert refused(delta, fragment(16, 64)) == "they are delta and fragment"
    assert refused(fragment(16, 64), fragment(16, 65)) == "they have 64, 65 columns"
    assert refused(fragment(16, 64), fragment(16, 64, torch.float16)) == "they differ in dtype or device"
    assert refused(fragment(17, 64), fragment(16, 64)) == "17 rows are no multiple of 16"
    zeros = BitmapTensor.from_dense(torch.zeros(16, 64).bfloat16())
    places = [NMRows.from_bitmap(zeros, n, m) for n, m in ((1, 4), (2, 4), (2, 8))]
    assert refused(places[0], places[1]) == "their patterns are 1:4, 2:4"
    assert refused(places[2], places[2]) == "with m = 8 the third bits of all places lie behind the others"
    loose = PairBlocks.from_bitmap(BitmapTensor.from_dense(torch.zeros(3, 64).bfloat16()))
    assert refused(loose, loose) == "3 rows are no multiple of 16"
