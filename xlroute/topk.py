"""A differentiable torch.topk."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from xlroute.backend import pick_backend
from xlroute.kernels import coordinate_descent, top_indices


class TopkReturn(NamedTuple):
    """What `topk` returns, all [..., k], the largest value first."""

    values: Tensor  # the k largest of x
    indices: Tensor  # int64; -1 where a mask leaves fewer than k
    coor_descent_values: Tensor | None  # their gates, in [0, 1]
    gates: Tensor | None  # 1 in value, with the gradient of coor_descent_values


def topk(
    x: Tensor,
    k: int,
    coor_descent_k_ratio: float = 9 / 8,
    n_iters: int = 20,
    eps: float = 1e-1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    fused: bool = False,
    non_differentiable: bool = False,
) -> TopkReturn:
    """The k largest entries of the last dimension, with gates through which gradient reaches all entries.

    The gates are those of `xlroute.kernels.coordinate_descent` with budget `coor_descent_k_ratio` x k
    (Wright, arXiv 1502.04759; CoLT5, arXiv 2303.09752), passed straight through: values are those of x, and
    their gradient is that of x times gate.

    Args:
        x: [..., n].
        k: how many entries, 1 to n. Ties go to the lower index.
        coor_descent_k_ratio: the budget over k, at least 1.
        n_iters: iterations.
        eps: ε of the last iterations.
        eps_init: ε of the first iteration; None for `eps`.
        eps_decay: factor from one ε to the next.
        mask: bool, broadcastable to x; entries that may be chosen, besides those of -inf. Where fewer than k
            may be, the rest has index -1, value 0 and gate 0.
        fused: run the Triton kernel. On a CPU tensor the PyTorch reference runs, with one warning.
        non_differentiable: values and indices alone; the two gates are None.

    Returns:
        TopkReturn(values, indices, coor_descent_values, gates).

    Raises:
        ValueError: if k or coor_descent_k_ratio are out of range.
    """
    if x.ndim == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k: expected 1 to {x.shape[-1]}, the length of x's last dimension, got {k}")
    if coor_descent_k_ratio < 1:
        raise ValueError(f"coor_descent_k_ratio: expected at least 1, got {coor_descent_k_ratio}")
    if mask is not None:
        try:
            mask = mask.expand(x.shape)
        except RuntimeError as error:
            raise ValueError(
                f"mask: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(mask.shape)}"
            ) from error
    backend = pick_backend(fused or None, x.device)
    indices = top_indices(x.detach(), k, mask=mask, backend=backend)
    chosen = indices >= 0
    at = indices.clamp(min=0)
    values = x.gather(-1, at).masked_fill(~chosen, 0)
    if non_differentiable:
        return TopkReturn(values, indices, None, None)
    budget = min(k * coor_descent_k_ratio, x.shape[-1])
    descended = coordinate_descent(
        x,
        k=budget,
        n_iters=n_iters,
        eps=eps,
        eps_init=eps_init,
        eps_decay=eps_decay,
        mask=mask,
        backend=backend,
    )
    descended = descended.gather(-1, at).masked_fill(~chosen, 0)
    gates = (descended + (1 - descended).detach()).masked_fill(~chosen, 0)
    return TopkReturn(values * gates, indices, descended, gates)
