"""Two runs side by side: what is outside of the noise, and what only one of them has."""

import pytest
from suite_grids import TINY, cells
from typer.testing import CliRunner

from pysparse.cli import app
from pysparse.suite.compare import compare
from pysparse.suite.grid import parse_grid
from pysparse.suite.records import Results, record_of

GRID = parse_grid(TINY + cells(recipes='"magnitude", "wanda"', sparsities="0.5, 0.7", seeds="0, 1, 2"))


def write(folder, perplexity, ratio, skip=()):
    """Records with perplexity(cell) and speed-up (p10, median, p90) ratio(cell)."""
    results = Results(folder)
    for cell in GRID.cells:
        if cell.recipe in skip:
            continue
        low, middle, high = ratio(cell)
        quality = {
            "metric": "perplexity",
            "value": perplexity(cell),
            "dense": 20.0,
            "higher_is_better": False,
            "others": {},
        }
        speed = {"name": "decode", "unit": "tokens/s", "batch": 1, "tokens": 8, "dense": 10.0, "sparse": 10.0 * middle,
                 "ratio": middle, "ratio_p10": low, "ratio_p90": high}  # fmt: skip
        sizes = {"dense": 100, "sparse": 60}
        results.write(record_of(cell, status="done", quality=quality, speed=[speed], file_bytes=sizes))
    return folder


@pytest.fixture
def runs(tmp_path):
    def before(cell):
        return 30.0 + cell.seed  # 30..32 over seeds

    def after(cell):
        worse = cell.recipe == "magnitude" and cell.sparsity == 0.7
        return before(cell) + (5.0 if worse else 0.5)

    first = write(tmp_path / "a", before, lambda cell: (0.9, 1.0, 1.1))
    fast = write(
        tmp_path / "b", after, lambda cell: (1.9, 2.0, 2.1) if cell.recipe == "wanda" else (1.0, 1.05, 1.2)
    )
    return first, fast


def test_only_what_leaves_the_noise_is_a_change(runs):
    found = compare(*runs)
    verdicts = {(one.key[2], one.key[4], one.figure): one.verdict for one in found.changes}
    assert verdicts == {
        ("magnitude", 0.5, "perplexity"): "within noise", ("magnitude", 0.7, "perplexity"): "worse",
        ("wanda", 0.5, "perplexity"): "within noise", ("wanda", 0.7, "perplexity"): "within noise",
        ("magnitude", 0.5, "decode speed-up"): "within noise", ("magnitude", 0.7, "decode speed-up"): "within noise",
        ("wanda", 0.5, "decode speed-up"): "better", ("wanda", 0.7, "decode speed-up"): "better",
        **{(recipe, sparsity, "file bytes"): "same" for recipe in ("magnitude", "wanda") for sparsity in (0.5, 0.7)},
    }  # fmt: skip
    back = {one.verdict for one in compare(*reversed(runs)).changes if one.figure == "perplexity"}
    assert back == {"within noise", "better"}


def test_the_command_shows_changes_and_what_is_missing(runs, tmp_path):
    less = write(tmp_path / "c", lambda cell: 30.0, lambda cell: (0.9, 1.0, 1.1), skip=("wanda",))
    Results(less).write(
        record_of(GRID.cells[-1], status="failed", error={"type": "ValueError", "message": "no"})
    )
    result = CliRunner().invoke(app, ["suite", "compare", str(runs[0]), str(less)])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "2 settings only in" in text
    assert "failed in" in text
    result = CliRunner().invoke(app, ["suite", "compare", *map(str, runs)])
    assert "worse" in result.output
    assert "within noise" in result.output  # of the summary
    everything = CliRunner().invoke(app, ["suite", "compare", *map(str, runs), "--all"])
    assert len(everything.output.splitlines()) > len(result.output.splitlines())


def test_runs_without_a_common_setting(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished cell"):
        compare(runs[0], tmp_path / "empty")
    other = tmp_path / "other"
    cell = parse_grid(TINY + cells(sparsities="0.9")).cells[0]
    Results(other).write(record_of(cell, status="failed", error={"type": "ValueError", "message": "no"}))
    with pytest.raises(ValueError, match="no finished setting in common"):
        compare(runs[0], other)


def test_list_names_what_a_grid_may_use():
    result = CliRunner().invoke(app, ["suite", "list"])
    assert result.exit_code == 0, result.output
    for word in ("language", "minilm", "sparsegpt", "fcpts", "2ssp", "num_samples"):
        assert word in result.output
