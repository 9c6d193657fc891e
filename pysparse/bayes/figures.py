"""Pictures of a deblurring experiment and its sweeps, written as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pysparse.bayes.deblur import Experiment, Restored
from pysparse.bayes.extras import extra


def _canvas(rows: int, cols: int) -> tuple[Any, Any]:
    """A figure without a screen, and its axes as a matrix."""
    figure = extra("matplotlib.figure").Figure(figsize=(2.6 * cols, 2.7 * rows), layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False)


def draw_images(experiment: Experiment, found: Sequence[Restored], path: Path) -> Path:
    """Draw truth and observation, then each method's image, error and support; return ``path``."""
    figure, axes = _canvas(3, len(found) + 1)
    for ax in axes.flat:
        ax.set_axis_off()
    axes[0, 0].imshow(experiment.truth, cmap="gray", vmin=0, vmax=1)
    axes[0, 0].set_title("truth")
    axes[1, 0].imshow(experiment.observed, cmap="gray", vmin=0, vmax=1)
    axes[1, 0].set_title(f"{experiment.setup.psf}, noise {experiment.setup.noise:g}")
    scale = max(float(np.abs(one.image - experiment.truth).max()) for one in found)
    for place, one in enumerate(found, start=1):
        axes[0, place].imshow(one.image, cmap="gray", vmin=0, vmax=1)
        axes[0, place].set_title(f"{one.method}\n{one.psnr:.1f} dB")
        axes[1, place].imshow(np.abs(one.image - experiment.truth), cmap="magma", vmin=0, vmax=scale)
        axes[1, place].set_title("error")
        if one.solution is not None:
            axes[2, place].imshow(one.solution.support.reshape(experiment.truth.shape), cmap="gray")
            axes[2, place].set_title(f"support: {one.nonzeros}")
    figure.savefig(path, dpi=110)
    return path


def draw_convergence(found: Sequence[Restored], path: Path) -> Path:
    """Draw relative error and change of gamma over the iterations; return ``path``."""
    figure, axes = _canvas(1, 2)
    figure.set_size_inches(9, 3.5)
    for one in found:
        if one.solution is not None:
            axes[0, 0].plot(one.errors, label=one.method)
            axes[0, 1].semilogy(one.solution.changes, label=one.method)
    axes[0, 0].set(xlabel="iteration", ylabel="relative error")
    axes[0, 1].set(xlabel="iteration", ylabel="relative change of gamma")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    return path


def draw_sweep(records: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw relative error and non-zeros over the swept value, with the spread over seeds; return ``path``."""
    figure, axes = _canvas(1, 2)
    figure.set_size_inches(9, 3.5)
    for method in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == method]
        values = sorted({record["value"] for record in mine})
        for ax, name in ((axes[0, 0], "relative_error"), (axes[0, 1], "nonzeros")):
            groups = [
                [r[name] for r in mine if r["value"] == value and r[name] is not None] for value in values
            ]
            if all(groups):
                mean = [float(np.mean(group)) for group in groups]
                spread = [float(np.std(group)) for group in groups]
                ax.errorbar(values, mean, spread, marker="o", capsize=3, label=method)
                ax.set(xlabel=records[0]["axis"], ylabel=name.replace("_", " "), xscale="log", yscale="log")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path
