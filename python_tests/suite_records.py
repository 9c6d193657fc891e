"""Records of a run that was never made, as the suite would write them: three tasks, eight models, some 300 cells.

The figures follow rules that the tests know: quality falls with sparsity, "erk" is better than "uniform" by more than
the seeds differ, "owl" is not, reconstruction helps, and "cnn-b" is the hardiest of its task.
"""

import math
import random

from pysparse.suite.cells import Cell, RecipeSpec
from pysparse.suite.records import record_of

RECIPES = {
    "magnitude": RecipeSpec("magnitude", "uniform"),
    "magnitude-erk": RecipeSpec("magnitude", "erk"),
    "wanda": RecipeSpec("wanda", "uniform"),
    "wanda-owl": RecipeSpec("wanda", "owl"),
    "wanda-erk": RecipeSpec("wanda", "erk"),
    "wanda-block": RecipeSpec("wanda", "uniform", "block"),
    "sparsegpt": RecipeSpec("sparsegpt", "uniform"),
}
MODELS = {
    "language": {"demo": ("llama", 1.0)},
    "embedding": {"minilm": ("bert", 0.9)},
    "classification": {
        "cnn-a": ("cnn", 1.0), "cnn-b": ("cnn", 0.45), "cnn-c": ("cnn", 1.1), "vit-a": ("attention", 1.3),
        "vit-b": ("attention", 1.25), "vit-c": ("attention", 1.4),
    },
}  # fmt: skip
METRICS = {
    "language": ("perplexity", 28.7, False),
    "embedding": ("cosine", 1.0, True),
    "classification": ("accuracy", 0.91, True),
}
SETTINGS = (("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5))
SEEDS = (0, 1)
_HARM = {"magnitude": 1.0, "wanda": 0.8, "sparsegpt": 0.5}
_ALLOCATED = {"uniform": 0.0, "erk": 0.08, "owl": 0.0}
ENVIRONMENT = {
    "cpu": "AMD EPYC", "cores": 2, "usable_cores": 2, "memory_bytes": 25276514304, "torch_threads": 2,
    "pysparse_isa": "avx512bf16", "platform": "Linux", "python": "3.11.7", "pysparse_commit": "0123456789abcdef",
    "packages": {"torch": "2.13.0", "transformers": "5.24.0"},
}  # fmt: skip


def records(models=MODELS, seeds=SEEDS, layers=8):
    """Return the records of every cell; one in forty has failed."""
    made = []
    for task, names in models.items():
        for model in names:
            for recipe in RECIPES:
                for pattern, sparsity in SETTINGS:
                    made += [
                        record(task, model, recipe, pattern, sparsity, seed, layers=layers) for seed in seeds
                    ]
    return [failed(one) if index % 40 == 39 else one for index, one in enumerate(made)]


def record(task, model, recipe, pattern="unstructured", sparsity=0.5, seed=0, layers=8, **changes):
    """Return one finished cell; ``changes`` replace what it says."""
    spec = RECIPES[recipe]
    cell = Cell(task, model, recipe, spec, pattern, sparsity, seed, threads=2)
    family, frailty = MODELS.get(task, {}).get(model, ("llama", 1.0))
    draw = random.Random(cell.id)
    return record_of(cell, **{
        "status": "done", "family": family, "achieved_sparsity": sparsity, "layers": _layers(spec, sparsity, layers),
        "quality": _quality(task, spec, pattern, sparsity, frailty, draw), "prune_seconds": draw.uniform(1, 9),
        "peak_memory_bytes": draw.randrange(3 * 10**8, 10**9), "parameters": 5_500_000,
        "file_bytes": {"dense": 11_000_000, "sparse": int(11e6 * (1.06 - sparsity))},
        "speed": _speeds(task, sparsity, draw), "command": cell.command("grids/full.toml"), "environment": ENVIRONMENT,
        "started": f"2026-11-27T10:{draw.randrange(60):02d}:00+00:00", "seconds": draw.uniform(5, 40),
    } | changes)  # fmt: skip


def failed(made, kind="RuntimeError", message="the layer 'stem' has 3 inputs, 2:4 needs a multiple of 4"):
    """Return the record with its findings taken away and an error in their place."""
    kept = ("schema", "id", "task", "model", "family", "recipe", "method", "allocation", "reconstruction", "settings",
            "pattern", "sparsity", "seed", "command", "environment", "started", "seconds")  # fmt: skip
    empty = dict.fromkeys(made)
    return (
        empty
        | {key: made[key] for key in kept}
        | {"status": "failed", "error": {"type": kind, "message": message}}
    )


def _quality(task, spec, pattern, sparsity, frailty, draw):
    metric, dense, higher = METRICS[task]
    harm = _HARM[spec.method] * frailty * (sparsity**3 + (0.05 if pattern != "unstructured" else 0))
    harm *= 1 - (0.3 if spec.reconstruction else 0) - _ALLOCATED[spec.allocation] * 4
    harm *= 1 + draw.gauss(0, 0.02)
    value = dense * (1 - min(harm, 0.95)) if higher else dense / (1 - min(harm, 0.95))
    return {
        "metric": metric,
        "value": value,
        "dense": dense,
        "higher_is_better": higher,
        "others": {"loss": harm},
    }


def _layers(spec, sparsity, count):
    def rate(index):
        lean = {"uniform": 0.0, "erk": 0.12, "owl": 0.06}[spec.allocation]
        return min(0.99, max(0.0, sparsity + lean * math.sin(3.1 * index / max(1, count - 1) - 1.5)))

    names = ("attention.query", "attention.output", "mlp.up", "mlp.down")
    return [
        {
            "name": f"blocks.{i // 4}.{names[i % 4]}",
            "shape": [256, 256 if i % 4 < 3 else 1024],
            "sparsity": rate(i),
        }
        for i in range(count)
    ]


def _speeds(task, sparsity, draw):
    workloads = {
        "language": (("decode", "tokens/s", 64), ("prefill", "tokens/s", 64)),
        "embedding": (("sentences", "sentences/s", 32),),
        "classification": (("images", "images/s", None),),
    }[task]
    found = []
    for name, unit, tokens in workloads:
        ratio = (1.0 if name == "prefill" else 1.6) * (0.5 + sparsity) * draw.uniform(0.97, 1.03)
        found.append(
            {"name": name, "unit": unit, "batch": 1, "tokens": tokens, "dense": 40.0, "sparse": 40.0 * ratio,
             "ratio": ratio, "ratio_p10": ratio * 0.96, "ratio_p90": ratio * 1.05}
        )  # fmt: skip
    return found
