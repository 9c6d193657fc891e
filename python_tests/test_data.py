"""The bundled model and texts: they load offline, are what the manifest says, and the model knows English."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pysparse.data as data

ROOT = data.demo_model_path().parent
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.demo_model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(data.demo_model_path(), local_files_only=True)


def read_rows(name: str) -> list[dict[str, str]]:
    with (ROOT / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def paragraphs(texts: list[str]) -> set[str]:
    return {" ".join(part.split()) for text in texts for part in text.split("\n\n") if len(part) >= 80}


def test_model_is_small_grouped_query_and_bf16(model):
    config = model.config
    assert 5e6 <= model.num_parameters() <= 8e6
    assert model.dtype == torch.bfloat16
    assert config.num_key_value_heads < config.num_attention_heads
    assert all(size % 64 == 0 for size in (config.hidden_size, config.intermediate_size, config.vocab_size))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_files_fit_and_match_the_manifest():
    manifest = json.loads((ROOT / "demo_model" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["files"]["demo_model/model.safetensors"]["bytes"] <= 16 * MEGABYTE
    for name, entry in manifest["files"].items():
        content = (ROOT / name).read_bytes()
        assert len(content) == entry["bytes"], name
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], name


@pytest.mark.parametrize(
    "text", ["", "Return it.", "  two  spaces\n\ttab", "naïve café 漢字 🙂", "x[0] = 1e-05"]
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert all(0 <= token < 4096 for token in ids)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_texts_are_disjoint_and_modest():
    rows = {name: read_rows(name) for name in ("calibration.jsonl", "held_out.jsonl")}
    sources = [{row["source"] for row in part} for part in rows.values()]
    assert sources[0].isdisjoint(sources[1])
    assert all(len(found) == len(part) for found, part in zip(sources, rows.values(), strict=True))
    assert paragraphs(data.calibration_texts()).isdisjoint(paragraphs(data.held_out_texts()))
    for name, part in rows.items():
        assert 100_000 <= (ROOT / name).stat().st_size <= 400_000
        assert all(row["text"].strip() and row["licence"] for row in part)


def test_every_shipped_package_has_its_licence():
    notice = (ROOT / "THIRD_PARTY_LICENSES.txt").read_text(encoding="utf-8")
    for row in read_rows("calibration.jsonl") + read_rows("held_out.jsonl"):
        assert f"{row['source'].split(':', 1)[0]} ({row['licence']})" in notice


@torch.no_grad()
def test_model_predicts_held_out_text(model, tokenizer):
    """A uniform guess over 4096 tokens is about 4 bits per byte; xz on the whole text needs about 2."""
    nats, size = 0.0, 0
    for text in data.held_out_texts()[:4]:
        ids = tokenizer(text, truncation=True, max_length=511)["input_ids"]
        tokens = torch.tensor([[tokenizer.eos_token_id, *ids]])
        logits = model(tokens[:, :-1]).logits[0].float()
        nats += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        size += len(tokenizer.decode(ids).encode())
    assert nats / math.log(2) / size < 2.3


def test_generates_words(model, tokenizer):
    prompt = tokenizer("Return the number of", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    continuation = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    letters = sum(character.isalpha() or character.isspace() for character in continuation)
    assert letters > 0.7 * len(continuation)


def test_missing_data_says_what_to_do(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(data, "_HERE", tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall pysparse"):
        data.demo_model_path()
    with pytest.raises(FileNotFoundError, match=r"held_out\.jsonl"):
        data.held_out_texts()
