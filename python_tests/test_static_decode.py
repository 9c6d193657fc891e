"""Decoding with a static cache: the same tokens as generate()."""

import pytest
import torch
import transformers

from pysparse.data import demo_model_path
from pysparse.models.cuda_speed import compile_blocks_
from pysparse.models.static_decode import WARMUP_STEPS, StaticDecoder

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def demo(device: str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(demo_model_path()).to(device).eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("batch", [1, 3])
def test_decodes_the_tokens_of_generate(device, batch):
    model = demo(device)
    prompt = torch.randint(5, 500, (batch, 12), generator=torch.Generator().manual_seed(3)).to(device)
    count = 20 + WARMUP_STEPS
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )[:, 12:]  # fmt: skip
    assert len(expected.unique()) > 4, "a model that repeats one token shows nothing"
    decoder = StaticDecoder(model, prompt, 12 + count)
    skipped = WARMUP_STEPS if device == "cuda" else 0
    tokens = [decoder.token.clone()]
    for _ in range(count - 1 - skipped):
        decoder.step()
        tokens.append(decoder.token.clone())
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, skipped:])


def test_says_when_the_cache_is_full_or_too_short():
    model = demo("cpu")
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_tokens=7 holds no new token"):
        StaticDecoder(model, prompt, 4 + WARMUP_STEPS)
    decoder = StaticDecoder(model, prompt, 8)
    for _ in range(4):
        decoder.step()
    with pytest.raises(IndexError, match="cache of 8"):
        decoder.step()


def test_compiles_blocks_only_where_there_are_any():
    with pytest.raises(ValueError, match="no list of blocks"):
        compile_blocks_(torch.nn.Linear(2, 2))
