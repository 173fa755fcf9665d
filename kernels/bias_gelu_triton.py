"""GELU of hidden units and their bias: one read of them forward; backward, one of them and the gradient.

Each program of the backward takes rows in turn, of the same columns, and keeps the sums that the gradient of
the bias is made of. Their number depends on d alone, so that the order of summation does.
"""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # that a program takes at once

WIDTH = 512  # of the columns that a program takes, at most

PROGRAMS = 512  # of the backward; about 4 a multiprocessor


def block(d: int) -> tuple[int, int]:
    """Rows and columns that a program takes at once."""
    width = max(16, min(WIDTH, triton.next_power_of_2(d)))
    return min(64, ELEMENTS // width), width


@triton.jit  # type: ignore[untyped-decorator]
def normal_below(b_z: tl.tensor) -> tl.tensor:
    """How much of the standard normal distribution lies below z."""
    return 0.5 + 0.5 * tl.erf(b_z * 0.7071067811865476)


@triton.jit(do_not_specialize=("rows",))  # type: ignore[untyped-decorator]
def bias_gelu_fwd_kernel(
    p_h: tl.tensor,
    p_bias: tl.tensor,
    p_out: tl.tensor,
    rows: tl.tensor,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """BR rows of BD columns."""
    columns: tl.constexpr = (D + BD - 1) // BD
    o_row = (tl.program_id(0) // columns).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.program_id(0) % columns * BD + tl.arange(0, BD)
    m_d = o_d < D
    m = (o_row < rows)[:, None] & m_d[None, :]
    o = o_row[:, None] * D + o_d[None, :]
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_z = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]  # [BR, BD]
    tl.store(p_out + o, (b_z * normal_below(b_z)).to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=("rows", "tiles"))  # type: ignore[untyped-decorator]
def bias_gelu_bwd_kernel(
    p_grad: tl.tensor,
    p_h: tl.tensor,
    p_bias: tl.tensor,
    p_dh: tl.tensor,
    p_parts: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Every so many tiles of BR rows of BD columns: gradients, and a share of that of the bias."""
    columns: tl.constexpr = (D + BD - 1) // BD
    i_program = tl.program_id(0) // columns
    o_d = tl.program_id(0) % columns * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dbias = tl.zeros([BR, BD], tl.float32)
    for i_tile in range(i_program, tiles, tl.num_programs(0) // columns):
        o_row = (i_tile * BR + tl.arange(0, BR)).to(tl.int64)
        m = (o_row < rows)[:, None] & m_d[None, :]
        o = o_row[:, None] * D + o_d[None, :]
        b_z = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]  # [BR, BD]
        b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
        b_density = tl.exp(-0.5 * b_z * b_z) * 0.3989422804014327
        b_dh = b_grad * (normal_below(b_z) + b_z * b_density)
        b_dbias += b_dh
        tl.store(p_dh + o, b_dh.to(p_dh.dtype.element_ty), mask=m)
    tl.store(p_parts + i_program.to(tl.int64) * D + o_d, tl.sum(b_dbias, axis=0), mask=m_d)


def forward(h: Tensor, bias: Tensor) -> Tensor:
    """GELU of h [..., d], not empty, and its bias [d]."""
    h = h.contiguous()
    d = h.shape[-1]
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    rows, width = block(d)
    tiles = triton.cdiv(h.numel() // d, rows)
    with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
        bias_gelu_fwd_kernel[(tiles * triton.cdiv(d, width),)](
            h, bias.contiguous(), out, h.numel() // d, D=d, BR=rows, BD=width, num_warps=4
        )
    return out


def backward(grad: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of h [..., d], not empty, and float32 [d], that of the bias."""
    h = h.contiguous()
    d = h.shape[-1]
    d_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    rows, width = block(d)
    tiles = triton.cdiv(h.numel() // d, rows)
    columns = triton.cdiv(d, width)
    programs = min(tiles, max(1, PROGRAMS // columns))
    parts = torch.empty((programs, d), dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):  # type: ignore[no-untyped-call]
        bias_gelu_bwd_kernel[(programs * columns,)](
            grad.contiguous(),
            h,
            bias.contiguous(),
            d_h,
            parts,
            h.numel() // d,
            tiles,
            D=d,
            BR=rows,
            BD=width,
            num_warps=4,
        )
    return d_h, parts.sum(0)
