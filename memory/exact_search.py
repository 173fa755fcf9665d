"""The k best rows for each routing token, exactly: all rows are scored, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlroute.kernels import row_scores, top_indices
from xlroute.kernels.scoring import Normalize

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
            found, places = take_best(row_scores(rows, tokens, normalize=normalize), None, k)
            places = torch.where(places < 0, places, places + first)
            # Those found before have the lower indices, and stand in front.
            scores, indices = take_best(torch.cat([scores, found], -1), torch.cat([indices, places], -1), k)
            first += rows.shape[0]
    return take_best(scores, indices, k)


def take_best(scores: Tensor, indices: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Takes the k highest scores of each row, and their indices.

    Args:
        scores: [r, n].
        indices: What they are the scores of, int64 [r, n], ascending where scores are equal; -1 for none,
            with a score of -inf. None stands for 0, 1, 2, ...
        k: How many.

    Returns:
        Scores [r, k], highest first and among equals the lower index first; and their indices, int64 [r, k].
        Where there are no more, and for NaN, they are -inf and -1.
    """
    places = top_indices(scores, min(k, scores.shape[-1]))
    places = pad(places, (0, k - places.shape[-1]), value=-1)
    if scores.shape[-1] == 0:
        return torch.full_like(places, -math.inf, dtype=scores.dtype), places
    at = places.clamp(min=0)
    best = scores.gather(-1, at).masked_fill(places < 0, -math.inf)
    return best, places if indices is None else indices.gather(-1, at).masked_fill(places < 0, -1)
