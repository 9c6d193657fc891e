"""The measured crossover: kept on disk, read again, and what decides which calls are planned."""

import pytest
import torch

import pysparse
from pysparse.attention import AttentionInput, AttentionOptions, crossover
from pysparse.attention.dispatch import why_exact
from pysparse.attention.synthetic import Synthetic
from pysparse.methods import AnchorAttention, StreamingAttention

PLANNER = AnchorAttention(theta=2.0, group_size=64, init=16, local=16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSPARSE_CACHE_DIR", str(tmp_path))
    crossover.forget()
    yield
    crossover.forget()


def call(length):
    made = Synthetic(length, query_heads=2, kv_heads=1, head_dim=64).make(torch.bfloat16)
    return AttentionInput.of(*made)


def test_it_is_measured_kept_and_read_again():
    assert crossover.known_crossover(PLANNER, torch.bfloat16) is None
    found = crossover.tune_crossover(PLANNER, torch.bfloat16, (96, 192))
    assert set(found.speedup) == {96, 192}
    paying = [
        length for length in (96, 192) if all(found.speedup[n] >= 1.03 for n in (96, 192) if n >= length)
    ]
    assert found.keys == min(paying, default=None)
    crossover.forget()
    assert crossover.known_crossover(PLANNER, torch.bfloat16) == found
    assert crossover.known_crossover(PLANNER, torch.float32) is None
    assert crossover.known_crossover(AnchorAttention(theta=3.0), torch.bfloat16) is None


def test_it_decides_which_calls_are_planned(monkeypatch):
    options = AttentionOptions(PLANNER)
    assert why_exact(call(150), options, 0) == "fewer than 160 keys"  # the planner's own bound
    monkeypatch.setattr(crossover, "_speedup", lambda planner, length, dtype: length / 100)
    assert crossover.tune_crossover(PLANNER, torch.bfloat16, (90, 120, 200)).keys == 120
    assert why_exact(call(119), options, 0) == "fewer than 120 keys, as measured"
    assert why_exact(call(120), options, 0) == ""
    assert why_exact(call(150), AttentionOptions(PLANNER, min_length=151), 0) == "fewer than 151 keys"
    monkeypatch.setattr(crossover, "_speedup", lambda planner, length, dtype: 1.02)
    assert crossover.tune_crossover(PLANNER, torch.bfloat16, (90, 200)).keys is None
    crossover.forget()  # None is read again
    reason = "fewer than 400 keys, measured up to 200 and not faster"
    assert why_exact(call(399), options, 0) == reason
    assert why_exact(call(400), options, 0) == ""


def test_a_spoilt_file_is_said_and_not_used():
    crossover.tune_crossover(PLANNER, torch.bfloat16, (96,))
    path = crossover.crossover_file(PLANNER, torch.bfloat16)
    path.write_text(path.read_text().replace('"keys"', '"kees"'))
    crossover.forget()
    with pytest.warns(RuntimeWarning, match=path.name):
        assert crossover.known_crossover(PLANNER, torch.bfloat16) is None


def test_the_command_shows_it(monkeypatch):
    found = pysparse.tune_attention(PLANNER, longest=128)
    assert set(found.speedup) == {128}
    assert found.to_dict()["file"].endswith(".json")
    for speedup, said in ((1.2, "used from 128 keys on"), (0.98, "no crossover found up to 128 keys")):
        monkeypatch.setattr(crossover, "_speedup", lambda *_, speedup=speedup: speedup)
        assert said in str(pysparse.tune_attention(PLANNER, longest=128).table().caption)
    with pytest.raises(ValueError, match="longest=1 keys: .* at least 128"):
        pysparse.tune_attention(PLANNER, longest=1)


def test_a_plan_of_all_pairs_is_not_faster(monkeypatch):
    monkeypatch.setattr(crossover, "_speedup", lambda *_: 1.17)  # of noise
    planner = StreamingAttention(sink=0, window=128, block=64)
    assert crossover.tune_crossover(planner, torch.bfloat16, (64, 192)).keys is None
    assert crossover.tune_crossover(planner, torch.bfloat16, (64, 192, 256)).keys == 256


@pytest.mark.parametrize("keys", ["0", "256", '"96"'])
def test_a_crossover_that_was_not_timed_is_not_believed(keys):
    crossover._write(
        path := crossover.crossover_file(PLANNER, torch.bfloat16),
        crossover._key(PLANNER, torch.bfloat16),
        crossover.Crossover(96, {96: 2.0}),
    )
    path.write_text(path.read_text().replace('"keys": 96', f'"keys": {keys}'))
    with pytest.warns(RuntimeWarning, match="no measurement"):
        assert crossover.known_crossover(PLANNER, torch.bfloat16) is None


@pytest.mark.parametrize("lengths", [(), (0, 64)])
def test_lengths_are_checked(lengths):
    with pytest.raises(ValueError, match="lengths="):
        crossover.tune_crossover(PLANNER, torch.bfloat16, lengths)


def test_on_a_gpu_the_committed_run_decides(monkeypatch):
    options, keys = AttentionOptions(PLANNER), crossover.gpu_crossover()
    assert 16384 < keys < 65536  # where the run saw torch's attention ahead, and behind
    assert why_exact(call(200), options, 0, on_gpu=True) == f"fewer than {keys} keys, as measured on a GPU"
    assert why_exact(call(200), AttentionOptions(PLANNER, min_length=100), 0, on_gpu=True) == ""
    monkeypatch.setattr("pysparse.attention.dispatch.gpu_crossover", lambda: 180)
    assert why_exact(call(200), options, 0, on_gpu=True) == ""
    assert why_exact(call(150), AttentionOptions(), 0, on_gpu=True) == ""  # no planner: nothing is planned
