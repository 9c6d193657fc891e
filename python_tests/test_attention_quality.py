"""Measures of what planners lose, lists that users bring, and the command that shows them."""

import json

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from typer.testing import CliRunner

import pysparse
from pysparse.attention import AttentionInput, dense, execute
from pysparse.attention.fixed import FixedPlan, from_block_mask
from pysparse.attention.quality import curves, measure_quality, plot_curves, plot_head, selected_keys
from pysparse.attention.synthetic import Synthetic
from pysparse.cli import app
from pysparse.data import demo_model_path
from pysparse.formats.stripe import BlockIndex, StripeIndex
from pysparse.methods import AnchorAttention, StreamingAttention, VerticalSlash
from pysparse.ops.attention import AnchorRegion

ANCHOR = AnchorAttention(theta=4.0, group_size=64, step=8, init=16, local=16)
STREAMING = StreamingAttention(sink=16, window=64, block=16)


@pytest.fixture(scope="module")
def given():
    made = Synthetic(300, query_heads=4, kv_heads=2, head_dim=64, stripe_fraction=0.05, dwell=60)
    return AttentionInput.of(*made.make(torch.float32))


def exact_weights(given, head):
    key = given.key[0, head // 2].double()
    logits = (given.query[0, head].double() @ key.T * given.scale).masked_fill(
        torch.ones(300, 300).triu(1).bool(), -torch.inf
    )
    return logits.softmax(-1)


@pytest.mark.parametrize("planner", [ANCHOR, STREAMING, VerticalSlash(vertical=20, slash=20, block=16)])
def test_recall_is_the_mass_of_the_selected_keys(given, planner):
    quality = measure_quality(given, planner, rows=300)
    plan = planner.plan(given)
    for head in (0, 3):
        chosen = selected_keys(given, plan, head, torch.arange(300))
        expected = (exact_weights(given, head) * chosen).sum(-1)
        torch.testing.assert_close(quality.recall[head].double(), expected, atol=1e-5, rtol=1e-4)
    pairs = sum(int(selected_keys(given, plan, head, torch.arange(300)).sum()) for head in range(4))
    assert quality.density == pytest.approx(pairs / (4 * 300 * 301 / 2))
    out = execute(given, plan)[0]
    exact = dense(given)[0]
    assert quality.error == pytest.approx(float((out - exact).norm() / exact.norm()), rel=1e-5)
    assert quality.percentile(1) <= quality.percentile(50)
    assert quality.to_dict()["recall"] == pytest.approx(sum(quality.by_head()) / 4, rel=1e-5)


def test_curves_and_plots(given, tmp_path):
    measured = curves(given, {"anchor": [AnchorAttention(theta, 64, 8, 16, 16) for theta in (0.0, 8.0)],
                              "streaming": [STREAMING]}, rows=32)  # fmt: skip
    low, high = measured["anchor"]
    assert low.density < high.density
    assert low.mean_recall < high.mean_recall
    assert plot_curves(tmp_path / "curves.png", measured).stat().st_size > 5000
    assert plot_head(tmp_path / "head.png", given, ANCHOR.plan(given), head=1).stat().st_size > 5000
    with pytest.raises(ValueError, match="head=4"):
        plot_head(tmp_path / "none.png", given, ANCHOR.plan(given), head=4)


def test_quality_refuses_a_batch_and_no_rows(given):
    both = AttentionInput.of(*(torch.cat([t, t]) for t in (given.query, given.key, given.value)))
    with pytest.raises(ValueError, match="batch of 2"):
        measure_quality(both, ANCHOR)
    with pytest.raises(ValueError, match="rows=0"):
        measure_quality(given, ANCHOR, rows=0)


def test_a_users_stripes_and_blocks_are_computed_as_they_are(given):
    plan = ANCHOR.plan(given)
    fixed = FixedPlan(stripes=plan.stripes, region=ANCHOR.region)
    torch.testing.assert_close(
        execute(given, fixed.plan(given))[0], execute(given, plan)[0], atol=1e-5, rtol=1e-4
    )
    blocks = STREAMING.plan(given).blocks
    torch.testing.assert_close(
        execute(given, FixedPlan(blocks).plan(given)), execute(given, STREAMING.plan(given))
    )
    with pytest.raises(ValueError, match="pass blocks"):
        FixedPlan()
    with pytest.raises(ValueError, match="count twice"):
        FixedPlan(blocks, region=AnchorRegion())


def test_lists_that_do_not_fit_are_refused(given):
    late = StripeIndex.from_mask(torch.ones(1, 4, 5, 300, dtype=torch.bool), 64)
    with pytest.raises(ValueError, match=r"(?i)stripe"):
        execute(given, FixedPlan(stripes=late).plan(given))
    short = BlockIndex.from_mask(torch.ones(1, 4, 3, 19, dtype=torch.bool), 16, 16)
    with pytest.raises(ValueError, match="at least 19 groups"):
        execute(given, FixedPlan(blocks=short).plan(given))


def test_a_flex_attention_mask_becomes_blocks(given):
    def local(b, h, q, k):
        return (k <= q) & ((q // 16 - k // 16 <= 4) | (k < 16))

    flex = create_block_mask(local, 1, 4, 300, 300, device="cpu", BLOCK_SIZE=16)
    index = from_block_mask(flex)
    expected = STREAMING.plan(given).blocks.to_mask()
    assert torch.equal(index.to_mask(), expected.expand(1, 4, 19, 19))


@pytest.mark.parametrize(
    ("pattern", "rows", "match"),
    [
        (lambda b, h, q, k: k <= q + 3, 64, "not causal inside"),
        (lambda b, h, q, k: (k <= q) & (k % 2 == 0), 64, "not causal inside"),
        (lambda b, h, q, k: k >= 0, 64, "not causal inside"),
        (lambda b, h, q, k: k <= q, 32, "32 rows and 64 keys"),
    ],
)
def test_a_pattern_that_blocks_do_not_express_is_refused(pattern, rows, match):
    flex = create_block_mask(pattern, 1, 1, rows, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match=match):
        from_block_mask(flex)


def test_the_command_shows_a_model_layer_by_layer(tmp_path):
    call = ["attention", "stats", str(demo_model_path()), "--length", "200", "--min-length", "0"]
    result = CliRunner().invoke(app, [*call, "--planner", "streaming", "--max-density", "1", "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["layer"] for row in found["calls"]] == list(range(6))
    assert all(
        row["way"] == "sparse" and row["recall"] == pytest.approx(1.0, abs=1e-3) for row in found["calls"]
    )
    short = CliRunner().invoke(app, ["attention", "stats", str(demo_model_path()), "--length", "64"])
    assert short.exit_code == 0
    assert "fewer than 2304 keys" in short.stdout
    wrong = CliRunner().invoke(app, [*call, "--planner", "anker"])
    assert wrong.exit_code == 2
    assert "unknown planner 'anker'" in wrong.stderr


def test_stats_leave_a_model_as_it_was():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    before = model.config._attn_implementation
    log = pysparse.attention_stats(model, None, prompt=torch.arange(1, 40).unsqueeze(0), length=50)
    assert log.total("dense").rows == 6 * 50
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="length=1"):
        pysparse.attention_stats(model, length=1)
