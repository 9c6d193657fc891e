"""Pruned embedding tables: lookups beside the dense table at every level, files, modules, bad input."""

import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from pysparse import backend
from pysparse.formats.embedding import EmbeddingTable
from pysparse.nn.embedding import FORMAT, SparseEmbedding, SparseEmbeddingBag
from pysparse.ops import embedding as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [[1], [7, 0, 9], [100, 33], [64]]
LEVELS = ["generic", "avx512", "avx512vbmi2"]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    if not backend.available():
        pytest.skip(f"no compiled core: {backend.missing_reason()}")
    if request.param not in {key.isa for key in backend.kernels() if key.op == "embedding" and key.supported}:
        pytest.skip(f"no embedding kernel of level {request.param} on this CPU")
    with backend.force_isa(request.param):
        yield request.param


def draw(sizes, dims, dtype, share=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(sum(sizes), dims, generator=generator).to(dtype)
    keep = torch.rand(sum(sizes), dims, generator=generator) < share
    codebook = torch.randn(len(sizes), dims, generator=generator).to(dtype)
    fields = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return weight, keep, codebook, torch.where(keep, weight, codebook[fields])


@pytest.mark.parametrize("dims", [1, 8, 16, 17, 40, 100])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lookups_are_the_rows_of_the_dense_table(level, dims, sizes, dtype):
    weight, keep, codebook, dense = draw(sizes, dims, dtype)
    module = SparseEmbedding.from_dense(weight, keep, field_sizes=sizes, codebook=codebook)
    assert torch.equal(module.table.to_dense(), dense)
    assert torch.equal(module.table.keep_mask(), keep)
    ids = torch.randint(0, sum(sizes), (3, 601))
    assert torch.equal(module(ids), dense[ids])
    assert torch.equal(module(ids.int()), dense[ids])
    assert torch.equal(ops._torch_lookup(ids, *module._arrays()), dense[ids])
    assert module(ids[:0]).shape == (0, 601, dims)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_by_field(level, dtype):
    sizes = [5, 40, 3]
    weight, keep, codebook, dense = draw(sizes, 16, dtype)
    module = SparseEmbedding.from_dense(weight, keep, field_sizes=sizes, codebook=codebook, per_field=True)
    ids = torch.stack([torch.randint(0, size, (70,)) for size in sizes], dim=1)
    expected = dense[ids + torch.tensor([0, 5, 45])]
    assert torch.equal(module(ids), expected)
    assert torch.equal(ops._torch_lookup(ids, *module._arrays()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_those_of_torch(level, dtype, mode, weighted):
    weight, keep, _, _ = draw([300], 24, dtype)
    dense = weight * keep
    bag = nn.EmbeddingBag(300, 24, mode=mode, _weight=dense.clone())
    module = SparseEmbeddingBag.from_dense(bag, keep)
    ids, offsets = torch.randint(0, 300, (900,)), torch.tensor([0, 0, 5, 700, 900])
    # torch takes weights for sums only: its mean of weighted rows is the sum divided by hand
    weights = torch.rand(900) if weighted else None
    sizes = torch.tensor([0, 5, 695, 200, 0])
    bags = torch.repeat_interleave(torch.arange(5), sizes)
    rows = dense.double()[ids] * (1 if weights is None else weights.double()[:, None])
    expected = torch.zeros(5, 24, dtype=torch.float64).index_add_(0, bags, rows)
    if mode == "mean":
        expected /= sizes.clamp(min=1)[:, None]
    if weighted and mode == "mean":  # the module refuses it, as torch does
        ends = torch.cat([offsets, torch.tensor([900])])
        actual = ops.sparse_embedding_bag(ids, ends, weights, True, *module._arrays())
    else:
        actual = module(ids, offsets, weights)
    epsilon = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    bound = (
        epsilon * expected.abs() + 695 * 2.0**-24 * rows.abs().max() * (1 if mode == "mean" else 30) + 1e-7
    )
    assert ((actual.double() - expected).abs() <= bound).all()
    if not weighted and dtype == torch.float32:
        torch.testing.assert_close(actual, functional.embedding_bag(ids, dense, offsets, mode=mode))
        torch.testing.assert_close(
            module(ids.view(9, 100)), functional.embedding_bag(ids.view(9, 100), dense, mode=mode)
        )


def test_bits_do_not_depend_on_threads(level):
    weight, keep, codebook, _ = draw([4000], 16, torch.float32)
    module = SparseEmbeddingBag.from_dense(weight, keep, codebook=codebook)
    ids = torch.randint(0, 4000, (2000, 13))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((module(ids), ops.sparse_embedding(ids, *module._arrays())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_and_file_at_80_percent(tmp_path):
    weight, keep, codebook, dense = draw([20000, 30000], 16, torch.float32, share=0.2)
    module = SparseEmbedding.from_dense(
        weight, keep, field_sizes=[20000, 30000], codebook=codebook, per_field=True
    )
    module.save(tmp_path / "table.safetensors")
    assert module.nbytes <= 0.3 * weight.nbytes
    assert (tmp_path / "table.safetensors").stat().st_size <= 0.3 * weight.nbytes
    again = SparseEmbedding.load(tmp_path / "table.safetensors")
    assert again.per_field
    assert torch.equal(again.table.to_dense(), dense)
    again.save(tmp_path / "again.safetensors")
    once, twice = ((load_file(path), safe_open(path, "pt").metadata()) for path in sorted(tmp_path.iterdir()))
    assert once[1] == twice[1]
    assert all(torch.equal(once[0][name], twice[0][name]) for name in once[0].keys() | twice[0].keys())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "table.safetensors"]


def test_state_dict_and_devices_of_one_kind():
    weight, keep, codebook, dense = draw([30], 12, torch.float32)
    module = SparseEmbedding.from_dense(weight, keep, codebook=codebook)
    other = SparseEmbedding.from_dense(torch.zeros(30, 12))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(torch.arange(30)), dense)
    broken = module.state_dict()
    broken["bitmask"] = broken["bitmask"].clone()
    broken["bitmask"][0, 0] ^= 1
    with pytest.raises(RuntimeError, match="values"):
        other.load_state_dict(broken)
    assert torch.equal(other(torch.arange(30)), dense)
    assert torch.equal(module.to_dense()(torch.arange(30)), dense)


def test_the_operation_traces():
    weight, keep, codebook, dense = draw([30], 12, torch.float32)
    module = SparseEmbedding.from_dense(weight, keep, codebook=codebook)
    ids = torch.arange(30)
    torch.library.opcheck(
        torch.ops.pysparse.sparse_embedding.default, (ids, *module._arrays()), test_utils="test_faketensor"
    )
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(ids), dense)


@pytest.mark.parametrize("bad", [-1, 30, 2**62, -(2**63)])
def test_ids_outside_are_refused_before_they_are_used(bad):
    module = SparseEmbedding.from_dense(torch.randn(30, 12))
    with pytest.raises(IndexError, match=f"id {bad} .*30"):
        module(torch.tensor([0, 5, bad]))
    per_field = SparseEmbedding.from_dense(torch.randn(30, 12), field_sizes=[10, 20], per_field=True)
    with pytest.raises(IndexError, match=r"id 10 .*field"):
        per_field(torch.tensor([[0, 0], [10, 0]]))
    with pytest.raises(ValueError, match="number of fields, 2"):
        per_field(torch.tensor([[0, 0, 1]]))
    with pytest.raises(ValueError, match="int64 or int32"):
        module(torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": torch.zeros(3)}, "values"),
        ({"bitmask": torch.full((30, 2), 255, dtype=torch.uint8)}, "beyond column 11"),
        ({"codebook": torch.zeros(2, 12)}, "codebook"),
        ({"field_rows": torch.tensor([0, -5, 30])}, "field_rows"),
        ({"field_rows": torch.tensor([0, 31])}, "bitmask"),
        ({"bitmask": torch.zeros(30, 1, dtype=torch.uint8)}, "bitmask"),
    ],
)  # fmt: skip
def test_a_file_from_a_stranger_is_checked(tmp_path, changes, said):
    module = SparseEmbedding.from_dense(torch.randn(30, 12))
    arrays = {
        name: getattr(module.table, name).clone() for name in ("values", "bitmask", "codebook", "field_rows")
    }
    metadata = {"format": FORMAT, "dims": "12", "per_field": "0"}
    save_file(arrays | changes, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ValueError, match=said):
        SparseEmbedding.load(tmp_path / "bad.safetensors")
    save_file(arrays, tmp_path / "bad.safetensors", metadata | {"dims": "minus one"})
    with pytest.raises(ValueError, match="minus one"):
        SparseEmbedding.load(tmp_path / "bad.safetensors")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="add up to 30"):
        EmbeddingTable.from_dense(torch.randn(30, 4), field_sizes=[10, 10])
    with pytest.raises(ValueError, match="codebook must be"):
        EmbeddingTable.from_dense(torch.randn(30, 4), codebook=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="max_norm"):
        SparseEmbedding.from_dense(nn.Embedding(30, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="padding_idx"):
        SparseEmbeddingBag.from_dense(nn.EmbeddingBag(30, 4, padding_idx=0))
    bag = SparseEmbeddingBag.from_dense(nn.EmbeddingBag(30, 4, mode="sum"))
    with pytest.raises(ValueError, match="bag 1 begins at 5"):
        bag(torch.arange(9), torch.tensor([0, 5, 3]))
    with pytest.raises(ValueError, match="offsets"):
        bag(torch.arange(9))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_the_last_offset_may_be_the_end_of_the_last_bag(mode, tmp_path):
    dense = nn.EmbeddingBag(30, 4, mode=mode, include_last_offset=True)
    bag = SparseEmbeddingBag.from_dense(dense)
    ids = torch.randint(0, 30, (20,))
    # torch leaves out ids behind the end too, but divides the last bag's sum by their number as well
    for given in ([0, 5, 9], [0], [0, 5, 5, 9, 20])[0 if mode == "sum" else 1 :]:
        offsets = torch.tensor(given)
        torch.testing.assert_close(bag(ids, offsets), dense(ids, offsets).detach())
    bag.save(tmp_path / "bag.safetensors")
    again = SparseEmbeddingBag.load(tmp_path / "bag.safetensors")
    for copy in (again, again.to_dense()):
        torch.testing.assert_close(copy(ids, offsets), dense(ids, offsets).detach())
        assert (copy.mode, copy.include_last_offset) == (mode, True)
    with pytest.raises(ValueError, match="at least the end of the last bag"):
        bag(ids, torch.tensor([], dtype=torch.int64))


def test_bags_refuse_what_torch_refuses():
    ids, weights = torch.arange(20), torch.ones(20)
    means, sums = (
        SparseEmbeddingBag.from_dense(nn.EmbeddingBag(30, 4, mode=mode)) for mode in ("mean", "sum")
    )
    for module in (means, torch.compile(sums, backend="eager", fullgraph=True)):
        with pytest.raises(ValueError, match="begin with 0, got 2"):
            module(ids, torch.tensor([2, 5]))
    with pytest.raises(ValueError, match="'sum', as in torch; this bag's is 'mean'"):
        means(ids, torch.tensor([0, 5]), weights)
    with pytest.raises(ValueError, match=r"shape \(5, 4\), the ids \(4, 5\)"):
        sums(ids.view(4, 5), None, weights.view(5, 4))
    with pytest.raises(ValueError, match="int64 or int32"):
        sums(ids, torch.tensor([0.0, 5.5]))


def test_options_that_matter_to_gradients_come_back_and_another_forward_is_refused():
    options = {"padding_idx": 3, "sparse": True, "scale_grad_by_freq": True}
    dense = nn.Embedding(30, 4, **options)
    small = SparseEmbedding.from_dense(dense)
    assert torch.equal(small(torch.arange(30)), dense(torch.arange(30)))
    again = small.to_dense()
    assert {name: getattr(again, name) for name in options} == options

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    with pytest.raises(ValueError, match="Scaled has a forward of its own"):
        SparseEmbedding.from_dense(Scaled(30, 4))


def test_files_that_cannot_be_read_or_written_say_so(tmp_path):
    module = SparseEmbedding.from_dense(torch.randn(30, 12))
    path = tmp_path / "table.safetensors"
    module.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"table\.safetensors is damaged or cut off"):
            SparseEmbedding.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SparseEmbedding.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module.save(tmp_path / "nowhere" / "table.safetensors")
    with pytest.raises(IsADirectoryError):
        SparseEmbedding.load(tmp_path)


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.safetensors"
    SparseEmbedding.from_dense(torch.randn(30, 12)).save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*table\.safetensors"):
            SparseEmbedding.from_dense(torch.randn(3000, 12)).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
