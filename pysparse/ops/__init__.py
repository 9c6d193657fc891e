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
    bitmap_linear_chunks,
    bitmap_unpack,
    call_bitmap_linear,
    dense_linear,
    is_kernel_dtype,
    needs_dispatcher,
    pairs_linear,
    unpacked_linear,
)

__all__ = [
    "DECODE_TOKENS",
    "DELTA_TOKENS",
    "DENSE_TOKENS",
    "KERNEL_DTYPES",
    "STRIP_TOKENS",
    "bitmap_linear",
    "bitmap_linear_chunks",
    "bitmap_unpack",
    "call_arrays",
    "call_bitmap_linear",
    "dense_linear",
    "is_kernel_dtype",
    "max_tokens",
    "needs_dispatcher",
    "packed_linear",
    "packed_unpack",
    "pairs_linear",
    "unpacked_linear",
]
