"""Floor 3: the operations, as functions on plain tensors registered with ``torch.library``."""

from pysparse.ops.cuda import (
    DELTA_TOKENS,
    STRIP_TOKENS,
    call_arrays,
    max_tokens,
    packed_linear,
    packed_unpack,
)
from pysparse.ops.linear import (
    DECODE_TOKENS,
    DENSE_TOKENS,
    KERNEL_DTYPES,
    bitmap_linear,
    bitmap_unpack,
    call_bitmap_linear,
    dense_linear,
    is_kernel_dtype,
)

__all__ = [
    "DECODE_TOKENS",
    "DELTA_TOKENS",
    "DENSE_TOKENS",
    "KERNEL_DTYPES",
    "STRIP_TOKENS",
    "bitmap_linear",
    "bitmap_unpack",
    "call_arrays",
    "call_bitmap_linear",
    "dense_linear",
    "is_kernel_dtype",
    "max_tokens",
    "packed_linear",
    "packed_unpack",
]
