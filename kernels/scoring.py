"""Scores of memory rows against routing tokens, in an order of summation that never changes."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_floating, compute_dtype, resolve_backend

Normalize = Literal["rms", "l2"]

RMS_EPS = 1e-6  # added to the mean of squares
L2_EPS = 1e-12  # added to the sum of squares

_BLOCK = 1 << 18  # elements of one temporary: 1 MiB of float32, about a core's L2 cache
_BLOCK_ON_GPU = 1 << 26  # there is no cache to stay in; the temporary is bounded at 256 MiB of float32
_WIDEST_SUM = 1 << 14  # half the length from which a CPU shares one sum out over threads


def row_scores(
    rows: Tensor,
    tokens: Tensor,
    *,
    normalize: Normalize | None,
    scale: float = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """Scores of every row against every routing token: scale * <row / norm(row), token>.

    norm is sqrt(mean(row²) + 1e-6) for "rms" (RMSNorm without a gain, Zhang & Sennrich, arXiv 1910.07467) and
    sqrt(sum(row²) + 1e-12) for "l2".

    The score of a row is the same, bit for bit, whatever other rows it is scored with, in whatever batch, at
    whatever offset and stride of a larger buffer, and with any number of threads: it is summed in an order
    that depends on d alone, and in Triton on the number of tokens and the dtypes besides, which no matrix
    product promises. So scores may be kept and compared with scores that the same backend computes later.

    Rows may be a view of a buffer that grows: they are not copied, and while they need no gradient, writing
    elsewhere into the buffer before the backward is allowed. The rows themselves must still be there. Triton
    does not read blocks of rows whose scores all have a gradient of exactly 0. There is no second derivative.

    Args:
        rows: [..., m, d].
        tokens: [..., r, d]; the leading dimensions of both broadcast.
        normalize: "rms", "l2", or None to score the rows as they are.
        scale: a factor on every score.
        backend: "torch", "triton", or None to pick by device.

    Returns:
        Scores [..., r, m], float64 for float64 rows and float32 for all others, under autocast too.

    Raises:
        TypeError: ``rows`` or ``tokens`` is not a floating-point tensor.
        ValueError: the shapes do not fit, the devices differ, ``normalize`` is unknown, ``scale`` is not
            finite, or the backend cannot run here.
    """
    check_floating("rows", rows)
    check_floating("tokens", tokens)
    if rows.ndim < 2 or tokens.ndim < 2 or rows.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"rows [..., m, d] and tokens [..., r, d] must share d, got shapes {tuple(rows.shape)} and "
            f"{tuple(tokens.shape)}"
        )
    if rows.device != tokens.device:
        raise ValueError(f"tokens must be on the device of rows, {rows.device}, got {tokens.device}")
    if normalize not in ("rms", "l2", None):
        raise ValueError(f"normalize must be 'rms', 'l2' or None, got {normalize!r}")
    # Compared, not math.isfinite(scale), which torch.compile cannot trace for one that changes between calls.
    if not abs(scale) < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    backend = resolve_backend(backend, rows)
    try:
        lead = torch.broadcast_shapes(rows.shape[:-2], tokens.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(
            f"the leading dimensions of rows and tokens must broadcast, got shapes {tuple(rows.shape)} and "
            f"{tuple(tokens.shape)}"
        ) from error
    rows = rows.expand(*lead, *rows.shape[-2:])
    tokens = tokens.expand(*lead, *tokens.shape[-2:])
    scores: Tensor
    scores, _ = _forward(rows, tokens, normalize, float(scale), backend)
    return scores


def blocks(sizes: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cuts an array of ``sizes`` into blocks of at most ``limit`` entries, whole inner dimensions first."""
    steps: list[int] = []
    room = limit
    for size in reversed(sizes):
        step = max(1, min(size, room))
        room = room // step if step == size else 0
        steps.append(step)
    steps.reverse()
    starts = (range(0, size, step) for size, step in zip(sizes, steps, strict=True))
    for start in itertools.product(*starts):
        yield tuple(slice(at, at + step) for at, step in zip(start, steps, strict=True))


def _fixed_order_dot(x: Tensor, y: Tensor, shape: tuple[int, ...], scratch: Tensor) -> Tensor:
    """<x, y> over the last dimension of what broadcasts to ``shape``, in an order that depends on d alone.

    The products go to the front of ``scratch``: contiguous, whatever the strides of x and y are, and in
    memory that stays in the cache from block to block. Halving them by elementwise additions fixes the order
    on any device. On a CPU the library's own sum of a contiguous last dimension also treats each row alone
    and is twice as fast; only a single wide sum may be shared out over threads there, so wide ones are halved
    first.
    """
    products = scratch[: math.prod(shape)].view(shape)
    torch.mul(x, y, out=products)
    widest = _WIDEST_SUM if products.device.type == "cpu" else 1
    width = products.shape[-1]
    while width > widest:
        half = width // 2
        products[..., :half].add_(products[..., width - half : width])
        width -= half
    return products[..., :width].sum(-1)


def _block_size(rows: Tensor, width: int) -> int:
    """How many rows one block takes, if a temporary holds ``width`` elements for each."""
    return max(1, (_BLOCK if rows.device.type == "cpu" else _BLOCK_ON_GPU) // max(width, 1))


@torch.library.custom_op("xlroute::row_scores", mutates_args=())
def _forward(
    rows: Tensor, tokens: Tensor, normalize: str | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Scores [..., r, m], and 1 / norm [..., m] for the backward."""
    if backend == "triton" and rows.numel() > 0 and tokens.numel() > 0:
        from xlroute.kernels import scoring_triton

        return scoring_triton.forward(
            rows, tokens, normalize, scale, eps=L2_EPS if normalize == "l2" else RMS_EPS
        )
    with torch.autocast(rows.device.type, enabled=False):
        dtype = compute_dtype(rows.dtype)
        *lead, m, d = rows.shape
        r = tokens.shape[-2]
        squares = torch.zeros((*lead, m), dtype=dtype, device=rows.device)
        scores = torch.zeros((*lead, r, m), dtype=dtype, device=rows.device)
        if d > 0 and scores.numel() > 0:
            tokens = tokens.to(dtype)[..., :, None, :]
            limit = _block_size(rows, r * d)
            scratch = torch.empty(min(limit, squares.numel()) * r * d, dtype=dtype, device=rows.device)
            for *outer, inner in blocks((*lead, m), limit):
                block = rows[(*outer, inner)].to(dtype)
                shape = (*block.shape[:-2], r, *block.shape[-2:])
                part = _fixed_order_dot(block[..., None, :, :], tokens[tuple(outer)], shape, scratch)
                scores[(*outer, slice(None), inner)] = part
                if normalize is not None:
                    squares[(*outer, inner)] = _fixed_order_dot(block, block, block.shape, scratch)
        if normalize == "rms":
            inverse = squares.div_(max(d, 1)).add_(RMS_EPS).sqrt_().reciprocal_()
        elif normalize == "l2":
            inverse = squares.add_(L2_EPS).sqrt_().reciprocal_()
        else:
            inverse = squares.fill_(1.0)
        scores.mul_((inverse * scale)[..., None, :])
        return scores, inverse


@torch.library.custom_op("xlroute::row_scores_backward_tokens", mutates_args=())
def _backward_tokens(
    grad: Tensor, rows: Tensor, tokens: Tensor, inverse: Tensor, scale: float, backend: str
) -> Tensor:
    """Gradient of the tokens: (grad * scale / norm) @ rows, block by block of rows."""
    if backend == "triton" and rows.numel() > 0 and tokens.numel() > 0:
        from xlroute.kernels import scoring_triton

        return scoring_triton.backward_tokens(grad, rows, tokens, inverse, scale)
    with torch.autocast(rows.device.type, enabled=False):
        *lead, m, d = rows.shape
        weights = grad * (inverse * scale)[..., None, :]
        result = torch.zeros(tokens.shape, dtype=weights.dtype, device=rows.device)
        for *outer, inner in blocks((*lead, m), _block_size(rows, d)):
            part = weights[(*outer, slice(None), inner)] @ rows[(*outer, inner)].to(weights.dtype)
            result[tuple(outer)].add_(part)
        return result.to(tokens.dtype)


@torch.library.custom_op("xlroute::row_scores_backward_rows", mutates_args=())
def _backward_rows(
    grad: Tensor,
    rows: Tensor,
    tokens: Tensor,
    inverse: Tensor,
    normalize: str | None,
    scale: float,
    backend: str,
) -> Tensor:
    """Gradient of the rows: with v = gradᵀ @ tokens, scale / norm * (v - row <row, v> / (norm² count)).

    The second term is the gradient through the norm: count is d for "rms" and 1 for "l2", and without a norm
    the term is absent.
    """
    if backend == "triton" and rows.numel() > 0 and tokens.numel() > 0:
        from xlroute.kernels import scoring_triton

        return scoring_triton.backward_rows(grad, rows, tokens, inverse, normalize, scale)
    with torch.autocast(rows.device.type, enabled=False):
        *lead, m, d = rows.shape
        result = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
        tokens = tokens.to(grad.dtype)
        count = d if normalize == "rms" else 1
        for *outer, inner in blocks((*lead, m), _block_size(rows, d)):
            block = rows[(*outer, inner)].to(grad.dtype)
            over_norm = inverse[(*outer, inner)][..., None]
            part = grad[(*outer, slice(None), inner)].mT @ tokens[tuple(outer)]
            if normalize is not None:
                part = part - block * ((block * part).sum(-1, keepdim=True) * over_norm * over_norm / count)
            result[(*outer, inner)] = part * (over_norm * scale)
        return result


@_forward.register_fake
def _(
    rows: Tensor, tokens: Tensor, normalize: str | None, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    *lead, m, _ = rows.shape
    dtype = compute_dtype(rows.dtype)
    return rows.new_empty((*lead, tokens.shape[-2], m), dtype=dtype), rows.new_empty((*lead, m), dtype=dtype)


@_backward_tokens.register_fake
def _(grad: Tensor, rows: Tensor, tokens: Tensor, inverse: Tensor, scale: float, backend: str) -> Tensor:
    return tokens.new_empty(tokens.shape)


@_backward_rows.register_fake
def _(
    grad: Tensor,
    rows: Tensor,
    tokens: Tensor,
    inverse: Tensor,
    normalize: str | None,
    scale: float,
    backend: str,
) -> Tensor:
    return rows.new_empty(rows.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, tokens, ctx.normalize, ctx.scale, ctx.backend = inputs
    # `data` has a version counter of its own: rows are often a view of a buffer that gets longer before the
    # backward runs, and autograd would take that for a change of the rows.
    ctx.save_for_backward(rows if rows.requires_grad else rows.data, tokens, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, tokens, inverse = ctx.saved_tensors
    needs_rows, needs_tokens, *_ = ctx.needs_input_grad
    d_rows = d_tokens = None
    if grad is None:
        return None, None, None, None, None
    if needs_rows:
        d_rows = _backward_rows(grad, rows, tokens, inverse, ctx.normalize, ctx.scale, ctx.backend)
    if needs_tokens:
        d_tokens = _backward_tokens(grad, rows, tokens, inverse, ctx.scale, ctx.backend)
    return d_rows, d_tokens, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
