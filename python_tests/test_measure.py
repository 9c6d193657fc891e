"""Speed beside the dense model: rounds and samples, whole models, and what is compared with what."""

import hashlib
import json
import os
import threading

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from pysparse.measure import (
    Spread,
    bytes_per_step,
    decode_benchmark,
    generate_timed,
    model_bytes,
    prefill_benchmark,
    round_robin,
    torch_threads,
)
from pysparse.measure.comparison import BenchSettings, _warnings, compare_speed, logit_difference
from pysparse.measure.latency import DecodeTiming, PrefillTiming, random_tokens
from pysparse.measure.rounds import percentile, queue_wait_seconds, ratios
from pysparse.measure.twins import dense_kernel_twin, dense_twin, shared_copy, sparse_twin, zero_at_random_
from pysparse.nn import DenseLinear, SparseLinear

PNG = b"\x89PNG\r\n\x1a\n"
QUICK = BenchSettings(prompt_len=4, new_tokens=3, rounds=2, warmup=1)


def tiny_llama(sparsity=0.0, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, **settings,
    )  # fmt: skip
    return zero_at_random_(LlamaForCausalLM(config).to(dtype).eval(), sparsity)


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    return BertModel(config).eval()


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(count):
    samples = np.random.default_rng(count).normal(size=count).tolist()
    for q in (0, 10, 25, 50, 90, 99, 100):
        assert percentile(samples, q) == pytest.approx(float(np.percentile(samples, q)))
    spread = Spread.of(samples)
    assert spread.median == pytest.approx(float(np.median(samples)))
    assert (spread.p10, spread.p90, spread.samples) == (
        percentile(samples, 10),
        percentile(samples, 90),
        count,
    )


def test_no_samples_no_percentile():
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_rounds_turn_the_order_and_drop_the_warmup():
    calls, progress = [], []

    def engine(name):
        def call():
            calls.append(name)
            return len(calls)

        return call

    run = round_robin({name: engine(name) for name in "ABC"}, 3, 1, lambda d, t: progress.append((d, t)))
    assert "".join(calls) == "ABC" + "BCA" + "CAB" + "ABC"
    assert run.results == {
        "A": [6, 8, 10],
        "B": [4, 9, 11],
        "C": [5, 7, 12],
    }  # the call's number, round by round
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(len(waits) == 3 and min(waits) >= 0 for waits in run.waits.values())


@pytest.mark.parametrize(
    ("rounds", "warmup", "engines"), [(0, 1, {"a": int}), (1, -1, {"a": int}), (1, 0, {})]
)
def test_rounds_refuse_nonsense(rounds, warmup, engines):
    with pytest.raises(ValueError, match="rounds=|no engine"):
        round_robin(engines, rounds, warmup)


def test_ratios_go_round_by_round():
    spread = ratios([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])  # one slow round for both changes nothing
    assert (spread.median, spread.samples) == (3.0, 3)
    with pytest.raises(ValueError, match="longer|shorter"):
        ratios([1.0], [1.0, 2.0])


def test_threads_are_set_inside_and_restored():
    before = torch.get_num_threads()

    def fail_inside():
        with torch_threads(1) as count:
            assert count == torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.get_num_threads() == before
    with torch_threads(None) as count:
        assert count == before
    with pytest.raises(ValueError, match="threads=0 must be at least 1"), torch_threads(0):
        pass


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs Linux: affinity and /proc/self/task/*/schedstat"
)
def test_queue_wait_sees_threads_that_share_a_core():
    """Two busy threads on one core: each waits about half of the time, and we are told so."""
    core = min(os.sched_getaffinity(0))

    def burn():
        os.sched_setaffinity(0, {core})  # this thread only
        for _ in range(40):
            hashlib.sha256(bytes(1 << 22)).digest()  # without the interpreter's lock
        done.wait()  # a thread that has ended takes its count with it

    done = threading.Event()
    threads = [threading.Thread(target=burn) for _ in range(2)]
    before = queue_wait_seconds()
    for thread in threads:
        thread.start()
    waited, deadline = 0.0, threading.Event()
    for _ in range(200):
        deadline.wait(0.05)
        waited = queue_wait_seconds() - before
        if waited > 0.02:
            break
    done.set()
    for thread in threads:
        thread.join()
    assert waited > 0.02


def test_generation_is_timed_token_by_token():
    model = tiny_llama()
    model.generation_config.eos_token_id = 5
    result = generate_timed(model, random_tokens(model, 2, 4), 6)
    assert len(result.per_token) == 5
    assert min(result.per_token) > 0.0 < result.first_token
    assert model.generation_config.eos_token_id == 5  # suspended for the run, then back


def test_generation_refuses():
    model = tiny_llama()
    with pytest.raises(ValueError, match="new_tokens=1: at least 2"):
        generate_timed(model, random_tokens(model, 1, 4), 1)
    with pytest.raises(ValueError, match=r"BertModel has no generate\(\)"):
        generate_timed(tiny_bert(), torch.zeros(1, 4, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="33 tokens are longer than the 32 positions"):
        random_tokens(model, 1, 33)
    with pytest.raises(ValueError, match="batch_size=0"):
        random_tokens(model, 0, 4)
    with pytest.raises(ValueError, match=r"prompt_len=30 \+ new_tokens=3 exceeds the 32 positions"):
        decode_benchmark({"a": model}, 30, 3)
    with pytest.raises(ValueError, match="different dtypes"):
        decode_benchmark({"a": model, "b": tiny_llama(dtype=torch.bfloat16)}, 4, 3)
    with pytest.raises(ValueError, match="no model to time"):
        prefill_benchmark({})


def test_random_tokens_repeat_by_seed():
    model = tiny_llama()
    tokens = random_tokens(model, 3, 8, seed=1)
    assert tokens.shape == (3, 8)
    assert torch.equal(tokens, random_tokens(model, 3, 8, seed=1))
    assert not torch.equal(tokens, random_tokens(model, 3, 8, seed=2))
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 128


def test_decode_figures_fit_together():
    model = tiny_llama(0.7)
    timing = decode_benchmark({"a": model, "b": sparse_twin(model)}, 4, 4, batch_size=2, rounds=3)
    for one in timing.values():
        assert one.tokens_per_second == pytest.approx(2 * 1e3 / one.milliseconds_p50)
        assert one.milliseconds_p50 <= one.milliseconds_p90 <= one.milliseconds_p99
        assert one.first_token_milliseconds.samples == one.speedup.samples == 3
        assert one.waited >= 0.0
    assert timing["a"].speedup.median == timing["a"].speedup.p90 == 1.0


def test_bytes_per_step_leaves_out_an_untied_embedding():
    untied, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    table = 128 * 64 * 4
    assert bytes_per_step(untied) == model_bytes(untied).total - table
    assert bytes_per_step(tied) == model_bytes(tied).total == model_bytes(untied).total - table
    assert bytes_per_step(tiny_bert()) == model_bytes(tiny_bert()).total


def test_zeros_at_random_have_the_sparsity_and_nest():
    weights = {
        sparsity: tiny_llama(sparsity).model.layers[0].mlp.up_proj.weight for sparsity in (0.0, 0.5, 0.7)
    }
    zeros = {sparsity: weight == 0 for sparsity, weight in weights.items()}
    assert int(zeros[0.0].sum()) == 0
    for sparsity in (0.5, 0.7):
        assert zeros[sparsity].float().mean().item() == pytest.approx(sparsity, abs=0.03)
    assert bool((zeros[0.7] | ~zeros[0.5]).all())
    assert bool((tiny_llama(0.7).lm_head.weight != 0).any(dim=1).all())
    with pytest.raises(ValueError, match="sparsity is a fraction between 0 and 1, got 1.0"):
        zero_at_random_(tiny_llama(), 1.0)


def test_twins_share_memory_and_function():
    model = tiny_llama(0.7)
    copy, kernel, sparse = shared_copy(model), dense_kernel_twin(model), sparse_twin(model)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in copy.named_parameters()] == names
    shared = [p.data_ptr() for p in model.parameters()]
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in kernel.parameters()] == shared
    assert isinstance(kernel.model.layers[0].mlp.up_proj, DenseLinear)
    assert isinstance(sparse.model.layers[0].mlp.up_proj, SparseLinear)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear  # the original is left alone
    back = dense_twin(sparse)
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="no layer of this model is sparse enough to pack: .*prune it first"):
        sparse_twin(tiny_llama())


@pytest.fixture(scope="module")
def comparison():
    model, phases = tiny_llama(0.7), []
    engines = {"dense": model, "sparse": sparse_twin(model)}
    result = compare_speed(engines, QUICK, title="tiny", on_round=lambda *seen: phases.append(seen))
    assert {phase for phase, _, _ in phases} == {"decode", "prefill"}
    assert all(done <= total == 3 for _, done, total in phases)
    return result


def test_comparison_holds_all_that_a_reader_needs(comparison):
    assert list(comparison.decode) == list(comparison.prefill) == ["dense", "sparse"]
    assert comparison.prefill["dense"].speedup.median == 1.0
    assert comparison.model_bytes["sparse"] < comparison.model_bytes["dense"]
    difference = comparison.difference["sparse"]
    assert 0.0 <= difference["max_difference"] < 1e-4 * difference["max_value"]
    assert (comparison.settings["dtype"], comparison.settings["rounds"]) == ("float32", 2)
    assert comparison.settings["engines"] == ["dense", "sparse"]
    assert comparison.machine["torch_threads"] == torch.get_num_threads()
    assert any("weights partly or wholly in the cache" in note for note in comparison.notes)


def test_comparison_as_text_json_and_picture(comparison, tmp_path):
    text = str(comparison)
    for words in ("tiny", "decode tokens/s", "time to first token", "prefill tokens/s", "model in memory"):
        assert words in text
    written = json.loads(comparison.to_json(tmp_path / "bench.json"))
    assert written == json.loads((tmp_path / "bench.json").read_text()) == comparison.to_dict()
    assert comparison.plot(tmp_path / "bench.png").read_bytes().startswith(PNG)


def test_encoders_are_compared_without_decode():
    model = zero_at_random_(tiny_bert(), 0.6)
    result = compare_speed({"dense": model, "sparse": sparse_twin(model)}, QUICK)
    assert result.decode == {}
    assert result.prefill["sparse"].tokens_per_second > 0
    assert "decode" not in str(result)


def test_a_wrong_engine_shows_in_the_difference():
    right, wrong = tiny_llama(), tiny_llama()
    with torch.no_grad():
        wrong.lm_head.weight.mul_(2.0)
    difference = logit_difference({"right": right, "wrong": wrong}, QUICK)["wrong"]
    assert difference["max_difference"] == pytest.approx(difference["max_value"], rel=1e-5)


def test_disturbed_phases_are_named():
    one = Spread(1.0, 1.0, 1.0, 1)
    calm = DecodeTiming(1.0, 1.0, 1.0, 1.0, one, one, waited=0.0, bytes_per_step=1)
    prefill = PrefillTiming(1.0, one, one, waited=0.5)
    notes = _warnings({"a": tiny_llama()}, {"a": calm}, {"a": prefill}, {})
    assert any("DISTURBED" in note and "prefill a 50%" in note for note in notes)
