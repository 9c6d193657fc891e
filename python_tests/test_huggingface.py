"""Save and load through transformers: equal logits, equal files, loud failures, other people's formats."""

import copy
import hashlib
import json
import os
import subprocess
import sys

import checkpoints
import pytest
import tiny_models
import torch
from transformers import AutoModel, AutoModelForCausalLM

import pysparse
from pysparse import CheckpointError, SparseLinear, data
from pysparse.measure.size import file_size

PACKED = {"llama": 21, "qwen2": 21, "opt": 18, "bert": 19, "t5": 32, "clip": 12, "mixtral": 12}


def run(code, *arguments, **environment):
    """Run ``code`` in a process of its own, which has imported nothing yet."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def packed_layers(model):
    return [path for path, module in model.named_modules() if isinstance(module, SparseLinear)]


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def dense():
    return checkpoints.masked("llama")


@pytest.fixture(scope="module")
def folder(dense, tmp_path_factory):
    return pysparse.save_pretrained(dense, tmp_path_factory.mktemp("llama") / "sparse")


@pytest.mark.parametrize("name", PACKED)
def test_logits_equal_the_masked_dense_models(name, tmp_path):
    dense = checkpoints.masked(name)
    pysparse.save_pretrained(dense, tmp_path / "m")
    sparse = pysparse.from_pretrained(tmp_path / "m")
    assert len(packed_layers(sparse)) == PACKED[name]
    assert not sparse.training
    assert type(sparse) is type(dense)
    torch.testing.assert_close(checkpoints.outputs(sparse), checkpoints.outputs(dense), rtol=1e-5, atol=1e-4)
    again = pysparse.from_pretrained(tmp_path / "m", format="dense")
    assert not packed_layers(again)
    assert torch.equal(checkpoints.outputs(again), checkpoints.outputs(dense))


def test_bf16_within_the_kernels_tolerance(tmp_path):
    dense = checkpoints.masked("llama", dtype=torch.bfloat16)
    pysparse.save_pretrained(dense, tmp_path / "m")
    sparse = pysparse.from_pretrained(tmp_path / "m")
    assert sparse.dtype == torch.bfloat16
    expected = checkpoints.outputs(dense).float()
    bound = 2**-6 * float(expected.abs().max())  # three blocks, each rounding to 8 bits a few times
    assert float((checkpoints.outputs(sparse).float() - expected).abs().max()) < bound


def test_gpt2s_transposed_layers_stay_dense_and_it_says_so(tmp_path, caplog):
    model = tiny_models.tiny("gpt2")
    with caplog.at_level("WARNING", logger="pysparse"):
        pysparse.save_pretrained(model, tmp_path / "m")
    assert "ordinary dense one, and no smaller" in caplog.text
    loaded = pysparse.from_pretrained(tmp_path / "m")
    assert torch.equal(checkpoints.outputs(loaded), checkpoints.outputs(model))


def test_the_plain_auto_classes_work_after_the_import(dense, folder):
    for loader in (AutoModelForCausalLM, type(dense)):
        model = loader.from_pretrained(folder)
        assert len(packed_layers(model)) == 21
        torch.testing.assert_close(
            checkpoints.outputs(model), checkpoints.outputs(dense), rtol=1e-5, atol=1e-4
        )
    backbone = AutoModel.from_pretrained(folder)
    assert len(packed_layers(backbone)) == 21


def test_generate_gives_the_same_tokens(dense, folder):
    prompt = tiny_models.tokens(sequences=1)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    sparse = pysparse.from_pretrained(folder)
    expected = dense.generate(prompt, **options)
    assert torch.equal(sparse.generate(prompt, **options), expected)
    options["cache_implementation"] = "static"
    assert torch.equal(sparse.generate(prompt, disable_compile=True, **options), expected)


def test_save_load_save_is_bit_identical(folder, tmp_path):
    first = digests(folder)
    assert {"config.json", "model.safetensors", "README.md"} <= set(first)
    model = pysparse.from_pretrained(folder)
    pysparse.save_pretrained(model, tmp_path / "ours")
    assert digests(tmp_path / "ours") == first
    model.save_pretrained(tmp_path / "theirs")  # transformers' own way writes no card
    theirs = digests(tmp_path / "theirs")
    assert {name: first[name] for name in theirs} == theirs
    loaded = pysparse.from_pretrained(tmp_path / "theirs")
    assert torch.equal(checkpoints.outputs(loaded), checkpoints.outputs(model))


def test_an_independent_reader_finds_the_very_weights(dense, folder):
    arrays = checkpoints.read_folder(folder)
    state = dense.state_dict()
    for path in packed_layers(pysparse.from_pretrained(folder)):
        assert checkpoints.same_bits(state[f"{path}.weight"] + 0.0, arrays[f"{path}.weight"]), path


def test_shards_and_ties(tmp_path):
    dense = checkpoints.masked("llama", tie_word_embeddings=True)
    pysparse.save_pretrained(dense, tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    sparse = pysparse.from_pretrained(tmp_path / "m")
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight
    torch.testing.assert_close(checkpoints.outputs(sparse), checkpoints.outputs(dense), rtol=1e-5, atol=1e-4)


def test_dtype_converts_values_and_keeps_masks(dense, folder):
    narrow = pysparse.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert narrow.dtype == torch.bfloat16
    layer = narrow.model.layers[0].mlp.up_proj
    weight = dense.model.layers[0].mlp.up_proj.weight
    assert torch.equal(layer.bitmap().keep_mask(), weight != 0)
    assert torch.equal(layer.bitmap().to_dense(), weight.bfloat16())


def test_dequantize_gives_ordinary_layers(dense, folder, tmp_path):
    model = pysparse.from_pretrained(folder)
    assert model.dequantize() is model
    assert not packed_layers(model)
    assert torch.equal(checkpoints.outputs(model), checkpoints.outputs(dense))
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "pysparse" not in sys.modules
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_plain_transformers_without_us_fails_loudly(folder, tmp_path):
    torch.save(tiny_models.tokens(), tmp_path / "tokens")
    result = run(PLAIN, folder, tmp_path / "tokens", tmp_path / "logits")
    assert result.returncode != 0
    assert not (tmp_path / "logits").exists()
    assert "size mismatch" in (result.stderr + result.stdout).lower() or "mismatch" in result.stderr.lower()
    assert "Import pysparse first" in (folder / "README.md").read_text()


def test_the_dense_format_needs_nothing_of_ours(dense, folder, tmp_path):
    tokens = tiny_models.tokens(sequences=2)
    torch.save(tokens, tmp_path / "tokens")
    pysparse.convert(folder, tmp_path / "dense", format="dense")
    result = run(PLAIN, tmp_path / "dense", tmp_path / "tokens", tmp_path / "logits")
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), checkpoints.outputs(dense))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("format", ["sparse-bitmask", "sparse-24-bitmask"])
def test_orphaned_checkpoints_are_rescued(format, key, tmp_path):
    dense = checkpoints.masked("llama")
    if "24" in format:
        checkpoints.make_two_of_four_(dense)
    old = checkpoints.write_legacy(dense, tmp_path / "old", format, key)
    sparse = pysparse.from_pretrained(old)
    assert len(packed_layers(sparse)) == 21
    torch.testing.assert_close(checkpoints.outputs(sparse), checkpoints.outputs(dense), rtol=1e-5, atol=1e-4)
    pysparse.convert(old, tmp_path / "new")
    converted = pysparse.from_pretrained(tmp_path / "new")
    assert torch.equal(checkpoints.outputs(converted), checkpoints.outputs(sparse))


def test_our_legacy_writer_is_read_by_an_independent_reader(dense, tmp_path):
    pysparse.save_pretrained(dense, tmp_path / "m", format="compressed-tensors")
    arrays = checkpoints.read_folder(tmp_path / "m")
    for name, tensor in dense.state_dict().items():
        if name in arrays:
            assert checkpoints.same_bits(tensor + 0.0, arrays[name]), name
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-bitmask"


def test_the_bundled_model_shrinks_at_70_percent(tmp_path):
    model = pysparse.from_pretrained(data.demo_model_path())
    pysparse.prune(model, 0.7, "magnitude", output_dir=tmp_path / "m", progress=False)
    size = file_size(tmp_path / "m")
    assert size.layers == 42
    assert size.linear_ratio <= 0.40
    assert size.total < 0.55 * file_size(data.demo_model_path()).total


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_sparse_llama_compiles_to_one_graph(mode, folder):
    sparse = pysparse.from_pretrained(folder)
    tokens = tiny_models.tokens(sequences=2)
    compiled = torch.compile(sparse, fullgraph=True, backend=mode)
    with torch.no_grad():
        logits = compiled(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, checkpoints.outputs(sparse), rtol=1e-4, atol=1e-4)


def test_without_the_compiled_core_it_loads_and_answers(dense, folder, tmp_path):
    code = """
import sys, torch, pysparse
model = pysparse.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""
    torch.save(tiny_models.tokens(sequences=2), tmp_path / "tokens")
    result = run(code, folder, tmp_path / "tokens", tmp_path / "logits", PYSPARSE_DISABLE_EXT="1")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("runs without its compiled kernels") == 1
    torch.testing.assert_close(torch.load(tmp_path / "logits"), checkpoints.outputs(dense))


def test_a_failed_save_leaves_the_old_folder_whole(dense, folder, tmp_path, monkeypatch):
    target = tmp_path / "m"
    pysparse.save_pretrained(dense, target)
    before = digests(target)

    def full(self, *arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(dense), "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        pysparse.save_pretrained(copy.deepcopy(dense), target)
    assert digests(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_foreign_folder_is_not_replaced(dense, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("a cat")
    with pytest.raises(FileExistsError, match="photos"):
        pysparse.save_pretrained(dense, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.txt").read_text() == "a cat"


def test_extra_files_and_tokenizer_lie_beside_the_model(dense, tmp_path):
    pysparse.save_pretrained(dense, tmp_path / "m", extra_files={"recipe.yaml": "a: 1\n"})
    assert (tmp_path / "m" / "recipe.yaml").read_text() == "a: 1\n"
    for name in ("../evil", "config.json", "model.safetensors", ""):
        with pytest.raises(ValueError, match="extra_files"):
            pysparse.save_pretrained(dense, tmp_path / "m", extra_files={name: "x"})


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("version", 99, "later release"),
        ("format", "os.system", "known formats are"),
        ("format", "pysparse.huggingface.quantizer", "known formats are"),
        ("nnz", {"model.layers.0.mlp.up_proj": -1}, "must be an integer from 0"),
        ("surprise", 1, "unknown entry 'surprise'"),
    ],
)
def test_a_config_from_a_stranger_is_checked(entry, value, message, folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"][entry] = value
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        pysparse.from_pretrained(broken)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(broken)


def test_wrong_calls_are_clear(dense, tmp_path):
    with pytest.raises(ValueError, match='format is one of .*, got "zip"'):
        pysparse.save_pretrained(dense, tmp_path / "m", format="zip")
    with pytest.raises(ValueError, match='format is one of .*, got "zip"'):
        pysparse.from_pretrained(tmp_path, format="zip")
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        pysparse.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="takes a transformers model, got Linear"):
        pysparse.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "m")
