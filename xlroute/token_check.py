"""Whether tokens are in the vocabulary, which the host learns without standing still."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xlroute.memory.to_device import begin_to_host


def begin_check(tokens: Tensor, vocab_size: int) -> Callable[[], None]:
    """Begin to look whether tokens are in the vocabulary.

    Args:
        tokens: integers of any shape, at least one.
        vocab_size: they are to be 0 to `vocab_size` - 1.

    Returns:
        What raises ValueError if some are not. For tokens on a GPU, the host waits there, and not before.
    """
    bounds = begin_to_host(torch.stack(tokens.aminmax()))

    def check() -> None:
        low, high = bounds().tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"tokens: expected 0 to {vocab_size - 1}, got {low} to {high}")

    return check
