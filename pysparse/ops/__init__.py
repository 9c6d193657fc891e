"""Floor 3: the operations, as functions on plain tensors registered with ``torch.library``."""

from pysparse.ops.cuda import (
    DELTA_TOKENS,
    STRIP_TOKENS,
    call_arrays,
    max_tokens,
    packed_linear,
    packed_unpack,
)
from pysparse.ops.int8 import ACTIVATION_BITS, call_int8_linear, int8_linear, int8_unpack
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
from pysparse.ops.nm import (
    call_nm_int8_linear,
    call_nm_linear,
    nm_int8_linear,
    nm_int8_unpack,
    nm_linear,
    nm_unpack,
)

__all__ = [
    "ACTIVATION_BITS",
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
    "call_int8_linear",
    "call_nm_int8_linear",
    "call_nm_linear",
    "dense_linear",
    "int8_linear",
    "int8_unpack",
    "is_kernel_dtype",
    "max_tokens",
    "needs_dispatcher",
    "nm_int8_linear",
    "nm_int8_unpack",
    "nm_linear",
    "nm_unpack",
    "packed_linear",
    "packed_unpack",
    "pairs_linear",
    "unpacked_linear",
]
