"""What the CUDA half refuses before memory is touched, as far as a machine without a GPU shows it."""

import pytest
import torch
from cuda_weights import matrix_for

from pysparse import backend, ops
from pysparse.formats import PACKINGS, BitmapTensor, DeltaRows
from pysparse.ops.cuda import _check, _check_addresses

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


def packed(name="delta"):
    return PACKINGS[name].from_bitmap(BitmapTensor.from_dense(matrix_for(name, 20, 70, 0.5, torch.bfloat16)))


@pytest.mark.parametrize("name", PACKINGS)
def test_weights_on_the_cpu_are_refused_by_name(name):
    weight = packed(name)
    for call in (
        lambda: ops.packed_linear(torch.zeros(1, 70).bfloat16(), weight),
        lambda: ops.packed_unpack(weight),
    ):
        with pytest.raises(
            ValueError, match="the packed weight is on cpu, its kernels run on CUDA devices only"
        ):
            call()


def test_arrays_on_two_devices_are_named():
    weight = packed()
    mixed = DeltaRows(
        weight.values, weight.deltas.to("meta"), weight.row_groups, weight.chunk_cols, weight.shape
    )
    with pytest.raises(ValueError, match=r"must be on one device, got \['cpu', 'meta'\]"):
        ops.packed_unpack(mixed)
    with pytest.raises(ValueError, match=r"all tensors must be on one device, got \['cpu', 'meta'\]"):
        _check(torch.zeros(1, 70, device="meta").bfloat16(), None, weight.values, weight.deltas)


def test_dtypes_that_do_not_fit_are_named():
    weight = packed()
    with pytest.raises(
        ValueError, match=r"x is torch.float32, the weight torch.bfloat16, the bias torch.bfloat16"
    ):
        _check(torch.zeros(1, 70), torch.zeros(20).bfloat16(), weight.values, weight.deltas)


@pytest.mark.parametrize(
    ("view", "message"),
    [(lambda x: x[4:], "its address is 8 above a multiple"), (lambda x: x[::2], r"strides are \(2,\)")],
)
def test_storage_that_vectors_cannot_be_loaded_from_is_refused(view, message):
    with pytest.raises(
        ValueError, match=f"contiguous and this one start at a multiple of 16 bytes; .*{message}"
    ):
        _check_addresses(view(torch.zeros(64, dtype=torch.bfloat16)), packed().deltas)


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (0, "no CUDA driver is installed"),
        (12080, "the driver supports CUDA 12.8, the kernels need the one of CUDA 13.0 or later"),
        (13000, "the driver shows no CUDA device"),
    ],
)
def test_why_no_device_is_seen(driver, message):
    assert backend.driver_problem(driver, 13000) == message


def test_the_missing_half_is_said_once(recwarn):
    """Without CUDA the package imports, lists no usable kernel, and names the cause."""
    if not backend.cuda_missing_reason():
        pytest.skip("this machine runs the CUDA kernels")
    assert not any(key.supported for key in backend.cuda_kernels())
    if backend._cuda is None:
        with pytest.raises(
            RuntimeError, match=r"CUDA kernels of pysparse are not available \(.+\); build from source"
        ):
            backend.cuda()
    for _ in range(3):
        backend.warn_once("cuda-input-test", f"no kernels: {backend.cuda_missing_reason()}")
    assert [str(w.message) for w in recwarn] == [f"no kernels: {backend.cuda_missing_reason()}"]
