"""A few small products per kernel, for a memory or race checker: run as a program, it is no test module."""

import torch

from pysparse import ops
from pysparse.formats import PACKINGS, BitmapTensor

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
torch.cuda.synchronize()
print("all products right")
