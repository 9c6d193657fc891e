"""Held-out bits per byte and perplexity of the bundled model, beside xz on the same text.

    python evaluate.py [--corpus CORPUS] [--out ../results/demo_model.json]

With ``--corpus`` the compressor also gets the training text as a prefix, all of it, as a fairer rival.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import lzma
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pysparse.data import demo_model_path, held_out_texts

RESULT = Path(__file__).parents[1] / "results" / "demo_model.json"
XZ_PRESET = 9 | lzma.PRESET_EXTREME


@torch.no_grad()
def document_nats(model: Any, tokens: list[int], window: int, stride: int) -> float:
    """Summed nats of tokens[1:]; each is scored once, after at least ``window - stride`` others."""
    total, scored = 0.0, 1
    for start in range(0, len(tokens), stride):
        piece = torch.tensor([tokens[start : start + window + 1]])
        fresh = start + piece.shape[1] - scored
        if fresh <= 0:
            break
        logits = model(piece[:, :-1], use_cache=False).logits[0, -fresh:].float()
        total += float(torch.nn.functional.cross_entropy(logits, piece[0, -fresh:], reduction="sum"))
        scored += fresh
    return total


def score(model: Any, tokenizer: Any, texts: list[str], window: int, stride: int) -> dict[str, Any]:
    """Perplexity per token and bits per byte; each document alone, an end-of-text token in front."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    nats = sum(document_nats(model, [tokenizer.eos_token_id, *row], window, stride) for row in rows)
    tokens, size = sum(map(len, rows)), sum(len(text.encode()) for text in texts)
    return {
        "nats_per_token": round(nats / tokens, 4),
        "perplexity": round(math.exp(nats / tokens), 3),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "tokens": tokens,
        "bytes": size,
        "protocol": {
            "window": window,
            "stride": stride,
            "documents": len(texts),
            "start": "end-of-text before each document, unscored",
            "weights": "bf16",
            "arithmetic": "fp32",
        },
    }


def xz_bytes(text: str) -> int:
    """Size under the raw LZMA2 stream of preset 9e: no container, so nothing but the coded text counts."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": XZ_PRESET}]
    return len(lzma.compress(text.encode(), format=lzma.FORMAT_RAW, filters=filters))


def xz_figures(texts: list[str], corpus: Path | None) -> dict[str, Any]:
    """Bits per byte of xz on the joined documents, alone and after the training text."""
    joined = "\n\n".join(texts)
    size = len(joined.encode())
    figures: dict[str, Any] = {"preset": "9e", "bits_per_byte": round(8 * xz_bytes(joined) / size, 4)}
    if corpus is not None:
        with (corpus / "train.jsonl").open(encoding="utf-8") as lines:
            prefix = "\n\n".join(json.loads(line)["text"] for line in lines) + "\n\n"
        extra = xz_bytes(prefix + joined) - xz_bytes(prefix)
        figures["bits_per_byte_after_training_text"] = round(8 * extra / size, 4)
        figures["training_text_bytes"] = len(prefix.encode())
    return figures


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def main() -> None:
    """Print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = demo_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts, window = held_out_texts(), model.config.max_position_embeddings
    untrained = type(model)(model.config).float()
    result = {
        "model": {
            "parameters": model.num_parameters(),
            "file_bytes": (folder / "model.safetensors").stat().st_size,
            "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        },
        "held_out": score(model, tokenizer, texts, window, window // 2),
        "held_out_no_overlap": score(model, tokenizer, texts, window, window),
        "untrained_bits_per_byte": score(untrained, tokenizer, texts[:4], window, window)["bits_per_byte"],
        "xz": xz_figures(texts, args.corpus),
        "machine": machine(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
