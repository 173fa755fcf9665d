"""Norms of rows, whose backward adds up the gradients of all that reads the rows besides."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_floating, compute_dtype, resolve_backend

Norm = Literal["rms", "layer"]

WIDEST = 8192  # rows, in elements, that the kernel takes
MOST_READERS = 3  # whose gradients it takes


def norm_beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm = "rms",
    eps: float | None = None,
    readers: int = 1,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """The norm of each row, as `torch.nn.functional` gives it, and before it x itself for others to read.

    They get a tensor each, so that all of their gradients are known where that of the norm is taken, and are
    added in the pass that it takes anyway. Otherwise autograd adds them one by one, each time reading two
    tensors of the size of x and writing one. Under torch.compile, the compiler sees to it: it is given
    PyTorch's own norm, which it joins with what is computed before and after it.

    "rms" is x / sqrt(mean(x²) + eps) weight (Zhang & Sennrich, arXiv 1910.07467), and "layer" that of x less
    its mean, plus the bias (Ba et al., arXiv 1607.06450). Triton computes in float32 and has no second
    derivative. float64, and rows of more than 8,192, run the reference.

    Args:
        x: rows [..., d].
        weight: [d].
        bias: [d], for "layer" alone; None for none.
        norm: see above.
        eps: None for PyTorch's defaults: 1e-5 for "layer", and for "rms" the distance from 1 to the next
            number, of float64 for float64 and of float32 for all others.
        readers: how many others there are, at most 3.
        backend: "torch", "triton", or None to pick by device.

    Returns:
        x, as often as there are readers, and last the norm [..., d]; in the dtype of ``x``, which
        under autocast is not always that of the reference.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: the shapes do not fit, the devices differ, ``norm`` is unknown or has no bias, ``eps`` or
            ``readers`` is out of range, or the backend cannot run here.
    """
    _check(x, weight, bias, norm, eps, readers)
    backend = resolve_backend(backend, x)
    if backend == "torch" or x.dtype == torch.float64 or x.shape[-1] > WIDEST or x.numel() == 0:
        return (*[x] * readers, _reference(x, weight, bias, norm, eps))
    wide = compute_dtype(x.dtype)
    if eps is None:
        eps = 1e-5 if norm == "layer" else torch.finfo(wide).eps
    if torch.compiler.is_compiling():
        own = [None if each is None else each.to(wide) for each in (weight, bias)]
        return (*[x] * readers, _reference(x.to(wide), own[0], own[1], norm, eps).to(x.dtype))
    arguments = (x, weight, bias, norm == "layer", eps)
    if readers == 0 or not x.requires_grad:
        return (*[x] * readers, _forward(*arguments)[0])  # there is nothing to add up
    beside: tuple[Tensor, ...] = _Beside.apply(*arguments, readers)  # type: ignore[no-untyped-call]
    return beside


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float | None, readers: int
) -> None:
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x must have shape [..., d], got a tensor without dimensions")
    if norm not in ("rms", "layer"):
        raise ValueError(f"norm must be 'rms' or 'layer', got {norm!r}")
    if norm == "rms" and bias is not None:
        raise ValueError("bias must be None with norm='rms'")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_floating(name, tensor)
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if eps is not None and not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    if not 0 <= readers <= MOST_READERS:
        raise ValueError(f"readers must be between 0 and {MOST_READERS}, got {readers}")


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float | None) -> Tensor:
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5 if eps is None else eps)


@torch.library.custom_op("xlroute::norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, centered: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm [..., d], and float32 [1 or 2, rows]: 1 / the norm of each row, and its mean if centered."""
    from xlroute.kernels import norm_triton

    return norm_triton.forward(x, weight, bias, centered, eps)


@torch.library.custom_op("xlroute::norm_backward", mutates_args=())
def _backward(
    grad: Tensor, others: list[Tensor], x: Tensor, weight: Tensor, stats: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x with all others added, and float32 [1 or 2, d], those of the weight and the bias."""
    from xlroute.kernels import norm_triton

    return norm_triton.backward(grad, others, x, weight, stats, has_bias)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, centered: bool, eps: float) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    return x.new_empty(x.shape), x.new_empty((1 + centered, rows), dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor, others: list[Tensor], x: Tensor, weight: Tensor, stats: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((1 + has_bias, x.shape[-1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *_ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, others: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the op's arguments, from that of the norm; that of x with the others added."""
    x, weight, stats = ctx.saved_tensors
    d_x = d_weight = d_bias = None
    if grad is not None:
        d_x, d_weights = _backward(grad, others, x, weight, stats, ctx.bias_dtype is not None)
        d_weight = d_weights[0].to(weight.dtype)
        d_bias = None if ctx.bias_dtype is None else d_weights[1].to(ctx.bias_dtype)
    elif others:
        d_x = sum(others[1:], others[0])
    return d_x, d_weight, d_bias, None, None, None


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, [])


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Beside(torch.autograd.Function):
    """The op, and x for its readers: a custom op may not return what it was given."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        x, readers = arguments[0], arguments[-1]
        output = _forward(*arguments[:-1])
        _setup_context(ctx, arguments[:-1], output)
        return (*(x.view_as(x) for _ in range(readers)), output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *others, grad = grads
        return *_gradients(ctx, grad, [other for other in others if other is not None]), None
