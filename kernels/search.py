"""Exact search by inner product: the k best of many keys for each query, never all scores at once."""

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from xlroute.kernels.arguments import Backend, check_floating, compute_dtype, resolve_backend
from xlroute.kernels.selection import top_indices

_QUERIES = 1024  # of a stream whose scores the reference has in memory at once
_MOST_SCORES = 2**23  # of one block of keys, or elements of the block: 32 MiB in float32


@torch.no_grad()
def search_topk(
    queries: Tensor, keys: Tensor, k: int, *, mask: Tensor | None = None, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """The k keys of highest inner product with each query, exactly, without a tensor of all the scores.

    There is no gradient: gather the keys that were found, and score them again.

    Which keys are the best, float32 scores say (float64 for float64 keys), but for their rounding. Any two
    ways to add up the products of a score, on tensor cores too, differ by at most c::

        c = (e + 16) 2^-21 |query| |longest key|

    No key that was left out is better than one that was found by more than 2 c. The scores that are returned
    are sums of float32 products in float32.

    Triton keeps the highest score of each block of adjacent keys, from tensor cores, and scores the keys of
    the k + 8 best blocks again. A block has 32 keys where m is at most 262,144 and k at most 504, and else
    128 (where a key takes more than 512 bytes: 32 where m is at most 131,072 and k at most 1,016, and else
    64). The k best blocks hold the k best keys. So unless the maxima of more than 8 others come within 2 c of
    them, what is found is the best to the last bit, by the scores that are returned. This takes at most 64
    MiB a stream beyond inputs and result, and 256 MiB in all, as long as 4 bytes for each block of each
    stream fit into that, and k is at most 8,184: more blocks are chosen by sorting. Keys in rows of no
    multiple of 16 bytes, or at no such address, are copied first. float64, keys of more than 1,024 bytes, and
    fewer than 256 (k + 8) of them, or 128 (k + 8) of more than 512 bytes, run the reference.

    Args:
        queries: [b, n, e].
        keys: [b, m, e], in the dtype of ``queries``. Not copied if they are a slice of a longer buffer.
        k: how many; any number.
        mask: bool [b, m]; False entries are never found, whatever they hold.
        backend: "torch", "triton", or None to pick by device. The reference multiplies as torch.matmul does,
            with TF32 where float32 products are allowed to.

    Returns:
        Scores [b, n, min(k, m)], float64 for float64 keys and float32 for all others, under autocast too, and
        indices, int64, of the same shape: best first, equal scores by the lower index. A score of -inf or NaN
        is never found. Where a stream has fewer keys, the score is -inf and the index -1.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ, ``mask`` is not bool or ``k`` not an int.
        ValueError: a shape or a device does not fit, ``k`` is negative, or the backend cannot run here.
    """
    check_floating("queries", queries)
    check_floating("keys", keys)
    if queries.ndim != 3 or keys.ndim != 3 or queries.shape[::2] != keys.shape[::2]:
        raise ValueError(
            f"queries [b, n, e] and keys [b, m, e] must share b and e, got shapes {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}"
        )
    if queries.dtype != keys.dtype:
        raise TypeError(f"keys must have the dtype of queries, {queries.dtype}, got {keys.dtype}")
    if queries.device != keys.device:
        raise ValueError(f"keys must be on the device of queries, {queries.device}, got {keys.device}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {given}")
        if mask.shape != keys.shape[:2]:
            raise ValueError(f"mask must have shape {tuple(keys.shape[:2])}, got {tuple(mask.shape)}")
        if mask.device != keys.device:
            raise ValueError(f"mask must be on the device of queries, {keys.device}, got {mask.device}")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    scores: Tensor
    indices: Tensor
    scores, indices = _search(queries, keys, min(k, keys.shape[1]), mask, resolve_backend(backend, queries))
    return scores, indices


def take_best(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of some scores, and their indices.

    Args:
        scores: [..., n]; -inf and NaN for what cannot be taken.
        indices: what they are the scores of, int64 [..., n], ascending where scores are equal.
        k: how many.

    Returns:
        Scores [..., k], highest first and among equals the lower index first; and their indices, int64.
        Where there are no more, they are -inf and -1.
    """
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    scores, indices = scores[..., :k], indices.gather(-1, order[..., :k])
    indices = indices.masked_fill(scores == -math.inf, -1)
    missing = k - scores.shape[-1]
    return pad(scores, (0, missing), value=-math.inf), pad(indices, (0, missing), value=-1)


@torch.library.custom_op("xlroute::search_topk", mutates_args=())
def _search(
    queries: Tensor, keys: Tensor, k: int, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Scores and indices [b, n, k] for k <= m."""
    if backend == "triton" and k > 0 and queries.numel() > 0:
        from xlroute.kernels import search_triton

        if search_triton.can_search(keys, k):
            return search_triton.search(queries, keys, k, mask)
    with torch.autocast(queries.device.type, enabled=False):
        return _search_in_blocks(queries, keys, k, mask, cast(Backend, backend))


@_search.register_fake
def _(queries: Tensor, keys: Tensor, k: int, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], k)
    scores = queries.new_empty(shape, dtype=compute_dtype(queries.dtype))
    return scores, queries.new_empty(shape, dtype=torch.int64)


def _search_in_blocks(
    queries: Tensor, keys: Tensor, k: int, mask: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """The reference: blocks of keys by matrix product, the best of each beside the best so far."""
    b, n, e = queries.shape
    m = keys.shape[1]
    dtype = compute_dtype(queries.dtype)
    scores = torch.full((b, n, k), -math.inf, dtype=dtype, device=queries.device)
    indices = torch.full((b, n, k), -1, dtype=torch.int64, device=queries.device)
    step = max(1, _MOST_SCORES // max(b * max(min(n, _QUERIES), e), 1))
    if k == 0:
        return scores, indices
    for first in range(0, n, _QUERIES):
        part = slice(first, first + _QUERIES)
        for start in range(0, m, step):
            block = slice(start, start + step)
            new = queries[:, part].to(dtype) @ keys[:, block].to(dtype).mT
            seen = None if mask is None else mask[:, None, block]
            places = top_indices(new, min(k, new.shape[-1]), seen, backend=backend)
            found = new.gather(-1, places.clamp(min=0)).masked_fill(places < 0, -math.inf)
            # Those found before have the lower indices, and stand in front.
            scores[:, part], indices[:, part] = take_best(
                torch.cat([scores[:, part], found], -1), torch.cat([indices[:, part], places + start], -1), k
            )
    return scores, indices
