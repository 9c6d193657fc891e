"""What `pysparse bench --device cuda` builds, as far as a CPU shows it; with a GPU, the comparison itself."""

import pytest
import torch

from pysparse import api, backend
from pysparse.models import cuda_engines
from pysparse.models.named_shapes import random_model

reason = backend.missing_reason() or backend.cuda_missing_reason()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_random_zeros_have_the_share_that_was_asked_for(sparsity):
    keep = cuda_engines.random_keep(64, 512, sparsity, 3, torch.device("cpu"))
    # Six standard deviations of a mean of 32768 draws.
    assert abs(1 - keep.float().mean() - sparsity) < 6 * 0.5 / 32768**0.5
    assert torch.equal(keep, cuda_engines.random_keep(64, 512, sparsity, 3, torch.device("cpu")))


def test_two_of_four_keeps_two_of_every_four():
    keep = cuda_engines.random_keep(7, 64, None, 1, torch.device("cpu"))
    assert (keep.view(7, 16, 4).sum(2) == 2).all()
    with pytest.raises(ValueError, match="multiple of 4 columns, got 6"):
        cuda_engines.random_keep(2, 6, None, 1, torch.device("cpu"))


def test_a_sparse_copy_computes_what_its_zeros_say():
    dense = random_model("qwen2.5-0.5b", 1, torch.float32)
    copy, error = cuda_engines.sparse_copy(dense, 0.7)
    assert error < 1e-4
    assert any(hasattr(module, "kernel") for module in copy.modules())
    assert not any(hasattr(module, "kernel") for module in dense.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "llama-9"}, "unknown shape 'llama-9'"), ({"sparsities": (0.5, 1.0)}, "1.0"),
        ({"sparsities": (), "two_of_four": False}, "nothing to compare"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_device_is_asked_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        api.benchmark_shape_on_cuda(**arguments)


@pytest.mark.skipif(not reason, reason="this machine has a CUDA device")
def test_without_a_gpu_the_error_says_what_is_missing():
    with pytest.raises(ValueError, match="device 'cuda' cannot be timed here: .+"):
        api.benchmark_shape_on_cuda("qwen2.5-0.5b")


@pytest.mark.gpu
@pytest.mark.skipif(bool(reason), reason=f"no CUDA kernels: {reason}")
def test_two_blocks_on_a_gpu():
    settings = api.BenchSettings(16, 4, 1, 2, 1, None, 0)
    result = api.benchmark_shape_on_cuda("qwen2.5-0.5b", (0.7,), 2, settings)
    assert list(result.decode) == ["torch dense", "sparse 70%", "sparse 2:4", "sparse 70%, stacked"]
    assert all(one.tokens_per_second > 0 for one in result.decode.values())
