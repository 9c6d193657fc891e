"""DeepSparse 1.8.0, the last release with wheels: unstructured sparsity in fp32, closed source, discontinued.

It pins old packages, so it has an environment of its own, named by DEEPSPARSE_PYTHON.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import numpy as np

ENGINES = {"DeepSparse fp32": "fp32"}
PACKAGES = ("deepsparse",)
ERROR_BOUND = {"fp32": 1e-4}
PYTHON_VARIABLE = "DEEPSPARSE_PYTHON"


def load() -> None:
    """Raise ImportError with the reason when it cannot run here."""
    import deepsparse  # noqa: F401


def build(
    variant: str, weight: np.ndarray, x: np.ndarray, threads: int
) -> tuple[Callable[[], np.ndarray], int]:
    from deepsparse import compile_model
    from onnxruntime_dense import model_bytes  # the worker's folder is on its path

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        with open(path, "wb") as file:
            file.write(model_bytes(weight, len(x)))
        engine = compile_model(path, batch_size=len(x), num_cores=threads)
    # Its layout is not public; it must read the kept values at least.
    return lambda: engine.run([x], val_inp=False)[0], 4 * int(np.count_nonzero(weight))
