"""The checks that every public op makes on its arguments before any work is done."""

import importlib.util
import math
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op works in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuses anything but a floating-point tensor.

    Raises:
        TypeError: ``tensor`` is no tensor, or one of another dtype.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {tensor.dtype}")


def check_scores(s: Tensor) -> None:
    """Refuses scores that are not floating point or have no last dimension to choose from.

    Raises:
        TypeError: ``s`` is not a floating-point tensor.
        ValueError: ``s`` has no dimension.
    """
    check_floating("s", s)
    if s.ndim == 0:
        raise ValueError("s must have shape [..., n], got a tensor without dimensions")


def check_mask(mask: Tensor | None, s: Tensor) -> None:
    """Refuses a mask that is not bool, lies on another device or does not broadcast to ``s``.

    Raises:
        TypeError: ``mask`` is not a bool tensor.
        ValueError: its shape does not broadcast to that of ``s``, or its device is another.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {given}")
    if not broadcasts_to(mask.shape, s.shape):
        raise ValueError(
            f"mask must broadcast to the shape of s, {tuple(s.shape)}, got shape {tuple(mask.shape)}"
        )
    if mask.device != s.device:
        raise ValueError(f"mask must be on the device of s, {s.device}, got {mask.device}")


def check_index_type(indices: Tensor) -> None:
    """Refuses indices that are not int64.

    Raises:
        TypeError: ``indices`` is no tensor, or one of another dtype.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, got {given}")


def check_range(indices: Tensor, m: int) -> None:
    """Refuses indices of m rows that name no row, on a CPU and outside torch.compile.

    Elsewhere the check would have to wait for the device.

    Raises:
        IndexError: an index is outside [-1, m).
    """
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel() > 0:
        low, high = (int(bound) for bound in indices.aminmax())
        if low < -1 or high >= m:
            raise IndexError(f"indices must be in [-1, {m}), got values from {low} to {high}")


def check_eps(eps: float) -> None:
    """Refuses a temperature that is not a positive finite number.

    Raises:
        ValueError: ``eps`` is zero, negative, infinite or NaN.
    """
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, got {eps}")


def broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of ``shape`` expands to ``target`` without changing ``target``."""
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(size in (1, wanted) for size, wanted in zip(shape, tail, strict=True))


def budget_per_row(k: float | Tensor, s: Tensor) -> Tensor:
    """The budget ``k`` as one float64 value a row of ``s``, shape ``s.shape[:-1]``.

    A number is filled in on the device, so nothing waits for it; a tensor keeps its graph. float64, because
    float32 stops counting at 2**24 rows.

    Raises:
        TypeError: ``k`` is neither a real number nor a real tensor.
        ValueError: ``k`` is a number that is not finite, or a tensor on another device than ``s`` or of a
            shape that does not broadcast to ``s.shape[:-1]``.
    """
    rows = s.shape[:-1]
    if isinstance(k, Tensor):
        if k.dtype == torch.bool or k.is_complex():
            raise TypeError(f"k must be a number or a real tensor, got a tensor of dtype {k.dtype}")
        if not broadcasts_to(k.shape, rows):
            raise ValueError(f"k must broadcast to s.shape[:-1], {tuple(rows)}, got shape {tuple(k.shape)}")
        if k.device != s.device:
            raise ValueError(f"k must be on the device of s, {s.device}, got {k.device}")
        return k.to(torch.float64).expand(rows)
    return torch.full(rows, check_budget(k), dtype=torch.float64, device=s.device)


def check_budget(k: float) -> float:
    """A budget that is a number, as a float.

    Raises:
        TypeError: ``k`` is no real number.
        ValueError: ``k`` is not finite.
    """
    if isinstance(k, bool) or not isinstance(k, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"k must be a number or a real tensor, got {type(k).__name__}")
    # Compared, not math.isfinite(k), which torch.compile cannot trace for a k that changes between calls.
    if not -math.inf < k < math.inf:
        raise ValueError(f"k must be finite, got {k}")
    return float(k)


def resolve_backend(backend: Backend | None, tensor: Tensor) -> Backend:
    """The backend that runs an op on ``tensor``: the one asked for, else the best there is for its device.

    That is Triton for CUDA tensors where the package is installed, and PyTorch for all others. When asked
    for, Triton also takes CPU tensors while its interpreter is on (TRITON_INTERPRET=1, for debugging).

    Raises:
        ValueError: ``backend`` is unknown, or ``"triton"`` and the tensor is on another device.
        ImportError: ``backend`` is ``"triton"`` and the package is not installed.
    """
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton', got {backend!r}")
    on_gpu = tensor.device.type == "cuda"
    if backend is None:
        return "triton" if on_gpu and HAS_TRITON else "torch"
    if backend == "triton":
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend='triton' needs a CUDA tensor, got a tensor on {tensor.device}")
        if not HAS_TRITON:
            raise ImportError("backend='triton' needs the triton package: pip install xlroute[gpu]")
    return backend
