"""Floor 5: calibration text and tokens, streaming statistics, and the way of a batch through the blocks."""

from pysparse.calib.batches import Batch, Calibration
from pysparse.calib.load import load_calibration
from pysparse.calib.replay import Replay, record_calls
from pysparse.calib.statistics import STATISTICS, Collector, Gram, SquaredNorm, Statistic
from pysparse.calib.texts import load_texts
from pysparse.calib.windows import token_batches

__all__ = [
    "STATISTICS",
    "Batch",
    "Calibration",
    "Collector",
    "Gram",
    "Replay",
    "SquaredNorm",
    "Statistic",
    "load_calibration",
    "load_texts",
    "record_calls",
    "token_batches",
]
