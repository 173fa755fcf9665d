"""Coordinate descent on a GPU: what `descent` computes, in Triton.

A row that fits into the registers of one program runs all its iterations there, short rows several to a
program, in one launch each way. A longer row is cut into tiles, one program each. Where a GPU holds all
programs of a call at once, the forward is one launch, in which the programs of a row wait for one another at
every iteration. Otherwise every iteration is a launch: it adds up what the tiles of its row left behind,
takes one step of the threshold, and leaves its own tile's part behind. Both give the same bits. The backward
takes two launches: one for the sum of the gradients of each row, one for everything else.

How a row is cut depends on its length and dtype alone, and what the tiles leave behind is added up in a fixed
order: a row gets the same bits in every run and in whatever batch.

Scalars of a row are float64. Exponentials are powers of 2 of (s + a) log2(e) / ε, where a and log2(e) / ε are
each split into what float32 holds of them and the rest, so that no rounding is the same for a whole row. Sums
are taken in float32 over the few elements of one thread's column and in float64 from there on.
"""

# ruff: noqa: N803, SIM300

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.descent import temperatures

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# The longest row that one program takes, in float32; float64 takes a quarter. The backward holds two arrays.
LARGEST_ROW = 32768
LARGEST_ROW_BACKWARD = 16384
PER_WARP = 1024  # elements of such a row, in float32; float64 takes half
MOST_ROWS = 8  # in one program
# Elements of one tile of a longer row, in float32; float64 takes a quarter.
TILE = 8192
TILE_BACKWARD = 4096
TILE_WARPS = 4
MOST_TILES = 1024  # of a row; the tiles of longer rows have several blocks
TERMS_AT_ONCE = 128  # iterations whose scalars the backward prepares together

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# Parts of a float32 sum are rounded to multiples of 1 / UNIT, small against a sum that is never below 1: so
# they add up exactly, and fit into half a word.
UNIT = tl.constexpr(2.0**32)
# The words in which tiles exchange their parts: 2 bits for the turn, 15 for a count, 47 for a sum.
TURN_BITS = tl.constexpr(62)
SUM_BITS = tl.constexpr(47)
SUM_MASK = tl.constexpr((1 << 47) - 1)


class Block(NamedTuple):
    """What a program holds at once: ``rows`` x ``depth`` x ``columns`` elements, a column within a thread."""

    rows: int
    depth: int
    columns: int
    warps: int


def row_block(n: int, dtype: torch.dtype, largest: int) -> Block | None:
    """The block for whole rows of ``n`` elements, or None where one program cannot hold a row."""
    wide = dtype == torch.float64
    if n > (largest // 4 if wide else largest):
        return None
    per_warp = PER_WARP // 2 if wide else PER_WARP
    size = max(triton.next_power_of_2(n), 16)
    warps = max(1, min(size // per_warp, 16))
    columns = min(size, warps * 128)
    return Block(max(1, min(per_warp // 2 // size, MOST_ROWS)), size // columns, columns, warps)


def tile_block(n: int, dtype: torch.dtype, tile: int) -> tuple[Block, int, int]:
    """The block for tiles of rows of ``n`` elements, how many blocks a tile has, and how many tiles a row."""
    size = tile // 4 if dtype == torch.float64 else tile
    columns = min(size, TILE_WARPS * 128)
    n_blocks = triton.next_power_of_2(triton.cdiv(n, size * MOST_TILES))
    return Block(1, size // columns, columns, TILE_WARPS), n_blocks, triton.cdiv(n, size * n_blocks)


# ---- Parts of kernels: blocks of elements are [BR, E, C], scalars of rows [BR] ----


@triton.jit  # type: ignore[untyped-decorator]
def _rows(
    p: tl.tensor, i_row: tl.tensor, inner: tl.tensor, stride_outer: tl.tensor, stride_inner: tl.tensor
) -> tl.tensor:
    """Where rows start [BR]: row i is entry (i // inner, i % inner) of two dimensions."""
    return p + (i_row // inner).to(tl.int64) * stride_outer + (i_row % inner).to(tl.int64) * stride_inner


@triton.jit  # type: ignore[untyped-decorator]
def _load(
    p_row: tl.tensor,
    start: tl.tensor,
    o_n: tl.tensor,
    m_load: tl.tensor,
    stride_n: tl.tensor,
    other: tl.constexpr,
) -> tl.tensor:
    """Elements start + o_n [1, E, C] of rows."""
    p_at = (p_row + start * stride_n)[:, None, None] + o_n.to(tl.int64) * stride_n
    return tl.load(p_at, mask=m_load, other=other)


@triton.jit  # type: ignore[untyped-decorator]
def _load_scores(
    p_row: tl.tensor,
    p_mask_row: tl.tensor,
    start: tl.tensor,
    o_n: tl.tensor,
    m_load: tl.tensor,
    stride_n: tl.tensor,
    stride_mask_n: tl.tensor,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Scores, -inf where they cannot be chosen."""
    b_s = _load(p_row, start, o_n, m_load, stride_n, float("-inf")).to(DTYPE)
    if HAS_MASK:
        b_mask = _load(p_mask_row, start, o_n, m_load, stride_mask_n, 0)
        b_s = tl.where(b_mask != 0, b_s, float("-inf"))
    return b_s


@triton.jit  # type: ignore[untyped-decorator]
def _block_offsets(E: tl.constexpr, C: tl.constexpr) -> tl.tensor:
    return (tl.arange(0, E)[:, None] * C + tl.arange(0, C)[None, :])[None, :, :]


@triton.jit  # type: ignore[untyped-decorator]
def _split(x: tl.tensor, DTYPE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """A float64 as what DTYPE holds of it, and the rest."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float64)).to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _split_scale(inverse: tl.tensor, DTYPE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """log2(e) / ε as what DTYPE holds of it, and the rest, which is positive: -inf times it is no NaN."""
    scale = inverse * LOG2E
    high = (scale * (1 - 2.0**-24)).to(DTYPE)
    return high, tl.maximum((scale - high.to(tl.float64)).to(DTYPE), 2.0**-100)


@triton.jit  # type: ignore[untyped-decorator]
def _power(b_x: tl.tensor, factor: tl.tensor, factor_rest: tl.tensor) -> tl.tensor:
    """2 ** (x * (factor + factor_rest))."""
    return tl.exp2(tl.fma(b_x, factor, b_x * factor_rest))


@triton.jit  # type: ignore[untyped-decorator]
def _signs(b_x: tl.tensor) -> tl.tensor:
    """Integers: -1, all bits set, where x < 0, and 0 elsewhere. A GPU has few registers for comparisons."""
    if b_x.dtype == tl.float64:
        b_signs = b_x.to(tl.int64, bitcast=True) >> 63
    else:
        b_signs = b_x.to(tl.int32, bitcast=True) >> 31
    return b_signs


@triton.jit  # type: ignore[untyped-decorator]
def _row_sum(b_x: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(b_x, axis=1).to(tl.float64), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _row_count(b_x: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(b_x.to(tl.int32), axis=1), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _inverse(x: tl.tensor) -> tl.tensor:
    """1 / x for a float64: a Newton step from float32, right to 1e-13 for a tenth of a division."""
    guess = (1.0 / x.to(tl.float32)).to(tl.float64)
    return guess * (2.0 - x * guess)


@triton.jit  # type: ignore[untyped-decorator]
def _survey(b_s: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest score of each row, NaN if it holds one, and how many can be chosen."""
    top = tl.max(tl.max(b_s, axis=1), axis=1).to(tl.float64)
    top = tl.where(_row_count(b_s != b_s) > 0, float("nan"), top)
    return top, _row_count(b_s != float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _first_threshold(
    log_k: tl.tensor, top: tl.tensor, valid: tl.tensor, idle: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """a_1. It takes over a NaN, for the sums that follow may drop it."""
    a = eps * (log_k - tl.log(tl.where(idle, 1.0, valid.to(tl.float64))))
    return tl.where(top == top, a, top)


@triton.jit  # type: ignore[untyped-decorator]
def _level(a: tl.tensor, top: tl.tensor, idle: tl.tensor) -> tl.tensor:
    """What is added to the scores: a, or where even the largest is below the threshold, -top.

    So the largest exponent of a row is 0, and its sum cannot underflow.
    """
    least = tl.where(idle, 0.0, -top)
    return tl.where(a < least, least, a)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_and_count(
    b_s: tl.tensor, level: tl.tensor, inverse: tl.tensor, DTYPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Σ exp(min(s + level, 0) / ε), and how many of its terms are saturated."""
    high, rest = _split(level[:, None, None], DTYPE)
    factor, factor_rest = _split_scale(inverse[:, None, None], DTYPE)
    b_x = b_s + high + rest
    count = b_x.shape[1] * b_x.shape[2] + _row_count(_signs(b_x))
    total = _row_sum(_power(tl.minimum(b_x, 0.0), factor, factor_rest))
    if DTYPE == tl.float32:
        total = (tl.where(total == total, total, 1.0) * UNIT).to(tl.int64).to(tl.float64) / UNIT
    return total, count


@triton.jit  # type: ignore[untyped-decorator]
def _next_threshold(
    a: tl.tensor,
    level: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    log_k: tl.tensor,
    idle: tl.tensor,
    eps: tl.tensor,
    inverse: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """a_t, and ln Σ_t and P_t of `descent._backward`, from the sum over a row and its saturated terms."""
    total = tl.where(idle, 1.0, total)
    log_total = tl.log(total)
    mass = tl.where(level > a, 0.0, count * _inverse(total))
    return level + eps * (log_k - log_total), (a - level) * inverse + log_total, mass


@triton.jit  # type: ignore[untyped-decorator]
def _store_state(
    p_state: tl.tensor,
    i_row: tl.tensor,
    m_row: tl.tensor,
    t: tl.tensor,
    n_rows: tl.tensor,
    n_iters: tl.tensor,
    a: tl.tensor,
    log_total: tl.tensor,
    mass: tl.tensor,
) -> None:
    p_at = p_state + (i_row + t * n_rows.to(tl.int64))
    step = n_iters * n_rows.to(tl.int64)
    tl.store(p_at, a, mask=m_row)
    tl.store(p_at + step, log_total, mask=m_row)
    tl.store(p_at + 2 * step, mass, mask=m_row)


@triton.jit  # type: ignore[untyped-decorator]
def _gates(
    b_s: tl.tensor, a: tl.tensor, idle: tl.tensor, inverse: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """exp(min(s + a, 0) / ε), 0 where nothing can be chosen."""
    high, rest = _split(a[:, None, None], DTYPE)
    factor, factor_rest = _split_scale(inverse[:, None, None], DTYPE)
    b_x = b_s + high + rest
    # A comparison keeps NaN, which a minimum may drop.
    b_gates = _power(tl.where(b_x >= 0.0, 0.0, b_x), factor, factor_rest)
    return tl.where((b_s == float("-inf")) | idle[:, None, None], 0.0, b_gates)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_gates(
    b_s: tl.tensor, b_grad: tl.tensor, a: tl.tensor, idle: tl.tensor, inverse: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """Gradients times gates below saturation: ε u of `descent._backward`."""
    high, rest = _split(a[:, None, None], DTYPE)
    factor, factor_rest = _split_scale(inverse[:, None, None], DTYPE)
    b_x = b_s + high + rest
    m_saturated = b_x >= 0.0
    b_gates = _power(tl.where(m_saturated, 0.0, b_x), factor, factor_rest)
    m_none = m_saturated | (b_s == float("-inf")) | idle[:, None, None]
    return tl.where(m_none, 0.0, b_gates * b_grad)


@triton.jit  # type: ignore[untyped-decorator]
def _temperature(
    t: tl.tensor, last_free: tl.tensor, eps_free: tl.tensor, log_growth: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """The temperature at index t of the schedule: eps after ``last_free``, growing from there backwards."""
    return tl.where(t > last_free, eps, eps_free * tl.exp2((last_free - t).to(tl.float64) * log_growth))


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_terms(
    a_before: tl.tensor, log_total: tl.tensor, mass: tl.tensor, eps: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Level and weight of an iteration's softmax, which is weight exp((s + level) / ε) where s + level < 0.

    With saturated scores the sum is at least 1, and its inverse is harmless. Without, it may underflow: there
    its logarithm becomes part of the level, and that of 2, so that no score reaches the level.
    """
    some = mass > 0.0
    level = tl.where(some, a_before, a_before - eps * (log_total + LN2))
    return level, tl.exp(tl.where(some, -log_total, LN2))


@triton.jit  # type: ignore[untyped-decorator]
def _subtract_softmax(
    b_ds: tl.tensor,
    b_s: tl.tensor,
    high: tl.tensor,
    rest: tl.tensor,
    factor: tl.tensor,
    factor_rest: tl.tensor,
    weight: tl.tensor,
) -> tl.tensor:
    """Subtracts weight exp((s + level) / ε) from ds where s + level < 0."""
    b_x = b_s + high + rest
    b_power = _power(tl.minimum(b_x, 0.0), factor, factor_rest)
    b_signs = _signs(b_x)
    b_power = (b_power.to(b_signs.dtype, bitcast=True) & b_signs).to(b_x.dtype, bitcast=True)
    return tl.fma(b_power, -weight, b_ds)


# ---- Whole rows ----


@triton.jit(do_not_specialize=["n_rows", "n_iters"])  # type: ignore[untyped-decorator]
def coordinate_descent_rows_fwd_kernel(
    p_s: tl.tensor,
    p_k: tl.tensor,
    p_mask: tl.tensor,
    p_gates: tl.tensor,
    p_state: tl.tensor,
    n_rows: tl.tensor,
    n: tl.tensor,
    n_iters: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_n: tl.tensor,
    stride_k_outer: tl.tensor,
    stride_k_inner: tl.tensor,
    stride_mask_outer: tl.tensor,
    stride_mask_inner: tl.tensor,
    stride_mask_n: tl.tensor,
    eps: tl.float64,
    eps_init: tl.float64,
    eps_decay: tl.float64,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    BR: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Gates and state of BR rows."""
    i_row = tl.program_id(0) * BR + tl.arange(0, BR)  # [BR]
    m_row = i_row < n_rows
    p_row = _rows(p_s, i_row, inner, stride_outer, stride_inner)
    p_mask_row = _rows(p_mask, i_row, inner, stride_mask_outer, stride_mask_inner)
    o_n = _block_offsets(E, C)  # [1, E, C]
    m_load = m_row[:, None, None] & (o_n < n)
    b_s = _load_scores(
        p_row, p_mask_row, 0, o_n, m_load, stride_n, stride_mask_n, HAS_MASK, DTYPE
    )  # [BR, E, C]
    p_budget = _rows(p_k, i_row, inner, stride_k_outer, stride_k_inner)
    b_k = tl.load(p_budget, mask=m_row, other=0.0)  # [BR]

    top, valid = _survey(b_s)
    idle = (b_k <= 0.0) | (valid == 0)
    log_k = tl.log(tl.where(idle, 1.0, b_k))
    eps_last = tl.full([1], eps, tl.float64)
    eps_t = tl.full([1], eps_init, tl.float64)
    inverse = 1.0 / eps_t
    inverse_last = 1.0 / eps_last
    growth = 1.0 / tl.full([1], eps_decay, tl.float64)
    a = _first_threshold(log_k, top, valid, idle, eps_t)
    zero = tl.zeros([BR], tl.float64)
    _store_state(p_state, i_row, m_row, 0, n_rows, n_iters, a, zero, zero)
    for t in range(1, n_iters):
        eps_t = tl.maximum(eps_t * eps_decay, eps_last)
        inverse = tl.minimum(inverse * growth, inverse_last)
        level = _level(a, top, idle)
        total, count = _sum_and_count(b_s, level, inverse, DTYPE)
        a, log_total, mass = _next_threshold(a, level, total, count, log_k, idle, eps_t, inverse)
        _store_state(p_state, i_row, m_row, t, n_rows, n_iters, a, log_total, mass)

    b_gates = _gates(b_s, a, idle, tl.minimum(inverse * growth, inverse_last), DTYPE)
    p_out = p_gates + i_row.to(tl.int64)[:, None, None] * n + o_n
    tl.store(p_out, b_gates.to(p_gates.dtype.element_ty), mask=m_load)


@triton.jit(do_not_specialize=["n_rows", "n_iters", "last_free"])  # type: ignore[untyped-decorator]
def coordinate_descent_rows_bwd_kernel(
    p_grad: tl.tensor,
    p_s: tl.tensor,
    p_k: tl.tensor,
    p_mask: tl.tensor,
    p_state: tl.tensor,
    p_ds: tl.tensor,
    p_dk: tl.tensor,
    n_rows: tl.tensor,
    n: tl.tensor,
    n_iters: tl.tensor,
    last_free: tl.tensor,
    inner: tl.tensor,
    stride_grad_outer: tl.tensor,
    stride_grad_inner: tl.tensor,
    stride_grad_n: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_n: tl.tensor,
    stride_k_outer: tl.tensor,
    stride_k_inner: tl.tensor,
    stride_mask_outer: tl.tensor,
    stride_mask_inner: tl.tensor,
    stride_mask_n: tl.tensor,
    eps: tl.float64,
    eps_free: tl.float64,
    log_growth: tl.float64,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    BR: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Gradients of the scores and budgets of BR rows."""
    i_row = tl.program_id(0) * BR + tl.arange(0, BR)  # [BR]
    m_row = i_row < n_rows
    p_row = _rows(p_s, i_row, inner, stride_outer, stride_inner)
    p_mask_row = _rows(p_mask, i_row, inner, stride_mask_outer, stride_mask_inner)
    p_grad_row = _rows(p_grad, i_row, inner, stride_grad_outer, stride_grad_inner)
    o_n = _block_offsets(E, C)  # [1, E, C]
    m_load = m_row[:, None, None] & (o_n < n)
    b_s = _load_scores(
        p_row, p_mask_row, 0, o_n, m_load, stride_n, stride_mask_n, HAS_MASK, DTYPE
    )  # [BR, E, C]
    b_grad = _load(p_grad_row, 0, o_n, m_load, stride_grad_n, 0.0).to(DTYPE)  # [BR, E, C]
    p_budget = _rows(p_k, i_row, inner, stride_k_outer, stride_k_inner)
    b_k = tl.load(p_budget, mask=m_row, other=0.0)  # [BR]
    idle = b_k <= 0.0

    eps_last = tl.full([1], eps, tl.float64)
    eps_first = tl.full([1], eps_free, tl.float64)
    rows = n_rows.to(tl.int64)
    p_at = p_state + (i_row + (n_iters - 1) * rows)
    b_a = tl.load(p_at, mask=m_row, other=0.0)  # [BR]
    inverse = 1.0 / _temperature(n_iters, last_free, eps_first, log_growth, eps_last)
    b_ds = _weighted_gates(b_s, b_grad, b_a, idle, inverse, DTYPE)
    a_bar = _row_sum(b_ds) * inverse
    b_ds *= inverse[:, None, None].to(DTYPE)
    eps_t = _temperature(n_iters - 1, last_free, eps_first, log_growth, eps_last)
    dk = a_bar * eps_t
    for i in range(1, n_iters):
        b_log_total = tl.load(p_at + n_iters * rows, mask=m_row, other=0.0)
        b_mass = tl.load(p_at + 2 * n_iters * rows, mask=m_row, other=0.0)
        p_at -= rows
        b_a = tl.load(p_at, mask=m_row, other=0.0)
        # Before an iteration without saturated scores, nothing has any part in the result.
        if tl.max((a_bar != 0.0).to(tl.int32), axis=0) > 0:
            level, weight = _softmax_terms(b_a, b_log_total, b_mass, eps_t)
            high, rest = _split(level[:, None, None], DTYPE)
            factor, factor_rest = _split_scale(_inverse(eps_t)[:, None, None], DTYPE)
            weight = (a_bar * weight)[:, None, None].to(DTYPE)
            b_ds = _subtract_softmax(b_ds, b_s, high, rest, factor, factor_rest, weight)
        eps_t = _temperature(n_iters - 1 - i, last_free, eps_first, log_growth, eps_last)
        a_bar *= b_mass
        dk += a_bar * eps_t

    b_ds = tl.where((b_s == float("-inf")) | idle[:, None, None], 0.0, b_ds)
    p_out = p_ds + i_row.to(tl.int64)[:, None, None] * n + o_n
    tl.store(p_out, b_ds.to(p_ds.dtype.element_ty), mask=m_load)
    tl.store(p_dk + i_row, dk / tl.where(idle, 1.0, b_k), mask=m_row)


# ---- Rows of several tiles: a program a tile, BR = 1 ----


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of_program(n_tiles: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The row [1] and the tile of this program."""
    i_program = tl.program_id(0)
    return i_program // n_tiles + tl.arange(0, 1), i_program % n_tiles


@triton.jit  # type: ignore[untyped-decorator]
def _tile_offsets(
    i_tile: tl.tensor,
    i_block: tl.tensor,
    n: tl.tensor,
    n_blocks: tl.tensor,
    E: tl.constexpr,
    C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where a block of a tile starts in its row, offsets from there [1, E, C], and which are in the row."""
    start = (i_tile.to(tl.int64) * n_blocks + i_block) * (E * C)
    o_n = _block_offsets(E, C)
    return start, o_n, o_n < tl.minimum(n - start, E * C).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _store_parts(
    p_parts: tl.tensor,
    i_row: tl.tensor,
    i_tile: tl.tensor,
    n_tiles: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
) -> None:
    """Leaves two numbers behind for the tiles of a row to find in the next launch."""
    p_at = p_parts + (i_row.to(tl.int64) * (2 * n_tiles) + i_tile)
    tl.store(p_at, first)
    tl.store(p_at + n_tiles, second.to(tl.float64))


@triton.jit  # type: ignore[untyped-decorator]
def _load_parts(
    p_parts: tl.tensor, i_row: tl.tensor, n_tiles: tl.tensor, other: tl.constexpr, BP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """What the tiles of a row left behind in the launch before, [BP] each."""
    o_tile = tl.arange(0, BP)
    p_at = p_parts + (i_row.to(tl.int64) * (2 * n_tiles) + o_tile)
    b_first = tl.load(p_at, mask=o_tile < n_tiles, other=other)
    return b_first, tl.load(p_at + n_tiles, mask=o_tile < n_tiles, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _largest(b_top: tl.tensor) -> tl.tensor:
    """The largest score of a row from those of its tiles [BP], NaN if any is."""
    top = tl.max(b_top, axis=0).to(tl.float64) + tl.zeros([1], tl.float64)
    return tl.where(tl.sum((b_top != b_top).to(tl.int32), axis=0) > 0, float("nan"), top)


@triton.jit  # type: ignore[untyped-decorator]
def coordinate_descent_tiles_survey_fwd_kernel(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_parts: tl.tensor,
    n: tl.tensor,
    n_tiles: tl.tensor,
    n_blocks: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_n: tl.tensor,
    stride_mask_outer: tl.tensor,
    stride_mask_inner: tl.tensor,
    stride_mask_n: tl.tensor,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """The largest score of each tile, and how many can be chosen."""
    i_row, i_tile = _tile_of_program(n_tiles)
    p_row = _rows(p_s, i_row, inner, stride_outer, stride_inner)
    p_mask_row = _rows(p_mask, i_row, inner, stride_mask_outer, stride_mask_inner)
    top = tl.full([1], float("-inf"), tl.float64)
    valid = tl.zeros([1], tl.int32)
    for i_block in range(n_blocks):
        start, o_n, m_n = _tile_offsets(i_tile, i_block, n, n_blocks, E, C)
        b_s = _load_scores(
            p_row, p_mask_row, start, o_n, m_n, stride_n, stride_mask_n, HAS_MASK, DTYPE
        )  # [1, E, C]
        block_top, block_valid = _survey(b_s)
        top = tl.where((block_top <= top) | (top != top), top, block_top)
        valid += block_valid
    _store_parts(p_parts, i_row, i_tile, n_tiles, top, valid)


@triton.jit(do_not_specialize=["t", "n_rows", "n_iters"])  # type: ignore[untyped-decorator]
def coordinate_descent_tiles_fwd_kernel(
    p_s: tl.tensor,
    p_k: tl.tensor,
    p_mask: tl.tensor,
    p_gates: tl.tensor,
    p_state: tl.tensor,
    p_top: tl.tensor,
    p_parts: tl.tensor,
    p_parts_out: tl.tensor,
    t: tl.tensor,
    n_rows: tl.tensor,
    n: tl.tensor,
    n_tiles: tl.tensor,
    n_blocks: tl.tensor,
    n_iters: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_n: tl.tensor,
    stride_k_outer: tl.tensor,
    stride_k_inner: tl.tensor,
    stride_mask_outer: tl.tensor,
    stride_mask_inner: tl.tensor,
    stride_mask_n: tl.tensor,
    eps: tl.float64,
    inverse: tl.float64,
    inverse_next: tl.float64,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """The threshold of iteration t, counted from 0, then each tile's part of the next sum, or its gates.

    Every program of a row computes the threshold; that of the first tile writes it down.
    """
    i_row, i_tile = _tile_of_program(n_tiles)
    p_row = _rows(p_s, i_row, inner, stride_outer, stride_inner)
    p_mask_row = _rows(p_mask, i_row, inner, stride_mask_outer, stride_mask_inner)
    m_row = i_row < n_rows
    start, o_n, m_n = _tile_offsets(i_tile, 0, n, n_blocks, E, C)
    b_s = _load_scores(
        p_row, p_mask_row, start, o_n, m_n, stride_n, stride_mask_n, HAS_MASK, DTYPE
    )  # [1, E, C]
    b_k = tl.load(_rows(p_k, i_row, inner, stride_k_outer, stride_k_inner))  # [1]

    eps_t = tl.full([1], eps, tl.float64)
    if FIRST:
        b_top, b_valid = _load_parts(p_parts, i_row, n_tiles, float("-inf"), BP)  # [BP]
        top = _largest(b_top)
        idle = (b_k <= 0.0) | (top == float("-inf"))
        log_k = tl.log(tl.where(idle, 1.0, b_k))
        a = _first_threshold(log_k, top, tl.sum(b_valid, axis=0), idle, eps_t)
        log_total = tl.zeros([1], tl.float64)
        mass = tl.zeros([1], tl.float64)
        if i_tile == 0:
            tl.store(p_top + i_row, top)
    else:
        b_total, b_count = _load_parts(p_parts, i_row, n_tiles, 0.0, BP)  # [BP]
        b_a = tl.load(p_state + (i_row + (t - 1) * n_rows.to(tl.int64)))  # [1]
        top = tl.load(p_top + i_row)  # [1]
        idle = (b_k <= 0.0) | (top == float("-inf"))
        log_k = tl.log(tl.where(idle, 1.0, b_k))
        level = _level(b_a, top, idle)
        total, count = tl.sum(b_total, axis=0), tl.sum(b_count, axis=0)
        inverse_t = tl.full([1], inverse, tl.float64)
        a, log_total, mass = _next_threshold(b_a, level, total, count, log_k, idle, eps_t, inverse_t)
    if i_tile == 0:
        _store_state(p_state, i_row, m_row, t, n_rows, n_iters, a, log_total, mass)

    scale = tl.full([1], inverse_next, tl.float64)
    p_out = p_gates + i_row.to(tl.int64)[:, None, None] * n
    level = _level(a, top, idle)
    if LAST:
        b_gates = _gates(b_s, a, idle, scale, DTYPE)
        tl.store(p_out + start + o_n, b_gates.to(p_gates.dtype.element_ty), mask=m_n)
    else:
        total, count = _sum_and_count(b_s, level, scale, DTYPE)
    for i_block in range(1, n_blocks):
        start, o_n, m_n = _tile_offsets(i_tile, i_block, n, n_blocks, E, C)
        b_s = _load_scores(p_row, p_mask_row, start, o_n, m_n, stride_n, stride_mask_n, HAS_MASK, DTYPE)
        if LAST:
            b_gates = _gates(b_s, a, idle, scale, DTYPE)
            tl.store(p_out + start + o_n, b_gates.to(p_gates.dtype.element_ty), mask=m_n)
        else:
            block_total, block_count = _sum_and_count(b_s, level, scale, DTYPE)
            total += block_total
            count += block_count
    if not LAST:
        _store_parts(p_parts_out, i_row, i_tile, n_tiles, total, count)


@triton.jit  # type: ignore[untyped-decorator]
def _exchange(
    p_words: tl.tensor,
    i_tile: tl.tensor,
    n_tiles: tl.tensor,
    turn: tl.tensor,
    payload: tl.tensor,
    BP: tl.constexpr,
) -> tl.tensor:
    """Publishes a tile's payload of 62 bits and waits for those of all tiles of its row: [BP], 0 beyond them.

    A word carries the proof that it has arrived, so no other order in memory matters. Two sets of words take
    turns, with two marks each, and all are 0 at the start. A set is written again only by a tile that has
    seen all of the other set, whose words were written after those of the first had been read.
    """
    o_tile = tl.arange(0, BP)
    m_tile = o_tile < n_tiles
    p_turn = p_words + (turn % 2) * n_tiles
    mark = (1 + (turn // 2) % 2).to(tl.int64)
    tl.atomic_xchg(p_turn + i_tile, (mark << TURN_BITS) | payload, sem="relaxed")
    b_words = tl.load(p_turn + o_tile, mask=m_tile, other=0, volatile=True)
    while tl.sum((m_tile & (((b_words >> TURN_BITS) & 3) != mark)).to(tl.int32), axis=0) > 0:
        b_words = tl.load(p_turn + o_tile, mask=m_tile, other=0, volatile=True)
    return b_words


@triton.jit(do_not_specialize=["n_rows", "n_iters"])  # type: ignore[untyped-decorator]
def coordinate_descent_grid_fwd_kernel(
    p_s: tl.tensor,
    p_k: tl.tensor,
    p_mask: tl.tensor,
    p_gates: tl.tensor,
    p_state: tl.tensor,
    p_words: tl.tensor,
    n_rows: tl.tensor,
    n: tl.tensor,
    n_tiles: tl.tensor,
    n_iters: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_n: tl.tensor,
    stride_k_outer: tl.tensor,
    stride_k_inner: tl.tensor,
    stride_mask_outer: tl.tensor,
    stride_mask_inner: tl.tensor,
    stride_mask_n: tl.tensor,
    eps: tl.float64,
    eps_init: tl.float64,
    eps_decay: tl.float64,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """Gates and state, by programs that hold a tile each and run all at once: float32, one block a tile."""
    i_row, i_tile = _tile_of_program(n_tiles)
    p_row = _rows(p_s, i_row, inner, stride_outer, stride_inner)
    p_mask_row = _rows(p_mask, i_row, inner, stride_mask_outer, stride_mask_inner)
    m_row = i_row < n_rows
    start, o_n, m_n = _tile_offsets(i_tile, 0, n, 1, E, C)
    b_s = _load_scores(
        p_row, p_mask_row, start, o_n, m_n, stride_n, stride_mask_n, HAS_MASK, DTYPE
    )  # [1, E, C]
    b_k = tl.load(_rows(p_k, i_row, inner, stride_k_outer, stride_k_inner))  # [1]
    p_row_words = p_words + tl.program_id(0).to(tl.int64) // n_tiles * (2 * n_tiles)

    tile_top, tile_valid = _survey(b_s)
    top_bits = tl.sum(tile_top, axis=0).to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    payload = (tl.sum(tile_valid, axis=0).to(tl.int64) << 32) | top_bits
    turn = tl.program_id(0) * 0
    b_words = _exchange(p_row_words, i_tile, n_tiles, turn, payload, BP)  # [BP]
    m_tile = tl.arange(0, BP) < n_tiles
    b_top = (b_words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    top = _largest(tl.where(m_tile, b_top, float("-inf")))
    valid = tl.sum((b_words >> 32) & 0x3FFFFFFF, axis=0)

    idle = (b_k <= 0.0) | (top == float("-inf"))
    log_k = tl.log(tl.where(idle, 1.0, b_k))
    eps_last = tl.full([1], eps, tl.float64)
    eps_t = tl.full([1], eps_init, tl.float64)
    inverse = 1.0 / eps_t
    inverse_last = 1.0 / eps_last
    growth = 1.0 / tl.full([1], eps_decay, tl.float64)
    a = _first_threshold(log_k, top, valid, idle, eps_t)
    log_total = tl.zeros([1], tl.float64)
    mass = tl.zeros([1], tl.float64)
    if i_tile == 0:
        _store_state(p_state, i_row, m_row, 0, n_rows, n_iters, a, log_total, mass)
    for t in range(1, n_iters):
        eps_t = tl.maximum(eps_t * eps_decay, eps_last)
        inverse = tl.minimum(inverse * growth, inverse_last)
        level = _level(a, top, idle)
        tile_total, tile_count = _sum_and_count(b_s, level, inverse, DTYPE)
        payload = (tl.sum(tile_count, axis=0).to(tl.int64) << SUM_BITS) | (
            tl.sum(tile_total, axis=0) * UNIT
        ).to(tl.int64)
        turn += 1
        b_words = _exchange(p_row_words, i_tile, n_tiles, turn, payload, BP)  # [BP]
        total = tl.sum(b_words & SUM_MASK, axis=0).to(tl.float64) / UNIT
        count = tl.sum((b_words >> SUM_BITS) & 0x7FFF, axis=0)
        a, log_total, mass = _next_threshold(a, level, total, count, log_k, idle, eps_t, inverse)
        if i_tile == 0:
            _store_state(p_state, i_row, m_row, t, n_rows, n_iters, a, log_total, mass)

    b_gates = _gates(b_s, a, idle, tl.minimum(inverse * growth, inverse_last), DTYPE)
    p_out = p_gates + i_row.to(tl.int64)[:, None, None] * n
    tl.store(p_out + start + o_n, b_gates.to(p_gates.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["n_rows", "n_iters", "last_free"])  # type: ignore[untyped-decorator]
def coordinate_descent_tiles_sum_bwd_kernel(
    p_grad: tl.tensor,
    p_s: tl.tensor,
    p_k: tl.tensor,
    p_mask: tl.tensor,
    p_state: tl.tensor,
    p_parts: tl.tensor,
    p_terms: tl.tensor,
    n_rows: tl.tensor,
    n: tl.tensor,
    n_tiles: tl.tensor,
    n_blocks: tl.tensor,
    n_iters: tl.tensor,
    last_free: tl.tensor,
    inner: tl.tensor,
    stride_grad_outer: tl.tensor,
    stride_grad_inner: tl.tensor,
    stride_grad_n: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_n: tl.tensor,
    stride_k_outer: tl.tensor,
    stride_k_inner: tl.tensor,
    stride_mask_outer: tl.tensor,
    stride_mask_inner: tl.tensor,
    stride_mask_n: tl.tensor,
    eps: tl.float64,
    eps_free: tl.float64,
    log_growth: tl.float64,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """Each tile's part of ā_T = Σ u; by the first, five scalars a softmax, and Σ_t ε_t ā_t / ā_T."""
    i_row, i_tile = _tile_of_program(n_tiles)
    p_row = _rows(p_s, i_row, inner, stride_outer, stride_inner)
    p_mask_row = _rows(p_mask, i_row, inner, stride_mask_outer, stride_mask_inner)
    p_grad_row = _rows(p_grad, i_row, inner, stride_grad_outer, stride_grad_inner)
    b_k = tl.load(_rows(p_k, i_row, inner, stride_k_outer, stride_k_inner))  # [1]
    rows = n_rows.to(tl.int64)
    b_a = tl.load(p_state + (i_row + (n_iters - 1) * rows))  # [1]
    eps_last = tl.full([1], eps, tl.float64)
    eps_first = tl.full([1], eps_free, tl.float64)
    inverse = 1.0 / _temperature(n_iters, last_free, eps_first, log_growth, eps_last)
    total = tl.zeros([1], tl.float64)
    for i_block in range(n_blocks):
        start, o_n, m_n = _tile_offsets(i_tile, i_block, n, n_blocks, E, C)
        b_s = _load_scores(
            p_row, p_mask_row, start, o_n, m_n, stride_n, stride_mask_n, HAS_MASK, DTYPE
        )  # [1, E, C]
        b_grad = _load(p_grad_row, start, o_n, m_n, stride_grad_n, 0.0).to(DTYPE)  # [1, E, C]
        total += _row_sum(_weighted_gates(b_s, b_grad, b_a, b_k <= 0.0, inverse, DTYPE))

    reach = tl.zeros([1], tl.float64)
    if i_tile == 0:
        # ā_t / ā_T = P_{t+1} ... P_T, over blocks of falling t.
        share = tl.full([1], 1.0, tl.float64)
        for i in range(0, n_iters, BT):
            o_t = n_iters - 1 - i - tl.arange(0, BT)  # [BT]
            m_t = o_t >= 0
            p_at = p_state + (i_row + o_t * rows)
            p_mass = p_at + 2 * n_iters * rows
            b_before = tl.load(p_at - rows, mask=o_t > 0, other=0.0)
            b_log_total = tl.load(p_at + n_iters * rows, mask=m_t, other=0.0)
            b_mass = tl.load(p_mass, mask=m_t, other=1.0)
            b_after = tl.load(p_mass + rows, mask=m_t & (o_t < n_iters - 1 - i), other=1.0)
            b_share = share * tl.cumprod(b_after, axis=0)
            share = tl.sum(tl.where(tl.arange(0, BT) == BT - 1, b_share * b_mass, 0.0), axis=0)
            share += tl.zeros([1], tl.float64)
            b_eps = _temperature(o_t, last_free, eps_first, log_growth, eps_last)
            reach += tl.sum(tl.where(m_t, b_share * b_eps, 0.0), axis=0)
            level, weight = _softmax_terms(b_before, b_log_total, b_mass, b_eps)
            high, rest = _split(level, DTYPE)
            factor, factor_rest = _split_scale(_inverse(b_eps), DTYPE)
            p_out = p_terms + (i_row.to(tl.int64) * n_iters + o_t) * 5
            tl.store(p_out, high, mask=m_t)
            tl.store(p_out + 1, rest, mask=m_t)
            tl.store(p_out + 2, factor, mask=m_t)
            tl.store(p_out + 3, factor_rest, mask=m_t)
            tl.store(p_out + 4, (b_share * weight).to(DTYPE), mask=m_t)
    _store_parts(p_parts, i_row, i_tile, n_tiles, total * inverse, reach)


@triton.jit(do_not_specialize=["n_rows", "n_iters"])  # type: ignore[untyped-decorator]
def coordinate_descent_tiles_bwd_kernel(
    p_grad: tl.tensor,
    p_s: tl.tensor,
    p_k: tl.tensor,
    p_mask: tl.tensor,
    p_state: tl.tensor,
    p_parts: tl.tensor,
    p_terms: tl.tensor,
    p_ds: tl.tensor,
    p_dk: tl.tensor,
    n_rows: tl.tensor,
    n: tl.tensor,
    n_tiles: tl.tensor,
    n_blocks: tl.tensor,
    n_iters: tl.tensor,
    inner: tl.tensor,
    stride_grad_outer: tl.tensor,
    stride_grad_inner: tl.tensor,
    stride_grad_n: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_n: tl.tensor,
    stride_k_outer: tl.tensor,
    stride_k_inner: tl.tensor,
    stride_mask_outer: tl.tensor,
    stride_mask_inner: tl.tensor,
    stride_mask_n: tl.tensor,
    inverse: tl.float64,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """The gradient of each tile's scores; by the first tile, that of the budget."""
    i_row, i_tile = _tile_of_program(n_tiles)
    p_row = _rows(p_s, i_row, inner, stride_outer, stride_inner)
    p_mask_row = _rows(p_mask, i_row, inner, stride_mask_outer, stride_mask_inner)
    p_grad_row = _rows(p_grad, i_row, inner, stride_grad_outer, stride_grad_inner)
    b_k = tl.load(_rows(p_k, i_row, inner, stride_k_outer, stride_k_inner))  # [1]
    idle = b_k <= 0.0
    b_a = tl.load(p_state + (i_row + (n_iters - 1) * n_rows.to(tl.int64)))  # [1]
    b_total, b_reach = _load_parts(p_parts, i_row, n_tiles, 0.0, BP)  # [BP]
    a_bar = tl.sum(b_total, axis=0)
    if i_tile == 0:
        tl.store(p_dk + i_row, a_bar * tl.sum(b_reach, axis=0) / tl.where(idle, 1.0, b_k))
    a_bar = a_bar.to(DTYPE)
    scale = tl.full([1], inverse, tl.float64)
    p_row_terms = p_terms + (tl.program_id(0) // n_tiles).to(tl.int64) * n_iters * 5
    p_out = p_ds + i_row.to(tl.int64)[:, None, None] * n
    for i_block in range(n_blocks):
        start, o_n, m_n = _tile_offsets(i_tile, i_block, n, n_blocks, E, C)
        b_s = _load_scores(
            p_row, p_mask_row, start, o_n, m_n, stride_n, stride_mask_n, HAS_MASK, DTYPE
        )  # [1, E, C]
        b_grad = _load(p_grad_row, start, o_n, m_n, stride_grad_n, 0.0).to(DTYPE)  # [1, E, C]
        b_ds = _weighted_gates(b_s, b_grad, b_a, idle, scale, DTYPE) * scale[:, None, None].to(DTYPE)
        for t in range(1, n_iters):
            p_term = p_row_terms + t * 5
            high = tl.load(p_term)
            rest = tl.load(p_term + 1)
            factor = tl.load(p_term + 2)
            factor_rest = tl.load(p_term + 3)
            weight = tl.load(p_term + 4) * a_bar
            # Before an iteration without saturated scores, nothing has any part in the result.
            if weight != 0.0:
                b_ds = _subtract_softmax(b_ds, b_s, high, rest, factor, factor_rest, weight)
        b_ds = tl.where((b_s == float("-inf")) | idle[:, None, None], 0.0, b_ds)
        tl.store(p_out + start + o_n, b_ds.to(p_ds.dtype.element_ty), mask=m_n)


# ---- Launches ----


class _Rows(NamedTuple):
    """The tensors of a call as rows [outer, inner, n]: strides are all that tells them from one another."""

    tensors: tuple[Tensor, ...]
    budget: Tensor
    mask: Tensor
    n_rows: int
    n: int
    inner: int
    strides: tuple[int, ...]


def _as_rows(k: Tensor, mask: Tensor | None, *tensors: Tensor) -> _Rows:
    shape = tensors[0].shape
    n, inner = shape[-1], shape[-2] if len(shape) > 1 else 1
    tensors = tuple(tensor.reshape(-1, inner, n) for tensor in tensors)
    k = k.reshape(-1, inner)
    # Without a mask any tensor does: it is not read.
    mask = tensors[0] if mask is None else mask.expand(shape).reshape(-1, inner, n)
    strides = tuple(stride for tensor in (*tensors, k, mask) for stride in tensor.stride())
    return _Rows(tensors, k, mask, k.numel(), n, inner, strides)


def _constants(block: Block, mask: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """What all kernels are compiled for."""
    return {
        "HAS_MASK": mask is not None,
        "DTYPE": TRITON_DTYPE[dtype],
        "E": block.depth,
        "C": block.columns,
        "num_warps": block.warps,
    }


def forward(
    s: Tensor, k: Tensor, mask: Tensor | None, n_iters: int, eps: float, eps_init: float, eps_decay: float
) -> tuple[Tensor, Tensor]:
    """Gates [..., n] and float64 scalars [3, T, ...], as from `descent._forward`; ``s`` is not empty."""
    gates = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    state = torch.empty((3, n_iters, *s.shape[:-1]), dtype=torch.float64, device=s.device)
    rows = _as_rows(k, mask, s)
    dtype = compute_dtype(s.dtype)
    schedule = (eps, eps_init, eps_decay)
    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        block = row_block(rows.n, dtype, LARGEST_ROW)
        if block is None:
            block, n_blocks, n_tiles = tile_block(rows.n, dtype, TILE)
            constants = _constants(block, mask, dtype) | {"BP": triton.next_power_of_2(n_tiles)}
            _forward_tiles(rows, gates, state, n_iters, schedule, n_blocks, n_tiles, constants)
            return gates, state
        coordinate_descent_rows_fwd_kernel[(triton.cdiv(rows.n_rows, block.rows),)](
            *(*rows.tensors, rows.budget, rows.mask, gates, state, rows.n_rows, rows.n, n_iters, rows.inner),
            *rows.strides,
            *schedule,
            BR=block.rows,
            **_constants(block, mask, dtype),
        )
    return gates, state


def _forward_tiles(
    rows: _Rows,
    gates: Tensor,
    state: Tensor,
    n_iters: int,
    schedule: tuple[float, float, float],
    n_blocks: int,
    n_tiles: int,
    constants: dict[str, Any],
) -> None:
    (s,), k, mask, n_rows, n, inner, strides = rows
    grid = (n_rows * n_tiles,)
    fits = constants["DTYPE"] == tl.float32 and n_blocks == 1
    if fits and grid[0] <= _programs_at_once(s.device, TILE_WARPS):
        words = torch.zeros((n_rows, 2, n_tiles), dtype=torch.int64, device=s.device)
        coordinate_descent_grid_fwd_kernel[grid](
            *(s, k, mask, gates, state, words, n_rows, n, n_tiles, n_iters, inner, *strides, *schedule),
            **constants,
            launch_cooperative_grid=True,
        )
        return

    eps = temperatures(n_iters, *schedule)
    left, right = torch.empty((2, n_rows, 2, n_tiles), dtype=torch.float64, device=s.device)
    top = torch.empty(n_rows, dtype=torch.float64, device=s.device)
    survey = {name: value for name, value in constants.items() if name != "BP"}
    coordinate_descent_tiles_survey_fwd_kernel[grid](
        *(s, mask, left, n, n_tiles, n_blocks, inner, *strides[:3], *strides[5:]), **survey
    )
    for t in range(n_iters):
        coordinate_descent_tiles_fwd_kernel[grid](
            *(s, k, mask, gates, state, top, left, right, t, n_rows, n, n_tiles, n_blocks, n_iters, inner),
            *strides,
            *(eps[t], 1 / eps[t], 1 / eps[t + 1]),
            **constants,
            FIRST=t == 0,
            LAST=t == n_iters - 1,
        )
        left, right = right, left


def backward(
    grad: Tensor,
    s: Tensor,
    k: Tensor,
    mask: Tensor | None,
    state: Tensor,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores [..., n] and the budget [...], as from `descent._backward`."""
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    (grad, s), k, p_mask, n_rows, n, inner, strides = _as_rows(k, mask, grad, s)
    dtype = compute_dtype(s.dtype)
    schedule = temperatures(n_iters, eps, eps_init, eps_decay)
    # The last temperature above eps, or the first of all: those before follow from it.
    last_free = max((t for t, value in enumerate(schedule) if value > eps), default=0)
    growth = (eps, schedule[last_free], -math.log2(eps_decay))
    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        block = row_block(n, dtype, LARGEST_ROW_BACKWARD)
        if block is not None:
            coordinate_descent_rows_bwd_kernel[(triton.cdiv(n_rows, block.rows),)](
                *(grad, s, k, p_mask, state, ds, dk, n_rows, n, n_iters, last_free, inner),
                *strides,
                *growth,
                BR=block.rows,
                **_constants(block, mask, dtype),
            )
            return ds, dk
        block, n_blocks, n_tiles = tile_block(n, dtype, TILE_BACKWARD)
        constants = _constants(block, mask, dtype)
        parts = torch.empty((n_rows, 2, n_tiles), dtype=torch.float64, device=s.device)
        terms = torch.empty((n_rows, n_iters, 5), dtype=dtype, device=s.device)
        coordinate_descent_tiles_sum_bwd_kernel[(n_rows * n_tiles,)](
            *(grad, s, k, p_mask, state, parts, terms, n_rows, n, n_tiles, n_blocks, n_iters, last_free),
            inner,
            *strides,
            *growth,
            BT=TERMS_AT_ONCE,
            **constants,
        )
        coordinate_descent_tiles_bwd_kernel[(n_rows * n_tiles,)](
            *(grad, s, k, p_mask, state, parts, terms, ds, dk, n_rows, n, n_tiles, n_blocks, n_iters),
            inner,
            *strides,
            1 / schedule[-1],
            BP=triton.next_power_of_2(n_tiles),
            **constants,
        )
    return ds, dk


@lru_cache
def _programs_at_once(device: torch.device, warps: int) -> int:
    """How many programs a GPU holds at any number of registers: 8 warps a multiprocessor. A CPU runs one."""
    if device.type != "cuda":
        return 0
    return 8 // warps * int(torch.cuda.get_device_properties(device).multi_processor_count)
