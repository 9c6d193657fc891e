"""Floor 5: quality, speed, memory and size of a model beside the dense one; for users and benchmarks."""

from pysparse.measure.agreement import Agreement, agreement
from pysparse.measure.latency import (
    DecodeTiming,
    PrefillTiming,
    bytes_per_step,
    decode_benchmark,
    generate_timed,
    prefill_benchmark,
)
from pysparse.measure.machine import last_level_cache_bytes, machine_card
from pysparse.measure.memory import ModelBytes, PeakMemory, available_bytes, model_bytes, peak_memory
from pysparse.measure.perplexity import Perplexity, perplexity
from pysparse.measure.quality import score_models
from pysparse.measure.results import Chart, make_table, save_plot, write_json
from pysparse.measure.rounds import Spread, round_robin, torch_threads
from pysparse.measure.size import FileSize, checkpoint_bytes, file_size
from pysparse.measure.windows import TokenWindows, text_windows

__all__ = [
    "Agreement",
    "Chart",
    "DecodeTiming",
    "FileSize",
    "ModelBytes",
    "PeakMemory",
    "Perplexity",
    "PrefillTiming",
    "Spread",
    "TokenWindows",
    "agreement",
    "available_bytes",
    "bytes_per_step",
    "checkpoint_bytes",
    "decode_benchmark",
    "file_size",
    "generate_timed",
    "last_level_cache_bytes",
    "machine_card",
    "make_table",
    "model_bytes",
    "peak_memory",
    "perplexity",
    "prefill_benchmark",
    "round_robin",
    "save_plot",
    "score_models",
    "text_windows",
    "torch_threads",
    "write_json",
]
