"""Hard top-k whose choice among equal scores is fixed."""

import math

import torch
from torch import Tensor

from xlroute.kernels.arguments import check_mask, check_scores


@torch.no_grad()
def top_indices(s: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Indices of the k largest scores of each row, in descending order, equal ones by the lower index.

    Masked entries, -inf and NaN are never chosen. Two partial sorts, so about O(n): one finds the k-th score,
    the other the first of the scores that equal it.

    Args:
        s: scores, [..., n].
        k: how many, 0 <= k <= n.
        mask: bool, broadcasts to [..., n]; False entries cannot be chosen.

    Returns:
        int64 [..., k]. A row with fewer than k entries to choose from ends in -1.

    Raises:
        TypeError: ``s`` is not floating point, ``mask`` not bool or ``k`` not an int.
        ValueError: ``mask`` does not broadcast to ``s``, or ``k`` is not in [0, n].
    """
    check_scores(s)
    check_mask(mask, s)
    n = s.shape[-1]
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, n] with n = {n}, got {k}")
    if k == 0:
        return torch.empty((*s.shape[:-1], 0), dtype=torch.int64, device=s.device)

    invalid = ~(s > -math.inf)
    if mask is not None:
        invalid = invalid | ~mask
    s = s.masked_fill(invalid, -math.inf)
    values, indices = s.topk(k, dim=-1)
    threshold = values[..., -1:]

    # Of the scores above the threshold topk has returned every one, in an order that is not fixed among
    # equals: sort by index, then stably by score. The others end up behind them, as -inf.
    indices = indices.sort(dim=-1).values
    values = s.gather(-1, indices)
    above = values > threshold
    order = torch.where(above, values, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    indices = indices.gather(-1, order)
    n_above = above.sum(-1, keepdim=True)

    # The rest are the first of those that equal it: topk of a key that falls with the index, 0 for no match.
    falling = torch.arange(n, 0, -1, device=s.device)
    ties = torch.where((s == threshold) & ~invalid, falling, 0).topk(k, dim=-1).values
    ties = torch.where(ties > 0, n - ties, -1)
    place = torch.arange(k, device=s.device)
    return torch.where(place < n_above, indices, ties.gather(-1, (place - n_above).clamp(min=0)))
