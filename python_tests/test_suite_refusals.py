"""Runs that cannot be reported or compared: empty ones, and two that measured other things."""

import gzip

import pytest
from suite_records import record
from typer.testing import CliRunner

from pysparse.cli import app
from pysparse.suite.compare import compare
from pysparse.suite.records import Results


def write(folder, dense=28.7, tokens=64, **changes):
    made = record("language", "demo", "wanda", **changes)
    made["quality"] |= {"dense": dense, "value": made["quality"]["value"] * dense / 28.7}
    for speed in made["speed"]:
        speed["tokens"] = tokens
    Results(folder).write(made)
    return folder


def verdicts(found):
    return {change.figure: change.verdict for change in found.changes}


def test_another_protocol_is_no_change(tmp_path):
    runs = write(tmp_path / "a"), write(tmp_path / "b", dense=35.2, id="0" * 16)
    found = compare(*runs)
    assert verdicts(found) == {
        "perplexity": "not comparable", "file bytes": "same", "decode speed-up": "same", "prefill speed-up": "same",
    }  # fmt: skip
    assert "dense is 28.7" in found.changes[0].obstacle
    assert found.to_dict()["changes"][0]["verdict"] == "not comparable"
    shown = CliRunner().invoke(app, ["suite", "compare", *map(str, runs)], env={"COLUMNS": "250"}).output
    assert "not comparable: dense is 28.7" in shown
    assert "1 settings were run otherwise" in " ".join(shown.split())


def test_a_dense_model_on_other_kernels_is_the_same(tmp_path):
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", dense=28.7 * (1 + 2e-4)))
    assert verdicts(found)["perplexity"] == "worse"
    assert not found.run_otherwise
    assert "not comparable" not in found.summary()


def test_speed_ups_of_other_workloads_are_no_change(tmp_path):
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", tokens=8))
    assert verdicts(found)["perplexity"] == "same"
    assert verdicts(found)["decode speed-up"] == "not comparable"
    assert found.changes[2].obstacle == "batch 1, tokens 64 before, batch 1, tokens 8 after"


@pytest.mark.parametrize("command", ["report", "findings"])
def test_a_run_without_a_cell_is_refused(tmp_path, command):
    (tmp_path / "cells.jsonl").touch()
    result = CliRunner().invoke(app, ["suite", command, str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no finished cell" in result.stderr
    assert not list(tmp_path.glob("*.html")) + list(tmp_path.glob("*.md"))
    packed = tmp_path / "cells.jsonl.gz"
    packed.write_bytes(gzip.compress(b""))
    assert "holds no finished cell" in CliRunner().invoke(app, ["suite", command, str(packed)]).stderr
