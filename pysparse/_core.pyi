"""Compiled kernels. An argument for an array is the address of its first element; a pair adds their number."""

from collections.abc import Callable
from typing import Any

def kernels() -> list[tuple[str, str, str, str, bool]]: ...
def isa_levels() -> list[tuple[str, bool]]: ...
def force_isa(level: str) -> None: ...
def forced_isa() -> str: ...
def active_isa() -> str: ...
def selected(op: str, format: str, dtype: int) -> str: ...
def num_threads() -> int: ...
def bitmap_pack_mask(keep: int, rows: int, cols: int, bitmask: int, row_offsets: int) -> int: ...
def bitmap_validate(bitmask: int, rows: int, cols: int, row_offsets: int, nnz: int) -> None: ...
def bitmap_gather(
    dense: int, word: int, rows: int, cols: int, bitmask: int, row_offsets: int, values: int, nnz: int
) -> None: ...
def bitmap_scatter(
    values: int, word: int, rows: int, cols: int, bitmask: int, row_offsets: int, nnz: int, dense: int
) -> None: ...
def tile_pack(
    values: int,
    word: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
    nnz: int,
    tiled: int,
    masks: int,
    tile_offsets: int,
) -> None: ...
def tile_unpack(
    tiled: int,
    word: int,
    rows: int,
    cols: int,
    masks: int,
    tile_offsets: int,
    nnz: int,
    values: int,
    bitmask: int,
    row_offsets: int,
) -> None: ...
def pairs_plan(
    tiled: int,
    word: int,
    rows: int,
    cols: int,
    masks: int,
    tile_offsets: int,
    nnz: int,
    row_order: int,
    counts: int,
    block_offsets: int,
) -> int: ...
def pairs_fill(
    tiled: int,
    word: int,
    rows: int,
    cols: int,
    masks: int,
    tile_offsets: int,
    row_order: int,
    counts: int,
    block_offsets: int,
    values: int,
    indices: int,
) -> None: ...
def pairs_mask(
    values: int,
    word: int,
    rows: int,
    cols: int,
    indices: int,
    row_order: int,
    counts: int,
    block_offsets: int,
    bitmask: int,
    row_offsets: int,
) -> int: ...
def pairs_values(
    values: int,
    word: int,
    rows: int,
    cols: int,
    indices: int,
    row_order: int,
    counts: int,
    block_offsets: int,
    row_offsets: int,
    target: int,
) -> None: ...
def pairs_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    values: int,
    entries: int,
    indices: int,
    row_order: int,
    order_count: int,
    counts: int,
    count_count: int,
    block_offsets: int,
    offset_count: int,
    bias: int,
    y: int,
    rows: int,
) -> None: ...
def csr_indices(bitmask: int, rows: int, cols: int, row_offsets: int, nnz: int, col_indices: int) -> None: ...
def bitmap_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    values: int,
    value_count: int,
    masks: int,
    mask_count: int,
    tile_offsets: int,
    offset_count: int,
    bias: int,
    y: int,
    rows: int,
) -> None: ...

class PreparedWeights:
    """Weights of tiled bitmaps with what a product needs of them; their arrays must outlive it."""

    def __init__(self, dtype: int, cols: int, operands: list[tuple[int, ...]]) -> None: ...
    def linear(self, x: int, tokens: int, y: int) -> None: ...
    def group(self, x: int, tokens: int, outputs: list[int]) -> None: ...
    def gated(self, x: int, tokens: int, activation: int, y: int) -> None: ...

class PreparedInt8:
    """The same for tiled int8 weights; an operand's arrays are pairs of address and number of elements."""

    def __init__(self, dtype: int, cols: int, parts: int, operands: list[tuple[Any, ...]]) -> None: ...
    def linear(self, x: int, tokens: int, y: int) -> None: ...
    def group(self, x: int, tokens: int, outputs: list[int]) -> None: ...
    def gated(self, x: int, tokens: int, activation: int, y: int) -> None: ...

def bitmap_linear_group(
    dtype: int, x: int, tokens: int, cols: int, operands: list[tuple[int, ...]], outputs: list[int]
) -> None: ...
def bitmap_gated_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    gate: tuple[int, ...],
    up: tuple[int, ...],
    activation: int,
    y: int,
) -> None: ...
def rms_norm(
    dtype: int, x: int, rows: int, cols: int, weight: int, eps: float, form: int, y: int
) -> None: ...
def bitmap_unpack(
    dtype: int,
    values: int,
    value_count: int,
    masks: int,
    tiles: int,
    tile_offsets: int,
    cols: int,
    first_tile: int,
    rows: int,
    dense: int,
) -> None: ...
def dense_linear(
    dtype: int, x: int, tokens: int, cols: int, weight: int, bias: int, y: int, rows: int
) -> None: ...

PAIR_BLOCK_BYTES: int

def delta_count(bitmask: int, rows: int, cols: int, row_offsets: int, nnz: int, row_groups: int) -> int: ...
def delta_chunk_slots(rows: int, groups: int) -> int: ...
def delta_pack(
    source: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
    row_groups: int,
    values: int,
    deltas: int,
    chunk_cols: int,
) -> None: ...
def delta_unpack(
    values: int,
    deltas: int,
    row_groups: int,
    rows: int,
    cols: int,
    target: int,
    bitmask: int,
    row_offsets: int,
) -> int: ...
def fragment_count(bitmask: int, rows: int, cols: int, row_offsets: int, nnz: int, offsets: int) -> int: ...
def fragment_pack(
    source: int, rows: int, cols: int, bitmask: int, row_offsets: int, offsets: int, stream: int
) -> None: ...
def fragment_unpack(
    stream: int, offsets: int, rows: int, cols: int, target: int, bitmask: int, row_offsets: int
) -> int: ...
def pair_pack(
    source: int, rows: int, cols: int, bitmask: int, row_offsets: int, nnz: int, stream: int
) -> None: ...
def pair_unpack(stream: int, rows: int, cols: int, target: int, bitmask: int, row_offsets: int) -> int: ...
def nm_rows_vectors(n: int, m: int, cols: int) -> int: ...
def nm_rows_pack(
    source: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
    nnz: int,
    n: int,
    m: int,
    values: int,
    places: int,
) -> None: ...
def nm_rows_unpack(
    values: int,
    places: int,
    n: int,
    m: int,
    rows: int,
    cols: int,
    target: int,
    bitmask: int,
    row_offsets: int,
) -> int: ...
def nm_rows_group(n: int, bits: int, cols: int, vector: int, entry: int) -> int: ...
def nm_rows_entry(n: int, bits: int, cols: int, group: int, rank: int) -> tuple[int, int]: ...
def fragment_place(lane: int, q: int, i: int) -> tuple[int, int]: ...
def pair_place(m: int, lane: int, i: int, position: int) -> tuple[int, int]: ...
def input_word(pair: bool, w: int) -> int: ...
def int8_quantize(
    values: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
    nnz: int,
    group_cols: int,
    quantized: int,
    scales: int,
    scales_given: bool = False,
) -> None: ...
def int8_dequantize(
    quantized: int,
    scales: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
    nnz: int,
    group_cols: int,
    values: int,
) -> None: ...
def int8_tile_pack(
    values: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
    nnz: int,
    group_cols: int,
    tiled: int,
    masks: int,
    tile_offsets: int,
    row_sums: int,
) -> None: ...
def int8_tile_unpack(
    tiled: int,
    rows: int,
    cols: int,
    masks: int,
    tile_offsets: int,
    nnz: int,
    values: int,
    bitmask: int,
    row_offsets: int,
) -> None: ...
def int8_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    parts: int,
    values: tuple[int, int],
    masks: tuple[int, int],
    tile_offsets: tuple[int, int],
    scales: tuple[int, int],
    row_sums: tuple[int, int],
    group_cols: int,
    bias: int,
    y: int,
    rows: int,
) -> None: ...
def int8_unpack(
    dtype: int,
    values: tuple[int, int],
    masks: tuple[int, int],
    tile_offsets: tuple[int, int],
    scales: tuple[int, int],
    row_sums: tuple[int, int],
    group_cols: int,
    all_rows: int,
    cols: int,
    first_tile: int,
    rows: int,
    dense: int,
) -> None: ...
def nm_sizes(
    n: int,
    m: int,
    rows: int,
    cols: int,
    word: int,
) -> tuple[int, int]: ...
def nm_block_cols(n: int, m: int, word: int) -> int: ...
def nm_has_vector_kernel(n: int, m: int) -> bool: ...
def nm_pack(
    values: int,
    word: int,
    n: int,
    m: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
    nnz: int,
    packed: int,
    indices: int,
) -> None: ...
def nm_validate(
    values: tuple[int, int],
    indices: tuple[int, int],
    word: int,
    n: int,
    m: int,
    rows: int,
    cols: int,
) -> None: ...
def nm_unpack_mask(
    values: tuple[int, int],
    indices: tuple[int, int],
    word: int,
    n: int,
    m: int,
    rows: int,
    cols: int,
    bitmask: int,
    row_offsets: int,
) -> int: ...
def nm_unpack_values(
    values: tuple[int, int],
    indices: tuple[int, int],
    word: int,
    n: int,
    m: int,
    rows: int,
    cols: int,
    row_offsets: int,
    target: int,
) -> None: ...
def nm_row_sums(
    values: tuple[int, int],
    indices: tuple[int, int],
    n: int,
    m: int,
    rows: int,
    cols: int,
    group_cols: int,
    row_sums: int,
) -> None: ...
def nm_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    values: tuple[int, int],
    indices: tuple[int, int],
    n: int,
    m: int,
    bias: int,
    y: int,
    rows: int,
) -> None: ...
def nm_unpack(
    dtype: int,
    values: tuple[int, int],
    indices: tuple[int, int],
    n: int,
    m: int,
    all_rows: int,
    cols: int,
    first_tile: int,
    rows: int,
    dense: int,
) -> None: ...
def nm_int8_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    parts: int,
    values: tuple[int, int],
    indices: tuple[int, int],
    n: int,
    m: int,
    scales: tuple[int, int],
    row_sums: tuple[int, int],
    group_cols: int,
    bias: int,
    y: int,
    rows: int,
) -> None: ...
def nm_int8_unpack(
    dtype: int,
    values: tuple[int, int],
    indices: tuple[int, int],
    n: int,
    m: int,
    scales: tuple[int, int],
    row_sums: tuple[int, int],
    group_cols: int,
    all_rows: int,
    cols: int,
    first_tile: int,
    rows: int,
    dense: int,
) -> None: ...
def select_rows(
    dtype: int, weight: int, scale: int, rows: int, cols: int, count: int, keep: int, pruned: int
) -> None: ...
def select_nm(
    dtype: int, weight: int, scale: int, rows: int, cols: int, n: int, m: int, keep: int, pruned: int
) -> None: ...
def obs_sweep(
    weight: int,
    upper: int,
    scale: int,
    keep: int,
    rows: int,
    cols: int,
    block: int,
    joint: bool,
    counts: tuple[int, int],
    n: int,
    m: int,
    steps: tuple[int, int] = (0, 0),
    group_cols: int = 1,
) -> None: ...

CHOLESKY_LEAF: int
RIDGE_MAX: int

def ridge_rows(
    gram: int, scale: int, target: int, solution: int, inverse_diagonal: int, rows: int, size: int
) -> None: ...
def add_product(
    c: int,
    c_stride: int,
    a: int,
    a_stride: int,
    b: int,
    b_row_stride: int,
    b_col_stride: int,
    rows: int,
    depth: int,
    cols: int,
    alpha: float,
) -> None: ...
def inverse_cholesky_leaf(matrix: int, size: int, stride: int) -> bool: ...

class LowRankView:
    def __init__(
        self,
        bitmask: int,
        row_offsets: int,
        rows: int,
        cols: int,
        values: int,
        up: int,
        down: int,
        rank: int,
        scale: float,
    ) -> None: ...

def lowrank_expand(view: LowRankView, dtype: int, begin: int, end: int, tile: int) -> None: ...
def lowrank_contract(
    view: LowRankView, dtype: int, gradient: int, begin: int, end: int, up: int, down: int, values: int
) -> None: ...

MAX_PLAYERS: int

def philox(key: int, a: int, b: int, c: int, d: int) -> tuple[int, int, int, int]: ...
def shapley_words(
    seed: int, first: int, visit: int, purpose: int, rows: int, cols: int, words: int
) -> None: ...
def shapley_permutations(
    seed: int, first: int, visit: int, purpose: int, rows: int, cols: int, orders: int
) -> None: ...
def shapley_fm(
    samples: list[int],
    shape: tuple[int, int, int, int],
    draw: tuple[int, int, int, bool, bool, bool, int],
    totals: list[int],
) -> None: ...
def shapley_fm_marginals(
    samples: list[int],
    shape: tuple[int, int, int, int],
    draw: tuple[int, int, int, bool, bool, bool, int],
    marginals: int,
) -> None: ...
def shapley_head(
    samples: list[int],
    shape: tuple[int, int, int, int],
    draw: tuple[int, int, int, bool, bool, bool, int],
    head: tuple[bool, int, int, int, int],
    widths: tuple[int, int],
    arrays: list[tuple[int, int]],
    totals: list[int],
) -> None: ...
def shapley_head_marginals(
    samples: list[int],
    shape: tuple[int, int, int, int],
    draw: tuple[int, int, int, bool, bool, bool, int],
    head: tuple[bool, int, int, int, int],
    widths: tuple[int, int],
    arrays: list[tuple[int, int]],
    marginals: int,
) -> None: ...

_Tensor = tuple[int, int, int, int]  # address; strides of batch, head, row
_Shape = tuple[int, int, int, int, int, int, int]  # dtype, batch, heads, key heads, rows, keys, dim
_Span = tuple[float, bool, int, int]  # scale, causal, q_offset, key_range
_Result = tuple[_Tensor, bool, int, int, int]  # out, whether a state, lse, maximum, denominator
_Lists = tuple[int, int, int, int, int, int]  # offsets, items, their numbers, heads, group size
_Region = tuple[int, int, int]  # group size, init, local
_Rule = tuple[float, int, bool]  # theta, pools, share_kv

def flash_attention(q: _Tensor, k: _Tensor, v: _Tensor, shape: _Shape, span: _Span, to: _Result) -> None: ...
def rotary(
    q: tuple[_Tensor, _Tensor, int],
    k: tuple[_Tensor, _Tensor, int],
    cosine: tuple[int, int, int],
    sine: tuple[int, int, int],
    shape: tuple[int, int, int, int],
) -> None: ...
def row_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    shape: tuple[int, int, int, int, int, int, int],
    scale: float,
    out: int,
) -> None: ...
def block_sparse_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    shape: _Shape,
    span: _Span,
    blocks: _Lists,
    block_k: int,
    to: _Result,
) -> None: ...
def anchor_state(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    shape: _Shape,
    span: _Span,
    region: _Region,
    to: _Result,
) -> None: ...
def identify_stripes(
    q: _Tensor,
    k: _Tensor,
    shape: _Shape,
    span: _Span,
    anchor: int,
    region: _Region,
    rule: _Rule,
    offsets: int,
    allocate: Callable[[int], int],
) -> None: ...
def stripe_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    shape: _Shape,
    span: _Span,
    stripes: _Lists,
    before: _Result,
    to: _Result,
) -> None: ...
def anchor_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    shape: _Shape,
    span: _Span,
    region: _Region,
    rule: _Rule,
    to: _Result,
    offsets: int,
    allocate: Callable[[int], int],
) -> None: ...
def proxy_scores(
    q: _Tensor,
    k: _Tensor,
    shape: _Shape,
    span: _Span,
    proxies: int,
    block: int,
    stride: int,
    scores: int,
) -> None: ...
def block_mass(q: _Tensor, k: _Tensor, shape: _Shape, span: _Span, block: int, mass: int) -> None: ...

EMBEDDING_GROUP: int

def embedding_pack(bitmask: int, rows: int, dims: int, records: int) -> int: ...
def embedding_lookup(
    dtype: int,
    arrays: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    ids: int,
    count: int,
    columns: int,
    out: int,
) -> None: ...
def embedding_bag(
    dtype: int,
    arrays: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    ids: int,
    count: int,
    columns: int,
    offsets: int,
    weights: int,
    bags: int,
    mean: bool,
    out: int,
) -> None: ...
