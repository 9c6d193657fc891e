"""Run by torchrun in test_parallel.py: prunes tiny models in every process and leaves what each of them has."""

import sys
from pathlib import Path

import tiny_models
import torch
import torch.distributed as dist

from pysparse import api
from pysparse.calib import load_calibration
from pysparse.calib.ranks import joined
from pysparse.methods import METHODS, recipe_for
from pysparse.models.discover import discover
from pysparse.pruning import run

# name -> (model, recipe, batches of how many sequences)
CASES = {
    "wanda": ("llama", METHODS["wanda"], 2),
    "matrix": ("llama", recipe_for("sparsegpt"), 2),
    "experts": ("mixtral", METHODS["wanda"], 3),
    "owl": ("qwen2", recipe_for("wanda", allocation="owl"), 5),
    "one-batch": ("gpt2", METHODS["wanda"], 7),  # fewer batches than processes: the second has none
}


def pruned(case):
    """Return the model of one case after pruning, and the report."""
    name, recipe, batch_size = CASES[case]
    model = tiny_models.tiny(name, torch.bfloat16)
    report = run(
        discover(model), recipe, 0.5, load_calibration(tiny_models.tokens(7, 12), batch_size=batch_size)
    )
    return model, report


def damaged():
    """Return the error of a model that only one process finds wanting."""
    model = tiny_models.tiny("llama")
    rows = tiny_models.tokens(4, 6)
    rows[rows == 9] = 8
    rows[2, 1] = 9  # of the second process alone
    model.model.embed_tokens.weight.data[9] = float("inf")
    try:
        run(discover(model), METHODS["wanda"], 0.5, load_calibration(rows, batch_size=2))
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder):
    torch.set_num_threads(1)
    with joined() as ranks:
        assert ranks.count == 2
        assert dist.get_backend() == "gloo"
        for case in CASES:
            model, report = pruned(case)
            state = {"weights": model.state_dict(), "zeros": [one.zeros for one in report.layers]}
            torch.save(state, folder / f"{case}.{ranks.index}.pt")
        (folder / f"error.{ranks.index}").write_text(damaged())
        api.prune(
            tiny_models.tiny("llama"), 0.5, calibration=tiny_models.tokens(7, 12), batch_size=2,
            output_dir=folder / "saved", save_format="dense", progress=True,
        )  # fmt: skip
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
