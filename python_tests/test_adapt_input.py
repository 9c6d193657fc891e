"""adapt refuses what it cannot do before it loads a model, reads a text or leaves a folder."""

import math

import pytest
from peft import LoraConfig

import pysparse
from pysparse.methods import Adapt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training": {"num_train_epochs": 0}}, "epochs=0 must be a number above 0"),
        ({"training": {"num_train_epochs": math.nan}}, "epochs=nan must be a number above 0"),
        ({"training": {"learning_rate": math.nan}}, "learning_rate=nan must be a number of 0 or more"),
        ({"training": {"learning_rate": -1.0}}, "learning_rate=-1.0 must be a number of 0 or more"),
        ({"training": {"logging_steps": 10}}, "logging_strategy and logging_steps cannot be set"),
        ({"save_format": "x"}, "save_format is one of .*, got 'x'"),
        ({"lora": LoraConfig(lora_alpha=math.nan)}, "alpha=nan must be a number above 0"),
        ({"lora": LoraConfig(lora_alpha=0)}, "alpha=0 must be a number above 0"),
        ({"lora": LoraConfig(lora_dropout=1.0)}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"sparsity": 0.0}, "sparsity=0.0 prunes nothing"),
        ({"sparsity": 0, "method": "losa"}, "sparsity=0 prunes nothing"),
    ],
    ids=str,
)
def test_settings_are_refused_before_the_model_is_looked_for(arguments, message, tmp_path):
    given = {"sparsity": 0.5, "method": "masked-lora", "output_dir": tmp_path / "out", **arguments}
    with pytest.raises(ValueError, match=message):
        pysparse.adapt(tmp_path / "no-such-model", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0.0}, "epochs=0.0"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
    ],
    ids=str,
)
def test_a_stage_refuses_them_when_it_is_written(settings, message):
    with pytest.raises(ValueError, match=message):
        Adapt(**settings)
