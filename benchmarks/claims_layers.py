"""What is claimed of one linear layer on the CPU, over all shapes and runs, and of a whole model beside llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench_prefill import target
from claims import Claim, Row, median
from shapes import DECODE_SHAPES, LINEAR, SPARSITIES

# One token, cold weights: the speed-up over a rival that each of SPARSITIES must reach.
BFLOAT16 = {
    "pysparse dense": (1.6, 2.0, 2.6, 3.4, 4.8),
    "torch": (2.8, 3.6, 5.2, 6.5, 10.0),
    "torch, no oneDNN": (1.8, 2.3, 3.2, 4.0, 6.0),
}
INT8 = {
    "torch": (4.2, 5.3, 7.0, 9.5, 13.0),
    "torch int8 dynamic": (1.4, 1.7, 2.3, 3.0, 4.0),
    "torch int4pack g128": (1.1, 1.4, 1.9, 2.5, 3.3),
}
# Patterns over our dense kernel: engine, pattern, speed-up.
PATTERNS = (("pysparse n:m", "2:4", 1.65), ("pysparse n:m", "1:4", 3.2), ("pysparse n:m int8", "2:4", 2.9))
AVX2 = (("bf16", 1.1), ("fp32", 3.0))


def _linear(dtype: str, sparsity: float, over: str, group: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        key = (row["dtype"], row["sparsity"], row["tokens"], row["mask"])
        return median(row[group][over]) if key == (dtype, sparsity, 1, "random") else None

    return figure


def _int8_nm(engine: str, zeros: str, over: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        found = (row["zeros"], row["tokens"]) == (zeros, 1) and engine in row["speedup"]
        return median(row["speedup"][engine].get(over)) if found else None

    return figure


def _prefill(shape: str, dtype: str, tokens: int) -> Callable[[Row], float | None]:
    """The layer's speed-up over torch as a part of its target: one figure for each sparsity."""

    def figure(row: Row) -> float | None:
        if (row["shape"], row["dtype"], row["tokens"]) != (shape, dtype, tokens):
            return None
        wanted = target(dtype, tokens, LINEAR[shape][1], row["sparsity"])
        speedup = median(row["speedup_over_torch"].get("chosen"))
        return None if wanted is None or speedup is None else speedup / wanted

    return figure


def _rival(ours: str, theirs: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        meant = (row["sparsity"], row["tokens"], row["cached"]) == (0.7, 1, False)
        return median(row["speedup_of"][ours].get(theirs)) if meant else None

    return figure


def layer_claims() -> Iterator[Claim]:
    """One token: the tables above; then AVX2 alone, the read probe, rivals and llama.cpp."""
    for over, bounds in BFLOAT16.items():
        for sparsity, bound in zip(SPARSITIES, bounds, strict=True):
            text = f"bf16, 1 token, {sparsity:.0%} zeros: speed over {over}"
            figure = _linear("bf16", sparsity, over, "sparse_speedup_over")
            yield Claim(text, "linear", bound, figure)
    for over, bounds in INT8.items():
        for sparsity, bound in zip(SPARSITIES, bounds, strict=True):
            text = f"int8 values, 1 token, {sparsity:.0%} zeros, threads bound: speed over {over}"
            figure = _int8_nm("pysparse int8", f"{sparsity:.0%}", over)
            yield Claim(text, "int8_nm", bound, figure, pinned=True)
    for engine, pattern, bound in PATTERNS:
        text = f"{pattern}, {engine}, 1 token, threads bound: speed over our dense bf16"
        yield Claim(text, "int8_nm", bound, _int8_nm(engine, pattern, "pysparse dense"), pinned=True)
    for dtype, bound in AVX2:
        text = f"{dtype}, 1 token, 70% zeros, AVX2 alone for both: speed over torch"
        yield Claim(text, "linear-avx2", bound, _linear(dtype, 0.7, "torch", "sparse_speedup_over"))
    for dtype in ("bf16", "fp32"):
        figure = _linear(dtype, 0.5, "read probe", "dense_kernel_speedup_over")
        yield Claim(f"{dtype}, 1 token: our dense kernel over the read probe", "linear", 0.85, figure)
    for theirs in ("MKL CSR fp32", "llama.cpp Q8_0", "llama.cpp Q4_0"):
        text = f"int8 values, 1 token, 70% zeros: speed over {theirs}"
        yield Claim(text, "rivals", 1.0, _rival("pysparse int8", theirs))
    yield Claim(
        "all 32 Llama-2-7B blocks, 70% zeros, int8 values: tokens/s over llama.cpp Q4_0", "llama_cpp", 1.0,
        lambda row: median(row["over_llama_cpp"]) if "pysparse" in row["engine"] else None,
    )  # fmt: skip


def prefill_claims() -> Iterator[Claim]:
    """Many tokens, by the way that the layer chooses."""
    for dtype, tokens in (("bf16", 16), ("bf16", 64), ("bf16", 256), ("fp32", 256)):
        for shape in DECODE_SHAPES[: 2 if tokens == 16 else None]:
            text = f"{shape} {dtype}, {tokens} tokens, 50 to 90 % zeros: speed over torch, of its target"
            yield Claim(text, "prefill", 1.0, _prefill(shape, dtype, tokens))
