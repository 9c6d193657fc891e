"""An adaptation as a stage of a recipe, after structure and zeros."""

from __future__ import annotations

from typing import Any

from torch import nn

from pysparse.api.adapting import AdaptReport, adapt
from pysparse.api.stages import RUNNERS, Setting
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
    lora = require_peft().LoraConfig(r=method.rank, lora_alpha=method.alpha, task_type="CAUSAL_LM")
    return adapt(
        model, stage.sparsity, method.method, method.host, texts=method.texts, calibration=order.calibration,
        tokenizer=setting.tokenizer, lora=lora, losa=LoSA(method.rounds) if method.method == "losa" else None,
        training=training, num_samples=order.windows.num_samples, max_length=order.windows.max_length,
        ignore=tuple(order.ignore), seed=order.seed, progress=order.progress,
    ).report  # fmt: skip


RUNNERS[Adapt] = run_adaptation
