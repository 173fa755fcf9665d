"""Keys and values of routed rows in the order that attention wants, gated, behind a null key and value."""

from typing import Any

import torch
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_floating, compute_dtype, resolve_backend


def gated_keys_values(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    *,
    gate_keys: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of k rows for each of r sets, as attention takes them: by head, behind the null row.

    The values, and the keys if asked, are multiplied by the gates of their rows and rounded once. The heads
    are shared out evenly over the sets: h = r * heads of a set. There is no second derivative.

    Args:
        keys: [b, r, k, h/r, e], as a projection of the rows gives them.
        values: [b, r, k, h/r, e], of the same dtype.
        gates: [b, r, k].
        null_key: [h, 1, e], or None for zeros.
        null_value: [h, 1, e].
        gate_keys: whether keys are multiplied by the gates too.
        backend: "torch", "triton", or None to pick by device.

    Returns:
        Keys and values, both [b, h, 1 + k, e], contiguous, in the dtype of ``keys``.

    Raises:
        TypeError: a tensor is not floating point, or ``values`` of another dtype than ``keys``.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
    """
    named = {"keys": keys, "values": values, "gates": gates, "null_value": null_value}
    if null_key is not None:
        named["null_key"] = null_key
    for name, tensor in named.items():
        check_floating(name, tensor)
        if tensor.device != keys.device:
            raise ValueError(f"{name} must be on the device of keys, {keys.device}, got {tensor.device}")
    if keys.ndim != 5 or values.shape != keys.shape:
        raise ValueError(
            "keys and values must have shape [b, r, k, heads of a set, e], both the same, got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if values.dtype != keys.dtype:
        raise TypeError(f"values must have the dtype of keys, {keys.dtype}, got {values.dtype}")
    b, r, k, h, e = keys.shape
    expected = {"gates": (b, r, k), "null_key": (r * h, 1, e), "null_value": (r * h, 1, e)}
    for name in ("gates", "null_key", "null_value"):
        if name in named and named[name].shape != expected[name]:
            raise ValueError(f"{name} must have shape {expected[name]}, got {tuple(named[name].shape)}")
    backend = resolve_backend(backend, keys)
    laid: tuple[Tensor, Tensor] = _lay_out(keys, values, gates, null_key, null_value, gate_keys, backend)
    return laid


def _gated(rows: Tensor, gates: Tensor) -> Tensor:
    """Rows [b, r, k, h, e] times gates [b, r, k], rounded once."""
    wide = torch.promote_types(compute_dtype(rows.dtype), gates.dtype)
    return (rows.to(wide) * gates[..., None, None]).to(rows.dtype)


def _behind(null: Tensor | None, rows: Tensor) -> Tensor:
    """Rows [b, r, k, h/r, e] by head behind the null row [h, 1, e]: [b, h, 1 + k, e]."""
    b, r, k, h, e = rows.shape
    laid = rows.new_zeros((b, r, h, 1 + k, e))
    laid[..., 1:, :] = rows.transpose(2, 3)
    if null is not None:
        laid[..., :1, :] = null.view(r, h, 1, e)
    return laid.view(b, r * h, 1 + k, e)


@torch.library.custom_op("xlroute::gated_keys_values", mutates_args=())
def _lay_out(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton" and keys.numel() > 0:
        from xlroute.kernels import keys_values_triton

        return keys_values_triton.forward(keys, values, gates, null_key, null_value, gate_keys)
    return (
        _behind(null_key, _gated(keys, gates) if gate_keys else keys),
        _behind(null_value, _gated(values, gates)),
    )


@torch.library.custom_op("xlroute::gated_keys_values_backward", mutates_args=())
def _backward(
    d_laid_keys: Tensor,
    d_laid_values: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys and values [b, r, k, h/r, e] and of the gates [b, r, k]."""
    if backend == "triton" and keys.numel() > 0:
        from xlroute.kernels import keys_values_triton

        return keys_values_triton.backward(d_laid_keys, d_laid_values, keys, values, gates, gate_keys)
    b, r, k, h, e = keys.shape
    d_keys, d_values = (
        laid.view(b, r, h, 1 + k, e)[..., 1:, :].transpose(2, 3)
        for laid in (d_laid_keys.contiguous(), d_laid_values.contiguous())
    )
    wide = torch.promote_types(compute_dtype(keys.dtype), gates.dtype)
    d_gates = (d_values.to(wide) * values.to(wide)).sum((-2, -1))
    if gate_keys:
        d_gates = d_gates + (d_keys.to(wide) * keys.to(wide)).sum((-2, -1))
        d_keys = _gated(d_keys, gates)
    return (
        d_keys.clone(memory_format=torch.contiguous_format),
        _gated(d_values, gates).contiguous(),
        d_gates.to(gates.dtype),
    )


@_lay_out.register_fake
def _(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, r, k, h, e = keys.shape
    shape = (b, r * h, 1 + k, e)
    return keys.new_empty(shape), keys.new_empty(shape)


@_backward.register_fake
def _(
    d_laid_keys: Tensor,
    d_laid_values: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return keys.new_empty(keys.shape), keys.new_empty(keys.shape), gates.new_empty(gates.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keys, values, gates, null_key, null_value, ctx.gate_keys, ctx.backend = inputs
    ctx.null_dtypes = (None if null_key is None else null_key.dtype, null_value.dtype)
    # No gradient depends on keys that are not gated.
    ctx.save_for_backward(keys if ctx.gate_keys else None, values, gates)


def _autograd(ctx: Any, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
    keys, values, gates = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[:3]):
        keys = values if keys is None else keys  # of the same shape and dtype, and not read
        gradients = _backward(d_keys, d_values, keys, values, gates, ctx.gate_keys, ctx.backend)
    nulls = (
        laid[:, :, :1].sum(0).to(dtype) if needed else None
        for laid, dtype, needed in zip((d_keys, d_values), ctx.null_dtypes, needs[3:5], strict=True)
    )
    return *gradients, *nulls, None, None


_lay_out.register_autograd(_autograd, setup_context=_setup_context)
