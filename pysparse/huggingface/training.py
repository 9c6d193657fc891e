"""The rounds of an adaptation under transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

_TRAINABLE = (
    "trainable.safetensors"  # in a checkpoint: what has gradients; the rest of the model never changes
)
_OWN = ("output_dir", "resume_from_checkpoint", "do_train")  # of TrainingArguments: not for the caller to set
# Until transformers 5.2x the settings for recomputing activations bore another name, which later ones warn of.
_NEW_NAME = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
_RECOMPUTE = "activation_checkpointing" if _NEW_NAME else "gradient_checkpointing"
# The paper's, but for the dropout; the warm-up is a share of the steps.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.3, "weight_decay": 1e-3,
    "max_grad_norm": 0.3, "per_device_train_batch_size": 8, "num_train_epochs": 1, "report_to": [],
    "logging_steps": 1, "logging_nan_inf_filter": False, "disable_tqdm": True, "dataloader_pin_memory": False,
}  # fmt: skip


class TokenRows(Dataset[dict[str, Tensor]]):
    """Windows of tokens [N, T] as a data set of a causal language model: labels are the tokens themselves."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class MaskedTrainer(Trainer):
    """Checkpoints hold only what is trained, beside the optimizer: the rest is the model as it came."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trainable(self.model), folder / _TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / _TRAINABLE)
        with torch.no_grad():
            for name, parameter in _trainable(model or self.model).items():
                parameter.copy_(stored[name])


def _trainable(model: Any) -> dict[str, Tensor]:
    return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}


def training_arguments(
    settings: Mapping[str, Any], folder: Path, *, cpu: bool, seed: int
) -> TrainingArguments:
    """Return transformers' arguments: the defaults here, ``settings`` over them.

    Raises ValueError for a setting that transformers does not know or takes otherwise, or that is not the
    caller's to choose.
    """
    taken = [name for name in _OWN if name in settings]
    if taken:
        raise ValueError(f"training: {', '.join(taken)} cannot be set: adapt sets it itself")
    given = {**DEFAULTS, "save_strategy": "no", "use_cpu": cpu, "seed": seed, **settings}
    if "gradient_checkpointing" in given:
        given[_RECOMPUTE] = given.pop("gradient_checkpointing")
    given.setdefault(f"{_RECOMPUTE}_kwargs", {"use_reentrant": False})
    try:
        return TrainingArguments(output_dir=str(folder), **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None


def train(
    model: nn.Module,
    rows: Tensor,
    arguments: TrainingArguments,
    on_step: Callable[[int, int], None],
    *,
    resume: bool = False,
) -> list[float]:
    """Train what has gradients in ``model`` on ``rows`` of tokens [N, T], and return the loss of each step.

    ``on_step`` is called with (steps done, steps in all). With ``resume`` training goes on at the last
    checkpoint in ``arguments.output_dir``, if there is one. Raises FloatingPointError when a loss is NaN or
    infinite.
    """
    trainer = MaskedTrainer(model, arguments, train_dataset=TokenRows(rows), callbacks=[_Steps(on_step)])
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    folder = Path(str(arguments.output_dir))
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    with _left_as_found(trainer, model):
        trainer.train(resume_from_checkpoint=last)
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@contextmanager
def _left_as_found(trainer: Trainer, model: Any) -> Iterator[None]:
    """Undo what the Trainer leaves behind in a model: its autocast, checkpointing, no cache."""
    caching = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if getattr(trainer.args, _RECOMPUTE):
            getattr(model, f"{_RECOMPUTE}_disable")()
        if caching is not None:
            model.config.use_cache = caching


class _Steps(TrainerCallback):
    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"the training diverged: the loss of step {state.global_step} is {loss}. Lower learning_rate "
                f"(it is {args.learning_rate:g}) or train in float32"
            )
