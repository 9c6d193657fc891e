"""adapt and merge_and_sparsify: training under a mask, merging, adapters in peft's format, going on after a crash."""

import copy
import json
import math

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import pysparse
from pysparse import data
from pysparse.api.adapting import progress_folder, share_of
from pysparse.calib import token_batches
from pysparse.huggingface import training
from pysparse.measure import torch_threads
from pysparse.methods import Adapt, LoSA, TwoSSP, parse_recipe, recipe_for, recipe_to_yaml
from pysparse.methods.attach import Attached, float32_master, restored_after_error
from pysparse.methods.block_features import reconstruction_errors, similarity_of_inputs
from pysparse.models.discover import discover
from pysparse.nn import Adapter, MaskedLowRank, SparseLinear
from pysparse.pruning import Stage, StagedRecipe, run

# peft asks transformers for what the newest calls by another name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TEXTS = ["the quick brown fox jumps over the lazy dog. " * 30, "a stitch in time saves nine, they say. " * 30]
FAST = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "warmup_steps": 0}
FEW = {
    "texts": TEXTS, "max_length": 16, "num_samples": 4, "training": FAST, "progress": False, "losa": None,
}  # fmt: skip
SHORT = LoSA(rounds=2, first_rank=2, rank_step=1, max_rank=4)


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.demo_model_path())


@pytest.fixture
def small():
    return tiny_models.tiny("llama", vocab_size=4096, max_position_embeddings=128)


def adapt(model, sparsity=0.5, method="masked-lora", **arguments):
    return pysparse.adapt(model, sparsity, method, **{**FEW, **arguments})


def zeros(model):
    return {layer.path: layer.weight == 0 for layer in discover(model).layers}


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model, before):
    after = state(model)
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# --- the three methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["losa", "masked-lora", "masked-full"])
def test_each_method_lowers_the_loss_at_the_sparsity_asked_for(small, tokenizer, method):
    tied, before = small.get_input_embeddings().weight, state(small)
    losa = SHORT if method == "losa" else None
    result = adapt(
        small, 0.6, method, tokenizer=tokenizer, losa=losa, training={**FAST, "num_train_epochs": 3}
    )
    report = result.report
    assert result.model is small
    assert report.sparsity == pytest.approx(0.6, abs=1 / 32)  # of a row of 32 a whole number goes
    assert [one.index for one in report.rounds] == ([1, 2] if losa else [1])
    assert report.rounds[-1].trained.last_loss < report.rounds[0].trained.first_loss - 0.1
    assert small.get_input_embeddings().weight is tied
    changed = {name for name, one in state(small).items() if not torch.equal(one, before[name])}
    assert changed == {f"{layer.path}.weight" for layer in discover(small).layers}
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert not any(isinstance(module, MaskedLowRank) for module in small.modules())
    assert json.loads(json.dumps(report.to_dict()))["sparsity"] == report.sparsity
    assert report.table().row_count == len(report.rounds)


def test_losa_ramps_allocates_and_sizes(small, tokenizer):
    report = adapt(small, 0.5, "losa", tokenizer=tokenizer, losa=SHORT).report
    first, last = report.rounds
    assert (first.target, last.target) == (0.4375, 0.5)
    assert first.sparsity < last.sparsity
    assert sum(last.rates) / len(last.rates) == pytest.approx(0.5, abs=1e-9)
    assert max(abs(rate - 0.5) for rate in last.rates) <= 0.01 + 1e-9
    assert all(rank <= 4 for rank in last.ranks)
    assert sum(last.ranks) == 3 * len(last.ranks)
    assert len(last.errors) == len(last.ranks)
    assert min(last.errors) > 0


@pytest.mark.parametrize(("host", "sparsity"), [("wanda", 0.63), ("sparsegpt", 0.5), ("magnitude", 0.7)])
def test_losa_ends_with_exactly_the_zeros_of_its_host_alone(small, tokenizer, host, sparsity):
    """Rates that differ by block lose nothing to rounding, to the last weight."""
    alone = copy.deepcopy(small)
    settings = {"num_samples": 4, "max_length": 16, "tokenizer": tokenizer, "progress": False}
    pysparse.prune(alone, sparsity, host, calibration=TEXTS, **settings)
    wanted = sum(int(mask.sum()) for mask in zeros(alone).values())
    report = adapt(small, sparsity, "losa", host=host, tokenizer=tokenizer, losa=SHORT).report
    found = zeros(small)
    assert sum(int(mask.sum()) for mask in found.values()) == wanted
    assert report.sparsity == 1 - (discover(small).size - wanted) / discover(small).size
    assert len({round(rate, 6) for rate in report.rounds[-1].rates}) > 1


def test_the_zeros_stay_exactly_where_they_were(small, tokenizer):
    pysparse.prune(small, 0.5, "magnitude", progress=False)
    mask = zeros(small)
    for method in ("masked-lora", "masked-full"):
        adapt(small, None, method, tokenizer=tokenizer)
        after = zeros(small)
        assert all(torch.equal(after[path], mask[path]) for path in mask)


def test_bfloat16_is_trained_as_float32_and_comes_back(small, tokenizer):
    small = small.bfloat16()
    pysparse.prune(small, 0.5, "magnitude", progress=False)
    mask, before = zeros(small), state(small)
    settings = {**FAST, "bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-4}
    adapt(small, None, tokenizer=tokenizer, training=settings)
    after = zeros(small)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert all(torch.equal(after[path], mask[path]) for path in mask)
    assert not unchanged(small, before)  # steps smaller than half a unit of bfloat16 add up in float32
    assert not any(getattr(module, "gradient_checkpointing", False) for module in small.modules())
    assert small(torch.arange(8)[None]).logits.dtype == torch.bfloat16


def test_the_merged_model_is_the_trained_one_and_runs_sparse(small, tokenizer):
    """The logits of the attached adapters and of merged plain layers agree in float32 to 1e-5."""
    run(discover(small), recipe_for("magnitude"), 0.7)
    layout, tokens = discover(small), torch.arange(24).view(2, 12)
    torch.manual_seed(0)
    adapters = {one.path: Adapter(torch.randn(one.shape[0], 3) * 0.05, torch.randn(3, one.shape[1]), 2.0)
                for one in layout.layers}  # fmt: skip
    with float32_master(small), torch.no_grad():
        before = small(tokens).logits
        attached = Attached(layout, adapters)
        torch.testing.assert_close(
            small(tokens).logits, before, rtol=1e-5, atol=1e-5
        )  # attaching changes nothing
        for layer in attached.layers.values():
            layer.lora_B.add_(torch.randn_like(layer.lora_B) * 0.02)
        trained = small(tokens).logits
        with attached.withdrawn():
            assert not torch.allclose(small(tokens).logits, trained, atol=1e-3)
        assert torch.equal(small(tokens).logits, trained)
        attached.merge()
        merged = small(tokens).logits
    torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-3)
    pysparse.sparsify_(small, min_sparsity=0.3)
    assert any(isinstance(module, SparseLinear) for module in small.modules())
    torch.testing.assert_close(small(tokens).logits, merged, rtol=1e-4, atol=1e-4)


def test_gpt2s_transposed_layers(tokenizer):
    model = tiny_models.tiny("gpt2", vocab_size=4096)
    mask_of = adapt(model, 0.5, tokenizer=tokenizer, host="magnitude").report
    assert mask_of.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_pattern_survives(small, tokenizer):
    adapt(small, None, tokenizer=tokenizer, pattern="2:4")
    for layer in discover(small).layers:
        groups = layer.weight.unflatten(1, (-1, 4)).ne(0).sum(2)
        assert bool((groups <= 2).all())


# --- what is measured ------------------------------------------------------------------------------------


def test_similarity_and_errors_of_a_model(small, tokenizer):
    calibration = token_batches(TEXTS, tokenizer, 6, 12, 4)
    layout, dense = discover(small), discover(copy.deepcopy(small))
    similarity = similarity_of_inputs(layout, calibration, 6)
    assert similarity.shape == (len(layout.blocks),) * 2
    torch.testing.assert_close(similarity.diagonal(), torch.ones(len(layout.blocks), dtype=torch.float64))
    assert reconstruction_errors(dense, layout, calibration) == [0.0] * len(layout.blocks)
    run(layout, recipe_for("magnitude"), 0.3)
    mild = reconstruction_errors(dense, layout, calibration)
    run(layout, recipe_for("magnitude"), 0.8)
    hard = reconstruction_errors(dense, layout, calibration)
    assert all(0 < a < b for a, b in zip(mild, hard, strict=True))
    with pytest.raises(ValueError, match="2 sequences of calibration or more, got 1"):
        similarity_of_inputs(layout, calibration, 1)


def noting(outputs):
    def hook(module, args, output):
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    return hook


def test_the_error_is_the_formula(small, tokenizer):
    calibration = token_batches(TEXTS, tokenizer, 3, 12, 2)
    dense, layout = discover(copy.deepcopy(small)), discover(small)
    run(layout, recipe_for("magnitude"), 0.6)
    rows = torch.cat([batch.kwargs["input_ids"] for batch in calibration.batches])
    found = reconstruction_errors(dense, layout, calibration)
    for index, (path, _) in enumerate(layout.blocks):
        outputs = []
        for model in (dense.model, small):
            hook = model.get_submodule(path).register_forward_hook(noting(outputs))
            with torch.no_grad():
                model(rows)
            hook.remove()
        wanted, got = (one.double().flatten(0, 1) for one in outputs)
        expected = ((wanted - got).square().sum(0) / wanted.square().sum(0)).mean()
        assert found[index] == pytest.approx(float(expected), rel=1e-4)


# --- adapters apart --------------------------------------------------------------------------------------


def test_adapters_saved_apart_are_peft_s_and_merge_to_the_same(small, tokenizer, tmp_path):
    adapt(
        small,
        0.5,
        "losa",
        tokenizer=tokenizer,
        losa=SHORT,
        adapter_dir=tmp_path / "adapter",
        host="sparsegpt",
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "adapter" / "base")
    merged = pysparse.merge_and_sparsify(loaded, sparsify=False)
    for layer, other in zip(discover(small).layers, discover(merged).layers, strict=True):
        torch.testing.assert_close(other.weight, layer.weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(other.weight == 0, layer.weight == 0)


def peft_model(model, sparsity=0.5, std=0.1):
    if sparsity:
        run(discover(model), recipe_for("magnitude"), sparsity)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return wrapped


def test_mask_mode_keeps_every_zero_and_adds_the_rest(small):
    wrapped = peft_model(small)
    mask, before = zeros_of_bases(wrapped), bases(wrapped)
    deltas = {
        path: module.get_delta_weight("default").detach() for path, module in lora_layers(wrapped).items()
    }
    merged = pysparse.merge_and_sparsify(wrapped, mode="mask", sparsify=False)
    for path, delta in deltas.items():
        weight = merged.get_submodule(path).weight
        assert type(merged.get_submodule(path)) is nn.Linear
        assert torch.equal(weight == 0, mask[path])
        torch.testing.assert_close(weight, before[path] + delta * ~mask[path])


def lora_layers(wrapped):
    base = wrapped.get_base_model()
    return {path: module for path, module in base.named_modules() if hasattr(module, "get_delta_weight")}


def bases(wrapped):
    return {path: one.get_base_layer().weight.detach().clone() for path, one in lora_layers(wrapped).items()}


def zeros_of_bases(wrapped):
    return {path: weight == 0 for path, weight in bases(wrapped).items()}


def test_reprune_mode_meets_the_sparsity_again_with_the_whole_adapter(small):
    wrapped = peft_model(small, std=1.0)  # strong enough to change which weights are the least
    mask, before = zeros_of_bases(wrapped), bases(wrapped)
    deltas = {
        path: module.get_delta_weight("default").detach() for path, module in lora_layers(wrapped).items()
    }
    merged = pysparse.merge_and_sparsify(wrapped, mode="reprune", sparsify=False)
    for path, delta in deltas.items():
        weight = merged.get_submodule(path).weight
        assert int((weight == 0).sum()) == int(mask[path].sum())
        whole = before[path] + delta
        assert float(weight.abs()[weight != 0].min()) >= float(whole.abs()[weight == 0].max())
        assert not torch.equal(weight == 0, mask[path])


def test_keep_mode_packs_the_base_and_computes_as_peft_does(small):
    wrapped = peft_model(small, 0.7)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected = wrapped(tokens).logits
        kept = pysparse.merge_and_sparsify(wrapped, mode="keep")
        assert kept is wrapped
        torch.testing.assert_close(kept(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_packed_result_is_the_merged_one(small):
    wrapped, tokens = peft_model(small, 0.7), torch.arange(16)[None]
    plain = pysparse.merge_and_sparsify(copy.deepcopy(wrapped), sparsify=False)
    packed = pysparse.merge_and_sparsify(wrapped)
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_refused_and_left_alone(small):
    with pytest.raises(TypeError, match="takes a peft.PeftModel, got LlamaForCausalLM"):
        pysparse.merge_and_sparsify(small)
    wrapped = peft_model(copy.deepcopy(small), 0.0)
    before = state(wrapped)
    for mode in ("mask", "reprune"):
        with pytest.raises(ValueError, match=f'mode="{mode}" needs a pruned model, and none of its'):
            pysparse.merge_and_sparsify(wrapped, mode=mode)
    with pytest.raises(ValueError, match="mode is one of mask, reprune, keep, got 'fold'"):
        pysparse.merge_and_sparsify(wrapped, mode="fold")
    assert unchanged(wrapped, before)
    wrapped = peft_model(copy.deepcopy(small))
    with pytest.raises(ValueError, match="method='wanda' needs calibration"):
        pysparse.merge_and_sparsify(wrapped, mode="reprune", method="wanda")
    path, layer = next(iter(lora_layers(wrapped).items()))
    layer.lora_A["default"].weight.data = torch.zeros(4, layer.in_features - 1)
    before = state(wrapped)
    with pytest.raises(ValueError, match=f"{path}: the adapter is for a weight .*, this one is"):
        pysparse.merge_and_sparsify(wrapped)
    layer.lora_A["default"].weight.data = torch.full((4, layer.in_features), math.nan)
    with pytest.raises(ValueError, match=f"{path}: the adapter is not finite"):
        pysparse.merge_and_sparsify(wrapped)
    assert set(state(wrapped)) == set(before)
    wrapped = peft_model(copy.deepcopy(small))
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        pysparse.merge_and_sparsify(wrapped)


# --- going on --------------------------------------------------------------------------------------------


class Stop(Exception):
    """What ends a run in a test."""


def stopping(monkeypatch, after):
    """Let the Trainer's ``after``-th step of all rounds be its last."""
    steps = [0]
    original = training._Steps.on_step_begin

    def on_step_begin(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] > after:
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training._Steps, "on_step_begin", on_step_begin)


@pytest.mark.parametrize("method", ["losa", pytest.param("masked-full", marks=pytest.mark.slow)])
def test_an_interrupted_adaptation_goes_on_where_it_was(small, tokenizer, tmp_path, monkeypatch, method):
    settings = {**FAST, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    options = {"tokenizer": tokenizer, "training": settings, "losa": SHORT if method == "losa" else None}
    whole = adapt(copy.deepcopy(small), 0.5, method, **options)
    steps = sum(one.trained.steps for one in whole.report.rounds)
    assert steps >= 8
    out, before = tmp_path / "out", state(small)
    with monkeypatch.context() as patch:
        stopping(patch, steps - 3)  # after a checkpoint of the last round
        with pytest.raises(Stop):
            adapt(small, 0.5, method, output_dir=out, **options)
    assert unchanged(small, before)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="resume=True"):
        adapt(small, 0.5, method, output_dir=out, **options)
    with pytest.raises(ValueError, match="belongs to another run.*schedule"):
        adapt(small, 0.6, method, output_dir=out, resume=True, **options)
    assert unchanged(small, before)
    taken = []
    monkeypatch.setattr(training._Steps, "on_step_begin", lambda *args, **kwargs: taken.append(1))
    again = adapt(small, 0.5, method, output_dir=out, resume=True, **options)
    assert len(taken) < steps - 4
    for layer, other in zip(discover(whole.model).layers, discover(again.model).layers, strict=True):
        assert torch.equal(layer.weight, other.weight), layer.path
    assert not progress_folder(out).exists()
    assert json.loads((out / "adapt_report.json").read_text())["method"] == method
    loaded = pysparse.from_pretrained(out, format="dense", dtype=torch.float32)
    for layer, other in zip(discover(again.model).layers, discover(loaded).layers, strict=True):
        assert torch.equal(layer.weight, other.weight)


def test_windows_are_shared_out_over_the_rounds():
    assert [share_of(index, 5, 100) for index in range(1, 6)] == [
        (0, 10),
        (10, 20),
        (20, 30),
        (30, 40),
        (40, 100),
    ]
    assert [share_of(index, 3, 3) for index in range(1, 4)] == [(0, 1), (1, 2), (2, 3)]
    assert share_of(1, 1, 7) == (0, 7)
    with pytest.raises(ValueError, match="2 windows for 3 rounds"):
        share_of(1, 3, 2)


# --- as a stage ------------------------------------------------------------------------------------------


def test_structure_then_zeros_then_adaptation_in_one_recipe(small, tokenizer, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    last = Adapt(learning_rate=1e-2, batch_size=4, rank=2, texts=str(tmp_path / "texts.txt"))
    recipe = StagedRecipe((Stage(TwoSSP(n_attn=0), 0.25), Stage(recipe_for("wanda"), 0.5), Stage(last)))
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    before = sum(parameter.numel() for parameter in small.parameters())
    result = pysparse.prune(
        small, recipe=recipe, calibration=TEXTS, tokenizer=tokenizer, num_samples=4, max_length=16, progress=False,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    structure, zeros_, adapted = result.report.stages
    assert sum(parameter.numel() for parameter in result.model.parameters()) < before
    assert adapted.sparsity == pytest.approx(zeros_.sparsity)
    assert adapted.rounds[0].trained.last_loss < adapted.rounds[0].trained.first_loss
    assert structure.table().row_count
    assert result.report.plot(tmp_path / "plot.png").is_file()
    loaded = pysparse.from_pretrained(tmp_path / "out")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = result.model(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_stage_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="unknown method 'lora'"):
        Adapt("lora")
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        Adapt(rank=0)


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (Adapt("losa"), ValueError, "a sparsity of its own, got sparsity=None"),
        (Adapt(host="wandas"), ValueError, "unknown method 'wandas'"),
        (Adapt(texts="/no/such/texts.txt"), FileNotFoundError, "/no/such/texts.txt, are no file"),
    ],
)
def test_a_stage_that_cannot_work_is_found_before_an_earlier_one_changes_the_model(
    small, tokenizer, last, error, message
):
    before = {name: one.detach().clone() for name, one in small.named_parameters()}
    recipe = StagedRecipe((Stage(recipe_for("magnitude"), 0.5), Stage(last)))
    with pytest.raises(error, match=message):
        pysparse.prune(small, recipe=recipe, calibration=TEXTS, tokenizer=tokenizer, progress=False)
    assert all(torch.equal(one, before[name]) for name, one in small.named_parameters())


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lora"}, "unknown method 'lora'; known: losa, masked-lora, masked-full"),
        ({"sparsity": 1.0, "method": "losa"}, "sparsity is a fraction"),
        ({"sparsity": 70}, "did you mean 0.7"),
        ({"sparsity": None, "method": "losa"}, "ramp up to a sparsity of its own, got sparsity=None"),
        ({"method": "losa", "pattern": "2:4"}, "got pattern='2:4'"),
        ({"host": "wandas"}, "unknown method 'wandas'"),
        ({"losa": LoSA()}, "belongs to method 'losa', not to 'masked-lora'"),
        ({"sparsity": None}, "this model is dense: pass sparsity, or prune it first"),
        ({"sparsity": None, "method": "masked-full"}, "this model is dense"),
        ({"training": {"learnin_rate": 1}}, "training: .*learnin_rate"),
        ({"training": {"output_dir": "x"}}, "training: output_dir cannot be set"),
        ({"lora": LoraConfig(use_dora=True)}, "lora: use_dora=True is not supported"),
        ({"lora": LoraConfig(bias="all")}, "lora: bias='all' is not supported"),
        ({"resume": True}, "resume=True needs output_dir"),
        ({"texts": [" "]}, "text"),
        ({"texts": ["a few words"], "method": "losa", "max_length": 16}, "1 windows for 5 rounds"),
    ],
)
def test_bad_input_is_refused_and_the_model_left_alone(small, tokenizer, arguments, message):
    before = state(small)
    with pytest.raises(ValueError, match=message):
        adapt(small, **{"tokenizer": tokenizer, **arguments})
    assert unchanged(small, before)


def test_a_diverged_training_leaves_the_model_alone(small, tokenizer):
    before = state(small)
    with pytest.raises(
        FloatingPointError, match="the training diverged: the loss of step .* Lower learning_rate"
    ):
        adapt(small, tokenizer=tokenizer, training={**FAST, "learning_rate": 1e30, "max_grad_norm": 0})
    assert unchanged(small, before)


def attach_and_stop(layout):
    with restored_after_error(layout), float32_master(layout.model):
        Attached(layout, {})
        raise Stop


def test_layers_come_back_after_an_error(small):
    before, layout = state(small), discover(small)
    with pytest.raises(Stop):
        attach_and_stop(layout)
    assert unchanged(small, before)
    assert [type(layer.module) for layer in discover(small).layers] == [nn.Linear] * len(layout.layers)
