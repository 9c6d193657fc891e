"""A whole model of llama.cpp in a process of its own: ``python llama_cpp_model.py FILE SHAPE THREADS < requests``.

It needs llama-cpp-python and gguf and nothing of ours. FILE is a .gguf of random Q4_0 weights of the architecture that
SHAPE (JSON) describes, written here where it is missing. A request is a line "PROMPT NEW", answered by a line of
JSON with the seconds to the first token, of each further token, and those that threads waited for a core.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from worker import SETTLE_SECONDS, queue_wait_seconds

HERE = str(Path(__file__).resolve().parent)
PACKAGES = ("llama-cpp-python", "gguf")
BLOCK = {"Q4_0": (32, 18), "Q6_K": (256, 210)}  # weights of a block, and its bytes
SCALE = np.float16(0.002)  # of random codes: keeps activations of some dozens of blocks within range


def random_codes(kind: str, rows: int, cols: int, generator: np.random.Generator) -> np.ndarray:
    """Blocks of random codes under one scale, uint8 [rows, bytes of a row]: for speed only."""
    weights, nbytes = BLOCK[kind]
    codes = generator.integers(0, 256, (rows, cols // weights, nbytes), dtype=np.uint8)
    if kind == "Q4_0":  # a half-precision scale, then 32 codes of 4 bits
        codes[:, :, :2] = np.frombuffer(SCALE.tobytes(), dtype=np.uint8)
    else:  # low bits, high bits, 16 scales of 8 bits, a half-precision scale
        codes[:, :, -18:-2] = 4
        codes[:, :, -2:] = np.frombuffer(np.float16(SCALE / 16).tobytes(), dtype=np.uint8)
    return codes.reshape(rows, -1)


def matrices(shape: dict[str, int]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (name, kind, codes) of every matrix as ``llama-quantize ... Q4_0`` stores them; blocks share codes."""
    generator = np.random.default_rng(0)
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {
        "attn_q": (hidden, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden),
        "attn_output": (hidden, hidden), "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }  # fmt: skip
    block = {name: random_codes("Q4_0", *size, generator) for name, size in sizes.items()}
    yield "token_embd.weight", "Q4_0", random_codes("Q4_0", shape["vocab_size"], hidden, generator)
    for index in range(shape["blocks"]):
        for name, codes in block.items():
            yield f"blk.{index}.{name}.weight", "Q4_0", codes
    yield "output.weight", "Q6_K", random_codes("Q6_K", shape["vocab_size"], hidden, generator)


def write_model(path: Path, shape: dict[str, int]) -> None:
    import gguf

    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["blocks"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, kind, codes in matrices(shape):
        writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType[kind])
    ones = np.ones(shape["hidden_size"], dtype=np.float32)
    for index in range(shape["blocks"]):
        writer.add_tensor(f"blk.{index}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{index}.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)


class Model:
    """A loaded model and its context, greedy."""

    def __init__(self, path: Path, threads: int, vocabulary: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._vocabulary = vocabulary
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False  # weights lie in memory before the first token
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch = 512, threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp has no memory for a context")

    def step(self, tokens: list[int]) -> int:
        """Feed ``tokens`` and return the likeliest next one."""
        api = self._api
        array = (api.llama_token * len(tokens))(*tokens)
        status = api.llama_decode(self._context, api.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")
        logits = np.ctypeslib.as_array(
            ctypes.cast(api.llama_get_logits_ith(self._context, -1), ctypes.POINTER(ctypes.c_float)),
            (self._vocabulary,),
        )
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise RuntimeError("llama.cpp's logits are not finite")
        return best

    def generate(self, prompt: int, count: int) -> dict[str, Any]:
        """Time ``count`` tokens after a random prompt."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        tokens = np.random.default_rng(0).integers(0, self._vocabulary, prompt).tolist()
        time.sleep(SETTLE_SECONDS)
        waited, times = queue_wait_seconds(), [time.perf_counter()]
        for _ in range(count):
            tokens = [self.step(tokens)]
            times.append(time.perf_counter())
        waited = queue_wait_seconds() - waited
        time.sleep(SETTLE_SECONDS)
        steps = np.diff(times).tolist()
        return {"first_token": steps[0], "per_token": steps[1:], "waited": waited}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path = [entry for entry in sys.path if entry != HERE]  # a rival's file here has the package's name
    path, shape, threads = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    if not path.is_file():
        write_model(path, shape)
    model = Model(path, threads, shape["vocab_size"])
    versions = {name: metadata.version(name) for name in PACKAGES}
    print(json.dumps({"bytes": path.stat().st_size, "versions": versions}), file=answers)
    for line in sys.stdin:
        print(json.dumps(model.generate(*map(int, line.split()))), file=answers)


if __name__ == "__main__":
    main()
