"""Train the small RoPE model on which long-context retrieval is measured: text, copies and hidden facts, to 8k tokens.

    python benchmarks/retrieval_model/train.py --out DIR [--minutes 20]

A Llama of 0.6 M parameters over bytes. Lengths grow while it learns (curriculum); the last stages are long. The
folder it writes loads with ``AutoModelForCausalLM.from_pretrained``. It saves every minute and stops after
``--minutes``; the same command goes on from there. The steps, not the minutes, say when it is trained: the same
seed gives the same model, in half an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from retrieval_model.tasks import Tasks, local_text

# (length, sequences a step, steps)
STAGES = ((64, 24, 900), (256, 8, 400), (1024, 3, 300), (2048, 2, 200), (4096, 1, 100), (8192, 1, 40))
STEPS = sum(steps for _, _, steps in STAGES)
RATE = 3e-3
LOOK_BACK = 48.0  # logits by which a first-layer head prefers its token, summed over the frequencies
SAVE_SECONDS = 60.0


def config() -> LlamaConfig:
    """Return the shape; of 32 frequencies the slower half turns less than half a radian over 8k tokens.

    Those carry what a token is, wherever it stands: content that is matched over long distances needs them.
    """
    return LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=65536, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9}, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, attention_bias=True,
    )  # fmt: skip


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Let query head h of the first layer begin by reading the token h + 1 places back, by its biases alone.

    That is what a model learns last and what retrieval stands on; with it, minutes of training are enough. Rotary
    positions make biases a function of distance: a query bias that is the key's, turned h + 1 places back.
    """
    layer, shape = model.model.layers[0].self_attn, model.config
    size, half = layer.head_dim, layer.head_dim // 2
    frequencies = model.model.rotary_emb.inv_freq[:half]
    strength = math.sqrt(LOOK_BACK / half / layer.scaling)
    for projection in (layer.q_proj, layer.k_proj):
        projection.weight.mul_(0.1)
    layer.k_proj.bias.view(-1, size)[:, :half] = strength
    layer.k_proj.bias.view(-1, size)[:, half:] = 0
    for head in range(shape.num_attention_heads):
        turn = -(head + 1) * frequencies
        layer.q_proj.bias.view(-1, size)[head] = strength * torch.cat([turn.cos(), turn.sin()])


def loss_of(model: LlamaForCausalLM, tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the mean next-byte loss, ``weight`` [B, N] the share of each byte to be predicted."""
    logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    each = functional.cross_entropy(logits.float(), tokens[:, 1:].flatten(), reduction="none")
    share = weight[:, 1:].flatten()
    return (each * share).sum() / share.sum()


def stage_of(step: int) -> tuple[int, int]:
    """Return (length, sequences) of training step ``step``."""
    for length, sequences, steps in STAGES:
        if step < steps:
            return length, sequences
        step -= steps
    raise ValueError(f"there are {STEPS} steps")


@dataclass
class Training:
    """A training under way: all that decides what comes next, which a file can hold."""

    seed: int
    step: int = 0
    lines: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = LlamaForCausalLM._from_config(config(), attn_implementation="sdpa")
        look_back(self.model)
        self.tasks = Tasks(local_text(), self.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01
        )

    def advance(self) -> None:
        """Do one step."""
        length, sequences = stage_of(self.step)
        for group in self.optimizer.param_groups:
            cosine = math.cos(math.pi / 2 * self.step / STEPS)
            group["lr"] = RATE * min(1.0, (self.step + 1) / 50) * (0.05 + 0.95 * cosine)
        loss = loss_of(self.model, *self.tasks.batch(sequences, length))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.lines.append({"step": self.step, "length": length, "loss": loss.item()})

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all, and the losses for people."""
        state = {"step": self.step, "lines": self.lines, "model": self.model.state_dict(), "seed": self.seed,
                 "optimizer": self.optimizer.state_dict(), "random": self.tasks.random.get_state()}  # fmt: skip
        torch.save(state, folder / "state.new")
        (folder / "state.new").replace(folder / "state.pt")
        (folder / "losses.json").write_text(json.dumps(self.lines[::10], indent=1))

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote; ValueError for another seed's."""
        state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
        if state["seed"] != self.seed:
            raise ValueError(f"{folder} holds a training with seed={state['seed']}, not {self.seed}")
        self.step, self.lines = state["step"], state["lines"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tasks.random.set_state(state["random"])


def train(training: Training, folder: Path, minutes: float) -> None:
    """Take the steps that are left, for at most ``minutes``, saving every minute and at the end."""
    end, saved = time.monotonic() + 60 * minutes, time.monotonic()
    while training.step < STEPS and time.monotonic() < end:
        training.advance()
        if time.monotonic() - saved > SAVE_SECONDS:
            training.save(folder)
            saved = time.monotonic()
    training.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the same command goes on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args.seed)
    if (args.out / "state.pt").exists():
        training.load(args.out)
    train(training, args.out, args.minutes)
    print(f"step {training.step} of {STEPS}, loss {training.lines[-1]['loss']:.3f}")
    training.model.eval().to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
