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
from pysparse.ops.obs import SweepPattern, can_sweep, obs_sweep
from pysparse.ops.select import can_select, nm_mask, row_mask, select_nm, select_rows

__all__ = [
    "ACTIVATION_BITS",
    "DECODE_TOKENS",
    "DELTA_TOKENS",
    "DENSE_TOKENS",
    "KERNEL_DTYPES",
    "STRIP_TOKENS",
    "SweepPattern",
    "bitmap_linear",
    "bitmap_linear_chunks",
    "bitmap_unpack",
    "call_arrays",
    "call_bitmap_linear",
    "call_int8_linear",
    "call_nm_int8_linear",
    "call_nm_linear",
    "can_select",
    "can_sweep",
    "dense_linear",
    "int8_linear",
    "int8_unpack",
    "is_kernel_dtype",
    "max_tokens",
    "needs_dispatcher",
    "nm_int8_linear",
    "nm_int8_unpack",
    "nm_linear",
    "nm_mask",
    "nm_unpack",
    "obs_sweep",
    "packed_linear",
    "packed_unpack",
    "pairs_linear",
    "row_mask",
    "select_nm",
    "select_rows",
    "unpacked_linear",
]
