"""Attention of tokens to those near them: the plain formula on windows, and a kernel that reads no others."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from xlroute.kernels.arguments import Backend, check_floating, resolve_backend

WIDEST = 128  # heads that the kernel takes


def local_attention(
    qkv: Tensor,
    *,
    window_size: int,
    causal: bool = False,
    mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Softmax attention, softmax(q kᵀ / √e) v, of each token to those near it.

    Not causal, a token sees those at most w = ``window_size`` places away. Causal, tokens are cut into
    windows of w, and a token sees its own window up to itself and the window before. A masked token is seen
    by none but itself.

    Triton takes heads up to 128 wide, and has no second derivative. It sums in float32, and multiplies
    float32 by three products of TensorFloat32, which is as good as float32. float64, and wider heads, run the
    reference. What is NaN or infinite reaches some tokens that do not see it too: none before its window and
    more than 64 tokens before it, and never another stream.

    Args:
        qkv: queries, keys and values, [b, n, 3, h, e].
        window_size: w, at least 1.
        causal: whether tokens see those before them alone.
        mask: bool [b, n], False for tokens that no other may see.
        backend: "torch", "triton", or None to pick by device.

    Returns:
        [b, n, h, e], in the dtype of ``qkv``.

    Raises:
        TypeError: ``qkv`` is not floating point, or ``mask`` not bool.
        ValueError: the shapes do not fit, the devices differ, or the backend cannot run here.
    """
    check_floating("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [b, n, 3, h, e], got {tuple(qkv.shape)}")
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {given}")
        if mask.shape != qkv.shape[:2]:
            raise ValueError(f"mask must have shape {tuple(qkv.shape[:2])}, got {tuple(mask.shape)}")
        if mask.device != qkv.device:
            raise ValueError(f"mask must be on the device of qkv, {qkv.device}, got {mask.device}")
    window_size = min(window_size, max(qkv.shape[1], 1))  # a wider one has nothing more to see
    backend = resolve_backend(backend, qkv)
    if backend == "triton" and qkv.dtype != torch.float64 and qkv.shape[-1] <= WIDEST and qkv.numel() > 0:
        out: Tensor = _attend(qkv, mask, window_size, causal)[0]
        return out
    q, kv = torch.split(qkv, [1, 2], dim=2)
    return attend_to_windows(q[:, :, 0], kv, window_size=window_size, causal=causal, mask=mask)


def attend_to_windows(
    q: Tensor, kv: Tensor, *, window_size: int, causal: bool, mask: Tensor | None
) -> Tensor:
    """`local_attention` of the last tokens among those that keys and values are given of, in plain PyTorch.

    It runs in `scaled_dot_product_attention`, on windows of queries beside the two or three windows of keys
    around them.

    Args:
        q: queries of the last tokens, [b, n, h, e].
        kv: keys and values, [b, t, 2, h, e] with t >= n. The first is at the start of a window.
        window_size: see `local_attention`, as for ``causal``.
        causal: see there.
        mask: bool [b, t].

    Returns:
        [b, n, h, e].
    """
    (b, n, h, _), places, w = q.shape, kv.shape[1], window_size
    first = (places - n) // w * w  # where the first query's window begins
    if first + w >= places:
        return _attend_within_one(q, kv[:, max(first - w, 0) :], w, causal, mask)
    end = -(-places // w) * w
    before = places - n - first
    q = F.pad(q, (0, 0, 0, 0, before, end - places))
    q = rearrange(q, "b (c w) h e -> (b c) h w e", w=w)
    windows = _windows(kv.flatten(2), first, end, w, causal)
    k, v = rearrange(windows, "b c w (two h e) -> two (b c) h w e", two=2, h=h)
    visible = _visible(mask, kv, first, end, w, causal)
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    out = rearrange(out, "(b c) h w e -> b (c w) h e", b=b, c=(end - first) // w)
    return out[:, before : before + n]


def _attend_within_one(q: Tensor, kv: Tensor, w: int, causal: bool, mask: Tensor | None) -> Tensor:
    """The same where all queries are in one window: without padding, from the start of the window before."""
    n, places = q.shape[1], kv.shape[1]
    distance = (
        torch.arange(places, device=q.device) - torch.arange(places - n, places, device=q.device)[:, None]
    )
    visible = distance <= 0 if causal else distance.abs() <= w
    if mask is not None:
        visible = ((visible & mask[:, None, mask.shape[1] - places :]) | (distance == 0))[:, None]
    k, v = kv.transpose(1, 3).unbind(2)  # [b, h, places, e]
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible)
    return out.transpose(1, 2)


def _windows(rows: Tensor, first: int, end: int, w: int, causal: bool) -> Tensor:
    """Rows [b, places, f] around each window from `first` to `end`, [b, c, 2w or 3w, f].

    They begin one window before, and run to the end of the window, or of the next one if not causal. Rows
    that are not there are zero.
    """
    around = 2 if causal else 3
    rows = F.pad(rows, (0, 0, w - first, end - rows.shape[1] + (around - 2) * w))
    windows = rearrange(rows, "b (c w) f -> b c w f", w=w)
    count = (end - first) // w
    return torch.cat([windows[:, i : i + count] for i in range(around)], dim=2)


def _visible(mask: Tensor | None, kv: Tensor, first: int, end: int, w: int, causal: bool) -> Tensor:
    """Which keys each query sees, bool [b c, 1, w, 2w or 3w]."""
    b, places = kv.shape[:2]
    if mask is None:
        mask = torch.ones(1, places, dtype=torch.bool, device=kv.device)
    present = _windows(mask[..., None], first, end, w, causal)[..., 0]  # [b or 1, c, 2w or 3w]
    place = torch.arange(w, device=kv.device)[:, None]
    distance = torch.arange(-w, present.shape[-1] - w, device=kv.device) - place
    near = distance <= 0 if causal else distance.abs() <= w
    visible = (present[:, :, None] & near) | (distance == 0)
    return visible.expand(b, -1, -1, -1).flatten(0, 1)[:, None]


@torch.library.custom_op("xlroute::local_attention", mutates_args=())
def _attend(qkv: Tensor, mask: Tensor | None, window_size: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The output [b, n, h, e], and the logarithm of what each softmax is divided by, float32 [b, h, n]."""
    from xlroute.kernels import local_attention_triton

    return local_attention_triton.forward(qkv, mask, window_size, causal)


@torch.library.custom_op("xlroute::local_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, window_size: int, causal: bool
) -> Tensor:
    """The gradient of queries, keys and values [b, n, 3, h, e]."""
    from xlroute.kernels import local_attention_triton

    return local_attention_triton.backward(grad, qkv, mask, out, sums, window_size, causal)


@_attend.register_fake
def _(qkv: Tensor, mask: Tensor | None, window_size: int, causal: bool) -> tuple[Tensor, Tensor]:
    b, n, _, h, e = qkv.shape
    return qkv.new_empty((b, n, h, e)), qkv.new_empty((b, h, n), dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, window_size: int, causal: bool
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, mask, ctx.window_size, ctx.causal = inputs
    ctx.save_for_backward(qkv, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return _backward(grad, *ctx.saved_tensors, ctx.window_size, ctx.causal), None, None, None


_attend.register_autograd(_autograd, setup_context=_setup_context)
