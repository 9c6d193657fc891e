"""The call that trains a sparse model under its mask: LoSA, masked LoRA, masked full fine-tuning."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from pysparse import data, huggingface
from pysparse.api.adapt_progress import AdaptProgress, kept_after_error
from pysparse.api.loading import Texts, Windows, calibration_for, load_model, tokenizer_for
from pysparse.calib import Calibration, load_texts, token_batches
from pysparse.huggingface.adapters import check_lora, require_peft, save_adapter
from pysparse.huggingface.folder import check_replaceable
from pysparse.huggingface.saving import FORMATS
from pysparse.measure.progress import Advance, progress_on_stderr
from pysparse.measure.results import Chart, make_table, save_plot, to_jsonable
from pysparse.measure.rounds import torch_threads
from pysparse.measure.windows import choose_window
from pysparse.methods import recipe_for
from pysparse.methods.adaptation import (
    ADAPTATIONS,
    Adaptation,
    Round,
    Schedule,
    Trained,
    check_adapter,
    check_training,
    mean_of_last,
)  # fmt: skip
from pysparse.methods.attach import Attached, float32_master, restored_after_error
from pysparse.methods.losa import LoSA
from pysparse.models.discover import discover
from pysparse.pruning import BlockLayout, check_sparsity, resolve_sparsity

if TYPE_CHECKING:
    from peft import LoraConfig

_LOGGER = logging.getLogger("pysparse")
LAST_SHARE = (
    0.6  # of the training text is for LoSA's last round: about what the paper's six of ten thousand rows are
)


@dataclass(frozen=True, slots=True)
class AdaptReport:
    """What an adaptation did, round by round."""

    method: str
    rounds: tuple[Round, ...]
    layers: int
    training_tokens: int  # in the texts' windows; epochs repeat them

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the adapted layers at the end."""
        return self.rounds[-1].sparsity

    def table(self) -> Table:
        """Return a rich table, one line a round."""
        rows = [
            (
                f"{one.index} of {one.total}", f"{one.target:.4f}", f"{one.sparsity:.4f}",
                ", ".join(map(str, one.ranks)) or "all kept weights", one.trained.steps,
                f"{one.trained.first_loss:.4f}", f"{one.trained.last_loss:.4f}", f"{one.seconds:.0f}",
            )
            for one in self.rounds
        ]  # fmt: skip
        columns = (
            "round",
            "target",
            "sparsity",
            "rank of the blocks",
            "steps",
            "first loss",
            "last loss",
            "s",
        )
        return make_table(f"{self.method}: {self.layers} layers", columns, rows)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Nothing goes otherwise than asked: what cannot be done is an error."""
        return ()

    def plot(self, path: str | Path) -> Path:
        """Draw loss and sparsity by round; RuntimeError without matplotlib."""
        numbers = [one.index for one in self.rounds]
        losses = {"first step": [one.trained.first_loss for one in self.rounds],
                  "last steps": [one.trained.last_loss for one in self.rounds]}  # fmt: skip
        charts = [
            Chart(
                "loss", "round", "nats per token", {name: (numbers, found) for name, found in losses.items()}
            ),
            Chart(
                "sparsity",
                "round",
                "fraction",
                {"": (numbers, [one.sparsity for one in self.rounds])},
                bars=True,
            ),
        ]
        return save_plot(path, charts, caption=self.method)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {"sparsity": self.sparsity, **to_jsonable(self)}

    def __rich__(self) -> Table:
        return self.table()


@dataclass(frozen=True, slots=True)
class AdaptResult:
    """What :func:`adapt` returns."""

    model: nn.Module  # merged: ordinary layers with zeros
    report: AdaptReport


def adapt(
    model_or_path: nn.Module | str | Path,
    sparsity: float | None = None,
    method: str = "losa",
    host: str = "wanda",
    pattern: str | None = None,
    texts: Texts | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    *,
    lora: LoraConfig | None = None,
    losa: LoSA | None = None,
    training: Mapping[str, Any] | None = None,
    num_samples: int | None = None,
    max_length: int | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    output_dir: str | Path | None = None,
    adapter_dir: str | Path | None = None,
    save_format: str = "pysparse",
    resume: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: bool = True,
) -> AdaptResult:
    """Train a sparse language model under its mask and merge; a model object is adapted IN PLACE and returned.

    "losa" prunes and trains in rounds on a cubic ramp: sparsities of the blocks by how alike their inputs are,
    ranks by how much their outputs suffered (:class:`pysparse.methods.LoSA`). "masked-lora" prunes once and trains an
    adapter of one rank in every layer, "masked-full" all kept weights. In each the trained part is cut by the
    mask while it is trained, so that merging loses nothing and no zero comes back. Parameters are trained as
    float32, whatever the model's dtype; ``training={"bf16": True}`` computes in bfloat16.

    Args:
        model_or_path: a causal language model of transformers, or the folder or hub name of one.
        sparsity: fraction of zeros in the end. None: "masked-lora" and "masked-full" take the zeros that the
            model has, e.g. those of :func:`pysparse.prune`, and prune nothing.
        method: "losa", "masked-lora" or "masked-full".
        host: the method that prunes, a name of ``pysparse.methods.METHODS``: "wanda", "sparsegpt", ...
        pattern: of the zeros, "n:m" with n KEPT, for "masked-lora" and "masked-full".
        texts: what is trained on: a list, or a .txt, .json or .jsonl file. None: the bundled calibration text.
        calibration: what pruning looks at, as :func:`pysparse.prune` takes it; None: ``texts``.
        tokenizer: for texts; defaults to the one saved beside the model.
        lora: peft's settings: ``lora_alpha`` / ``r`` is the scale of every adapter, ``lora_dropout`` that of
            its input, ``r`` the rank for "masked-lora". None: r=8, lora_alpha=16, no dropout.
        losa: rounds and ranks of "losa"; None: five rounds, mean ranks 6 to 10.
        training: transformers' TrainingArguments by name, over the paper's: {"learning_rate": 1e-3,
            "num_train_epochs": 2, "bf16": True, "gradient_checkpointing": True, "save_steps": 100, ...}.
        num_samples: calibration sequences, default 128.
        max_length: tokens of a sequence, in training and calibration; default 2048 or the model's positions.
        ignore: layers that stay dense, as in :func:`pysparse.prune`.
        output_dir: folder to save the merged model in; progress is kept beside it meanwhile, in
            "<output_dir>.adapt-progress".
        adapter_dir: folder for the last round's adapters in peft's format, and the base that they belong to,
            float32, in "base" inside it. peft knows no mask: PeftModel.from_pretrained(base, adapter_dir) alone
            computes another function; after :func:`pysparse.merge_and_sparsify` with "mask" it is the trained one.
        save_format: of ``output_dir``: "pysparse" (packed) or "dense".
        resume: go on with that progress after a crash: at the last finished round, and there at the last
            checkpoint of the Trainer (``save_steps``).
        seed: of windows, adapters and the order of batches.
        threads: torch threads; None leaves them alone.
        progress: show steps and time left on stderr.

    Returns the merged model and a report with loss and sparsity per round. Everything is checked before a
    weight is touched, and after an error the model is as it was. Raises ValueError for a wrong sparsity, name
    or setting, a model that is dense when a mask is asked for, a rank budget below one a block, texts that
    give no window; FloatingPointError when the training diverges; ImportError without peft.
    """
    require_peft()
    from pysparse.huggingface.training import (
        training_arguments,
    )  # takes seconds: it imports peft's every model

    schedule, config = schedule_for(sparsity, method, host, pattern, lora, losa, seed)
    if save_format not in FORMATS:
        raise ValueError(f"save_format is one of {', '.join(FORMATS)}, got '{save_format}'")
    if resume and output_dir is None:
        raise ValueError("resume=True needs output_dir: progress is kept beside the folder of the result")
    if output_dir is not None:
        check_replaceable(output_dir)
    with TemporaryDirectory() as scratch:
        arguments = training_arguments(training or {}, Path(scratch), cpu=True, seed=seed)
    epochs = 1.0 if arguments.max_steps > 0 else arguments.num_train_epochs  # steps go before epochs
    check_training(epochs, arguments.learning_rate)
    if arguments.logging_strategy != "steps" or arguments.logging_steps != 1:
        raise ValueError(
            "training: logging_strategy and logging_steps cannot be set: each step's loss is reported"
        )
    model = load_model(model_or_path, format="dense")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"adapt takes a transformers model, got {type(model).__name__}")
    layout = discover(model, ignore=ignore)
    if schedule.host is None:
        _require_zeros(layout, method)
    found = tokenizer_for(model_or_path, model, tokenizer)
    documents = load_texts(data.calibration_texts() if texts is None else texts)
    length = max_length or choose_window(model, None)
    rows = _token_rows(documents, found, length, seed)
    share_of(1, len(schedule.sparsities), len(rows))
    batches = None
    if schedule.losa is not None or (schedule.host is not None and schedule.host.needs_calibration):
        cut = Windows(num_samples, length, arguments.per_device_train_batch_size, seed)
        batches = calibration_for(documents if calibration is None else calibration, model, found, cut)
    job = _Job(layout, schedule, batches, rows, dict(training or {}), config, seed)
    with torch_threads(threads), progress_on_stderr(progress) as advance:
        rounds = job.perform(advance, output_dir, adapter_dir, resume)
    report = AdaptReport(method, tuple(rounds), len(layout.layers), rows.numel())
    if output_dir is not None:
        files = {"adapt_report.json": json.dumps(report.to_dict(), indent=1) + "\n"}
        with kept_after_error(progress_folder(output_dir)):
            huggingface.save_pretrained(
                model, output_dir, format=save_format, tokenizer=found, extra_files=files
            )
        shutil.rmtree(progress_folder(output_dir), ignore_errors=True)
    return AdaptResult(model, report)


def progress_folder(output_dir: str | Path) -> Path:
    """Return where an adaptation that will save to ``output_dir`` keeps its progress: beside it."""
    target = Path(output_dir).expanduser().absolute()
    return target.with_name(f"{target.name}.adapt-progress")


def schedule_for(
    sparsity: float | None, method: str, host: str, pattern: str | None, lora: LoraConfig | None,
    losa: LoSA | None, seed: int,
) -> tuple[Schedule, LoraConfig]:  # fmt: skip
    """Return what each round does; every error that needs no model."""
    peft = require_peft()
    if method not in ADAPTATIONS:
        raise ValueError(f"unknown method '{method}'; known: {', '.join(ADAPTATIONS)}")
    config = (
        peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM") if lora is None else lora
    )
    check_lora(config)
    check_adapter(config.lora_alpha, float(config.lora_dropout))
    if sparsity is not None and check_sparsity(sparsity) == 0:
        raise ValueError(
            f"sparsity={sparsity} prunes nothing: ask for more than 0, or pass None to train under the zeros "
            "that the model has"
        )
    recipe = recipe_for(host, pattern)
    scale, dropout = config.lora_alpha / config.r, float(config.lora_dropout)
    if method == "losa":
        if sparsity is None or pattern not in (None, "unstructured"):
            what = "sparsity=None" if sparsity is None else f"pattern='{pattern}'"
            raise ValueError(
                f"losa prunes on a ramp up to a sparsity of its own, got {what}: pass sparsity, no pattern"
            )
        plan = LoSA() if losa is None else losa
        ranks = [plan.mean_rank(index) for index in range(1, plan.rounds + 1)]
        return Schedule([*plan.sparsities(sparsity)], ranks, recipe, plan, scale, dropout, seed=seed), config
    if losa is not None:
        raise ValueError(f"losa={losa} belongs to method 'losa', not to '{method}'")
    rank = config.r if method == "masked-lora" else 0
    prunes = sparsity is not None or pattern is not None
    target = resolve_sparsity(recipe.structure, sparsity) if prunes else None
    return Schedule([target], [rank], recipe if prunes else None, None, scale, dropout, seed=seed), config


def _require_zeros(layout: BlockLayout, method: str) -> None:
    if all(int(layer.weight.count_nonzero()) == layer.size for layer in layout.layers):
        raise ValueError(
            f"{method} without sparsity trains under the zeros that are there, and this model is dense: pass "
            "sparsity, or prune it first"
        )


def _token_rows(texts: list[str], tokenizer: Any, length: int, seed: int) -> Tensor:
    """Return every window of ``length`` tokens that the texts give, in random order, [N, length]."""
    found = token_batches(texts, tokenizer, None, length, seed=seed)
    return torch.cat([batch.kwargs["input_ids"] for batch in found.batches])


@dataclass(frozen=True, slots=True)
class _Job:
    layout: BlockLayout
    schedule: Schedule
    calibration: Calibration | None
    rows: Tensor
    training: dict[str, Any]
    lora: LoraConfig
    seed: int

    def perform(
        self, advance: Advance, output_dir: str | Path | None, adapter_dir: str | Path | None, resume: bool
    ) -> list[Round]:
        """Run all rounds; the model is merged and in its own dtypes afterwards."""
        model = self.layout.model
        dtype = self.layout.layers[0].weight.dtype
        modes = [(module, module.training) for module in model.modules()]
        with TemporaryDirectory() as scratch, restored_after_error(self.layout), ExitStack() as stack:
            keeping = None
            folder = Path(scratch)
            if output_dir is not None:
                folder = progress_folder(output_dir)
                keeping = AdaptProgress.open(folder, self._identity(), resume=resume)
                stack.enter_context(kept_after_error(folder))

            def train_round(attached: Attached, index: int, total: int) -> Trained:
                losses = self._train(attached, index, total, folder, advance, resume)
                return Trained(len(losses), losses[0], mean_of_last(losses))

            def keep_last(attached: Attached) -> None:
                if adapter_dir is not None:
                    self._save_adapters(attached, adapter_dir)

            with float32_master(model):
                rounds = Adaptation(
                    self.layout, self.schedule, self.calibration, train_round, progress=keeping
                ).run(keep_last, dtype)
        for module, mode in modes:
            module.training = mode
        return rounds

    def _train(
        self, attached: Attached, index: int, total: int, folder: Path, advance: Advance, resume: bool
    ) -> list[float]:
        from pysparse.huggingface.training import train, training_arguments

        model = self.layout.model
        cpu = next(model.parameters()).device.type == "cpu"
        arguments = training_arguments(
            self.training, folder / f"trainer-{index}", cpu=cpu, seed=self.seed + index
        )
        rows = self.rows[slice(*share_of(index, total, len(self.rows)))]
        name = f"round {index} of {total}" if total > 1 else "training"
        return train(model, rows, arguments, lambda done, all_: advance(name, done, all_), resume=resume)

    def _save_adapters(self, attached: Attached, folder: str | Path) -> None:
        place = Path(folder)
        transposed = any(layer.transposed for layer in self.layout.layers)
        save_adapter(attached.adapters, place, self.lora, base=place / "base", transposed=transposed)
        with attached.withdrawn():
            huggingface.save_pretrained(self.layout.model, place / "base", format="dense")

    def _identity(self) -> dict[str, Any]:
        """Return what the result depends on."""
        weights = hashlib.sha256()
        for layer in self.layout.layers:
            weights.update(layer.weight.float().contiguous().cpu().numpy().data)
        return {
            "schedule": repr(self.schedule), "training": repr(sorted(self.training.items())),
            "calibration": None if self.calibration is None else self.calibration.describe()["sha256"],
            "texts": hashlib.sha256(self.rows.numpy().data).hexdigest(), "weights": weights.hexdigest(),
        }  # fmt: skip


def share_of(index: int, total: int, rows: int) -> tuple[int, int]:
    """Return the range of training windows of round ``index`` of ``total``: the last round gets the most.

    Raises ValueError when there is not a window for every round.
    """
    if total == 1:
        return 0, rows
    each = max(1, int(rows * (1 - LAST_SHARE)) // (total - 1))
    if rows < total:
        raise ValueError(
            f"the training text gives {rows} windows for {total} rounds: give more text, or a shorter max_length"
        )
    return (each * (index - 1), each * index) if index < total else (each * (total - 1), rows)
