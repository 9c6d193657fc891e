"""Small generators of 8 x 8 digits: two flows, convolutional and with attention, and a decoder.

A flow (Lipman et al. 2023, "Flow Matching", arXiv 2210.02747) is a network v(x_t, t) trained towards x_1 - x_0 on
x_t = (1 - t) x_0 + t x_1 between noise x_0 and data x_1, and sampled by Euler steps from t = 0 to 1. The decoder is
that of a variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114); its encoder is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.suite.vision.architectures import Family

SIDE = 8  # pixels
LATENT = 16  # numbers that a decoder makes a digit of
_FREQUENCIES = 16  # of the embedding of time


class TimeEmbedding(nn.Module):
    """Sines and cosines of t in [0, 1], then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * _FREQUENCIES, width)
        self.outer = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Return the embedding, float32 [B, width], of times [B]."""
        angles = time[:, None] * torch.exp(torch.linspace(0.0, 6.0, _FREQUENCIES, device=time.device))
        hidden = functional.silu(self.inner(torch.cat([angles.sin(), angles.cos()], dim=1)))
        result: Tensor = self.outer(hidden)
        return result


class ResidualBlock(nn.Module):
    """Two convolutions around a shift by the embedding of time, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Return features [B, outputs, H, W]."""
        hidden = self.conv1(functional.silu(self.norm1(features))) + self.time(time)[:, :, None, None]
        result: Tensor = self.shortcut(features) + self.conv2(functional.silu(self.norm2(hidden)))
        return result


class FlowUNet(nn.Module):
    """A U-Net of three scales: 8, 4 and 2 pixels."""

    def __init__(self, widths: tuple[int, int, int] = (32, 48, 64), time: int = 64) -> None:
        super().__init__()
        first, second, third = widths
        self.time = TimeEmbedding(time)
        self.stem = nn.Conv2d(1, first, 3, padding=1)
        self.down = nn.ModuleList([ResidualBlock(first, first, time), ResidualBlock(first, second, time)])
        self.middle = nn.ModuleList([ResidualBlock(second, third, time), ResidualBlock(third, third, time)])
        self.up = nn.ModuleList(
            [ResidualBlock(third + second, second, time), ResidualBlock(second + first, first, time)]
        )
        self.head = nn.Sequential(nn.GroupNorm(8, first), nn.SiLU(), nn.Conv2d(first, 1, 3, padding=1))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the velocity [B, 1, 8, 8] of a sample [B, 1, 8, 8] at times [B]."""
        time = self.time(timestep)
        features = self.stem(sample)
        skips = []
        for block in self.down:
            features = block(features, time)
            skips.append(features)
            features = functional.avg_pool2d(features, 2)
        for block in self.middle:
            features = block(features, time)
        for block in self.up:
            features = functional.interpolate(features, scale_factor=2)
            features = block(torch.cat([features, skips.pop()], dim=1), time)
        result: Tensor = self.head(features)
        return result


class ModulatedBlock(nn.Module):
    """A transformer block whose normalisations are scaled and shifted by time (DiT, arXiv 2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Return tokens [B, T, width]."""
        parts = self.modulation(functional.silu(time))[:, None].chunk(6, dim=2)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        normed = self.norm1(tokens) * (1 + scale1) + shift1
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(normed).chunk(3, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + gate1 * self.output(mixed)
        normed = self.norm2(tokens) * (1 + scale2) + shift2
        result: Tensor = tokens + gate2 * self.down(functional.gelu(self.up(normed)))
        return result


class FlowTransformer(nn.Module):
    """A diffusion transformer over patches of 2 x 2 pixels."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.embed = nn.Linear(4, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // 2) ** 2, width))
        self.blocks = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the velocity [B, 1, 8, 8] of a sample [B, 1, 8, 8] at times [B]."""
        time = self.time(timestep)
        tokens = self.embed(functional.pixel_unshuffle(sample, 2).flatten(2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            tokens = block(tokens, time)
        patches = self.head(self.norm(tokens)).transpose(1, 2).unflatten(2, (SIDE // 2, SIDE // 2))
        return functional.pixel_shuffle(patches, 2)


class Decoder(nn.Module):
    """From 16 numbers to a digit: a linear layer and convolutions at 2, 4 and 8 pixels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.expand = nn.Linear(LATENT, width * 4)
        self.convs = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width // 2, 3, padding=1)]
        )
        self.head = nn.Conv2d(width // 2, 1, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """Return digits [B, 1, 8, 8] in [-1, 1] of latent numbers [B, 16]."""
        features = functional.relu(self.expand(sample)).unflatten(1, (self.width, 2, 2))
        for conv in self.convs:
            features = functional.relu(conv(functional.interpolate(features, scale_factor=2)))
        result: Tensor = self.head(features).tanh()
        return result


@dataclass(frozen=True, slots=True)
class Generator:
    """A generator: what it is built as and how it is taught and sampled."""

    family: Family
    kind: Literal["flow", "decoder"]
    build: Callable[[], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int = 60


GENERATORS: dict[str, Generator] = {
    "flow-unet": Generator("cnn", "flow", FlowUNet),
    "flow-transformer": Generator("attention", "flow", FlowTransformer),
    "vae-decoder": Generator("cnn", "decoder", Decoder, epochs=150),
}


@torch.no_grad()
def samples(model: nn.Module, kind: str, count: int, seed: int, steps: int) -> Tensor:
    """Return ``count`` digits of a generator, float32 [count, 1, 8, 8], about in [-1, 1].

    The noise depends on ``seed`` alone, so a pruned model starts where the dense one does.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "decoder":
        result: Tensor = model(torch.randn(count, LATENT, generator=generator))
        return result
    sample = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    for step in range(steps):
        time = torch.full((count,), step / steps)
        sample = sample + model(sample, time) / steps
    return sample
