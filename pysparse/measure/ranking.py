"""How good click predictions are: area under the ROC curve and log loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def roc_auc(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the chance that a click is ranked above a non-click (ties count half); ValueError without both."""
    clicks = labels > 0.5
    positive, negative = int(clicks.sum()), int((~clicks).sum())
    if positive == 0 or negative == 0:
        raise ValueError(f"AUC needs both labels, got {positive} clicks and {negative} others")
    _, inverse, counts = np.unique(logits, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2.0  # mean rank of each group of ties, from 1
    above = float(middle[inverse][clicks].sum()) - positive * (positive + 1) / 2.0
    return above / (positive * negative)


def log_loss(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean binary cross entropy in nats, from logits: max(t, 0) - y t + log(1 + exp(-|t|))."""
    t = logits.astype(np.float64)
    return float(np.mean(np.maximum(t, 0.0) - labels * t + np.log1p(np.exp(-np.abs(t)))))
