"""Soft top-k by coordinate descent, with one scalar of state a row."""

import math
from typing import Any

import torch
from torch import Tensor

from xlroute.kernels.arguments import (
    Backend,
    budget_per_row,
    check_eps,
    check_mask,
    check_scores,
    compute_dtype,
    resolve_backend,
)
from xlroute.kernels.exponential import exp_flushed_


def coordinate_descent(
    s: Tensor,
    *,
    k: float | Tensor,
    n_iters: int,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Soft top-k gates of each row of scores, after ``n_iters`` iterations of coordinate descent.

    With b_0 = -s, for t = 1..T::

        a_t = ε_t (ln k - logsumexp((s + b_{t-1}) / ε_t)),    b_t = -relu(s + a_t)

    and gates = exp((s + a_T + b_T) / ε_{T+1}). The temperature is ε_1 = ``eps_init`` (``eps`` if None) in the
    first iteration and is decayed after every one, the last included: ε_{t+1} = max(ε_t ``eps_decay``, eps).
    So the gates use the temperature after T decays. (Wright, arXiv 1502.04759; CoLT5, arXiv 2303.09752; the
    decay, arXiv 2304.04947.)

    Since s + b_t = min(s, -a_t), the state is one scalar a row, and what the backward keeps besides ``s`` is
    three scalars a row and iteration. The gradient is exactly that of the unrolled iterations; where a score
    lies exactly at its threshold, its gate counts as saturated and has no gradient. There is no second
    derivative.

    The gates of a row sum to ``k`` only once the iterations have converged; `soft_topk` is their limit. A
    score of -inf counts as masked, +inf as always chosen. A NaN makes the gates and gradients of its row NaN,
    of no other.

    Args:
        s: scores, [..., n]. Computed in float32, or float64 if given float64, under autocast too.
        k: the budget of a row, a number or a tensor that broadcasts to [...]; it may be fractional. Rows with
            k <= 0 get zero gates.
        n_iters: the number of iterations T, at least 1.
        eps: the final temperature, in the units of the scores.
        eps_init: the first temperature, at least ``eps``.
        eps_decay: the factor from one iteration to the next, in (0, 1].
        mask: bool, broadcasts to [..., n]; False entries get a gate of 0 and no gradient.
        backend: "torch", "triton", or None to pick by device.

    Returns:
        The gates in [0, 1], of the shape and dtype of ``s``.

    Raises:
        TypeError: ``s`` is not floating point, ``mask`` not bool, ``k`` not real or ``n_iters`` not an int.
        ValueError: a shape does not broadcast, a number is out of its range, or the backend cannot run here.
    """
    check_scores(s)
    check_mask(mask, s)
    check_eps(eps)
    if isinstance(n_iters, bool) or not isinstance(n_iters, int):
        raise TypeError(f"n_iters must be an int, got {type(n_iters).__name__}")
    if n_iters < 1:
        raise ValueError(f"n_iters must be at least 1, got {n_iters}")
    eps_init = eps if eps_init is None else eps_init
    if not eps <= eps_init < math.inf:
        raise ValueError(f"eps_init must be finite and at least eps = {eps}, got {eps_init}")
    if not 0 < eps_decay <= 1:
        raise ValueError(f"eps_decay must be in (0, 1], got {eps_decay}")
    backend = resolve_backend(backend, s)
    budget = budget_per_row(k, s)
    gates: Tensor
    gates, _ = _forward(s, budget, mask, n_iters, float(eps), float(eps_init), float(eps_decay), backend)
    return gates


def temperatures(n_iters: int, eps: float, eps_init: float, eps_decay: float) -> list[float]:
    """The temperatures of the iterations 1..T, followed by that of the gates: T + 1 numbers."""
    schedule = [eps_init]
    for _ in range(n_iters):
        schedule.append(max(schedule[-1] * eps_decay, eps))
    return schedule


def _below_threshold(s: Tensor, a: Tensor) -> Tensor:
    """min(s + a, 0) for scores [..., n] and float64 thresholds [...].

    The threshold is added in two parts, its rounding to the dtype of ``s`` and the rest. s + a is exact where
    the two nearly cancel, which is where a gate changes, so the rest (about a * 6e-8 in float32, which ε
    magnifies) is not lost.
    """
    high = a.to(s.dtype)
    x = s + high[..., None]
    if s.dtype != torch.float64:
        x += (a - high.to(torch.float64)).to(s.dtype)[..., None]
    return x.clamp_(max=0)


def _prepare(s: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in the compute dtype with -inf where they cannot be chosen, and which rows have no choice."""
    s = s.to(compute_dtype(s.dtype))
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    idle = (k <= 0) | (s == -math.inf).all(-1)
    return s, idle


@torch.library.custom_op("xlroute::coordinate_descent", mutates_args=())
def _forward(
    s: Tensor,
    k: Tensor,
    mask: Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gates [..., n], and float64 scalars [3, T, ...]: a_t, ln Σ_t and P_t of `_backward`."""
    if backend == "triton" and s.numel() > 0:
        from xlroute.kernels import descent_triton

        return descent_triton.forward(s, k, mask, n_iters, eps, eps_init, eps_decay)
    with torch.autocast(s.device.type, enabled=False):
        state = s.new_zeros((3, n_iters, *s.shape[:-1]), dtype=torch.float64)
        if s.numel() == 0:
            return s.new_zeros(s.shape), state
        schedule = temperatures(n_iters, eps, eps_init, eps_decay)
        scores, idle = _prepare(s, k, mask)
        log_k = k.masked_fill(idle, 1.0).log()
        top = scores.amax(-1).to(torch.float64).masked_fill(idle, 0.0)
        valid = (scores != -math.inf).sum(-1).to(torch.float64).masked_fill(idle, 1.0)
        a = torch.where(top.isnan(), top, schedule[0] * (log_k - valid.log()))
        state[0, 0] = a
        for t in range(1, n_iters):
            # The largest exponent is 0 unless every score is below the threshold; then it is subtracted, so
            # that the sum cannot underflow.
            peak = (top + a).clamp(max=0)
            x = _below_threshold(scores, a)
            saturated = s.shape[-1] - x.count_nonzero(-1)
            shift = peak.to(x.dtype)
            total = exp_flushed_(x.sub_(shift[..., None]).div_(schedule[t])).sum(-1, dtype=torch.float64)
            total = total.masked_fill(idle, 1.0)
            log_total = shift.to(torch.float64) / schedule[t] + total.log()
            state[1, t] = log_total
            state[2, t] = saturated / total
            a = a + schedule[t] * (log_k - log_total)
            state[0, t] = a
        gates = exp_flushed_(_below_threshold(scores, a).div_(schedule[-1]))
        gates = gates.masked_fill_(idle[..., None] | (scores == -math.inf), 0.0)
        return gates.to(s.dtype).contiguous(), state


@torch.library.custom_op("xlroute::coordinate_descent_backward", mutates_args=())
def _backward(
    grad: Tensor,
    s: Tensor,
    k: Tensor,
    mask: Tensor | None,
    state: Tensor,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores [..., n] and of the budget [...], from the scalars that `_forward` returned.

    With the softmax of iteration t over min(s, -a_{t-1}) / ε_t, and P_t its mass on the saturated scores::

        u   = grad gates / ε_{T+1}  where s < -a_T, else 0
        ā_T = Σ u,    ā_{t-1} = ā_t P_t
        ds  = u - Σ_{t≥2} ā_t softmax_t [s < -a_{t-1}],    dk = Σ_t ā_t ε_t / k
    """
    if backend == "triton" and s.numel() > 0:
        from xlroute.kernels import descent_triton

        return descent_triton.backward(grad, s, k, mask, state, n_iters, eps, eps_init, eps_decay)
    with torch.autocast(s.device.type, enabled=False):
        if s.numel() == 0:
            return s.new_zeros(s.shape), torch.zeros_like(k).contiguous()
        schedule = temperatures(n_iters, eps, eps_init, eps_decay)
        a, log_total, saturated_mass = state.unbind(0)
        scores, idle = _prepare(s, k, mask)
        x = _below_threshold(scores, a[-1])
        # "Not saturated" is written as ~(x >= 0), here and below, so that NaN passes on into the gradient.
        saturated = (x >= 0) | idle[..., None] | (scores == -math.inf)
        u = exp_flushed_(x.div_(schedule[-1])).mul_(grad).div_(schedule[-1])
        ds = u.masked_fill_(saturated, 0.0)
        a_bar = ds.sum(-1, dtype=torch.float64)
        dk = a_bar * schedule[n_iters - 1]
        for t in range(n_iters - 1, 0, -1):
            x = _below_threshold(scores, a[t - 1])
            saturated = x >= 0
            softmax = exp_flushed_(x.div_(schedule[t]).sub_(log_total[t].to(x.dtype)[..., None]))
            ds.sub_(softmax.masked_fill_(saturated, 0.0).mul_(a_bar.to(x.dtype)[..., None]))
            a_bar = a_bar * saturated_mass[t]
            dk = dk + a_bar * schedule[t - 1]
        ds = ds.masked_fill_(idle[..., None] | (scores == -math.inf), 0.0)
        dk = (dk / k).masked_fill(idle, 0.0)
        return ds.to(s.dtype).contiguous(), dk


@_forward.register_fake
def _(
    s: Tensor,
    k: Tensor,
    mask: Tensor | None,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), s.new_empty((3, n_iters, *s.shape[:-1]), dtype=torch.float64)


@_backward.register_fake
def _(
    grad: Tensor,
    s: Tensor,
    k: Tensor,
    mask: Tensor | None,
    state: Tensor,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    s, k, mask, *ctx.settings = inputs
    ctx.save_for_backward(s, k, mask, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    s, k, mask, state = ctx.saved_tensors
    ds, dk = _backward(grad, s, k, mask, state, *ctx.settings)
    return ds, dk, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
