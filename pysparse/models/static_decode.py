"""Greedy decoding with a static KV cache, on CUDA as one graph a step: the fastest plain way to run a model there."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

WARMUP_STEPS = 3  # of one token, before the graph is captured: libraries choose their kernels in them


class StaticDecoder:
    """Decodes one batch greedily, a step at a time, without the host between steps.

    The prompt [B, T] (int64, on the model's device) is led through the model once; after that every
    :meth:`step` consumes the last token of each sequence, appends the most likely next one, and advances the
    position, all on the device. On CUDA the step is captured in a graph; elsewhere it just runs.

    Blocks of ``model`` may be compiled (``block.compile()``). Raises ValueError where a cache of ``max_tokens``
    positions has no room for the prompt, the steps that warm up and one token.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, max_tokens: int) -> None:
        from transformers import StaticCache

        length = prompt.shape[1]
        if length + WARMUP_STEPS >= max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} holds no new token after a prompt of {length} and {WARMUP_STEPS} to warm up"
            )
        config: Any = model.config
        self._model = model
        self._cache: Any = StaticCache(config=config, max_cache_len=max_tokens)
        self._keyword = cache_keyword(model)
        self.capacity = max_tokens
        self.used = length
        # Eager: a compiled block would specialise on each layer of a cache that is still empty.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=prompt, **{self._keyword: self._cache}, use_cache=True).logits
        self.token = logits[:, -1:].argmax(dim=-1)  # [B, 1], replaced in place by each step
        self.position = torch.full_like(self.token, length)
        self.logits = torch.empty_like(logits[:, -1:])  # [B, 1, vocabulary] of the last step
        self._graph = self._capture() if prompt.is_cuda else None

    @torch.no_grad()
    def _advance(self) -> None:
        output = self._model(
            input_ids=self.token, position_ids=self.position, **{self._keyword: self._cache}, use_cache=True
        )
        self.logits.copy_(output.logits)
        self.token.copy_(self.logits.argmax(dim=-1))
        self.position.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self.used += WARMUP_STEPS
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph

    def step(self) -> None:
        """Append one token to every sequence; IndexError when the cache is full."""
        if self.used >= self.capacity:
            raise IndexError(f"the cache of {self.capacity} positions is full")
        self.used += 1
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()


def cache_keyword(model: nn.Module) -> str:
    """Return the name under which the model's forward takes a KV cache; ValueError when it takes none."""
    names = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in names:
            return name
    raise ValueError(f"{type(model).__name__} takes no KV cache: decoding cannot be timed")
