"""Perplexity and agreement against computations of their own; windows: what is scored, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from pysparse.measure import agreement, perplexity, score_models, text_windows
from pysparse.measure.quality import evaluating, safe_exp
from pysparse.measure.windows import choose_window, max_positions

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 3, "", "naïve café 漢字 " * 5]


class Bytes:
    """A tokenizer whose tokens are the UTF-8 bytes, after a beginning-of-text token: counts can be done by hand."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [256, *text.encode()]}


def tiny_llama(seed=0, positions=64, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def all_ids(separator="\n\n"):
    return torch.tensor([256, *separator.join(text for text in TEXTS if text).encode()])


@torch.no_grad()
def nats_of(model, tokens, first):
    """Sum and count of the cross-entropy at positions first.. of one window, position by position."""
    logits = model(input_ids=tokens[None]).logits[0].double()
    losses = [-logits[p - 1].log_softmax(0)[tokens[p]].item() for p in range(first, len(tokens))]
    return sum(losses), len(losses)


def test_windows_cut_the_stream_and_drop_the_rest():
    ids = all_ids()
    windows = text_windows(Bytes(), TEXTS, 32)
    count = len(ids) // 32
    assert torch.equal(windows.tokens, ids[: count * 32].view(count, 32))
    assert windows.scored == count * 31
    assert windows.bytes_per_token == sum(len(text.encode()) for text in TEXTS) / len(ids)
    protocol = windows.protocol
    assert (protocol["window"], protocol["stride"], protocol["windows"]) == (32, 32, count)
    assert (protocol["documents"], protocol["window_choice"]) == (2, "all")  # the empty text is no document


def test_windows_with_overlap_score_each_token_once():
    ids = all_ids()
    windows = text_windows(Bytes(), TEXTS, 32, stride=8)
    scored = []
    for index, (window, first) in enumerate(zip(windows.tokens, windows.first_scored, strict=True)):
        assert torch.equal(window, ids[8 * index : 8 * index + 32])
        scored += range(8 * index + first, 8 * index + 32)
    assert scored == list(range(1, scored[-1] + 1))
    assert windows.scored == len(scored)


def test_a_subset_of_windows_is_drawn_by_seed():
    every = text_windows(Bytes(), TEXTS, 16)
    some = [text_windows(Bytes(), TEXTS, 16, max_windows=4, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(some[0].tokens, some[1].tokens)
    assert not torch.equal(some[0].tokens, some[2].tokens)
    rows = {tuple(window.tolist()) for window in every.tokens}
    assert all(tuple(window.tolist()) in rows for window in some[0].tokens)
    assert len(some[0].tokens) == some[0].protocol["windows"] == 4
    assert some[0].protocol["windows_available"] == len(every.tokens)
    assert "seed 0" in some[0].protocol["window_choice"]


def test_the_protocol_names_the_text():
    hashes = {text_windows(Bytes(), texts, 8).protocol["text_sha256"] for texts in (TEXTS, TEXTS[:1], TEXTS)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8, "stride": 0}, r"stride=0 is outside \[1, window=8\]"),
        ({"window": 8, "stride": 9}, r"stride=9 is outside \[1, window=8\]"),
        ({"window": 8, "max_windows": 0}, "max_windows=0 leaves nothing"),
        ({"window": 1000}, r"fewer than one window of 1000; .* pass window=\d+ or less"),
    ],
)
def test_windows_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        text_windows(Bytes(), TEXTS, **options)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_windows_need_text(texts):
    with pytest.raises(ValueError, match="no text to evaluate"):
        text_windows(Bytes(), texts, 8)


def test_the_window_follows_the_model(model):
    assert max_positions(model) == 64
    assert choose_window(model, None) == 64
    assert choose_window(tiny_llama(positions=4096), None) == 2048
    assert choose_window(torch.nn.Linear(2, 2), None) == 2048
    assert choose_window(model, 32) == 32
    with pytest.raises(ValueError, match="window=65 is longer than the 64 positions"):
        choose_window(model, 65)
    with pytest.raises(ValueError, match="window=1 scores nothing"):
        choose_window(model, 1)


@pytest.mark.parametrize(("window", "stride"), [(32, None), (32, 8), (64, 63), (16, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_the_mean_over_scored_tokens(model, window, stride, batch_size):
    result = perplexity(model, Bytes(), TEXTS, window, stride, batch_size)
    ids, step = all_ids(), stride or window
    nats, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, step):
        first = 1 if start == 0 or step == window else window - step
        some, tokens = nats_of(model, ids[start : start + window], first)
        nats, count = nats + some, count + tokens
    assert result.tokens == count
    assert result.nats_per_token == pytest.approx(nats / count, rel=1e-5)
    assert result.value == pytest.approx(math.exp(nats / count), rel=1e-4)
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result.bits_per_byte == pytest.approx(nats / count / math.log(2) * len(ids) / text_bytes, rel=1e-5)
    assert result.protocol["batch_size"] == batch_size
    assert result.protocol["model_dtype"] == "float32"


def test_long_windows_are_scored_in_pieces():
    """More positions than the logits of one piece: the sum must not depend on where it is cut."""
    long = tiny_llama(positions=1024)
    text = ["x" * 300 + "abc" * 200]
    result = perplexity(long, Bytes(), text, 700)
    nats, count = nats_of(long, torch.tensor([256, *text[0].encode()])[:700], 1)
    assert result.tokens == count == 699
    assert result.nats_per_token == pytest.approx(nats / count, rel=1e-5)


def test_identical_models_agree(model):
    same = agreement(model, model, Bytes(), TEXTS, window=32)
    twin = agreement(tiny_llama(), model, Bytes(), TEXTS, window=32)
    for result in (same, twin):
        assert (result.top1, result.kl, result.max_logit_error) == (1.0, 0.0, 0.0)
        assert result.tokens == text_windows(Bytes(), TEXTS, 32).scored


@torch.no_grad()
def test_agreement_of_different_models(model):
    other = tiny_llama(seed=1)
    result = agreement(other, model, Bytes(), TEXTS, window=32, batch_size=2)
    tokens = text_windows(Bytes(), TEXTS, 32).tokens
    theirs, ours = (one(input_ids=tokens).logits[:, :-1].double() for one in (model, other))
    divergence = functional.softmax(theirs, -1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))
    assert result.kl == pytest.approx(divergence.sum(-1).mean().item(), rel=1e-4)
    assert result.top1 == pytest.approx((theirs.argmax(-1) == ours.argmax(-1)).double().mean().item())
    assert result.max_logit_error == pytest.approx((theirs - ours).abs().max().item(), rel=1e-4)
    assert 0.0 <= result.top1 < 1.0


def test_scoring_reports_progress_and_refuses_nonsense(model):
    windows, seen = text_windows(Bytes(), TEXTS, 32), []
    score_models({"a": model}, windows, 4, lambda done, total: seen.append((done, total)))
    total = len(windows.tokens)
    assert seen == [(min(done + 4, total), total) for done in range(0, total, 4)]
    with pytest.raises(ValueError, match="no model to score"):
        score_models({}, windows)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        score_models({"a": model}, windows, 0)


def test_an_encoder_has_no_perplexity():
    config = BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ValueError, match="BertModel gives no next-token logits: perplexity needs a causal"):
        perplexity(BertModel(config).eval(), Bytes(), TEXTS, 16)


def test_a_broken_model_has_infinite_or_no_perplexity(model):
    assert (safe_exp(1e6), safe_exp(0.0)) == (math.inf, 1.0)
    assert math.isnan(safe_exp(math.nan))
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(broken, Bytes(), TEXTS, 16).value)


def test_evaluating_restores_modes():
    model = tiny_llama().train()
    model.model.layers[0].eval()

    def fail_inside():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert model.training
    assert torch.is_grad_enabled()
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
