"""onnxruntime's CPU provider: a model of one MatMul in fp32, the only precision that it has a fast one for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

ENGINES = {"onnxruntime fp32": "fp32"}
PACKAGES = ("onnxruntime",)
ERROR_BOUND = {"fp32": 1e-4}


def load() -> None:
    """Raise ImportError with the reason when it cannot run here."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401


@cache
def share_pool(threads: int) -> None:
    """Make one pool for all copies: else the threads of one session spin while another's are timed."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def model_bytes(weight: np.ndarray, tokens: int) -> bytes:
    """An ONNX model that multiplies x [tokens, in] by weight [out, in] transposed."""
    from onnx import TensorProto, helper, numpy_helper

    rows, cols = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, rows])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    # An old version of the format: the oldest of the rivals must read it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    return model.SerializeToString()


def build(
    variant: str, weight: np.ndarray, x: np.ndarray, threads: int
) -> tuple[Callable[[], np.ndarray], int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    share_pool(threads)
    options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(
        model_bytes(weight, len(x)), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x}
    return lambda: session.run(None, feed)[0], weight.nbytes
