"""Layers that are moved or converted as torch's own are: what they cannot hold is refused before anything changes."""

import copy

import checkpoints
import pytest
import torch
from torch import nn

import pysparse
from pysparse import backend
from pysparse import nn as sparse_nn
from pysparse.nn.lowrank import Adapter, MaskedLowRank

pytestmark = pytest.mark.skipif(not backend.available(), reason=f"no core: {backend.missing_reason()}")


def linear(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(32, 16)
    layer.weight.data = torch.randn(16, 32, generator=generator)
    layer.weight.data.view(16, 8, 4)[:, :, 2:] = 0
    return layer.requires_grad_(False)


def low_rank():
    weight = linear().weight
    return MaskedLowRank(weight, weight != 0, Adapter.fresh((16, 32), 2, 1.0), bias=torch.ones(16))


LAYERS = {
    "sparse": lambda: sparse_nn.SparseLinear.from_dense(linear()),
    "int8": lambda: sparse_nn.CompactLinear.from_dense(linear(), values="int8"),
    "n:m": lambda: sparse_nn.CompactLinear.from_dense(linear(), pattern="2:4"),
    "int8 n:m": lambda: sparse_nn.CompactLinear.from_dense(linear(), values="int8", pattern="2:4"),
    "embedding": lambda: sparse_nn.SparseEmbedding.from_dense(linear().weight),
    "bag": lambda: sparse_nn.SparseEmbeddingBag.from_dense(linear().weight),
    "low rank": low_rank,
}


def call(name, layer):
    ids = torch.arange(12).view(3, 4)
    return layer(ids if name in ("embedding", "bag") else torch.linspace(-1, 1, 96).view(3, 32)).detach()


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_dtype_that_a_layer_cannot_hold_changes_nothing(name, dtype):
    if (name, dtype) == ("low rank", torch.float64):
        pytest.skip("a layer in training computes in float64")
    layer = LAYERS[name]()
    before = copy.deepcopy(layer.state_dict()), call(name, layer), repr(layer)
    said = rf"{type(layer).__name__} holds float32, bfloat16, float16.*, not {str(dtype)[6:]}.*left as it was"
    with pytest.raises(ValueError, match=said):
        layer.to(dtype)
    state = layer.state_dict()
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[key], value) for key, value in before[0].items())
    assert torch.equal(call(name, layer), before[1])
    assert repr(layer) == before[2]


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_meta_and_back(name, assign):
    if name == "low rank" and not assign:
        pytest.skip("its tensors are loaded by torch, which wants assign=True")
    layer = LAYERS[name]()
    before, expected = copy.deepcopy(layer.state_dict()), call(name, layer)
    assert layer.to("meta") is layer
    shapes = {key: (value.shape, value.dtype) for key, value in before.items()}
    assert {key: (value.shape, value.dtype) for key, value in layer.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert type(layer).__name__ in repr(layer)
    if hasattr(layer, "kernel"):
        assert "no data yet" in layer.kernel
        with pytest.raises(RuntimeError, match="no data yet"):
            call(name, layer)
    layer.load_state_dict(before, assign=assign)
    assert torch.equal(call(name, layer), expected)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


def test_a_model_goes_back_to_what_it_was():
    model = nn.Sequential(nn.Embedding(50, 32), linear(0), nn.ReLU(), nn.Linear(16, 32), linear(1)).eval()
    assert len(pysparse.sparsify_(model).sparse) == 2
    ids = torch.arange(50)
    expected, state = model(ids), copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"densify_\(model\) first.*model\.to\(torch\.float32\) takes them back"
    ):
        model.double()
    assert torch.equal(model.to(torch.float32)(ids), expected)
    assert all(tensor.is_meta for tensor in model.to("meta").state_dict().values())
    assert str(model).count("nnz=256, sparsity=0.500") == 2
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(ids), expected)
    pysparse.densify_(model).double()


@pytest.mark.parametrize("name", ["sparse", "int8", "n:m"])
def test_the_kernel_of_half_precision_is_none(name):
    layer = LAYERS[name]()
    assert layer.kernel.startswith("linear-")
    assert layer.half().kernel == "unpack + dense torch: no kernel for torch.float16"
    assert layer.float().kernel.startswith("linear-")


def test_loading_refuses_a_dtype_or_device_that_packed_weights_cannot_have(tmp_path):
    pysparse.save_pretrained(checkpoints.masked("llama"), tmp_path / "model")
    for format in ("sparse", "dense"):
        with pytest.raises(
            ValueError, match=r"dtype float64: packed layers hold float32, bfloat16, float16; load"
        ):
            pysparse.from_pretrained(tmp_path / "model", dtype=torch.float64, format=format)
        for device_map in ("meta", {"": "meta"}):
            with pytest.raises(ValueError, match=r"device_map: .*model.to\('meta'\)"):
                pysparse.from_pretrained(tmp_path / "model", device_map=device_map, format=format)
