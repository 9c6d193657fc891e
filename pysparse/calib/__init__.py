"""Floor 5: calibration text and tokens, streaming statistics, and the way of a batch through the blocks."""

from pysparse.calib.activations import activations_in
from pysparse.calib.batches import Batch, Calibration
from pysparse.calib.calls import record_calls
from pysparse.calib.collector import Collector, Watched
from pysparse.calib.load import load_calibration
from pysparse.calib.ranks import Ranks
from pysparse.calib.replay import Replay
from pysparse.calib.statistics import STATISTICS, Gram, Mean, SquaredNorm, Statistic
from pysparse.calib.texts import load_texts
from pysparse.calib.windows import token_batches

__all__ = [
    "STATISTICS",
    "Batch",
    "Calibration",
    "Collector",
    "Gram",
    "Mean",
    "Ranks",
    "Replay",
    "SquaredNorm",
    "Statistic",
    "Watched",
    "activations_in",
    "load_calibration",
    "load_texts",
    "record_calls",
    "token_batches",
]
