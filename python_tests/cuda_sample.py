"""A few small calls per kernel, for a memory or race checker: run as a program, it is no test module."""

import numpy as np
import torch

from pysparse import ops
from pysparse.formats import PACKINGS, BitmapTensor, BlockIndex, NMRows
from pysparse.nn.embedding import SparseEmbedding

for rows, cols in ((33, 200), (64, 512)):
    weight = torch.randn(rows, cols, device="cuda").bfloat16()
    weight[:, torch.arange(cols) % 4 > 1] = 0
    weight[1] = 0
    bitmap = BitmapTensor.from_dense(weight)
    for name, packing in PACKINGS.items():
        packed = packing.from_bitmap(bitmap)
        assert torch.equal(ops.packed_unpack(packed), weight), name
        for tokens in (1, 3, 8, 20, 64):
            x = torch.randn(tokens, cols, device="cuda").bfloat16()
            exact = x.double() @ weight.double().T
            error = (ops.packed_linear(x, packed).double() - exact).norm() / exact.norm()
            assert error < 4e-3, (name, rows, cols, tokens, float(error))

for n, m in ((1, 4), (4, 8), (3, 16)):
    weight = torch.randn(33, 200, device="cuda").bfloat16()
    weight[:, torch.arange(200) % m >= n] = 0
    packed = NMRows.from_bitmap(BitmapTensor.from_dense(weight), n, m)
    assert torch.equal(ops.packed_unpack(packed), weight), (n, m)
    x = torch.randn(2, 200, device="cuda").bfloat16()
    exact = x.double() @ weight.double().T
    assert (ops.packed_linear(x, packed).double() - exact).norm() < 4e-3 * exact.norm(), (n, m)

layer = SparseEmbedding.from_dense(torch.randn(200, 13).bfloat16(), torch.rand(200, 13) < 0.3)
ids = torch.randint(0, 200, (50,))
assert torch.equal(layer.cuda()(ids.cuda()), layer(ids.cuda()))
orders = ops.draw_permutations_cuda(1, 2, 5, 39)
assert (orders.sort(dim=1).values.cpu() == torch.arange(39)).all()
random = np.random.default_rng(0)
table, base = random.normal(size=(40, 5)).astype(np.float32), np.zeros((4, 5), np.float32)
rows = random.integers(0, 40, (9, 4)).astype(np.int32)
samples = ops.EntrySamples(table, base, rows, np.ones(9, np.float32))
totals = ops.EntryTotals(40, 5)
ops.fm_shapley_cuda(samples, ops.EntryDraw(3), totals)
# What all removals of a sample cost together is what its loss grows by, whatever the order.
pairs = 0.5 * (table[rows].sum(1) ** 2 - (table[rows] ** 2).sum(1)).sum(1)
grown = np.log(2) - np.log1p(np.exp(-pairs.astype(np.float64)))
assert abs(totals.mean(1).sum() - grown.sum()) < 1e-4 * max(1.0, abs(grown.sum()))
weight, scale = torch.randn(37, 200, device="cuda"), torch.ones(200, device="cuda")
assert (ops.select_rows(weight, scale, 80)[0].sum(dim=1) == 120).all()
assert (ops.select_nm(weight, scale, 2, 4)[0].view(37, 50, 4).sum(dim=2) == 2).all()
upper = torch.eye(200, device="cuda")
swept, keep = ops.obs_sweep(weight, upper, scale, ops.SweepPattern(64, (32, 32, 32, 4)))
assert torch.equal(swept, weight * keep)  # without correlations nothing is made good
q = torch.randn(1, 4, 300, 64, device="cuda").bfloat16()
k, v = (torch.randn(1, 2, 300, 64, device="cuda").bfloat16() for _ in range(2))
exact = torch.nn.functional.scaled_dot_product_attention(
    q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
)
region, rule = ops.AnchorRegion(group_size=128, init=48, local=32), ops.StripeRule(float("inf"), pools=8)
every_block = BlockIndex.from_mask(torch.ones(1, 4, 3, 3, device="cuda").tril().bool())
for name, out in {
    "flash": ops.flash_attention(q, k, v)[0],
    "stripes": ops.anchor_attention(q, k, v, region, rule)[0],  # an infinite theta keeps every key
    "blocks": ops.block_sparse_attention(q, k, v, every_block)[0],
}.items():
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 1e-2, (name, float(error))
torch.cuda.synchronize()
print("all results right")
