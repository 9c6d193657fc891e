"""Floor 9: the public calls: prune, evaluate, benchmark, report, doctor."""

from pysparse.api.adapt_stage import run_adaptation
from pysparse.api.adapting import AdaptReport, AdaptResult, adapt
from pysparse.api.attention import TunedAttention, attention_stats, tune_attention
from pysparse.api.benchmarking import benchmark, benchmark_shape, benchmark_shape_on_cuda
from pysparse.api.evaluation import Evaluation, evaluate
from pysparse.api.loading import load_model
from pysparse.api.merging import merge_and_sparsify
from pysparse.api.planning import plan_prune
from pysparse.api.pruning import PruneResult, prune
from pysparse.measure.comparison import BenchResult, BenchSettings
from pysparse.measure.doctor import doctor
from pysparse.measure.kernels import KernelInfo, kernel_info
from pysparse.measure.report import Report, report

__all__ = [
    "AdaptReport",
    "AdaptResult",
    "BenchResult",
    "BenchSettings",
    "Evaluation",
    "KernelInfo",
    "PruneResult",
    "Report",
    "TunedAttention",
    "adapt",
    "attention_stats",
    "benchmark",
    "benchmark_shape",
    "benchmark_shape_on_cuda",
    "doctor",
    "evaluate",
    "kernel_info",
    "load_model",
    "merge_and_sparsify",
    "plan_prune",
    "prune",
    "report",
    "run_adaptation",
    "tune_attention",
]
