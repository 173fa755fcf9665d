"""Attention over given keys and values: one function in front of every backend.

Shapes: b streams, h heads, n queries, m keys, e dim_head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionBackend = Literal["sdpa", "math", "flash"]
LEAST = -3e4  # for a logit whose key is not to be seen, where -inf would leave NaN in gradients


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: AttentionBackend = "sdpa",
) -> Tensor:
    """Softmax attention, softmax(q kᵀ / √e + bias) v (Vaswani et al., arXiv 1706.03762).

    Args:
        q: queries [b, h, n, e].
        k: keys [b, h, m, e].
        v: values [b, h, m, e].
        mask: bool, broadcastable to [b, h, n, m]; True where a query may look. Every query needs one key.
        bias: float, broadcastable to [b, h, n, m], added to the logits.
        dropout: probability with which an attention weight is dropped.
        backend: "sdpa", PyTorch's `scaled_dot_product_attention`, which picks the fastest kernel of the
            device; "math", the formula written out; "flash", the flash-attn package, for half precision on a
            GPU.

    Returns:
        [b, h, n, e], the dtype of `v`.

    Raises:
        ValueError: for an unknown backend, or inputs that the flash-attn package cannot take.
        ImportError: for "flash" without the flash-attn package.
    """
    if backend == "flash":
        return _flash(q, k, v, mask=mask, bias=bias, dropout=dropout)
    if backend not in ("sdpa", "math"):
        raise ValueError(f"backend: expected 'sdpa', 'math' or 'flash', got {backend!r}")
    if backend == "sdpa" and bias is not None and _belongs_in_the_products(q, mask, bias):
        hidden = bias if mask is None else bias.masked_fill(~mask, LEAST)
        wider = _with_bias_inside(q, k, v, hidden)
        out = F.scaled_dot_product_attention(*wider, dropout_p=dropout, scale=q.shape[-1] ** -0.5)
        return out[..., : v.shape[-1]]
    attn_mask = mask
    if bias is not None:
        # The logits of the products have the dtype of q, and so must what is added to them.
        attn_mask = bias.to(q.dtype)
        if mask is not None:
            attn_mask = attn_mask.masked_fill(~mask, -math.inf)
    if backend == "sdpa":
        # For one query that takes what it saves. A cast that comes after it would lay it out anew.
        if bias is not None and attn_mask is not None and q.is_cuda and q.shape[-2] > 1:
            attn_mask = _aligned(attn_mask.to(_dtype_of_products(q)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if bias is None else logits + attn_mask
    weights = F.dropout(logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)), dropout)
    return weights.to(v.dtype) @ v


def _aligned(bias: Tensor) -> Tensor:
    """A bias [..., m] whose rows begin at a multiple of 16 bytes.

    With any other, PyTorch's fastest kernel that takes one needs 1.8 times as long on an H100, with 513 keys.
    """
    m = bias.shape[-1]
    return F.pad(bias, (0, -m % 8))[..., :m] if m % 8 else bias


def _belongs_in_the_products(q: Tensor, mask: Tensor | None, bias: Tensor) -> bool:
    """Whether a bias, the same for all queries, wants a gradient, for which the fastest kernels have none.

    PyTorch takes its memory-efficient kernel then, which needs 1.7 times as long on an H100, with 513 keys.
    """
    if not (bias.requires_grad and prefers_no_bias(q.device)):
        return False
    alike = all(each is None or (each.ndim > 1 and each.shape[-2] == 1) for each in (bias, mask))
    return alike and _dtype_of_products(q) in (torch.float16, torch.bfloat16)


def prefers_no_bias(device: torch.device) -> bool:
    """Whether attention without a bias is that much faster."""
    return device.type == "cuda"


def _dtype_of_products(q: Tensor) -> torch.dtype:
    """In which attention to queries computes."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:  # which it leaves as it is
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype


def _with_bias_inside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose products have a bias [b, h, 1, m] in them, wider by up to 8 numbers.

    Each key has its bias as one number more, and each query √e, so that √e bias / √e joins the logit.
    """
    e, dtype = q.shape[-1], _dtype_of_products(q)
    fill = 7 - e % 8  # widths of a multiple of 8 are those that all kernels take
    root = F.pad(q.new_full((1,), e**0.5, dtype=dtype), (0, fill)).expand(*q.shape[:-1], -1)
    column = F.pad(bias.to(dtype).mT, (0, fill)).expand(*k.shape[:-1], -1)
    q, k = torch.cat((q.to(dtype), root), dim=-1), torch.cat((k.to(dtype), column), dim=-1)
    return q, k, F.pad(v.to(dtype), (0, 1 + fill))


def _flash(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, bias: Tensor | None, dropout: float
) -> Tensor:
    if mask is not None or bias is not None:
        raise ValueError(
            "backend: 'flash' takes neither a mask nor a bias; expected 'sdpa' for rows of unequal length"
        )
    _require_half_on_cuda(q)
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ImportError(
            "backend: 'flash' needs the flash-attn package: pip install xlroute[flash]"
        ) from error
    # The package keeps heads behind positions: [b, n, h, e].
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor = flash_attn_func(q, k, v, dropout_p=dropout)
    return out.transpose(1, 2)


def _require_half_on_cuda(q: Tensor) -> None:
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            "backend: 'flash' expected float16 or bfloat16 tensors on a CUDA device, "
            f"got {q.dtype} on {q.device.type}"
        )
