"""The way of many tokens: costs on disk, decisions from them, and layers that follow."""

import copy
import json
import timeit

import forked
import pytest
import reference
import torch

from pysparse import backend
from pysparse.nn import DenseLinear, SparseLinear, sparsify_
from pysparse.nn.dispatch import Dispatch, bucket, dense_kernel_tokens, judge, pairs_stay_small
from pysparse.ops import cost_cache, cost_measure
from pysparse.ops.costs import SHAPES, Costs
from pysparse.ops.ways import BITMAP, SECOND, WAYS

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
SHAPE = (512, 640)  # more entries than a small weight has


def made_up(**picoseconds):
    """Costs of so many picoseconds per entry and token (3 where not given); of pairs, per entry that is kept."""

    def half(name, size):
        way, entries = WAYS[name], SHAPES[size][0] * SHAPES[size][1]
        densities = [d if name == "pairs" else 1.0 for d in way.densities]
        return tuple(
            tuple(1e-12 * picoseconds.get(name, 3.0) * entries * d * n for n in way.tokens) for d in densities
        )

    return Costs(dict.fromkeys(WAYS, 1e-6), {name: (half(name, 0), half(name, 1)) for name in WAYS}, 2)


MADE_UP = made_up(bitmap=3.0, unpack=2.5, pairs=2.0, kernel=2.0, torch=1.0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(backend.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cost_cache, "measure", lambda dtype: MADE_UP)
    monkeypatch.setattr(backend, "_warned", set())
    cost_cache.forget()
    yield tmp_path
    cost_cache.forget()


def layer(sparsity, dtype=torch.float32, shape=SHAPE):
    linear = torch.nn.Linear(shape[1], shape[0], dtype=dtype)
    linear.weight.data = reference.sparse_matrix(*shape, sparsity, dtype)
    return linear.requires_grad_(False), SparseLinear.from_dense(linear)


def test_costs_are_measured_once_and_read_afterwards(cache, monkeypatch):
    assert cost_cache.known_costs(torch.float32) is None
    assert cost_cache.costs_for(torch.float32) == MADE_UP
    assert [path.name for path in cache.iterdir()] == [cost_cache.cost_file(torch.float32).name]
    cost_cache.forget()
    monkeypatch.setattr(cost_cache, "measure", lambda dtype: pytest.fail("measured again"))
    assert cost_cache.costs_for(torch.float32) == MADE_UP  # the very numbers: decisions repeat


@pytest.mark.parametrize("damage", ["cut", "foreign", "negative", "short", "list", "binary"])
def test_an_unusable_file_is_replaced_with_one_warning(cache, damage):
    cost_cache.tune(torch.float32)
    path = cost_cache.cost_file(torch.float32)
    content = json.loads(path.read_text())
    if damage == "foreign":
        content["key"]["cpu"] = "another"
    elif damage == "negative":
        content["costs"]["call"]["pairs"] = -1.0
    elif damage == "short":
        content["costs"]["seconds"]["pairs"][1][0].pop()
    text = {"cut": json.dumps(content)[:-9], "list": "[]"}.get(damage, json.dumps(content))
    path.write_bytes(b"\xff\xfe" if damage == "binary" else text.encode())
    cost_cache.forget()
    with pytest.warns(RuntimeWarning, match="measured again"):
        assert cost_cache.costs_for(torch.float32) == MADE_UP
    cost_cache.forget()
    assert cost_cache.costs_for(torch.float32) == MADE_UP  # from the file that replaced it; no warning


def test_a_directory_that_cannot_be_written_costs_a_warning_only(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv(backend.CACHE_VARIABLE, str(cache / "file"))
    with pytest.warns(RuntimeWarning, match="not kept"):
        cost_cache.tune(torch.float32)


def test_threads_and_levels_have_costs_of_their_own(cache):
    file = cost_cache.cost_file(torch.float32)
    assert cost_cache.cost_file(torch.bfloat16) != file
    with backend.force_isa("generic"):
        assert cost_cache.cost_file(torch.float32) != file
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cost_cache.cost_file(torch.float32) != file
    finally:
        torch.set_num_threads(before)


def test_predictions_grow_with_tokens_weight_and_density():
    for way in WAYS:
        counts = [n for n in (1, 16, 40, 64, 100, 256, 1000, 4096) if WAYS[way].takes(n)]
        times = [MADE_UP.predict(way, (4096, 4096), 0.3, n) for n in counts]
        assert times == sorted(times)
        assert MADE_UP.predict(way, (8192, 4096), 0.3, 16) > 1.9 * MADE_UP.predict(way, (4096, 4096), 0.3, 16)
    dense, sparse = (MADE_UP.predict("pairs", (4096, 4096), d, 64) for d in (0.9, 0.1))
    assert dense == pytest.approx(9 * sparse, rel=0.01)
    assert MADE_UP.predict("kernel", (4096, 4096), 1.0, 17) == float("inf")


def test_predictions_are_the_measured_figures_where_there_are_some():
    for way, table in MADE_UP.seconds.items():
        for size, half in enumerate(table):
            for density, line in zip(WAYS[way].densities, half, strict=True):
                for tokens, seconds in zip(WAYS[way].tokens, line, strict=True):
                    assert MADE_UP.predict(way, SHAPES[size], density, tokens) == pytest.approx(seconds)
    assert MADE_UP.predict("torch", (1, 1), 1.0, 64) == pytest.approx(1e-6, rel=0.01)  # a call as such


def test_part_of_a_step_costs_what_it_does_in_the_first_one():
    line = tuple(float(n) for n in (5, 6, 7, 8, 9, 10, 20, 40, 160))  # at the numbers of tokens of "bitmap"
    same = Costs(
        dict.fromkeys(WAYS, 0.0),
        {**MADE_UP.seconds, "bitmap": ((line,) * len(WAYS["bitmap"].densities),) * 2},
        2,
    )
    assert [same.predict("bitmap", SHAPES[0], 0.5, n) for n in (1, 16, 17, 32, 33, 48)] == pytest.approx(
        [5, 10, 15, 20, 25, 30]
    )


def test_pairs_wait_for_the_last_of_uneven_tasks_and_round_tokens_up():
    rows, cols = SHAPES[1]
    even = MADE_UP.predict("pairs", (rows, cols), 0.5, 64)
    assert MADE_UP.predict("pairs", (rows - 256, cols), 0.5, 64) == pytest.approx(
        even, rel=0.01
    )  # 7 tasks of 2
    for tokens, whole in ((33, 48), (49, 64), (65, 80), (97, 112)):
        assert MADE_UP.predict("pairs", (rows, cols), 0.5, tokens) == pytest.approx(
            MADE_UP.predict("pairs", (rows, cols), 0.5, whole)
        )


def test_noise_is_cleaned_away():
    cleaned = cost_measure.cleaned([[5.0, 2.0, 3.0], [1.0, 9.0, 4.0]])
    assert cleaned == ((1.0, 2.0, 3.0), (1.0, 4.0, 4.0))


def test_measured_costs_are_whole_and_plausible(monkeypatch):
    monkeypatch.setattr(cost_measure, "SHAPES", ((64, 96), (128, 256)))
    monkeypatch.setattr(cost_measure, "_LEAST_ROUNDS", 2)
    monkeypatch.setattr(cost_measure, "_SECONDS", 0.1)
    measured = cost_measure.measure(torch.float32)
    assert set(measured.call) == set(WAYS)
    assert all(0 < seconds < 60 for seconds in measured.call.values())
    assert measured.seconds["pairs"][1][-1][-1] > measured.seconds["pairs"][0][0][0] > 0
    assert cost_cache._parse(json.loads(json.dumps({
        "call": measured.call, "seconds": measured.seconds, "threads": measured.threads,
    }))) == measured  # fmt: skip


@pytest.mark.parametrize(
    ("sparsity", "mode", "second"),
    [(0.9, "auto", "pairs"), (0.9, "packed", "pairs"), (0.2, "packed", "dense")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_makes_the_packing_that_pays_and_counts_it(cache, sparsity, mode, second, dtype):
    linear, sparse = layer(sparsity, dtype)
    sparse.prefill = mode
    before = sparse.nbytes
    x = torch.randn(100, SHAPE[1]).to(dtype)
    if mode == "auto":
        sparse(x[:1])
        assert sparse.nbytes == before
        assert not list(cache.iterdir())  # one token measures nothing
    reference.assert_close(sparse(x), x, linear.weight, linear.bias)
    assert WAYS[sparse.choice(100).way].packing == second
    assert f"second_packing={second}" in repr(sparse)
    assert sparse.nbytes == before + getattr(sparse._dispatch, second).nbytes
    assert sparse.choice(256).way in sparse.kernel
    assert set(sparse.state_dict()) == {"compressed", "bitmask", "row_offsets", "shape", "bias"}


def test_results_agree_whatever_is_decided(cache):
    linear, sparse = layer(0.7)
    x = torch.randn(3, 50, SHAPE[1])
    for mode in ("unpack", "packed", "auto"):
        sparse.prefill = mode
        y = sparse(x)
        assert y.shape == (3, 50, SHAPE[0])
        reference.assert_close(y.flatten(0, 1), x.flatten(0, 1), linear.weight, linear.bias)
    sparse.prefill = "unpack"
    sparse(x)
    assert "second_packing=none" in repr(sparse)
    for way in (name for name, one in WAYS.items() if one.packing in (BITMAP, *SECOND)):
        y = Dispatch().run(way, x[:, :5], sparse._tiled(), sparse.bias)
        reference.assert_close(y.flatten(0, 1), x[:, :5].flatten(0, 1), linear.weight, linear.bias)


def test_auto_wants_a_tenth_and_packed_anything(cache, monkeypatch):
    close = made_up(
        bitmap=10.0, unpack=1.05, pairs=4.0, kernel=10.0, torch=10.0
    )  # a quarter of the weights: 1.0
    monkeypatch.setattr(cost_cache, "measure", lambda dtype: close)
    arguments = SHAPES[1], SHAPES[1][0] * SHAPES[1][1] // 4, torch.float32, 256, True
    assert Dispatch("auto").choice(*arguments).way == "unpack"
    assert "within 10% of pairs" in Dispatch("auto").choice(*arguments).reason
    assert Dispatch("packed").choice(*arguments).way == "pairs"
    assert Dispatch("unpack").choice(*arguments).way == "unpack"
    with pytest.raises(ValueError, match="prefill is one of auto, packed, unpack; got 'fast'"):
        Dispatch("fast")


@pytest.mark.parametrize(
    ("dtype", "sparsity", "fits"),
    [(torch.bfloat16, 0.6, False), (torch.bfloat16, 0.7, True), (torch.float32, 0.5, False),
     (torch.float32, 0.7, True)],
)  # fmt: skip
def test_by_default_a_layer_never_outgrows_its_dense_self(cache, dtype, sparsity, fits):
    linear, sparse = layer(sparsity, dtype, (1024, 2048))
    assert pairs_stay_small(linear.weight.numel(), sparse.nnz, dtype) == fits
    sparse(torch.randn(256, 2048).to(dtype))
    assert sparse.nbytes <= linear.weight.numel() * linear.weight.element_size()
    sparse.prefill = "packed"
    sparse(torch.randn(256, 2048).to(dtype))
    assert (sparse.nbytes <= linear.weight.numel() * linear.weight.element_size()) == fits


def test_a_moved_or_reloaded_weight_drops_its_second_packing(cache):
    linear, sparse = layer(0.9)
    bias = linear.bias.clone()  # the layer shares it and is about to load another
    x = torch.randn(64, SHAPE[1])
    sparse(x)
    assert sparse._dispatch.pairs is not None
    twin = copy.deepcopy(sparse)
    other, fresh = layer(0.9)
    sparse.load_state_dict(fresh.state_dict())
    assert sparse._dispatch.pairs is None
    reference.assert_close(sparse(x), x, other.weight, other.bias)
    reference.assert_close(twin(x), x, linear.weight, bias)
    narrow = sparse.to(torch.bfloat16)
    reference.assert_close(narrow(x.bfloat16()), x.bfloat16(), other.weight.bfloat16(), other.bias.bfloat16())


def test_small_layers_and_gradients_measure_nothing(cache):
    _, small = layer(0.8, shape=(64, 64))
    small(torch.randn(300, 64))
    _, large = layer(0.8)
    x = torch.randn(70, SHAPE[1], requires_grad=True)
    large(x).sum().backward()
    assert x.grad is not None
    assert not list(cache.iterdir())
    assert "not measured yet" in large.kernel


def test_buckets_are_exact_for_few_and_bounded_for_many():
    assert [bucket(n) for n in (17, 64, 65, 128, 129, 4096)] == [17, 64, 80, 128, 144, 4096]


def test_a_decision_costs_less_than_a_microsecond_or_so(cache):
    dispatch, nnz = Dispatch(), SHAPE[0] * SHAPE[1] // 5
    arguments = SHAPE, nnz, torch.float32, 100
    dispatch.way(*arguments)
    seconds = min(timeit.repeat(lambda: dispatch.way(*arguments), number=10_000, repeat=5)) / 10_000
    assert seconds < 10e-6  # 0.4 us on an idle core; a busy one must not fail the test


def test_tune_command_writes_the_file_and_shows_decisions(tmp_path):
    code = (
        "from pysparse.ops import cost_measure as m\n"
        "m.SHAPES = ((64, 96), (128, 256)); m._SECONDS, m._LEAST_ROUNDS = 0.1, 1\n"
        "from pysparse.cli import app; app(['tune', '--dtype', 'fp32', '--json', '-'])"
    )
    done = forked.run(code, **{backend.CACHE_VARIABLE: str(tmp_path)})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {row["dtype"] for row in answer["choices"]} == {"float32"}
    assert {row["packing"] for row in answer["choices"]} == {"bitmap", "int8", "nm", "nm-int8"}
    assert all(set(row["milliseconds"]) >= {row["packing"], "torch"} for row in answer["choices"])
    assert [str(path) for path in tmp_path.iterdir()] == answer["files"]


def test_speed_may_hold_several_packings_each_for_its_tokens(cache, monkeypatch):
    """Dense wins at one token (packed made slow here), pairs at many: both are made, and only when called for."""
    monkeypatch.setattr(
        cost_cache, "measure", lambda dtype: made_up(bitmap=9.0, unpack=9.0, pairs=2.0, kernel=1.0, torch=8.0)
    )
    linear, sparse = layer(0.5)
    sparse.prefill = "packed"
    for tokens, way, held in [(1, "kernel", "dense"), (200, "pairs", "pairs+dense")]:
        x = torch.randn(tokens, SHAPE[1])
        reference.assert_close(sparse(x), x, linear.weight, linear.bias)
        assert sparse.choice(tokens).way == way
        assert f"second_packing={held}" in repr(sparse)
    assert sparse.second_packing_nbytes == sparse._dispatch.pairs.nbytes + sparse._dispatch.dense.nbytes


def linear_of(sparsity, shape=SHAPE):
    return torch.nn.Sequential(layer(sparsity, shape=shape)[0])


def test_sparsify_follows_the_costs(cache, monkeypatch):
    """Pairs at 2 ps a kept weight against torch's 1: for many tokens they gain below half the weights."""
    by_bytes = made_up(bitmap=3.0, unpack=2.5, pairs=2.0, kernel=2.0, torch=1.0)
    cases = [("balanced", 1, 0.9, False), ("balanced", 256, 0.9, True), ("balanced", 256, 0.4, False),
             ("speed", 1, 0.9, True), ("speed", 1, 0.4, False), ("memory", 1, 0.4, True),
             ("memory", 1, 0.01, False)]  # fmt: skip
    monkeypatch.setattr(cost_cache, "measure", lambda dtype: by_bytes)
    for optimize, tokens, sparsity, packs in cases:
        model = linear_of(sparsity)
        report = sparsify_(model, optimize=optimize, tokens=tokens)
        assert (type(model[0]) is SparseLinear) == packs, (optimize, tokens, sparsity)
        assert ("0" in report.sparse, "0" in report.dense) == (packs, not packs)
        if not packs and optimize != "memory":
            assert "x dense at" in report.dense["0"]
            assert "dense torch: faster than the compiled dense kernel" in report.dense["0"]
    assert judge(SHAPE, 0.4, torch.float32) == judge(SHAPE, 0.4, torch.float32)


def test_sparsify_hands_the_wish_to_the_layer(cache):
    for optimize, prefill in [("speed", "packed"), ("balanced", "auto"), ("memory", "unpack")]:
        model = linear_of(0.9)
        sparsify_(model, optimize=optimize, min_sparsity=0.5)
        assert model[0].prefill == prefill
    with pytest.raises(ValueError, match="optimize is one of speed, balanced, memory; got 'size'"):
        sparsify_(model, optimize="size")
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        sparsify_(model, tokens=0)


def test_a_dense_layer_takes_the_kernel_only_where_it_is_faster(cache):
    shape, x = SHAPE, torch.randn(2, SHAPE[1])
    dense = DenseLinear.from_linear(layer(0.0)[0])
    assert dense.kernel_tokens() == frozenset(range(1, 17))  # not measured: all that it is made for
    cost_cache.tune(torch.float32)
    assert dense_kernel_tokens(shape, torch.float32) == frozenset()
    fresh = DenseLinear.from_linear(layer(0.0)[0])
    assert "dense torch" in fresh.kernel
    assert torch.equal(fresh(x), torch.nn.functional.linear(x, fresh.weight, fresh.bias))
