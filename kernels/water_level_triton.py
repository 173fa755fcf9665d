"""Triton: the soft top-k. The level comes from the selection's three launches, the gates from a fourth.

Rows short enough to be sorted by one program take a single launch. The backward takes two: the sums of a row,
then the gradients; one for rows that one program holds.
"""

# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.selection_triton import (
    Rows,
    as_rows,
    can_address,
    can_select,
    chosen_gates,
    count_picks,
    exponents,
    from_key,
    gates_at,
    load_scores,
    prepare_rows,
    row_of_mask,
    select,
    solve_level,
    sort_block,
    sort_row,
    sorts_whole_rows,
    to_key,
)

__all__ = [
    "backward",
    "backward_chosen",
    "can_address",
    "can_select",
    "forward",
    "forward_chosen",
    "sorts_whole_rows",
]

BLOCK = 2048  # entries of which a program makes the gates
BACKWARD_BLOCK = 4096  # entries that the backward reads at once
MAX_SPANS = 256  # partial sums of a row in the backward


@triton.jit(do_not_specialize=["rows", "inner", "blocks"])  # type: ignore[untyped-decorator]
def water_level_fwd_kernel(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_levels: tl.tensor,
    p_gates: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    blocks: tl.tensor,
    scale: tl.float64,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gates [rows, n] = min(1, exp((s - shift) / eps + level))."""
    pid = tl.program_id(0)
    i_row = (pid // blocks).to(tl.int64)
    o_n = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    b_s = load_scores(p_s + i_row * stride_s, p_mask, o_n, n, stride_mn, HAS_MASK, DTYPE)  # [BLOCK]
    shift = tl.load(p_levels + i_row)
    level = tl.load(p_levels + rows + i_row)
    b_gate = gates_at(b_s, shift, level, tl.full([], scale, tl.float64), DTYPE)
    tl.store(p_gates + i_row * n + o_n, b_gate.to(p_gates.dtype.element_ty), mask=o_n < n)


@triton.jit(
    do_not_specialize=[
        "p_s",
        "p_mask",
        "n",
        "num",
        "rows",
        "stride_s",
        "inner",
        "stride_m0",
        "stride_m1",
        "stride_mn",
        "stride_k",
    ]
)  # type: ignore[untyped-decorator]
def water_level_short_fwd_kernel(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_k: tl.tensor,
    p_levels: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    n: tl.tensor,
    num: tl.tensor,
    rows: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    stride_k: tl.tensor,
    number: tl.float64,
    eps: tl.float64,
    scale: tl.float64,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    CHOSEN: tl.constexpr,
    STRAIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gates of a row, its level, and the indices of the largest scores, in one program that sorts the row.

    The gates are those of all entries [rows, n], or of the largest [rows, num].
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    b_s = load_scores(p_s + i_row * stride_s, p_mask, o_n, n, stride_mn, HAS_MASK, tl.float32)  # [BLOCK]
    b_key = to_key(b_s, tl.float32)
    valid = tl.sum((b_key > -0x80000000).to(tl.int32))

    bad = tl.sum(((b_s != b_s) | (b_s == float("inf"))).to(tl.int32))
    b_key, b_id = sort_row(b_key, o_n)
    o_rank = BLOCK - 1 - o_n
    tl.store(
        p_indices + i_row * num + o_rank, tl.where(o_rank < valid, b_id, -1).to(tl.int64), mask=o_rank < num
    )

    k = tl.load(p_k + i_row * stride_k) if HAS_K else tl.full([], number, tl.float64)
    picks = count_picks(k, valid.to(tl.float64), n)
    b_sorted = from_key(b_key, tl.float32)
    b_score = tl.where((o_rank < valid) & (b_sorted < float("inf")), b_sorted, 0.0)
    shift = tl.sum(tl.where(o_rank == tl.maximum(picks - 1, 0), b_score, 0.0))
    b_z = (b_score - shift).to(tl.float64) / eps
    m_tail = (o_rank >= picks) & (o_rank < valid)
    tail = tl.sum(tl.where(m_tail, tl.exp(tl.where(m_tail & (b_z < 0), b_z, 0.0)), 0.0))
    tail = tl.where(bad > 0, float("nan"), tail)
    b_below = tl.gather(b_z, tl.maximum(o_n - 1, 0), 0)
    level, left = solve_level(b_z, b_below, o_rank, picks, tail, valid.to(tl.float64), k)
    tl.store(p_levels + i_row, shift.to(tl.float64))
    tl.store(p_levels + rows + i_row, level)
    tl.store(p_levels + 2 * rows + i_row, left)
    scale = tl.full([], scale, tl.float64)
    if CHOSEN:
        b_sorted = tl.where(o_rank < valid, b_sorted, float("-inf"))
        b_gate = chosen_gates(b_sorted, shift, level, scale, STRAIGHT, tl.float32)
        tl.store(p_gates + i_row * num + o_rank, b_gate.to(p_gates.dtype.element_ty), mask=o_rank < num)
    else:
        b_gate = gates_at(b_s, shift, level, scale, tl.float32)
        tl.store(p_gates + i_row * n + o_n, b_gate.to(p_gates.dtype.element_ty), mask=o_n < n)


@triton.jit  # type: ignore[untyped-decorator]
def free_gates(
    b_s: tl.tensor, shift: tl.tensor, level: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """The gates that are below saturation, 0 for all others."""
    b_z = exponents(b_s, shift, level, scale, DTYPE)
    # NaN passes on into the gradient of its row.
    m_fixed = (b_z >= 0) | (b_s == float("-inf"))
    return tl.where(m_fixed, 0.0, tl.exp2(tl.where(m_fixed, 0.0, b_z)))


@triton.jit(do_not_specialize=["rows", "inner", "spans", "span"])  # type: ignore[untyped-decorator]
def water_level_bwd_sums_kernel(
    p_grad: tl.tensor,
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_levels: tl.tensor,
    p_sums: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    stride_g: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    spans: tl.tensor,
    span: tl.tensor,
    scale: tl.float64,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Σ λ and Σ g λ over the unsaturated entries of each span: float64 [rows, 2, spans]."""
    pid = tl.program_id(0)
    i_row = (pid // spans).to(tl.int64)
    i_span = pid % spans
    scale = tl.full([], scale, tl.float64)
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    shift = tl.load(p_levels + i_row)
    level = tl.load(p_levels + rows + i_row)
    left = tl.full([], 0.0, tl.float64)
    weighted = tl.full([], 0.0, tl.float64)
    for i_block in range(i_span * span, tl.minimum(i_span * span + span, tl.cdiv(n, BLOCK))):
        o_n = i_block * BLOCK + tl.arange(0, BLOCK)
        b_s = load_scores(p_s + i_row * stride_s, p_mask, o_n, n, stride_mn, HAS_MASK, DTYPE)  # [BLOCK]
        b_gate = free_gates(b_s, shift, level, scale, DTYPE)
        b_grad = tl.load(p_grad + i_row * stride_g + o_n, mask=o_n < n, other=0.0).to(DTYPE)  # [BLOCK]
        left += tl.sum(b_gate.to(tl.float64))
        weighted += tl.sum(b_gate.to(tl.float64) * b_grad.to(tl.float64))
    tl.store(p_sums + i_row * 2 * spans + i_span, left)
    tl.store(p_sums + (i_row * 2 + 1) * spans + i_span, weighted)


@triton.jit(do_not_specialize=["rows", "inner", "spans", "blocks"])  # type: ignore[untyped-decorator]
def water_level_bwd_kernel(
    p_grad: tl.tensor,
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_levels: tl.tensor,
    p_sums: tl.tensor,
    p_ds: tl.tensor,
    p_dk: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    stride_g: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    spans: tl.tensor,
    blocks: tl.tensor,
    eps: tl.float64,
    scale: tl.float64,
    HAS_MASK: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gradients ds [rows, n] = λ / eps (g - dk), and dk [rows] = Σ g λ / Σ λ over unsaturated entries."""
    pid = tl.program_id(0)
    i_row = (pid // blocks).to(tl.int64)
    i_block = pid % blocks
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    scale = tl.full([], scale, tl.float64)
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    b_s = load_scores(p_s + i_row * stride_s, p_mask, o_n, n, stride_mn, HAS_MASK, DTYPE)  # [BLOCK]
    b_gate = free_gates(b_s, tl.load(p_levels + i_row), tl.load(p_levels + rows + i_row), scale, DTYPE)
    b_grad = tl.load(p_grad + i_row * stride_g + o_n, mask=o_n < n, other=0.0).to(DTYPE)  # [BLOCK]
    if WHOLE_ROWS:
        left = tl.sum(b_gate.to(tl.float64))
        weighted = tl.sum(b_gate.to(tl.float64) * b_grad.to(tl.float64))
    else:
        o_span = tl.arange(0, SPANS)
        p_sums += i_row * 2 * spans
        left = tl.sum(tl.load(p_sums + o_span, mask=o_span < spans, other=0.0))
        weighted = tl.sum(tl.load(p_sums + spans + o_span, mask=o_span < spans, other=0.0))
    dk = weighted / tl.where(left == 0, 1.0, left)
    if i_block == 0:
        tl.store(p_dk + i_row, dk)
    b_ds = b_gate * (b_grad - dk.to(DTYPE)) / tl.full([], eps, DTYPE)
    tl.store(p_ds + i_row * n + o_n, b_ds.to(p_ds.dtype.element_ty), mask=o_n < n)


@triton.jit  # type: ignore[untyped-decorator]
def weigh_chosen(
    p_grad: tl.tensor,
    p_indices: tl.tensor,
    p_s: tl.tensor,
    num: tl.tensor,
    shift: tl.tensor,
    level: tl.tensor,
    left: tl.tensor,
    scale: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The gradient of a row's budget: Σ g λ over the unsaturated of its chosen entries, over what is left."""
    weighted = tl.full([], 0.0, tl.float64)
    for start in range(0, num, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        b_index = tl.load(p_indices + o_c, mask=o_c < num, other=-1)  # [BLOCK]
        b_s = tl.load(p_s + b_index, mask=b_index >= 0, other=float("-inf")).to(DTYPE)
        b_grad = tl.load(p_grad + o_c, mask=b_index >= 0, other=0.0).to(DTYPE)
        b_gate = free_gates(b_s, shift, level, scale, DTYPE)
        weighted += tl.sum(b_gate.to(tl.float64) * b_grad.to(tl.float64))
    return weighted / tl.where(left > 0, left, 1.0)


@triton.jit(do_not_specialize=["num", "rows"])  # type: ignore[untyped-decorator]
def chosen_bwd_budget_kernel(
    p_grad: tl.tensor,
    p_indices: tl.tensor,
    p_s: tl.tensor,
    p_levels: tl.tensor,
    p_dk: tl.tensor,
    num: tl.tensor,
    rows: tl.tensor,
    stride_s: tl.tensor,
    scale: tl.float64,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Gradients of the budgets [rows], one program a row."""
    i_row = tl.program_id(0).to(tl.int64)
    dk = weigh_chosen(
        p_grad + i_row * num,
        p_indices + i_row * num,
        p_s + i_row * stride_s,
        num,
        tl.load(p_levels + i_row),
        tl.load(p_levels + rows + i_row),
        tl.load(p_levels + 2 * rows + i_row),
        tl.full([], scale, tl.float64),
        DTYPE,
        BLOCK,
    )
    tl.store(p_dk + i_row, dk)


@triton.jit(do_not_specialize=["num", "rows", "inner", "blocks"])  # type: ignore[untyped-decorator]
def chosen_bwd_kernel(
    p_grad: tl.tensor,
    p_indices: tl.tensor,
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_levels: tl.tensor,
    p_ds: tl.tensor,
    p_dk: tl.tensor,
    n: tl.tensor,
    num: tl.tensor,
    rows: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    blocks: tl.tensor,
    eps: tl.float64,
    scale: tl.float64,
    HAS_MASK: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    INDICES: tl.constexpr,
) -> None:
    """Gradients ds [rows, n] = λ / eps (g - dk), where g [rows, num] is that of the chosen and 0 for others.

    A program that holds a whole row also finds dk; else it is there.
    """
    pid = tl.program_id(0)
    i_row = (pid // blocks).to(tl.int64)
    i_block = pid % blocks
    p_grad += i_row * num
    p_indices += i_row * num
    p_s += i_row * stride_s
    p_ds += i_row * n
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    scale = tl.full([], scale, tl.float64)
    shift = tl.load(p_levels + i_row)
    level = tl.load(p_levels + rows + i_row)
    if WHOLE_ROWS:
        left = tl.load(p_levels + 2 * rows + i_row)
        dk = weigh_chosen(p_grad, p_indices, p_s, num, shift, level, left, scale, DTYPE, INDICES)
        tl.store(p_dk + i_row, dk)
    else:
        dk = tl.load(p_dk + i_row)
    dk = dk.to(DTYPE)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    b_s = load_scores(p_s, p_mask, o_n, n, stride_mn, HAS_MASK, DTYPE)  # [BLOCK]
    b_ds = -dk * free_gates(b_s, shift, level, scale, DTYPE) / tl.full([], eps, DTYPE)
    tl.store(p_ds + o_n, b_ds.to(p_ds.dtype.element_ty), mask=o_n < n)
    # The chosen entries of the block take the place of what was just stored.
    tl.debug_barrier()
    for start in range(0, num, INDICES):
        o_c = start + tl.arange(0, INDICES)
        b_index = tl.load(p_indices + o_c, mask=o_c < num, other=-1)  # [INDICES]
        m_here = (b_index >= i_block * BLOCK) & (b_index < i_block * BLOCK + BLOCK)
        b_chosen = tl.load(p_s + b_index, mask=m_here, other=float("-inf")).to(DTYPE)
        b_grad = tl.load(p_grad + o_c, mask=m_here, other=0.0).to(DTYPE)
        b_gate = free_gates(b_chosen, shift, level, scale, DTYPE)
        b_at = b_gate * (b_grad - dk) / tl.full([], eps, DTYPE)
        tl.store(p_ds + b_index, b_at.to(p_ds.dtype.element_ty), mask=m_here)


def forward(
    s: Tensor,
    k: Tensor | None,
    number: float,
    mask: Tensor | None,
    eps: float,
    largest: int,
    num: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates [..., n]; float64 scalars [3, ...], see `select`; the ``num`` largest [..., num].

    Args:
        s: scores, [..., n].
        k: float64 budgets, [...]; None for one number in all rows.
        number: that number.
        mask: broadcasts to [..., n].
        eps: the temperature.
        largest: a bound on ceil(k), for which `can_select` holds.
        num: how many indices, for which it holds too.
    """
    lead, n = s.shape[:-1], s.shape[-1]
    rows = prepare_rows(s, mask)
    count = rows.s.shape[0]
    k = None if k is None else k.reshape(count)
    gates = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    if sorts_whole_rows(s):
        levels, indices = forward_short(rows, k, number, eps, num, gates)
        return gates, levels.view(3, *lead), indices.view(*lead, num)
    levels = torch.empty((3, count), dtype=torch.float64, device=s.device)
    indices = select(rows, min(max(largest, num, 1), n), num, eps, k, number, levels)
    blocks = triton.cdiv(n, BLOCK)
    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        water_level_fwd_kernel[(count * blocks,)](
            rows.s,
            rows.mask,
            levels,
            gates,
            n,
            count,
            *rows.strides,
            blocks,
            math.log2(math.e) / eps,
            HAS_MASK=rows.has_mask,
            DTYPE=rows.dtype,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return gates, levels.view(3, *lead), indices.view(*lead, num)


def forward_chosen(
    s: Tensor,
    k: Tensor | None,
    number: float,
    mask: Tensor | None,
    eps: float,
    largest: int,
    num: int,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, with the gates of the ``num`` largest alone, [..., num]."""
    lead, n = s.shape[:-1], s.shape[-1]
    rows = prepare_rows(s, mask)
    count = rows.s.shape[0]
    k = None if k is None else k.reshape(count)
    chosen = torch.empty((*lead, num), dtype=s.dtype, device=s.device)
    if sorts_whole_rows(s):
        levels, indices = forward_short(rows, k, number, eps, num, chosen, True, straight_through)
    else:
        levels = torch.empty((3, count), dtype=torch.float64, device=s.device)
        largest = min(max(largest, num, 1), n)
        indices = select(rows, largest, num, eps, k, number, levels, chosen, straight_through)
    return chosen, levels.view(3, *lead), indices.view(*lead, num)


def forward_short(
    rows: Rows,
    k: Tensor | None,
    number: float,
    eps: float,
    num: int,
    gates: Tensor,
    chosen: bool = False,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fills ``gates``, of all entries or of the chosen; returns levels [3, rows] and indices [rows, num]."""
    s, mask, strides, has_mask, _ = rows
    count, n = s.shape
    levels = torch.empty((3, count), dtype=torch.float64, device=s.device)
    indices = torch.empty((count, num), dtype=torch.int64, device=s.device)
    block, warps = sort_block(n)
    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        water_level_short_fwd_kernel[(count,)](
            s,
            mask,
            k,
            levels,
            gates,
            indices,
            n,
            num,
            count,
            *strides,
            0 if k is None else k.stride(0),
            number,
            eps,
            math.log2(math.e) / eps,
            HAS_MASK=has_mask,
            HAS_K=k is not None,
            CHOSEN=chosen,
            STRAIGHT=straight_through,
            BLOCK=block,
            num_warps=warps,
        )
    return levels, indices


def backward(
    grad: Tensor, s: Tensor, mask: Tensor | None, levels: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores [..., n] and of the budget [...]."""
    n = s.shape[-1]
    rows = prepare_rows(s, mask)
    count = rows.s.shape[0]
    grad = as_rows(grad)
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dk = torch.empty(s.shape[:-1], dtype=torch.float64, device=s.device)
    block = min(BACKWARD_BLOCK, max(32, triton.next_power_of_2(n)))
    warps = max(1, min(8, block // 256))
    blocks = triton.cdiv(n, block)
    span = triton.cdiv(blocks, MAX_SPANS)
    spans = triton.cdiv(blocks, span)
    scale = math.log2(math.e) / eps
    sums = torch.empty(0 if blocks == 1 else count * 2 * spans, dtype=torch.float64, device=s.device)
    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        if blocks > 1:
            water_level_bwd_sums_kernel[(count * spans,)](
                grad,
                rows.s,
                rows.mask,
                levels,
                sums,
                n,
                count,
                grad.stride(0),
                *rows.strides,
                spans,
                span,
                scale,
                HAS_MASK=rows.has_mask,
                DTYPE=rows.dtype,
                BLOCK=block,
                num_warps=warps,
            )
        water_level_bwd_kernel[(count * blocks,)](
            grad,
            rows.s,
            rows.mask,
            levels,
            sums,
            ds,
            dk,
            n,
            count,
            grad.stride(0),
            *rows.strides,
            spans,
            blocks,
            eps,
            scale,
            HAS_MASK=rows.has_mask,
            WHOLE_ROWS=blocks == 1,
            DTYPE=rows.dtype,
            SPANS=triton.next_power_of_2(spans),
            BLOCK=block,
            num_warps=warps,
        )
    return ds, dk


def backward_chosen(
    grad: Tensor, indices: Tensor, s: Tensor, mask: Tensor | None, levels: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores [..., n] and of the budget [...] from those of the chosen gates [..., num]."""
    n, num = s.shape[-1], grad.shape[-1]
    rows = prepare_rows(s, mask)
    count = rows.s.shape[0]
    grad, indices = grad.contiguous(), indices.contiguous()
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dk = torch.empty(s.shape[:-1], dtype=torch.float64, device=s.device)
    block = min(BACKWARD_BLOCK, max(32, triton.next_power_of_2(n)))
    blocks = triton.cdiv(n, block)
    together = min(triton.next_power_of_2(max(num, 1)), 1024)
    scale = math.log2(math.e) / eps
    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        if blocks > 1:
            chosen_bwd_budget_kernel[(count,)](
                grad,
                indices,
                rows.s,
                levels,
                dk,
                num,
                count,
                rows.strides[0],
                scale,
                DTYPE=rows.dtype,
                BLOCK=together,
                num_warps=8,
            )
        chosen_bwd_kernel[(count * blocks,)](
            grad,
            indices,
            rows.s,
            rows.mask,
            levels,
            ds,
            dk,
            n,
            num,
            count,
            *rows.strides,
            blocks,
            eps,
            scale,
            HAS_MASK=rows.has_mask,
            WHOLE_ROWS=blocks == 1,
            DTYPE=rows.dtype,
            BLOCK=block,
            INDICES=together,
            num_warps=max(1, min(8, block // 256)),
        )
    return ds, dk
