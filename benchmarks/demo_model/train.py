"""Train the demo model: a byte-level BPE tokenizer and a small Llama, on the text of ``corpus.py``.

Two CPU cores are enough. The order of the windows follows from the seed and the step alone, so a run that was
stopped goes on from its last checkpoint as if nothing had happened.

    python train.py --corpus CORPUS --work WORK --steps 4000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the result, written into the manifest."""

    steps: int
    vocabulary: int = 4096
    tokenizer_bytes: int = 12_000_000
    hidden: int = 256
    ffn: int = 704
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    batch: int = 4
    peak_rate: float = 1e-3
    final_rate: float = 1e-4
    warm_up: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 20
    autocast: bool = False  # bf16 matmuls pay only with AMX; plain AVX-512 bf16 was 1.6x slower than fp32


def read_split(corpus: Path, split: str) -> list[str]:
    """The texts of one split, in file order."""
    with (corpus / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def make_tokenizer(texts: list[str], settings: Settings, work: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a seeded sample of the documents; kept in ``work`` for the next start."""
    path = work / "tokenizer.json"
    if not path.exists():
        order = np.random.default_rng(settings.seed).permutation(len(texts))
        total = np.cumsum([len(texts[i].encode()) for i in order])
        sample = [texts[i] for i in order[: int(np.searchsorted(total, settings.tokenizer_bytes)) + 1]]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(sample, trainer)
        bpe.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, cache: Path) -> np.ndarray:
    """All documents as one uint16 stream, an end-of-text token before each and one at the very end."""
    if not cache.exists():
        end = tokenizer.eos_token_id
        pieces: list[np.ndarray] = []
        for start in range(0, len(texts), 512):
            batch = tokenizer(texts[start : start + 512], add_special_tokens=False, verbose=False)
            for row in batch["input_ids"]:
                pieces.append(np.array([end, *row], dtype=np.uint16))
        replace_file(cache, lambda path: np.save(path, np.concatenate([*pieces, np.array([end], np.uint16)])))
    return np.load(cache)


def replace_file(path: Path, write: Any) -> None:
    """Write beside ``path`` and rename, so that a reader never sees half a file."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    write(partial)
    os.replace(partial, path)


def make_model(settings: Settings, end: int) -> LlamaForCausalLM:
    """The untrained model in fp32; the seed fixes its weights."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.ffn,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def windows(stream: np.ndarray, settings: Settings, first_step: int) -> Iterator[Tensor]:
    """Batches int64 [batch, context + 1]: each epoch is a seeded shuffle of windows at a seeded offset."""
    span = settings.context
    count = (len(stream) - span - 1) // span
    per_epoch = count // settings.batch
    step = first_step
    while True:
        epoch, position = divmod(step, per_epoch)
        rng = np.random.default_rng([settings.seed, epoch])
        offset, order = int(rng.integers(span)), rng.permutation(count)
        for at in range(position, per_epoch):
            starts = order[at * settings.batch : (at + 1) * settings.batch] * span + offset
            starts = np.minimum(starts, len(stream) - span - 1)
            yield torch.from_numpy(np.stack([stream[s : s + span + 1] for s in starts]).astype(np.int64))
            step += 1


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine from the peak to the final rate at the last step."""
    if step < settings.warm_up:
        return settings.peak_rate * (step + 1) / settings.warm_up
    progress = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.final_rate + (settings.peak_rate - settings.final_rate) * share


def mean_loss(model: Any, tokens: Tensor, autocast: bool) -> Tensor:
    """Mean next-token cross entropy in nats of int64 [B, T + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW, with decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=settings.betas, fused=True)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """save_pretrained in bf16, from a copy: the fp32 master weights stay as they are."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evaluate(model: LlamaForCausalLM, stream: np.ndarray, settings: Settings, limit: int) -> float:
    """Mean nats per token over the first ``limit`` windows of a split, no overlap."""
    span, total = settings.context, 0.0
    starts = range(0, min(limit * span, len(stream) - span - 1), span)
    model.eval()
    with torch.no_grad():
        for start in starts:
            tokens = torch.from_numpy(stream[start : start + span + 1].astype(np.int64))[None]
            total += float(mean_loss(model, tokens, settings.autocast))
    model.train()
    return total / len(starts)


@dataclass(slots=True)
class Run:
    """What changes while training, and what a checkpoint holds."""

    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan  # running mean of the training loss, nats per token
    history: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write everything that :meth:`load` needs, in one rename."""
        state = {name: getattr(self, name) for name in ("step", "seconds", "loss", "history")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        replace_file(path, lambda partial: torch.save(state, partial))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of :meth:`save`."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.loss = state.get("loss", math.nan)

    def advance(self, runner: Any, tokens: Tensor, settings: Settings) -> None:
        """One optimizer step on int64 [B, T + 1]."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings)
        loss = mean_loss(runner, tokens, settings.autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"loss is {value} at step {self.step}: lower peak_rate={settings.peak_rate}")
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value
        self.step += 1


def progress_line(run: Run, settings: Settings, pace: float) -> str:
    """Loss, rate and time to go; ``pace`` is seconds per step."""
    rate = settings.batch * settings.context / pace
    left = (settings.steps - run.step) * pace / 60
    return f"step {run.step}/{settings.steps}  loss {run.loss:.3f}  {rate:,.0f} tok/s  eta {left:.1f} min"


def fit(
    run: Run,
    tokenizer: PreTrainedTokenizerFast,
    streams: dict[str, np.ndarray],
    settings: Settings,
    options: argparse.Namespace,
) -> None:
    """Train to ``settings.steps`` from where ``run`` stands; checkpoints and exports go to ``work``."""
    runner = torch.compile(run.model) if options.compile else run.model
    first, before, started = run.step, run.seconds, time.monotonic()
    last_save = started
    run.model.train()
    for tokens in windows(streams["train"], settings, run.step):
        if run.step >= settings.steps:
            break
        run.advance(runner, tokens, settings)
        now = time.monotonic()
        run.seconds = before + now - started
        if run.step % 20 == 0:
            print(progress_line(run, settings, (now - started) / (run.step - first)), flush=True)
        if now - last_save > options.save_every or run.step == settings.steps:
            held_out = evaluate(run.model, streams["held_out"], settings, limit=40)
            run.history.append(
                {"step": run.step, "train": round(run.loss, 4), "held_out_40_windows": round(held_out, 4)}
            )
            run.save(options.work / "state.pt")
            export(run.model, tokenizer, options.work / "export")
            print(f"checkpoint at step {run.step}: held-out {held_out:.3f} nats per token", flush=True)
            last_save = time.monotonic()


def manifest(
    settings: Settings, corpus: Path, streams: dict[str, np.ndarray], run: Run, work: Path
) -> dict[str, Any]:
    """What a stranger needs to repeat the run and to see that it is the same."""
    weights = (work / "export" / "model.safetensors").read_bytes()
    return {
        "settings": asdict(settings),
        "training": {"steps": run.step, "seconds": round(run.seconds, 1), "history": run.history},
        "tokens": {name: len(stream) for name, stream in streams.items()},
        "tokens_seen": settings.steps * settings.batch * settings.context,
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "model_bytes": len(weights),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "threads": torch.get_num_threads(),
        "corpus": json.loads((corpus / "corpus.json").read_text()),
    }


def main() -> None:
    """Tokenise, train, export; WORK/export is the model folder, WORK/manifest.json the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches, outside git")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=240.0, help="seconds between checkpoints")
    parser.add_argument("--autocast", action="store_true", help="bf16 matmuls over fp32 weights")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps, autocast=args.autocast)
    args.work.mkdir(parents=True, exist_ok=True)
    texts = {split: read_split(args.corpus, split) for split in ("train", "calibration", "held_out")}
    tokenizer = make_tokenizer(texts["train"], settings, args.work)
    streams = {name: encode(rows, tokenizer, args.work / f"{name}.npy") for name, rows in texts.items()}
    print({name: len(stream) for name, stream in streams.items()}, flush=True)
    model = make_model(settings, tokenizer.eos_token_id)
    print(f"{model.num_parameters():,} parameters", flush=True)
    run = Run(model, make_optimizer(model, settings))
    if (args.work / "state.pt").exists():
        run.load(args.work / "state.pt")
    fit(run, tokenizer, streams, settings, args)
    record = manifest(settings, args.corpus, streams, run, args.work)
    replace_file(
        args.work / "manifest.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n")
    )


if __name__ == "__main__":
    main()
