"""CUDA kernels. Arguments that stand for arrays are device addresses; packing 0 is fragment, 1 is pair."""

SOURCE_HASHES: dict[str, str]
ARCHITECTURES: str
OBS_STRIP: int

def device_count() -> int: ...
def shared_bytes(device: int) -> int: ...
def versions() -> tuple[int, int]: ...  # of the driver (0 without one) and the runtime; 13000 is CUDA 13.0
def load_code(image: bytes, device: int) -> int: ...
def delta_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    values: int,
    deltas: int,
    row_groups: int,
    chunk_cols: int,
    bias: int,
    y: int,
    rows: int,
    device: int,
    stream: int,
) -> None: ...
def delta_unpack(
    values: int,
    deltas: int,
    row_groups: int,
    chunk_cols: int,
    dense: int,
    first_row: int,
    rows: int,
    total_rows: int,
    cols: int,
    device: int,
    stream: int,
) -> None: ...
def nm_linear(
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    values: int,
    places: int,
    n: int,
    bits: int,
    bias: int,
    y: int,
    rows: int,
    device: int,
    stream: int,
) -> None: ...
def nm_unpack(
    values: int,
    places: int,
    n: int,
    bits: int,
    dense: int,
    first_row: int,
    rows: int,
    total_rows: int,
    cols: int,
    device: int,
    stream: int,
) -> None: ...
def strip_workspace(
    packing: int, dtype: int, tokens: int, cols: int, rows: int, largest_block: int, device: int
) -> int: ...
def strip_linear(
    packing: int,
    dtype: int,
    x: int,
    tokens: int,
    cols: int,
    weights: int,
    offsets: int,
    largest_block: int,
    bias: int,
    y: int,
    rows: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def strip_unpack(
    packing: int,
    weights: int,
    offsets: int,
    dense: int,
    first_row: int,
    rows: int,
    total_rows: int,
    cols: int,
    device: int,
    stream: int,
) -> None: ...
def attention(
    dtype: int,
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    v: tuple[int, int, int, int],
    out: tuple[int, int, int, int],
    lse: int,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    valid: tuple[int, int],
    sizes: tuple[int, int, int, int, int, int],
    offset: int,
    scale: float,
    causal: bool,
    set: int,
    spans: tuple[int, int, int],
    lists: tuple[int, int],
    list_sizes: tuple[int, int, int],
    device: int | None,
    stream: int,
) -> None: ...
def find_stripes(
    dtype: int,
    pooled: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    floor: int,
    first_key: int,
    bits: int,
    sizes: tuple[int, int, int, int, int, int, int, int],
    spans: tuple[int, int, int, int],
    scale: float,
    device: int | None,
    stream: int,
) -> None: ...
def count_stripes(bits: int, rows: int, words: int, counts: int, device: int | None, stream: int) -> None: ...
def list_stripes(
    bits: int, rows: int, words: int, offsets: int, indices: int, device: int | None, stream: int
) -> None: ...

# A table: values, records, codebook, field_rows; then dims, fields. Ids: address, number, columns. Bags: offsets,
# weights, number.
def embedding_check(
    entry: int,
    at: tuple[int, ...],
    sizes: tuple[int, int],
    ids: tuple[int, int, int],
    bags: tuple[int, int, int],
    faults: int,
    device: int | None,
    stream: int,
) -> None: ...
def embedding_lookup(
    entry: int,
    at: tuple[int, ...],
    sizes: tuple[int, int],
    ids: tuple[int, int, int],
    out: int,
    device: int | None,
    stream: int,
) -> None: ...
def embedding_bag(
    entry: int,
    at: tuple[int, ...],
    sizes: tuple[int, int],
    ids: tuple[int, int, int],
    bags: tuple[int, int, int],
    mean: bool,
    out: int,
    device: int | None,
    stream: int,
) -> None: ...

# A draw: seed, first, visit, purpose, rows, cols. A shape: samples, fields, cols. Samples: table, base, ids, offset,
# labels. Orders: seed, first, visit, antithetic, given orders.
def shapley_words(
    draw: tuple[int, int, int, int, int, int], words: int, device: int | None, stream: int
) -> None: ...
def shapley_permutations(
    draw: tuple[int, int, int, int, int, int], room: int, orders: int, device: int | None, stream: int
) -> None: ...
def fm_walk_bytes(fields: int, cols: int) -> int: ...
def fm_marginals(
    at: list[int],
    shape: tuple[int, int, int],
    orders: tuple[int, int, int, bool, int],
    marginals: int,
    peak: int,
    device: int | None,
    stream: int,
) -> None: ...
def add_marginals(
    marginals: int,
    ids: int,
    shape: tuple[int, int, int],
    sums: int,
    squares: int,
    device: int | None,
    stream: int,
) -> None: ...

# A matrix: weight, scale, rows, cols. Results: keep, pruned, damage. Operands: weight, upper, scale, keep, errors,
# damage. Sizes: rows, cols, block.
def select_rows(
    entry: int,
    matrix: tuple[int, int, int, int],
    count: int,
    joint: bool,
    at: tuple[int, int, int],
    device: int | None,
    stream: int,
) -> None: ...
def select_nm(
    entry: int,
    matrix: tuple[int, int, int, int],
    n: int,
    m: int,
    at: tuple[int, int, int],
    device: int | None,
    stream: int,
) -> None: ...
def obs_sweep(
    at: tuple[int, ...],
    sizes: tuple[int, int, int],
    joint: bool,
    counts: list[int],
    n: int,
    m: int,
    device: int | None,
    stream: int,
) -> None: ...
