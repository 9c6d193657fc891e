"""Floor 3: the operations, as functions on plain tensors registered with ``torch.library``."""

from pysparse.ops.int8 import ACTIVATION_BITS, call_int8_linear, int8_linear, int8_unpack
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
    "ACTIVATION_BITS",
    "DECODE_TOKENS",
    "DENSE_TOKENS",
    "KERNEL_DTYPES",
    "bitmap_linear",
    "bitmap_unpack",
    "call_bitmap_linear",
    "call_int8_linear",
    "dense_linear",
    "int8_linear",
    "int8_unpack",
    "is_kernel_dtype",
]
