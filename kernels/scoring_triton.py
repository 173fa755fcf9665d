"""Scores of memory rows, and their gradients, in one read of the rows each.

Forward, one launch for up to four routing tokens: ``row_scores_fwd_kernel`` holds a tile of rows in
registers, multiplies it by every token and sums. For more tokens it would compute for longer than it reads.
Then ``row_scores_split_kernel`` cuts the tokens into bfloat16 parts that add up to them exactly, and
``row_scores_dot_fwd_kernel`` multiplies the rows by each part on the tensor cores: bfloat16 products are
exact in float32. A tensor core does not round its sums but cuts them off, so each covers a short piece of a
row, and the pieces are added in float32 as usual. Rows in float16 and float32 are cut into parts as well.

The order in which a score is summed must depend on d, the number of tokens and the dtypes alone. The compiler
lays a sum out over threads by the alignment that it knows of. So rows always arrive at addresses that are
multiples of 16 bytes, with strides that are counted in 16 bytes, and no other argument is specialised: one
compiled kernel for all shapes, offsets, strides and batches. Rows that lie at other addresses are copied into
scratch memory, a bounded piece at a time.

Gradient of the tokens, two launches: each program sums over a span of rows, and the partial sums are added in
a second kernel. Blocks of rows whose gradients are all exactly zero are not read: they would add zeros, as
long as the rows are finite. Gradient of the rows, one launch.
"""

# ruff: noqa: N803, RUF005

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype

VECTOR = 16  # bytes that one thread reads at once
FEW_TOKENS = 4  # as many are scored without tensor cores, and as many at a time in float64
MOST_TOKENS = 64  # that the tensor cores score in one read of the rows
TILE = 1 << 14  # bytes of rows that a program holds in registers, twice as much for up to two tokens
DOT_ROWS = 128  # rows of a tile for the tensor cores
DOT_WIDTH = 64  # products that they sum on their own
SCRATCH = 1 << 23  # bytes of scratch memory, for copies of rows and for partial sums
PROGRAMS = 512  # that share the rows in the backward

_TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
_PARTS = {torch.bfloat16: 1, torch.float16: 2}  # bfloat16 parts that are exact together; else three

_SIZES = ("m", "tiles", "span", "programs", "per_stream")
# The alignment that a kernel knows of decides over the order of its sums. It knows that of rows and parts,
# which is always the same, and of nothing else.
_UNSPECIALISED = (
    *_SIZES,
    "p_tokens",
    "p_scores",
    "p_inverse",
    "stride_b",
    "stride_m",
    "stride_sb",
    "stride_sr",
    "stride_ib",
)


class Plan(NamedTuple):
    """How the forward without tensor cores cuts up rows of one width and dtype."""

    rows: int  # of a tile
    width: int  # columns that one warp reads at once, in vectors of 16 bytes
    pieces: int  # such widths that are held at a time


def plan(d: int, r: int, itemsize: int) -> Plan:
    """The plan for rows of d elements and r tokens: no more than four pieces at a time, shared out evenly."""
    width = min(triton.next_power_of_2(d), 32 * VECTOR // itemsize)
    pieces = triton.cdiv(d, width)
    pieces = triton.cdiv(pieces, triton.cdiv(pieces, 4))
    tile = 2 * TILE if r <= 2 and itemsize <= 4 else TILE
    rows = tile // (triton.next_power_of_2(pieces) * width * itemsize)
    return Plan(min(rows, 128), width, pieces)


def dot_group(r: int) -> int:
    """How many of r tokens, padded, the tensor cores score at once."""
    return int(min(max(triton.next_power_of_2(r), 16), MOST_TOKENS))


def backward_block(d: int, r: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a block of the gradient of up to four tokens."""
    width = min(triton.next_power_of_2(d), 32 * VECTOR // itemsize)
    tile = TILE // 2 if r > 2 and itemsize == 8 else TILE
    return min(tile // (width * itemsize), 64), width


def dot_backward_width(d: int, r: int, parts: int) -> int:
    """Columns of a block of the gradient of many tokens: a program sums 8192 numbers at most."""
    widest = min(8192 // dot_group(r), 256 if parts == 1 else 128)
    return int(min(max(triton.next_power_of_2(d), 16), widest))


def backward_rows_block(d: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a block of the gradient of the rows."""
    elements = 4096 if itemsize == 8 else 8192
    width = min(triton.next_power_of_2(d), elements // 8)
    return min(elements // width, 64), width


@triton.jit  # type: ignore[untyped-decorator]
def inverse_norm(b_squares: tl.tensor, COUNT: tl.constexpr, EPS: tl.constexpr) -> tl.tensor:
    """1 / sqrt(b_squares / COUNT + EPS), correctly rounded at each step; 1 if COUNT is 0."""
    if COUNT == 0:
        b_inverse = tl.full(b_squares.shape, 1.0, b_squares.dtype)
    elif b_squares.dtype == tl.float64:
        b_inverse = 1.0 / tl.sqrt(b_squares / COUNT + EPS)
    else:
        b_mean = tl.div_rn(b_squares, tl.full(b_squares.shape, COUNT, tl.float32))
        b_ones = tl.full(b_squares.shape, 1.0, tl.float32)
        b_inverse = tl.div_rn(b_ones, tl.sqrt_rn(b_mean + EPS))
    return b_inverse


@triton.jit  # type: ignore[untyped-decorator]
def part(b_x: tl.tensor, I: tl.constexpr, DOT: tl.constexpr) -> tl.tensor:  # noqa: E741
    """Part I of float32 numbers: the bfloat16 nearest to what the parts before it leave."""
    b_part = b_x.to(tl.bfloat16)
    for _ in tl.static_range(I):
        b_x -= b_part.to(tl.float32)
        b_part = b_x.to(tl.bfloat16)
    return b_part.to(DOT)


@triton.jit(do_not_specialize=_UNSPECIALISED)  # type: ignore[untyped-decorator]
def row_scores_fwd_kernel(
    p_rows: tl.tensor,
    p_tokens: tl.tensor,
    p_scores: tl.tensor,
    p_inverse: tl.tensor,
    m: tl.tensor,
    tiles: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    stride_sb: tl.tensor,
    stride_sr: tl.tensor,
    stride_ib: tl.tensor,
    per_stream: tl.tensor,
    scale: tl.float64,
    D: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    PIECES: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Scores of BM rows against GROUP of the R tokens. Strides of the rows are in units of VEC elements."""
    i_b = tl.program_id(0).to(tl.int64) // tiles
    # The last of several groups may overlap the one before, and writes the same scores again.
    i_r = tl.minimum(tl.program_id(1) * GROUP, R - GROUP)
    o_m = (tl.program_id(0).to(tl.int64) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < m
    o_d = tl.arange(0, BD)
    p_rows = tl.multiple_of(p_rows + i_b * stride_b * VEC, 16)
    p_tokens += (i_b * per_stream * R + i_r) * D
    b_squares = tl.zeros([BM], ACC)
    b_scores: tl.tuple = ()
    for _ in tl.static_range(GROUP):
        b_scores = b_scores + (tl.zeros([BM], ACC),)
    for i_d in tl.range(0, D, PIECES * BD):
        b_x: tl.tuple = ()  # PIECES x [BM, BD]
        for i in tl.static_range(PIECES):
            p_x = p_rows + (o_m * stride_m * VEC)[:, None] + (i_d + i * BD + o_d)[None, :]
            m_x = m_m[:, None] & (i_d + i * BD + o_d < D)[None, :]
            b_x = b_x + (tl.load(p_x, mask=m_x, other=0.0).to(ACC),)
        if COUNT != 0:
            b_sum = b_x[0] * b_x[0]
            for i in tl.static_range(1, PIECES):
                b_sum += b_x[i] * b_x[i]
            b_squares += tl.sum(b_sum, axis=1)
        b_next: tl.tuple = ()
        for j in tl.static_range(GROUP):
            b_sum = tl.zeros([BM, BD], ACC)
            for i in tl.static_range(PIECES):
                o_t = i_d + i * BD + o_d
                b_t = tl.load(p_tokens + j * D + o_t, mask=o_t < D, other=0.0).to(ACC)  # [BD]
                b_sum += b_x[i] * b_t[None, :]
            b_next = b_next + (b_scores[j] + tl.sum(b_sum, axis=1),)
        b_scores = b_next

    b_inverse = inverse_norm(b_squares, COUNT, EPS)
    if i_r == 0:
        tl.store(p_inverse + i_b * stride_ib + o_m, b_inverse, mask=m_m)
    b_inverse *= tl.full([BM], scale, ACC)
    for j in tl.static_range(GROUP):
        p_s = p_scores + i_b * stride_sb + (i_r + j).to(tl.int64) * stride_sr + o_m
        tl.store(p_s, b_scores[j] * b_inverse, mask=m_m)


@triton.jit  # type: ignore[untyped-decorator]
def row_scores_split_kernel(
    p_tokens: tl.tensor,
    p_parts: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    PARTS: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Parts [b, PARTS, RP, DP] of tokens [b, R, D], zero beyond the tokens and their ends."""
    i_b = tl.program_id(0).to(tl.int64) // RP
    i_r = tl.program_id(0) % RP
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    p_t = p_tokens + (i_b * R + i_r) * D + o_d
    b_t = tl.load(p_t, mask=o_d < tl.where(i_r < R, D, 0), other=0.0).to(tl.float32)  # [BD]
    for i in tl.static_range(PARTS):
        p_part = p_parts + ((i_b * PARTS + i) * RP + i_r) * DP + o_d
        tl.store(p_part, part(b_t, i, tl.bfloat16), mask=o_d < DP)


@triton.jit(do_not_specialize=_UNSPECIALISED)  # type: ignore[untyped-decorator]
def row_scores_dot_fwd_kernel(
    p_rows: tl.tensor,
    p_parts: tl.tensor,
    p_scores: tl.tensor,
    p_inverse: tl.tensor,
    m: tl.tensor,
    tiles: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    stride_sb: tl.tensor,
    stride_sr: tl.tensor,
    stride_ib: tl.tensor,
    per_stream: tl.tensor,
    scale: tl.float64,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    EPS: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    TOKEN_PARTS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Scores of BM rows against GROUP of the R tokens. Strides of the rows are in units of VEC elements."""
    i_b = tl.program_id(0).to(tl.int64) // tiles
    i_r = tl.program_id(1) * GROUP
    o_m = (tl.program_id(0).to(tl.int64) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < m
    o_d = tl.arange(0, BD)
    o_r = tl.arange(0, GROUP)
    p_x = tl.multiple_of(p_rows + i_b * stride_b * VEC, 16) + (o_m * stride_m * VEC)[:, None] + o_d[None, :]
    p_t = tl.multiple_of(p_parts + (i_b * per_stream * (TOKEN_PARTS * RP) + i_r) * DP, 16)
    p_t = p_t + o_d[:, None] + (o_r * DP)[None, :]
    b_factor = tl.full([BM, GROUP], scale, tl.float32)
    b_squares = tl.zeros([BM], tl.float32)
    b_scores = tl.zeros([BM, GROUP], tl.float32)
    # The pairs of parts whose product float32 can hold, the smallest first.
    LAST: tl.constexpr = min(ROW_PARTS + TOKEN_PARTS - 2, 2)
    for i_d in tl.range(0, D, BD):
        m_x = m_m[:, None] & (i_d + o_d < D)[None, :]
        b_x = tl.load(p_x + i_d, mask=m_x, other=0.0).to(tl.float32)  # [BM, BD]
        if COUNT != 0:
            b_squares += tl.sum(b_x * b_x, axis=1)
        b_dot = tl.zeros([BM, GROUP], tl.float32)
        for i in tl.static_range(LAST + 1):
            for j in tl.static_range(ROW_PARTS):
                if LAST - i - j >= 0 and LAST - i - j < TOKEN_PARTS:
                    b_t = tl.load(p_t + (LAST - i - j) * (RP * DP) + i_d)  # [BD, GROUP]
                    b_dot = tl.dot(part(b_x, j, DOT), b_t.to(DOT), b_dot)
        # The factor also keeps the compiler from summing on in the tensor cores.
        b_scores += b_dot * b_factor

    b_inverse = inverse_norm(b_squares, COUNT, EPS)
    if i_r == 0:
        tl.store(p_inverse + i_b * stride_ib + o_m, b_inverse, mask=m_m)
    p_s = p_scores + i_b * stride_sb + (i_r + o_r).to(tl.int64)[None, :] * stride_sr + o_m[:, None]
    tl.store(p_s, b_scores * b_inverse[:, None], mask=m_m[:, None] & (i_r + o_r < R)[None, :])


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def row_scores_bwd_tokens_kernel(
    p_grad: tl.tensor,
    p_rows: tl.tensor,
    p_inverse: tl.tensor,
    p_partial: tl.tensor,
    m: tl.tensor,
    span: tl.tensor,
    programs: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    stride_d: tl.tensor,
    scale: tl.float64,
    D: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    WARPS: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Sums over one span of rows, for BD columns and GROUP of the R tokens: partial [b, programs, R, D]."""
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    i_p = (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b = i_p // programs
    i_r = tl.program_id(1) * GROUP
    o_d = tl.program_id(0) % CHUNKS * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_scale = tl.full([BM], scale, ACC)
    p_rows += i_b * stride_b
    p_inverse += i_b * m
    p_grad += (i_b * R + i_r) * m
    m_wide = m.to(tl.int64)
    # A warp has a sum of its own until the end: [WARPS, BD] for each token.
    b_sums: tl.tuple = ()
    for _ in tl.static_range(GROUP):
        b_sums = b_sums + (tl.zeros([WARPS, BD], ACC),)
    first = i_p % programs * span
    for i_m in tl.range(first, min(first + span, m), BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < m
        b_factor = tl.load(p_inverse + o_m, mask=m_m, other=0.0) * b_scale  # [BM]
        b_weights: tl.tuple = ()  # GROUP x [BM]
        b_any = tl.zeros([BM], tl.int32)
        for j in tl.static_range(GROUP):
            m_g = o_m < tl.where(i_r + j < R, m, 0)
            b_grad = tl.load(p_grad + j * m_wide + o_m, mask=m_g, other=0.0)
            b_any |= (b_grad != 0).to(tl.int32)
            b_weights = b_weights + (b_grad * b_factor,)
        if tl.max(b_any, axis=0) != 0:
            p_x = p_rows + (o_m * stride_m)[:, None] + (o_d.to(tl.int64) * stride_d)[None, :]
            b_x = tl.load(p_x, mask=m_m[:, None] & m_d[None, :], other=0.0).to(ACC)  # [BM, BD]
            b_next: tl.tuple = ()
            for j in tl.static_range(GROUP):
                b_products = tl.reshape(b_x * b_weights[j][:, None], (BM // WARPS, WARPS, BD))
                b_next = b_next + (b_sums[j] + tl.sum(b_products, axis=0),)
            b_sums = b_next
    p_partial += (i_p * R + i_r) * D
    for j in tl.static_range(GROUP):
        tl.store(p_partial + j * D + o_d, tl.sum(b_sums[j], axis=0), mask=o_d < tl.where(i_r + j < R, D, 0))


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def row_scores_dot_bwd_tokens_kernel(
    p_grad: tl.tensor,
    p_rows: tl.tensor,
    p_inverse: tl.tensor,
    p_partial: tl.tensor,
    m: tl.tensor,
    span: tl.tensor,
    programs: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    stride_d: tl.tensor,
    scale: tl.float64,
    D: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_PARTS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Sums over one span of rows, for BD columns and GROUP of the R tokens: partial [b, programs, R, D]."""
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    i_p = (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b = i_p // programs
    o_r = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    m_r = o_r < R
    o_d = tl.program_id(0) % CHUNKS * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_scale = tl.full([BM], scale, tl.float32)
    p_rows += i_b * stride_b
    p_inverse += i_b * m
    p_grad += i_b * R * m
    b_sums = tl.zeros([BD, GROUP], tl.float32)
    LAST: tl.constexpr = 2
    first = i_p % programs * span
    for i_m in tl.range(first, min(first + span, m), BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < m
        p_g = p_grad + o_r.to(tl.int64)[None, :] * m + o_m[:, None]
        b_grad = tl.load(p_g, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, GROUP]
        b_any = tl.max((b_grad != 0).to(tl.int32), axis=1)
        if tl.max(b_any, axis=0) != 0:
            b_factor = tl.load(p_inverse + o_m, mask=m_m, other=0.0) * b_scale
            b_weights = b_grad * b_factor[:, None]
            p_x = p_rows + (o_m * stride_m)[:, None] + (o_d.to(tl.int64) * stride_d)[None, :]
            b_x = tl.load(p_x, mask=m_m[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BM, BD]
            b_dot = tl.zeros([BD, GROUP], tl.float32)
            for i in tl.static_range(LAST + 1):
                for j in tl.static_range(ROW_PARTS):
                    if LAST - i - j >= 0:
                        b_dot = tl.dot(tl.trans(part(b_x, j, DOT)), part(b_weights, LAST - i - j, DOT), b_dot)
            b_sums += b_dot
    p_p = p_partial + i_p * (R * D) + (o_r * D)[None, :] + o_d[:, None]
    tl.store(p_p, b_sums, mask=m_d[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def row_scores_bwd_reduce_kernel(
    p_partial: tl.tensor,
    p_result: tl.tensor,
    programs: tl.tensor,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Sums partial [b, programs, N] over the programs."""
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    i_b = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_n = tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_sum = tl.zeros([BN], ACC)
    for i_p in tl.range(0, programs, BP):
        o_p = i_p + tl.arange(0, BP)
        p_x = p_partial + (i_b * programs + o_p)[:, None] * N + o_n[None, :]
        b_sum += tl.sum(tl.load(p_x, mask=(o_p < programs)[:, None] & m_n[None, :], other=0.0), axis=0)
    tl.store(p_result + i_b * N + o_n, b_sum.to(p_result.dtype.element_ty), mask=m_n)


@triton.jit  # type: ignore[untyped-decorator]
def pulled(
    p_grad: tl.tensor,
    p_tokens: tl.tensor,
    m: tl.tensor,
    o_m: tl.tensor,
    o_d: tl.tensor,
    m_m: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """gradᵀ @ tokens for the rows o_m and the columns o_d."""
    b_v = tl.zeros([o_m.shape[0], o_d.shape[0]], ACC)
    m_wide = m.to(tl.int64)
    for i_r in tl.range(R):
        b_grad = tl.load(p_grad + i_r * m_wide + o_m, mask=m_m, other=0.0)
        b_t = tl.load(p_tokens + i_r * D + o_d, mask=o_d < D, other=0.0).to(ACC)
        b_v += b_grad[:, None] * b_t[None, :]
    return b_v


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def row_scores_bwd_rows_kernel(
    p_grad: tl.tensor,
    p_rows: tl.tensor,
    p_tokens: tl.tensor,
    p_inverse: tl.tensor,
    p_result: tl.tensor,
    m: tl.tensor,
    tiles: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    stride_d: tl.tensor,
    per_stream: tl.tensor,
    scale: tl.float64,
    D: tl.constexpr,
    R: tl.constexpr,
    COUNT: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Gradient of BM rows, [b, m, D]. Rows wider than BD are read twice, the second time from a cache."""
    i_b = tl.program_id(0).to(tl.int64) // tiles
    o_m = (tl.program_id(0).to(tl.int64) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < m
    p_x = p_rows + i_b * stride_b + (o_m * stride_m)[:, None]
    p_grad += i_b * R * m
    p_tokens += i_b * per_stream * (R * D)
    p_result += i_b * m * D
    b_inverse = tl.load(p_inverse + i_b * m + o_m, mask=m_m, other=0.0)
    b_factor = b_inverse * tl.full([BM], scale, ACC)
    b_dot = tl.zeros([BM], ACC)
    if D <= BD:
        o_d = tl.arange(0, BD)
        m_x = m_m[:, None] & (o_d < D)[None, :]
        b_v = pulled(p_grad, p_tokens, m, o_m, o_d, m_m, D, R, ACC)  # [BM, BD]
        if COUNT != 0:
            b_x = tl.load(p_x + (o_d.to(tl.int64) * stride_d)[None, :], mask=m_x, other=0.0).to(ACC)
            b_dot = tl.sum(b_x * b_v, axis=1) * b_inverse * b_inverse / COUNT
            b_v -= b_x * b_dot[:, None]
        b_v *= b_factor[:, None]
        p_r = p_result + (o_m * D)[:, None] + o_d[None, :]
        tl.store(p_r, b_v.to(p_result.dtype.element_ty), mask=m_x)
    else:
        if COUNT != 0:
            for i_d in tl.range(0, D, BD):
                o_d = i_d + tl.arange(0, BD)
                m_x = m_m[:, None] & (o_d < D)[None, :]
                b_v = pulled(p_grad, p_tokens, m, o_m, o_d, m_m, D, R, ACC)
                b_x = tl.load(p_x + (o_d.to(tl.int64) * stride_d)[None, :], mask=m_x, other=0.0).to(ACC)
                b_dot += tl.sum(b_x * b_v, axis=1)
            b_dot *= b_inverse * b_inverse / COUNT
        for i_d in tl.range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_x = m_m[:, None] & (o_d < D)[None, :]
            b_v = pulled(p_grad, p_tokens, m, o_m, o_d, m_m, D, R, ACC)
            if COUNT != 0:
                b_x = tl.load(p_x + (o_d.to(tl.int64) * stride_d)[None, :], mask=m_x, other=0.0).to(ACC)
                b_v -= b_x * b_dot[:, None]
            b_v *= b_factor[:, None]
            p_r = p_result + (o_m * D)[:, None] + o_d[None, :]
            tl.store(p_r, b_v.to(p_result.dtype.element_ty), mask=m_x)


def streams(rows: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Views [b, m, d] of rows [..., m, d], each with its index into the first dimensions: mostly just one."""
    try:
        yield (), rows.view(-1, *rows.shape[-2:])
    except RuntimeError:  # the strides of the first dimensions do not fold into one
        for i in range(rows.shape[0]):
            for index, view in streams(rows[i]):
                yield (i, *index), view


def flat_tokens(tokens: Tensor) -> Tensor:
    """Tokens [..., r, d] as contiguous [b, r, d], with b = 1 if all streams share them."""
    lead = tokens.ndim - 2
    if all(tokens.stride(i) == 0 or tokens.shape[i] == 1 for i in range(lead)):
        tokens = tokens[(0,) * lead]
    return tokens.reshape(-1, *tokens.shape[-2:]).contiguous()


def is_aligned(rows: Tensor) -> bool:
    """Whether rows [b, m, d] are contiguous and each starts at a multiple of 16 bytes."""
    vector = VECTOR // rows.itemsize
    b, m, d = rows.shape
    return (
        (d == 1 or rows.stride(2) == 1)
        and (m == 1 or rows.stride(1) % vector == 0)
        and (b == 1 or rows.stride(0) % vector == 0)
        and rows.data_ptr() % VECTOR == 0
    )


def aligned_pieces(rows: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows [b, m, d] themselves if they are aligned; otherwise copies, one bounded piece after another."""
    b, m, d = rows.shape
    if is_aligned(rows):
        yield slice(0, b), slice(0, m), rows
        return
    vector = VECTOR // rows.itemsize
    padded = triton.cdiv(d, vector) * vector
    limit = max(SCRATCH // (padded * rows.itemsize), 1)
    at_once = min(m, limit)
    together = min(b, max(limit // m, 1))
    scratch = torch.empty((together, at_once, padded), dtype=rows.dtype, device=rows.device)
    for i_b, i_m in itertools.product(range(0, b, together), range(0, m, at_once)):
        piece = rows[i_b : i_b + together, i_m : i_m + at_once]
        copy = scratch[: piece.shape[0], : piece.shape[1], :d]
        copy.copy_(piece)
        yield slice(i_b, i_b + together), slice(i_m, i_m + at_once), copy


def norm_count(normalize: str | None, d: int) -> int:
    """What the sum of squares is divided by under the root; 0 for no norm."""
    return {"rms": d, "l2": 1, None: 0}[normalize]


def forward(
    rows: Tensor, tokens: Tensor, normalize: str | None, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Scores [..., r, m] and 1 / norm [..., m] of rows [..., m, d] and tokens [..., r, d], nothing empty."""
    *lead, m, d = rows.shape
    r = tokens.shape[-2]
    dtype = compute_dtype(rows.dtype)
    scores = torch.empty((*lead, r, m), dtype=dtype, device=rows.device)
    inverse = torch.empty((*lead, m), dtype=dtype, device=rows.device)
    run = _forward_few if dtype == torch.float64 or r <= FEW_TOKENS else _forward_dot
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        for index, view in streams(rows):
            run(
                view,
                flat_tokens(tokens[index]),
                scores[index].view(-1, r, m),
                inverse[index].view(-1, m),
                norm_count(normalize, d),
                scale,
                eps,
            )
    return scores, inverse


def _forward_few(
    rows: Tensor, tokens: Tensor, scores: Tensor, inverse: Tensor, count: int, scale: float, eps: float
) -> None:
    d, r = rows.shape[-1], tokens.shape[-2]
    bm, width, pieces = plan(d, r, rows.itemsize)
    group = min(r, FEW_TOKENS)
    vector = VECTOR // rows.itemsize
    for of_b, of_m, x in aligned_pieces(rows):
        b, m, _ = x.shape
        tiles = triton.cdiv(m, bm)
        s, v = scores[of_b, :, of_m], inverse[of_b, of_m]
        row_scores_fwd_kernel[(b * tiles, triton.cdiv(r, group))](
            x,
            tokens if tokens.shape[0] == 1 else tokens[of_b],
            s,
            v,
            m,
            tiles,
            x.stride(0) // vector,
            x.stride(1) // vector,
            s.stride(0),
            s.stride(1),
            v.stride(0),
            int(tokens.shape[0] > 1),
            scale,
            D=d,
            R=r,
            GROUP=group,
            COUNT=count,
            EPS=eps,
            BM=bm,
            BD=width,
            PIECES=pieces,
            VEC=vector,
            ACC=_TL_DTYPE[scores.dtype],
            num_warps=4,
        )


def _forward_dot(
    rows: Tensor, tokens: Tensor, scores: Tensor, inverse: Tensor, count: int, scale: float, eps: float
) -> None:
    d, r = rows.shape[-1], tokens.shape[-2]
    group = dot_group(r)
    rp = triton.cdiv(r, group) * group
    dp = triton.cdiv(d, DOT_WIDTH) * DOT_WIDTH
    count_parts = _PARTS.get(tokens.dtype, 3)
    vector = VECTOR // rows.itemsize
    parts = torch.empty((tokens.shape[0], count_parts, rp, dp), dtype=torch.bfloat16, device=tokens.device)
    block = min(triton.next_power_of_2(dp), 1024)
    row_scores_split_kernel[(tokens.shape[0] * rp, triton.cdiv(dp, block))](
        tokens, parts, D=d, R=r, DP=dp, RP=rp, PARTS=count_parts, BD=block, num_warps=4
    )
    bm = DOT_ROWS * 2 // rows.itemsize  # half as many rows in float32, with half the warps
    for of_b, of_m, x in aligned_pieces(rows):
        b, m, _ = x.shape
        tiles = triton.cdiv(m, bm)
        s, v = scores[of_b, :, of_m], inverse[of_b, of_m]
        row_scores_dot_fwd_kernel[(b * tiles, rp // group)](
            x,
            parts if parts.shape[0] == 1 else parts[of_b],
            s,
            v,
            m,
            tiles,
            x.stride(0) // vector,
            x.stride(1) // vector,
            s.stride(0),
            s.stride(1),
            v.stride(0),
            int(parts.shape[0] > 1),
            scale,
            D=d,
            DP=dp,
            R=r,
            RP=rp,
            GROUP=group,
            COUNT=count,
            EPS=eps,
            ROW_PARTS=_PARTS.get(rows.dtype, 3),
            TOKEN_PARTS=count_parts,
            BM=bm,
            BD=DOT_WIDTH,
            VEC=vector,
            DOT=_dot_dtype(rows),
            num_warps=bm // 16,
            num_stages=3,
        )


def _dot_dtype(rows: Tensor) -> tl.dtype:
    """What the parts are multiplied in. Triton's interpreter, on a CPU, cannot multiply bfloat16."""
    return tl.bfloat16 if rows.is_cuda else tl.float32


def backward_tokens(grad: Tensor, rows: Tensor, tokens: Tensor, inverse: Tensor, scale: float) -> Tensor:
    """Gradient of the tokens, of their shape and dtype; nothing is empty."""
    m, d = rows.shape[-2:]
    r = tokens.shape[-2]
    grad = grad.contiguous()
    result = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    few = inverse.dtype == torch.float64 or r <= FEW_TOKENS
    acc = _TL_DTYPE[inverse.dtype]
    if few:
        group = min(r, FEW_TOKENS)
        bm, bd = backward_block(d, r, rows.itemsize)
    else:
        group = dot_group(r)
        bm, bd = DOT_WIDTH, dot_backward_width(d, r, _PARTS.get(rows.dtype, 3))
    for index, x in streams(rows):
        b = x.shape[0]
        programs = min(PROGRAMS // b, SCRATCH // (b * r * d * inverse.itemsize), triton.cdiv(m, bm))
        span = triton.cdiv(triton.cdiv(m, max(programs, 1)), bm) * bm
        programs = triton.cdiv(m, span)
        partial = torch.empty((b, programs, r, d), dtype=inverse.dtype, device=rows.device)
        arguments = (grad[index], x, inverse[index], partial, m, span, programs, *x.stride(), scale)
        grid = (b * programs * triton.cdiv(d, bd), triton.cdiv(r, group))
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            if few:
                row_scores_bwd_tokens_kernel[grid](
                    *arguments, D=d, R=r, GROUP=group, BM=bm, BD=bd, WARPS=4, ACC=acc, num_warps=4
                )
            else:
                row_scores_dot_bwd_tokens_kernel[grid](
                    *arguments,
                    D=d,
                    R=r,
                    GROUP=group,
                    ROW_PARTS=_PARTS.get(rows.dtype, 3),
                    BM=bm,
                    BD=bd,
                    DOT=_dot_dtype(rows),
                    num_warps=8,
                )
            row_scores_bwd_reduce_kernel[(b * triton.cdiv(r * d, 32),)](
                partial, result[index], programs, N=r * d, BP=128, BN=32, ACC=acc, num_warps=4
            )
    return result


def backward_rows(
    grad: Tensor, rows: Tensor, tokens: Tensor, inverse: Tensor, normalize: str | None, scale: float
) -> Tensor:
    """Gradient of the rows, of their shape and dtype; nothing is empty."""
    m, d = rows.shape[-2:]
    r = tokens.shape[-2]
    grad = grad.contiguous()
    result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    bm, bd = backward_rows_block(d, rows.itemsize)
    tiles = triton.cdiv(m, bm)
    for index, x in streams(rows):
        t = flat_tokens(tokens[index])
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            row_scores_bwd_rows_kernel[(x.shape[0] * tiles,)](
                grad[index],
                x,
                t,
                inverse[index],
                result[index],
                m,
                tiles,
                *x.stride(),
                int(t.shape[0] > 1),
                scale,
                D=d,
                R=r,
                COUNT=norm_count(normalize, d),
                BM=bm,
                BD=bd,
                ACC=_TL_DTYPE[inverse.dtype],
                num_warps=4,
            )
    return result
