"""Train the small RoPE model on which long-context retrieval is measured: text, copies and hidden facts, to 8k tokens.

    python benchmarks/retrieval_model/train.py --out DIR [--minutes 20]

A Llama of 0.4 M parameters over bytes. Lengths grow while it learns (curriculum); the last stages are long. The
folder it writes loads with ``AutoModelForCausalLM.from_pretrained``. Two cores, some 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from retrieval_model.tasks import Tasks, local_text

# (length, tokens a step, share of the time)
STAGES = ((64, 1536, 0.45), (256, 2048, 0.2), (1024, 2048, 0.15), (4096, 4096, 0.12), (8192, 8192, 0.08))
RATE = 3e-3
LOOK_BACK = 48.0  # logits by which a first-layer head prefers its token, summed over the frequencies


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=65536, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=None, eos_token_id=None,
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


def train(minutes: float, seed: int, report: Path) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config(), attn_implementation="sdpa")
    look_back(model)
    tasks = Tasks(local_text(), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, done, lines = time.monotonic(), 0, 0.0, []
    for length, tokens_a_step, share in STAGES:
        end = start + 60 * minutes * (done + share)
        done += share
        while time.monotonic() < end:
            spent = (time.monotonic() - start) / (60 * minutes)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * math.cos(math.pi / 2 * spent))
            tokens, weight = tasks.batch(max(1, tokens_a_step // length), length)
            loss = loss_of(model, tokens, weight)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                lines.append(
                    {"step": step, "length": length, "loss": loss.item(), "seconds": time.monotonic() - start}
                )
                report.write_text(json.dumps(lines, indent=1))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(args.minutes, args.seed, args.out / "losses.json")
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
