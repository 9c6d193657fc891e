"""``pysparse embed``: train a small click model, score its table, prune to several budgets, report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pysparse.cli.options import Debug, Json, Plot, Seed, Threads
from pysparse.cli.output import emit, guarded, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysparse.calib.clicks import Clicks
    from pysparse.calib.clicks_files import ClickLog
    from pysparse.methods.shaver_study import Study
    from pysparse.nn.ctr import CtrModel


class Kind(StrEnum):
    """Models by the names people type."""

    fm = "fm"
    deepfm = "deepfm"
    dcn_v2 = "dcn-v2"
    dcn_mix = "dcn-mix"


def embed(
    source: Annotated[
        str,
        typer.Argument(
            help="fair, randhie, digits, synthetic, a Criteo .tsv or a .parquet file with 'click'."
        ),
    ],
    kind: Annotated[Kind, typer.Option("--model", help="The click model.")] = Kind.fm,
    dims: Annotated[int, typer.Option(min=1, help="Columns of the table.")] = 8,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Fraction of entries to prune; repeat. [default: 0.5 0.8 0.95]")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Passes of Shaver over the training data.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Most epochs of training.")] = 15,
    learning_rate: Annotated[float, typer.Option(help="Of the training.")] = 3e-3,
    samples: Annotated[int, typer.Option(min=100, help="Most samples to read or draw.")] = 100_000,
    dry_run: Annotated[bool, typer.Option(help="Print the plan of evaluations and stop.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for Shaver's packed tables.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits of a value in these files: 4, 8 or 16. [default: float32]")
    ] = None,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
    debug: Debug = False,
) -> None:
    """Prune an embedding table by Shapley values (Shaver) and by every baseline; AUC, log loss, size, lookup time."""
    with guarded(debug):
        from pysparse.measure.rounds import torch_threads
        from pysparse.methods.ctr_training import CtrTraining
        from pysparse.methods.shaver import Shaver
        from pysparse.methods.shaver_study import all_scorers, draw_study, study, trained_model
        from pysparse.nn.ctr import CtrConfig

        budgets = sorted(set(sparsity or (0.5, 0.8, 0.95)))
        if not 0.0 <= budgets[0] <= budgets[-1] <= 1.0:
            raise ValueError(f"sparsities are in [0, 1], got {budgets}")
        if bits not in (None, 4, 8, 16):
            raise ValueError(f"bits is 4, 8 or 16, got {bits}")
        training = CtrTraining(epochs, 512, learning_rate, patience=2, seed=seed)
        parts = _load(source, samples, seed).split(0.7, 0.1, seed=seed)
        scorers, count = all_scorers(passes, seed), len(parts[0].ids)
        forms = {
            name: one.evaluations(parts[0], dims) for name, one in scorers.items() if isinstance(one, Shaver)
        }
        plan = sum(forms.values())
        say(f"Shaver: {count} samples, {plan} evaluations of the {kind.value} head in {len(forms)} forms")
        if dry_run:
            emit("", json, {"evaluations": plan, "samples": count, "forms": forms})
            return
        config = CtrConfig(kind.value, parts[0].field_sizes, dims)
        with torch_threads(threads or _torch_threads()):
            model, seconds = trained_model(config, parts[0], parts[1], training, say)
            found = study(model, seconds, parts, scorers, budgets, say)
            content = {"source": source, "model": kind.value, "evaluations": plan, **found.record()}
            shaver = Shaver(passes=passes, seed=seed)
            content["lookup"] = _lookups(model, parts, shaver, budgets, (output, bits))
        emit(_table(source, found, content["lookup"]), json, content)
        if plot is not None:
            say(f"wrote {draw_study(found, plot)}")


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _load(source: str, samples: int, seed: int) -> Clicks:
    import numpy as np

    from pysparse.calib import clicks, clicks_files
    from pysparse.calib.clicks_synthetic import SyntheticClicks, SyntheticSpec

    if source == "synthetic":
        return SyntheticClicks(SyntheticSpec(seed=seed)).draw(samples)
    if not Path(source).suffix:
        return _at_most(clicks.load_clicks(source), samples, seed)
    readers: dict[str, Callable[[str], ClickLog]] = {
        ".parquet": clicks_files.parquet,
        ".tsv": clicks_files.criteo,
        ".txt": clicks_files.criteo,
    }
    if Path(source).suffix not in readers:
        raise ValueError(f"logs are {', '.join(readers)} files, got {source}")
    log = readers[Path(source).suffix](source)
    vocabulary = clicks_files.count_values(log)
    pieces: list[Clicks] = []
    for piece in clicks_files.read_clicks(log, vocabulary):
        pieces.append(piece)
        if sum(len(one.ids) for one in pieces) >= samples:
            break
    ids, labels = (
        np.concatenate([getattr(one, name) for one in pieces])[:samples] for name in ("ids", "labels")
    )
    return clicks.Clicks(ids, labels, vocabulary.field_sizes, log.fields)


def _at_most(clicks: Clicks, samples: int, seed: int) -> Clicks:
    """Return ``samples`` drawn without repetition where there are more: bundled data lie sorted."""
    import numpy as np

    if len(clicks.ids) <= samples:
        return clicks
    return clicks.take(np.sort(np.random.default_rng(seed).permutation(len(clicks.ids))[:samples]))


def _lookups(
    model: CtrModel, parts: Any, scorer: Any, budgets: list[float], files: tuple[Path | None, int | None]
) -> list[dict[str, Any]]:
    """Time dense and packed lookups of the test samples, one after the other in each round; save the tables."""
    import time
    from statistics import median

    import torch

    from pysparse.methods.shaver import prune_embedding

    scores, ids, rows = scorer(model, parts[0]), torch.from_numpy(parts[-1].ids), []
    for budget in budgets:
        packed = prune_embedding(model, scores, budget).embedding
        seconds: dict[str, list[float]] = {"dense": [], "packed": []}
        with torch.inference_mode():
            for _ in range(20):
                for name, module in (("dense", model.embedding), ("packed", packed)):
                    begin = time.perf_counter()
                    module(ids)
                    seconds[name].append(time.perf_counter() - begin)
        times = {f"{name}_microseconds": 1e6 * median(found) for name, found in seconds.items()}
        rows.append({"sparsity": budget, "ids": ids.numel(), **times})
        if files[0] is not None:
            _save(packed, files[0] / f"table-{budget:g}.safetensors", files[1])
    return rows


def _save(packed: Any, path: Path, bits: int | None) -> None:
    from pysparse.methods.shaver_bits import save_affine

    path.parent.mkdir(parents=True, exist_ok=True)
    if bits is None:
        packed.save(path)
    else:
        save_affine(path, packed, bits)
    say(f"wrote {path} ({path.stat().st_size} bytes)")


def _table(source: str, found: Study, lookups: list[dict[str, Any]]) -> Any:
    from pysparse.measure.results import make_table

    lookup = {row["sparsity"]: row["packed_microseconds"] / row["dense_microseconds"] for row in lookups}
    lines: list[list[Any]] = [
        [
            "dense",
            "0%",
            f"{found.dense.auc:.4f}",
            f"{found.dense.log_loss:.4f}",
            found.dense_bytes,
            "1.00x",
            None,
        ]
    ]
    for row in found.rows:
        lines.append(
            [
                row["scores"], f"{row['sparsity']:.0%}", f"{row['auc']:.4f}", f"{row['log_loss']:.4f}",
                row["bytes"], f"{lookup[row['sparsity']]:.2f}x", f"{row['score_seconds']:.2f}",
            ]
        )  # fmt: skip
    columns = ["scores", "sparsity", "AUC", "log loss", "table bytes", "lookup time", "seconds to score"]
    return make_table(f"{source}: trained in {found.train_seconds:.1f} s", columns, lines)
