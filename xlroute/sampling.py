"""Sampling the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn.

    Args:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the smallest set of likeliest tokens whose probability is at least this (nucleus
            sampling, Holtzman et al., arXiv 1904.09751).

    Raises:
        ValueError: for temperature < 0, top_k < 1, or top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k: expected None or at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected None or more than 0 and at most 1, got {self.top_p}")


def sample(logits: Tensor, options: SamplingOptions, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token for each row of logits [b, vocab_size]: int64 [b]."""
    if options.temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    descending, order = (wide / options.temperature).sort(dim=-1, descending=True, stable=True)
    if options.top_k is not None:
        descending[:, options.top_k :] = -math.inf
    probabilities = descending.softmax(-1)
    if options.top_p is not None:
        # A token stays while those before it do not yet reach top_p; so the first one always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= options.top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]
