"""Hard top-k whose choice among equal scores is fixed."""

import math

import torch
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_mask, check_scores, resolve_backend


@torch.no_grad()
def top_indices(s: Tensor, k: int, mask: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """Indices of the k largest scores of each row, in descending order, equal ones by the lower index.

    Masked entries, -inf and NaN are never chosen.

    Args:
        s: scores, [..., n].
        k: how many, 0 <= k <= n.
        mask: bool, broadcasts to [..., n]; False entries cannot be chosen.
        backend: "torch", "triton", or None to pick by device. Triton selects up to 8,192 from rows of more
            than 2,048 entries; beyond, both run the PyTorch reference.

    Returns:
        int64 [..., k]. A row with fewer than k entries to choose from ends in -1.

    Raises:
        TypeError: ``s`` is not floating point, ``mask`` not bool or ``k`` not an int.
        ValueError: ``mask`` does not broadcast to ``s``, ``k`` is not in [0, n], or the backend cannot run
            here.
    """
    check_scores(s)
    check_mask(mask, s)
    check_count("k", k, s)
    indices: Tensor = _top_indices(s, k, mask, resolve_backend(backend, s))
    return indices


def check_count(name: str, count: int, s: Tensor) -> None:
    """Refuses anything but a number of entries that the rows of ``s`` have.

    Raises:
        TypeError: ``count`` is not an int.
        ValueError: ``count`` is not in [0, n].
    """
    n = s.shape[-1]
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(count).__name__}")
    if not 0 <= count <= n:
        raise ValueError(f"{name} must be in [0, n] with n = {n}, got {count}")


@torch.library.custom_op("xlroute::top_indices", mutates_args=())
def _top_indices(s: Tensor, k: int, mask: Tensor | None, backend: str) -> Tensor:
    if k == 0 or s.numel() == 0:
        return torch.empty((*s.shape[:-1], k), dtype=torch.int64, device=s.device)
    if backend == "triton":
        from xlroute.kernels import selection_triton

        if selection_triton.can_select(s, k):
            return selection_triton.top_indices(s, k, mask)
    return select_by_sorting(s, k, mask)


@_top_indices.register_fake
def _(s: Tensor, k: int, mask: Tensor | None, backend: str) -> Tensor:
    return s.new_empty((*s.shape[:-1], k), dtype=torch.int64)


def select_by_sorting(s: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """The reference of `top_indices` for k > 0, in two partial sorts, so about O(n).

    One finds the k-th score, the other the first of the scores that equal it.
    """
    n = s.shape[-1]
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

    equal = (s == threshold) & ~invalid
    if s.device.type == "cpu" and torch.equal(equal.sum(-1, keepdim=True), k - n_above):
        return indices  # topk has returned all that equal it, too
    # The rest are the first of those that equal it: topk of a key that falls with the index, 0 for no match.
    falling = torch.arange(n, 0, -1, device=s.device)
    ties = torch.where(equal, falling, 0).topk(k, dim=-1).values
    ties = torch.where(ties > 0, n - ties, -1)
    place = torch.arange(k, device=s.device)
    return torch.where(place < n_above, indices, ties.gather(-1, (place - n_above).clamp(min=0)))
