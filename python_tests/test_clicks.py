"""Click data: bundled sets, the generator, logs in TSV and Parquet in pieces, the rare-value rule, missing extras."""

import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pysparse.calib.clicks import encode, load_clicks
from pysparse.calib.clicks_files import ClickLog, count_values, criteo, number_bin, parquet, read_clicks
from pysparse.calib.clicks_synthetic import SyntheticClicks, SyntheticSpec, fm_logit


@pytest.mark.parametrize(
    ("name", "samples", "clicks", "fields", "rows"),
    [("fair", 6366, 2053, 8, 46), ("randhie", 20190, 13882, 7, None), ("digits", 1797, 901, 64, None)],
)
def test_bundled_sets(name, samples, clicks, fields, rows):
    found = load_clicks(name)
    assert found.ids.shape == (samples, fields)
    assert found.labels.sum() == clicks
    assert rows is None or sum(found.field_sizes) == rows
    assert (found.counts() > 0).all()
    if name == "randhie":
        assert (found.counts() < 10).sum() <= fields  # at most the shared rows


def test_an_unknown_set_and_a_missing_package(monkeypatch):
    with pytest.raises(ValueError, match="no data set 'criteo'; bundled are fair, randhie, digits"):
        load_clicks("criteo")
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    for name in ("statsmodels.datasets", "statsmodels.datasets.fair"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"statsmodels: pip install 'pysparse\[ctr\]'"):
        load_clicks("fair")


def test_rare_values_share_the_last_row():
    found = encode({"a": list("xxyyz"), "b": [1, 1, 1, 1, 1]}, [0, 1, 0, 1, 1], rare=2)
    assert found.field_sizes == (3, 1)
    assert found.ids.tolist() == [[0, 3], [0, 3], [1, 3], [1, 3], [2, 3]]


def test_split():
    found = load_clicks("fair")
    parts = found.split(0.6, 0.2, seed=1)
    assert [len(part.ids) for part in parts] == [3819, 1273, 1274]
    assert sum(part.counts() for part in parts).tolist() == found.counts().tolist()
    with pytest.raises(ValueError, match="leave a rest"):
        found.split(0.6, 0.4)


def test_the_generator_hits_its_rate_and_repeats():
    truth = SyntheticClicks(SyntheticSpec(copy_of=1, rate=0.3))
    clicks = truth.draw(20_000)
    assert clicks.labels.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 20_000))
    assert np.array_equal(clicks.ids[:, 8] - 400, clicks.ids[:, 1] - 50)
    again = SyntheticClicks(truth.spec).draw(20_000)
    assert np.array_equal(clicks.ids, again.ids)
    assert np.array_equal(clicks.labels, again.labels)
    assert not np.array_equal(clicks.labels, truth.draw(20_000, seed=1).labels)
    assert [len(one.ids) for one in truth.chunks(2500, chunk=1000)] == [1000, 1000, 500]
    share = clicks.counts()[:50] / 20_000
    assert share[0] / share[1] == pytest.approx(2**1.1, rel=0.1)
    assert np.std(fm_logit(truth.table, clicks.ids)) > 0.3
    with pytest.raises(ValueError, match="copy_of is a field, 0 to 7, got 9"):
        SyntheticSpec(copy_of=9)


def test_number_bins():
    assert [number_bin(text) for text in ("", "-1", "0", "2", "3", "100", "1e6")] == [
        "", "-1", "0", "2", "b1", "b21", "b190",
    ]  # fmt: skip


def write_criteo(path, lines=57):
    rows = []
    for i in range(lines):
        numbers = [str(i % 3 * 50)] * 12 + [""]
        rows.append("\t".join([str(i % 2), *numbers, *[f"c{i % 5 if i else 'once'}"] * 26]))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_criteo_log_in_pieces(tmp_path):
    log = criteo(write_criteo(tmp_path / "day.tsv"))
    vocabulary = count_values(log)
    assert vocabulary.field_sizes == (4,) * 12 + (2,) + (6,) * 26
    pieces = list(read_clicks(ClickLog(**{**as_dict(log), "batch_rows": 10}), vocabulary))
    assert [len(piece.ids) for piece in pieces] == [10] * 5 + [7]
    (whole,) = read_clicks(log, vocabulary)
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    assert whole.ids[0, -1] == sum(vocabulary.field_sizes) - 1  # "conce" is rare
    assert whole.labels.tolist() == [i % 2 for i in range(57)]


def as_dict(log):
    return {name: getattr(log, name) for name in log.__dataclass_fields__}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "line 57 has .* columns instead of 40"),
        (lambda text: text.replace("1\t", "7\t", 1), "labels are 0 or 1, sample 1 has 7"),
        (lambda text: text.replace("1\t", "yes\t", 1), "labels are 0 or 1, sample 1 has 'yes'"),
        (lambda text: text.replace("\t50\t", "\tfifty\t", 1), "sample 1 has 'fifty' in numeric column 'I1'"),
        (lambda text: "", "holds no samples"),
    ],
)
def test_a_damaged_log(tmp_path, change, message):
    path = write_criteo(tmp_path / "day.tsv")
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        count_values(criteo(path))


def test_a_parquet_log(tmp_path):
    path = tmp_path / "log.parquet"
    columns = {
        "id": list(range(40)),
        "click": [0, 1] * 20,
        "site": ["a", None, "b", "a"] * 10,
        "hour": [5] * 40,
    }
    pq.write_table(pa.table(columns), path)
    log = parquet(path, numeric=("hour",))
    assert log.fields == ("hour", "site")
    vocabulary = count_values(log)
    assert vocabulary.field_sizes == (2, 4)
    (found,) = read_clicks(log, vocabulary)
    assert found.labels.tolist() == columns["click"]
    assert found.counts().tolist() == [40, 0, 20, 10, 10, 0]
    with pytest.raises(ValueError, match="has no column 'clicked'; it has id, click, site, hour"):
        parquet(path, label="clicked")


@pytest.mark.slow
def test_ten_million_rows_in_bounded_memory():
    """Beside the table and the law of one field, a draw holds one chunk."""
    truth = SyntheticClicks(SyntheticSpec(values=1_250_000, zipf=1.05))
    assert truth.table.shape == (10_000_000, 4)
    tracemalloc.start()
    seen = sum(len(part.ids) for part in truth.chunks(400_000, chunk=20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 400_000
    assert peak < 20_000 * 8 * 4 * 8 * 6  # a few float64 arrays [chunk, fields, dims]
