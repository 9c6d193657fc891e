"""OpenVINO's CPU plug-in, dense, in fp32 and with its hint for bf16."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ENGINES = {"OpenVINO fp32": "f32", "OpenVINO bf16": "bf16"}
PACKAGES = ("openvino",)
ERROR_BOUND = {"f32": 1e-4, "bf16": 0.02}


def load() -> None:
    """Raise ImportError with the reason when it cannot run here."""
    import openvino  # noqa: F401


def build(
    variant: str, weight: np.ndarray, x: np.ndarray, threads: int
) -> tuple[Callable[[], np.ndarray], int]:
    import openvino

    opset = openvino.opset13
    entry = opset.parameter(list(x.shape), np.float32)
    # A copy: constants of equal content would be shared between the models and stay in the caches.
    product = opset.matmul(entry, opset.constant(weight.copy()), transpose_a=False, transpose_b=True)
    compiled = openvino.Core().compile_model(
        openvino.Model([product], [entry]),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": variant,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x))

    def call() -> np.ndarray:
        request.infer()
        return request.get_output_tensor().data

    return call, weight.size * (2 if variant == "bf16" else 4)
