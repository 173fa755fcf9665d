"""Keys and values of routed rows in the order that attention wants, gated, behind a null key and value."""

from collections.abc import Iterator
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
    others = {"gates": gates, "null_key": null_key, "null_value": null_value}
    _check(keys, values, others, "[b, r, k, heads of a set, e]")
    b, r, k, h, e = keys.shape
    _check_shapes(others, (b, r, k), r * h, e)
    backend = resolve_backend(backend, keys)
    laid: tuple[Tensor, Tensor] = _lay_out(keys, values, gates, null_key, null_value, gate_keys, backend)
    return laid


def gather_keys_values(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    *,
    gate_keys: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values that c windows chose out of the same m rows, as `gated_keys_values` lays them out.

    Each window chose k rows for each of r sets. What it takes besides the result does not grow with k, and no
    gradient of a row depends on the order in which programs run. There is no second derivative.

    Args:
        keys: [b, m, r, h/r, e], those of all rows.
        values: [b, m, r, h/r, e], of the same dtype.
        gates: those of the chosen rows, [b, c, r, k].
        indices: int64 [b, c, r, k], each in [-1, m); -1 gives zeros.
        null_key: [h, 1, e], or None for zeros.
        null_value: [h, 1, e].
        gate_keys: whether keys are multiplied by the gates too.
        backend: "torch", "triton", or None to pick by device.

    Returns:
        Keys and values, both [b c, h, 1 + k, e], contiguous, in the dtype of ``keys``.

    Raises:
        TypeError: a tensor is not floating point, ``indices`` not int64, or ``values`` of another dtype than
            ``keys``.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
        IndexError: an index is outside [-1, m). Only checked on a CPU and outside torch.compile: elsewhere
            the check would have to wait for the device, and Triton takes it for -1.
    """
    check_gathered(keys, values, gates, indices, null_key, null_value)
    backend = resolve_backend(backend, keys)
    laid: tuple[Tensor, Tensor] = _gather(
        keys, values, gates, indices, null_key, null_value, gate_keys, backend
    )
    return laid


def check_gathered(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
) -> None:
    """The checks of `gather_keys_values`."""
    others = {"gates": gates, "null_key": null_key, "null_value": null_value}
    _check(keys, values, others, "[b, m, r, heads of a set, e]")
    b, m, r, h, e = keys.shape
    check_index_type(indices)
    if indices.ndim != 4 or indices.shape[0] != b or indices.shape[2] != r:
        raise ValueError(f"indices must have shape [{b}, c, {r}, k], got {tuple(indices.shape)}")
    _check_shapes(others, indices.shape, r * h, e)
    if indices.device != keys.device:
        raise ValueError(f"indices must be on the device of keys, {keys.device}, got {indices.device}")
    check_range(indices, m)


def _check(keys: Tensor, values: Tensor, others: dict[str, Tensor | None], layout: str) -> None:
    """What both functions ask of keys and values, and of the dtype and device of the others."""
    for name, tensor in ({"keys": keys, "values": values} | others).items():
        if tensor is None:
            continue
        check_floating(name, tensor)
        if tensor.device != keys.device:
            raise ValueError(f"{name} must be on the device of keys, {keys.device}, got {tensor.device}")
    if keys.ndim != 5 or values.shape != keys.shape:
        raise ValueError(
            f"keys and values must have shape {layout}, both the same, got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if values.dtype != keys.dtype:
        raise TypeError(f"values must have the dtype of keys, {keys.dtype}, got {values.dtype}")


def _check_shapes(tensors: dict[str, Tensor | None], chosen: tuple[int, ...], h: int, e: int) -> None:
    expected = {"gates": tuple(chosen), "null_key": (h, 1, e), "null_value": (h, 1, e)}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != expected[name]:
            raise ValueError(f"{name} must have shape {expected[name]}, got {tuple(tensor.shape)}")


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
    return *gradients, *_null_gradients(ctx, d_keys, d_values, needs[3:5]), None, None


def _null_gradients(
    ctx: Any, d_keys: Tensor, d_values: Tensor, needs: tuple[bool, ...]
) -> Iterator[Tensor | None]:
    for laid, dtype, needed in zip((d_keys, d_values), ctx.null_dtypes, needs, strict=True):
        yield laid[:, :, :1].sum(0, dtype=compute_dtype(laid.dtype)).to(dtype) if needed else None


_lay_out.register_autograd(_autograd, setup_context=_setup_context)


def _gathered(rows: Tensor, indices: Tensor) -> Tensor:
    """The rows [b c, r, k, h/r, e] of [b, m, r, h/r, e] at indices [b, c, r, k]; zeros at -1."""
    b, _, r, _, _ = rows.shape
    if rows.numel() == 0:
        return rows.new_zeros((*indices.shape, *rows.shape[3:])).flatten(0, 1)
    stream, sets = _stream_and_set(b, r, rows.device)
    found = rows[stream, indices.clamp(min=0), sets]
    return found.masked_fill((indices < 0)[..., None, None], 0.0).flatten(0, 1)


def _stream_and_set(b: int, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(b, device=device).view(b, 1, 1, 1), torch.arange(r, device=device)[:, None]


@torch.library.custom_op("xlroute::gather_keys_values", mutates_args=())
def _gather(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton" and keys.numel() > 0 and indices.numel() > 0:
        from xlroute.kernels import keys_values_triton

        return keys_values_triton.forward(keys, values, gates, null_key, null_value, gate_keys, indices)
    rows, value_rows, row_gates = _gathered(keys, indices), _gathered(values, indices), gates.flatten(0, 1)
    return (
        _behind(null_key, _gated(rows, row_gates) if gate_keys else rows),
        _behind(null_value, _gated(value_rows, row_gates)),
    )


@torch.library.custom_op("xlroute::gather_keys_values_backward", mutates_args=())
def _gather_backward(
    d_laid_keys: Tensor,
    d_laid_values: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys and values [b, m, r, h/r, e] and of the gates [b, c, r, k]."""
    if backend == "triton" and keys.numel() > 0 and indices.numel() > 0:
        from xlroute.kernels import keys_values_triton

        return keys_values_triton.gathered_backward(
            d_laid_keys, d_laid_values, keys, values, gates, indices, gate_keys
        )
    rows, value_rows = _gathered(keys, indices), _gathered(values, indices)
    d_rows, d_value_rows, d_gates = _backward(
        d_laid_keys, d_laid_values, rows, value_rows, gates.flatten(0, 1), gate_keys, "torch"
    )
    d_gates = d_gates.view(gates.shape).masked_fill(indices < 0, 0.0)
    return _sum_by_row(d_rows, keys, indices), _sum_by_row(d_value_rows, values, indices), d_gates


def _sum_by_row(d_rows: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """The gradient of rows [b, m, r, h/r, e] from those of the rows at the indices [b, c, r, k]."""
    b, m, r, *features = rows.shape
    total = d_rows.new_zeros((b * m * r + 1, *features), dtype=compute_dtype(rows.dtype))
    stream, sets = _stream_and_set(b, r, rows.device)
    named = torch.where(indices < 0, b * m * r, (stream * m + indices) * r + sets).flatten()
    d_rows = d_rows.view(*indices.shape, *features).flatten(0, 3).to(total.dtype)
    if rows.device.type == "cpu":
        total.index_add_(0, named, d_rows)
    else:
        total.index_put_((named,), d_rows, accumulate=True)  # deterministic, unlike index_add_ there
    return total[:-1].view(rows.shape).to(rows.dtype, copy=True)


@_gather.register_fake
def _(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, c, r, k = indices.shape
    shape = (b * c, r * keys.shape[3], 1 + k, keys.shape[4])
    return keys.new_empty(shape), keys.new_empty(shape)


@_gather_backward.register_fake
def _(
    d_laid_keys: Tensor,
    d_laid_values: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    gate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return keys.new_empty(keys.shape), keys.new_empty(keys.shape), gates.new_empty(gates.shape)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keys, values, gates, indices, null_key, null_value, ctx.gate_keys, ctx.backend = inputs
    ctx.null_dtypes = (None if null_key is None else null_key.dtype, null_value.dtype)
    # No gradient depends on keys that are not gated.
    ctx.save_for_backward(keys if ctx.gate_keys else None, values, gates, indices)


def _gather_autograd(ctx: Any, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
    keys, values, gates, indices = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[:3]):
        keys = values if keys is None else keys  # of the same shape and dtype, and not read
        gradients = _gather_backward(
            d_keys, d_values, keys, values, gates, indices, ctx.gate_keys, ctx.backend
        )
    return *gradients, None, *_null_gradients(ctx, d_keys, d_values, needs[4:6]), None, None


_gather.register_autograd(_gather_autograd, setup_context=_gather_setup)
