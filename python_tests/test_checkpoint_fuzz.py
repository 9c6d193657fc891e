"""Ten thousand damaged checkpoints: each is refused by a clear error or means what another reader says it means.

The calls made here on one file are those that the transformers plug-in makes, in its order; some hundreds of
mutants also go through ``from_pretrained`` itself. A crash of compiled code would take the test run down.
"""

import copy
import json
import random
import shutil
import struct

import checkpoints
import pytest
import tiny_models
import torch

import pysparse
from pysparse.huggingface.fitting import Fit
from pysparse.huggingface.layout import CheckpointError, Layout
from pysparse.huggingface.quantizer import build_layer
from pysparse.huggingface.reader import Checkpoint

PER_KIND = 700
HUGE = (2**31, 2**40, 2**53, 2**62, 2**63 - 1, 2**64, 10**30)
STRANGE = (None, True, -1, 0, 1.5, 1e300, "x", "", [], {}, [[]], {"a": 1}, float("nan"), *HUGE)


class Victim:
    """A valid file, taken apart: header, data, and the quantization_config beside it."""

    def __init__(self, data, config):
        self.data, self.config = data, config
        self.start = 8 + int.from_bytes(data[:8], "little")
        self.header = json.loads(data[8 : self.start])
        self.tensors = [name for name in self.header if name != "__metadata__"]
        self.packed = [name for name in self.tensors if name.rpartition(".")[2] in ("compressed", "bitmask")]

    def span(self, name):
        begin, end = self.header[name]["data_offsets"]
        return self.start + begin, self.start + end

    def with_header(self, header):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + self.data[self.start :]

    def with_flip(self, position, bit):
        data = bytearray(self.data)
        data[position] ^= 1 << bit
        return bytes(data)


def flip_in(*parts):
    """Flip one to three bits inside a tensor whose name ends with one of ``parts``."""

    def mutate(victim, rng):
        name = rng.choice([t for t in victim.tensors if t.endswith(parts) and len(range(*victim.span(t)))])
        data = bytearray(victim.data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data[rng.randrange(*victim.span(name))] ^= 1 << rng.randrange(8)
        return bytes(data), victim.config

    return mutate


def flip_header_bit(victim, rng):
    return victim.with_flip(rng.randrange(8, victim.start), rng.randrange(8)), victim.config


def set_header_byte(victim, rng):
    data = bytearray(victim.data)
    data[rng.randrange(8, victim.start)] = rng.choice(b'0123456789-.eE[]{}:,"\\ tfn\x00\xff')
    return bytes(data), victim.config


def change_length(victim, rng):
    length = victim.start - 8
    other = rng.choice((0, 1, length - 1, length + 1, rng.randrange(2 * length), 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", other) + victim.data[8:], victim.config


def truncate(victim, rng):
    return victim.data[: rng.randrange(len(victim.data))], victim.config


def lengthen(victim, rng):
    place = rng.choice((len(victim.data), victim.start, rng.randrange(len(victim.data))))
    extra = rng.randbytes(rng.choice((1, 8, 64, 4096)))
    return victim.data[:place] + extra + victim.data[place:], victim.config


def swap_entries(victim, rng):
    header = copy.deepcopy(victim.header)
    one, other = rng.sample(victim.tensors, 2)
    field = rng.choice(("data_offsets", "dtype", "shape", None))
    if field is None:
        header[one], header[other] = header[other], header[one]
    else:
        header[one][field], header[other][field] = header[other][field], header[one][field]
    return victim.with_header(header), victim.config


def rename_or_drop(victim, rng):
    header = copy.deepcopy(victim.header)
    name = rng.choice(victim.tensors)
    entry = header.pop(name)
    new = rng.choice((None, name + "x", name.replace("layers.0", "layers.1"), name.partition(".")[2], ""))
    if new is not None:
        header[new] = entry
    return victim.with_header(header), victim.config


def give_twice(victim, rng):
    name = rng.choice(victim.tensors)
    entry = copy.deepcopy(victim.header[rng.choice((name, rng.choice(victim.tensors)))])
    text = json.dumps(victim.header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    return victim.with_header(text.encode()), victim.config


def strange_entry(victim, rng):
    header = copy.deepcopy(victim.header)
    entry = header[rng.choice(victim.tensors)]
    field = rng.choice(("dtype", "shape", "data_offsets"))
    if field == "dtype":
        entry[field] = rng.choice(
            ("F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "Q4", *STRANGE)
        )
    elif entry[field] and rng.random() < 0.7:
        entry[field][rng.randrange(len(entry[field]))] = rng.choice((*STRANGE, 1, 2, 7, 32))
    else:
        entry[field] = rng.choice((*STRANGE, [0, 0], [1, 2, 3]))
    return victim.with_header(header), victim.config


def rewrite_shape(victim, rng):
    """Store other rows and columns in a layer's ``shape``: some absurd, some with the same product."""
    name = rng.choice([t for t in victim.tensors if t.endswith(".shape")])
    begin, end = victim.span(name)
    rows, cols = struct.unpack("<qq", victim.data[begin:end])
    other = rng.choice((
        (cols, rows), (rows * 2, cols // 2), (rows, cols + 1), (rows, cols - 1), (rows + 1, cols), (0, 0),
        (-rows, -cols), (2**62, 2**62), (2**31 - 1, 2**31 - 1), (1, rows * cols), (rows, -cols),
    ))  # fmt: skip
    return victim.data[:begin] + struct.pack("<qq", *other) + victim.data[end:], victim.config


def shift_offsets(victim, rng):
    """Move, swap or scale row offsets as a whole."""
    name = rng.choice([t for t in victim.tensors if t.endswith(".row_offsets")])
    begin, end = victim.span(name)
    rows = list(struct.unpack(f"<{(end - begin) // 8}q", victim.data[begin:end]))
    row = rng.randrange(len(rows))
    rows[row] = rng.choice((rows[row] + 1, rows[row] - 1, -1, rows[-1] + 1000, 2**62, -(2**63), rows[0]))
    return victim.data[:begin] + struct.pack(f"<{len(rows)}q", *rows) + victim.data[end:], victim.config


def edit_layout(victim, rng):
    config = copy.deepcopy(victim.config)
    layer = rng.choice(list(config["nnz"]))
    edits = (
        lambda: config["nnz"].update({layer: config["nnz"][layer] + rng.choice((-1, 1, 8, 1000, *HUGE))}),
        lambda: config["nnz"].update({layer: rng.choice(STRANGE)}),
        lambda: config["nnz"].pop(layer),
        lambda: config["nnz"].update({rng.choice(("", "x", layer + ".0", "lm_head")): config["nnz"].pop(layer)}),
        lambda: config["nnz"].update({"lm_head": 5}),
        lambda: config.update(version=rng.choice((*STRANGE, 2, 99, "1"))),
        lambda: config.update(format=rng.choice((*STRANGE, "os.system", "pysparse.api:prune", "sparse-24-bitmask"))),
        lambda: config.update({rng.choice(("extra", "dequantize", "load_in_8bit")): rng.choice(STRANGE)}),
        lambda: config.update(dense=rng.choice((*STRANGE, {"lm_head": 2}, {"lm_head": "x"}))),
        lambda: config.pop(rng.choice(("nnz", "version", "format", "dense"))),
        lambda: config.update(nnz=rng.choice(STRANGE)),
        lambda: config.update(packings={layer: rng.choice(({"values": "int8"}, {"pattern": "2:4"}, *STRANGE))}),
    )  # fmt: skip
    rng.choice(edits)()
    return victim.data, config


def edit_scales(victim, rng):
    """Overwrite one scale of an int8 layer by a number that is none, or by another."""
    name = rng.choice([t for t in victim.tensors if t.endswith(".scales")])
    begin = victim.span(name)[0] + 4 * rng.randrange(len(range(*victim.span(name))) // 4)
    value = rng.choice((float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 1e-45, 1e38))
    return victim.data[:begin] + struct.pack("<f", value) + victim.data[begin + 4 :], victim.config


def edit_packings(victim, rng):
    config = copy.deepcopy(victim.config)
    layer = rng.choice(list(config["packings"]))
    packing = config["packings"][layer]
    edits = (
        lambda: packing.update(values=rng.choice((*STRANGE, "int4", "os.system"))),
        lambda: packing.update(pattern=rng.choice((*STRANGE, "1:4", "4:8", "3:5", "63:64", "2:128", "4:2", "a:b"))),
        lambda: packing.update(group_size=rng.choice((*STRANGE, 4, 6, 8, 12, 64, 2**40))),
        lambda: packing.update(activation_bits=rng.choice((*STRANGE, 16, 4))),
        lambda: packing.update({rng.choice(("extra", "")): rng.choice(STRANGE)}),
        lambda: packing.pop(rng.choice(list(packing))),
        lambda: config["packings"].pop(layer),
        lambda: config["packings"].update({rng.choice(("x", "lm_head", "")): packing}),
        lambda: config["packings"].update({layer: rng.choice(STRANGE)}),
        lambda: config.update(version=rng.choice((1, 2, 3))),
    )  # fmt: skip
    rng.choice(edits)()
    return victim.data, config


KINDS = {
    "bitmask": flip_in(".bitmask"),
    "offsets": flip_in(".row_offsets"),
    "shape": flip_in(".shape"),
    "values": flip_in(".compressed"),
    "dense": flip_in("norm.weight", "embed_tokens.weight", "lm_head.weight"),
    "header-bit": flip_header_bit,
    "header-byte": set_header_byte,
    "header-length": change_length,
    "truncate": truncate,
    "lengthen": lengthen,
    "swap": swap_entries,
    "rename": rename_or_drop,
    "twice": give_twice,
    "strange": strange_entry,
    "other-shape": rewrite_shape,
    "other-offsets": shift_offsets,
    "layout": edit_layout,
    "scale-bits": flip_in(".scales"),
    "other-scales": edit_scales,
    "packings": edit_packings,
}


OFFSET_KINDS = {"offsets", "other-offsets"}  # the 2:4 layout has none
INT8_KINDS = {"scale-bits", "other-scales", "packings"}
# Sides that are no multiple of eight, so that the last mask byte of a row has bits to spare.
ODD = {"hidden_size": 36, "intermediate_size": 60, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("fuzz") / "model"
    pysparse.save_pretrained(checkpoints.masked(**ODD), target)
    return target


@pytest.fixture(scope="module")
def victims(folder, tmp_path_factory):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config.pop("quant_method")
    ours = Victim((folder / "model.safetensors").read_bytes(), config)
    model = checkpoints.make_two_of_four_(checkpoints.masked(dtype=torch.bfloat16, **ODD))
    legacy = checkpoints.write_legacy(model, tmp_path_factory.mktemp("fuzz") / "old", "sparse-24-bitmask")
    modules = {path: module for path, module in model.named_modules() if path in config["nnz"]}
    counts = {path: module.weight.numel() // 2 for path, module in modules.items()}
    config = {"version": 1, "format": "legacy-24-bitmask", "nnz": counts, "dense": {}}
    return ours, Victim((legacy / "model.safetensors").read_bytes(), config)


@pytest.fixture(scope="module")
def int8_victims(tmp_path_factory):
    """Files of int8 values: under a mask with a scale for every 8 inputs, and to be packed as 2:4."""
    model = checkpoints.make_two_of_four_(checkpoints.masked(sparsity=0.0))
    found = []
    for index, packing in enumerate((pysparse.Packing("int8", None, 8), pysparse.Packing("int8", "2:4"))):
        folder = pysparse.save_pretrained(
            model, tmp_path_factory.mktemp("fuzz") / str(index), packing=packing
        )
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert {p.get("pattern") for p in config["packings"].values()} == {packing.pattern}
        config.pop("quant_method")
        found.append(Victim((folder / "model.safetensors").read_bytes(), config))
    return found


def on_meta(**settings):
    with torch.device("meta"):
        model = tiny_models.tiny(**settings)
    model.config.architectures = ["LlamaForCausalLM"]
    return model


@pytest.fixture(scope="module")
def skeleton():
    return on_meta(**ODD)


@pytest.fixture(scope="module")
def int8_skeleton():
    return on_meta()


def load_file(path, config, model):
    """Do to one file what the plug-in does: layout, header, fit to the model, bits; return every tensor."""
    layout = Layout.from_dict(config)
    checkpoint = Checkpoint([path])
    fit = Fit(model, checkpoint, layout)
    layers, others = fit.packed()
    assert not others
    packed = {f"{layer.path}.weight" for layer in layers}
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    fit.check_dense(expected, shapes=True)
    tensors = {f"{layer.path}.weight": read_layer(checkpoint, layout, layer) for layer in layers}
    return tensors | {name: checkpoint.tensor(name) for name in expected if name in checkpoint.tensors}


def read_layer(checkpoint, layout, layer):
    rows = checkpoint.read(layer.stored, layout, layer.shape)
    if layer.stored in layout.packings:
        packing = layout.packings[layer.stored]
        rows = build_layer(layer.stored, rows, packing, None, torch.float32, torch.device("cpu")).bitmap()
    return rows.to_dense()


def groups_of(config):
    """Return each int8 layer's group size, of a config that has just been accepted."""
    return {path: packing.get("group_size") for path, packing in config.get("packings", {}).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_stands(
    kind, victims, int8_victims, skeleton, int8_skeleton, tmp_path
):
    rng = random.Random(f"pysparse-{kind}")
    refusals = []
    for index in range(PER_KIND):
        int8 = kind in INT8_KINDS or index % 4 == 2
        legacy = index % 4 == 3 and kind not in OFFSET_KINDS
        victim = int8_victims[index % 8 == 2] if int8 else victims[legacy]
        data, config = KINDS[kind](victim, rng)
        path = tmp_path / "model.safetensors"
        path.unlink(missing_ok=True)  # a new file each time: the old one may still be mapped
        path.write_bytes(data)
        try:
            tensors = load_file(path, config, int8_skeleton if int8 else skeleton)
        except CheckpointError as error:
            refusals.append(str(error))
            continue
        expected = checkpoints.read_dense(data, groups_of(config))
        for name, tensor in tensors.items():
            assert checkpoints.same_bits(tensor, expected[name]), f"mutant {index}: {name} differs"
    for text in refusals:
        assert len(text) < 1000
        assert "model.safetensors" in text or "config.json" in text
    legal = {"values", "dense"}  # any bits are values; elsewhere a mutant may by chance be valid
    least = 0.02 if kind == "scale-bits" else 0.2  # of a scale's 32 bits few make it negative or infinite
    assert not refusals if kind in legal else len(refusals) > least * PER_KIND


def test_there_are_ten_thousand_mutants():
    assert len(KINDS) * PER_KIND >= 10_000


def edit_config(config, rng):
    """Change one entry of config.json, in any of its objects, to something strange or merely wrong."""
    objects = [config] + [value for value in config.values() if isinstance(value, dict)]
    entries = rng.choice([entry for entry in objects if entry])
    name = rng.choice(sorted(entries))
    value = entries[name]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        entries[name] = rng.choice((value + 1, value - 1, value * 2, value // 2, -value, *HUGE))
    elif rng.random() < 0.2:
        entries.pop(name)
    else:
        entries[name] = rng.choice(STRANGE)


def damage_folder(folder, victims, rng):
    """Apply one mutation to a copy of the model's folder."""
    which = rng.choice(("file", "file", "config", "config", "config", "text", "gone"))
    config_file, weights = folder / "config.json", folder / "model.safetensors"
    config = json.loads(config_file.read_text())
    if which == "file":
        data, layout = KINDS[rng.choice(sorted(KINDS.keys() - INT8_KINDS))](victims[0], rng)
        weights.unlink()
        weights.write_bytes(data)
        config["quantization_config"] = {"quant_method": "pysparse", **layout}
        config_file.write_text(json.dumps(config))
    elif which == "config":
        edit_config(config, rng)
        config_file.write_text(json.dumps(config))
    elif which == "text":
        text = bytearray(config_file.read_bytes())
        text[rng.randrange(len(text))] = rng.choice(b'0123456789-.{}[]:,"\\ tfn\xff')
        config_file.write_bytes(text)
    else:
        weights.unlink()


def test_damaged_folders_through_from_pretrained(folder, victims, tmp_path):
    rng = random.Random("folders")
    refused = loaded = 0
    for index in range(400):
        copy_ = tmp_path / str(index)
        shutil.copytree(folder, copy_)
        damage_folder(copy_, victims, rng)
        try:
            model = pysparse.from_pretrained(copy_, format="dense")
        except ValueError:
            refused += 1
            continue
        loaded += 1
        expected = checkpoints.read_folder(copy_)
        for name, tensor in model.state_dict().items():
            if name in expected:
                wanted = torch.from_numpy(expected[name].copy()).to(tensor.dtype)
                assert torch.equal(tensor.nan_to_num(), wanted.nan_to_num()), (
                    f"mutant {index}: {name} differs"
                )
            else:
                assert name == "lm_head.weight", f"mutant {index}: {name} was made up"
                assert model.lm_head.weight is model.model.embed_tokens.weight
        shutil.rmtree(copy_)
    assert refused > 100
    assert loaded > 50
