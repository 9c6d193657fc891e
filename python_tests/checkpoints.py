"""Masked tiny models, and a reader and a writer of checkpoint files that share no line with the package's own."""

import json
from pathlib import Path

import numpy as np
import tiny_models
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5ForConditionalGeneration

# Two families more than tiny_models has: one looks at its layers' weights while it runs, one while it is built.
_T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
_CLIP = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def _t5(**settings):
    return T5ForConditionalGeneration(T5Config(**{**_T5, "decoder_start_token_id": 0, **settings}))


def _clip(**settings):
    return CLIPTextModel(CLIPTextConfig(**{**_CLIP, "num_attention_heads": 4, "eos_token_id": 2, **settings}))


def masked(name="llama", sparsity=0.6, dtype=torch.float32, **settings):
    """Return a tiny model whose linear layers, but for the head, hold that fraction of zeros."""
    torch.manual_seed(1)
    own = {"t5": _t5, "clip": _clip}
    model = own[name](**settings).eval() if name in own else tiny_models.tiny(name, **settings)
    generator = torch.Generator().manual_seed(2)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
            module.weight.data *= torch.rand(module.weight.shape, generator=generator) >= sparsity
    for path, tensor in model.named_parameters():
        if path.endswith("bias"):
            tensor.data.normal_(
                std=0.1, generator=generator
            )  # they start at zero, which would hide a lost one
    return model.to(dtype)


def outputs(model):
    """Return logits, or hidden states where there is no head, for a few fixed sequences."""
    tokens = tiny_models.tokens(sequences=2)
    extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result = model(input_ids=tokens, **extra)
    return result.logits if "logits" in result else result.last_hidden_state


def make_two_of_four_(model):
    """Keep the two largest of each four weights of every linear layer but the head, in place."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
            module.weight.data *= _largest_two_of_four(module.weight.data)
    return model


def write_legacy(
    model, folder, format="sparse-bitmask", key="quantization_config", suffix="", also=(), everything=False
):
    """Write ``model`` as compressed-tensors did: the layout is written out here once more, in NumPy.

    Its first releases spelled the tensors with a ``suffix`` ".weight", and packed ``everything``, vectors and
    embeddings included; ``also`` names further parameters to pack.
    """
    tensors, config = {}, model.config.to_dict()
    linear = {p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in p}
    for name, tensor in model.state_dict().items():
        path = name.removesuffix(".weight")
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if (path in linear and name != path) or everything or name.endswith(also or "?"):
            tensors.update({f"{path}{suffix}.{part}": t for part, t in _legacy_parts(tensor, format).items()})
        else:
            tensors[name] = tensor.contiguous()
    structure = "2:4" if "24" in format else "unstructured"
    sparsity = {
        "format": format,
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "sparsity_structure": structure,
    }
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config[key] = {"quant_method": "compressed-tensors", "version": "0.9.0", "sparsity_config": sparsity}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _legacy_parts(weight, format):
    two_of_four = format == "sparse-24-bitmask"
    keep = (_largest_two_of_four(weight) if two_of_four else weight != 0).numpy()
    bits = torch.from_numpy(np.packbits(keep, axis=-1, bitorder="little"))
    values, shape = weight[torch.from_numpy(keep)], torch.tensor(weight.shape)
    if two_of_four:
        return {"compressed": values.view(len(weight), -1), "bitmask": bits, "shape": shape[:, None].clone()}
    counts = torch.from_numpy(np.asarray(keep.sum(axis=-1)))
    # Along the first dimension, whatever the rank: of no use for more than two, but that is what they wrote.
    offsets = counts.cumsum(0) - counts if counts.dim() else torch.zeros((), dtype=torch.int64)
    return {"compressed": values, "bitmask": bits, "shape": shape, "row_offsets": offsets}


def _largest_two_of_four(weight):
    winners = weight.view(-1, 4).abs().topk(2, dim=1).indices
    return torch.zeros(weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, winners, True).view(weight.shape)


_NUMPY = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": "u2",
    "I64": "i8",
    "I32": "i4",
    "U8": "u1",
    "I8": "i1",
    **dict.fromkeys(("BOOL", "F8_E4M3", "F8_E5M2"), "u1"),  # only ever empty
}


def read_dense(data, group_sizes=None):
    """Decode the bytes of a safetensors file to {name: float64 or integer array}, packed layers unpacked.

    ``group_sizes`` maps int8 layers to the columns that share a scale, where that is not a whole row. Follows the
    written description of the layout with NumPy alone and checks nothing.
    """
    group_sizes = group_sizes or {}
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(
            data[8 + length + begin : 8 + length + end], np.dtype("<" + _NUMPY[entry["dtype"]])
        )
        if entry["dtype"] == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = raw.reshape(entry["shape"])
    for path in [name[: -len(".compressed")] for name in arrays if name.endswith(".compressed")]:
        values, bits, shape = (arrays.pop(f"{path}.{part}") for part in ("compressed", "bitmask", "shape"))
        arrays.pop(f"{path}.row_offsets", None)
        scales = arrays.pop(f"{path}.scales", None)
        keep = np.unpackbits(bits, axis=1, bitorder="little")[:, : shape.flatten()[1]].astype(bool)
        values = values.flatten()
        if scales is not None:
            group = group_sizes.get(path) or keep.shape[1]
            spread = np.repeat(scales, group, axis=1)[:, : keep.shape[1]]
            with np.errstate(over="ignore"):
                values = values.astype(np.float32) * spread[keep]
        arrays[f"{path}.weight"] = np.zeros(keep.shape, values.dtype)
        arrays[f"{path}.weight"][keep] = values
    return arrays


def read_folder(folder):
    """Decode every safetensors file of a folder."""
    config = json.loads((Path(folder) / "config.json").read_text())
    packings = (config.get("quantization_config") or {}).get("packings") or {}
    groups = {path: packing.get("group_size") for path, packing in packings.items()}
    arrays = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        arrays.update(read_dense(file.read_bytes(), groups))
    return arrays


def same_bits(actual, expected):
    """Tell whether a tensor holds exactly the array's values, NaNs and signs of zero included."""
    wanted = torch.from_numpy(np.array(expected)).to(actual.dtype)  # a copy: the array may be read-only
    as_bytes = [t.detach().contiguous().cpu().view(torch.uint8) for t in (actual, wanted)]
    return actual.shape == wanted.shape and torch.equal(*as_bytes)
