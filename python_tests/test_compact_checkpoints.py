"""int8 values and n:m patterns on disk: the same bytes again, the same answers, and hostile files refused."""

import hashlib
import json
import shutil

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_huggingface import run
from transformers import AutoModelForCausalLM

import pysparse
from pysparse import CheckpointError, Packing, SparseLinear, backend
from pysparse.formats import Int8Bitmap
from pysparse.huggingface import Layout
from pysparse.measure.report import report
from pysparse.measure.size import file_size
from pysparse.nn import CompactLinear

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
PACKINGS = {
    "int8": Packing("int8"),
    "int8-g16-a16": Packing("int8", group_size=16, activation_bits=16),
    "2:4": Packing(pattern="2:4"),
    "2:4-int8": Packing("int8", "2:4"),
    "2:4-int8-g8": Packing("int8", "2:4", 8),
}


def compact_layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, CompactLinear)}


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def dense():
    return checkpoints.make_two_of_four_(checkpoints.masked("llama", sparsity=0.0))


@pytest.fixture(scope="module", params=PACKINGS)
def saved(request, dense, tmp_path_factory):
    packing = PACKINGS[request.param]
    folder = tmp_path_factory.mktemp("compact") / "model"
    return packing, pysparse.save_pretrained(dense, folder, packing=packing)


def test_save_load_save_is_bit_identical(saved, tmp_path):
    packing, folder = saved
    first = digests(folder)
    model = pysparse.from_pretrained(folder)
    layers = compact_layers(model)
    assert len(layers) == 21
    assert all(layer.packing == packing for layer in layers.values())
    pysparse.save_pretrained(model, tmp_path / "ours")
    assert digests(tmp_path / "ours") == first
    pysparse.convert(folder, tmp_path / "converted")
    assert digests(tmp_path / "converted") == first
    model.save_pretrained(tmp_path / "theirs")
    theirs = digests(tmp_path / "theirs")
    assert {name: first[name] for name in theirs} == theirs


def test_a_model_converted_in_memory_saves_the_same(saved, dense, tmp_path):
    packing, folder = saved
    pysparse.save_pretrained(dense, tmp_path / "dense", format="dense")
    model = pysparse.from_pretrained(tmp_path / "dense")
    pysparse.sparsify_(
        model, values=packing.values, pattern=packing.pattern, group_size=packing.group_size,
        activation_bits=packing.activation_bits,
    )  # fmt: skip
    pysparse.save_pretrained(model, tmp_path / "m")
    assert digests(tmp_path / "m") == digests(folder)
    assert torch.equal(checkpoints.outputs(model), checkpoints.outputs(pysparse.from_pretrained(folder)))


def test_an_independent_reader_finds_the_weights(saved, dense):
    packing, folder = saved
    arrays, state = checkpoints.read_folder(folder), dense.state_dict()
    for path in Layout.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"]).nnz:
        weight = state[f"{path}.weight"]
        if packing.values == "int8":
            weight = Int8Bitmap.from_dense(weight, group_size=packing.group_size).to_dense()
        assert checkpoints.same_bits(weight + 0.0, arrays[f"{path}.weight"] + 0.0), path


def test_answers_are_those_of_the_weights_it_stands_for(saved, dense, tmp_path):
    packing, folder = saved
    model, unpacked = (
        AutoModelForCausalLM.from_pretrained(folder),
        pysparse.from_pretrained(folder, format="dense"),
    )
    assert len(compact_layers(model)) == 21
    assert not compact_layers(unpacked)
    wanted = checkpoints.outputs(unpacked)
    difference = (checkpoints.outputs(model) - wanted).norm() / wanted.norm()
    assert difference < {None: 1e-5, 8: 0.05, 16: 1e-3}[packing.values and packing.activation_bits]
    for format in ("dense", "compressed-tensors"):
        pysparse.convert(folder, tmp_path / format, format=format)
        assert torch.equal(
            checkpoints.outputs(pysparse.from_pretrained(tmp_path / format, format="dense")), wanted
        )


def test_bytes_on_disk_are_counted_exactly(saved, dense):
    _, folder = saved
    size, state = file_size(folder), load_file(folder / "model.safetensors")
    parts = ("compressed", "bitmask", "row_offsets", "scales", "shape")
    assert size.linears == sum(t.nbytes for n, t in state.items() if n.rpartition(".")[2] in parts)
    assert size.layers == 21
    entries = sum(
        module.weight.numel() for path, module in dense.named_modules() if path in packed_paths(folder)
    )
    assert size.linears_dense == 4 * entries
    listed = report(pysparse.from_pretrained(folder)).layers
    assert sum(layer.dense_bytes for layer in listed if "lm_head" not in layer.path) == 4 * entries


def packed_paths(folder):
    return Layout.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"]).nnz


@pytest.mark.parametrize("name", ["bert", "t5", "qwen2"])
def test_other_architectures_and_bf16(name, tmp_path):
    dense = checkpoints.masked(name, dtype=torch.bfloat16)
    pysparse.save_pretrained(dense, tmp_path / "m", packing=Packing("int8", group_size=16))
    first, model = digests(tmp_path / "m"), pysparse.from_pretrained(tmp_path / "m")
    assert {layer.dtype for layer in compact_layers(model).values()} == {torch.bfloat16}
    pysparse.save_pretrained(model, tmp_path / "again")
    assert digests(tmp_path / "again") == first
    wanted = checkpoints.outputs(pysparse.from_pretrained(tmp_path / "m", format="dense")).float()
    assert (checkpoints.outputs(model).float() - wanted).norm() / wanted.norm() < 0.06


def test_shards_and_ties(tmp_path):
    dense = checkpoints.masked("llama", tie_word_embeddings=True)
    pysparse.save_pretrained(dense, tmp_path / "m", max_shard_size="20KB", packing=Packing("int8"))
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    model = pysparse.from_pretrained(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(compact_layers(model)) == 21
    pysparse.save_pretrained(model, tmp_path / "again", max_shard_size="20KB")
    assert digests(tmp_path / "again") == digests(tmp_path / "m")


def test_a_bf16_checkpoint_becomes_int8_and_mixtures_survive(tmp_path):
    dense = checkpoints.masked("llama")
    pysparse.save_pretrained(dense, tmp_path / "floats")
    assert (
        json.loads((tmp_path / "floats" / "config.json").read_text())["quantization_config"]["version"] == 1
    )
    pysparse.convert(tmp_path / "floats", tmp_path / "int8", packing=Packing("int8"))
    pysparse.save_pretrained(dense, tmp_path / "direct", packing=Packing("int8"))
    assert digests(tmp_path / "int8") == digests(tmp_path / "direct")
    model = pysparse.from_pretrained(tmp_path / "floats")
    pysparse.sparsify_(model, lambda module, path: path.endswith("up_proj"), values="int8")
    pysparse.save_pretrained(model, tmp_path / "mixed")
    mixed = pysparse.from_pretrained(tmp_path / "mixed")
    kinds = {path.rpartition(".")[2]: type(m) for path, m in mixed.named_modules() if "_proj" in path}
    assert kinds["up_proj"] is CompactLinear
    assert kinds["down_proj"] is SparseLinear
    assert torch.equal(checkpoints.outputs(mixed), checkpoints.outputs(model))


def test_dtype_converts_what_the_layers_stand_for(saved):
    packing, folder = saved
    model = pysparse.from_pretrained(folder, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.dtype == torch.bfloat16
    assert layer.packing == packing
    wide = pysparse.from_pretrained(folder).model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, wide.weight.bfloat16())
    if packing.values == "int8":
        assert torch.equal(layer.packed().scales, wide.packed().scales)


def test_without_the_compiled_core_it_answers_with_the_same_weights(dense, tmp_path):
    folder = pysparse.save_pretrained(dense, tmp_path / "m", packing=Packing("int8", "2:4", 8))
    code = (
        "import sys, torch, pysparse\n"
        "model = pysparse.from_pretrained(sys.argv[1])\n"
        "torch.save({p: m.weight for p, m in model.named_modules() if 'proj' in p}, sys.argv[2])\n"
    )
    result = run(code, folder, tmp_path / "weights", PYSPARSE_DISABLE_EXT="1")
    assert result.returncode == 0, result.stderr
    model = pysparse.from_pretrained(folder)
    for path, weight in torch.load(tmp_path / "weights").items():
        assert torch.equal(model.get_submodule(path).weight, weight)


def test_prune_saves_int8(dense, tmp_path):
    options = {"progress": False, "output_dir": tmp_path / "m", "values": "int8", "group_size": 16}
    pysparse.prune(checkpoints.masked("llama"), 0.6, "magnitude", **options)
    layers = compact_layers(pysparse.from_pretrained(tmp_path / "m"))
    assert {layer.packing for layer in layers.values()} == {Packing("int8", group_size=16)}
    pysparse.prune(checkpoints.masked("llama", 0.0), None, "magnitude", pattern="2:4", **options)
    layers = compact_layers(pysparse.from_pretrained(tmp_path / "m"))
    assert {layer.packing for layer in layers.values()} == {Packing("int8", "2:4", 16)}
    before = digests(tmp_path / "m")
    for wrong, message in [({"values": "int4"}, "int4"), ({"group_size": 6}, "multiple of 4"),
                           ({"save_format": "dense"}, 'format "pysparse" only')]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pysparse.prune(checkpoints.masked("llama"), 0.6, "magnitude", **{**options, **wrong})
    assert digests(tmp_path / "m") == before


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=1), "packings need version 2"),
        (lambda c: c["packings"].update({"lm_head": {"values": "int8"}}), "nnz does not list"),
        (lambda c: c["packings"].update({LAYER: {}}), "must be an object of"),
        (lambda c: c["packings"].update({LAYER: {"activation_bits": 16}}), "names neither int8 values"),
        (lambda c: c["packings"][LAYER].update(values="int4"), "values is"),
        (lambda c: c["packings"][LAYER].update(values=8), "values must be of type str"),
        (lambda c: c["packings"][LAYER].update(group_size=True), "group_size must be of type int"),
        (lambda c: c["packings"][LAYER].update(group_size=6), "positive multiple of 4"),
        (
            lambda c: c["packings"][LAYER].update(group_size=4),
            r"scales' must be F32 \(48, 8\), got F32 \(48, 1\)",
        ),
        (lambda c: c["packings"][LAYER].update(activation_bits=4), "activation_bits is 8 or 16"),
        (lambda c: c["packings"][LAYER].update(pattern="4:4"), "n kept of m"),
        (lambda c: c["packings"][LAYER].update(pattern="1:4"), "pattern 1:4 keeps 1 of 4, but row 0"),
        (lambda c: c["packings"][LAYER].update(pattern="1:128"), "1 <= n < m <= 64"),
        (lambda c: c["packings"][LAYER].update(method="x"), "must be an object of"),
        (lambda c: c["packings"].pop(LAYER), "compressed' must be F32 or BF16 or F16"),
        (lambda c: c.update(packings=[1]), "must map layers to packings"),
    ],
)
def test_a_hostile_config_is_refused(edit, message, dense, tmp_path):
    pysparse.save_pretrained(dense, tmp_path / "m", packing=Packing("int8", "2:4"))
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        pysparse.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("scales", lambda t: t.double(), "must be F32"),
        ("scales", lambda t: t[:-1], r"must be F32 \(48, 1\), got F32 \(47, 1\)"),
        ("scales", lambda t: t * float("nan"), "scales must be finite"),
        ("scales", lambda t: -t, "scales must be finite and not negative"),
        ("scales", lambda t: None, "scales' is missing"),
        ("compressed", lambda t: t.float(), "must be I8"),
        ("compressed", lambda t: t[:-1], "must be I8"),
        ("bitmask", lambda t: t.flip(0).roll(1, 1), "row_offsets|keeps"),
    ],
)
def test_a_damaged_file_is_refused(part, damage, message, dense, tmp_path):
    pysparse.save_pretrained(dense, tmp_path / "m", packing=Packing("int8"))
    state = load_file(tmp_path / "m" / "model.safetensors")
    changed = damage(state.pop(f"{LAYER}.{part}"))
    if changed is not None:
        state[f"{LAYER}.{part}"] = changed.contiguous()
    if part == "bitmask":  # keep the counts, so that the pattern alone is wrong
        state[f"{LAYER}.row_offsets"] += 1
    (tmp_path / "m" / "model.safetensors").unlink()
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        pysparse.from_pretrained(tmp_path / "m")


def test_scales_without_int8_values_are_a_tensor_too_many(dense, tmp_path):
    pysparse.save_pretrained(dense, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state[f"{LAYER}.scales"] = torch.ones(48, 1)
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    save_file(state, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="scales' has no place"):
        pysparse.from_pretrained(tmp_path / "copy")


def test_what_cannot_be_int8_is_refused_before_a_file_is_written(tmp_path):
    dense = checkpoints.masked("llama")
    dense.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layer 'model.layers.1.mlp.up_proj': 1 weights are NaN or infinite"):
        pysparse.save_pretrained(dense, tmp_path / "m", packing=Packing("int8"))
    assert not (tmp_path / "m").exists()
