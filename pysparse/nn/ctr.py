"""Small click models over one embedding table: FM, DeepFM, DCN-v2 and DCN-Mix, trained by plain torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysparse.ops import Crosses, DeepHead, Mlp

CtrKind = Literal["fm", "deepfm", "dcn-v2", "dcn-mix"]
CTR_KINDS: tuple[CtrKind, ...] = ("fm", "deepfm", "dcn-v2", "dcn-mix")
_START = 0.05  # standard deviation of new embeddings


@dataclass(frozen=True, slots=True)
class CtrConfig:
    """What a click model is made of; ``field_sizes`` are the values of each field, one below the other in the table."""

    kind: CtrKind
    field_sizes: tuple[int, ...]
    dims: int = 16
    hidden: tuple[int, ...] = (64, 64)  # of the MLP; FM has none
    dropout: float = 0.0
    cross_layers: int = 2  # DCN
    experts: int = 4  # DCN-Mix
    rank: int = 16  # DCN-Mix

    def __post_init__(self) -> None:
        if self.kind not in CTR_KINDS:
            raise ValueError(f"kind is one of {', '.join(CTR_KINDS)}, got {self.kind!r}")
        if not self.field_sizes or min(self.field_sizes) < 1:
            raise ValueError(f"every field has at least 1 value, got field_sizes {self.field_sizes}")
        numbers = (self.dims, self.cross_layers, self.experts, self.rank, *self.hidden)
        if min(numbers) < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"sizes are at least 1 and dropout is in [0, 1), got {self}")


class FullCross(nn.Module):
    """DCN-v2 (Wang et al. 2021, equation 1): x' = x + x0 * (W x + b)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, inputs)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """Return x', [B, D]."""
        result: Tensor = x + x0 * self.linear(x)
        return result


class MixtureCross(nn.Module):
    """DCN-Mix (Wang et al. 2021, equation 4): x' = x + sum_i <g_i, x> x0 * (U_i tanh(C_i tanh(V_i^T x)) + b)."""

    def __init__(self, inputs: int, experts: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(experts, inputs, rank) * rank**-0.5)
        self.c = nn.Parameter(torch.randn(experts, rank, rank) * rank**-0.5)
        self.v = nn.Parameter(torch.randn(experts, inputs, rank) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(inputs))

    def forward(self, x0: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """Return x', [B, D]; ``gates`` [experts, D] are shared by the layers."""
        low = torch.einsum("bd,edr->ber", x, self.v).tanh()
        low = torch.einsum("ber,esr->bes", low, self.c).tanh()
        experts = torch.einsum("bes,eds->bed", low, self.u) + self.bias
        result: Tensor = x + x0 * torch.einsum("be,bed->bd", x @ gates.T, experts)
        return result


def _mlp(inputs: int, config: CtrConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in config.hidden:
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(config.dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


class CtrModel(nn.Module):
    """Click probability of samples of one value a field; ``embedding`` may be replaced by a ``SparseEmbedding``.

    ids [B, fields] are rows of the table: a field's values follow those of the field before.
    """

    def __init__(self, config: CtrConfig) -> None:
        super().__init__()
        self.config = config
        rows, inputs = sum(config.field_sizes), len(config.field_sizes) * config.dims
        self.embedding: nn.Module = nn.Embedding(rows, config.dims)
        nn.init.normal_(self.embedding.weight, std=_START)
        self.bias = nn.Parameter(torch.zeros(()))
        with_pairs = config.kind in ("fm", "deepfm")
        self.first = nn.Embedding(rows, 1) if with_pairs else None
        if self.first is not None:
            nn.init.zeros_(self.first.weight)
        self.mlp = None if config.kind == "fm" else _mlp(inputs, config)
        self.crosses = nn.ModuleList()
        if config.kind == "dcn-v2":
            self.crosses.extend(FullCross(inputs) for _ in range(config.cross_layers))
        if config.kind == "dcn-mix":
            layers = (MixtureCross(inputs, config.experts, config.rank) for _ in range(config.cross_layers))
            self.crosses.extend(layers)
            self.gates = nn.Parameter(torch.randn(config.experts, inputs) * inputs**-0.5)

    @property
    def table(self) -> Tensor:
        """The dense table [rows, dims]; TypeError once it has been packed."""
        if not isinstance(self.embedding, nn.Embedding):
            raise TypeError(f"the table is no nn.Embedding any more but {type(self.embedding).__name__}")
        return self.embedding.weight

    def offset(self, ids: Tensor) -> Tensor:
        """Return the part of the logit that no embedding moves, [B]: bias and first-order weights."""
        if self.first is None:
            return self.bias.expand(len(ids))
        result: Tensor = self.bias + self.first(ids).sum((1, 2))
        return result

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B] for int32 or int64 ``ids`` [B, fields]."""
        embedded = self.embedding(ids)
        logit = self.offset(ids)
        if self.first is not None:
            logit = logit + 0.5 * (embedded.sum(1).square() - embedded.square().sum(1)).sum(1)
        if self.mlp is None:
            return logit
        x = x0 = embedded.flatten(1)
        for layer in self.crosses:
            x = layer(x0, x, self.gates) if isinstance(layer, MixtureCross) else layer(x0, x)
        result: Tensor = logit + self.mlp(x).squeeze(1)
        return result

    def head(self) -> DeepHead | None:
        """Return all but table and offset as the compiled walks take it (None: a plain FM), batch norm folded in."""
        if self.mlp is None:
            return None
        return DeepHead(_folded(self.mlp), self.first is not None, self._crosses())

    def _crosses(self) -> Crosses | None:
        layers = list(self.crosses)
        if not layers:
            return None
        if all(isinstance(layer, FullCross) for layer in layers):
            weight = torch.stack([layer.linear.weight for layer in layers])  # type: ignore[union-attr, misc]
            bias = torch.stack([layer.linear.bias for layer in layers])  # type: ignore[union-attr, misc]
            return Crosses("full", _floats(bias), _floats(weight))
        stacked = [
            _floats(torch.stack([getattr(layer, name) for layer in layers])) for name in ("u", "c", "v")
        ]
        bias = torch.stack([layer.bias for layer in layers])  # type: ignore[misc]
        u, c, v = stacked
        return Crosses("mixture", _floats(bias), u=u, c=c, v=v, gates=_floats(self.gates))


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _folded(mlp: nn.Sequential) -> Mlp:
    """Fold every batch normalisation, by its running statistics, into the layer before it."""
    weights, biases = [], []
    layers = list(mlp)
    for layer, norm in itertools.pairwise(layers):
        if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            assert norm.running_var is not None
            assert norm.running_mean is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weights.append(_floats(layer.weight * scale[:, None]))
            biases.append(_floats((layer.bias - norm.running_mean) * scale + norm.bias))
    final = layers[-1]
    assert isinstance(final, nn.Linear)
    return Mlp(tuple(weights), tuple(biases), _floats(final.weight[0]), float(final.bias.detach()))
