"""The report of a run, without a browser: rows, the front, what is said of pairs, Markdown, plots, escaping."""

import copy
import importlib
import json
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import suite_records
from typer.testing import CliRunner

from pysparse.cli import app
from pysparse.suite.records import Results, read_records
from pysparse.suite.report import (
    best_table,
    find,
    findings_markdown,
    markdown_tables,
    overview,
    page,
    rows_of,
    save_plots,
)
from pysparse.suite.report.markdown import escape
from pysparse.suite.report.pairs import NO_DIFFERENCE, TOO_FEW, Paired
from pysparse.suite.report.rows import (
    Statistic,
    allocation_of,
    front,
    method_of,
    natural,
    quality_kept,
    reconstruction_of,
)
from pysparse.suite.report.summary import show_setting

HOSTILE = (
    "</script><script>document.title='taken'</script>", "\"><img src=x onerror=\"document.title='taken'\">",
    "<!--<script>", "O'Neil & \"sons\" | *bold* `code`", "Modell-Größe 模型 \u2028 \U0001f9ee", "{{ 7 * 7 }}",
)  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The run as it comes back from disk."""
    results = Results(tmp_path_factory.mktemp("run"))
    for one in suite_records.records():
        results.write(one)
    return read_records(results.folder)


def test_rows_hold_all_seeds_of_a_configuration(records):
    rows = rows_of(records)
    done = [one for one in records if one["status"] == "done"]
    assert len(done) < len(records) == 336
    assert sum(len(row.cells) for row in rows) == len(done)
    assert len(rows) == 8 * 7 * 3
    row = next(row for row in rows if (row.model, row.recipe, row.pattern) == ("cnn-a", "wanda", "2:4"))
    values = [cell["quality"]["value"] for cell in row.cells]
    assert [cell["seed"] for cell in row.cells] == [0, 1]
    assert row.quality == Statistic(sum(values) / 2, min(values), max(values))
    assert row.speedup == pytest.approx(sum(cell["speed"][0]["ratio"] for cell in row.cells) / 2)
    assert [row.model for row in rows] == sorted(
        (row.model for row in rows), key=lambda name: (rows_task(rows, name), natural(name))
    )


def rows_task(rows, model):
    return next(row.task for row in rows if row.model == model)


@pytest.mark.parametrize(
    ("value", "dense", "higher", "expected"),
    [
        (0.8, 0.9, True, 0.8 / 0.9), (40.0, 30.0, False, 0.75), ("inf", 30.0, False, 0.0), ("nan", 30.0, False, None),
        (3.0, 0.0, False, None), (0.0, 30.0, False, None), (0.5, "inf", True, None), (-0.1, 1.0, True, -0.1),
        (None, 1.0, True, None),
    ],
)  # fmt: skip
def test_quality_kept(value, dense, higher, expected):
    kept = quality_kept({"value": value, "dense": dense, "higher_is_better": higher})
    assert kept == (None if expected is None else pytest.approx(expected))


def test_an_allocation_left_to_the_method_is_named():
    record = suite_records.record("language", "demo", "wanda")
    assert allocation_of(record | {"allocation": None}) == "uniform"
    assert allocation_of(record | {"allocation": None, "method": "pot"}) == "l2norm"
    assert allocation_of(record | {"allocation": "owl:m=7"}) == "owl:m=7"
    assert allocation_of(record | {"allocation": None, "method": "2ssp"}) == "the method's own"


def test_front_against_every_pair():
    draw = random.Random(3)
    for count in (0, 1, 2, 30):
        points = [(draw.randrange(8), draw.randrange(8)) for _ in range(count)]
        beaten = [
            any(a[0] >= b[0] and a[1] >= b[1] and a != b for a in points)
            for b in points
        ]  # fmt: skip
        assert set(front(points)) == {index for index, is_beaten in enumerate(beaten) if not is_beaten}


def test_show_setting():
    assert [show_setting(*one) for one in (("unstructured", 0.7), ("2:4", 0.5), ("2:4", 0.6), ("filters", 0.3))] == [
        "70%", "2:4", "2:4 60%", "filters 30%"
    ]  # fmt: skip


def test_best_is_the_highest_median_and_names_who_is_as_good(records):
    rows = rows_of(records)
    table = best_table(rows, "classification")
    assert table.columns == (("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5))
    for model, winners in table.lines:
        for setting, winner in zip(table.columns, winners, strict=True):
            rivals = [row for row in rows if (row.model, row.pattern, row.sparsity) == (model, *setting)]
            assert winner.row.kept.median == max(row.kept.median for row in rivals)
            assert winner.rivals == len(rivals) == 7
            for row in rivals:
                near = row.kept.high >= winner.row.kept.low and row is not winner.row
                assert (row.recipe in winner.close) == near


def test_overview_counts(records):
    run = overview(records)
    assert (run.done, run.failed) == (328, 8)
    assert dict((word, count) for count, word in run.counts) == {
        "tasks": 3, "models": 8, "recipes": 7, "sparsities": 2, "seeds": 2
    }  # fmt: skip
    assert run.seconds == pytest.approx(sum(one["seconds"] for one in records))
    assert run.environments[0][0] == 336


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1.0, 2.0, 3.0), "better"), ((-1.0, -2.0, -0.5), "worse"), ((-1.0, 2.0, 3.0), NO_DIFFERENCE),
        ((0.0, 0.0, 0.0), NO_DIFFERENCE), ((5.0, 6.0), TOO_FEW),
    ],
)  # fmt: skip
def test_verdict_of_a_pair(differences, verdict):
    assert Paired("language", "a", "b", differences).verdict == verdict


def test_findings_see_what_was_planted_and_nothing_else(records):
    allocation, reconstruction, method, recipe, models, families = find(records)
    verdicts = {(line[0], line[1]): line[-1] for line in allocation.lines}
    for task in suite_records.MODELS:
        assert verdicts[task, "erk against uniform"] == "better"
        assert verdicts[task, "owl against uniform"] == NO_DIFFERENCE
    assert {line[-1] for line in reconstruction.lines} == {"better"}
    assert [line[1] for line in method.lines[:2]] == [
        "sparsegpt against magnitude",
        "wanda against magnitude",
    ]
    assert recipe.lines[0][1] == "sparsegpt against magnitude"
    assert models.lines[0][1] == "cnn-b"
    assert models.lines[0][-1] == "better"
    assert models.lines[-1][1] == "vit-c"
    assert families.lines[0][1] == "attention against cnn"
    assert families.lines[0][-1] == "worse"


def test_findings_pair_by_hand():
    def cell(recipe, seed, value):
        made = suite_records.record("language", "demo", recipe, seed=seed)
        return made | {"quality": made["quality"] | {"value": value, "dense": 20.0}}

    pairs = {0: (25.0, 40.0), 1: (40.0, 40.0), 2: (20.0, 80.0)}
    made = [cell(recipe, seed, values[index]) for seed, values in pairs.items()
            for index, recipe in enumerate(("wanda-owl", "wanda"))]  # fmt: skip
    made.append(cell("wanda-owl", 3, 20.0))  # without a partner
    found = find(made)[0]
    (line,) = found.lines
    # 100 * (20 / 25 - 20 / 40) = 30, 0, 75
    assert line[2:] == ("+30.0", "+6.00 .. +66.0", "0 .. +75.0", "2 of 3", "50% +30.0", "better")
    assert "this run does not tell" in find(made)[1].answer[0]


def test_sentences_go_without_settings_that_tell_nothing_apart():
    def answer(*reconstructions):
        return find(
            [
                suite_records.record("language", "demo", "wanda", seed=seed, reconstruction=one)
                | {"recipe": str(one), "id": f"{one}{seed}"}
                for seed in range(3)
                for one in (None, *reconstructions)
            ]
        )[1]

    plain = answer("op:steps=50,lr=0.1", "block:steps=9")
    assert "block 0 (" in plain.answer[0]
    assert " op 0 (" in plain.answer[0]
    assert "steps" not in plain.answer[0]
    assert any(line[1] == "op:steps=50,lr=0.1 against none" for line in plain.lines)
    assert "op:steps=50 " in answer("op:steps=50", "op:steps=60").answer[0]


def test_recipes_that_differ_in_something_unseen_are_left_out():
    made = [
        suite_records.record("language", "demo", recipe, seed=seed)
        for seed in range(3)
        for recipe in ("wanda", "wanda-owl")
    ]
    twins = [
        one | {"recipe": "wanda-again", "id": one["id"][::-1]} for one in made if one["recipe"] == "wanda"
    ]
    assert find(made)[0].lines
    found = find(made + twins)[0]
    assert not found.lines
    assert found.note.startswith("6 cells were left out")


def test_other_settings_keep_recipes_apart():
    def cells(**settings):
        return [
            suite_records.record("language", "demo", recipe, seed=seed)
            | {"recipe": name, "id": f"{name}{seed}", "settings": settings.get(name, {})}
            for seed in range(3)
            for name, recipe in (("plain", "wanda"), ("again", "wanda"), ("owl", "wanda-owl"))
        ]

    assert not find(cells())[0].lines  # two recipes that look alike
    told = find(cells(again={"recalibrate": True}))
    assert told[0].lines[0][1] == "owl against uniform"
    assert told[3].lines[0][1] == "recalibrate=True against nothing else"
    assert told[3].lines[0][-1] == NO_DIFFERENCE
    assert "calibration data" not in told[0].note
    amounts = find(
        cells(
            plain={"num_samples": 64}, again={"num_samples": 64, "compat": "paper"}, owl={"num_samples": 32}
        )
    )
    (line,) = amounts[0].lines
    assert line[1] == "owl against uniform"  # another amount of data does not keep them apart, but it is said
    assert "calibration data" in amounts[0].note


@pytest.mark.parametrize(
    ("method", "reconstruction", "mask", "survivors"),
    [
        ("magnitude", None, "magnitude", "none"), ("wanda", "block:steps=9", "wanda", "block:steps=9"),
        ("pot", "correct", "magnitude", "correct"), ("pot", "op", "magnitude", "correct, op"),
        ("sparsegpt", "obs", "sparsegpt", "none"), ("2ssp", None, "2ssp", "none"),
    ],
)  # fmt: skip
def test_what_a_method_does_to_survivors_is_set_apart_where_the_mask_can_be_had_without(
    method, reconstruction, mask, survivors
):
    record = {"method": method, "reconstruction": reconstruction}
    assert (method_of(record), reconstruction_of(record)) == (mask, survivors)


def test_other_options_of_a_task_are_other_rows_and_no_pairs():
    made = [
        suite_records.record("language", "demo", recipe, seed=seed)
        for seed in range(3)
        for recipe in ("wanda", "wanda-owl")
    ]
    apart = [one | {"environment": {"options": {"windows": len(one["recipe"])}}} for one in made]
    assert len(rows_of([*made, *apart])) == 4
    assert find(made)[0].lines
    assert not find(apart)[0].lines


def test_markdown_table_has_every_row(records):
    text = markdown_tables(records)
    assert text.count("### ") == 8
    table = text.split("### classification: cnn-a\n")[1].split("###")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == "| recipe | 50% | 70% | 2:4 |"
    assert len(lines) == 2 + 7
    assert all(line.count("|") == 5 for line in lines)
    assert sum(line.count("**") for line in lines) == 3 * 2  # one winner a column
    assert "2 seeds" in table


def test_markdown_is_inert():
    for name in HOSTILE:
        shown = escape(name)
        assert "<" not in shown
        assert not re.search(r"(?<!\\)[|*`]", shown)
        assert "\n" not in shown


def test_plots_are_drawn_for_each_task(records, tmp_path):
    files = save_plots(few_of(records), tmp_path)
    kinds = ("pareto", "quality", "layers")
    assert {path.name for path in files} == {
        f"{kind}-classification{suffix}" for kind in kinds for suffix in (".svg", ".png")
    }
    assert all(path.stat().st_size > 5000 for path in files)


@pytest.mark.slow
def test_plots_of_the_same_run_are_the_same_file(records, tmp_path):
    first, second = (save_plots(few_of(records), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def few_of(records):
    return [one for one in records if one["model"] in ("cnn-a", "vit-a")]


def test_plots_survive_any_name(tmp_path):
    rows = [
        suite_records.record("language", name, "wanda", seed=seed)
        for name in ("$\\frac$ <b>", "../../x")
        for seed in (0, 1)
    ]
    files = save_plots([one | {"task": "../lang uage"} for one in rows], tmp_path)
    assert {path.parent for path in files} == {tmp_path}


def test_plots_without_a_finished_cell(tmp_path):
    one = suite_records.failed(suite_records.record("language", "demo", "wanda"))
    with pytest.raises(ValueError, match="no cell is done"):
        save_plots([one], tmp_path)


def test_plots_name_the_extra(monkeypatch, tmp_path, records):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pysparse\[plot\]"):
        save_plots(records[:4], tmp_path)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and what lies in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.addresses, self.handlers = [], [], [], []
        self.inside = None
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_page_is_one_file_and_small(records):
    text = page(records, "A grid")
    assert len(text.encode()) < 600_000
    found = Page(text)
    assert found.tags.count("script") == 2
    assert not [one for one in found.addresses if not one.startswith(("#", "data:"))]
    assert not found.handlers
    data = json.loads(found.scripts[0])
    assert len(data["rows"]) == 168
    assert len(data["failed"]) == 8
    commands = {cell["command"] for row in data["rows"] for cell in row["cells"]}
    assert commands == {one["command"] for one in records if one["status"] == "done"}
    assert all(len(data["layouts"][row["layout"]]) == len(row["layers"]) == 8 for row in data["rows"])


def test_page_is_inert_to_hostile_names():
    plain = Page(page([suite_records.record("language", "demo", "wanda")], "plain"))
    made = []
    for name in HOSTILE:
        one = copy.deepcopy(suite_records.record("language", "demo", "wanda"))
        one.update(model=name, recipe=name, family=name, command=name, id=name, environment={"cpu": name})
        one["layers"][0]["name"] = name
        one["quality"]["metric"] = name
        one["speed"][0]["name"] = name
        made += [one, suite_records.failed(one, kind=name, message=name) | {"id": name + "f"}]
    found = Page(page(made, HOSTILE[0]))
    assert found.tags.count("script") == plain.tags.count("script")
    assert "img" not in found.tags
    assert not found.handlers
    for name in HOSTILE:
        assert name in found.text
    data = json.loads(found.scripts[0])
    assert {row["model"] for row in data["rows"]} == set(HOSTILE)
    assert {cell["message"] for cell in data["failed"]} == set(HOSTILE)


def test_page_without_numbers_that_json_lacks():
    one = suite_records.record("language", "demo", "wanda")
    one["quality"]["value"] = "inf"
    two = copy.deepcopy(one) | {"id": "2" * 16, "recipe": "nan"}
    two["quality"] = two["quality"] | {"value": "nan"}
    three = copy.deepcopy(one) | {
        "id": "3" * 16,
        "recipe": "bare",
        "speed": None,
        "file_bytes": None,
        "layers": None,
    }
    rows = {row["recipe"]: row for row in json.loads(Page(page([one, two, three], "odd")).scripts[0])["rows"]}
    assert rows["wanda"]["kept"] == [0, 0, 0]
    assert rows["nan"]["kept"] is None
    assert rows["bare"]["speed"] == []
    assert rows["bare"]["file"] is None


def test_a_run_with_nothing_done_has_a_page():
    one = suite_records.failed(suite_records.record("language", "demo", "wanda"))
    assert "No cell is done yet" in page([one], "failed")
    assert markdown_tables([one]) == "No finished cell.\n"


def test_layers_are_left_out_before_the_page_grows_too_large(records, monkeypatch):
    whole = len(page(records, "large").encode())
    monkeypatch.setattr(sys.modules["pysparse.suite.report.page"], "LIMIT_BYTES", whole - 1)
    text = page(records, "large")
    assert len(text.encode()) < whole
    assert "would pass its limit of size" in text
    assert "layers" not in json.loads(Page(text).scripts[0])["rows"][0]


def test_findings_page(records):
    text = findings_markdown(records, "A <b>grid</b>")
    assert text.startswith("# Findings: A &lt;b>grid&lt;/b>\n")
    for question in (
        "Which allocation?",
        "Which reconstruction?",
        "Which architecture is the most sparsifiable?",
    ):
        assert f"## {question}" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} <= {9, 12}


def command(*arguments):
    return CliRunner().invoke(app, ["suite", *map(str, arguments)])


def test_the_commands_write_what_they_name(records, tmp_path):
    results = Results(tmp_path / "a run")
    for one in records[:60]:
        results.write(one)
    made = command("report", results.folder, "--markdown", tmp_path / "table.md")
    assert made.exit_code == 0, made.stderr
    assert "report.html" in made.stderr
    assert "<title>a run - pysparse suite</title>" in (results.folder / "report.html").read_text()
    assert (tmp_path / "table.md").read_text() == markdown_tables(records[:60])
    made = command("findings", results.folder, "-o", tmp_path / "found.md", "--title", "named")
    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "found.md").read_text() == findings_markdown(records[:60], "named")


def test_two_runs_become_one_report(records, tmp_path):
    for name, part in (("first", records[:20]), ("second", records[15:40])):
        for one in part:
            Results(tmp_path / name).write(one)
    made = command("report", tmp_path / "first", tmp_path / "second")
    assert made.exit_code == 0, made.stderr
    found = Page((tmp_path / "first" / "report.html").read_text())
    assert "first, second" in found.text
    data = json.loads(found.scripts[0])
    assert sum(len(row["cells"]) for row in data["rows"]) + len(data["failed"]) == 40


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the repository's benchmarks/ folder")
def test_published_records_make_the_same_page_again(records, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    results = Results(tmp_path / "run")
    for one in records[:30]:
        results.write(one)
    importlib.import_module("publish_suite").main(
        [str(results.folder), "--name", "some", "--output", str(tmp_path)]
    )
    stem = "some_amd-epyc_2026-11-27"
    assert set(capsys.readouterr().out.split()) == {
        str(tmp_path / f"{stem}{end}") for end in (".jsonl.gz", ".html", ".md", "_findings.md")
    }
    again = page(read_records(tmp_path / f"{stem}.jsonl.gz"), "some, 2026-11-27")
    assert again == (tmp_path / f"{stem}.html").read_text()


def test_the_commands_refuse_what_is_no_run(tmp_path):
    made = command("report", tmp_path)
    assert made.exit_code == 2
    assert "holds no finished cell" in made.stderr
    (tmp_path / "cells.jsonl").write_text('{"schema": 99}\n')
    made = command("findings", tmp_path / "cells.jsonl")
    assert made.exit_code == 2
    assert "its schema is 99, expected 1" in made.stderr
    (tmp_path / "cells.jsonl.gz").write_bytes(b"\x1f\x8b" + bytes(20))
    made = command("report", tmp_path / "cells.jsonl.gz")
    assert made.exit_code == 2
    assert "cells.jsonl.gz holds no records" in " ".join(made.stderr.split())
