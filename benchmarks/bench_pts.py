"""PTSBench's techniques on a small ResNet and ViT, trained here on scikit-learn's digits: accuracy by technique."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Run, command_line, show
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from pysparse.calib.batches import own_batches
from pysparse.methods import FCPTS, learn_rates, recipe_for
from pysparse.models.discover import discover
from pysparse.pruning import OutputMatching, fold_batch_norm_, match_outputs_, recalibrate_, run

TARGETS = ("Linear", "Conv2d")
ALLOCATIONS = ("uniform", "er", "erk", "global", "l1norm", "l2norm", "lamp", "fcpts")
# The paper takes 20000 steps at a rate of 1e-5 on ImageNet models; these models are small, and so are the steps.
TUNING = {"steps": 100, "weight_lr": 1e-3, "bias_lr": 1e-3}


@dataclass
class Task:
    """A trained model with its data."""

    model: nn.Module
    calibration: list[dict[str, Tensor]]
    images: Tensor  # [N, 1, 16, 16], held out
    labels: Tensor

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        logits = model(pixel_values=self.images).logits
        return float((logits.argmax(dim=1) == self.labels).float().mean())


def digits() -> tuple[Tensor, Tensor]:
    """Return all digits, 16 x 16 and normalised, and their labels, shuffled."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear")
    return images[order], torch.tensor(data.target)[order]


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
            downsample_in_first_stage=False, num_labels=10,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=4, num_channels=1, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=96, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "vit": vit}


def train(name: str, seed: int, epochs: int) -> Task:
    """Train ``name`` on 1200 digits; of these 320 calibrate, the other 597 test."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * 19)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(1200).split(64):
            loss = nn.functional.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    calibration = [{"pixel_values": part} for part in images[:320].split(32)]
    return Task(model.eval(), calibration, images[1200:], labels[1200:])


def pruned(
    task: Task, method: str, allocation: Any, sparsity: float, fold: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Return a pruned copy of the task's model, and the dense one that it came from."""
    dense = copy.deepcopy(task.model)
    if fold:
        fold_batch_norm_(dense, task.calibration[0])
    model = copy.deepcopy(dense)
    layout = discover(model, targets=TARGETS, whole=True)
    if allocation == "fcpts":
        rates = learn_rates(layout, task.calibration, sparsity, FCPTS(epochs=20))
        by_path = [rates[layer.path] for layer in layout.layers]
        allocation = lambda layers, target: by_path  # noqa: E731
    recipe = recipe_for(method, allocation=allocation)
    run(layout, recipe, sparsity, own_batches(task.calibration, None, None))
    return model, dense


def techniques(task: Task, sparsity: float) -> dict[str, float]:
    """Return the accuracy of each technique on one task."""
    found: dict[str, float] = {}
    for allocation in ALLOCATIONS:
        model, _ = pruned(task, "magnitude", allocation, sparsity)
        found[f"allocation {allocation}"] = task.accuracy(model)
    model, _ = pruned(task, "magnitude", "l2norm", sparsity)
    if recalibrate_(model, task.calibration):
        found["l2norm + BN recalibration"] = task.accuracy(model)
    model, dense = pruned(task, "pot", None, sparsity, fold=True)
    found["l2norm + weight and bias correction"] = task.accuracy(model)
    match_outputs_(
        discover(model, targets=TARGETS, whole=True),
        dense,
        task.calibration,
        OutputMatching("op", "dense", **TUNING),
    )
    found["POT (corrections, op-wise, dense input)"] = task.accuracy(model)
    for granularity in ("op", "layer", "block"):
        for inputs in ("dense", "sparse"):
            model, dense = pruned(task, "magnitude", "l2norm", sparsity)
            settings = OutputMatching(granularity, inputs, **TUNING)
            layout = discover(model, targets=TARGETS, whole=granularity != "block")
            match_outputs_(layout, dense, task.calibration, settings)
            found[f"l2norm + {granularity}-wise, {inputs} input"] = task.accuracy(model)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("pts", __doc__ or "")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.8])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=TUNING["steps"], help="of reconstruction, for each unit")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.sparsity, options.seeds, options.epochs = ["resnet"], [0.7], 1, 1
        options.steps = 3
    TUNING["steps"] = options.steps
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    this = Run.start("pts", options)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        tasks = [train(name, seed, options.epochs) for seed in range(options.seeds)]
        dense = [task.accuracy(task.model) for task in tasks]
        for sparsity in options.sparsity:
            every = [techniques(task, sparsity) for task in tasks]
            for technique in every[0]:
                values = [one[technique] for one in every]
                rows.append(
                    {
                        "model": name, "sparsity": sparsity, "technique": technique, "dense_accuracy": dense,
                        "accuracy": values, "median": statistics.median(values),
                    }
                )  # fmt: skip
    protocol = {
        "data": "scikit-learn digits, 16 x 16; 1200 train (320 of them calibrate, without labels), 597 test",
        "seeds": options.seeds,
        "epochs": options.epochs,
        "tuning": dict(TUNING),
        "fcpts": "20 epochs over the calibration batches",
    }
    path = this.save(protocol, rows)
    table = Table("model", "sparsity", "technique", "accuracy, median", "of seeds", "dense")
    for row in rows:
        table.add_row(
            row["model"], f"{row['sparsity']:.0%}", row["technique"], f"{row['median']:.1%}",
            " ".join(f"{value:.1%}" for value in row["accuracy"]),
            f"{statistics.median(row['dense_accuracy']):.1%}",
        )  # fmt: skip
    show(table, path=path)


if __name__ == "__main__":
    main()
