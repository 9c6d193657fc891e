"""The competitors of the linear benchmark, one file each: a new one is a file and a line here."""

from rivals.engine import Engine, Storage
from rivals.pysparse_dense import PYSPARSE_DENSE
from rivals.pysparse_sparse import PYSPARSE_SPARSE
from rivals.read_probe import READ_PROBE
from rivals.scipy_csr import SCIPY_CSR
from rivals.torch_csr import TORCH_CSR
from rivals.torch_dense import TORCH, TORCH_TUNED

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        TORCH,
        TORCH_TUNED,
        PYSPARSE_DENSE,
        PYSPARSE_SPARSE,
        TORCH_CSR,
        SCIPY_CSR,
        READ_PROBE,
    )
}

__all__ = [
    "ENGINES",
    "PYSPARSE_DENSE",
    "PYSPARSE_SPARSE",
    "READ_PROBE",
    "TORCH",
    "TORCH_TUNED",
    "Engine",
    "Storage",
]
