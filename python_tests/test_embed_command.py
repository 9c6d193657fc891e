"""The commands about Shapley values: plan first, results as JSON, files written, errors of the user's in one line."""

import json

import pytest
from typer.testing import CliRunner

from pysparse import backend
from pysparse.cli import app
from pysparse.methods.shaver_bits import load_affine
from pysparse.nn import SparseEmbedding

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == code, result.output
    return result


def test_embed(tmp_path):
    arguments = ["embed", "synthetic", "--samples", 3000, "--dims", 4, "--epochs", 2, "--json", "-"]
    plan = json.loads(call(*arguments, "--dry-run").stdout)
    entries, rows = 2 * 8 * 4 * 2100, 2 * 8 * 2100
    forms = {name: entries for name in ("shaver", "shaver, model target", "shaver, zero")}
    forms["shaver, rows"] = rows
    assert plan == {"evaluations": 3 * entries + rows, "samples": 2100, "forms": forms}
    plot = tmp_path / "study.png"
    found = json.loads(call(*arguments, "--sparsity", 0.8, "-o", tmp_path / "out", "--plot", plot).stdout)
    assert {row["scores"] for row in found["rows"]} == {
        "shaver", "shaver, model target", "shaver, zero", "shaver, rows", "codebook error", "taylor", "magnitude",
        "random",
    }  # fmt: skip
    assert all(row["sparsity"] == 0.8 and 0 < row["auc"] < 1 for row in found["rows"])
    assert found["lookup"][0]["packed_microseconds"] > 0
    assert SparseEmbedding.load(tmp_path / "out" / "table-0.8.safetensors").table.density == pytest.approx(
        0.2
    )
    wide = (tmp_path / "out" / "table-0.8.safetensors").stat().st_size
    call(*arguments, "--sparsity", 0.8, "-o", tmp_path / "narrow", "--bits", 8)
    narrow = tmp_path / "narrow" / "table-0.8.safetensors"
    assert load_affine(narrow).table.density == pytest.approx(0.2)
    assert narrow.stat().st_size < wide
    assert plot.stat().st_size > 10_000


def test_samples_bound_bundled_data():
    found = json.loads(call("embed", "fair", "--samples", 100, "--dry-run", "--json", "-").stdout)
    assert found["samples"] == 70  # of 100, 70 % are for training


def test_embed_refuses():
    assert "no data set 'criteo'" in call("embed", "criteo", code=2).stderr
    for rate in ("-1", "nan"):
        refused = call("embed", "fair", "--learning-rate", rate, code=2).stderr.strip()
        assert refused.endswith("must be positive and finite")
        assert refused.count("\n") == 0  # no plan before it
        assert "CtrTraining" not in refused
    assert "sparsities are in [0, 1]" in call("embed", "fair", "--sparsity", 1.5, code=2).stderr
    assert "bits is 4, 8 or 16, got 5" in call("embed", "fair", "--bits", 5, code=2).stderr
    assert "logs are .parquet, .tsv, .txt files, got x.csv" in call("embed", "x.csv", code=2).stderr
    assert "nothing.tsv" in call("embed", "nothing.tsv", code=2).stderr


def test_shapley(tmp_path):
    file = tmp_path / "gloves.py"
    file.write_text(
        "import numpy as np\ndef value(c):\n    return np.minimum(c[:, :2].sum(1), c[:, 2:].sum(1))\nnot_one = 3\n"
    )
    arguments = ["shapley", f"{file}:value", "--players", 5, "--json", "-"]
    assert json.loads(call(*arguments, "--budget", 100, "--dry-run").stdout)["evaluations"] <= 100
    exact = json.loads(call(*arguments, "--budget", 32, "--estimator", "exact").stdout)
    assert exact["mean"] == pytest.approx([0.65, 0.65, 7 / 30, 7 / 30, 7 / 30])
    drawn = json.loads(call(*arguments, "--budget", 20_000).stdout)
    for mean, error, true in zip(drawn["mean"], drawn["stderr"], exact["mean"], strict=True):
        assert abs(mean - true) < 5 * error
    assert "needs a budget of" in call(*arguments, "--budget", 3, code=2).stderr
    wrong = ["shapley", f"{file}:not_one", "--players", 5, "--budget", 100]
    assert "defines no function 'not_one'" in call(*wrong, code=2).stderr
    assert "FILE.py:FUNCTION" in call("shapley", "value", "--players", 5, "--budget", 99, code=2).stderr
