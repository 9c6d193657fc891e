"""Save and load through transformers: equal logits, equal files, loud failures, other people's formats."""

import hashlib
import json
import os
import resource
import shutil

import checkpoints
import forked
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

import pysparse
from pysparse import CheckpointError, SparseLinear, data
from pysparse.huggingface import Layout
from pysparse.huggingface.quantizer import PysparseConfig, PysparseQuantizer
from pysparse.measure.size import file_size

PACKED = {"llama": 21, "qwen2": 21, "opt": 18, "bert": 19, "t5": 32, "clip": 12, "mixtral": 12}


def run(code, *arguments, **environment):
    """Run ``code`` in a process of its own, which has imported nothing of ours or transformers' yet."""
    return forked.run(code, *arguments, HF_HUB_OFFLINE="1", **environment)


def packed_layers(model):
    return [path for path, module in model.named_modules() if isinstance(module, SparseLinear)]


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def assert_same_answers(model, expected, bound=1e-5):
    """Compare outputs with those of the model ``expected``, relative to the largest of them."""
    wanted = checkpoints.outputs(expected).float()
    difference = (checkpoints.outputs(model).float() - wanted).abs().max()
    assert difference <= bound * wanted.abs().max(), f"off by {difference:.2e} of {wanted.abs().max():.2e}"


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
    assert_same_answers(sparse, dense)
    again = pysparse.from_pretrained(tmp_path / "m", format="dense")
    assert not packed_layers(again)
    assert torch.equal(checkpoints.outputs(again), checkpoints.outputs(dense))


def test_bf16_within_the_kernels_tolerance(tmp_path):
    dense = checkpoints.masked("llama", dtype=torch.bfloat16)
    pysparse.save_pretrained(dense, tmp_path / "m")
    sparse = pysparse.from_pretrained(tmp_path / "m")
    assert sparse.dtype == torch.bfloat16
    assert_same_answers(sparse, dense, bound=2**-6)  # three blocks, each rounding to 8 bits a few times


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
        assert_same_answers(model, dense)
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
    assert_same_answers(sparse, dense)


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
    assert "RuntimeError" in result.stderr
    assert "q_proj.weight" in result.stderr  # the report names the layers
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
    assert_same_answers(sparse, dense)
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


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own use of it
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


def test_a_failed_save_leaves_the_old_folder_whole(dense, tmp_path):
    target = pysparse.save_pretrained(dense, tmp_path / "m")
    before = digests(target)
    other = checkpoints.masked("llama", sparsity=0.8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, hard)
    )  # the weights do not fit: the write itself fails
    try:
        with pytest.raises(Exception, match="large|os error 27"):
            pysparse.save_pretrained(other, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert digests(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    pysparse.save_pretrained(other, target)
    assert digests(target)["model.safetensors"] != before["model.safetensors"]


def test_a_tokenizer_that_fails_leaves_nothing_behind(dense, tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        pysparse.save_pretrained(dense, tmp_path / "new" / "m", tokenizer=Broken())
    assert list((tmp_path / "new").iterdir()) == []


def test_what_others_left_in_the_folder_stays(dense, tmp_path):
    target = pysparse.save_pretrained(dense, tmp_path / "m", max_shard_size="20KB")
    (target / "notes.txt").write_text("mine")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("old")
    pysparse.save_pretrained(dense, target)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "runs" / "log").read_text() == "old"
    assert [file.name for file in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
    broken = shutil.copytree(folder, tmp_path / "broken")
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


def test_a_config_of_absurd_sizes_is_refused_before_anything_is_built(folder, tmp_path):
    for name, value in [("num_hidden_layers", 10**9), ("head_dim", 2**40), ("hidden_size", 10**7)]:
        broken = shutil.copytree(folder, tmp_path / name)
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError, match=f"{name} is .*bear out at most"):
            pysparse.from_pretrained(broken)


@pytest.mark.parametrize("damage", ["drop", "stranger", "escape", "no-map", "missing-file"])
def test_a_damaged_index_is_refused(damage, dense, tmp_path):
    target = pysparse.save_pretrained(dense, tmp_path / "m", max_shard_size="20KB")
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weights = index["weight_map"]
    name = "model.layers.0.mlp.up_proj.bitmask"
    if damage == "drop":
        weights.pop(name)
    elif damage == "stranger":
        weights["stranger"] = weights[name]
    elif damage == "escape":
        weights[name] = "../" + weights[name]
    elif damage == "no-map":
        index["weight_map"] = [1]
    else:
        (target / weights[name]).unlink()
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        pysparse.from_pretrained(target)


def test_another_head_may_be_put_on(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert len(packed_layers(model)) == 21
    assert model(input_ids=tiny_models.tokens(sequences=1)).logits.shape == (1, 3)


def test_tensors_of_another_shape_are_an_error_unless_asked_for(tmp_path):
    model = LlamaForSequenceClassification(tiny_models.tiny().config).eval()
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[:, ::2] = 0
    target = pysparse.save_pretrained(model, tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"'score.weight' is F32 \(2, 32\), the model takes a float \(5, 32\)"
    ):
        pysparse.from_pretrained(target, num_labels=5)
    wider = pysparse.from_pretrained(target, num_labels=5, ignore_mismatched_sizes=True)
    assert wider.score.weight.shape == (5, 32)
    assert len(packed_layers(wider)) == 21


def test_adapters_get_gradients_through_packed_layers(folder):
    model = pysparse.from_pretrained(folder)
    model.train()
    loss = model(input_ids=tiny_models.tokens(), labels=tiny_models.tokens()).loss
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable


def test_a_model_that_does_not_fit_in_one_piece_is_refused(folder):
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        PysparseQuantizer(PysparseConfig(Layout({}))).validate_environment(device_map={"": "disk"})
    model = pysparse.from_pretrained(folder)
    with pytest.raises(ValueError, match="read from its files"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_a_model_in_the_hubs_cache_is_found_by_name(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--sparse" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--someone--sparse" / "refs").mkdir()
    (tmp_path / "models--someone--sparse" / "refs" / "main").write_text("0123abcd")
    model = pysparse.from_pretrained("someone/sparse", cache_dir=tmp_path, local_files_only=True)
    assert len(packed_layers(model)) == 21
    inner = pysparse.from_pretrained(snapshot.parent, subfolder="0123abcd")
    assert len(packed_layers(inner)) == 21


def test_saving_changes_nothing_in_the_model(dense, folder, tmp_path):
    config = dense.config.to_dict()
    pysparse.save_pretrained(dense, tmp_path / "m", format="compressed-tensors")
    assert dense.config.to_dict() == config
    sparse = pysparse.from_pretrained(folder)
    pysparse.save_pretrained(sparse, tmp_path / "n", format="dense")
    assert len(packed_layers(sparse)) == 21
    assert sparse.hf_quantizer is not None
    assert sparse.config.quantization_config.to_dict()["quant_method"] == "pysparse"


def test_first_releases_packed_everything_and_spelled_it_otherwise(tmp_path):
    dense = checkpoints.masked("llama", tie_word_embeddings=True)
    old = checkpoints.write_legacy(dense, tmp_path / "old", suffix=".weight", everything=True)
    sparse = pysparse.from_pretrained(old)
    assert len(packed_layers(sparse)) == 21
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight
    assert_same_answers(sparse, dense)


def test_stacked_experts_of_a_legacy_file_are_written_out(tmp_path):
    dense = checkpoints.masked("mixtral")
    dense.model.layers[0].mlp.experts.down_proj.data[:, ::2] = 0
    stacked = ("mlp.experts.down_proj",)
    old = checkpoints.write_legacy(dense, tmp_path / "old", also=stacked)
    sparse = pysparse.from_pretrained(old)
    assert torch.equal(
        sparse.model.layers[0].mlp.experts.down_proj, dense.model.layers[0].mlp.experts.down_proj
    )
    assert_same_answers(sparse, dense)


def test_a_legacy_file_with_a_missing_tensor_is_refused(dense, tmp_path):
    old = checkpoints.write_legacy(dense, tmp_path / "old")
    file = old / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"needs tensor 'model\.norm\.weight'"):
        pysparse.from_pretrained(old)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:compressed_tensors")
@pytest.mark.parametrize("format", ["sparse-bitmask", "sparse-24-bitmask"])
def test_against_compressed_tensors_itself(format, tmp_path):
    """Both ways with the last release that knew the layouts: pip install compressed-tensors==0.14.0.1."""
    theirs = pytest.importorskip("compressed_tensors", reason="compressed-tensors 0.14.0.1 is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import SparsityCompressionConfig

    if not hasattr(theirs.config, "BitmaskConfig"):
        pytest.skip("this compressed-tensors is one that lost the sparse layouts (0.15 or later)")
    dense = checkpoints.masked("llama")
    if "24" in format:
        checkpoints.make_two_of_four_(dense)
    settings = {"format": format, "targets": ["Linear"], "ignore": ["lm_head"]}
    if "24" in format:
        settings["sparsity_structure"] = "2:4"
    config = SparsityCompressionConfig.load_from_registry(format, **settings)
    compressor = ModelCompressor(sparsity_config=config)
    dense.save_pretrained(tmp_path / "theirs", state_dict=compressor.compress(dense))
    compressor.update_config(str(tmp_path / "theirs"))
    ours = pysparse.from_pretrained(tmp_path / "theirs")
    assert len(packed_layers(ours)) == 21
    assert_same_answers(ours, dense)
    pysparse.save_pretrained(ours, tmp_path / "ours", format="compressed-tensors")
    blank = type(dense)(dense.config).eval()
    blank.load_state_dict({n: t for n, t in dense.state_dict().items() if "proj" not in n}, strict=False)
    ModelCompressor.from_pretrained(str(tmp_path / "ours")).decompress(str(tmp_path / "ours"), blank)
    assert torch.equal(checkpoints.outputs(blank), checkpoints.outputs(dense))
