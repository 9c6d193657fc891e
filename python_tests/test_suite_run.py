"""Runs of a grid: records, failures, resuming, processes that die, a full disk."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children

import pytest
from suite_grids import TINY, cells
from typer.testing import CliRunner

from pysparse import backend
from pysparse.cli import app
from pysparse.suite.grid import parse_grid
from pysparse.suite.records import (
    KEYS,
    DiskFullError,
    Results,
    comparable,
    explaining_full_disk,
    read_records,
    record_of,
)
from pysparse.suite.run import run_grid
from pysparse.suite.workers import run_in_processes

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
COMMAND = [sys.executable, "-c", "from pysparse.cli import app; app()", "suite", "run"]


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory):
    """A folder that looks like a model until its weights are read."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return folder


def suite(*arguments):
    return CliRunner().invoke(app, ["suite", *map(str, arguments)])


def test_a_run_records_goes_on_after_a_failure_and_resumes(tmp_path, broken_model):
    path, out = tmp_path / "grid.toml", tmp_path / "out"
    path.write_text(TINY + cells(models=f'"{broken_model}", "demo"'))
    result = suite("run", path, "-o", out, "--workers", 0)
    assert result.exit_code == 1, result.output  # a cell failed
    bad, good = sorted(read_records(out), key=lambda record: record["status"] == "done")
    assert list(bad) == list(good) == list(KEYS)
    assert bad["error"]["type"] == "CheckpointError" or bad["error"]["message"]
    assert (bad["quality"], bad["speed"], bad["status"]) == (None, None, "failed")
    assert (good["status"], good["error"], good["family"], good["allocation"]) == (
        "done",
        None,
        "llama",
        "uniform",
    )
    assert good["quality"]["value"] > good["quality"]["dense"] > 1
    assert abs(good["achieved_sparsity"] - 0.5) < 1e-4
    assert (
        sum(layer["shape"][0] * layer["shape"][1] for layer in good["layers"])
        == good["parameters"] - 4096 * 256 - 13 * 256
    )
    assert good["file_bytes"]["sparse"] < good["file_bytes"]["dense"]
    assert {speed["name"] for speed in good["speed"]} == {"decode", "prefill"}
    assert all(speed["ratio_p10"] <= speed["ratio"] <= speed["ratio_p90"] for speed in good["speed"])
    assert good["command"] == f"pysparse suite run {path} --cell {good['id']}"
    assert good["environment"]["torch_threads"] == 1
    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert lines == read_records(out)
    refused = suite("run", path, "-o", out)
    assert refused.exit_code == 2
    assert "go on with --resume" in refused.output
    written = {file.name: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    again = suite("run", path, "-o", out, "--workers", 0, "--resume", "--json", "-")
    assert again.exit_code == 1
    now = {file.name: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    assert {name for name in now if now[name] != written[name]} == {
        f"{bad['id']}.json"
    }  # only what failed ran again


def test_a_smaller_dense_model_is_a_cell_like_any_other(tmp_path):
    small = '[recipes.small]\nmethod = "2ssp"\nnum_samples = 2\nmax_length = 64\n'
    path, out = tmp_path / "grid.toml", tmp_path / "out"
    path.write_text(TINY + small + cells(recipes='"small"', sparsities="0.25"))
    result = suite("run", path, "-o", out, "--workers", 0)
    assert result.exit_code == 0, result.output
    (record,) = read_records(out)
    assert (record["status"], record["layers"]) == ("done", [])
    assert 0.2 < record["achieved_sparsity"] < 0.3
    assert record["file_bytes"]["sparse"] < record["file_bytes"]["dense"]


def test_parquet_holds_the_records(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (the extra pysparse[suite])")
    results = Results(tmp_path)
    cell = parse_grid(TINY + cells()).cells[0]
    quality = {
        "metric": "perplexity",
        "value": float("inf"),
        "dense": 2.0,
        "higher_is_better": False,
        "others": {},
    }
    results.write(
        record_of(
            cell, status="done", quality=quality, layers=[{"name": "inf", "shape": [2, 3], "sparsity": 0.5}]
        )
    )
    assert read_records(tmp_path)[0]["quality"]["value"] == "inf"  # JSON has no infinity
    assert [path.name for path in results.write_tables()] == ["cells.jsonl", "cells.parquet"]
    (row,) = parquet.read_table(tmp_path / "cells.parquet").to_pylist()
    assert row["quality"]["value"] == float("inf")
    assert row["layers"] == [{"name": "inf", "shape": [2, 3], "sparsity": 0.5}]
    assert row["id"] == cell.id


def test_what_is_no_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished cell"):
        read_records(tmp_path)
    (tmp_path / "cells").mkdir()
    for text, message in (
        ("{", "is no record"),
        ("[]", "schema is None"),
        ('{"schema": 1}', "lacks id, status"),
    ):
        (tmp_path / "cells" / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path)


def kill_workers(times, done):
    """Kill each process that appears, ``times`` in all."""
    killed = set()
    while len(killed) < times and not done.is_set():
        for process in active_children():
            if process.pid not in killed and len(killed) < times:
                os.kill(process.pid, signal.SIGKILL)
                killed.add(process.pid)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("deaths", "status"), [(2, "failed"), pytest.param(1, "done", marks=pytest.mark.slow)]
)
def test_a_process_that_dies_is_replaced_and_its_cell_tried_once_more(deaths, status):
    cell = parse_grid("timed = false\n" + TINY + cells()).cells[0]
    done = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(deaths, done))
    killer.start()
    try:
        (record,) = run_in_processes([(cell, "command")], 1)
    finally:
        done.set()
        killer.join()
    assert record["status"] == status
    if deaths == 2:
        assert record["error"]["type"] == "WorkerDied"
        assert "signal 9" in record["error"]["message"]
        assert record["environment"]["cores"]
        assert record["seconds"] > 0
    assert not active_children()


@pytest.mark.slow
def test_a_run_that_is_killed_five_times_gives_the_table_of_one_that_is_not(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(TINY + cells(recipes='"magnitude", "wanda"', sparsities="0.5, 0.7", seeds="0, 1, 2"))
    subprocess.run([*COMMAND, path, "-o", tmp_path / "whole"], check=True, capture_output=True)
    chance, killed, kept = random.Random(5), 0, []
    while killed < 5:
        process = subprocess.Popen(
            [*COMMAND, path, "-o", tmp_path / "cut", "--resume", "--workers", "2"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_for_a_cell(tmp_path / "cut", len(kept), process, chance.random())
        if process.poll() is None:
            process.kill()
            killed += 1
        elif killed < 5:
            pytest.fail(f"the run ended after {killed} kills: {len(kept)} cells were left to it")
        process.wait()
        kept = list((tmp_path / "cut" / "cells").glob("*.json"))
    subprocess.run([*COMMAND, path, "-o", tmp_path / "cut", "--resume"], check=True, capture_output=True)
    whole, cut = (read_records(tmp_path / name) for name in ("whole", "cut"))
    assert [comparable(one) for one in cut] == [comparable(one) for one in whole]
    assert len(whole) == 12
    assert all(record["status"] == "done" for record in whole)


def wait_for_a_cell(folder, before, process, more):
    """Wait until the run has finished one more cell, and a random while longer; half of the times, not that long."""
    started = time.monotonic()
    patience = 3.0 if more < 0.5 else 240.0
    while process.poll() is None and time.monotonic() - started < patience:
        if len(list((folder / "cells").glob("*.json"))) > before:
            time.sleep(more)
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_processes_and_ray_give_the_numbers_of_a_serial_run(tmp_path):
    ray = pytest.importorskip("ray", reason="needs the package ray (the extra pysparse[ray])")
    grid = parse_grid("timed = false\n" + TINY + cells(recipes='"magnitude", "wanda"', seeds="0, 1"))
    serial = run_grid(grid, tmp_path / "serial", workers=0)
    assert (serial.done, serial.failed) == (4, 0)
    run_grid(grid, tmp_path / "processes", workers=2)
    killer = threading.Thread(target=kill_a_ray_worker, args=(ray,))
    killer.start()
    run_grid(grid, tmp_path / "ray", workers=2, ray="local")
    killer.join()
    wanted = [comparable(record) for record in read_records(tmp_path / "serial")]
    for how in ("processes", "ray"):
        assert [comparable(record) for record in read_records(tmp_path / how)] == wanted


def kill_a_ray_worker(ray):
    """Kill the first worker that runs a cell, while it does."""
    import psutil

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            if "ray::_run_cell" in " ".join(process.info["cmdline"] or ()):
                process.kill()
                return
        time.sleep(0.02)
    raise AssertionError("no Ray worker was seen at a cell")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, to mount a small disk")
def test_a_full_disk_leaves_the_earlier_cells_intact(tmp_path):
    path, out = tmp_path / "grid.toml", tmp_path / "out"
    path.write_text("timed = false\n" + TINY + cells(seeds=", ".join(map(str, range(12)))))
    out.mkdir()
    inner = f"mount -t tmpfs -o size=48k none {out} && {{ {shell(COMMAND)} {path} -o {out} --workers 0; code=$?; }}; "
    inner += f"cp -r {out} {tmp_path}/copy; exit $code"
    found = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", inner], capture_output=True, text=True
    )
    if "unshare" in found.stderr or "mount:" in found.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {found.stderr.strip()[:200]}")
    assert found.returncode == 1, found.stderr
    assert "no room left to write" in found.stderr
    assert "--resume" in found.stderr
    records = read_records(tmp_path / "copy")
    assert 1 <= len(records) < 12
    assert all(record["status"] == "done" for record in records)
    assert not list((tmp_path / "copy" / "cells").glob("*.part"))


def shell(words):
    return " ".join(f"'{word}'" for word in words)


def test_a_write_without_room_is_explained(tmp_path):
    results = Results(tmp_path)
    (tmp_path / "cells").mkdir()
    full = OSError(28, "No space left on device")
    with (
        pytest.raises(DiskFullError, match="cells finished before are intact.*--resume"),
        explaining_full_disk(results.cells),
    ):
        raise full
    with pytest.raises(OSError, match="Read-only"), explaining_full_disk(results.cells):
        raise OSError(30, "Read-only file system")
