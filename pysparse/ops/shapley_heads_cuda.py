"""Marginals of embedding entries under deep heads on a GPU: coalitions as rows of torch's dense products.

A sample of P players has P + 1 coalitions along an order, each a row of P inputs; a tile of samples goes through the
head at once, which is what a GPU does well, where the CPU follows each removal. Orders are the CPU's; logits are
float32 sums of torch's, so marginals agree to rounding and not to the bit.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysparse.ops import shapley_cuda
from pysparse.ops.shapley import draw_permutations
from pysparse.ops.shapley_entries import EntryDraw, EntrySamples, EntryTotals, Floats
from pysparse.ops.shapley_heads import Crosses, DeepHead, Mlp

_ROWS = 1 << 26  # inputs of the coalitions that are held at once: 256 MB


def head_shapley_cuda(
    samples: EntrySamples, draw: EntryDraw, head: DeepHead, totals: EntryTotals, device: int = 0
) -> None:
    """Add the marginals of ``samples`` under ``head`` to ``totals``, as :func:`pysparse.ops.head_shapley`.

    Raises as :func:`pysparse.ops.fm_shapley_cuda`, and ValueError for shapes of the head that do not fit.
    """
    head.arguments(samples.base.size)  # refuses shapes that do not fit and numbers that are not finite
    size = _tile(samples)
    shapley_cuda.add_entries(
        samples,
        draw,
        totals,
        device,
        size,
        lambda begin, end: marginals_of(samples, draw, head, (begin, end), device),
    )


def _tile(samples: EntrySamples) -> int:
    return max(1, _ROWS // (samples.base.size * (samples.base.size + 1)))


def head_marginals_torch(
    samples: EntrySamples, draw: EntryDraw, head: DeepHead, orders: NDArray[np.int32] | None = None,
    device: int | None = None,
) -> Floats:  # fmt: skip
    """Return each sample's marginals, float32 [samples, players], by torch on a GPU, or on the CPU for None.

    ``orders`` as in :func:`pysparse.ops.head_marginals`. Raises ValueError for samples and heads that do not fit.
    """
    head.arguments(samples.base.size)
    shapley_cuda.check_values(samples)
    size = _tile(samples)
    parts = [
        marginals_of(samples, draw, head, (begin, min(begin + size, len(samples.ids))), device, orders).cpu()
        for begin in range(0, len(samples.ids), size)
    ]
    players = len(samples.base) * draw.per_field(samples.base.shape[1])
    result: Floats = torch.cat(parts).numpy() if parts else np.zeros((0, players), np.float32)
    return result


@torch.no_grad()
def marginals_of(
    samples: EntrySamples, draw: EntryDraw, head: DeepHead, span: tuple[int, int], device: int | None,
    orders: NDArray[np.int32] | None = None,
) -> Tensor:  # fmt: skip
    """Return the marginals [end - begin, players] of samples ``span``."""
    begin, end = span
    where = torch.device("cpu") if device is None else torch.device("cuda", device)
    players = len(samples.base) * draw.per_field(samples.base.shape[1])
    drawn = (draw.seed, draw.first + begin, end - begin, players)
    if orders is not None:
        order = torch.from_numpy(orders[begin:end]).to(where)
    elif device is None:
        order = torch.from_numpy(draw_permutations(*drawn, visit=draw.visit))
    else:
        order = shapley_cuda.draw_permutations_cuda(*drawn, visit=draw.visit, device=device)
    order = order.long()
    part = samples.part(begin, end)
    entries = torch.from_numpy(part.table[part.ids].reshape(end - begin, -1)).to(where)
    walk = _Walk(part, head, entries, torch.from_numpy(part.base.ravel()).to(where))
    if draw.antithetic:
        return 0.5 * walk.marginals(order) + 0.5 * walk.marginals(order.flip(1))
    return walk.marginals(order)


class _Walk:
    """Losses of a tile's coalitions."""

    def __init__(self, part: EntrySamples, head: DeepHead, entries: Tensor, base: Tensor) -> None:
        self.head, self.entries, self.base = head, entries, base
        self.fields = part.base.shape[0]
        offset = np.zeros_like(part.labels) if part.offset is None else part.offset
        self.offset, self.labels = (
            torch.from_numpy(x).to(entries.device).double()[:, None] for x in (offset, part.labels)
        )

    def marginals(self, order: Tensor) -> Tensor:
        """Return what the loss grows by at each removal of ``order`` [samples, players], by player."""
        count, players = order.shape
        entries = self.entries.shape[1]  # one player's, or a field's
        steps = torch.arange(players + 1, device=order.device)
        rank = torch.empty_like(order).scatter_(1, order, steps[:-1].expand_as(order))
        gone = (rank[:, None, :] < steps[:, None]).repeat_interleave(entries // players, dim=2)
        inputs = torch.where(gone, self.base, self.entries[:, None, :]).view(-1, entries)
        logits = self._logits(inputs).double().view(count, -1) + self.offset
        loss = logits.clamp(min=0) - self.labels * logits + (-logits.abs()).exp().log1p()
        return torch.empty_like(order, dtype=torch.float32).scatter_(1, order, loss.diff(dim=1).float())

    def _logits(self, x0: Tensor) -> Tensor:
        head, result = self.head, x0.new_zeros(len(x0))
        if head.pairs:
            fields = x0.view(len(x0), self.fields, -1)
            result += 0.5 * (fields.sum(1).square().sum(1) - x0.square().sum(1))
        x = x0 if head.crosses is None else _crossed(head.crosses, x0)
        if head.crosses is not None and head.crosses.out is not None:
            result += x @ _like(head.crosses.out, x)
            x = x0  # the MLP stands beside the crosses
        return result if head.mlp is None else result + _mlp(head.mlp, x)


def _like(array: Floats, x: Tensor) -> Tensor:
    return torch.from_numpy(array).to(x.device)


def _mlp(mlp: Mlp, x: Tensor) -> Tensor:
    for weight, bias in zip(mlp.weights, mlp.biases, strict=True):
        x = torch.addmm(_like(bias, x), x, _like(weight, x).T).relu_()
    return x @ _like(mlp.final, x) + mlp.final_bias


def _crossed(crosses: Crosses, x0: Tensor) -> Tensor:
    """Return x_L, as :class:`pysparse.ops.Crosses` says."""
    x, biases = x0, _like(crosses.bias, x0)
    if crosses.kind == "full":
        assert crosses.weight is not None
        for weight, bias in zip(_like(crosses.weight, x0), biases, strict=True):
            x = x + x0 * torch.addmm(bias, x, weight.T)
        return x
    parts = (crosses.u, crosses.c, crosses.v, crosses.gates)
    u, c, v, gates = (_like(part, x0) for part in parts if part is not None)
    for layer, bias in enumerate(biases):
        low = torch.einsum("nd,edr->ner", x, v[layer]).tanh()
        middle = torch.einsum("ner,eor->neo", low, c[layer]).tanh()
        gate = x @ gates.T
        x = x + x0 * (
            torch.einsum("neo,edo->nd", middle * gate[:, :, None], u[layer]) + gate.sum(1)[:, None] * bias
        )
    return x
