"""The k best rows for each routing token, exactly: all rows are scored, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from xlroute.kernels import row_scores, top_indices
from xlroute.kernels.scoring import Normalize
from xlroute.kernels.search import take_best

# Of one block, over all tokens: 64 MiB in float32.
_MOST_SCORES = 2**24


def search_rows(
    blocks: Iterable[Tensor], tokens: Tensor, k: int, *, normalize: Normalize | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Finds the k rows of highest score for each token.

    A row's score has the same bits in whatever block it comes (see `row_scores`), so equal rows tie, and the
    result does not depend on how the rows are cut.

    Args:
        blocks: The rows, in blocks [n, d].
        tokens: Routing tokens [r, d].
        k: How many.
        normalize: As for `row_scores`.
        dtype: Type of the scores: `compute_dtype` of the rows' type.

    Returns:
        As `take_best`.
    """
    count = tokens.shape[0]
    step = max(1, _MOST_SCORES // max(count, 1))
    scores = torch.empty(count, 0, dtype=dtype, device=tokens.device)
    indices = torch.empty(count, 0, dtype=torch.int64, device=tokens.device)
    first = 0
    for block in blocks:
        for start in range(0, block.shape[0], step):
            rows = block[start : start + step]
            new = row_scores(rows, tokens, normalize=normalize)
            places = top_indices(new, min(k, rows.shape[0]))
            found = new.gather(-1, places.clamp(min=0)).masked_fill(places < 0, -math.inf)
            # Those found before have the lower indices, and stand in front.
            scores, indices = take_best(
                torch.cat([scores, found], -1), torch.cat([indices, places + first], -1), k
            )
            first += rows.shape[0]
    return take_best(scores, indices, k)
