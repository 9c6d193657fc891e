"""The generators of the suite: taught on the training digits, judged against the test digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysparse.suite.vision.checkpoints import Lesson
from pysparse.suite.vision.frechet import DigitClassifier, frechet_distance
from pysparse.suite.vision.generator import GENERATORS, LATENT, SIDE
from pysparse.suite.vision.pixels import digits
from pysparse.suite.vision.training import Training, fit, shuffled

_KL_WEIGHT = 0.5  # of the autoencoder's prior, beside the squared error summed over pixels


def lesson(name: str) -> Lesson:
    """Return how the generator of that name is taught."""
    found = GENERATORS[name]
    training = Training(found.epochs, 3e-3)
    teach = _teach_flow if found.kind == "flow" else _teach_decoder
    return Lesson("generation", name, {"kind": found.kind}, training, found.build, teach)


def real(rows: slice | Tensor = slice(None), split: str = "train") -> Tensor:
    """Return digits as generators make them: float32 [N, 1, 8, 8] in [-1, 1]."""
    return 2.0 * digits(split)[0][rows] - 1.0  # type: ignore[arg-type]


def between(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return points x_t between noise and images, their times t, and the velocities that belong to them."""
    noise = torch.randn(images.shape, generator=generator)
    time = torch.rand(len(images), generator=generator)
    share = time[:, None, None, None]
    return (1 - share) * noise + share * images, time, images - noise


def _teach_flow(model: nn.Module, training: Training, seed: int) -> nn.Module:
    images = real()

    def batches(epoch_seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch_seed)
        for rows in shuffled(len(images), training.batch_size, epoch_seed):
            yield between(images[rows], generator)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.mse_loss(network(batch[0], batch[1]), batch[2])

    return fit(model, training, batches, loss, seed)


class _Autoencoder(nn.Module):
    """A variational autoencoder around the decoder that is kept."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT)
        )
        self.decoder = decoder


def _teach_decoder(model: nn.Module, training: Training, seed: int) -> nn.Module:
    images = real()

    def batches(epoch_seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch_seed)
        for rows in shuffled(len(images), training.batch_size, epoch_seed):
            yield images[rows], torch.randn(len(rows), LATENT, generator=generator)

    def loss(whole: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(whole, _Autoencoder)  # as it is called below
        mean, log_variance = whole.encoder(batch[0]).chunk(2, dim=1)
        made = whole.decoder(mean + (0.5 * log_variance).exp() * batch[1])
        error = (made - batch[0]).square().flatten(1).sum(1)
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        result: Tensor = (error + _KL_WEIGHT * prior).mean()
        return result

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = _Autoencoder(model)
    fit(whole, training, batches, loss, seed)
    return model


@torch.no_grad()
def distance(made: Tensor, judge: DigitClassifier) -> float:
    """Return the Frechet distance of generated digits [N, 1, 8, 8] to the test digits in the judge's features."""
    return frechet_distance(judge.features(made), judge.features(real(split="test")))
