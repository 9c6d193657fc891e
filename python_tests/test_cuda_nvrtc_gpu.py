"""Kernels that NVRTC compiled for this very GPU, launched in place of the built ones: the same bits."""

import os
import subprocess
import sys

import pytest
import torch

from pysparse import backend, nvrtc, ops
from pysparse.formats import PACKINGS, BitmapTensor
from pysparse.nn.embedding import SparseEmbedding

reason = backend.missing_reason() or backend.cuda_missing_reason()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(reason), reason=f"no CUDA kernels: {reason}"),
]


def products(seed):
    """Results of each packing at 1 to 20 tokens, and of a lookup."""
    torch.manual_seed(seed)
    weight = torch.randn(300, 1000, device="cuda").bfloat16()
    weight[:, torch.arange(1000) % 4 > 1] = 0
    bitmap = BitmapTensor.from_dense(weight)
    for packing in PACKINGS.values():
        packed = packing.from_bitmap(bitmap)
        yield ops.packed_unpack(packed)
        for tokens in (1, 3, 8, 20):
            yield ops.packed_linear(torch.randn(tokens, 1000, device="cuda").bfloat16(), packed)
    layer = SparseEmbedding.from_dense(torch.randn(200, 13).bfloat16(), torch.rand(200, 13) < 0.3).cuda()
    yield layer(torch.randint(0, 200, (50,), device="cuda"))


def test_loaded_code_computes_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv(backend.EXPERIMENTAL_VARIABLE, "1")
    monkeypatch.setenv(backend.NVRTC_VARIABLE, "0")
    built = list(products(3))
    capability = torch.cuda.get_device_capability()
    try:
        for group in nvrtc.SOURCES:
            nvrtc.load(backend.cuda(), group, [capability], tmp_path, always=True)
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    loaded = list(products(3))
    assert all(torch.equal(a, b) for a, b in zip(built, loaded, strict=True))
    graph, x = torch.cuda.CUDAGraph(), torch.randn(1, 64, device="cuda").bfloat16()
    packed = PACKINGS["delta"].from_bitmap(
        BitmapTensor.from_dense(torch.ones(16, 64, device="cuda").bfloat16())
    )
    expected = ops.packed_linear(x, packed)
    with torch.cuda.graph(graph):
        captured = ops.packed_linear(x, packed)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)


def test_code_for_another_gpu_is_refused_by_the_driver(tmp_path):
    other = (8, 0) if torch.cuda.get_device_capability() != (8, 0) else (9, 0)
    code = (
        "import torch\nfrom pathlib import Path\nfrom pysparse import backend, nvrtc, ops\n"
        "from pysparse.formats import DeltaRows, BitmapTensor\n"
        f"nvrtc.load(backend.cuda(), 'delta', [{other}], Path({str(tmp_path)!r}), always=True)\n"
        "w = DeltaRows.from_bitmap(BitmapTensor.from_dense(torch.ones(16, 64, device='cuda').bfloat16()))\n"
        "ops.packed_linear(torch.ones(1, 64, device='cuda').bfloat16(), w)\n"
    )
    environment = {**os.environ, backend.EXPERIMENTAL_VARIABLE: "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    if "NvrtcError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode != 0
    assert "CUDA kernel" in done.stderr, done.stderr[-2000:]
