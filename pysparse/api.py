"""The public calls: prune, evaluate, benchmark, report, doctor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from pysparse import data, huggingface, methods
from pysparse.calib import Calibration, load_calibration, load_texts
from pysparse.huggingface.folder import is_ours
from pysparse.huggingface.saving import FORMATS
from pysparse.measure.agreement import Agreement
from pysparse.measure.comparison import (
    KERNEL_DENSE,
    SPARSE,
    TORCH_DENSE,
    BenchResult,
    BenchSettings,
    compare_speed,
)
from pysparse.measure.doctor import doctor
from pysparse.measure.kernels import KernelInfo, kernel_info
from pysparse.measure.memory import available_bytes
from pysparse.measure.perplexity import Perplexity
from pysparse.measure.progress import progress_on_stderr
from pysparse.measure.quality import score_models
from pysparse.measure.report import Report, report
from pysparse.measure.results import dumps, make_table, to_jsonable, write_json
from pysparse.measure.rounds import torch_threads
from pysparse.measure.twins import (
    dense_kernel_twin,
    dense_twin,
    is_packed,
    linear_layers,
    sparse_twin,
    zero_at_random_,
)
from pysparse.measure.windows import choose_window, max_positions, text_windows
from pysparse.models.discover import discover
from pysparse.models.named_shapes import RANDOM_WEIGHTS, named_shape, plan_blocks, random_model
from pysparse.models.skeleton import skeleton
from pysparse.models.sources import check_source, find_tokenizer, load_tokenizer
from pysparse.pruning import (
    BlockEvent,
    PrunePlan,
    PruneReport,
    Recipe,
    check_sparsity,
    plan,
    resolve_sparsity,
    run,
)
from pysparse.pruning.run import Propagate

__all__ = [
    "BenchResult",
    "BenchSettings",
    "Evaluation",
    "KernelInfo",
    "PruneResult",
    "Report",
    "benchmark",
    "benchmark_shape",
    "doctor",
    "evaluate",
    "kernel_info",
    "load_model",
    "plan_prune",
    "prune",
    "report",
]

_LONGEST = 1 << 30  # tokens, of a tokenizer that names no limit
Texts = Sequence[str] | Iterable[str] | str | Path
_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.08,
    torch.float16: 0.02,
}  # of the largest logit, whole model


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What :func:`prune` returns."""

    model: nn.Module  # masked: pruned weights are zeros in ordinary dense layers
    report: PruneReport


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality of a model, beside its dense reference when one was given."""

    perplexity: Perplexity
    reference: Perplexity | None = None
    agreement: Agreement | None = None  # with the reference

    def table(self) -> Table:
        """Return a rich table, the dense reference first."""
        columns = ("", "perplexity", "bits/byte", "top-1 agreement", "KL nats", "max logit error")
        rows: list[tuple[Any, ...]] = []
        if self.reference is not None:
            rows.append(("dense", self.reference.value, self.reference.bits_per_byte, 1.0, 0.0, 0.0))
        same = self.agreement
        rows.append((
            "model", self.perplexity.value, self.perplexity.bits_per_byte,
            *((same.top1, same.kl, same.max_logit_error) if same else (None, None, None)),
        ))  # fmt: skip
        protocol = self.perplexity.protocol
        caption = (
            f"{self.perplexity.tokens} tokens in {protocol['windows']} windows of {protocol['window']}, "
            f"stride {protocol['stride']}, {protocol['window_choice']}"
        )
        return make_table("quality", columns, rows, caption=caption)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        result: dict[str, Any] = to_jsonable(self)
        return result

    def to_json(self, path: str | Path | None = None) -> str:
        """Return JSON text, and write it to ``path`` when given."""
        if path is not None:
            write_json(path, self.to_dict())
        return dumps(self.to_dict())

    def __rich__(self) -> Table:
        return self.table()


def prune(
    model_or_path: nn.Module | str | Path,
    sparsity: float | None = None,
    method: str = "wanda",
    pattern: str | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    *,
    num_samples: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    allocation: str = "uniform",
    recipe: Recipe | str | Path | None = None,
    propagate: Propagate = "pruned",
    output_dir: str | Path | None = None,
    save_format: str = "pysparse",
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[BlockEvent], None]] | None = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
) -> PruneResult:
    """Zero the least important weights of a model; a model object is pruned IN PLACE and returned.

    Args:
        model_or_path: a model, or the folder (or hub name) of one, which is then loaded.
        sparsity: fraction of zeros in [0, 1) in every pruned matrix; None is 0.5, or what ``pattern`` implies.
        method: a name of ``pysparse.methods.METHODS``: "wanda" (calibrated) or "magnitude".
        pattern: None or "unstructured", or "n:m": n KEPT of every m consecutive inputs, e.g. "2:4".
        calibration: texts (a list, or a .txt, .json or .jsonl file) or batches of tokens (tensors, dicts with
            ``input_ids``, a DataLoader). None takes the bundled text, and the report says so; a method that
            needs no data runs no forward pass at all.
        tokenizer: for texts; defaults to the one saved beside the model. Saved with the result.
        num_samples: calibration sequences, default 128; also spelled ``num_calibration_samples``.
        max_length: tokens a sequence, default the smaller of 2048 and the model's positions; also spelled
            ``max_seq_length``.
        batch_size: sequences in a forward pass, for texts and tensors; DataLoaders bring their own.
        targets, ignore: class names, module paths or "re:" expressions, see ``pysparse.models.discover``.
        allocation: how sparsity is spread over layers, a name of ``pysparse.methods.ALLOCATIONS``.
        recipe: a :class:`pysparse.pruning.Recipe` or a YAML file, in place of method, pattern and allocation.
        propagate: "pruned" calibrates a block on outputs of the pruned blocks before it, "dense" on dense ones.
        output_dir: folder to save the model in, with tokenizer, ``recipe.yaml`` and ``prune_report.json``.
        save_format: "pysparse" (packed), "dense" or "compressed-tensors".
        seed: of the calibration windows.
        threads: torch threads while pruning; None leaves them alone.
        progress: show blocks done and time left on stderr.
        callbacks: called with a :class:`pysparse.pruning.BlockEvent` after each block.

    Returns the model and a report with the exact count of every layer. Everything is checked before a weight
    is touched. Raises ValueError for a wrong sparsity, an unknown name, contradicting arguments, a model
    without linear layers, missing or empty calibration data, activations that are not finite.
    """
    samples = _one_of("num_samples", num_samples, "num_calibration_samples", num_calibration_samples)
    length = _one_of("max_length", max_length, "max_seq_length", max_seq_length)
    chosen = _recipe(recipe, method, pattern, allocation)
    resolve_sparsity(chosen.structure, sparsity)
    saved_recipe = None if output_dir is None else _check_output(output_dir, save_format, chosen)
    model = load_model(model_or_path, format="dense")
    if output_dir is not None and not isinstance(model, PreTrainedModel):
        raise ValueError(f"output_dir needs a transformers model, got {type(model).__name__}: leave it out")
    layout = discover(model, targets, ignore)
    found = _find_tokenizer(model_or_path, model, tokenizer)
    data_in = None
    if chosen.needs_calibration:
        data_in = _calibration(calibration, model, found, samples, length, batch_size, seed)
    with torch_threads(threads), progress_on_stderr(progress) as advance:
        advance("pruning blocks", 0, len(layout.blocks))
        report = run(
            layout, chosen, sparsity, data_in, propagate=propagate, seed=seed,
            callbacks=(lambda event: advance("pruning blocks", event.index + 1, event.total), *(callbacks or ())),
        )  # fmt: skip
    if calibration is not None and data_in is None:
        report = report.with_warnings(["calibration was given, but this method needs none: not used"])
    if output_dir is not None and saved_recipe is not None:
        files = {"recipe.yaml": saved_recipe, "prune_report.json": report.to_json() + "\n"}
        huggingface.save_pretrained(model, output_dir, format=save_format, tokenizer=found, extra_files=files)
    return PruneResult(model, report)


def plan_prune(
    model_or_path: nn.Module | str | Path,
    sparsity: float | None = None,
    method: str = "wanda",
    pattern: str | None = None,
    *,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    allocation: str = "uniform",
    recipe: Recipe | str | Path | None = None,
) -> PrunePlan:
    """Return what :func:`prune` would do with these arguments: layers, budgets, exact counts, predicted bytes.

    Touches nothing; of a folder only ``config.json`` is read. Raises as :func:`prune` does.
    """
    chosen = _recipe(recipe, method, pattern, allocation)
    resolve_sparsity(chosen.structure, sparsity)
    model = model_or_path if isinstance(model_or_path, nn.Module) else skeleton(model_or_path)
    return plan(discover(model, targets, ignore), chosen, sparsity)


def evaluate(
    model_or_path: nn.Module | str | Path,
    tokenizer: Any = None,
    texts: Texts | None = None,
    *,
    reference: nn.Module | str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    max_windows: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure perplexity and bits per byte; with a ``reference`` (the dense model) both models' and agreement.

    ``texts`` is a list of strings, or a .txt, .json or .jsonl file; None takes the bundled held-out text.
    ``tokenizer`` defaults to the one saved beside the model. The protocol (window, stride, tokens, bytes,
    seed, ...) is part of the result; see :func:`pysparse.measure.perplexity`. Raises ValueError for a window
    longer than the model, or for less text than one window.
    """
    model = load_model(model_or_path)
    tokenizer = _tokenizer_for(model_or_path, model, tokenizer)
    documents = _texts(texts)
    windows = text_windows(
        tokenizer, documents, choose_window(model, window), stride, max_windows=max_windows, seed=seed
    )
    models = {"model": model} if reference is None else {"dense": load_model(reference), "model": model}
    with torch_threads(threads), progress_on_stderr(progress) as advance:
        scores = score_models(
            models, windows, batch_size, lambda done, total: advance("evaluate", done, total)
        )
        figures = {name: Perplexity.from_score(scores[name], windows, models[name]) for name in models}
    same = None if reference is None else Agreement.from_score(scores["model"])
    return Evaluation(figures["model"], figures.get("dense"), same)


def benchmark(
    model_or_path: nn.Module | str | Path,
    dense: nn.Module | str | Path | None = None,
    prompt_len: int = 64,
    new_tokens: int = 32,
    batch_size: int = 1,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    rounds: int = 5,
    warmup: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> BenchResult:
    """Time a sparse model against dense ones, interleaved in this process, at one dtype and thread count.

    Engines: torch's dense layers (``dense``, or the same weights unpacked when it is None), the compiled
    dense kernel on the same weights, and the packed sparse layers. A model that is not packed yet is packed
    in a copy; ValueError when no layer has enough zeros. Where ``dense`` is derived, the outputs must agree
    (RuntimeError otherwise). ``dtype`` converts models that are loaded from a path.
    """
    settings = BenchSettings(prompt_len, new_tokens, batch_size, rounds, warmup, threads, seed)
    model = load_model(model_or_path, dtype)
    _require_linears(model)
    notes: tuple[str, ...] = ()
    if is_packed(model):
        baseline = dense_twin(model) if dense is None else load_model(dense, dtype, format="dense")
        sparse = model
    else:
        baseline = model if dense is None else load_model(dense, dtype, format="dense")
        sparse = sparse_twin(model)
        notes = ("the model came unpacked; its zeros were packed in a copy",)
    return _compare(baseline, sparse, settings, notes=notes, same=dense is None, progress=progress)


def benchmark_shape(
    shape: str = "llama-2-7b",
    sparsity: float = 0.7,
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    settings: BenchSettings | None = None,
    *,
    progress: bool = False,
) -> BenchResult:
    """Time a published architecture with random weights, dense against sparse, through ``generate()``.

    ``blocks`` of its blocks are built; None takes as many as memory holds dense and sparse together (a
    quarter of the available memory is left alone), at most the model's own number. The zeros are random and
    unstructured. Raises ValueError for an unknown shape, a sparsity outside [0, 1) or too little memory.
    """
    check_sparsity(sparsity)
    known, settings = named_shape(shape), settings or BenchSettings()
    blocks = plan_blocks(known, dtype, sparsity, available_bytes()) if blocks is None else blocks
    with torch_threads(settings.threads), progress_on_stderr(progress) as advance:
        advance(f"building {blocks} blocks of {shape}", 0, 3)
        dense = random_model(shape, blocks, dtype, settings.seed)
        advance(f"building {blocks} blocks of {shape}", 1, 3)
        zero_at_random_(dense, sparsity, settings.seed)
        advance(f"building {blocks} blocks of {shape}", 2, 3)
        sparse = sparse_twin(dense)
        advance(f"building {blocks} blocks of {shape}", 3, 3)
    return _compare(
        dense, sparse, settings,
        title=f"{shape}: {blocks} of {known.blocks} blocks, {sparsity:.0%} random zeros, RANDOM WEIGHTS (speed only)",
        weights=RANDOM_WEIGHTS, progress=progress,
    )  # fmt: skip


def _compare(
    dense: nn.Module,
    sparse: nn.Module,
    settings: BenchSettings,
    *,
    title: str = "dense and sparse, interleaved in one process",
    weights: str = "the model's own",
    notes: tuple[str, ...] = (),
    same: bool = True,
    progress: bool = False,
) -> BenchResult:
    engines = {TORCH_DENSE: dense, KERNEL_DENSE: dense_kernel_twin(dense), SPARSE: sparse}
    with progress_on_stderr(progress) as advance:
        result = compare_speed(engines, settings, title=title, weights=weights, notes=notes, on_round=advance)
    if same:
        _require_same_outputs(result, getattr(dense, "dtype", torch.float32))
    return result


def _require_same_outputs(result: BenchResult, dtype: torch.dtype) -> None:
    """A benchmark of a wrong answer is worth nothing: compare the engines' outputs with torch's."""
    for name, difference in result.difference.items():
        bound = _TOLERANCE.get(dtype, 0.0) * difference["max_value"]
        if not difference["max_difference"] <= bound:
            raise RuntimeError(
                f"{name} differs from {TORCH_DENSE} by {difference['max_difference']:.3g} on the same weights, "
                f"over the bound {bound:.3g} for {dtype}: please report this with the output of 'pysparse doctor'"
            )


def _one_of(name: str, value: int | None, alias: str, other: int | None) -> int | None:
    """Return what was given under either name; ValueError when both were and they differ."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name}={value} and {alias}={other} are two names of one thing: pass one of them")
    return other if value is None else value


def _recipe(recipe: Recipe | str | Path | None, method: str, pattern: str | None, allocation: str) -> Recipe:
    if recipe is None:
        return methods.recipe_for(method, pattern, allocation)
    for name, value, default in (("method", method, "wanda"), ("pattern", pattern, None),
                                 ("allocation", allocation, "uniform")):  # fmt: skip
        if value != default:
            raise ValueError(f"{name}={value!r} is part of the recipe that was given too: pass one of them")
    return methods.load_recipe(recipe) if isinstance(recipe, str | Path) else recipe


def _check_output(output_dir: str | Path, save_format: str, recipe: Recipe) -> str:
    """Return the recipe as YAML; an error now when the result could not be saved after the work is done."""
    if save_format not in FORMATS:
        raise ValueError(f"save_format is one of {', '.join(FORMATS)}, got '{save_format}'")
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir={output_dir} is a file; pass a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise FileExistsError(
            f"output_dir={output_dir} is neither empty nor a model that pysparse saved: choose another folder"
        )
    return methods.recipe_to_yaml(recipe)


def _calibration(
    source: Any,
    model: nn.Module,
    tokenizer: Any,
    num_samples: int | None,
    max_length: int | None,
    batch_size: int,
    seed: int,
) -> Calibration:
    limits = (choose_window(model, None), int(getattr(tokenizer, "model_max_length", _LONGEST)))
    found = load_calibration(
        data.calibration_texts() if source is None else source, tokenizer,
        num_samples=num_samples, max_length=max_length, batch_size=batch_size, seed=seed,
        default_length=min(limits),
    )  # fmt: skip
    if source is None:
        found = dataclasses.replace(
            found, source=f"the bundled text ({found.source}), as no calibration was given"
        )
    return found.check_positions(max_positions(model))


def load_model(
    source: nn.Module | str | Path, dtype: torch.dtype | None = None, format: str = "sparse"
) -> nn.Module:
    """Return ``source`` itself if it is a model, else load it from its folder or hub name.

    ``format`` "sparse" keeps packed layers packed, "dense" unpacks them. Raises FileNotFoundError for a folder
    that holds no model, ValueError when a model object does not have the ``dtype`` asked for.
    """
    if not isinstance(source, nn.Module):
        options = {} if dtype is None else {"dtype": dtype}
        return huggingface.from_pretrained(check_source(source), format=format, **options)
    have = getattr(source, "dtype", None)
    if dtype is not None and have != dtype:
        raise ValueError(
            f"the model is {have}, not the dtype={dtype} asked for: convert it with model.to({dtype})"
        )
    return source


def _tokenizer_for(source: nn.Module | str | Path, model: nn.Module, tokenizer: Any) -> Any:
    found = _find_tokenizer(source, model, tokenizer)
    if found is None:
        raise ValueError("texts need a tokenizer and none is saved beside this model; pass tokenizer=...")
    return found


def _find_tokenizer(source: nn.Module | str | Path, model: nn.Module, tokenizer: Any) -> Any | None:
    """Return the tokenizer that was given, or is saved beside the model, or None."""
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return tokenizer
    if isinstance(source, nn.Module):
        return find_tokenizer(model)
    try:
        return load_tokenizer(source)
    except FileNotFoundError:
        return None


def _texts(source: Texts | None) -> list[str]:
    return load_texts(data.held_out_texts() if source is None else source)


def _require_linears(model: nn.Module) -> None:
    if not linear_layers(model):
        raise ValueError(f"{type(model).__name__} has no Linear layers: there is nothing to prune")
