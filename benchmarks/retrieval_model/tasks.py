"""Byte sequences whose next bytes can only be known by looking far back, inside ordinary text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import pysparse.data

ALPHABET = torch.tensor(list(b"abcdefghijklmnopqrstuvwxyz0123456789"))
KEY, VALUE = 4, 4  # random letters of a fact's name and content
BACKGROUND = 0.1  # weight of bytes that need no retrieval


def local_text() -> Tensor:
    """Return the bundled calibration text as bytes, uint8."""
    lines = (Path(pysparse.data.__file__).parent / "calibration.jsonl").read_text().splitlines()
    return torch.tensor(
        list("\n".join(json.loads(line)["text"] for line in lines).encode()), dtype=torch.uint8
    )


class Tasks:
    """Draws sequences: facts hidden in text and asked for at the end, or a passage and its copy."""

    def __init__(self, text: Tensor, seed: int) -> None:
        self.text = text
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Return (tokens int64, weight float32), both [count, length], of either kind half of the time."""
        draws = [self.copy(length) if self._below(2) else self.facts(length) for _ in range(count)]
        return torch.stack([tokens for tokens, _ in draws]), torch.stack([weight for _, weight in draws])

    def copy(self, length: int) -> tuple[Tensor, Tensor]:
        """Random letters, after a stretch of text, and then the same letters again."""
        half = int(length * (0.2 + 0.3 * torch.rand((), generator=self.random)))
        passage = self._letters(half)
        tokens = torch.cat([self._passage(length - 2 * half), passage, passage])
        weight = torch.zeros(length)
        weight[: length - 2 * half] = BACKGROUND
        weight[length - half + 3 :] = 1.0  # the first letters of the copy name the place
        return tokens, weight

    def facts(self, length: int) -> tuple[Tensor, Tensor]:
        """``@name=value`` in text, and questions ``@name=`` with their answers behind it."""
        line = 3 + KEY + VALUE
        asked = max(1, length // 4 // line)
        tail = asked * line
        tokens = self._passage(length)
        weight = torch.full((length,), BACKGROUND)
        places = torch.randperm((length - tail) // line, generator=self.random)[:asked] * line
        facts = [self._fact() for _ in places]
        for place, fact in zip(places.tolist(), facts, strict=True):
            tokens[place : place + line] = fact
            weight[place : place + line] = 0
        for turn, which in enumerate(torch.randperm(asked, generator=self.random).tolist()):
            begin = length - tail + turn * line
            tokens[begin : begin + line] = facts[which]
            weight[begin : begin + line] = 0
            weight[begin + 2 + KEY : begin + 2 + KEY + VALUE] = 1.0
        return tokens, weight

    def needle(self, length: int, depth: float) -> tuple[Tensor, Tensor]:
        """Return (prompt [length], answer [VALUE]): a fact at ``depth`` (0..1) of text, asked for last."""
        fact = self._fact()
        tokens = self._passage(length)
        question = fact[: 2 + KEY]
        place = int(depth * (length - 2 * len(fact) - len(question)))
        tokens[place : place + len(fact)] = fact
        tokens[length - len(question) :] = question
        return tokens, fact[2 + KEY : 2 + KEY + VALUE]

    def long_copy(self, length: int, answer: int = 64) -> tuple[Tensor, Tensor]:
        """Return (prompt [length], answer): random letters and the first part of their repetition, to be continued."""
        passage = self._letters(length // 2)
        begin = int(torch.randint(0, len(passage) - answer - 32, (), generator=self.random))
        prompt = torch.cat([self._passage(length - len(passage) - 32), passage, passage[begin : begin + 32]])
        return prompt, passage[begin + 32 : begin + 32 + answer]

    def _fact(self) -> Tensor:
        name, value = self._letters(KEY), self._letters(VALUE)
        return torch.cat(
            [torch.tensor([ord("@")]), name, torch.tensor([ord("=")]), value, torch.tensor([ord("\n")])]
        )

    def _letters(self, count: int) -> Tensor:
        return ALPHABET[torch.randint(len(ALPHABET), (count,), generator=self.random)]

    def _passage(self, length: int) -> Tensor:
        if length <= 0:
            return torch.zeros(0, dtype=torch.int64)
        copies = -(-length // (len(self.text) - 1))
        text = self.text if copies == 1 else self.text.repeat(copies + 1)
        begin = self._below(len(text) - length)
        return text[begin : begin + length].long()

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.random))
