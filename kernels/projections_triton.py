"""Projections of rows to unit length in one launch that reads the rows once.

A program multiplies a block of rows with all columns of some sets, up to COLUMNS of them: with all, for the
usual few. Their products stay in registers until their lengths are known. Programs of further sets follow
each other, so that they find the rows in the L2 cache, as all programs do the projection.
"""

# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.projections import SHORTEST

COLUMNS = 256  # that a program multiplies its rows with
PRODUCTS = 1 << 14  # that a program holds in registers; half of them for products in float32
ROWS = 128  # of a program, at most
DEPTH = 128  # bytes of a row that are multiplied at once
STAGES = 3  # one is multiplied while the others are on their way


@triton.jit(do_not_specialize=("m", "tiles"))  # type: ignore[untyped-decorator]
def unit_projections_kernel(
    p_rows: tl.tensor,
    p_projection: tl.tensor,
    p_out: tl.tensor,
    m: tl.tensor,
    tiles: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    stride_ob: tl.tensor,
    stride_or: tl.tensor,
    stride_om: tl.tensor,
    stride_oe: tl.tensor,
    R: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    SETS: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    SHORTEST: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Projections of BM rows by SETS sets, each divided by its length.

    In place of rows beyond the last, that one is read once more.
    """
    GROUPS: tl.constexpr = (R + SETS - 1) // SETS
    i_b = (tl.program_id(0) // GROUPS // tiles).to(tl.int64)
    i_set = tl.program_id(0) % GROUPS * SETS
    o_m = tl.program_id(0) // GROUPS % tiles * BM + tl.arange(0, BM)
    o_column = tl.arange(0, SETS * BE)
    o_set = i_set + o_column // BE
    o_e = o_column % BE
    m_column = (o_set < R) & (o_e < E)
    p_row = p_rows + i_b * stride_b + (tl.minimum(o_m, m - 1).to(tl.int64) * stride_m)[:, None]
    p_token = p_projection + ((o_set * E + o_e) * D)[:, None]
    b_sum = tl.zeros([BM, SETS * BE], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = (o_d < D)[None, :]
        b_row = tl.load(p_row + o_d[None, :], mask=m_d, other=0.0).to(DOT)  # [BM, BD]
        b_token = tl.load(p_token + o_d[None, :], mask=m_column[:, None] & m_d, other=0.0).to(DOT)
        b_sum = tl.dot(b_row, tl.trans(b_token), b_sum, input_precision=PRECISION)
    b_key = tl.reshape(b_sum, (BM, SETS, BE))
    b_length = tl.sqrt(tl.sum(b_key * b_key, axis=2))  # [BM, SETS]
    # Not the maximum of both, which passes over NaN.
    b_length = tl.where(b_length < SHORTEST, SHORTEST, b_length)
    b_key = b_key / b_length[:, :, None]
    o_set = i_set + tl.arange(0, SETS)
    o_e = tl.arange(0, BE)
    o_to = (o_set.to(tl.int64) * stride_or)[:, None] + (o_e.to(tl.int64) * stride_oe)[None, :]
    o_to = (o_m.to(tl.int64) * stride_om)[:, None, None] + o_to[None, :, :]
    m_to = (o_m < m)[:, None, None] & (o_set < R)[None, :, None] & (o_e < E)[None, None, :]
    tl.store(p_out + i_b * stride_ob + o_to, b_key.to(p_out.dtype.element_ty), mask=m_to)


def can_project(rows: Tensor, projection: Tensor) -> bool:
    """Whether this kernel takes such rows and projections."""
    return rows.dtype != torch.float64 and projection.shape[1] <= COLUMNS


def constants(r: int, e: int, d: int, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """What the kernel is compiled for, with rows of some type."""
    wide = dtype != torch.bfloat16
    exact = wide and not tf32
    width = max(16, triton.next_power_of_2(e))
    sets = min(triton.next_power_of_2(r), COLUMNS // width)
    columns = sets * width
    return {
        "R": r,
        "E": e,
        "D": d,
        "SETS": sets,
        "BE": width,
        "BM": min(ROWS, (PRODUCTS // 2 if exact else PRODUCTS) // columns),
        "BD": max(16, min(DEPTH // (4 if wide else 2), triton.next_power_of_2(d))),
        "SHORTEST": SHORTEST,
        "DOT": tl.float32 if wide else tl.bfloat16,
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": 4 if columns <= 64 else 8,
        "num_stages": STAGES,
    }


def project(rows: Tensor, projection: Tensor, out: Tensor) -> None:
    """`xlroute.kernels.unit_projections` where `can_project` says so, for what is not empty."""
    b, m, d = rows.shape
    r, e, _ = projection.shape
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    options = constants(r, e, d, rows.dtype, _allows_tf32())
    if not rows.is_cuda:
        options["DOT"] = tl.float32  # the interpreter's bfloat16 is wrong
    tiles = triton.cdiv(m, options["BM"])
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        unit_projections_kernel[(b * tiles * triton.cdiv(r, options["SETS"]),)](
            rows,
            projection.to(torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32).contiguous(),
            out,
            m,
            tiles,
            rows.stride(0),
            rows.stride(1),
            *out.stride(),
            **options,
        )


def _allows_tf32() -> bool:
    """Whether PyTorch may use TF32 for matrix products of float32."""
    # From PyTorch 2.9 on; the older name raises an error where the newer was set.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return bool(precision == "tf32")
