"""A whole model of int8 values under a bitmap beside llama.cpp's Q4_0 of the same shape, token by token."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from bench_end_to_end import packed_blocks
from harness import WAIT_LIMIT, Run, command_line, show, threads_of
from torch import nn

from pysparse.huggingface.attention import use_attention
from pysparse.huggingface.cache import make_room_
from pysparse.measure.latency import bytes_per_step, generate_timed, random_tokens
from pysparse.measure.quality import evaluating
from pysparse.measure.results import make_table, to_jsonable
from pysparse.measure.rounds import Spread, percentile, ratios, round_robin, torch_threads
from pysparse.models.named_shapes import RANDOM_WEIGHTS, SHAPES, named_shape
from pysparse.nn import fuse_norms_, fuse_rotary_, sparsify_

HERE = Path(__file__).resolve().parent
PYTHON_VARIABLE = (
    "LLAMA_PYTHON"  # an interpreter with llama-cpp-python and gguf; ours, unless it says another
)
# What of a token beside the linear layers runs on our kernels.
PARTS: dict[str, Callable[[nn.Module], object]] = {
    "attention": use_attention, "norms": fuse_norms_, "rotary": fuse_rotary_,
    "cache": make_room_,
}  # fmt: skip
OURS, RIVAL = "pysparse {sparsity:.0%}, int8 values", "llama.cpp Q4_0"


class LlamaCpp:
    """A llama.cpp model in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process, self._log = process, log
        self.about = self._read()

    def generate(self, prompt: int, count: int) -> dict[str, Any]:
        """Return the seconds of each token, and those that its threads waited for a core."""
        assert self._process.stdin
        self._process.stdin.write(f"{prompt} {count}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        reply = self._process.stdout.readline()
        if not reply:
            status = self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"llama.cpp ended with {status}: {self._log.read().strip()[-800:]}")
        answer: dict[str, Any] = json.loads(reply)
        return answer


def python() -> str:
    return os.environ.get(PYTHON_VARIABLE, sys.executable)


def missing() -> str:
    """Why llama.cpp cannot run here, or an empty string."""
    done = subprocess.run([python(), "-P", "-c", "import llama_cpp, gguf"], capture_output=True, text=True)
    return f"not installed: {done.stderr.strip().splitlines()[-1]}" if done.returncode else ""


@contextmanager
def llama_cpp(options: argparse.Namespace) -> Iterator[LlamaCpp]:
    """Write the model's file, or take the one that is there, and run it while the block runs."""
    shape = {**named_shape(options.shape).settings, "blocks": options.blocks}
    # Its log goes to a file: nobody reads a pipe while the model loads, and a full one would stop it.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        path = options.gguf or Path(folder) / "model.gguf"
        with subprocess.Popen(
            [
                python(), str(HERE / "rivals" / "llama_cpp_model.py"),
                str(path), json.dumps(shape), str(threads_of(options)),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads_of(options))},
        ) as process:  # fmt: skip
            try:
                yield LlamaCpp(process, log)
            finally:
                process.kill()


def sparse_model(options: argparse.Namespace) -> nn.Module:
    """All blocks with int8 values, and the parts of ``options`` on our kernels.

    The head has no zeros and int8 values too: 9 bits a weight, where llama.cpp's Q6_K has 6.6.
    """

    def pack(model: nn.Module) -> None:
        sparsify_(model, values="int8")
        sparsify_(model, filter_fn=lambda _, path: path == "lm_head", values="int8", min_sparsity=0.0)

    model = packed_blocks(options, pack)
    for part in options.parts:
        PARTS[part](model)
    return model


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the two generate by turns; a round in which threads waited for other programs is dropped."""
    with nullcontext() if missing() else llama_cpp(options) as rival:
        model = sparse_model(options)
        prompt = random_tokens(model, 1, options.prompt)
        name = OURS.format(sparsity=max(options.sparsity))
        with evaluating(model):
            calls: dict[str, Any] = {name: lambda: generate_timed(model, prompt, options.new_tokens)}
            if rival is not None:
                calls[RIVAL] = lambda: rival.generate(options.prompt, options.new_tokens)
            run = round_robin(calls, options.rounds)
        samples: dict[str, list[dict[str, Any]]] = {RIVAL: run.results[RIVAL]} if rival else {}
        samples[name] = [
            {**to_jsonable(one), "waited": waited}
            for one, waited in zip(run.results[name], run.waits[name], strict=True)
        ]
        about = rival.about if rival else {"bytes": 0, "versions": {}}
    sizes = {name: bytes_per_step(model), RIVAL: about["bytes"]}
    return summary(samples, sizes, about["versions"], threads_of(options))


def summary(
    samples: dict[str, list[dict[str, Any]]], sizes: dict[str, int], versions: dict[str, str], threads: int
) -> list[dict[str, Any]]:
    shares = {name: [_share_waited(one, threads) for one in found] for name, found in samples.items()}
    # Threads that sleep between operations wait at every waking: the least share is the engine's own doing.
    least = {name: min(found) for name, found in shares.items()}
    clean = [
        index
        for index in range(len(next(iter(samples.values()))))
        if all(shares[name][index] <= least[name] + WAIT_LIMIT for name in samples)
    ]
    medians = {
        name: [percentile(found[i]["per_token"], 50) for i in clean] for name, found in samples.items()
    }
    rows = []
    for name in samples:
        spread = Spread.of([1e3 * seconds for seconds in medians[name]]) if clean else None
        ratio = ratios(medians[RIVAL], medians[name]) if clean and RIVAL in medians else None
        rows.append({
            "engine": name, "milliseconds": to_jsonable(spread),
            "tokens_per_second": 1e3 / spread.median if spread else None,
            "bytes": sizes[name], "gigabytes_per_second": sizes[name] / 1e6 / spread.median if spread else None,
            "over_llama_cpp": to_jsonable(ratio),
            "rounds_clean": len(clean), "rounds": len(samples[name]), "waited": shares[name],
            "versions": versions if name == RIVAL else None,
        })  # fmt: skip
    return rows


def _share_waited(sample: dict[str, Any], threads: int) -> float:
    return float(sample["waited"]) / ((sample["first_token"] + sum(sample["per_token"])) * threads)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("llama_cpp", __doc__ or "")
    parser.add_argument("--shape", choices=[one for one in SHAPES if SHAPES[one].model_type == "llama"],
                        default="llama-2-7b")  # fmt: skip
    parser.add_argument("--blocks", type=int, help="default: all")
    parser.add_argument("--sparsity", nargs=1, type=float, default=[0.7])
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--gguf", type=Path, help="llama.cpp's file: written where it is missing, and kept")
    options = parser.parse_args(arguments)
    options.dtype = "bf16"
    if options.quick:
        options.shape, options.blocks, options.rounds, options.new_tokens = "tinyllama", 1, 1, 3
    options.blocks = options.blocks or named_shape(options.shape).blocks
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("llama_cpp", options)
    with torch_threads(options.threads):
        rows = measure(options)
    protocol = {
        "what": "batch 1, greedy, KV cache: generate() of transformers, llama_decode of llama.cpp; medians of rounds",
        "shape": options.shape, "blocks": options.blocks, "weights": RANDOM_WEIGHTS, "prompt": options.prompt,
        "new_tokens": options.new_tokens, "rounds": options.rounds, "threads": threads_of(options),
        "parts": options.parts, "missing": {RIVAL: missing()} if missing() else {},
    }  # fmt: skip
    path = this.save(protocol, rows)
    columns = ["engine", "tokens/s", "ms", "x llama.cpp", "GB a token", "GB/s"]
    cells = [
        [row["engine"], row["tokens_per_second"], *((row[key] or {}).get("median") for key in
         ("milliseconds", "over_llama_cpp")), row["bytes"] / 1e9, row["gigabytes_per_second"]]
        for row in rows
    ]  # fmt: skip
    title = f"{options.shape}: {options.blocks} blocks, batch 1, RANDOM WEIGHTS (speed only)"
    notes = "; ".join(f"{name}: {reason}" for name, reason in protocol["missing"].items())
    show(make_table(title, columns, cells, caption=notes or None), path=path)


if __name__ == "__main__":
    main()
