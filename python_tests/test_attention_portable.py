"""The attention operations from torch's fused kernels (the path of GPUs without ours), run here on the CPU."""

import attention_cases as cases
import pytest
import torch
from test_attention_ops import DTYPES, SHAPES, random_stripes

from pysparse import ops
from pysparse.ops import attention_portable as portable
from pysparse.ops.attention_cuda import why_portable

REGION = (64, 16, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_portable_operations_are_exact(dtype, shape):
    case = cases.draw(7, dtype, **shape)
    scale = case.q.shape[-1] ** -0.5
    inputs = (case.q, case.k, case.v)
    for causal, mask in ((True, case.causal_mask()), (False, case.full_mask())):
        dense = portable.flash_attention(*inputs, case.bounds, scale, causal, case.q_offset)
        cases.assert_close(dense, cases.exact(case, mask), dtype)
    state = portable.anchor_state(*inputs, case.bounds, scale, case.q_offset, REGION)
    anchor = cases.anchor_mask(case, ops.AnchorRegion(*REGION))
    cases.assert_close((state[0], state[1] + state[2].log()), cases.exact(case, anchor), dtype)
    index = random_stripes(case, 64, heads=1)
    alone = portable.stripe_attention(*inputs, index, None, case.bounds, scale, case.q_offset)
    cases.assert_close(alone, cases.exact(case, cases.stripe_mask(case, index)), dtype)
    own = portable.anchor_state(*inputs, case.bounds, scale, case.q_offset, (64, 0, 0))
    both = portable.stripe_attention(*inputs, index, own, case.bounds, scale, case.q_offset)
    mask = cases.stripe_mask(case, index) | cases.anchor_mask(case, ops.AnchorRegion(64, 0, 0))
    cases.assert_close(both, cases.exact(case, mask), dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "needs", "said"),
    [
        ((1, 2, 8, 64), torch.float32, {}, "float32"),
        ((1, 2, 8, 80), torch.bfloat16, {}, "dimension 80"),
        ((1, 2, 8, 64), torch.bfloat16, {"rows": 192}, "groups of 192 rows"),
        ((1, 2, 8, 64), torch.bfloat16, {"keys": 48}, "blocks of 48 keys"),
        ((1, 2, 8, 64), torch.bfloat16, {"pools": 17}, "17 pools"),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_said(shape, dtype, needs, said):
    assert said in why_portable(torch.empty(shape, dtype=dtype), **needs)
