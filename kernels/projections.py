"""Projections of rows to unit length, written where they are wanted.

Shapes: b streams, m rows, d columns, r sets of projections, e width of a projection.
"""

import torch
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_floating, compute_dtype, resolve_backend

# A projection that is not much longer is shorter than 1. Backward, its inverse is cubed.
SHORTEST = 1e-10

_AT_ONCE = 1 << 20  # rows of all streams whose products the reference has in memory at once


@torch.no_grad()
def unit_projections(
    rows: Tensor, projection: Tensor, out: Tensor, *, backend: Backend | None = None
) -> None:
    """Writes projections of rows, each divided by its length, to ``out``; there is no gradient.

    Products are those of the rows' type, float32 for float16: the projection is rounded to that. A length
    below 1e-10 counts as that, so rows of zeros have projections of zeros. Sums of products and lengths are
    float32, float64 for float64 rows.

    Triton reads the rows once, where they are, and rounds nothing but the result. The reference also rounds
    products of bfloat16 to that, before it takes their lengths. float64, and more than 256 for e, run it.
    Where PyTorch's matrix products of float32 may use TF32, so do both backends.

    Args:
        rows: [b, m, d], a slice of a longer buffer or not.
        projection: [r, e, d], of any type.
        out: [b, r, m, e], of any type, a slice of a longer buffer or not.
        backend: "torch", "triton", or None to pick by device.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
    """
    for name, tensor in (("rows", rows), ("projection", projection), ("out", out)):
        check_floating(name, tensor)
        if tensor.device != rows.device:
            raise ValueError(f"{name} must be on the device of rows, {rows.device}, got {tensor.device}")
    if rows.ndim != 3 or projection.ndim != 3 or projection.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f"rows [b, m, d] and projection [r, e, d] must share d, got shapes {tuple(rows.shape)} and "
            f"{tuple(projection.shape)}"
        )
    (b, m, _), (r, e, _) = rows.shape, projection.shape
    if out.shape != (b, r, m, e):
        raise ValueError(f"out must have shape {(b, r, m, e)}, got {tuple(out.shape)}")
    _unit_projections(rows, projection, out, resolve_backend(backend, rows))


def projections(rows: Tensor, projection: Tensor) -> Tensor:
    """Projections [..., r, e] of rows [..., d], with the products of `unit_projections`; differentiable."""
    if rows.dtype == torch.float16:
        rows = rows.float()  # the products of which could overflow
    # Their lengths will be 1: there is no need to divide rows by their root mean square.
    tokens = projection.flatten(0, 1).to(rows.dtype).mT
    # A matrix product would copy rows that are part of a block.
    products = torch.bmm(rows, tokens.expand(len(rows), -1, -1)) if rows.ndim == 3 else rows @ tokens
    return torch.unflatten(products, -1, projection.shape[:2])


@torch.library.custom_op("xlroute::unit_projections", mutates_args=("out",))
def _unit_projections(rows: Tensor, projection: Tensor, out: Tensor, backend: str) -> None:
    if backend == "triton" and rows.numel() > 0 and out.numel() > 0:
        from xlroute.kernels import projections_triton

        if projections_triton.can_project(rows, projection):
            projections_triton.project(rows, projection, out)
            return
    with torch.autocast(rows.device.type, enabled=False):
        _reference(rows, projection, out)


@_unit_projections.register_fake
def _(rows: Tensor, projection: Tensor, out: Tensor, backend: str) -> None:
    """Nothing is returned."""


def _reference(rows: Tensor, projection: Tensor, out: Tensor) -> None:
    step = max(1, _AT_ONCE // max(len(rows), 1))
    for start in range(0, rows.shape[1], step):
        part = slice(start, start + step)
        products = projections(rows[:, part], projection)
        lengths = torch.linalg.vector_norm(products, dim=-1, keepdim=True, dtype=compute_dtype(rows.dtype))
        torch.div(products, lengths.clamp_(min=SHORTEST), out=out[:, :, part].transpose(1, 2))
