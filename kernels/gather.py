"""Gather of chosen rows and their gates, and scatter of rows back to their places; -1 stands for no row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xlroute.kernels.arguments import (
    HAS_TRITON,
    Backend,
    check_floating,
    check_index_type,
    check_range,
    compute_dtype,
    resolve_backend,
)

VECTOR = 16  # bytes that one thread of a GPU reads at once
_ALL_PAIRS = 1 << 14  # indices of a stream up to which Triton compares all pairs, instead of sorting them


def gather_rows(x: Tensor, indices: Tensor, backend: Backend | None = None) -> Tensor:
    """The rows of each stream at its indices; -1 gathers zeros.

    Differentiable in ``x``: the gradients of a row that is gathered several times add up, in a fixed order.
    ``x`` may be any view and is not copied.

    Args:
        x: rows, [b, m, d].
        indices: int64, [b, ...], each in [-1, m).
        backend: "torch", "triton", or None to pick by device.

    Returns:
        The gathered rows, [b, ..., d], in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not floating point or ``indices`` not int64.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
        IndexError: an index is outside [-1, m). Only checked on a CPU and outside torch.compile: elsewhere
            the check would have to wait for the device, and Triton gathers NaN instead.
    """
    _check("x", x, indices)
    backend = resolve_backend(backend, x)
    rows: Tensor
    rows, _ = _gather(x, None, indices, False, backend)
    return rows


def gather_rows_apart(streams: Sequence[Tensor], indices: Tensor, backend: Backend | None = None) -> Tensor:
    """As `gather_rows`, for streams whose rows lie apart and are not equally many. There is no gradient.

    Triton takes one launch for all streams where their rows begin 16 bytes apart, or a multiple of that. It
    has to be told where they are, which no CUDA graph could learn later: while one is captured, and for rows
    at other addresses, each stream takes a launch.

    Args:
        streams: the rows of each, b tensors [m_i, d], contiguous, of one dtype and device.
        indices: int64, [b, ...], each in [-1, m_i).
        backend: as for `gather_rows`.

    Returns:
        The gathered rows, [b, ..., d].

    Raises:
        TypeError, ValueError, IndexError: as `gather_rows`.
    """
    if not 0 < len(streams) == len(indices):
        raise ValueError(
            f"streams must be as many as indices [b, ...], at least 1, got {len(streams)} and {len(indices)}"
        )
    for x, index in zip(streams, indices, strict=True):
        _check("streams", x[None], index[None])
    rows: Tensor = _gather_apart(list(streams), indices, resolve_backend(backend, indices))
    return rows


def row_places(addresses: Sequence[int], counts: Sequence[int], device: torch.device) -> list[int] | None:
    """Where the rows of streams are, for `gather_rows_at`.

    Args:
        addresses: of the first row of each stream; the rows of a stream follow one another.
        counts: how many rows each stream has.
        device: of the rows, as they name it.

    Returns:
        A number for the address of each stream. None where there are no streams, or where one begins at an
        address that is no multiple of 16 bytes.

    Raises:
        ValueError: there are not as many counts as addresses.
    """
    origin = _origin(device).data_ptr()
    apart = [address - origin if count else 0 for address, count in zip(addresses, counts, strict=True)]
    return [each // VECTOR for each in apart] if apart and not any(each % VECTOR for each in apart) else None


def gather_rows_at(places: Tensor, counts: Tensor, indices: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """As `gather_rows_apart`, for rows that are known by where they are.

    So the rows of a large memory are no inputs of a CUDA graph, which would be copied each time that it runs,
    and it can read others each time. The caller keeps the rows as they are until they are read; with
    `torch._functorch.config.activation_memory_budget` below 1, PyTorch's compiler may read them once more
    in the backward. Needs Triton.

    Args:
        places: int64 [b], from `row_places`, on the device of the rows.
        counts: int64 [b], how many rows each stream has.
        indices: int64, [b, ...], each in [-1, m_i); -1 gathers zeros, and others out of range NaN.
        d: width of the rows.
        dtype: of the rows.

    Returns:
        The gathered rows, [b, ..., d].

    Raises:
        TypeError, ValueError: a tensor is not int64, the shapes or devices do not fit, or there is no Triton.
    """
    check_index_type(indices)
    for name, tensor in (("places", places), ("counts", counts)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
        if tensor.shape != indices.shape[:1] or tensor.device != indices.device:
            raise ValueError(
                f"{name} must have shape {tuple(indices.shape[:1])} on {indices.device}, as indices "
                f"{tuple(indices.shape)}, got {tuple(tensor.shape)} on {tensor.device}"
            )
    resolve_backend("triton", indices)
    rows: Tensor = _gather_at(places, counts, indices, d, dtype)
    return rows


_origins: dict[torch.device, Tensor] = {}


def _origin(device: torch.device) -> Tensor:
    """What addresses are counted from: Triton knows by its own that reads are aligned."""
    origin = _origins.get(device)
    if origin is None:
        with torch.inference_mode(False):
            # Threads that are here at the same time have to get the same one.
            origin = _origins.setdefault(device, torch.empty(VECTOR, dtype=torch.uint8, device=device))
    return origin


def gather_pinned_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows in the host's pinned memory, gathered by a GPU, which reads those over the bus and no others.

    The host waits for nothing. There is no gradient.

    Args:
        x: rows, [m, d], in pinned memory.
        indices: int64, [k], on a GPU, each in [-1, m); -1 gathers zeros.

    Returns:
        The rows, [k, d], on the device of the indices.
    """
    if not HAS_TRITON:
        return gather_rows(x[None], indices.cpu()[None])[0].to(indices.device)
    if indices.numel() == 0 or x.numel() == 0:
        return x.new_zeros((indices.shape[0], x.shape[1]), device=indices.device)
    from xlroute.kernels import gather_triton

    rows = gather_triton.gather(x[None], None, indices[None])[0][0]
    # PyTorch hands out pinned memory again once all copies from it are done, and knows nothing of kernels.
    x[:1, :1].to(indices.device, non_blocking=True)
    return rows


def gather_gated_rows(
    x: Tensor,
    gates: Tensor,
    indices: Tensor,
    backend: Backend | None = None,
    *,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rows of each stream at its indices, as `gather_rows`, and the gates of the same rows, at once.

    Args:
        x: rows, [b, m, d].
        gates: the gates of all rows, [b, ..., m].
        indices: int64, [b, ..., k], each in [-1, m); the dimensions before the last are those of ``gates``.
        backend: "torch", "triton", or None to pick by device.
        straight_through: the gathered gates are 1 in value (a NaN stays), with the gradient of what they
            were (Bengio et al., arXiv 1308.3432).

    Returns:
        The gathered rows [b, ..., k, d] and gates [b, ..., k], both 0 where the index is -1.

    Raises:
        TypeError: ``x`` or ``gates`` is not floating point or ``indices`` not int64.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
        IndexError: as for `gather_rows`.
    """
    _check("x", x, indices)
    check_floating("gates", gates)
    if indices.ndim < 2 or gates.shape != (*indices.shape[:-1], x.shape[1]):
        raise ValueError(
            "gates must have shape [b, ..., m] for indices [b, ..., k] and x [b, m, d], got "
            f"{tuple(gates.shape)} for {tuple(indices.shape)} and {tuple(x.shape)}"
        )
    if gates.device != x.device:
        raise ValueError(f"gates must be on the device of x, {x.device}, got {gates.device}")
    backend = resolve_backend(backend, x)
    rows: Tensor
    chosen: Tensor
    rows, chosen = _gather(x, gates, indices, straight_through, backend)
    return rows, chosen


def scatter_rows(
    base: Tensor,
    rows: Tensor,
    indices: Tensor,
    backend: Backend | None = None,
    *,
    gates: Tensor | None = None,
    add: bool = False,
    other: Tensor | None = None,
    other_from: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """A copy of ``base`` with rows of each stream replaced, or added to; those at -1 are dropped.

    Differentiable in ``base``, ``rows``, ``gates``, ``other`` and ``residual``.

    Args:
        base: [b, n, d]; any view, as a vector that is expanded to all places.
        rows: [b, k, d], in the dtype of ``base``.
        indices: int64, [b, k], the places of the rows, each in [-1, n). Those of a stream are distinct, but
            for -1.
        backend: "torch", "triton", or None to pick by device.
        gates: [b, k], factors on the rows. The products are rounded once, to the dtype of ``base``.
        add: the rows are added to those of ``base`` instead of replacing them; rounded once too.
        other: [d], added to all other rows of ``base``.
        other_from: the first place to which it is added.
        residual: [b, n, d], in the dtype of ``base``, added to all of the result before it is rounded.

    Returns:
        [b, n, d].

    Raises:
        TypeError: ``base``, ``rows``, ``gates`` or ``other`` is not floating point, ``rows`` or ``residual``
            is of another dtype than ``base``, or ``indices`` is not int64.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
        IndexError: an index is outside [-1, n). Only checked on a CPU and outside torch.compile: elsewhere
            the check would have to wait for the device, and Triton drops the row instead.
    """
    _check("base", base, indices)
    check_floating("rows", rows)
    if rows.dtype != base.dtype:
        raise TypeError(f"rows must have the dtype of base, {base.dtype}, got {rows.dtype}")
    if indices.ndim != 2 or rows.shape != (*indices.shape, base.shape[-1]):
        raise ValueError(
            "rows must have shape [b, k, d] for indices [b, k] and base [b, n, d], got "
            f"{tuple(rows.shape)} for {tuple(indices.shape)} and {tuple(base.shape)}"
        )
    if rows.device != base.device:
        raise ValueError(f"rows must be on the device of base, {base.device}, got {rows.device}")
    if gates is not None:
        check_floating("gates", gates)
        if gates.shape != indices.shape:
            raise ValueError(
                f"gates must have the shape of indices, {tuple(indices.shape)}, got {tuple(gates.shape)}"
            )
        if gates.device != base.device:
            raise ValueError(f"gates must be on the device of base, {base.device}, got {gates.device}")
    if other is not None:
        check_floating("other", other)
        if other.shape != base.shape[-1:]:
            raise ValueError(f"other must have shape {tuple(base.shape[-1:])}, got {tuple(other.shape)}")
        if other.device != base.device:
            raise ValueError(f"other must be on the device of base, {base.device}, got {other.device}")
    if not 0 <= other_from <= base.shape[1]:
        raise ValueError(f"other_from must be in [0, {base.shape[1]}], got {other_from}")
    if residual is not None:
        if residual.dtype != base.dtype:
            raise TypeError(f"residual must have the dtype of base, {base.dtype}, got {residual.dtype}")
        if residual.shape != base.shape:
            raise ValueError(
                f"residual must have the shape of base, {tuple(base.shape)}, got {tuple(residual.shape)}"
            )
        if residual.device != base.device:
            raise ValueError(f"residual must be on the device of base, {base.device}, got {residual.device}")
    backend = resolve_backend(backend, base)
    result: Tensor = _scatter(base, rows, gates, indices, other, residual, add, other_from, backend)
    return result


def _check(name: str, x: Tensor, indices: Tensor) -> None:
    """The checks that are common to all: x [b, m, d], and indices [b, ...] into its rows."""
    check_floating(name, x)
    check_index_type(indices)
    if x.ndim != 3 or indices.ndim < 1 or indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"{name} must have shape [b, m, d] and indices [b, ...] with the same b, got {tuple(x.shape)} "
            f"and {tuple(indices.shape)}"
        )
    if indices.device != x.device:
        raise ValueError(f"indices must be on the device of {name}, {x.device}, got {indices.device}")
    check_range(indices, x.shape[1])


@torch.library.custom_op("xlroute::gather_rows", mutates_args=())
def _gather(
    x: Tensor, gates: Tensor | None, indices: Tensor, straight_through: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Rows [b, ..., d] and their gates [b, ...], without gates [0]."""
    b, m, d = x.shape
    if backend == "triton" and indices.numel() > 0 and d > 0:
        from xlroute.kernels import gather_triton

        return gather_triton.gather(x, gates, indices, straight_through)
    nowhere = indices < 0
    if m == 0 or indices.numel() == 0:
        rows = x.new_zeros((*indices.shape, d))
        return rows, x.new_empty(0) if gates is None else gates.new_zeros(indices.shape)
    at = indices.clamp(min=0)
    stream = torch.arange(b, device=x.device).view(b, *[1] * (indices.ndim - 1))
    rows = x[stream, at].masked_fill_(nowhere[..., None], 0.0).contiguous()
    if gates is None:
        return rows, x.new_empty(0)
    chosen = gates.gather(-1, at)
    if straight_through:
        chosen = torch.where(chosen.isnan(), chosen, 1.0)
    return rows, chosen.masked_fill_(nowhere, 0.0)


@torch.library.custom_op("xlroute::gather_rows_apart", mutates_args=())
def _gather_apart(streams: list[Tensor], indices: Tensor, backend: str) -> Tensor:
    """Rows [b, ..., d] of streams [m_i, d]."""
    d = streams[0].shape[1]
    flat = indices.reshape(len(streams), -1)
    rows = torch.empty((*flat.shape, d), dtype=streams[0].dtype, device=flat.device)
    if backend == "triton" and rows.numel() > 0:
        from xlroute.kernels import gather_triton

        gather_triton.gather_apart(streams, flat, rows)
    else:
        for x, index, out in zip(streams, flat, rows, strict=True):
            if len(x):
                torch.index_select(x, 0, index.clamp(min=0), out=out)
        rows.masked_fill_((flat < 0)[..., None], 0.0)
    return rows.view(*indices.shape, d)


@torch.library.custom_op("xlroute::gather_rows_at", mutates_args=())
def _gather_at(places: Tensor, counts: Tensor, indices: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """Rows [b, ..., d]."""
    rows = torch.empty((*indices.shape, d), dtype=dtype, device=indices.device)
    if rows.numel() > 0:
        from xlroute.kernels import gather_triton

        flat = indices.reshape(len(places), -1)
        gather_triton.gather_at(_origin(indices.device), places.contiguous(), counts.contiguous(), flat, rows)
    return rows


def _wide(rows: Tensor, gates: Tensor | None) -> torch.dtype:
    """The dtype in which rows are multiplied by gates, and added."""
    wide = compute_dtype(rows.dtype)
    return wide if gates is None else torch.promote_types(wide, gates.dtype)


@torch.library.custom_op("xlroute::gather_rows_backward", mutates_args=())
def _gather_backward(grad: Tensor, indices: Tensor, m: int, backend: str) -> Tensor:
    """Sums [b, m, d] of the gradients [b, k, d] of each row, in the order of the indices [b, k]."""
    b, k = indices.shape
    d = grad.shape[-1]
    if backend == "triton" and grad.numel() > 0 and m > 0 and k <= _ALL_PAIRS:
        from xlroute.kernels import gather_triton

        return gather_triton.gather_backward(grad, indices, m)
    result = grad.new_zeros((b * m, d))
    if result.numel() > 0 and k > 0:
        places = torch.arange(b, device=grad.device)[:, None] * m + indices.clamp(min=0)
        grad = grad.masked_fill((indices < 0)[..., None], 0.0).flatten(0, 1)
        # Each adds in the order of the indices on one kind of device, and by atomics on the other.
        if grad.device.type == "cpu":
            result.index_add_(0, places.flatten(), grad)
        else:
            result.index_put_((places.flatten(),), grad, accumulate=True)
    return result.view(b, m, d)


@torch.library.custom_op("xlroute::scatter_rows", mutates_args=())
def _scatter(
    base: Tensor,
    rows: Tensor | None,
    gates: Tensor | None,
    indices: Tensor,
    other: Tensor | None,
    residual: Tensor | None,
    add: bool,
    other_from: int,
    backend: str,
) -> Tensor:
    """``base`` [b, n, d] with ``rows`` [b, k, d] times ``gates`` [b, k], or zeros, at the indices [b, k].

    Or with that added there; elsewhere with ``other`` [d] added, from the place ``other_from`` on; and
    everywhere with the residual added.
    """
    b, n, d = base.shape
    if backend == "triton" and base.numel() > 0:
        from xlroute.kernels import gather_triton

        return gather_triton.scatter(base, rows, gates, indices, other, residual, add, other_from)
    dtype = base.dtype if residual is None else _wide(base, gates)
    if rows is not None and (gates is not None or add):
        rows = rows.to(_wide(rows, gates))
        if gates is not None:
            rows = rows * gates[..., None]
        if add:
            rows = rows + _gather(base, None, indices, False, "torch")[0]
    # Rows without a place go to one past the end, which is cut off again.
    result = base.new_empty((b, n + 1, d), dtype=dtype)
    result[:, :n] = base
    if other is not None:
        result[:, other_from:n] = base[:, other_from:].to(_wide(base, other)) + other
    places = torch.where(indices < 0, n, indices)[..., None].expand(-1, -1, d)
    result = result.scatter_(1, places, 0.0 if rows is None else rows.to(dtype))
    result = result[:, :n] if residual is None else result[:, :n] + residual
    return result.to(base.dtype, memory_format=torch.contiguous_format, copy=True)


@torch.library.custom_op("xlroute::scatter_rows_backward", mutates_args=())
def _scatter_backward(
    grad: Tensor, rows: Tensor, gates: Tensor, indices: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of rows [b, k, d] and gates [b, k] that were scattered, from that of the result [b, n, d]."""
    if backend == "triton" and grad.numel() > 0 and rows.numel() > 0:
        from xlroute.kernels import gather_triton

        return gather_triton.scatter_backward(grad, rows, gates, indices)
    wide = _wide(rows, gates)
    taken = _gather(grad, None, indices, False, "torch")[0].to(wide)
    d_rows, d_gates = taken * gates[..., None], (taken * rows.to(wide)).sum(-1)
    return d_rows.to(rows.dtype), d_gates.to(gates.dtype)


@_gather.register_fake
def _(
    x: Tensor, gates: Tensor | None, indices: Tensor, straight_through: bool, backend: str
) -> tuple[Tensor, Tensor]:
    rows = x.new_empty((*indices.shape, x.shape[-1]))
    return rows, x.new_empty(0) if gates is None else gates.new_empty(indices.shape)


@_gather_apart.register_fake
def _(streams: list[Tensor], indices: Tensor, backend: str) -> Tensor:
    return streams[0].new_empty((*indices.shape, streams[0].shape[1]))


@_gather_at.register_fake
def _(places: Tensor, counts: Tensor, indices: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    return indices.new_empty((*indices.shape, d), dtype=dtype)


@_gather_backward.register_fake
def _(grad: Tensor, indices: Tensor, m: int, backend: str) -> Tensor:
    return grad.new_empty((grad.shape[0], m, grad.shape[-1]))


@_scatter.register_fake
def _(
    base: Tensor,
    rows: Tensor | None,
    gates: Tensor | None,
    indices: Tensor,
    other: Tensor | None,
    residual: Tensor | None,
    add: bool,
    other_from: int,
    backend: str,
) -> Tensor:
    return base.new_empty(base.shape)


@_scatter_backward.register_fake
def _(grad: Tensor, rows: Tensor, gates: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), gates.new_empty(gates.shape)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gates, indices, _, ctx.backend = inputs
    ctx.m = x.shape[1]
    ctx.gates_shape = None if gates is None else gates.shape
    ctx.save_for_backward(indices)


def _gather_autograd(ctx: Any, grad: Tensor, grad_gates: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    b, *_, d = grad.shape
    needs_x, needs_gates, *_ = ctx.needs_input_grad
    d_x = d_gates = None
    if needs_x:
        places = indices.reshape(b, -1)
        d_x = _gather_backward(grad.reshape(*places.shape, d), places, ctx.m, ctx.backend)
    if needs_gates:
        places = indices.flatten(0, -2)
        d_gates = _gather_backward(grad_gates.reshape(*places.shape, 1), places, ctx.m, ctx.backend)
        d_gates = d_gates.view(ctx.gates_shape)
    return d_x, d_gates, None, None, None


def _gather_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, _, ctx.backend = inputs
    ctx.save_for_backward(indices)


def _gather_backward_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return _gather(grad, None, indices, False, ctx.backend)[0], None, None, None


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, gates, indices, other, _, ctx.add, ctx.other_from, ctx.backend = inputs
    ctx.other_dtype = None if other is None else other.dtype
    # Without gates, no gradient depends on the rows.
    ctx.save_for_backward(None if gates is None else rows, gates, indices)


def _scatter_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, gates, indices = ctx.saved_tensors
    needs_base, needs_rows, needs_gates, _, needs_other, needs_residual, *_ = ctx.needs_input_grad
    d_base = d_other = None
    if needs_base:
        d_base = grad if ctx.add else _scatter(grad, None, None, indices, None, None, False, 0, ctx.backend)
    if needs_other:
        # All there is, less what went to the rows: nothing as long as the base is written.
        wide, start = compute_dtype(grad.dtype), ctx.other_from
        apart = (indices < start) | (indices >= grad.shape[1])
        named = _gather(grad, None, indices.masked_fill(apart, -1), False, ctx.backend)[0]
        d_other = grad[:, start:].sum((0, 1), dtype=wide) - named.sum((0, 1), dtype=wide)
        d_other = d_other.to(ctx.other_dtype)
    d_rows = d_gates = None
    if gates is not None and (needs_rows or needs_gates):
        d_rows, d_gates = _scatter_backward(grad, rows, gates, indices, ctx.backend)
    elif needs_rows:
        d_rows, _ = _gather(grad, None, indices, False, ctx.backend)
    d_residual = grad if needs_residual else None
    return d_base, d_rows, d_gates, None, d_other, d_residual, None, None, None


def _scatter_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, rows, gates, indices, ctx.backend = inputs
    ctx.save_for_backward(grad, rows, gates, indices)


def _scatter_backward_autograd(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    grad, rows, gates, indices = ctx.saved_tensors
    wide = _wide(rows, gates)
    taken = _gather(grad, None, indices, False, ctx.backend)[0].to(wide)
    d_taken = gates[..., None] * u.to(wide) + v[..., None] * rows.to(wide)
    d_grad = _gather_backward(d_taken.to(grad.dtype), indices, grad.shape[1], ctx.backend)
    d_rows, d_gates = (v[..., None] * taken).to(rows.dtype), (u.to(wide) * taken).sum(-1).to(gates.dtype)
    return d_grad, d_rows, d_gates, None, None


_gather.register_autograd(_gather_autograd, setup_context=_gather_setup)
_gather_backward.register_autograd(_gather_backward_autograd, setup_context=_gather_backward_setup)
_scatter.register_autograd(_scatter_autograd, setup_context=_scatter_setup)
_scatter_backward.register_autograd(_scatter_backward_autograd, setup_context=_scatter_backward_setup)
