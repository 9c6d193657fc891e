"""The engine: exact structures, allocations, and the one loop over blocks of many architectures."""

import copy
import dataclasses
import json
from dataclasses import dataclass

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.methods import METHODS, Magnitude, Wanda, recipe_for
from pysparse.models.discover import discover
from pysparse.pruning import (
    NM,
    Keep,
    Pruned,
    Recipe,
    Uniform,
    Unstructured,
    check_sparsity,
    plan,
    resolve_sparsity,
    run,
)
from pysparse.pruning import structure as structure_module


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products on two threads mostly wait for each other, and for whoever else is on the cores."""
    with torch_threads(1):
        yield


STRUCTURES = [Unstructured("row"), Unstructured("matrix"), NM(1, 4), NM(2, 4), NM(4, 8), NM(2, 8)]
MATRICES = st.tuples(
    st.integers(1, 9),
    st.integers(1, 33),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)


def matrix(shape):
    """A random matrix; in bfloat16 with few distinct values, so that ties are everywhere."""
    rows, cols, dtype, seed = shape
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return (weight if dtype == torch.float32 else (weight * 2).round() / 2).to(dtype)


def reference_keep(scores, structure, sparsity):
    """The same mask by stable sorting of every group in plain Python."""
    keep = torch.ones(scores.shape, dtype=torch.bool)
    rows, cols = scores.shape
    if isinstance(structure, NM):
        groups = [[(r, c + i) for i in range(structure.m)] for r in range(rows)
                  for c in range(0, cols - structure.m + 1, structure.m)]  # fmt: skip
        count = structure.m - structure.n
    else:
        groups = [[(r, c) for c in range(cols)] for r in range(rows)]
        if structure.group == "matrix":
            groups = [[place for group in groups for place in group]]
        count = int(sparsity * len(groups[0]) + 1e-9)
    for group in groups:
        for place in sorted(group, key=lambda place: float(scores[place]))[:count]:
            keep[place] = False
    return keep


# --- structures ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(shape=MATRICES, structure=st.sampled_from(STRUCTURES), sparsity=st.floats(0, 0.999))
def test_masks_are_exact_and_stable(shape, structure, sparsity):
    scores = matrix(shape).float().abs()
    sparsity = sparsity if structure.fixed_sparsity is None else structure.fixed_sparsity
    keep = structure.keep(scores, sparsity)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, reference_keep(scores, structure, sparsity))
    assert int((~keep).sum()) == structure.pruned_count(*scores.shape, sparsity)


@settings(max_examples=60, deadline=None)
@given(
    shape=MATRICES, low=st.floats(0, 0.99), high=st.floats(0, 0.99), group=st.sampled_from(["row", "matrix"])
)
def test_masks_are_nested(shape, low, high, group):
    scores = matrix(shape).float().abs()
    low, high = sorted((low, high))
    fewer, more = (Unstructured(group).keep(scores, sparsity) for sparsity in (low, high))
    assert not (~fewer & more).any()


@settings(max_examples=60, deadline=None)
@given(shape=MATRICES, structure=st.sampled_from(STRUCTURES), factor=st.sampled_from([-4.0, 0.25, 2.0]))
def test_masks_do_not_see_the_scale_and_pruning_twice_changes_nothing(shape, structure, factor):
    weight = matrix(shape)
    sparsity = structure.fixed_sparsity or 0.6
    once = Keep().solve(weight, {}, Magnitude(), structure, sparsity)
    scaled = Keep().solve(weight * factor, {}, Magnitude(), structure, sparsity)
    assert torch.equal(once.keep, scaled.keep)
    twice = Keep().solve(once.weight, {}, Magnitude(), structure, sparsity)
    assert torch.equal(once.weight, twice.weight)
    assert once.weight.dtype == weight.dtype


def test_row_masks_do_not_see_the_scale_of_a_row_and_matrix_masks_do():
    scores = torch.rand(6, 20)
    scale = torch.logspace(-3, 3, 6)[:, None]
    for group, same in [("row", True), ("matrix", False)]:
        structure = Unstructured(group)
        assert torch.equal(structure.keep(scores, 0.5), structure.keep(scores * scale, 0.5)) is same


def test_vector_of_two_in_four():
    pruned = Keep().solve(torch.tensor([[0.1, -0.5, 0.3, -0.2]]), {}, Magnitude(), NM(2, 4), 0.5)
    assert pruned.weight.tolist() == [[0.0, -0.5, torch.tensor(0.3).item(), 0.0]]


def test_large_rows_are_selected_in_chunks():
    scores = torch.randint(0, 50, (5000, 1025)).float()  # more than one chunk, ties everywhere
    keep = Unstructured("row").keep(scores, 0.37)
    order = scores.argsort(dim=1, stable=True)
    expected = torch.ones_like(keep).scatter_(1, order[:, : int(0.37 * 1025)], False)
    assert torch.equal(keep, expected)


def test_large_matrices_are_selected_by_histogram():
    scores = torch.randn(1100, 4096).bfloat16().float().abs()
    for offset in (0.0, -1.0):  # scores with a sign take the slower way
        keep = Unstructured("matrix").keep(scores + offset, 0.37)
        order = (scores + offset).flatten().argsort(stable=True)
        expected = torch.ones_like(keep).flatten().scatter_(0, order[: int(0.37 * scores.numel())], False)
        assert torch.equal(keep.flatten(), expected)


@settings(max_examples=80, deadline=None)
@given(shape=MATRICES, sparsity=st.floats(0, 0.999), signed=st.booleans(), infinite=st.booleans())
def test_both_ways_of_selection_agree_at_any_size(shape, sparsity, signed, infinite):
    scores = matrix(shape).float()
    scores = scores if signed else scores.abs()
    if infinite:
        scores[0, 0] = float("inf")
    expected = reference_keep(scores, Unstructured("matrix"), sparsity)
    before = structure_module._CHUNK
    try:
        structure_module._CHUNK = 1
        assert torch.equal(Unstructured("matrix").keep(scores, sparsity), expected)
        rows = reference_keep(scores, Unstructured("row"), sparsity)
        assert torch.equal(Unstructured("row").keep(scores, sparsity), rows)
    finally:
        structure_module._CHUNK = before


def test_floor_is_of_the_exact_product():
    keep = Unstructured("row").keep(torch.rand(3, 10), 0.7)  # 0.7 * 10 is 6.999999999999999
    assert (~keep).sum(dim=1).tolist() == [7, 7, 7]


def test_wrong_structures_and_scores_are_refused():
    with pytest.raises(ValueError, match="keeps 0 < n < m <= 64 weights, got 4:4"):
        NM(4, 4)
    with pytest.raises(TypeError, match="n of an n:m pattern is a whole number, got '2'"):
        NM("2", 4)
    with pytest.raises(ValueError, match="group is 'row' or 'matrix', got 'column'"):
        Unstructured("column")
    with pytest.raises(ValueError, match="sparsity=0.6 contradicts 2:4, which is 0.5"):
        NM(2, 4).keep(torch.rand(2, 4), 0.6)
    for structure in (Unstructured(), NM(2, 4)):
        with pytest.raises(ValueError, match="1 of 8 scores are NaN"):
            structure.keep(torch.tensor([[1.0, 2, 3, 4], [1, float("nan"), 3, 4]]), 0.5)
        with pytest.raises(ValueError, match="scores are a matrix"):
            structure.keep(torch.rand(4), 0.5)


# --- the target ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hint"),
    [(70, "got 70; did you mean 0.7"), (50.0, "did you mean 0.5"), ("50%", "got 50%; did you mean 0.5"),
     (1, "got 1$"), (-0.1, "got -0.1$"), ("half", "got 'half'"), (True, "got True"), (float("nan"), "got nan")],
)  # fmt: skip
def test_a_sparsity_out_of_range_gets_a_hint(value, hint):
    with pytest.raises(ValueError, match=f"sparsity is a fraction between 0.*{hint}"):
        check_sparsity(value)


def test_a_pattern_brings_its_own_sparsity():
    assert resolve_sparsity(Unstructured(), None) == 0.5
    assert resolve_sparsity(Unstructured(), 0.3) == 0.3
    assert resolve_sparsity(NM(1, 4), None) == resolve_sparsity(NM(1, 4), 0.75) == 0.75
    with pytest.raises(ValueError, match="sparsity=0.5 contradicts the pattern 1:4.*sparsity 0.75"):
        resolve_sparsity(NM(1, 4), 0.5)


# --- the loop over many architectures --------------------------------------------------------------------


def slow_wanda(model, rows, sparsity, sees_pruned=True):
    """Wanda with a full forward pass of the whole model for every sequence and block, in float64 where it counts."""
    source = model if sees_pruned else copy.deepcopy(model)
    for index in range(len(discover(model).blocks)):
        targets = discover(model).layers_of(index)
        watched = discover(source).layers_of(index)
        sums = {layer.path: 0.0 for layer in watched}

        def add(path):
            def hook(module, inputs):
                sums[path] = sums[path] + inputs[0].double().square().flatten(0, -2).sum(dim=0)  # noqa: B023

            return hook

        handles = [layer.module.register_forward_pre_hook(add(layer.path)) for layer in watched]
        with torch.no_grad():
            for row in rows:
                source(row[None], use_cache=False) if hasattr(source, "lm_head") else source(row[None])
        for handle in handles:
            handle.remove()
        for layer in targets:
            scores = layer.weight.double().abs() * (sums[layer.path] / len(rows)).sqrt()
            order = scores.argsort(dim=1, stable=True)[:, : int(sparsity * scores.shape[1] + 1e-9)]
            layer.write(layer.weight.scatter(1, order, 0.0))
    return model


def weights(model):
    return {layer.path: layer.weight for layer in discover(model).layers}


def differing(left, right):
    """Fraction of positions where one is zero and the other is not."""
    pairs = [(weights(left)[path] != 0, weight != 0) for path, weight in weights(right).items()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_wanda_agrees_with_full_forward_passes(name):
    """The statistics of a block see the pruned blocks before it, with masks, rotations and all."""
    rows = tiny_models.tokens(6, 12)
    model = tiny_models.tiny(name)
    layout = discover(model)
    report = run(layout, METHODS["wanda"], 0.5, load_calibration(rows, batch_size=4))
    assert len(layout.blocks) == 3
    assert len(report.layers) == 3 * tiny_models.ARCHITECTURES[name][3]
    for layer in report.layers:
        assert layer.pruned == layer.zeros == layer.shape[0] * (layer.shape[1] // 2)
    # Scores that are equal but for the last bits may swap; everything else must agree ...
    assert differing(model, slow_wanda(tiny_models.tiny(name), rows, 0.5)) < 1e-3
    # ... and this comparison can tell which blocks the statistics saw.
    assert differing(model, slow_wanda(tiny_models.tiny(name), rows, 0.5, sees_pruned=False)) > 5e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dense_propagation_agrees_with_the_dense_model(name):
    rows = tiny_models.tokens(6, 12)
    model = tiny_models.tiny(name)
    report = run(
        discover(model), METHODS["wanda"], 0.5, load_calibration(rows, batch_size=4), propagate="dense"
    )
    assert report.propagate == "dense"
    assert "propagate" not in report.seconds
    assert differing(model, slow_wanda(tiny_models.tiny(name), rows, 0.5, sees_pruned=False)) < 1e-3


@pytest.mark.parametrize("name", ["llama", "bert", "qwen2_moe"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    rows = tiny_models.tokens(4, 10)
    lengths = [10, 7, 7, 4]
    padded, mask = torch.zeros(4, 10, dtype=torch.long), torch.zeros(4, 10, dtype=torch.long)
    for index, length in enumerate(lengths):
        place = slice(10 - length, None) if side == "left" else slice(length)
        padded[index, place], mask[index, place] = rows[index, :length], 1
    model, expected = tiny_models.tiny(name), tiny_models.tiny(name)
    run(
        discover(model),
        METHODS["wanda"],
        0.5,
        load_calibration([{"input_ids": padded, "attention_mask": mask}]),
    )
    alone = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    run(discover(expected), METHODS["wanda"], 0.5, load_calibration(alone))
    assert differing(model, expected) < 1e-3
    unmasked = tiny_models.tiny(name)
    run(discover(unmasked), METHODS["wanda"], 0.5, load_calibration([padded]))
    assert differing(unmasked, expected) > 5e-3  # padding that is not cut off shows


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_every_structure_runs_in_the_loop(structure):
    model = tiny_models.tiny("llama", torch.bfloat16)
    recipe = dataclasses.replace(METHODS["wanda"], structure=structure)
    planned = plan(discover(model), recipe)
    report = run(discover(model), recipe, None, load_calibration(tiny_models.tokens()))
    for layer, expected in zip(report.layers, planned.layers, strict=True):
        assert (layer.path, layer.shape, layer.pruned) == (expected.path, expected.shape, expected.pruned)
        assert layer.requested == expected.sparsity == (structure.fixed_sparsity or 0.5)
        keep = weights(model)[layer.path] != 0
        assert int((~keep).sum()) == layer.zeros >= layer.pruned
        if isinstance(structure, NM):
            assert int(keep.unflatten(1, (-1, structure.m)).sum(dim=2).max()) <= structure.n
    assert report.sparsity == pytest.approx(structure.fixed_sparsity or 0.5)


def test_a_width_that_the_pattern_does_not_divide_is_said_once(caplog):
    model = tiny_models.tiny("llama", intermediate_size=46)
    report = run(discover(model), recipe_for("magnitude", "2:4"))
    down = [layer for layer in report.layers if layer.path.endswith("down_proj")]
    assert [(layer.shape, layer.pruned) for layer in down] == [((32, 46), 32 * 22)] * 3
    assert (weights(model)[down[0].path][:, 44:] != 0).all()
    text = (
        "3 layers have in_features that 2:4 does not divide, the last columns stay dense: "
        "model.layers.0.mlp.down_proj has 46, its last 2 are not pruned"
    )
    assert report.warnings == (text,)
    assert caplog.text.count("does not divide") == 1
    assert plan(discover(model), recipe_for("magnitude", "2:4")).warnings == (text,)


# --- what stays as it was --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_preserved(dtype):
    model = tiny_models.tiny("llama", dtype, tie_word_embeddings=True).train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in parameters.values()]
    assert model.config.use_cache
    report = run(discover(model), METHODS["wanda"], 0.5, load_calibration(tiny_models.tokens()))
    after = dict(model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in after.values()] == flags
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pruned = {f"{layer.path}.weight" for layer in report.layers}
    for name, parameter in after.items():
        assert parameter.dtype == dtype
        kept = parameter != 0 if name in pruned else slice(None)
        assert torch.equal(parameter[kept], before[name][kept])
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_state_is_preserved_after_an_error():
    model = tiny_models.tiny("llama").train()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    untouched = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"inputs of model.layers.1.mlp.down_proj hold NaN or infinity"
    ) as caught:
        run(discover(model), METHODS["wanda"], 0.5, load_calibration(tiny_models.tokens()))
    assert "1 of 3 blocks had been processed" in caught.value.__notes__[0]
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, untouched)
    assert model.training
    assert model.config.use_cache
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_magnitude_runs_no_forward_pass():
    model = tiny_models.tiny("llama")

    def refuse(*arguments):
        raise AssertionError("a module was called")

    for module in model.modules():
        module.register_forward_pre_hook(refuse)
    report = run(discover(model), METHODS["magnitude"], 0.5)
    assert report.calibration is None
    assert set(report.seconds) == {"prune", "total"}
    for layer in report.layers:
        assert layer.pruned == layer.shape[0] * layer.shape[1] // 2


def test_gpt2s_transposed_weights_are_scored_by_input():
    """Conv1D stores [in, out]: with one strong input channel, that channel's weights survive."""
    model = tiny_models.tiny("gpt2")
    layer = model.transformer.h[0].attn.c_attn
    model.transformer.h[0].ln_1.weight.data[5] = 1e4
    run(discover(model), METHODS["wanda"], 0.9, load_calibration(tiny_models.tokens()))
    assert (layer.weight[5] != 0).all()
    assert ((layer.weight != 0).sum(dim=0) == 32 - 28).all()  # floor(0.9 * 32) = 28 a column


# --- determinism -----------------------------------------------------------------------------------------


def pruned_llama(batch_size=4, dtype=torch.float32):
    model = tiny_models.tiny("llama", dtype)
    run(
        discover(model),
        METHODS["wanda"],
        0.6,
        load_calibration(tiny_models.tokens(8, 16), batch_size=batch_size),
    )
    return model


def test_the_same_call_gives_the_same_masks():
    first, second = pruned_llama(), pruned_llama()
    assert differing(first, second) == 0.0
    assert all(torch.equal(weights(first)[path], weight) for path, weight in weights(second).items())


def test_threads_and_batch_size_change_no_more_than_near_ties():
    one = pruned_llama()
    assert differing(one, pruned_llama(batch_size=1)) < 1e-3
    with torch_threads(2):
        assert differing(one, pruned_llama()) < 1e-3


def test_masks_of_given_scores_do_not_depend_on_threads():
    scores = torch.randint(0, 999, (700, 300)).float()
    for structure in STRUCTURES:
        sparsity = structure.fixed_sparsity or 0.45
        one = structure.keep(scores, sparsity)
        with torch_threads(2):
            assert torch.equal(structure.keep(scores, sparsity), one)


# --- room for other methods ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ByActivity:
    """An allocation that decides from dense statistics: a layer with stronger inputs gets more weights."""

    spread: float = 0.2
    needs = ("squared_norm",)

    def __call__(self, layers, target):
        activity = torch.tensor([float(one.stats["squared_norm"].mean()) for one in layers])
        sizes = torch.tensor([float(one.layer.size) for one in layers])
        raw = -activity.argsort().argsort().float() / len(layers) * self.spread
        return (target + raw - (raw * sizes).sum() / sizes.sum()).double().tolist()


def test_an_allocation_may_ask_for_statistics_of_the_dense_model():
    model, rows = tiny_models.tiny("llama"), tiny_models.tokens()
    recipe = dataclasses.replace(METHODS["magnitude"], allocation=ByActivity())
    assert recipe.needs_calibration
    assert recipe.needs == ()
    report = run(discover(model), recipe, 0.5, load_calibration(rows))
    asked = [layer.requested for layer in report.layers]
    assert max(asked) - min(asked) > 0.1
    for layer in report.layers:
        assert layer.pruned == int(layer.requested * layer.size + 1e-9)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert "ByActivity decides from activations" in plan(discover(model), recipe, 0.5).warnings[0]
    with pytest.raises(ValueError, match="needs statistics of activations .squared_norm.: pass calibration"):
        run(discover(model), recipe, 0.5)


@dataclass(frozen=True, slots=True)
class Given:
    """An allocation that says what it is told."""

    values: tuple
    needs = ()

    def __call__(self, layers, target):
        return list(self.values)


def test_allocations_are_checked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 12))
    for values, structure, message in [
        ((0.5,), Unstructured(), "Given gave 1 sparsities for 2 layers"),
        ((0.5, 1.0), Unstructured(), "Given on 2: sparsity is a fraction"),
        ((0.25, 0.75), Unstructured(), "reaches a mean sparsity of 0.625 instead of 0.5"),
        ((0.6, 0.5), NM(2, 4), "gives 0 sparsity 0.6, but 2:4 fixes it at 0.5"),
    ]:
        recipe = Recipe(Magnitude(), Given(values), structure, Keep())
        with pytest.raises(ValueError, match=message):
            run(discover(model), recipe, 0.5)
    report = run(discover(model), Recipe(Magnitude(), Given((0.8, 0.4)), Unstructured("matrix"), Keep()), 0.5)
    assert [layer.pruned for layer in report.layers] == [12, 19]  # floor(.8 * 16), floor(.4 * 48)


@dataclass(frozen=True, slots=True)
class Doubling:
    """A reconstruction that changes the survivors and needs a statistic of its own."""

    needs = ("squared_norm",)

    def solve(self, weight, stats, importance, structure, sparsity):
        assert stats["squared_norm"].shape == weight.shape[1:]
        keep = structure.keep(importance(weight, stats), sparsity)
        return Pruned(2 * weight * keep, keep)


def test_a_reconstruction_may_change_the_survivors():
    model, dense = tiny_models.tiny("llama"), tiny_models.tiny("llama")
    recipe = Recipe(Magnitude(), Uniform(), Unstructured("row"), Doubling())
    assert recipe.needs == ("squared_norm",)
    run(discover(model), recipe, 0.5, load_calibration(tiny_models.tokens()))
    for path, weight in weights(model).items():
        kept = weight != 0
        assert torch.equal(weight[kept], 2 * weights(dense)[path][kept])


def test_a_reconstruction_of_the_wrong_shape_is_refused():
    class Wrong(Keep):
        def solve(self, weight, *rest):
            return Pruned(weight.t(), weight.t() != 0)

    model = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(
        ValueError, match=r"0: the reconstruction returned weight of shape \(4, 8\), not \(8, 4\)"
    ):
        run(discover(model), Recipe(Magnitude(), Uniform(), Unstructured(), Wrong()), 0.5)


# --- edges -----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A block whose second expert is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return x + self.experts[0](x.flatten(0, 1)).view(x.shape)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_said(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    dense = copy.deepcopy(model)
    layout = discover(model)
    assert [path for path, _ in layout.blocks] == ["0", "1"]
    report = run(layout, METHODS["wanda"], 0.5, load_calibration([torch.randn(2, 3, 8)]))
    expected = Keep().solve(dense[0].experts[1].weight.detach(), {}, Magnitude(), Unstructured("row"), 0.5)
    assert torch.equal(model[0].experts[1].weight, expected.weight)
    assert "2 layers saw no calibration token, 0.experts.1 first" in report.warnings[0]
    assert "saw no calibration token" in caplog.text
    assert [bool(layer.warnings) for layer in report.layers] == [False, True, False, True]


def test_sparsity_zero_changes_nothing():
    model, dense = tiny_models.tiny("llama"), tiny_models.tiny("llama")
    report = run(discover(model), METHODS["wanda"], 0.0, load_calibration(tiny_models.tokens()))
    assert report.sparsity == 0.0
    assert all(torch.equal(weights(dense)[path], weight) for path, weight in weights(model).items())


def test_zeros_that_were_there_are_counted_apart():
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight.data[:, :6] = 0
    layer = run(discover(model), METHODS["wanda"], 0.5, load_calibration([torch.randn(5, 8)])).layers[0]
    assert (layer.pruned, layer.zeros) == (16, 24)
    assert layer.sparsity == 0.5


def test_damaged_and_missing_weights_are_refused():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="^1: 1 of 16 scores are NaN"):
        run(discover(model), METHODS["magnitude"], 0.5)
    with torch.device("meta"):
        skeleton = tiny_models.tiny("llama")
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj has no data .device meta."):
        run(discover(skeleton), METHODS["magnitude"], 0.5)
    assert plan(discover(skeleton), METHODS["magnitude"], 0.5).pruned > 0
    with pytest.raises(ValueError, match="propagate is 'pruned' or 'dense', got 'both'"):
        run(discover(model), METHODS["magnitude"], 0.5, propagate="both")


def test_events_and_report():
    model, events = tiny_models.tiny("llama"), []
    calibration = load_calibration(tiny_models.tokens())
    report = run(discover(model), METHODS["wanda"], 0.5, calibration, seed=7, callbacks=[events.append])
    assert [(event.index, event.total, event.path) for event in events] == [
        (index, 3, f"model.layers.{index}") for index in range(3)
    ]
    assert [layer for event in events for layer in event.layers] == list(report.layers)
    assert all(event.seconds > 0 for event in events)
    assert set(report.seconds) == {"capture", "statistics", "prune", "propagate", "total"}
    content = json.loads(report.to_json())
    assert content["sparsity"] == content["layers"][0]["sparsity"] == 0.5
    assert content["seed"] == 7
    assert content["calibration"]["sequences"] == 6
    assert content["recipe"]["importance"] == {"type": "Wanda"}
    assert content["recipe"]["structure"] == {"type": "Unstructured", "group": "row"}
    assert content["skipped"] == {"lm_head": "in ignore"}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert content["share_of_model"] == pytest.approx(report.weights / total)
    assert report.table().row_count == 22
    assert sum(1 for _ in report._groups()) == 21
    many = dataclasses.replace(report, layers=report.layers * 4)
    assert many.table().row_count == 4  # a line a block


def test_a_wanda_run_on_plain_modules():
    """Anything with linear layers can be pruned: a stack of its own kind, or the whole as one block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8) * torch.tensor([10.0, *[0.1] * 7])
    report = run(discover(model), recipe_for("wanda"), 0.75, load_calibration([x]))
    assert [layer.path for layer in report.layers] == ["0", "2"]
    assert (model[0].weight[:, 0] != 0).all()
    stats = {"squared_norm": x.square().sum(dim=0) / 32}
    assert Wanda()(model[0].weight.detach(), stats).shape == (16, 8)
