"""Floor 3: the operations, as functions on plain tensors registered with ``torch.library``."""

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
    "DENSE_TOKENS",
    "KERNEL_DTYPES",
    "bitmap_linear",
    "bitmap_linear_chunks",
    "bitmap_unpack",
    "call_bitmap_linear",
    "dense_linear",
    "is_kernel_dtype",
    "needs_dispatcher",
    "pairs_linear",
    "unpacked_linear",
]
