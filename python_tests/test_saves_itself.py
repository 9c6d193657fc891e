"""Models that became sparse, or dense again, in memory: what transformers' own save_pretrained writes of them."""

import copy
import json

import checkpoints
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import pysparse


@pytest.fixture(scope="module")
def dense():
    return checkpoints.masked("llama")


@pytest.mark.parametrize("how", [{}, {"values": "int8"}, {"pattern": "2:4"}], ids=str)
def test_a_model_that_became_sparse_in_memory_saves_itself(dense, tmp_path, how):
    model = copy.deepcopy(dense)
    if "pattern" in how:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.view(-1, 4)[:, 2:] = 0
    pysparse.sparsify_(model, min_sparsity=0.3, **how)
    model.save_pretrained(tmp_path / "own")
    ids = tiny_models.tokens(1, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for load in (AutoModelForCausalLM.from_pretrained, pysparse.from_pretrained):
            assert torch.equal(load(tmp_path / "own")(input_ids=ids).logits, expected)
        inner = model.base_model
        inner.save_pretrained(tmp_path / "inner")
        again = AutoModel.from_pretrained(tmp_path / "inner")
        assert torch.equal(again(input_ids=ids).last_hidden_state, inner(input_ids=ids).last_hidden_state)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["quantization_config"]["nnz"]


def test_a_model_that_is_dense_again_saves_ordinary_weights(dense, tmp_path):
    model = copy.deepcopy(dense)
    before = vars(model).get("_weight_conversions")
    pysparse.sparsify_(model, min_sparsity=0.3)
    model.save_pretrained(tmp_path / "sparse")
    pysparse.densify_(model)
    assert vars(model).get("_weight_conversions") == before
    assert model.hf_quantizer is None
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    names = load_file(tmp_path / "dense" / "model.safetensors").keys()
    assert not any("bitmask" in name for name in names)
    assert any(name.endswith("q_proj.weight") for name in names)
