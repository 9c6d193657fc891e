"""What goes with every figure: the machine card, kernels and causes, JSON, tables, plots, progress."""

import json
import math
import os

import pytest
import torch
from rich.console import Console

import pysparse.measure.machine as machine
from pysparse import backend
from pysparse.measure import Chart, Spread, machine_card, make_table, save_plot, write_json
from pysparse.measure.kernels import kernel_info, kernel_table
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.results import dumps, format_number, megabytes, to_jsonable, write_text

PNG = b"\x89PNG\r\n\x1a\n"


def test_machine_card_is_json_and_complete():
    card = json.loads(dumps(machine_card()))
    for name in ("cpu", "cpu_id", "isa_flags", "cores", "caches", "memory_bytes", "load_average", "packages"):
        assert name in card
    assert card["cores"] == os.cpu_count()
    assert card["torch_threads"] == torch.get_num_threads()
    assert card["pysparse_isa"] == backend.isa()
    assert card["packages"]["torch"] == torch.__version__


def test_machine_card_never_raises(monkeypatch):
    def broken(*_):
        raise OSError("no such thing on this platform")

    monkeypatch.setattr(machine, "_read", broken)
    monkeypatch.setattr(os, "getloadavg", broken)
    monkeypatch.setattr(machine, "_git", broken)
    card = machine_card()
    for name in ("cpu", "caches", "load_average", "busy"):
        assert card[name] is None
        assert "no such thing" in card["unreadable"][name]
    assert card["cores"] == os.cpu_count()
    json.loads(dumps(card))


def test_last_level_cache_is_the_largest():
    caches = machine.cache_bytes()
    assert machine.last_level_cache_bytes() == max(caches.values(), default=0)
    assert all(size % 1024 == 0 for size in caches.values())


def test_kernel_info_names_the_kernel_and_the_cause():
    chosen = kernel_info("bitmap", dtype=torch.float32)
    table = [row for row in kernel_table() if row["taken"] and row["op"] == "linear"]
    assert chosen.kernel in {f"linear-{row['format']}-{row['dtype']}-{row['isa']}" for row in table}
    assert kernel_info("bitmap", dtype=torch.float16).kernel == "unpack + torch"
    assert "more than" in kernel_info("dense", tokens=1000).reason
    with backend.force_isa("generic"):
        assert kernel_info("dense").kernel.endswith("generic")
        assert "forced level generic" in kernel_info("dense").reason
    with pytest.raises(ValueError, match="unknown format 'csr'; choose one of bitmap, dense"):
        kernel_info("csr")
    with pytest.raises(ValueError, match="tokens=0"):
        kernel_info(tokens=0)


def test_values_become_json():
    value = {
        1: (math.inf, -math.inf, math.nan),
        "dtype": torch.bfloat16,
        "spread": Spread(1.0, 0.5, 2.0, 3),
        "tensor": torch.tensor(3),
        "path": machine._CPUS,
    }
    assert json.loads(dumps(value)) == {
        "1": ["inf", "-inf", "nan"],
        "dtype": "bfloat16",
        "spread": {"median": 1.0, "p10": 0.5, "p90": 2.0, "samples": 3},
        "tensor": 3,
        "path": str(machine._CPUS),
    }
    assert to_jsonable({3}) == [3]


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = write_json(tmp_path / "new" / "result.json", {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it \udc80")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (True, "True"), (1234567, "1 234 567"), (1234.5, "1234"), (123.45, "123.5"), (12.345, "12.35"),
        (0.12345, "0.123"), (math.inf, "inf"), ("x", "x"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert format_number(value) == text


def test_tables_and_sizes():
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(make_table("title", ["name", "value"], [["first", 1.5], ["second", None]], "caption"))
    assert all(word in capture.get() for word in ("title", "name", "first", "1.50", "second", "-", "caption"))
    assert (megabytes(1_500_000), megabytes(2.5e9)) == ("1.5 MB", "2.50 GB")


def test_plots_are_pictures(tmp_path):
    lines = Chart("lines", "x", "y", {"a": ([0, 1], [1.0, 2.0]), "b": ([0, 1], [2.0, 1.0])}, reference=1.5)
    bars = Chart("bars", "", "y", {"": ([0, 1], [1.0, 2.0])}, bars=True, x_names=["one", "two"], log_y=True)
    path = save_plot(tmp_path / "folder" / "plot.png", [lines, bars], caption="a machine")
    assert path.read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="no charts"):
        save_plot(tmp_path / "none.png", [])


def test_progress_goes_to_stderr(capsys):
    with progress_on_stderr() as advance:
        advance("build", 1, 2)
        advance("build", 2, 2)
    with progress_on_stderr(False) as advance:
        advance("silent", 1, 1)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.strip() == "build: 2/2, 0 s left"
