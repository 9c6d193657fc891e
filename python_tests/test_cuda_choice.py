"""Which CUDA kernel a layer takes, from what costs, and which reports open their gate: none of it needs a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from cuda_weights import groups_only, pairs_only

from pysparse import backend, ops
from pysparse.formats import PACKINGS, BitmapTensor, NMRows
from pysparse.formats.device import nm_pattern
from pysparse.nn import SparseLinear
from pysparse.nn.device import TOKENS_VARIABLE, DeviceWeight, expected_tokens, predict
from pysparse.nn.device_costs import DeviceCosts, Gpu, bytes_per_entry, device_costs

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def roomy(monkeypatch):
    """A device that takes every kernel, and costs like a fast GPU's: delta by the weight, fragment by the entry."""
    monkeypatch.setattr(
        "pysparse.ops.max_tokens", lambda packing, cols, device: 8 if packing in ("delta", "nm") else 32
    )
    counts = (1, 2, 4, 8, 16, 32)
    costs = DeviceCosts(
        "a GPU",
        {
            "cublas": {n: (5.0, 0.24, 0.0) for n in counts},
            "delta": {n: (2.5, 0.27 + 0.04 * n, 0.015 * n) for n in counts[:4]},
            "fragment": {n: (4.0, 0.1, 0.3 + 0.01 * n) for n in counts},
            "pair": {n: (2.5, 0.28 + 0.01 * n, 0.0) for n in counts},
        },
    )
    monkeypatch.setattr("pysparse.nn.device.device_costs", lambda gpu: costs)
    return costs


def test_the_packing_follows_density_and_pattern(roomy):
    def packing(sparsity, tokens, rows=4096, cols=4096):
        bitmap = BitmapTensor.from_dense(reference.sparse_matrix(rows, cols, sparsity, torch.bfloat16))
        return predict(bitmap, tokens).packing

    assert [packing(s, 1) for s in (0.9, 0.7, 0.5, 0.1, 0.0)] == ["delta", "delta", "delta", "dense", "dense"]
    assert [packing(s, 8) for s in (0.9, 0.5)] == ["delta", "fragment"]
    assert packing(0.9, 64) == "dense"
    assert packing(0.0, 1, 16, 64) == "dense"  # saves no memory, whatever the microseconds of a tiny layer
    pairs = BitmapTensor.from_dense(pairs_only(torch.randn(1024, 1024).bfloat16()))
    assert predict(pairs, 8).packing == "pair"


@pytest.fixture
def measured_nm(roomy, monkeypatch):
    """The device of ``roomy`` with costs of nm, a little below delta's by the byte."""
    lines = {n: (2.0, 0.25 + 0.03 * n, 0.01 * n) for n in (1, 2, 4, 8)}
    costs = replace(roomy, lines=roomy.lines | {"nm": lines})
    monkeypatch.setattr("pysparse.nn.device.device_costs", lambda gpu: costs)
    return costs


@pytest.mark.parametrize(
    ("n", "m", "packing"),
    [
        (1, 4, "nm"), (2, 8, "nm"), (4, 8, "nm"), (1, 8, "nm"), (1, 16, "nm"), (2, 16, "nm"),
        (2, 4, "pair"),  # the sparse tensor cores' own
        (7, 8, "fragment"),  # as nm it has more bytes than densely
    ],
)  # fmt: skip
def test_a_pattern_is_found_and_taken(measured_nm, n, m, packing):
    bitmap = BitmapTensor.from_dense(groups_only(torch.randn(2048, 4096).bfloat16(), n, m))
    found = predict(bitmap)
    assert found.packing == packing
    if packing == "nm":
        args = ("nm", 1, bitmap.shape, bitmap.density, (n, m))
        dense = measured_nm.microseconds("cublas", 1, bitmap.shape, bitmap.density)
        gain = dense / measured_nm.microseconds(*args)
        assert f"{gain:.2g}x dense expected at 1 token (figures of a GPU)" in found.why


def test_sparse_groups_in_a_loose_pattern_stay_with_delta(measured_nm):
    for rows, cols, sparsity in [(2048, 4096, 0.95), (100, 200, 0.8)]:  # some group of 16 keeps five or more
        weight = torch.randn(rows, cols).bfloat16() * (torch.rand(rows, cols) >= sparsity)
        assert nm_pattern(BitmapTensor.from_dense(weight)) is not None
        assert predict(BitmapTensor.from_dense(weight)).packing == "delta"


def test_without_a_run_a_pattern_is_taken_on_request_only(roomy, monkeypatch):
    bitmap = BitmapTensor.from_dense(groups_only(torch.randn(2048, 4096).bfloat16(), 2, 8))
    monkeypatch.delenv(backend.EXPERIMENTAL_VARIABLE, raising=False)
    assert predict(bitmap).packing == "delta"
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    found = predict(bitmap)
    assert found.packing == "nm"
    assert found.why.endswith("(figures of a GPU, nm not measured, as delta)")


def test_an_nm_layer_says_its_pattern():
    weight = DeviceWeight("nm", 100, (2, 8), 8, 8, "why")
    assert weight.names == ("packed_values", "packed_places")
    assert weight.describe(torch.float16, "auto") == (
        "linear-nm-float16-cuda (2:8) up to 8 tokens, unpack + torch beyond: why"
    )
    bitmap = BitmapTensor.from_dense(groups_only(torch.randn(20, 70).half(), 2, 8))
    packed = NMRows.from_bitmap(bitmap, 2, 8)
    buffers = {"packed_values": packed.values, "packed_places": packed.places}
    assert torch.equal(weight.to_bitmap(buffers, (20, 70)).to_dense(), bitmap.to_dense())


def test_bytes_of_nm_need_its_pattern():
    with pytest.raises(ValueError, match=r"depends on its pattern \(n, m\), which is missing"):
        bytes_per_entry("nm", 0.25)


def test_a_prediction_says_where_it_loses(roomy):
    bitmap = BitmapTensor.from_dense(reference.sparse_matrix(4096, 4096, 0.5, torch.bfloat16))
    found = predict(bitmap)
    dense, delta = (roomy.microseconds(k, 1, bitmap.shape, bitmap.density) for k in ("cublas", "delta"))
    assert found.why == f"50% sparse, {dense / delta:.2g}x dense expected at 1 token (figures of a GPU)"
    assert found.pays_to == 2
    weight = DeviceWeight("delta", bitmap.nnz, (), 8, found.pays_to, "why")
    assert weight.describe(torch.bfloat16, "auto") == (
        "linear-delta-bfloat16-cuda up to 8 tokens (expected no faster than dense from 3 on), "
        "unpack + torch beyond: why"
    )
    assert weight.describe(torch.bfloat16, "packed") == (
        "linear-delta-bfloat16-cuda up to 2 tokens, a dense copy beyond: why"
    )


def test_costs_between_and_beyond_what_was_measured(roomy):
    assert roomy.microseconds("delta", 3, (64, 64), 0.5) == roomy.microseconds("delta", 4, (64, 64), 0.5)
    assert roomy.microseconds("delta", 9, (64, 64), 0.5) == float("inf")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_expected_tokens_must_be_a_number(monkeypatch, text):
    monkeypatch.setenv(TOKENS_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{TOKENS_VARIABLE}={text} is not a number of tokens from 1"):
        expected_tokens()
    monkeypatch.delenv(TOKENS_VARIABLE)
    assert expected_tokens() == 1


def test_the_committed_costs_cover_each_kernel():
    costs = device_costs()
    assert {"cublas", "delta", "fragment", "pair"} <= costs.lines.keys() <= {"cublas", *PACKINGS}
    for by_tokens in costs.lines.values():
        assert 1 in by_tokens
        assert all(c >= 0 for line in by_tokens.values() for c in line)
    assert costs.microseconds("delta", 1, (4096, 4096), 0.3) < costs.microseconds(
        "cublas", 1, (4096, 4096), 0.3
    )


# As its driver told the run; a data sheet; the boost clock times the multiprocessors.
H200 = Gpu("NVIDIA H200", 4814.3, 261.4)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 1008.0, 322.6)


def test_another_gpu_is_expected_to_have_its_own_rates():
    measured = device_costs()
    assert device_costs(H200) is not None
    assert device_costs(H200).lines == measured.lines
    slow = device_costs(RTX_4090)
    assert slow.gpu == "NVIDIA H200, scaled to NVIDIA GeForce RTX 4090"
    call, megabyte, mega = measured.lines["delta"][1]
    assert slow.lines["delta"][1] == pytest.approx(
        (call, megabyte * H200.gigabytes_per_second / 1008, mega * 261.4 / 322.6)
    )

    # Where memory is slow for the cores, decoding no longer hides what the bitmap saves: its bytes are the fewest at
    # half density, and no gain exceeds what they save.
    def gain(gpu, kernel):
        times = [device_costs(gpu).microseconds(name, 1, (8192, 8192), 0.5) for name in ("cublas", kernel)]
        return times[0] / times[1]

    assert gain(H200, "delta") > gain(H200, "fragment")
    assert gain(RTX_4090, "fragment") > gain(RTX_4090, "delta")
    assert 2 / (2 * 0.5 + 0.141) > gain(RTX_4090, "fragment") > 1.5 > gain(H200, "fragment")


def sparse(sparsity=0.8, dtype=torch.bfloat16):
    return BitmapTensor.from_dense(reference.sparse_matrix(1024, 1024, sparsity, dtype))


@pytest.mark.skipif(not backend.cuda_missing_reason(), reason="this machine runs the CUDA kernels")
def test_without_kernels_a_layer_on_a_gpu_holds_its_weight_densely_and_says_why(monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    bitmap, reason = sparse(), backend.cuda_missing_reason()
    with pytest.warns(RuntimeWarning, match=f"sparse layers on CUDA hold their weights densely: {reason}"):
        DeviceWeight.choose(bitmap)
    weight, (array,) = DeviceWeight.choose(bitmap)  # said once: a second warning would be an error here
    assert torch.equal(array, bitmap.to_dense())
    assert weight.describe(torch.bfloat16, "auto") == f"dense torch: {reason}"


def test_float32_on_a_gpu_is_held_densely(monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    bitmap = sparse(dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"float32 on cuda \(bfloat16 and float16 have one\)"):
        weight, (array,) = DeviceWeight.choose(bitmap)
    assert weight.packing == "dense"
    assert torch.equal(array, bitmap.to_dense())


@pytest.mark.skipif(not backend.cuda_missing_reason(), reason="this machine runs the CUDA kernels")
def test_without_a_gpu_the_prediction_is_that_for_an_h200():
    assert predict(sparse(0.7)).packing == "delta"
    assert [ops.max_tokens("delta", cols) for cols in (4096, 14336, 28672, 60000)] == [8, 8, 4, 0]
    assert ops.max_tokens("fragment", 60000) == 64


def test_a_gpu_that_tells_no_rates_is_not_scaled():
    costs = device_costs(Gpu("a vGPU", 0.0, 100.0))
    assert costs.lines == device_costs().lines
    assert costs.gpu == "NVIDIA H200, as a vGPU tells no rates of its own"


def test_without_a_device_the_gate_says_why_and_import_works():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert backend.cuda_missing_reason()
    assert backend.cuda_gate("delta") == backend.cuda_missing_reason()
    assert not any(key.supported for key in backend.cuda_kernels())


@pytest.mark.skipif(backend._cuda is None, reason="built without CUDA")
@pytest.mark.parametrize("vouched", [True, False])
def test_the_gate_opens_for_the_sources_of_a_report_only(tmp_path, vouched, monkeypatch):
    monkeypatch.delenv(backend.EXPERIMENTAL_VARIABLE, raising=False)
    hashes = backend.cuda().SOURCE_HASHES if vouched else {"delta": "0" * 64}
    (tmp_path / "report.json").write_text(json.dumps({"source_hashes": hashes}))
    code = (
        "from pathlib import Path\nfrom pysparse import backend\n"
        f"backend.CUDA_REPORT = Path({str(tmp_path / 'report.json')!r})\n"
        "backend.cuda_missing_reason = lambda: ''\nprint(repr(backend.cuda_gate('delta')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip() == "''") is vouched, done.stdout
    asked = {**os.environ, backend.EXPERIMENTAL_VARIABLE: "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=asked)
    assert done.stdout.strip() == "''"


def test_a_layer_moves_between_dtypes_and_devices_of_one_kind():
    linear = torch.nn.Linear(70, 30).bfloat16()
    linear.weight.data[torch.rand(30, 70) < 0.6] = 0
    layer = SparseLinear.from_dense(linear)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer = layer.to("cpu").half().bfloat16()
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert torch.equal(after["bitmask"], before["bitmask"])
