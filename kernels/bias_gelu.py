"""GELU of hidden units and their bias, whose backward takes the gradient of the bias in the same pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_floating, resolve_backend


def bias_gelu(h: Tensor, bias: Tensor, *, backend: Backend | None = None) -> Tensor:
    """(h + bias) Φ(h + bias), Φ being the normal distribution (Hendrycks & Gimpel, arXiv 1606.08415).

    Triton computes in float32, rounds once, and has no second derivative. float64 runs the reference.

    Args:
        h: hidden units before their bias, [..., d].
        bias: [d].
        backend: "torch", "triton", or None to pick by device.

    Returns:
        [..., d], in the dtype of ``h``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
    """
    check_floating("h", h)
    check_floating("bias", bias)
    if h.ndim == 0 or bias.shape != h.shape[-1:]:
        raise ValueError(
            f"h must have shape [..., d] and bias [d], got {tuple(h.shape)} and {tuple(bias.shape)}"
        )
    if bias.device != h.device:
        raise ValueError(f"bias must be on the device of h, {h.device}, got {bias.device}")
    backend = resolve_backend(backend, h)
    if backend == "torch" or h.dtype == torch.float64 or h.numel() == 0:
        return F.gelu(h + bias).to(h.dtype)
    out: Tensor = _forward(h, bias)
    return out


@torch.library.custom_op("xlroute::bias_gelu", mutates_args=())
def _forward(h: Tensor, bias: Tensor) -> Tensor:
    from xlroute.kernels import bias_gelu_triton

    return bias_gelu_triton.forward(h, bias)


@torch.library.custom_op("xlroute::bias_gelu_backward", mutates_args=())
def _backward(grad: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of h [..., d], and that of the bias, float32 [d]."""
    from xlroute.kernels import bias_gelu_triton

    return bias_gelu_triton.backward(grad, h, bias)


@_forward.register_fake
def _(h: Tensor, bias: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@_backward.register_fake
def _(grad: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(bias.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    h, bias = ctx.saved_tensors
    d_h, d_bias = _backward(grad, h, bias)
    return d_h, d_bias.to(bias.dtype)


_forward.register_autograd(_autograd, setup_context=_setup_context)
