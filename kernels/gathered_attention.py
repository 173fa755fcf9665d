"""Attention of windows of queries to rows that each window chose, read from where they are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_floating, resolve_backend
from xlroute.kernels.keys_values import check_gathered, gather_keys_values
from xlroute.kernels.local_attention import WIDEST


def gathered_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    *,
    gate_keys: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Softmax attention, softmax(q kᵀ / √e) v, to k rows that each of c windows chose for a head's set.

    The same as attention to what `gather_keys_values` gives, without the places at -1. Triton never writes
    the gathered rows: the forward reads them where they are. It takes heads up to 128 wide, and has no second
    derivative. float64, and wider heads, run the reference.

    Args:
        q: queries of each window, [b c, h, n, e].
        keys: see `gather_keys_values`, as for the arguments that follow.
        values: of the dtype of ``keys``; that of ``q`` too.
        gates: see there.
        indices: see there; -1 for no row.
        null_key: [h, 1, e].
        null_value: [h, 1, e].
        gate_keys: see there.
        backend: "torch", "triton", or None to pick by device.

    Returns:
        [b c, h, n, e], in the dtype of ``q``.

    Raises:
        TypeError, ValueError, IndexError: as `gather_keys_values`, and for queries that do not fit the rows.
    """
    check_floating("q", q)
    check_floating("null_key", null_key)
    check_gathered(keys, values, gates, indices, null_key, null_value)
    (b, _, r, heads, e), c = keys.shape, indices.shape[1]
    if q.ndim != 4 or q.shape[:2] != (b * c, r * heads) or q.shape[-1] != e:
        raise ValueError(f"q must have shape [{b * c}, {r * heads}, n, {e}], got {tuple(q.shape)}")
    if q.dtype != keys.dtype:
        raise TypeError(f"q must have the dtype of keys, {keys.dtype}, got {q.dtype}")
    if q.device != keys.device:
        raise ValueError(f"q must be on the device of keys, {keys.device}, got {q.device}")
    backend = resolve_backend(backend, q)
    there = q.numel() > 0 and keys.numel() > 0 and indices.numel() > 0
    if backend == "triton" and q.dtype != torch.float64 and e <= WIDEST and there:
        out: Tensor = _attend(q, keys, values, gates, indices, null_key, null_value, gate_keys)[0]
        return out
    laid_keys, laid_values = gather_keys_values(
        keys, values, gates, indices, null_key, null_value, gate_keys=gate_keys, backend=backend
    )
    seen = F.pad(indices.flatten(0, 1) >= 0, (1, 0), value=True)
    seen = seen.repeat_interleave(heads, dim=1)[:, :, None]
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, laid_keys, laid_values, attn_mask=seen)


@torch.library.custom_op("xlroute::gathered_attention", mutates_args=())
def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor]:
    """The output [b c, h, n, e], and log2 of what each softmax is divided by, float32 [b c, h, n]."""
    from xlroute.kernels import gathered_attention_triton

    return gathered_attention_triton.forward(q, keys, values, gates, indices, null_key, null_value, gate_keys)


@torch.library.custom_op("xlroute::gathered_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    out: Tensor,
    sums: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, keys, values, gates, null_key and null_value."""
    from xlroute.kernels import gathered_attention_triton

    return gathered_attention_triton.backward(
        grad, q, keys, values, gates, indices, null_key, null_value, out, sums, gate_keys
    )


@_attend.register_fake
def _(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    out: Tensor,
    sums: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, keys, values, gates, null_key, null_value = (
        t.new_empty(t.shape) for t in (q, keys, values, gates, null_key, null_value)
    )
    return q, keys, values, gates, null_key, null_value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.gate_keys = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    d_q, d_keys, d_values, d_gates, d_null_key, d_null_value = _backward(
        grad, *ctx.saved_tensors, ctx.gate_keys
    )
    return d_q, d_keys, d_values, d_gates, None, d_null_key, d_null_value, None


_attend.register_autograd(_autograd, setup_context=_setup_context)
