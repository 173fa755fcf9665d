"""Products of vectors with gathered rows, and weighted sums of those; the rows are never gathered in memory.

Both are derivatives of one form, Σ w[n, h, k] <q[n, h], row[indices[n, k]]>: products by the weights, sums by
the vectors. What that is by the rows adds up over the places that name a row. So each is made of the others
again when it is differentiated.

Shapes: b streams, m rows, d columns, n places that gather, k rows gathered by each, h vectors of each.
"""

from typing import Any

import torch
from torch import Tensor

from xlroute.kernels.arguments import (
    Backend,
    check_floating,
    check_index_type,
    check_range,
    compute_dtype,
    resolve_backend,
)


def gathered_products(
    vectors: Tensor, rows: Tensor, indices: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """The inner products of vectors with the rows at the indices of their place; 0 at -1.

    Differentiable in ``vectors`` and ``rows``, any number of times, in a fixed order of additions. Triton
    reads the rows where they are; float64 runs the reference.

    Args:
        vectors: [b, n, h, d], in the dtype of ``rows``.
        rows: [b, m, d].
        indices: int64, [b, n, k], each in [-1, m).
        backend: "torch", "triton", or None to pick by device.

    Returns:
        [b, n, h, k], float32 unless ``rows`` is float64.

    Raises:
        TypeError: for tensors that are not floating point or of different dtypes, or other indices.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
        IndexError: an index is outside [-1, m). Only checked on a CPU and outside torch.compile: elsewhere
            the check would have to wait for the device, and Triton takes it for no row.
    """
    _check(rows, indices, "vectors", vectors)
    if vectors.ndim != 4 or vectors.shape[:2] != indices.shape[:2] or vectors.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f"vectors must have shape [{', '.join(map(str, indices.shape[:2]))}, h, {rows.shape[-1]}], "
            f"got {tuple(vectors.shape)}"
        )
    if vectors.dtype != rows.dtype:
        raise TypeError(f"vectors must have the dtype of rows, {rows.dtype}, got {vectors.dtype}")
    products: Tensor = _products(vectors, rows, indices, resolve_backend(backend, rows))
    return products


def gathered_sums(
    weights: Tensor, rows: Tensor, indices: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """Weighted sums of the rows at the indices of each place; nothing is added at -1.

    Differentiable in ``weights`` and ``rows``, any number of times, in a fixed order of additions. Triton
    reads the rows where they are, and rounds the weights to their dtype, as attention does; float64 runs the
    reference.

    Args:
        weights: [b, n, h, k].
        rows: [b, m, d].
        indices: int64, [b, n, k], each in [-1, m).
        backend: "torch", "triton", or None to pick by device.

    Returns:
        [b, n, h, d], in the dtype of ``rows``.

    Raises:
        TypeError, ValueError, IndexError: as `gathered_products`.
    """
    _check(rows, indices, "weights", weights)
    b, n, k = indices.shape
    if weights.ndim != 4 or weights.shape[:2] != (b, n) or weights.shape[-1] != k:
        raise ValueError(f"weights must have shape [{b}, {n}, h, {k}], got {tuple(weights.shape)}")
    sums: Tensor = _sums(weights, rows, indices, resolve_backend(backend, rows))
    return sums


def _check(rows: Tensor, indices: Tensor, name: str, other: Tensor) -> None:
    """What both functions ask of rows [b, m, d], of indices [b, n, k] and of the other tensor."""
    check_floating("rows", rows)
    check_index_type(indices)
    check_floating(name, other)
    if rows.ndim != 3 or indices.ndim != 3 or indices.shape[0] != rows.shape[0]:
        raise ValueError(
            "rows must have shape [b, m, d] and indices [b, n, k] with the same b, got "
            f"{tuple(rows.shape)} and {tuple(indices.shape)}"
        )
    for other_name, tensor in (("indices", indices), (name, other)):
        if tensor.device != rows.device:
            raise ValueError(
                f"{other_name} must be on the device of rows, {rows.device}, got {tensor.device}"
            )
    check_range(indices, rows.shape[1])


def _gathered(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows [b, n, k, d] in the dtype to work in, 0 at -1."""
    b, m, _ = rows.shape
    wide = compute_dtype(rows.dtype)
    if m == 0:
        return rows.new_zeros((*indices.shape, rows.shape[-1]), dtype=wide)
    stream = torch.arange(b, device=rows.device)[:, None, None]
    gathered = rows[stream, indices.clamp(min=0)].to(wide)
    return gathered.masked_fill((indices < 0)[..., None], 0.0)


def _in_triton(backend: str, rows: Tensor, *others: Tensor) -> bool:
    """Whether there is something to do, of a dtype that Triton takes."""
    return (
        backend == "triton"
        and rows.dtype != torch.float64
        and all(t.numel() > 0 and t.dtype != torch.float64 for t in (rows, *others))
    )


@torch.library.custom_op("xlroute::gathered_products", mutates_args=())
def _products(vectors: Tensor, rows: Tensor, indices: Tensor, backend: str) -> Tensor:
    """[b, n, h, k]."""
    if _in_triton(backend, rows, vectors, indices):
        from xlroute.kernels import gathered_products_triton

        return gathered_products_triton.products(vectors, rows, indices)
    with torch.autocast(rows.device.type, enabled=False):
        return vectors.to(compute_dtype(rows.dtype)) @ _gathered(rows, indices).mT


@torch.library.custom_op("xlroute::gathered_sums", mutates_args=())
def _sums(weights: Tensor, rows: Tensor, indices: Tensor, backend: str) -> Tensor:
    """[b, n, h, d]."""
    if _in_triton(backend, rows, weights, indices):
        from xlroute.kernels import gathered_products_triton

        return gathered_products_triton.sums(weights, rows, indices)
    with torch.autocast(rows.device.type, enabled=False):
        return (weights.to(compute_dtype(rows.dtype)) @ _gathered(rows, indices)).to(rows.dtype)


@torch.library.custom_op("xlroute::gathered_row_sums", mutates_args=())
def _row_sums(weights: Tensor, vectors: Tensor, indices: Tensor, m: int, backend: str) -> Tensor:
    """For each row the sum of weight x vector over the places that name it: [b, m, d], as the vectors."""
    if _in_triton(backend, vectors, weights, indices) and m > 0:
        from xlroute.kernels import gathered_products_triton

        return gathered_products_triton.row_sums(weights, vectors, indices, m)
    (b, _, _, d), wide = vectors.shape, compute_dtype(vectors.dtype)
    sums = vectors.new_zeros((b, m + 1, d), dtype=wide)
    with torch.autocast(vectors.device.type, enabled=False):
        parts = weights.to(wide).mT @ vectors.to(wide)  # [b, n, k, d]
    # What names no row goes to one past the end.
    places = torch.where(indices < 0, m, indices).flatten(1)
    places = places + (m + 1) * torch.arange(b, device=places.device)[:, None]
    if sums.device.type == "cpu":  # which adds in order, as the other does on a GPU
        sums.view(-1, d).index_add_(0, places.flatten(), parts.reshape(-1, d))
    else:
        sums.view(-1, d).index_put_((places.flatten(),), parts.reshape(-1, d), accumulate=True)
    return sums[:, :m].to(vectors.dtype, memory_format=torch.contiguous_format, copy=True)


@_products.register_fake
def _(vectors: Tensor, rows: Tensor, indices: Tensor, backend: str) -> Tensor:
    shape = (*vectors.shape[:3], indices.shape[-1])
    return rows.new_empty(shape, dtype=compute_dtype(rows.dtype))


@_sums.register_fake
def _(weights: Tensor, rows: Tensor, indices: Tensor, backend: str) -> Tensor:
    return rows.new_empty((*weights.shape[:3], rows.shape[-1]))


@_row_sums.register_fake
def _(weights: Tensor, vectors: Tensor, indices: Tensor, m: int, backend: str) -> Tensor:
    return vectors.new_empty((vectors.shape[0], m, vectors.shape[-1]))


def _products_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    vectors, rows, indices, ctx.backend = inputs
    ctx.save_for_backward(vectors, rows, indices)


def _products_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    vectors, rows, indices = ctx.saved_tensors
    needs_vectors, needs_rows, *_ = ctx.needs_input_grad
    d_vectors = _sums(grad, rows, indices, ctx.backend) if needs_vectors else None
    d_rows = _row_sums(grad, vectors, indices, rows.shape[1], ctx.backend) if needs_rows else None
    return d_vectors, d_rows, None, None


def _sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, rows, indices, ctx.backend = inputs
    ctx.save_for_backward(weights, rows, indices)


def _sums_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, rows, indices = ctx.saved_tensors
    needs_weights, needs_rows, *_ = ctx.needs_input_grad
    d_weights = _products(grad, rows, indices, ctx.backend).to(weights.dtype) if needs_weights else None
    d_rows = _row_sums(weights, grad, indices, rows.shape[1], ctx.backend) if needs_rows else None
    return d_weights, d_rows, None, None


def _row_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, vectors, indices, _, ctx.backend = inputs
    ctx.save_for_backward(weights, vectors, indices)


def _row_sums_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, vectors, indices = ctx.saved_tensors
    needs_weights, needs_vectors, *_ = ctx.needs_input_grad
    d_weights = _products(vectors, grad, indices, ctx.backend).to(weights.dtype) if needs_weights else None
    d_vectors = _sums(weights, grad, indices, ctx.backend) if needs_vectors else None
    return d_weights, d_vectors, None, None, None


_products.register_autograd(_products_autograd, setup_context=_products_setup)
_sums.register_autograd(_sums_autograd, setup_context=_sums_setup)
_row_sums.register_autograd(_row_sums_autograd, setup_context=_row_sums_setup)
