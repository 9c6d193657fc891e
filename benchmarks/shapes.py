"""Sizes that the benchmarks measure, and the published models they come from."""

from __future__ import annotations

import torch

LINEAR = {
    "4096x4096": (4096, 4096),  # (out, in): Llama-2-7B query, key, value, output
    "11008x4096": (11008, 4096),  # Llama-2-7B gate and up
    "4096x11008": (4096, 11008),  # Llama-2-7B down
    "14336x4096": (14336, 4096),  # Llama-3-8B gate and up
    "2048x2048": (2048, 2048),  # TinyLlama query and output: fits in the caches
    "128x96": (128, 96),  # for --quick: shows that the benchmark runs, and nothing else
}
DECODE_SHAPES = ("4096x4096", "11008x4096", "4096x11008", "14336x4096")
QUICK_SHAPE = "128x96"
TOKENS = (1, 4, 16)
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
END_TO_END_SPARSITIES = (0.5, 0.6, 0.7)
