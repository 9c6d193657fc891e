"""The other yardstick: multiplications and additions a second that the cores reach when nothing else limits them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
ROUNDS, REPEATS = 2_000_000, 5  # a repeat takes some 10 ms


@cache
def library() -> Any | None:
    """The compiled loops, or None where there is no C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak_probe.so"
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target)], check=True, capture_output=True)
        loaded = ctypes.CDLL(str(target))
    for name in ("peak_fp32", "peak_bf16"):
        getattr(loaded, name).restype = ctypes.c_int64
        getattr(loaded, name).argtypes = (ctypes.c_int64,)
    return loaded


def peak_gigaflops(dtype: str, threads: int) -> float | None:
    """The best of some repeats on ``threads`` threads, in GFLOP/s; None without a compiler or such instructions."""
    loops = library()
    if loops is None or not getattr(loops, f"peak_{dtype}")(1):
        return None
    return max(_once(getattr(loops, f"peak_{dtype}"), threads) for _ in range(REPEATS)) / 1e9


def _once(loop: Any, threads: int) -> float:
    """Operations a second of all threads at once, by their own clocks: a core held by others does not count."""
    rates = [0.0] * threads
    start = threading.Barrier(threads)

    def work(index: int) -> None:
        start.wait()
        begin = time.thread_time()
        done = loop(ROUNDS)  # ctypes lets go of the interpreter's lock
        rates[index] = done / (time.thread_time() - begin)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)
