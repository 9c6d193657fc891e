"""An adaptation as a stage of a recipe, after structure and zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pysparse.api.adapting import AdaptReport, adapt, schedule_for
from pysparse.api.stages import RUNNERS, Runner, Setting
from pysparse.huggingface.adapters import require_peft
from pysparse.methods.adaptation import Adapt
from pysparse.methods.losa import LoSA
from pysparse.pruning import Stage


def run_adaptation(model: nn.Module, stage: Stage, setting: Setting) -> AdaptReport:
    """Adapt ``model`` in place, calibrated on what the stages before have left of it."""
    method: Adapt = stage.method
    order = setting.order
    training: dict[str, Any] = {
        "learning_rate": method.learning_rate, "num_train_epochs": method.epochs, "bf16": method.bf16,
        "per_device_train_batch_size": method.batch_size,
    }  # fmt: skip
    return adapt(
        model, stage.sparsity, method.method, method.host, texts=method.texts, calibration=order.calibration,
        tokenizer=setting.tokenizer, lora=_lora(method), losa=_losa(method),
        training=training, num_samples=order.windows.num_samples, max_length=order.windows.max_length,
        ignore=tuple(order.ignore), seed=order.seed, progress=order.progress,
    ).report  # fmt: skip


def check_adaptation(stage: Stage) -> None:
    """Raise, as :func:`pysparse.adapt` does, for what needs no model to be found wrong; FileNotFoundError for texts."""
    method: Adapt = stage.method
    schedule_for(stage.sparsity, method.method, method.host, None, _lora(method), _losa(method), 0)
    if method.texts is not None and not Path(method.texts).is_file():
        raise FileNotFoundError(f"the texts of the adaptation, {method.texts}, are no file")


def _lora(method: Adapt) -> Any:
    return require_peft().LoraConfig(r=method.rank, lora_alpha=method.alpha, task_type="CAUSAL_LM")


def _losa(method: Adapt) -> LoSA | None:
    return LoSA(method.rounds) if method.method == "losa" else None


RUNNERS[Adapt] = Runner(run_adaptation, check_adaptation)
