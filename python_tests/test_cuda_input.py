"""What the CUDA half refuses before memory is touched, as far as a machine without a GPU shows it."""

import pytest
import torch
from cuda_weights import matrix_for

from pysparse import backend, ops
from pysparse.formats import PACKINGS, BitmapTensor, DeltaRows
from pysparse.formats.device import chunk_slots
from pysparse.nn import SparseLinear
from pysparse.nn.device import DeviceWeight
from pysparse.ops import cuda
from pysparse.ops.cuda_input import check_arrays, check_input

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
        check_input(torch.zeros(1, 70, device="meta").bfloat16(), None, weight.values, (20, 70))


def test_dtypes_that_do_not_fit_are_named():
    weight = packed()
    with pytest.raises(
        ValueError, match=r"x is torch.float32, the weight torch.bfloat16, the bias torch.bfloat16"
    ):
        check_input(torch.zeros(1, 70), torch.zeros(20).bfloat16(), weight.values, (20, 70))


@pytest.mark.parametrize(
    ("view", "message"),
    [(lambda x: x[4:], "the address is 8 above a multiple"), (lambda x: x[::2], r"strides are \(2,\)")],
)
def test_storage_that_vectors_cannot_be_loaded_from_is_refused(view, message):
    with pytest.raises(
        ValueError,
        match=f"values of a packed weight must be contiguous and .* multiple of 16 bytes; .*{message}",
    ):
        check_arrays(view(torch.zeros(64, dtype=torch.bfloat16)))


class Unreachable:
    """Where the compiled module would be: no call may come this far."""

    PAIR_BLOCK_BYTES = 1152

    def __getattr__(self, name):
        raise AssertionError(f"{name} of the compiled module was reached")


@pytest.fixture
def no_launch(monkeypatch):
    monkeypatch.setattr(backend, "cuda", Unreachable)
    monkeypatch.setattr(cuda, "max_tokens", lambda *_: 8)


def product(weight, x, bias=None, arrays=None, shape=None):
    """Call what runs for CUDA tensors, on the CPU."""
    run = cuda.OPERATIONS[f"{'nm_rows' if weight.name == 'nm' else weight.name}_linear"][0]
    return run(x, *(arrays or cuda.arrays(weight)), bias, *(shape or weight.shape), *cuda.sizes(weight))


def zeros(*shape):
    return torch.zeros(*shape).bfloat16()


@pytest.mark.parametrize("name", PACKINGS)
def test_inputs_of_another_width_are_refused(no_launch, name):
    weight = packed(name)
    for cols in (30, 69, 71, 90):
        with pytest.raises(ValueError, match=f"x has {cols} features, the weight takes 70"):
            product(weight, zeros(1, cols))
    with pytest.raises(ValueError, match="x has no dimension, the weight takes 70"):
        product(weight, torch.tensor(1.0).bfloat16())
    with pytest.raises(AssertionError, match="was reached"):  # what fits does get there
        product(weight, zeros(1, 70))


@pytest.mark.parametrize("name", PACKINGS)
def test_biases_of_another_shape_are_refused(no_launch, name):
    weight = packed(name)
    for shape in ((5,), (1,), (21,), (20, 20), ()):
        with pytest.raises(
            ValueError, match=rf"the bias has shape \({', ?'.join(map(str, shape))},?\), .* 20 features"
        ):
            product(weight, zeros(1, 70), torch.zeros(shape).bfloat16())


@pytest.mark.parametrize("name", PACKINGS)
def test_arrays_that_are_not_those_of_the_weight_are_refused(no_launch, name):
    weight, x = packed(name), zeros(1, 70)
    first, *rest = cuda.arrays(weight)
    if name != "fragment":  # whose length only the offsets know, and they are on the device
        with pytest.raises(ValueError, match="got"):
            product(weight, x, arrays=(first[:-16], *rest))
    with pytest.raises(ValueError, match=r"got|blocks"):
        product(weight, zeros(1, 70), shape=(40, 70))
    for i, array in enumerate(rest):
        strided = torch.stack((array, array), dim=1)[:, 0]
        for wrong, message in (
            (array.long(), f"is {array.dtype}, got torch.int64"),
            (strided, r"contiguous .* the strides are \(2,\)"),
            (array.to("meta"), r"on one device, got \['cpu', 'meta'\]"),
            (array[:-1], "got"),
        ):
            with pytest.raises(ValueError, match=message):
                product(weight, x, arrays=(first, *rest[:i], wrong, *rest[i + 1 :]))


def test_the_length_of_delta_rows_is_the_cores():
    for rows, groups in ((0, 0), (1, 0), (3, 63), (3, 64), (7, 1000), (28672, 1 << 22)):
        assert chunk_slots(rows, groups) == backend.core().delta_chunk_slots(rows, groups)


@pytest.mark.parametrize("name", PACKINGS)
def test_a_layer_says_which_width_it_takes(no_launch, name):
    weight = packed(name)
    layer = SparseLinear.from_bitmap(weight.to_bitmap())
    held = DeviceWeight(name, layer.nnz, cuda.sizes(weight), 8, 8, "asked for")
    for field, array in zip(held.names, cuda.arrays(weight), strict=True):
        layer.register_buffer(field, array, persistent=False)
    layer._device_weight, layer.values, layer.masks, layer.tile_offsets = held, None, None, None
    with pytest.raises(ValueError, match="x has 69 features, the layer takes 70"):
        layer(zeros(1, 69))


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
