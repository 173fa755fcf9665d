"""Gather of chosen rows, where an index of -1 stands for no row."""

import torch
from torch import Tensor

from xlroute.kernels.arguments import check_floating


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """The rows of each stream at its indices; -1 gathers zeros.

    Differentiable in ``x``: the gradients of a row that is gathered several times add up, in a fixed order.
    ``x`` may be any view and is not copied.

    Args:
        x: rows, [b, m, d].
        indices: int64, [b, ...], each in [-1, m).

    Returns:
        The gathered rows, [b, ..., d], in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not floating point or ``indices`` not int64.
        ValueError: the shapes do not fit.
        IndexError: an index is outside [-1, m). Only checked on a CPU and outside torch.compile: elsewhere
            the check would have to wait for the device.
    """
    check_floating("x", x)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, got {given}")
    if x.ndim != 3 or indices.ndim < 1 or indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"x must have shape [b, m, d] and indices [b, ...] with the same b, got {tuple(x.shape)} and "
            f"{tuple(indices.shape)}"
        )
    b, m, d = x.shape
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel() > 0:
        low, high = (int(bound) for bound in indices.aminmax())
        if low < -1 or high >= m:
            raise IndexError(f"indices must be in [-1, {m}), got values from {low} to {high}")
    if m == 0:
        return x.new_zeros((*indices.shape, d))
    stream = torch.arange(b, device=x.device).view(b, *[1] * (indices.ndim - 1))
    return x[stream, indices.clamp(min=0)].masked_fill((indices < 0)[..., None], 0.0)
