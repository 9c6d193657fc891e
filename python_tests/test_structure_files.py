"""Models without some attentions, and with narrower FFNs, on disk: smaller, whole, and loaded by anybody."""

import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from test_two_ssp import BLOCKS, FAMILIES, deep
from transformers import AutoModel, AutoModelForCausalLM

import pysparse
from pysparse.huggingface import CheckpointError
from pysparse.huggingface.quantizer import attach_quantizer
from pysparse.measure import torch_threads
from pysparse.methods import TwoSSP
from pysparse.models.skeleton import skeleton
from pysparse.nn.structure import NoAttention, Structure, apply_structure, structure_of


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def smaller(model, method="2ssp:n_attn=2", sparsity=0.35, **settings):
    """Prune by structure; the model itself is returned."""
    return pysparse.prune(
        model, sparsity, method, calibration=tiny_models.tokens(4, 12), progress=False, **settings
    ).model


def logits(model, rows=None):
    with torch.no_grad():
        return model(tiny_models.tokens(2, 9) if rows is None else rows).logits


def files(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_smaller_and_generates(name, tmp_path):
    dense = deep(name)
    dense.save_pretrained(tmp_path / "dense")
    model = smaller(dense, output_dir=tmp_path / "small")
    size, before = ((tmp_path / one / "model.safetensors").stat().st_size for one in ("small", "dense"))
    assert size < 0.85 * before  # headers weigh much here
    rows = tiny_models.tokens(2, 9)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval(),
        pysparse.from_pretrained(tmp_path / "small"),
        pysparse.from_pretrained(tmp_path / "small", format="dense"),
    ):
        assert sum(map(torch.numel, loaded.parameters())) == sum(map(torch.numel, model.parameters()))
        assert sum(isinstance(module, NoAttention) for module in loaded.modules()) == 2
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
        with_cache, without = (
            loaded.generate(rows, max_new_tokens=8, do_sample=False, use_cache=cache, min_new_tokens=8)
            for cache in (True, False)
        )
        assert torch.equal(with_cache, without)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_cache_holds_what_is_left_even_when_the_first_attention_is_gone(name, implementation):
    model = deep(name)
    record = Structure(
        removed={"model.layers.0.self_attn": "q_proj.weight"}, idle=("model.layers.0.input_layernorm",),
        slots={f"model.layers.{block}.self_attn": slot for block, slot in
               (((2, 0), (1, 1), (4, 2), (3, 3)) if name == "gemma3" else ((1, 0), (2, 1), (3, 2), (4, 3)))},
    )  # fmt: skip
    if name == "gemma3":
        record = Structure(
            record.removed, (*record.idle, "model.layers.0.post_attention_layernorm"), record.slots
        )
    apply_structure(model, record)
    rows = tiny_models.tokens(2, 9)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    wanted = model.generate(rows, use_cache=False, **settings)
    if implementation == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(rows, use_cache=True, **settings), wanted)
    cache = model(rows, use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    assert sum(layer.get_seq_length() > 0 for layer in cache.layers) == BLOCKS - 1


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    smaller(deep("llama"), output_dir=tmp_path / "a")
    for loaded, place in ((pysparse.from_pretrained(tmp_path / "a"), "b"),
                          (AutoModelForCausalLM.from_pretrained(tmp_path / "a"), "c")):  # fmt: skip
        pysparse.save_pretrained(loaded, tmp_path / place)
        first, second = files(tmp_path / "a"), files(tmp_path / place)
        first.pop("prune_report.json")
        assert first == second
    loaded.save_pretrained(tmp_path / "d")  # transformers' own
    assert files(tmp_path / "d")["model.safetensors"] == first["model.safetensors"]
    torch.testing.assert_close(logits(pysparse.from_pretrained(tmp_path / "d")), logits(loaded))


def test_a_model_that_was_just_cut_can_be_saved_by_transformers(tmp_path):
    model = smaller(deep("qwen2"))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_structure_and_zeros_are_stored_together(name, tmp_path):
    model = smaller(deep(name))
    pysparse.prune(
        model, 0.6, "wanda", calibration=tiny_models.tokens(4, 12), output_dir=tmp_path / "a", progress=False
    )
    loaded = pysparse.from_pretrained(tmp_path / "a")
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert {"SparseLinear", "NoAttention"} <= kinds
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    pysparse.save_pretrained(loaded, tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] == files(tmp_path / "b")["model.safetensors"]
    pysparse.convert(tmp_path / "b", tmp_path / "c", format="dense")
    torch.testing.assert_close(
        logits(pysparse.from_pretrained(tmp_path / "c")), logits(model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
def test_one_width_everywhere_is_a_stock_model(name, tmp_path):
    """The config says it: any tool loads the folder, with no trace of pysparse in its config."""
    model = smaller(deep(name), "2ssp-width", 0.3, output_dir=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert structure_of(model) is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded, "hf_quantizer")
    assert torch.equal(logits(loaded), logits(model))


def test_several_widths_come_back(tmp_path):
    widths = (8, 48, 16, 24, 40)
    model = deep("llama")
    pysparse.prune(model, recipe=TwoSSP(widths=widths, n_attn=1), calibration=tiny_models.tokens(4, 12),
                   output_dir=tmp_path, progress=False)  # fmt: skip
    loaded = pysparse.from_pretrained(tmp_path)
    assert [block.mlp.down_proj.in_features for block in loaded.model.layers] == list(widths)
    torch.testing.assert_close(logits(loaded), logits(model))
    bare = AutoModel.from_pretrained(tmp_path)
    rows = tiny_models.tokens(2, 9)
    torch.testing.assert_close(bare(rows).last_hidden_state, model.model(rows).last_hidden_state)
    assert skeleton(tmp_path).model.layers[2].mlp.up_proj.weight.shape == (16, 32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_fewer_blocks_are_a_stock_model(name, tmp_path):
    model = smaller(deep(name), "shortgpt", 0.4, output_dir=tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == BLOCKS - 2
    assert torch.equal(logits(loaded), logits(model))
    rows = tiny_models.tokens(2, 9)
    both = (
        model.generate(rows, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(*both)


def test_compressed_tensors_has_no_place_for_it(tmp_path):
    with pytest.raises(ValueError, match="has no place for removed modules"):
        pysparse.save_pretrained(smaller(deep("llama")), tmp_path / "x", format="compressed-tensors")
    assert not (tmp_path / "x").exists()


def test_a_part_of_a_cut_model_is_not_saved_as_a_whole(tmp_path):
    with pytest.raises(ValueError, match="no record of its structure: it is part of another model"):
        pysparse.save_pretrained(smaller(deep("llama")).model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"removed": []}, "removed must map module paths"),
        ({"removed": {"model.layers.9.self_attn": "q_proj.weight"}}, "names 'model.layers.9.self_attn'"),
        ({"removed": {"model.layers.1.self_attn": 3}}, r"removed\['model.layers.1.self_attn'\] must name a parameter"),
        ({"idle": [4]}, "idle must list module paths"),
        ({"idle": ["model.nothing"]}, "names 'model.nothing'"),
        ({"slots": {"model.layers.1.self_attn": -1}}, "must be an index from 0, got -1"),
        ({"slots": {"model.layers.1.self_attn": 0, "model.layers.2.self_attn": 0}}, "gives two attentions one slot"),
        ({"shapes": {"model.layers.0.mlp.up_proj": [8]}}, "must be two integers above 0"),
        ({"shapes": {"model.layers.0.mlp.up_proj": [10**9, 32]}}, "larger than the .* of the config"),
        ({"shapes": {"model.norm": [8, 8]}}, "has no weight matrix"),
        ({"shapes": {"model.layers.0.mlp.up_proj": [8, 32]}}, "model.layers.0.mlp.up_proj.weight"),
        ({"outputs": 10**9}, "outputs must be from 1 to 8"),
        ({"wrong": 1}, "must be an object with entries of"),
    ],
)  # fmt: skip
def test_damage_is_said(change, message, tmp_path):
    smaller(deep("llama"), output_dir=tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["structure"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        pysparse.from_pretrained(tmp_path)


def test_a_structure_needs_its_version(tmp_path):
    smaller(deep("llama"), output_dir=tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["version"] == 3
    config["quantization_config"]["version"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="structure needs version 3, got 2"):
        pysparse.from_pretrained(tmp_path)


@pytest.mark.slow
def test_without_the_import_transformers_stops(tmp_path):
    smaller(deep("llama"), output_dir=tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr.lower() or "mismatched" in done.stderr.lower()


@pytest.mark.slow
def test_a_cut_model_compiles_whole():
    model = smaller(deep("llama"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-5)


def test_training_goes_through_and_all_weights_learn(tmp_path):
    smaller(deep("llama"), output_dir=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not model.is_quantized
    rows = tiny_models.tokens(2, 9)
    model.train()(input_ids=rows, labels=rows).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attaching_leaves_ordinary_models_alone():
    model = deep("llama")
    attach_quantizer(model)
    assert getattr(model, "hf_quantizer", None) is None
