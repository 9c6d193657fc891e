"""Rivals that run in processes of their own: their threads and pinned packages do not mix with ours."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
PYTHON_VARIABLE = "RIVALS_PYTHON"  # an interpreter whose environment has the rivals' packages
# One file each, with ENGINES {name: variant}, PACKAGES, ERROR_BOUND, load() and build();
# another PYTHON_VARIABLE where its pins exclude the others'.
MODULES = ("numpy_dense", "mkl_csr", "onnxruntime_dense", "openvino_dense", "deepsparse_sparse", "llama_cpp")


@dataclass(frozen=True, slots=True)
class IsolatedEngine:
    """One engine of a rival's file; it multiplies in a process that :meth:`start` makes."""

    name: str
    module: str
    variant: str

    @property
    def _rival(self) -> Any:
        return importlib.import_module(f"rivals.{self.module}")

    @property
    def python(self) -> str:
        """The interpreter that it runs under: ours, unless its environment variable names another."""
        return os.environ.get(getattr(self._rival, "PYTHON_VARIABLE", PYTHON_VARIABLE), sys.executable)

    @property
    def error_bound(self) -> float:
        """Of the norm of the exact product."""
        return float(self._rival.ERROR_BOUND[self.variant])

    def bytes_of(self, rows: int, cols: int) -> int | None:
        """The bytes of a weight in a published layout, so that a missing rival's time can be computed."""
        layout = getattr(self._rival, "bytes_of", None)
        return layout(self.variant, rows, cols) if layout else None

    def probe(self) -> tuple[str, dict[str, str]]:
        """Return why it cannot run here, or an empty string, and the versions of its packages."""
        done = subprocess.run(
            [self.python, str(HERE / "worker.py"), "--probe", self.module], capture_output=True, text=True
        )
        if done.returncode:
            return f"not installed: {done.stderr.strip().splitlines()[-1]}", {}
        return "", json.loads(done.stdout.strip().splitlines()[-1])

    @contextmanager
    def start(self, weight: Tensor, x: Tensor, threads: int, working_set: int) -> Iterator[Remote]:
        """Run a worker that holds ``weight`` [out, in] and multiplies ``x`` [tokens, in] by it while the block runs."""
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: str(Path(folder) / f"{name}.npy") for name in ("weight", "x", "answer")}
            np.save(paths["weight"], weight.float().numpy())
            np.save(paths["x"], x.float().numpy())
            request = {
                "module": self.module, "variant": self.variant, "threads": threads, "working_set": working_set, **paths
            }  # fmt: skip
            count = str(threads)
            # Intel's OpenMP spins for 200 ms after its work unless told otherwise; calls of one sample follow at once.
            # DeepSparse's, unbound, now and then share a core and take several times as long.
            environment = {
                "KMP_BLOCKTIME": "20",
                "NM_BIND_THREADS_TO_CORES": "1",
                **os.environ,
                "OMP_NUM_THREADS": count,
                "MKL_NUM_THREADS": count,
            }
            process = subprocess.Popen(
                [self.python, str(HERE / "worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
            try:
                remote = Remote(self.name, process, json.dumps(request))
                remote.answer = torch.from_numpy(np.load(paths["answer"]))
                yield remote
            finally:
                process.kill()
                process.communicate()


class Remote:
    """A started worker: what it answered, what it holds, and samples of its time."""

    answer: Tensor

    def __init__(self, name: str, process: subprocess.Popen[str], request: str) -> None:
        self._name, self._process = name, process
        held = self._ask(request)
        self.nbytes, self.copies = int(held["nbytes"]), int(held["copies"])

    def sample(self, count: int) -> tuple[float, float]:
        """Return the seconds of a call over ``count`` of them, and the seconds that its threads waited for a core."""
        answer = self._ask(str(count))
        return answer["seconds"], answer["waited"]

    def _ask(self, line: str) -> dict[str, float]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            _, errors = self._process.communicate()
            raise RuntimeError(f"{self._name} ended with {self._process.returncode}: {errors.strip()[-800:]}")
        answer: dict[str, float] = json.loads(reply)
        return answer


def isolated_engines() -> list[IsolatedEngine]:
    return [
        IsolatedEngine(name, module, variant)
        for module in MODULES
        for name, variant in importlib.import_module(f"rivals.{module}").ENGINES.items()
    ]
