"""Profiles: the published ones, those from lists, mappings, files and functions, and mistakes in them."""

import json

import pytest
from allocation_cases import layout_of, stack

from pysparse.measure import torch_threads
from pysparse.methods import (
    ALLOCATIONS,
    OWL,
    Custom,
    DLPProfile,
    Profile,
    allocation_for,
    load_profile,
    recipe_for,
)
from pysparse.methods.profile import DLP_PROFILES
from pysparse.pruning import (
    run,
)


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


PUBLISHED = {  # blocks, first, last but one, last
    "llama-2-7b": (32, 0.5348, 0.8348, 0.8277), "llama-7b": (32, 0.5324, 0.8324, 0.8138),
    "llama-2-13b": (40, 0.5019, 0.8019, 0.7874), "llama-13b": (40, 0.5029, 0.8029, 0.7857),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_profiles(model):
    blocks, first, peak, last = PUBLISHED[model]
    layers = stack([2] * blocks)
    rates = DLPProfile(model)(layers, 0.7)
    assert (rates[0], rates[-2], rates[-1]) == pytest.approx((first, peak, last), abs=1e-4)
    assert sum(rates) / blocks == pytest.approx(0.7, abs=1e-9)
    assert max(rates) - min(rates) == pytest.approx(0.3, abs=1e-4)
    assert DLP_PROFILES[model].index(max(DLP_PROFILES[model])) == blocks - 2
    lower = DLPProfile(model)(layers, 0.5)
    assert [b - a for a, b in zip(lower, rates, strict=True)] == pytest.approx([0.2] * blocks, abs=1e-9)
    assert max(DLPProfile(model)(layers, 0.9)) <= 0.99  # clipped, and the mean is kept
    assert sum(DLPProfile(model)(layers, 0.9)) / blocks == pytest.approx(0.9, abs=1e-9)
    assert ALLOCATIONS[f"dlp-{model}"] == DLPProfile(model)
    with pytest.raises(ValueError, match=rf"profile of {model} has sparsities for {blocks} blocks, .* has 3"):
        DLPProfile(model)(stack([2, 2, 2]), 0.7)


def test_llama_2_7b_in_full_precision_at_the_ends():
    """The JSON of the released code holds densities: 0.46519035 of block 0, 0.16519032 of 30, 0.17230450 of 31."""
    rates = DLP_PROFILES["llama-2-7b"]
    assert (rates[0], rates[30], rates[31]) == pytest.approx(
        (1 - 0.46519035, 1 - 0.16519032, 1 - 0.17230450), abs=5e-5
    )


def test_profiles_from_lists_mappings_and_files(tmp_path):
    layers = stack([4, 4])
    file = tmp_path / "profile.json"
    for content in ([0.4, 0.6], {"sparsities": [0.4, 0.6]}, {"densities": [0.6, 0.4]},
                    {"0.0": 0.4, "re:^1": 0.6}):  # fmt: skip
        file.write_text(json.dumps(content))
        for value in (content, file, str(file)):
            assert allocation_for(value)(layers, 0.5) == pytest.approx([0.4, 0.6])
    rounded = Profile(blocks=(0.4, 0.602))(layers, 0.5)  # figures that were rounded
    assert sum(rounded) / 2 == pytest.approx(0.5, abs=1e-12)
    assert rounded[1] - rounded[0] == pytest.approx(0.202)
    globbed = Profile(layers=(("0.*", 0.4), ("*", 0.6)))
    assert globbed(layers, 0.5) == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0.4, 0.4], "have the mean 0.4000 over this model's weights, not 0.5: pass sparsity=0.4000"),
        ([0.5], "sparsities for 1 blocks, this model has 2"),
        ({"0.0": 0.5}, "names no sparsity for 1.0"),
        ({"0.0": 0.5, "1.0": 0.5, "7.0": 0.5}, "names 7.0, which no layer"),
        ([0.4, 60], "did you mean 0.6"),
        ([], "a profile lists a sparsity for each block"),
        ({"densities": 3}, "densities of a profile holds a int"),
        ([0.5, "0.5"], "holds '0.5', expected numbers"),
        ([0.5, None], "holds None, expected numbers"),
        (0.5, "a profile is a list or a mapping of sparsities, got float"),
    ],
)
def test_profiles_with_mistakes(content, message, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_profile(tmp_path / "p.json")(stack([4, 4]), 0.5)


def test_damaged_and_missing_profile_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such allocation profile"):
        allocation_for(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[0.5,")
    with pytest.raises(ValueError, match=r"bad.json: Expecting value"):
        allocation_for(tmp_path / "bad.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep.json"):
        allocation_for(tmp_path / "deep.json")
    (tmp_path / "long.json").write_text("[" + "0.5," * (1 << 19))
    with pytest.raises(ValueError, match="a profile has at most"):
        allocation_for(tmp_path / "long.json")


def test_a_function_may_allocate():
    layers = stack([4, 8])
    assert allocation_for(lambda layers, target: [0.9, 0.4])(layers, 0.5) == [0.9, 0.4]
    asking = Custom(lambda layers, target: [target] * len(layers), needs=("squared_norm",))
    assert allocation_for(asking) is asking
    assert allocation_for(OWL(m=7)) == OWL(m=7)
    report = run(layout_of(layers), recipe_for("magnitude", None, lambda layers, target: [0.9, 0.4]), 0.5)
    assert [layer.pruned for layer in report.layers] == [14, 25]
    assert report.recipe["allocation"]["function"].endswith("<lambda>")
    with pytest.raises(TypeError, match="allocation is a int"):
        allocation_for(3)
