"""What a planner loses: recall by head and row, output error, and curves of recall against density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysparse.attention.dispatch import row_recall
from pysparse.attention.plan import AttentionInput, AttentionPlan, Planner, dense, execute
from pysparse.measure.results import Chart, save_plot


@dataclass(frozen=True, slots=True, eq=False)
class Quality:
    """One planner on one call. ``recall`` [Hq, rows] is the share of attention mass computed, NaN in padding."""

    planner: Planner
    density: float
    rows: Tensor  # that were looked at, int64
    recall: Tensor
    error: float  # Frobenius norm of the difference to exact attention, relative to exact attention's

    def percentile(self, q: float) -> float:
        """Return the ``q``-th percentile (0..100) of the recall over heads and rows."""
        known = self.recall[~self.recall.isnan()].double()
        return float(torch.quantile(known, q / 100)) if known.numel() else float("nan")

    @property
    def mean_recall(self) -> float:
        """Mean over heads and rows."""
        return float(self.recall.nanmean())

    def by_head(self) -> list[float]:
        """Return each head's mean recall."""
        return [float(value) for value in self.recall.nanmean(1)]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "planner": str(self.planner), "density": self.density, "recall": self.mean_recall,
            "recall_p1": self.percentile(1), "recall_p10": self.percentile(10), "error": self.error,
            "recall_by_head": self.by_head(),
        }  # fmt: skip


def measure_quality(
    given: AttentionInput, planner: Planner, rows: int = 256, exact: Tensor | None = None
) -> Quality:
    """Plan one sequence (batch 1) and compare it with exact attention, on ``rows`` evenly spread query rows.

    ``exact`` is exact attention's output if it is known already. Raises ValueError for a batch or for no rows.
    """
    if given.query.shape[0] != 1:
        raise ValueError(f"quality is measured one sequence at a time, got a batch of {given.query.shape[0]}")
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    plan = planner.plan(given)
    out, lse = execute(given, plan)
    reference = (dense(given)[0] if exact is None else exact).float()
    count = given.query.shape[2]
    sampled = torch.linspace(0, count - 1, min(rows, count)).long()
    error = float((out.float() - reference).norm() / reference.norm())
    return Quality(planner, plan.density(given), sampled, row_recall(given, lse, sampled)[0], error)


def curves(
    given: AttentionInput, families: Mapping[str, Sequence[Planner]], rows: int = 256
) -> dict[str, list[Quality]]:
    """Measure every planner of every family: recall against density, one curve a family."""
    exact = dense(given)[0]
    return {
        name: [measure_quality(given, planner, rows, exact) for planner in planners]
        for name, planners in families.items()
    }


def plot_curves(path: str | Path, measured: Mapping[str, Sequence[Quality]], caption: str = "") -> Path:
    """Draw mean recall, its first percentile and the output error against density; RuntimeError without matplotlib."""

    def chart(title: str, value: str, log_y: bool = False) -> Chart:
        series = {}
        for name, points in measured.items():
            ordered = sorted(points, key=lambda point: point.density)
            rows = [point.to_dict() for point in ordered]
            series[name] = ([row["density"] for row in rows], [row[value] for row in rows])
        return Chart(title, "density (share of causal pairs computed)", title, series, log_y=log_y)

    charts = [chart("mean recall", "recall"), chart("1st percentile of recall", "recall_p1")]
    return save_plot(path, [*charts, chart("output error", "error", log_y=True)], caption)


def plot_head(
    path: str | Path, given: AttentionInput, plan: AttentionPlan, head: int = 0, cells: int = 256
) -> Path:
    """Draw one head's attention, pooled to ``cells`` x ``cells`` (the largest weight), and what is computed.

    RuntimeError without matplotlib; ValueError for a head that is not there.
    """
    if not 0 <= head < given.query.shape[1]:
        raise ValueError(f"head={head} is not in 0..{given.query.shape[1] - 1}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'pysparse[plot]'") from None
    weights, computed = _pooled(given, plan, head, cells)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global pyplot state
    left, right = figure.subplots(1, 2)
    extent = (0, given.key.shape[2], given.query.shape[2] + given.q_offset, given.q_offset)
    shown = left.imshow(weights.clamp(min=1e-6).log10().numpy(), extent=extent, aspect="auto", cmap="viridis")
    figure.colorbar(shown, ax=left, label="log10 of the largest weight")
    right.imshow(computed.numpy(), extent=extent, aspect="auto", cmap="Greys", vmin=0, vmax=1)
    left.set(title=f"head {head}: attention", xlabel="key", ylabel="query")
    right.set(title=f"computed: {plan.density(given):.1%} of all heads' pairs", xlabel="key")
    figure.savefig(path, dpi=130)
    return Path(path)


def _pooled(given: AttentionInput, plan: AttentionPlan, head: int, cells: int) -> tuple[Tensor, Tensor]:
    rows, keys = given.query.shape[2], given.key.shape[2]
    sampled = torch.linspace(0, rows - 1, min(cells, rows)).long()
    key = given.key[0, head // (given.query.shape[1] // given.key.shape[1])].float()
    position = (sampled + given.q_offset).unsqueeze(1)
    future = torch.arange(keys) > position
    logits = given.scale * given.query[0, head, sampled].float() @ key.T
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    computed = selected_keys(given, plan, head, sampled).float()
    width = -(-keys // cells)
    short = (0, -keys % width)
    pooled = [torch.nn.functional.pad(t, short).unflatten(1, (-1, width)) for t in (weights, computed)]
    return pooled[0].amax(2), pooled[1].mean(2)


def selected_keys(given: AttentionInput, plan: AttentionPlan, head: int, rows: Tensor) -> Tensor:
    """Return a bool mask [len(rows), keys] of what the plan computes for ``head`` of the first sequence."""
    one = given.bounds()[0]
    position = (rows + given.q_offset - one.start).unsqueeze(1)
    key = torch.arange(given.key.shape[2]) - one.start
    chosen = torch.zeros(len(rows), len(key), dtype=torch.bool)
    if plan.region is not None:
        region = plan.region
        local = (position // region.group_size * region.group_size - region.local).clamp(min=region.init)
        chosen |= (key < region.init) | (key >= local)
    heads = given.query.shape[1]
    if plan.stripes is not None:
        for row, mask in enumerate(chosen):
            mask[
                plan.stripes.keys[
                    _list(plan.stripes, head, heads, int(position[row]), plan.stripes.group_size)
                ].long()
            ] = True
    if plan.blocks is not None:
        block = key.div(plan.blocks.block_k, rounding_mode="floor")
        for row, mask in enumerate(chosen):
            listed = plan.blocks.blocks[
                _list(plan.blocks, head, heads, int(position[row]), plan.blocks.block_q)
            ]
            mask |= torch.isin(block, listed)
    visible = (
        (key >= 0) & (key <= position) & (position >= one.first) & (position < one.end) & (key < one.end)
    )
    return chosen & visible


def _list(index: Any, head: int, heads: int, position: int, size: int) -> slice:
    groups = index.shape[2]
    place = head // (heads // index.shape[1]) * groups + min(max(position, 0) // size, groups - 1)
    return slice(int(index.offsets[place]), int(index.offsets[place + 1]))
