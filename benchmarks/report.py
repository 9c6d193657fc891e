"""What the project claims, beside what the saved results say; a claim that is missed is shown like any other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from claims import Claim, Row
from claims import median as _median
from claims_layers import layer_claims, prefill_claims
from harness import RESULTS, read_runs, show

from pysparse.measure.results import make_table
from pysparse.measure.rounds import Spread


def _overhead(call: str, mode: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        if (row["call"], row["mode"]) != (call, mode):
            return None
        return _median(row["microseconds_beyond_kernel"])

    return figure


def _end_to_end(row: Row) -> float | None:
    return row.get("decode", {}).get("sparse 70%", {}).get("speedup", {}).get("median")


def _all_blocks(engine: str) -> Callable[[Row], float | None]:
    return lambda row: row.get("engines", {}).get(engine, {}).get("speedup") if row["blocks"] == 32 else None


def _pruning(what: str, detail: str, over: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        found = (row["what"], row["detail"]) == (what, detail)
        return _median(row["speedup_over"].get(over)) if found else None

    return figure


def _is_exact(row: Row, tokens: int) -> bool:
    """Tell whether ``row`` compares the exact ways in bf16; the first runs had no other dtype."""
    return row["tokens"] == tokens and "share" not in row and row.get("dtype", "bf16") == "bf16"


def _dense_attention(tokens: int, over: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        spread = row["speedup_over_dense"].get(over) if _is_exact(row, tokens) else None
        return 1.0 / float(spread["median"]) if spread else None

    return figure


def _peak_share(tokens: int) -> Callable[[Row], float | None]:
    return lambda row: row.get("dense_share_of_peak") if _is_exact(row, tokens) else None


def _stripes(tokens: int) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        setting = (row["tokens"], row.get("share"), row.get("run_length"), row.get("group_size"))
        found = setting == (tokens, 0.1, 1, 2048) and row.get("dtype", "bf16") == "bf16"
        return _median(row["speedup_over_dense"].get("stripes")) if found else None

    return figure


def _equal_recall(target: float, over: str) -> Callable[[Row], float | None]:
    """AnchorAttention's speed at 16k synthetic tokens by a setting that reaches recall ``target``."""

    def figure(row: Row) -> float | None:
        asked = ("equal recall", "anchor", "synthetic", 16384, target)
        found = tuple(row.get(name) for name in ("what", "planner", "source", "length", "target")) == asked
        return _median(row[over]) if found else None

    return figure


def _plugin(length: int, engine: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        found = row["what"] == "plug-in" and (row["length"], row["engine"]) == (length, engine)
        return _median(row["faster_than_flash"]) if found else None

    return figure


def _first_token(length: int, engine: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        found = row["what"] == "first token" and (row["length"], row["engine"]) == (length, engine)
        return row["faster_than_sdpa"] if found else None

    return figure


def _long_prompt_claims() -> Iterator[Claim]:
    name = "attention_quality"
    for recall in (0.95, 0.99):
        text = f"AnchorAttention at recall {recall}, synthetic calls of 16384 tokens: speed over "
        yield Claim(f"{text}exact attention", name, 1.0, _equal_recall(recall, "faster_than_dense"))
        faster = _equal_recall(recall, "faster_than_flexprefill")
        yield Claim(f"{text}the FlexPrefill-like planner", name, 1.44, faster)
    for length in (512, 1024, 2048, 4096):
        text = f"a prompt of {length} tokens through the plug-in: speed over its exact way"
        yield Claim(text, name, 0.97, _plugin(length, "pysparse_anchor"))
    for engine in ("pysparse_flash", "pysparse_anchor", "pysparse_proxy"):
        text = f"first token of 16384, 16 Llama-shaped layers, {engine}: speed over torch SDPA"
        yield Claim(text, name, 1.0, _first_token(16384, engine))


def _attention_claims() -> Iterator[Claim]:
    for tokens in (2048, 4096, 8192, 16384):
        text = f"exact attention, bf16, {tokens} tokens: "
        yield Claim(text + "speed over torch SDPA", "attention", 4.5, _dense_attention(tokens, "torch sdpa"))
        yield Claim(text + "share of the measured bf16 peak", "attention", 0.85, _peak_share(tokens))
    for tokens, bound in ((8192, 2.5), (16384, 3.8), (32768, 5.0)):
        text = f"10 % of the stripes, {tokens} tokens, search included: speed over our dense"
        yield Claim(text, "attention", bound, _stripes(tokens))


def _pruning_claims() -> Iterator[Claim]:
    for dtype in ("bf16", "fp32"):
        for over, bound in (("torch stable sort", 90.0), ("torch topk", 18.0)):
            text = f"Wanda's score and row selection, {dtype}: speed over {over}"
            yield Claim(text, "pruning", bound, _pruning("row selection", dtype, over))
        text = f"Wanda's score and 2:4 selection, {dtype}: speed over torch's best form"
        yield Claim(text, "pruning", 25.0, _pruning("2:4 selection", dtype, "torch comparisons"))
    shared = "factor and sweep, layers sharing inputs: 3"
    for what, plain, tuned in (("sweep", 6.0, 2.0), (shared, 4.0, 2.0)):
        for detail in ("50 %", "2:4"):
            for over, bound in (("torch as published", plain), ("torch tuned", tuned)):
                if (what, detail, over) == ("sweep", "2:4", "torch tuned"):
                    continue  # no clean samples yet
                text = f"SparseGPT's {what}, {detail}: speed over {over}"
                yield Claim(text, "pruning", bound, _pruning(what, detail, over))


def _ebf_speed(what: str, detail: str, *over: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        if (row["what"], row.get("detail")) != (what, detail):
            return None
        return min(float(row["speedup_over"][name]["median"]) for name in over)

    return figure


def _ebf_claims() -> Iterator[Claim]:
    forms = ("torch batched", "torch batched, 64 at a time")
    text = "EBF's batched 64 x 64 factors and inverse diagonals: speed over torch's best form"
    yield Claim(text, "ebf", 18.0, _ebf_speed("ridge", "2048 problems of 64 x 64", *forms))
    text = "EBF's whole pruner, 256 x 256: speed over batched torch"
    yield Claim(text, "ebf", 10.0, _ebf_speed("pruner", "256 x 256, 50 %", "torch batched"))


def _model(field: str) -> Callable[[Row], float | None]:
    return lambda row: row[field] if (row["what"], row.get("sparsity")) == ("bundled model", 0.7) else None


def _identical(row: Row) -> float | None:
    return None if row["what"] != "bundled model" else float(row["save_load_save"] == "identical")


def _logits(dtype: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        if row["what"] != "bundled model":
            return None
        difference = row["logit_difference"][dtype]
        return float(difference["max_difference"] / difference["max_value"])

    return figure


def _quality(level: str, ratio: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        if (row["what"], row.get("level"), row.get("allocation")) != ("comparison", level, "uniform"):
            return None
        return row.get(ratio)

    return figure


def _layer_errors(method: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        wanted = row["what"] == "layer errors" and row.get("method", "sparsegpt") == method
        return row["largest_over_mask_only"] if wanted else None

    return figure


def _quality_claims() -> Iterator[Claim]:
    for level in ("60%", "70%", "2:4", "4:8"):
        for ours, theirs in (("sparsegpt", "wanda"), ("wanda", "magnitude")):
            text = f"bundled model, {level}: perplexity of {ours} over {theirs}"
            yield Claim(text, "quality", 1.0, _quality(level, f"{ours}_over_{theirs}"), at_most=True)
        yield Claim(
            f"bundled model, {level}: perplexity of ebf over sparsegpt", "quality", 1.0,
            _quality(level, "ebf_over_sparsegpt"), True,
        )  # fmt: skip
    for method in ("sparsegpt", "ebf"):
        text = f"{method}, any layer and level: output error over its mask's alone, at most"
        yield Claim(text, "quality", 1.0, _layer_errors(method), True)


def _of_row(what: str, key: str, **fields: Any) -> Callable[[Row], float | None]:
    """The figure ``key``, or its median, of the rows of a kind that have these ``fields``."""

    def figure(row: Row) -> float | None:
        if row["what"] != what or any(row.get(name) != value for name, value in fields.items()):
            return None
        value = row[key]
        return float(_median(value) if isinstance(value, dict) else value)

    return figure


def _adaptation_claims() -> Iterator[Claim]:
    text = "adapters trained at 70 % zeros, fp32: "
    yield Claim(f"{text}merged logits off by", "losa", 1e-5, _of_row("merge", "largest_difference"), True)
    yield Claim(
        f"{text}the very same zeros after merging (1 = yes)", "losa", 1.0, _of_row("merge", "same_mask")
    )
    for host in ("wanda", "sparsegpt"):
        ratio = _of_row("comparison", "losa_over_masked_lora", host=host, level=0.7)
        yield Claim(f"{host}, 70 %: perplexity of LoSA over masked LoRA", "losa", 1.0, ratio, True)
    for blocks in (6, 12, 24):
        speedup = _of_row("search", "speedup", blocks=blocks)
        yield Claim(f"2SSP's search, {blocks} blocks: speed over whole passes", "structured", 1.0, speedup)


def _claims() -> Iterator[Claim]:
    yield Claim(
        "generate(), Llama-2-7B blocks, bf16, 70 % zeros: tokens/s over torch", "end_to_end", 3.5, _end_to_end
    )
    text = "generate(), all 32 blocks, 70 % zeros: tokens/s over torch bf16"
    yield Claim(text, "end_to_end", 4.5, _all_blocks("sparse 70%"))
    yield Claim(f"{text}, int8 values", "end_to_end", 7.0, _all_blocks("sparse 70%, int8 values"))
    for call in ("ops.bitmap_linear", "SparseLinear"):
        for mode in ("no_grad", "inference_mode"):
            text = f"{call}, {mode}: microseconds beyond the kernel"
            yield Claim(text, "overhead", 5.0, _overhead(call, mode), at_most=True)
    yield Claim(
        "bundled model at 70 %: linears over dense bf16", "checkpoint", 0.40, _model("linear_ratio"), True
    )
    yield Claim("save, load, save: identical (1 = yes)", "checkpoint", 1.0, _identical)
    yield Claim(
        "packed against masked dense, fp32: of the largest logit", "checkpoint", 1e-5, _logits("fp32"), True
    )
    yield Claim(
        "packed against masked dense, bf16: of the largest logit", "checkpoint", 2e-2, _logits("bf16"), True
    )


def _dispatched(row: Row, ours: str, others: Callable[[str], bool]) -> float | None:
    """``ours``' time over the least of the engines that ``others`` names; None for rows of an older protocol."""
    times = row["microseconds"]
    known = {"torch": "nn.Linear"}.get(ours, ours)
    if "default_way" not in row or known not in times:
        return None
    return float(times[known] / min(time for name, time in times.items() if others(name)))


def _dispatch_claims() -> Iterator[Claim]:
    def is_way(name: str) -> bool:
        return name not in ("chosen", "default")

    def is_dense(name: str) -> bool:
        return name in ("nn.Linear", "kernel")

    def way(row: Row) -> float | None:
        return _dispatched(row, row["way"].removeprefix("kept dense: "), is_way)

    yield Claim("random layers: the way taken over the best way", "dispatch", 1.03, way, True)
    for layer, mode in (("chosen", 'optimize="speed"'), ("default", "the default")):
        for what, others in (("dense", is_dense), ("the best way", is_way)):
            yield Claim(
                f"random layers, {mode}: the layer's call over {what}",
                "dispatch",
                1.03,
                lambda row, layer=layer, others=others: _dispatched(row, layer, others),  # type: ignore[misc]
                True,
            )


def _shapley(what: str, call: str, key: str, turned: bool = False) -> Callable[[Row], float | None]:
    """``key`` of the row that is so called; a spread's median, inverted if ``turned``."""

    def figure(row: Row) -> float | None:
        if (
            not (row["what"].startswith(what) and row["call"] == (call or row["call"]))
            or row.get(key) is None
        ):
            return None
        value = float(row[key]["median"] if isinstance(row[key], dict) else row[key])
        return 1.0 / value if turned else value

    return figure


def _shapley_claims() -> Iterator[Claim]:
    cached, large, name = "FM, table of 39000", "FM, table of 1092000", "shapley"
    rate, ratio, equal = "samples_per_second", "first_is_faster_by", "at_equal_error"
    for text, bound, figure, at_most in (
        ("permutations of 624 players a second, in cache", 440e3, _shapley(cached, "one", rate), False),
        ("the same, a million rows", 200e3, _shapley(large, "one", rate), False),
        ("a pair's time over one order's", 1.3, _shapley(cached, "pair", ratio), True),
        ("two threads over one", 1.9, _shapley(cached, "one, 2 threads", ratio, turned=True), False),
        (
            "over a vectorised torch sampler, one order",
            20.0,
            _shapley(cached, "torch vectorised", ratio),
            False,
        ),
        ("the same, pairs: equal error", 20.0, _shapley(cached, "pair", equal), False),
        (
            "over captum, its best batch, equal error",
            200.0,
            _shapley("captum", "captum, 256 samples", equal),
            False,
        ),
        (
            "over captum, one sample, equal error",
            5000.0,
            _shapley("captum", "captum, one sample", equal),
            False,
        ),
        ("DeepFM's share of torch's fp32 product", 0.6, _shapley("DeepFM", "DeepFM", "of_product"), False),
        ("DeepFM's share of the fp32 peak", 0.6, _shapley("DeepFM", "DeepFM", "of_peak"), False),
        ("memory of 16 passes over that of one", 1.05, _shapley("peak memory", "", "more_bytes"), True),
    ):
        yield Claim(f"Shapley: {text}", name, bound, figure, at_most)


def _lookup_claims() -> Iterator[Claim]:
    def figure(row: Row, module: str) -> float | None:
        meant = (row["sparsity"], row["ids"]) == (0.8, "zipf 1.1") and row["speedup"][module]
        return 1.0 / row["speedup"][module]["median"] if meant else None

    for module in ("Embedding", "EmbeddingBag"):
        yield Claim(
            f"Sparse{module} at 80 %, Zipf ids: time over torch's dense module", "embedding", 1.3,
            lambda row, module=module: figure(row, module), True,  # type: ignore[misc]
        )  # fmt: skip
    yield Claim(
        "SparseEmbedding at 80 %, fp32: memory over dense", "embedding", 0.3,
        lambda row: row["memory_over_dense"] if (row["sparsity"], row["dtype"]) == (0.8, "float32") else None, True,
    )  # fmt: skip


CLAIMS = (
    *layer_claims(), *prefill_claims(), *_claims(),
    *_dispatch_claims(), *_pruning_claims(), *_quality_claims(), *_attention_claims(),
    *_long_prompt_claims(),
    *_ebf_claims(), *_shapley_claims(), *_lookup_claims(), *_adaptation_claims(),
)  # fmt: skip


def figures(claim: Claim, runs: list[tuple[str, Row]]) -> list[float]:
    """The claim's figure in every run that has it, oldest first."""
    found = (
        claim.figure(row)
        for name, run in runs
        if name == claim.benchmark and not run["quick"] and _is_pinned(run) == claim.pinned
        for row in run["rows"]
    )
    return [value for value in found if value is not None]


def _is_pinned(run: Row) -> bool:
    """Tell whether threads were bound to cores: a protocol of its own, which most programs do not follow."""
    return "OMP_PROC_BIND" in (run.get("machine", {}).get("environment") or {})


def load(folder: Path) -> list[tuple[str, Row]]:
    """Every run under ``folder``, with the name of its benchmark."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        name = json.loads(path.read_text(encoding="utf-8")).get("benchmark")
        for run in read_runs(path):
            forced = run.get("protocol", {}).get("isa", "")  # a level below the machine's is another question
            runs.append((f"{name}-avx2" if forced.startswith("avx2") else name, run))
    return runs


def lines(runs: list[tuple[str, Row]]) -> Iterator[list[Any]]:
    for claim in CLAIMS:
        values = figures(claim, runs)
        sign = "<=" if claim.at_most else ">="
        row: list[Any] = [claim.text, f"{sign} {claim.bound:g}"]
        if not values:
            yield [*row, None, None, 0, "not measured"]
            continue
        middle = Spread.of(values).median
        verdict = "yes" if claim.is_met(middle) else "NO"
        met = sum(claim.is_met(value) for value in values)
        yield [
            *row,
            f"{middle:.3g}",
            f"{min(values):.3g}..{max(values):.3g}",
            f"{met}/{len(values)}",
            verdict,
        ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the result files")
    options = parser.parse_args(arguments)
    runs = load(options.results)
    columns = ["claim", "bound", "median of runs", "lowest..highest", "runs that meet it", "met"]
    machines = sorted({str(run["machine"].get("cpu")) for _, run in runs if not run["quick"]})
    show(make_table("claims and results", columns, list(lines(runs)), caption=", ".join(machines)))


if __name__ == "__main__":
    main()
