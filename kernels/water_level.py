"""Soft top-k solved exactly: one water level a row, from one top-k and one logsumexp."""

import math
from typing import Any

import torch
from torch import Tensor

from xlroute.kernels.arguments import (
    Backend,
    budget_per_row,
    check_budget,
    check_eps,
    check_mask,
    check_scores,
    compute_dtype,
    resolve_backend,
)
from xlroute.kernels.exponential import exp_flushed_
from xlroute.kernels.selection import check_count, select_by_sorting


def soft_topk(
    s: Tensor,
    *,
    k: float | Tensor,
    eps: float = 0.1,
    mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Soft top-k gates of each row of scores: the limit of coordinate descent, solved exactly.

    The gates maximise <s, λ> + eps H(λ) subject to Σ λ = min(k, valid entries) and 0 <= λ <= 1. They are
    min(1, exp((s + a) / eps)), with the one level a at which they sum to the budget: with the scores in
    descending order and j of them saturated, a = eps (ln(k - j) - logsumexp of the rest / eps), for the one j
    < k that is consistent. The gradient is in closed form; for the entries below saturation, whose gates sum
    to S::

        ds_i = λ_i / eps (g_i - Σ g λ / S),    dk = Σ g λ / S

    and zero for all others, and for rows whose budget reaches all valid entries (every gate 1) or is not
    positive (every gate 0). There is no second derivative.

    A score of -inf counts as masked. A NaN or +inf makes the gates of its row NaN, of no other. A tensor
    ``k`` on a GPU is read once by the host, since the size of the top-k depends on it; a number is not, nor
    are the budgets of rows that Triton sorts whole (up to 2,048 entries, not in float64).

    Args:
        s: scores, [..., n]. Computed in float32, or float64 if given float64, under autocast too.
        k: the budget of a row, a number or a tensor that broadcasts to [...]; it may be fractional.
        eps: the temperature, in the units of the scores.
        mask: bool, broadcasts to [..., n]; False entries get a gate of 0 and no gradient.
        backend: "torch", "triton", or None to pick by device. Triton solves for budgets up to 8,192 in rows
            that it does not sort whole; beyond, the forward of both is that of PyTorch.

    Returns:
        The gates in [0, 1], of the shape and dtype of ``s``.

    Raises:
        TypeError: ``s`` is not floating point, ``mask`` not bool or ``k`` not real.
        ValueError: a shape does not broadcast, a number is out of its range, or the backend cannot run here.
    """
    return soft_topk_with_indices(s, k=k, num=0, eps=eps, mask=mask, backend=backend)[0]


def soft_topk_with_indices(
    s: Tensor,
    *,
    k: float | Tensor,
    num: int,
    eps: float = 0.1,
    mask: Tensor | None = None,
    backend: Backend | None = None,
    largest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The gates of `soft_topk` and the indices of `top_indices`, from one selection.

    Args:
        s: scores, [..., n].
        k: the budget of a row, a number or a tensor that broadcasts to [...].
        num: how many indices, 0 <= num <= n.
        eps: the temperature.
        mask: bool, broadcasts to [..., n].
        backend: "torch", "triton", or None to pick by device, as in `soft_topk`.
        largest: a bound on a tensor ``k`` that the host knows. With it, nothing waits for the GPU. A budget
            above it must reach all valid entries of its row; the gates of other rows are undefined.

    Returns:
        Gates of the shape and dtype of ``s``, and int64 indices [..., num].

    Raises:
        TypeError, ValueError: as `soft_topk` and `top_indices` do.
    """
    budgets, number, largest, backend = _checked(s, k, num, eps, mask, backend, largest)
    gates: Tensor
    gates, _, indices = _forward(s, budgets, number, mask, float(eps), largest, num, backend)
    return gates, indices


def top_gates(
    s: Tensor,
    *,
    k: float | Tensor,
    num: int,
    eps: float = 0.1,
    mask: Tensor | None = None,
    backend: Backend | None = None,
    largest: int | None = None,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """The largest scores of a row and their gates alone: what routing needs of `soft_topk_with_indices`.

    The gates of the others are neither computed nor written. Their scores compete all the same, and get their
    gradient.

    Args:
        s: scores, [..., n].
        k: the budget of a row, a number or a tensor that broadcasts to [...].
        num: how many gates, 0 <= num <= n.
        eps: the temperature.
        mask: bool, broadcasts to [..., n].
        backend: "torch", "triton", or None to pick by device, as in `soft_topk`.
        largest: a bound on a tensor ``k``, as in `soft_topk_with_indices`.
        straight_through: the gates are 1 in value (a NaN stays), with the gradient of what they were (Bengio
            et al., arXiv 1308.3432).

    Returns:
        Gates [..., num] in the dtype of ``s``, and int64 indices [..., num] as from `top_indices`. Where the
        index is -1, the gate is 0.

    Raises:
        TypeError, ValueError: as `soft_topk` and `top_indices` do.
    """
    budgets, number, largest, backend = _checked(s, k, num, eps, mask, backend, largest)
    gates: Tensor
    gates, _, indices = _forward_chosen(
        s, budgets, number, mask, float(eps), largest, num, straight_through, backend
    )
    return gates, indices


def water_levels(
    s: Tensor,
    *,
    k: float | Tensor,
    eps: float = 0.1,
    mask: Tensor | None = None,
    backend: Backend | None = None,
    largest: int | None = None,
) -> Tensor:
    """The level a of each row in `soft_topk`, by which scores of other entries can be gated alike.

    The gates of the row are min(1, exp((s + a) / eps)). Differentiable in ``s``: da = -Σ λ_i ds_i / S, over
    the entries below saturation, whose gates λ sum to S.

    Args:
        s: scores, [..., n].
        k: the budget of a row, a number or a tensor that broadcasts to [...], without gradient.
        eps: the temperature.
        mask: bool, broadcasts to [..., n].
        backend: "torch", "triton", or None to pick by device, as in `soft_topk`.
        largest: a bound on a tensor ``k``, as in `soft_topk_with_indices`.

    Returns:
        [...], float64 for float64 scores and float32 for all others; inf where the budget reaches all valid
        entries, -inf where it is not positive.

    Raises:
        TypeError, ValueError: as `soft_topk` does.
    """
    budgets, number, largest, backend = _checked(s, k, 0, eps, mask, backend, largest)
    with torch.no_grad():
        _, (shift, level, _), _ = _forward(s, budgets, number, mask, float(eps), largest, 0, backend)
    with torch.autocast(s.device.type, enabled=False):
        scores = _masked_scores(s, mask)
        z = _offset(scores, shift, eps) + level.to(scores.dtype)[..., None]
        # The last entry that the budget reaches may be all that is left, at exactly 0 once it is rounded.
        z = z.masked_fill(~(z <= 0), -math.inf)
        # Rows without an entry below saturation have no gradient, and logsumexp would make it NaN.
        z = z.masked_fill((z == -math.inf).all(-1, keepdim=True), 0.0)
        rest = z.logsumexp(-1)
        a: Tensor = (level * eps - shift).to(scores.dtype) - eps * (rest - rest.detach())
        return a


def _checked(
    s: Tensor,
    k: float | Tensor,
    num: int,
    eps: float,
    mask: Tensor | None,
    backend: Backend | None,
    largest: int | None,
) -> tuple[Tensor | None, float, int | None, Backend]:
    """Checks the arguments; the budget of each row or of all, a bound on it, and the backend."""
    check_scores(s)
    check_mask(mask, s)
    check_eps(eps)
    check_count("num", num, s)
    backend = resolve_backend(backend, s)
    if isinstance(k, Tensor):
        return budget_per_row(k, s), 0.0, largest, backend
    number = check_budget(k)
    largest = math.ceil(min(max(k, 0), 2**53))
    if torch.compiler.is_compiling():
        # A graph is made for one number, but for any tensor.
        return budget_per_row(k, s), 0.0, largest, backend
    return None, number, largest, backend


def _offset(s: Tensor, shift: Tensor, eps: float) -> Tensor:
    """(s - shift) / eps with one shift a row: exact differences near it, where gates change."""
    return (s - shift.to(s.dtype)[..., None]).div_(eps)


def _masked_scores(s: Tensor, mask: Tensor | None) -> Tensor:
    """Scores in the compute dtype, with -inf where the mask says no."""
    s = s.to(compute_dtype(s.dtype))
    return s if mask is None else s.masked_fill(~mask, -math.inf)


@torch.library.custom_op("xlroute::soft_topk", mutates_args=())
def _forward(
    s: Tensor,
    k: Tensor | None,
    number: float,
    mask: Tensor | None,
    eps: float,
    largest: int | None,
    num: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates [..., n] for the budgets ``k`` [...], or ``number`` for all rows.

    And the levels [3, ...] of `_solve_by_sorting`, and int64 indices [..., num].
    """
    lead = s.shape[:-1]
    if s.numel() == 0:
        levels = s.new_zeros((3, *lead), dtype=torch.float64)
        return s.new_zeros(s.shape), levels, s.new_zeros((*lead, num), dtype=torch.int64)
    largest, in_triton = _plan(s, k, largest, num, backend)
    if in_triton:
        from xlroute.kernels import water_level_triton

        return water_level_triton.forward(s, k, number, mask, eps, largest, num)
    gates, levels = _solve_by_sorting(s, k, number, mask, eps, largest)
    indices = select_by_sorting(s, num, mask) if num > 0 else s.new_empty((*lead, 0), dtype=torch.int64)
    return gates, levels, indices


@torch.library.custom_op("xlroute::top_gates", mutates_args=())
def _forward_chosen(
    s: Tensor,
    k: Tensor | None,
    number: float,
    mask: Tensor | None,
    eps: float,
    largest: int | None,
    num: int,
    straight_through: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_forward`, with the gates of the ``num`` largest scores alone, [..., num]."""
    lead = s.shape[:-1]
    if s.numel() == 0 or num == 0:
        levels = s.new_zeros((3, *lead), dtype=torch.float64)
        return s.new_zeros((*lead, num)), levels, s.new_zeros((*lead, num), dtype=torch.int64)
    largest, in_triton = _plan(s, k, largest, num, backend)
    if in_triton:
        from xlroute.kernels import water_level_triton

        return water_level_triton.forward_chosen(s, k, number, mask, eps, largest, num, straight_through)
    gates, levels = _solve_by_sorting(s, k, number, mask, eps, largest)
    indices = select_by_sorting(s, num, mask)
    chosen = gates.gather(-1, indices.clamp(min=0))
    if straight_through:
        chosen = torch.where(chosen.isnan(), chosen, 1.0)
    return chosen.masked_fill_(indices < 0, 0.0), levels, indices


def _plan(s: Tensor, k: Tensor | None, largest: int | None, num: int, backend: str) -> tuple[int, bool]:
    """A bound on the budgets, between 1 and n, and whether Triton solves for them."""
    n = s.shape[-1]
    if backend == "triton":
        from xlroute.kernels import water_level_triton

        if largest is None:
            largest = n if water_level_triton.sorts_whole_rows(s) else _largest_budget(k, n)
        if water_level_triton.can_select(s, max(largest, num)):
            return largest, True
    if largest is None:
        largest = _largest_budget(k, n)
    return min(max(largest, 1), n), False


def _largest_budget(k: Tensor | None, n: int) -> int:
    """The largest ceil(k) of all rows, read by the host."""
    assert k is not None  # a number comes with a bound
    return int(k.nan_to_num(nan=0.0).amax().clamp(0, n).ceil())


def _solve_by_sorting(
    s: Tensor, k: Tensor | None, number: float, mask: Tensor | None, eps: float, largest: int
) -> tuple[Tensor, Tensor]:
    """The reference of the gates and levels: one top-k of ``largest`` and one logsumexp.

    The levels are float64 [3, ...]: the shift of the scores z = (s - shift) / eps, the level c, with ln λ = z
    + c below saturation, and what saturated gates leave of the budget.
    """
    with torch.autocast(s.device.type, enabled=False):
        n = s.shape[-1]
        if k is None:
            k = torch.full(s.shape[:-1], number, dtype=torch.float64, device=s.device)
        scores = _masked_scores(s, mask)
        invalid = scores == -math.inf
        valid = n - invalid.sum(-1)
        top = scores.topk(largest, dim=-1).values

        # Scores are taken relative to the last one that the budget can reach in its row.
        picks = torch.minimum(k.nan_to_num(nan=0.0).clamp(0, largest).ceil().long(), valid)
        shift = top.gather(-1, (picks - 1).clamp(min=0)[..., None])[..., 0]
        shift = torch.where(shift.isfinite(), shift, 0.0)
        z = _offset(scores, shift, eps)
        below = z < 0
        # Scores at the shift and beyond the top are ties with it: each adds exp(0).
        tail = exp_flushed_(torch.where(below, z, -math.inf)).sum(-1, dtype=torch.float64)
        tail = tail + (~below & ~invalid).sum(-1) - picks

        # suffix[j]: logsumexp of all scores but the j largest. The top is summed from its small end; "total
        # minus prefix" would cancel.
        order = torch.arange(top.shape[-1], device=s.device)
        z_top = _offset(top, shift, eps).to(torch.float64)
        z_top = z_top.masked_fill(order >= picks[..., None], -math.inf)
        suffix = z_top.flip(-1).logcumsumexp(-1).flip(-1)
        suffix = torch.logaddexp(suffix, tail.clamp(min=0).log()[..., None])

        # The j largest are saturated for the smallest j at which the next one is not.
        log_left = (k[..., None] - order).clamp(min=0).log()
        too_high = (log_left + z_top > suffix) & (order < picks[..., None] - 1)
        j = too_high.sum(-1, keepdim=True)
        level = (log_left.gather(-1, j) - suffix.gather(-1, j))[..., 0]
        level = torch.where(k >= valid, math.inf, level)
        level = torch.where(k <= 0, -math.inf, level)
        # topk takes NaN for the largest of all, so a row that holds NaN or +inf shows it first.
        level = torch.where(top[..., 0] < math.inf, level, math.nan)
        level = torch.where(k.isnan(), math.nan, level)

        gates = exp_flushed_(z.add_(level.to(z.dtype)[..., None]).clamp_(max=0)).masked_fill_(invalid, 0.0)
        left = k - j[..., 0]
        return gates.to(s.dtype).contiguous(), torch.stack((shift.to(torch.float64), level, left))


@torch.library.custom_op("xlroute::soft_topk_backward", mutates_args=())
def _backward(
    grad: Tensor, s: Tensor, mask: Tensor | None, levels: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores [..., n] and of the budget [...], in the closed form of `soft_topk`."""
    if backend == "triton" and s.numel() > 0:
        from xlroute.kernels import water_level_triton

        if water_level_triton.can_address(s):
            return water_level_triton.backward(grad, s, mask, levels, eps)
    with torch.autocast(s.device.type, enabled=False):
        shift, level, _ = levels.unbind(0)
        scores = _masked_scores(s, mask)
        z = _offset(scores, shift, eps).add_(level.to(scores.dtype)[..., None])
        # ~(z < 0) would drop NaN, which has to pass on into the gradient of its row.
        free = ~((z >= 0) | (scores == -math.inf))
        gates = exp_flushed_(torch.where(free, z, -math.inf))
        weighted = gates * grad
        left = gates.sum(-1, dtype=torch.float64)
        dk = weighted.sum(-1, dtype=torch.float64) / torch.where(left == 0, 1.0, left)
        ds = weighted.sub_(gates.mul_(dk.to(gates.dtype)[..., None])).div_(eps)
        return ds.to(s.dtype).contiguous(), dk


@torch.library.custom_op("xlroute::top_gates_backward", mutates_args=())
def _backward_chosen(
    grad: Tensor,
    indices: Tensor,
    s: Tensor,
    mask: Tensor | None,
    levels: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `_backward`, from the gradients [..., num] of the gates at the indices [..., num] alone."""
    if backend == "triton" and s.numel() > 0 and indices.numel() > 0:
        from xlroute.kernels import water_level_triton

        if water_level_triton.can_address(s):
            return water_level_triton.backward_chosen(grad, indices, s, mask, levels, eps)
    dense = grad.new_zeros((*s.shape[:-1], s.shape[-1] + 1))
    # Where there is no entry, the gradient goes to one past the end, which is cut off again.
    dense.scatter_(-1, torch.where(indices < 0, s.shape[-1], indices), grad)
    ds, dk = _backward(dense[..., :-1], s, mask, levels, eps, "torch")
    return ds, dk


@_forward.register_fake
def _(
    s: Tensor,
    k: Tensor | None,
    number: float,
    mask: Tensor | None,
    eps: float,
    largest: int | None,
    num: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = s.shape[:-1]
    levels = s.new_empty((3, *lead), dtype=torch.float64)
    return s.new_empty(s.shape), levels, s.new_empty((*lead, num), dtype=torch.int64)


@_forward_chosen.register_fake
def _(
    s: Tensor,
    k: Tensor | None,
    number: float,
    mask: Tensor | None,
    eps: float,
    largest: int | None,
    num: int,
    straight_through: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = s.shape[:-1]
    levels = s.new_empty((3, *lead), dtype=torch.float64)
    return s.new_empty((*lead, num)), levels, s.new_empty((*lead, num), dtype=torch.int64)


@_backward.register_fake
def _(
    grad: Tensor, s: Tensor, mask: Tensor | None, levels: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), s.new_empty(s.shape[:-1], dtype=torch.float64)


@_backward_chosen.register_fake
def _(
    grad: Tensor,
    indices: Tensor,
    s: Tensor,
    mask: Tensor | None,
    levels: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), s.new_empty(s.shape[:-1], dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    s, k, _, mask, ctx.eps, _, _, ctx.backend = inputs
    ctx.has_budgets = k is not None
    ctx.save_for_backward(s, mask, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    s, mask, levels = ctx.saved_tensors
    ds = dk = None
    if grad is not None:
        ds, dk = _backward(grad, s, mask, levels, ctx.eps, ctx.backend)
    return ds, dk if ctx.has_budgets else None, None, None, None, None, None, None


def _setup_chosen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    s, k, _, mask, ctx.eps, _, _, _, ctx.backend = inputs
    ctx.has_budgets = k is not None
    _, levels, indices = output
    ctx.save_for_backward(s, mask, levels, indices)
    ctx.set_materialize_grads(False)


def _autograd_chosen(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    s, mask, levels, indices = ctx.saved_tensors
    ds = dk = None
    if grad is not None:
        ds, dk = _backward_chosen(grad, indices, s, mask, levels, ctx.eps, ctx.backend)
    return ds, dk if ctx.has_budgets else None, None, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
_forward_chosen.register_autograd(_autograd_chosen, setup_context=_setup_chosen)
