"""Norms of rows: one read of them forward; backward, one of them and of all gradients that meet there.

Each program of the backward takes rows in turn and keeps the sums that the gradients of weight and bias are
made of. Their number depends on d alone, so that the order of summation does.
"""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = 4096  # elements that a program of the forward takes

BACKWARD = 2048  # those that one of the backward takes at once: it holds its sums besides

WARPS = 2048  # of all programs of the backward together; about 16 a multiprocessor


def block(d: int, elements: int) -> tuple[int, int, int]:
    """Rows and columns that a program takes at once, and its warps."""
    width = max(16, triton.next_power_of_2(d))
    rows = max(1, min(64, elements // width))
    return rows, width, max(4, rows * width * 4 // elements)


@triton.jit(do_not_specialize=("rows",))  # type: ignore[untyped-decorator]
def norm_fwd_kernel(
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_bias: tl.tensor,
    p_out: tl.tensor,
    p_stats: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    eps: tl.float32,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """BR rows: their norms, and 1 / norm, and below those the means."""
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_row = o_row < rows
    m_d = o_d < D
    m = m_row[:, None] & m_d[None, :]
    b_x = tl.load(p_x + o_row[:, None] * stride + o_d[None, :], mask=m, other=0.0).to(tl.float32)  # [BR, BD]
    if CENTERED:
        b_mean = tl.sum(b_x, axis=1) / D
        tl.store(p_stats + rows + o_row, b_mean, mask=m_row)
        b_x = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
    tl.store(p_stats + o_row, b_inverse, mask=m_row)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_x * b_inverse[:, None] * b_weight[None, :]
    if HAS_BIAS:
        b_out += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=("rows", "tiles"))  # type: ignore[untyped-decorator]
def norm_bwd_kernel(
    p_grad: tl.tensor,
    p_other_0: tl.tensor,
    p_other_1: tl.tensor,
    p_other_2: tl.tensor,
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_stats: tl.tensor,
    p_dx: tl.tensor,
    p_parts: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    stride: tl.tensor,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    OTHERS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Every so many tiles of BR rows: their gradients, and a share of those of weight and bias."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BR, BD], tl.float32)
    b_dbias = tl.zeros([BR, BD], tl.float32)
    for i_tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        o_row = (i_tile * BR + tl.arange(0, BR)).to(tl.int64)
        m_row = o_row < rows
        m = m_row[:, None] & m_d[None, :]
        o = o_row[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x + o_row[:, None] * stride + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)  # [BR, BD]
        b_others = tl.zeros([BR, BD], tl.float32)  # loaded now, as the sums below wait for all loads before
        if OTHERS > 0:
            b_others += tl.load(p_other_0 + o, mask=m, other=0.0).to(tl.float32)
        if OTHERS > 1:
            b_others += tl.load(p_other_1 + o, mask=m, other=0.0).to(tl.float32)
        if OTHERS > 2:
            b_others += tl.load(p_other_2 + o, mask=m, other=0.0).to(tl.float32)
        b_inverse = tl.load(p_stats + o_row, mask=m_row, other=0.0)  # [BR]
        if CENTERED:
            b_x = b_x - tl.load(p_stats + rows + o_row, mask=m_row, other=0.0)[:, None]
        b_x = b_x * b_inverse[:, None]
        b_dweight += b_grad * b_x
        if HAS_BIAS:
            b_dbias += b_grad
        b_grad = b_grad * b_weight[None, :]
        b_dx = b_grad - b_x * (tl.sum(b_grad * b_x, axis=1) / D)[:, None]
        if CENTERED:
            b_dx = b_dx - (tl.sum(b_grad, axis=1) / D)[:, None]
        b_dx = b_dx * b_inverse[:, None] + b_others
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
    p_parts += tl.program_id(0).to(tl.int64) * ((1 + HAS_BIAS) * D)
    tl.store(p_parts + o_d, tl.sum(b_dweight, axis=0), mask=m_d)
    if HAS_BIAS:
        tl.store(p_parts + D + o_d, tl.sum(b_dbias, axis=0), mask=m_d)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, centered: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The norms of rows x [..., d], not empty; float32 [1 or 2, rows], 1 / norm, and the mean if centered."""
    flat = _flat(x)
    rows, d = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((1 + centered, rows), dtype=torch.float32, device=x.device)
    at_once, width, warps = block(d, FORWARD)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        norm_fwd_kernel[(triton.cdiv(rows, at_once),)](
            flat,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            out,
            stats,
            rows,
            flat.stride(0),
            eps,
            D=d,
            BR=at_once,
            BD=width,
            CENTERED=centered,
            HAS_BIAS=bias is not None,
            num_warps=warps,
        )
    return out, stats


def backward(
    grad: Tensor, others: list[Tensor], x: Tensor, weight: Tensor, stats: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x [..., d] with at most three others added; float32 [1 or 2, d], of weight and bias."""
    flat = _flat(x)
    rows, d = flat.shape
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    at_once, width, warps = block(d, BACKWARD)
    tiles = triton.cdiv(rows, at_once)
    programs = min(tiles, WARPS // warps)
    parts = torch.empty((programs, 1 + has_bias, d), dtype=torch.float32, device=x.device)
    others = [other.contiguous() for other in others]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        norm_bwd_kernel[(programs,)](
            grad.contiguous(),
            *others,
            *[d_x] * (3 - len(others)),
            flat,
            weight.contiguous(),
            stats,
            d_x,
            parts,
            rows,
            tiles,
            flat.stride(0),
            D=d,
            BR=at_once,
            BD=width,
            OTHERS=len(others),
            CENTERED=stats.shape[0] > 1,
            HAS_BIAS=has_bias,
            num_warps=warps,
        )
    return d_x, parts.sum(0)


def _flat(x: Tensor) -> Tensor:
    """Rows [rows, d], each in one piece."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
