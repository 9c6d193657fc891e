"""Floor 3: the operations, as functions on plain tensors registered with ``torch.library``."""

from pysparse.ops.linear import (
    DECODE_TOKENS,
    bitmap_linear,
    bitmap_unpack,
    dense_linear,
    is_kernel_dtype,
)

__all__ = ["DECODE_TOKENS", "bitmap_linear", "bitmap_unpack", "dense_linear", "is_kernel_dtype"]
