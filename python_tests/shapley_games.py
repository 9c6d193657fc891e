"""Games with known values, shared by the tests."""

import itertools
import math

import numpy as np

E = np.array([[0.5, -1.0], [1.5, 0.25], [-0.75, 2.0]])
CODEBOOK = np.array([[0.1, 0.2], [-0.3, 0.4], [0.0, -0.5]])
LINEAR = 0.3
FM_PHI = {  # v = -BCE
    1: (0.0626087911, -0.7524172032, -0.1298187332, -0.0304359396, -0.4209123932, -0.3656481937),
    0: (-0.0273912089, 0.5375827968, 0.0051812668, 0.0220640604, 0.2540876068, -0.1781481937),
}
FM_PHI_ZERO_BASE = (0.1221358863, -0.7501082703, -0.1589549037, 0.0866831060, -0.4841349717, -0.5663489218)
FM_LOGIT_PHI = (0.09, -1.29, -0.135, -0.0525, -0.675, -0.1875)


class Table:
    """A game given by the values of all 2^n coalitions; bit i of the index is player i."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.float64)
        self.n_players = int(math.log2(len(self.values)))

    def __call__(self, coalitions):
        return self.values[coalitions @ (1 << np.arange(self.n_players))]


def table_of(n, function):
    """``function`` takes the set of members."""
    return Table([function({i for i in range(n) if code >> i & 1}) for code in range(1 << n)])


def random_table(n, seed):
    return Table(np.random.default_rng(seed).normal(size=1 << n))


def glove():
    return table_of(5, lambda s: min(len(s & {0, 1}), len(s & {2, 3, 4})))


def airport():
    return table_of(4, lambda s: max(((1, 2, 3, 5)[i] for i in s), default=0))


def majority():
    return table_of(4, lambda s: float(sum((3, 2, 1, 1)[i] for i in s) >= 4))


def enumerated(game):
    """The definition, word by word: the mean over all n! orders."""
    n = game.n_players
    total = np.zeros(n)
    for order in itertools.permutations(range(n)):
        members, before = np.zeros((1, n), dtype=bool), game(np.zeros((1, n), dtype=bool))[0]
        for player in order:
            members[0, player] = True
            after = game(members)[0]
            total[player] += after - before
            before = after
    return total / math.factorial(n)


def loss(logit, label):
    return np.maximum(logit, 0) - label * logit + np.log1p(np.exp(-np.abs(logit)))


class FmGame:
    """One sample of a factorisation machine; players are entries f * d + k, absent ones take the base value."""

    def __init__(self, embedding=E, base=CODEBOOK, linear=LINEAR, label=None):
        self.embedding, self.base, self.linear, self.label = embedding, base, linear, label
        self.n_players = embedding.size

    def logit(self, coalitions):
        keep = coalitions.reshape(-1, *self.embedding.shape)
        e = np.where(keep, self.embedding, self.base)
        return self.linear + 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1)

    def __call__(self, coalitions):
        t = self.logit(coalitions)
        return t if self.label is None else -loss(t, self.label)
