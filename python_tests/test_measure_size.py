"""Bytes on disk and in memory, and the report: against files and tensors whose sizes are known."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from pysparse.measure import available_bytes, checkpoint_bytes, file_size, model_bytes, peak_memory
from pysparse.measure.memory import resident_bytes
from pysparse.measure.report import report
from pysparse.measure.size import read_header
from pysparse.nn import SparseLinear, sparsify_

PNG = b"\x89PNG\r\n\x1a\n"
ARRAYS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.tensor([7, -9]),
    "c": torch.ones(0, 5, dtype=torch.bfloat16),
}


def half_zeros(rows, cols, dtype=torch.bfloat16, bias=False):
    linear = nn.Linear(cols, rows, bias=bias, dtype=dtype).requires_grad_(False)
    linear.weight[:, ::2] = 0
    return linear


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with one packed layer "up", one dense layer "down" and an embedding."""
    up, down = half_zeros(16, 64, bias=True), nn.Linear(64, 16, bias=False, dtype=torch.bfloat16)
    packed = {f"up.{name}": value.clone() for name, value in SparseLinear.from_dense(up).state_dict().items()}
    save_file(
        {**packed, "down.weight": down.weight.detach(), "embed.weight": torch.zeros(10, 64)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def test_header_says_where_each_tensor_lies(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(ARRAYS, path, metadata={"format": "pt"})
    entries, content = read_header(path), path.read_bytes()
    assert set(entries) == set(ARRAYS)
    for name, array in ARRAYS.items():
        entry = entries[name]
        assert (entry.shape, entry.size) == (tuple(array.shape), array.nbytes)
        stored = content[entry.offset : entry.offset + entry.size]
        assert stored == array.view(torch.uint8).numpy().tobytes() if array.numel() else stored == b""
    assert entries["b"].read_integers() == [7, -9]
    with pytest.raises(ValueError, match="expected a few int64, got 48 bytes of F32"):
        entries["a.weight"].read_integers()


def with_header(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05\0\0",
        bytes(8),
        (2**63).to_bytes(8, "little") + b"{}",
        with_header({})[:-1],
        with_header(b"not json"),
        with_header(b'{"a": '),
        with_header(b"\xff\xfe{}"),
        with_header([1, 2]),
        with_header(3),
        with_header(b"[" * 100_000),
        with_header({"a": None}),
        with_header({"a": {"dtype": "F32", "shape": [1]}}),
        with_header({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}) + bytes(4),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}) + bytes(8),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}) + bytes(4),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),  # no data at all
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + bytes(4),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}) + bytes(4),
    ],
)
def test_damaged_headers_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is no safetensors file"):
        read_header(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_gives_an_answer_or_a_value_error(tmp_path_factory, data):
    content = bytearray(save(ARRAYS))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except ValueError:
        return
    assert all(0 <= e.offset <= e.offset + e.size <= len(content) for e in entries.values())


def test_sizes_of_a_packed_checkpoint(checkpoint):
    total = (checkpoint / "model.safetensors").stat().st_size
    packed = 2 * 16 * 32 + 16 * 8 + 16 * 8 + 16  # half of the values, one bit each, row offsets, shape
    size = file_size(checkpoint)
    assert (size.total, size.linears, size.linears_dense, size.layers) == (total, packed, 2 * 16 * 64, 1)
    assert size.other == total - packed
    assert size.linear_ratio == packed / (2 * 16 * 64)
    both = file_size(checkpoint, ["up", "down"])
    assert (both.linears, both.linears_dense, both.layers) == (packed + 2048, 2 * 2048, 2)
    assert file_size(checkpoint, ["down"]).linear_ratio == file_size(checkpoint, []).linear_ratio == 1.0
    assert checkpoint_bytes(checkpoint) == total


def test_sizes_need_what_they_measure(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="the checkpoint has no linear layer 'middle'"):
        file_size(checkpoint, ["middle"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        file_size(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        checkpoint_bytes(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up.shape": None}, "packed layer 'up' has no 'up.shape'"),
        ({"up.shape": torch.tensor([16, 64, 1])}, r"layer 'up' has the shape \[16, 64, 1\]"),
        ({"up.shape": torch.tensor([16, -64])}, r"layer 'up' has the shape \[16, -64\]"),
        ({"up.shape": torch.tensor([16.0, 64.0])}, "expected a few int64"),
        ({"up.compressed": torch.zeros(4, dtype=torch.complex64)}, "'up' has values of unknown dtype C64"),
    ],
)
def test_sizes_of_a_wrong_checkpoint(tmp_path, change, message):
    tensors = {
        f"up.{k}": v.clone() for k, v in SparseLinear.from_dense(half_zeros(16, 64)).state_dict().items()
    }
    tensors = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        file_size(tmp_path)


def test_shared_tensors_count_once():
    tied = nn.ModuleDict({"a": nn.Linear(8, 4, bias=False), "b": nn.Linear(8, 4, bias=False)})
    tied["b"].weight = tied["a"].weight
    assert model_bytes(tied).total == 4 * 8 * 4
    packed = SparseLinear.from_dense(half_zeros(16, 64, bias=True))
    assert (model_bytes(packed).parameters, model_bytes(packed).buffers) == (2 * 16, packed.nbytes)


def test_peak_memory_sees_what_came_and_went():
    size = 200 << 20
    with peak_memory() as memory:
        block = torch.ones(size, dtype=torch.uint8)
        del block
    assert memory.peak >= memory.before
    if memory.since == "block":  # Linux lets the mark be set back
        assert size * 0.9 < memory.growth < size * 3
    with peak_memory() as small:
        pass
    assert small.peak < memory.peak or memory.since == "process start"
    assert resident_bytes() > 10 << 20
    assert available_bytes() is None or available_bytes() > 0


def sparse_model():
    torch.manual_seed(0)
    model = nn.Sequential(half_zeros(32, 64, torch.float32), nn.ReLU(), nn.Linear(32, 8))
    sparsify_(model)
    return model


def test_report_counts_zeros_and_bytes(tmp_path):
    result = report(sparse_model())
    first, last = result.layers
    assert (first.path, first.shape, first.sparsity) == ("0", (32, 64), 0.5)
    assert first.dense_bytes == 32 * 64 * 4 > first.stored_bytes
    assert (last.shape, last.sparsity, last.stored_bytes) == ((8, 32), 0.0, 8 * 32 * 4)
    assert result.sparsity == 0.5  # over the layers that are sparse at all
    assert result.linear_bytes == first.stored_bytes + last.stored_bytes
    assert result.linear_bytes_dense == first.dense_bytes + last.dense_bytes
    written = json.loads(result.to_json(tmp_path / "report.json"))
    assert written["linear_bytes"] == json.loads((tmp_path / "report.json").read_text())["linear_bytes"]
    assert result.plot(tmp_path / "report.png").read_bytes().startswith(PNG)
    assert "50.0%" in str(result)
    assert "<" in result._repr_html_()


def test_report_of_a_dense_and_of_a_deep_model():
    assert report(nn.Sequential(nn.Linear(4, 4))).sparsity == 0.0
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(70)])
    assert "*.0 (70)" in str(report(deep))  # one line a kind of layer
    with pytest.raises(ValueError, match="Sequential has no Linear layers"):
        report(nn.Sequential(nn.ReLU()))
