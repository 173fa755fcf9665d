"""Exact inner-product search: the k best keys of each query.

Shapes: b streams, n queries, m keys, e width, k keys found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xlroute.kernels.arguments import Backend, compute_dtype
from xlroute.kernels.selection import top_indices


@torch.no_grad()
def search_topk(
    queries: Tensor, keys: Tensor, k: int, *, mask: Tensor | None = None, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """The k keys of highest inner product with each query, best first; ties go to the lower index.

    Args:
        queries: [b, n, e].
        keys: [b, m, e].
        k: how many.
        mask: bool [b, m], the keys that may be found; None for all.
        backend: as for `top_indices`.

    Returns:
        Scores, float32 (float64 for float64 keys), and indices, int64, both [b, n, min(k, m)]; -inf and -1
        where there is no key. Without gradient.
    """
    wide = compute_dtype(keys.dtype)
    scores = queries.to(wide) @ keys.to(wide).mT
    k = min(k, keys.shape[1])
    indices = top_indices(
        scores, k, mask=None if mask is None else mask[:, None].expand(scores.shape), backend=backend
    )
    found = scores.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, -math.inf)
    return found, indices
