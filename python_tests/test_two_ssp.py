"""2SSP: the neurons, the search, and what is left after an error."""

import math

import pytest
import tiny_models
import torch
from torch import nn

import pysparse
from pysparse.calib import load_calibration
from pysparse.measure import torch_threads
from pysparse.measure.quality import sequence_nats
from pysparse.methods import STRUCTURAL, ShortGPT, TwoSSP, method_for
from pysparse.models.anatomy import anatomy_of
from pysparse.nn.structure import NoAttention, PassThrough, Surgery
from pysparse.pruning import prune_structure
from pysparse.pruning.depth import AttentionSearch, remove_attentions
from pysparse.pruning.probe import find_seats
from pysparse.pruning.width import NeuronNorms, strongest

BLOCKS = 5
FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gpt2", "opt",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gemma3", "gpt_neox")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def searching(model, batches, limit=1 << 30):
    """A search as prune_structure sets it up: no cache that would grow with each trial."""
    model.config.use_cache = False
    anatomy = anatomy_of(model)
    return AttentionSearch(anatomy, find_seats(anatomy, batches), batches, limit)


def deep(name, dtype=torch.float32, **settings):
    """A tiny model of five blocks."""
    settings |= {"n_layer": BLOCKS} if name in ("gpt2", "bloom") else {"num_hidden_layers": BLOCKS}
    if name == "gemma3":
        settings["layer_types"] = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    return tiny_models.tiny(name, dtype, **settings)


def data(batch_size=4):
    return load_calibration(tiny_models.tokens(6, 12), batch_size=batch_size)


def cut(model, method, sparsity=None, calibration=None):
    return prune_structure(anatomy_of(model), method, sparsity, calibration or data())


def contents(model):
    """Every tensor, the kind of every module, and the config."""
    kinds = [
        (path, type(module).__name__, getattr(module, "layer_idx", None))
        for path, module in model.named_modules()
    ]
    return {name: value.clone() for name, value in model.state_dict().items()}, kinds, model.config.to_dict()


def same(left, right):
    tensors = left[0].keys() == right[0].keys() and all(torch.equal(left[0][n], right[0][n]) for n in left[0])
    return tensors and left[1:] == right[1:]


# --- stage 1 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_a_neurons_score_is_the_mean_of_norms_over_sequences(flat):
    z = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(0))
    norms = NeuronNorms(10)
    norms.expect([2, 1])
    for part in (z[:2], z[2:]):
        norms.hook(nn.Identity(), (part.flatten(0, 1) if flat else part,))
    torch.testing.assert_close(norms.value(), z.double().norm(dim=1).mean(dim=0), rtol=1e-6, atol=0)


def test_half_precision_does_not_overflow():
    norms = NeuronNorms(1)
    norms.expect([1])
    norms.hook(nn.Identity(), (torch.full((1, 4, 1), 6e4, dtype=torch.float16),))
    assert norms.value().item() == pytest.approx(2 * 6e4, rel=1e-3)  # squares are beyond float16's 65504


def test_the_strongest_in_order_and_the_first_among_equals():
    assert strongest(torch.tensor([1.0, 5.0, 1.0, 7.0, 1.0]), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weakest_neurons_go_and_the_rest_computes_as_before(name):
    model, dense = deep(name), deep(name)
    report = cut(model, TwoSSP(n_attn=0, widths=(20,) * BLOCKS))
    assert [one.width for one in report.blocks] == [20] * BLOCKS
    whole = anatomy_of(dense)
    scores = []
    for block in whole.blocks:  # in one dense pass: all hooks before anything is changed
        seen = []
        block.ffn.writer[1].register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0].detach())
        )
        scores.append(seen)
    rows = tiny_models.tokens(6, 12)
    with torch.no_grad():
        dense(rows)
    for seen, block in zip(scores, whole.blocks, strict=True):
        z = seen[0].reshape(6, 12, -1).double().norm(dim=1).mean(dim=0)
        gone = z.argsort()[: block.ffn.width - 20]
        weight = block.ffn.writer[1].weight.data  # Conv1D keeps the transpose
        weight.index_fill_(0 if name == "gpt2" else 1, gone, 0.0)
        seen.clear()
    with torch.no_grad():
        wanted, found = dense(rows).logits, model(rows).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_neurons_that_never_fire_cost_nothing(name):
    """Their score is 0 and they go first; the outputs are the same to the last bit that the sums' order allows."""
    model = deep(name)
    for block in anatomy_of(model).blocks:
        for _, reader in block.ffn.readers:
            dead = torch.cat([torch.arange(0, 48, 2) + half * 48 for half in range(block.ffn.halves)])
            reader.weight.data[dead] = 0
            if reader.bias is not None:
                reader.bias.data[dead] = 0
    rows = tiny_models.tokens(2, 9)
    with torch.no_grad():
        before = model.double()(rows).logits
        cut(model, TwoSSP(n_attn=0, widths=(24,) * BLOCKS))
        torch.testing.assert_close(model(rows).logits, before, rtol=1e-12, atol=1e-12)


# --- stage 2 ---------------------------------------------------------------------------------------------


def straightforward(model, rows, count):
    """Remove attentions greedily by whole forward passes, with zeros for what a removed one returns."""
    attentions = [block.attention for block in anatomy_of(model).blocks]
    hooks, gone = {}, []

    def zero(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:])

    def perplexity(index):
        handle = attentions[index][1].register_forward_hook(zero)
        with torch.no_grad():
            nats = sequence_nats(model(rows, use_cache=False).logits, rows)
        handle.remove()
        return math.exp(nats / (rows.numel() - len(rows)))

    for _ in range(count):
        values = {index: perplexity(index) for index in range(BLOCKS) if index not in hooks}
        best = min(values, key=values.__getitem__)
        hooks[best] = attentions[best][1].register_forward_hook(zero)
        gone.append((attentions[best][0], values[best]))
    return gone


@pytest.mark.parametrize("limit", [1 << 30, 4000, 0])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt", "gpt_neox"])
def test_the_search_finds_what_whole_forward_passes_find(name, limit):
    model, rows = deep(name), tiny_models.tokens(3, 12)
    batches = load_calibration(rows, batch_size=2).batches
    with torch.no_grad():
        search = searching(model, batches, limit)
        steps = remove_attentions(search, 3, Surgery(model))
    wanted = straightforward(deep(name), rows, 3)
    assert [step.path for step in steps] == [path for path, _ in wanted]
    assert [step.perplexity for step in steps] == pytest.approx([value for _, value in wanted], rel=1e-5)
    whole = sum(BLOCKS * (BLOCKS - step) for step in range(3)) * len(batches)
    assert search.block_runs < whole  # fewer than one forward pass a candidate
    assert [step.candidates for step in steps] == [5, 4, 3]


def test_states_kept_save_most_of_the_work():
    def runs(limit):
        model = tiny_models.tiny("llama", num_hidden_layers=12)
        batches = load_calibration(tiny_models.tokens(1, 8)).batches
        with torch.no_grad():
            search = searching(model, batches, limit)
            remove_attentions(search, 6, Surgery(model))
        return search.block_runs

    kept, none, whole = runs(1 << 30), runs(0), sum(12 * (12 - step) for step in range(6))
    assert kept < none < 0.7 * whole


@pytest.mark.parametrize("name", FAMILIES)
def test_without_an_attention_the_model_is_the_one_with_zero_outputs(name):
    model, dense = deep(name), deep(name)
    report = cut(model, TwoSSP(n_attn=2, widths=tuple([anatomy_of(dense).sizes.width] * BLOCKS)))
    assert len(report.steps) == 2
    for block in anatomy_of(dense).blocks:
        if block.attention[0] in report.removed_attentions:
            last = [m for m in block.attention[1].modules() if m._parameters.get("weight") is not None]
            output = next(
                m for m in reversed(last) if m.weight.dim() == 2 and "norm" not in type(m).__name__.lower()
            )
            named = [
                m
                for n, m in block.attention[1].named_modules()
                if n in ("o_proj", "out_proj", "c_proj", "dense")
            ]
            output = named[0] if named else output
            for parameter in output.parameters():
                parameter.data.zero_()
    rows = tiny_models.tokens(3, 10)
    with torch.no_grad():
        assert torch.equal(model(rows).logits, dense(rows).logits)


def test_a_removed_attention_costs_nothing():
    """Every operation of the block is one that its FFN, its norm and its own residual addition need."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    model = deep("llama")
    cut(model, TwoSSP(n_attn=1, widths=(48,) * BLOCKS))
    block = next(one for one in model.model.layers if isinstance(one.self_attn, NoAttention))
    assert isinstance(block.input_layernorm, PassThrough)
    assert isinstance(block.post_attention_layernorm, nn.Module)
    hidden = torch.randn(1, 5, 32)
    with torch.no_grad():
        with Log() as whole:
            out = block(hidden, position_embeddings=None)
        with Log() as needed:
            wanted = hidden + block.mlp(block.post_attention_layernorm(hidden))
    assert whole.ops == needed.ops
    assert torch.equal(out, wanted)


def breaking(model, index, monkeypatch):
    """Make block ``index`` give NaN once its attention is gone, as a norm of nothing but zeros may."""
    block = model.model.layers[index]
    original = block.mlp.forward
    monkeypatch.setattr(
        block.mlp, "forward",
        lambda x: original(x) * (math.nan if isinstance(block.self_attn, NoAttention) else 1.0),
    )  # fmt: skip


def test_a_candidate_with_nan_is_skipped_and_said(monkeypatch):
    model = deep("llama")
    breaking(model, 2, monkeypatch)
    report = cut(model, TwoSSP(n_attn=2, widths=(40,) * BLOCKS))
    assert "model.layers.2.self_attn" not in report.removed_attentions
    assert [step.broken for step in report.steps] == [("model.layers.2.self_attn",)] * 2
    assert (
        "step 1: the perplexity without model.layers.2.self_attn is NaN or infinite; it was not chosen"
        in (report.warnings)
    )
    assert all(math.isfinite(step.perplexity) for step in report.steps)


# --- after an error the model is what it was -------------------------------------------------------------


def test_when_every_candidate_breaks_the_model_is_unchanged(monkeypatch):
    model = deep("llama")
    before = contents(model)
    for index in range(1, BLOCKS):  # block 0 is looked at on a few tokens before anything is cut
        breaking(model, index, monkeypatch)
    # The first step finds block 0, the second nothing.
    with pytest.raises(ValueError, match="removed as number 2: all 4 have NaN or infinite perplexity"):
        cut(model, TwoSSP(n_attn=2, widths=(40,) * BLOCKS))
    assert same(contents(model), before)


@pytest.mark.parametrize(
    ("method", "sparsity", "message"),
    [
        (TwoSSP(n_attn=5), 0.7, "needs 5 attention modules to go and at most 4 of 5 can"),
        (TwoSSP(n_attn=0), 0.9, "sparsity=0.9 cannot be met: without 0 attention modules"),
        (
            TwoSSP(narrow=False),
            0.5,
            "sparsity=0.5 cannot be met: that needs 6 attention modules to go and at most 4",
        ),
        (TwoSSP(widths=(3,) * 4), None, "widths has 4 entries, the model 5 blocks"),
        (TwoSSP(widths=(40,) * BLOCKS, n_attn=0), 0.5, "sparsity=0.5 contradicts widths and n_attn=0"),
        (TwoSSP(), 1.0, "sparsity is a fraction between 0 .all kept. and 1"),
        (ShortGPT(), 0.05, "sparsity=0.05 cannot be met by whole blocks: it is 0.25 of 5 blocks"),
        (ShortGPT(), 0.95, "cannot be met by whole blocks: it is 4.75 of 5"),
    ],
)
def test_rates_that_cannot_be_met(method, sparsity, message):
    model = deep("llama")
    before = contents(model)
    with pytest.raises(ValueError, match=message):
        cut(model, method, sparsity)
    assert same(contents(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupt_in_the_middle_takes_everything_back(dtype):
    model = deep("gemma2", dtype)
    before = contents(model)

    def stop(what, done, total):
        if what == "removing attention modules":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_structure(anatomy_of(model), TwoSSP(n_attn=2), 0.35, data(), advance=stop)
    assert same(contents(model), before)
    assert model.config.use_cache


def test_activations_that_are_not_finite_are_said_with_the_block():
    model = deep("llama")
    model.model.layers[3].mlp.gate_proj.weight.data[4] = math.inf
    with pytest.raises(ValueError, match=r"model.layers.3: the activations of 1 of 48 neurons are NaN"):
        cut(model, TwoSSP(n_attn=0), 0.3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bloom",
            "transformer.h.0.self_attention cannot be removed: the output of a removed attention is only",
        ),
        (
            "mixtral",
            "takes blocks with one FFN: .* model.layers.0 has none .layers of experts are not supported",
        ),
        ("bert", "encoder.layer.0.attention cannot be removed"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(name, message):
    model = deep(name)
    before = contents(model)
    with pytest.raises(ValueError, match=message):
        cut(model, TwoSSP(n_attn=1), 0.3)
    assert same(contents(model), before)


def test_rows_that_are_not_neurons_are_found():
    """A fused matrix whose gate and up rows alternate has the same shape as one that holds them apart."""
    model = deep("phi3")
    for layer in model.model.layers:

        def alternating(x, mlp=layer.mlp):
            up = mlp.gate_up_proj(x)
            return mlp.down_proj(up[..., 1::2] * mlp.activation_fn(up[..., ::2]))

        layer.mlp.forward = alternating
    with pytest.raises(ValueError, match="not laid out neuron by neuron"):
        cut(model, TwoSSP(n_attn=0), 0.3)


def test_a_writer_that_is_passed_by_is_said():
    model = deep("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match="model.layers.1.mlp.down_proj is not called once for each batch"):
        cut(model, TwoSSP(n_attn=0), 0.3)


def test_a_model_is_cut_once():
    model = deep("llama")
    cut(model, TwoSSP(n_attn=1), 0.3)
    with pytest.raises(ValueError, match="has been pruned by structure already"):
        anatomy_of(model)


def test_settings_are_checked_and_read_from_a_name():
    for settings, message in (({"alpha": 0.0}, "alpha=0.0 must be"), ({"multiple_of": 0}, "multiple_of=0 must be"),
                              ({"narrow": False, "multiple_of": 8}, "contradict")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TwoSSP(**settings)
    assert method_for("2ssp:multiple_of=16,n_attn=3") == TwoSSP(multiple_of=16, n_attn=3)
    assert STRUCTURAL["2ssp-width"].n_attn == 0
    with pytest.raises(ValueError, match="method '2ssp' has no setting 'beta=1'"):
        method_for("2ssp:beta=1")
    with pytest.raises(ValueError, match="pattern and allocation do not apply"):
        pysparse.prune(deep("llama"), 0.3, "2ssp", "2:4", progress=False)
    with pytest.raises(ValueError, match="unknown method '2sp' .did you mean '2ssp'"):
        method_for("2sp")


# --- the last attention of a kind, and blocks ------------------------------------------------------------


def test_one_attention_of_each_kind_stays():
    model = deep("gemma3")  # two of five are full attentions
    report = cut(model, TwoSSP(n_attn=3, widths=(40,) * BLOCKS))
    left = [b for b in range(BLOCKS) if f"model.layers.{b}.self_attn" not in report.removed_attentions]
    assert {model.config.layer_types[index] for index in left} == {"sliding_attention", "full_attention"}
    with pytest.raises(ValueError, match="needs 4 attention modules to go and at most 3 of 5"):
        cut(deep("gemma3"), TwoSSP(n_attn=4), 0.4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_block_influence_and_removal(name):
    model, dense, rows = deep(name), deep(name), tiny_models.tokens(6, 12)
    anatomy = anatomy_of(dense)
    pairs = [[] for _ in anatomy.blocks]
    hidden = dense(rows, output_hidden_states=True).hidden_states
    for index in range(BLOCKS - 1):  # the last one of these is behind the final norm
        pairs[index] = torch.cosine_similarity(hidden[index], hidden[index + 1], dim=-1)
    result = pysparse.prune(model, 0.4, "shortgpt", calibration=rows, progress=False)
    scores = list(result.report.scores.values())
    assert scores[:-1] == pytest.approx([1 - float(one.detach().mean()) for one in pairs[:-1]], rel=1e-4)
    gone = sorted(sorted(range(BLOCKS), key=scores.__getitem__)[:2])
    assert [index for index, one in enumerate(result.report.blocks) if one.deleted] == gone
    assert model.config.num_hidden_layers == BLOCKS - 2
    for index in gone:
        anatomy.blocks[index].module.forward = lambda x, *args, **kwargs: x
    with torch.no_grad():
        wanted = dense(rows, use_cache=False).logits
        assert (
            torch.equal(model(rows).logits, wanted) or name == "gemma2"
        )  # whose masks follow the block's number
