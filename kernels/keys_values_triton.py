"""Keys and values of routed rows, gated and put in attention's order: one launch forward, one backward.

Rows may come from where indices say. Then, in the backward, the program of a source row adds up the gradients
of all places that named it, in their order, which sorting the indices tells. Only the result is written.
"""

# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype

ELEMENTS = 4096  # of the keys that a program of the forward moves; as many values

SUMMED = 8192  # bytes of keys that a program of the backward of gathered rows adds at once; as many of values

_SIZES = ("places", "tiles", "sets", "windows", "m")


def block(e: int, elements: int) -> tuple[int, int]:
    """Rows and columns that a program moves at once."""
    width = max(16, triton.next_power_of_2(e))
    return max(1, min(64, elements // width)), width


@triton.jit  # type: ignore[untyped-decorator]
def load_behind(
    p_rows: tl.tensor,
    p_null: tl.tensor,
    o_from: tl.tensor,
    o_e: tl.tensor,
    b_gate: tl.tensor,
    m_row: tl.tensor,
    m_null: tl.tensor,
    m_e: tl.tensor,
    HAS_NULL: tl.constexpr,
    GATED: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Rows at ``o_from`` where ``m_row``, gated, and the null row where ``m_null``: [BK, BE]."""
    b_row = tl.load(
        p_rows + o_from[:, None] + o_e[None, :], mask=m_row[:, None] & m_e[None, :], other=0.0
    ).to(ACC)
    if GATED:
        b_row = b_row * b_gate[:, None]
    if HAS_NULL:
        b_null = tl.load(p_null + o_e, mask=m_e, other=0.0).to(ACC)
        b_row = tl.where(m_null[:, None], b_null[None, :], b_row)
    return b_row


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def keys_values_fwd_kernel(
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_null_key: tl.tensor,
    p_null_value: tl.tensor,
    p_laid_keys: tl.tensor,
    p_laid_values: tl.tensor,
    places: tl.tensor,
    tiles: tl.tensor,
    sets: tl.tensor,
    windows: tl.tensor,
    m: tl.tensor,
    stride_keys: tl.tensor,
    stride_values: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    INDEXED: tl.constexpr,
    HAS_NULL_KEY: tl.constexpr,
    GATE_KEYS: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """BK places of one head of a group: the null row, then rows [groups, places - 1, H, E], gated.

    Indexed, groups are [streams, windows, sets], and rows those of [streams, m, sets, H, E] at the indices.
    """
    i_tile = tl.program_id(0) % tiles
    i_head = (tl.program_id(0) // tiles).to(tl.int64)  # of all groups
    i_group = i_head // H
    i_h = i_head % H
    o_place = i_tile * BK + tl.arange(0, BK)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    m_row = (o_place > 0) & (o_place < places)
    o_row = i_group * (places - 1) + o_place - 1
    b_gate = tl.load(p_gates + o_row, mask=m_row, other=0.0).to(ACC)  # [BK]
    if INDEXED:
        b_index = tl.load(p_indices + o_row, mask=m_row, other=-1)
        m_row = (b_index >= 0) & (b_index < m)
        o_from = ((b_index * sets + i_group % sets) * H + i_h) * E
        i_stream = i_group // sets // windows
        p_keys += i_stream * stride_keys
        p_values += i_stream * stride_values
    else:
        o_from = (o_row * H + i_h) * E
    m_null = o_place == 0
    o_to = ((i_head * places + o_place) * E)[:, None] + o_e[None, :]
    m_to = (o_place < places)[:, None] & m_e[None, :]
    o_null = (i_group % sets * H + i_h) * E
    b_key = load_behind(
        p_keys, p_null_key + o_null, o_from, o_e, b_gate, m_row, m_null, m_e, HAS_NULL_KEY, GATE_KEYS, ACC
    )
    tl.store(p_laid_keys + o_to, b_key.to(p_laid_keys.dtype.element_ty), mask=m_to)
    b_value = load_behind(
        p_values, p_null_value + o_null, o_from, o_e, b_gate, m_row, m_null, m_e, True, True, ACC
    )
    tl.store(p_laid_values + o_to, b_value.to(p_laid_values.dtype.element_ty), mask=m_to)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def keys_values_bwd_kernel(
    p_dlaid_keys: tl.tensor,
    p_dlaid_values: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_dkeys: tl.tensor,
    p_dvalues: tl.tensor,
    p_dgates: tl.tensor,
    places: tl.tensor,
    tiles: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    GATE_KEYS: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Gradients of BK rows of a group, all heads, and of their gates, from those of the places."""
    i_group = (tl.program_id(0) // tiles).to(tl.int64)
    o_k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    o_e = tl.arange(0, BE)
    m_k = o_k < places - 1
    m = m_k[:, None] & (o_e < E)[None, :]
    o_row = i_group * (places - 1) + o_k
    b_gate = tl.load(p_gates + o_row, mask=m_k, other=0.0).to(ACC)  # [BK]
    b_dgate = tl.zeros([BK], ACC)
    for i_h in tl.static_range(H):
        o_rows = ((o_row * H + i_h) * E)[:, None] + o_e[None, :]
        o_laid = (((i_group * H + i_h) * places + o_k + 1) * E)[:, None] + o_e[None, :]
        b_dkey = tl.load(p_dlaid_keys + o_laid, mask=m, other=0.0).to(ACC)  # [BK, BE]
        b_dvalue = tl.load(p_dlaid_values + o_laid, mask=m, other=0.0).to(ACC)
        b_dgate += tl.sum(b_dvalue * tl.load(p_values + o_rows, mask=m, other=0.0).to(ACC), axis=1)
        if GATE_KEYS:
            b_dgate += tl.sum(b_dkey * tl.load(p_keys + o_rows, mask=m, other=0.0).to(ACC), axis=1)
            b_dkey = b_dkey * b_gate[:, None]
        tl.store(p_dkeys + o_rows, b_dkey.to(p_dkeys.dtype.element_ty), mask=m)
        tl.store(p_dvalues + o_rows, (b_dvalue * b_gate[:, None]).to(p_dvalues.dtype.element_ty), mask=m)
    tl.store(p_dgates + o_row, b_dgate.to(p_dgates.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gathered_keys_values_bwd_kernel(
    p_dlaid_keys: tl.tensor,
    p_dlaid_values: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_order: tl.tensor,
    p_starts: tl.tensor,
    p_dkeys: tl.tensor,
    p_dvalues: tl.tensor,
    p_dgates: tl.tensor,
    places: tl.tensor,
    m: tl.tensor,
    sets: tl.tensor,
    stride_keys: tl.tensor,
    stride_values: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    GATE_KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    BE: tl.constexpr,
    TAKEN: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Gradients of one source row of one set [H, E], and those of the gates of the places that named it.

    The places [groups, places - 1] that named the row stand in ``p_order`` between its start and the next.
    """
    i_row = tl.program_id(0).to(tl.int64)  # of [streams, m, sets]
    i_stream = i_row // sets // m
    o_f = tl.arange(0, HEADS * BE)
    o_h = o_f // BE
    o_e = o_f % BE
    m_f = (o_h < H) & (o_e < E)
    o_in_row = o_h * E + o_e
    o_from = (i_row - i_stream * m * sets) * H * E + o_in_row
    b_value = tl.load(p_values + i_stream * stride_values + o_from, mask=m_f, other=0.0).to(ACC)
    if GATE_KEYS:
        b_key = tl.load(p_keys + i_stream * stride_keys + o_from, mask=m_f, other=0.0).to(ACC)
    b_dkey = tl.zeros([HEADS * BE], ACC)
    b_dvalue = tl.zeros([HEADS * BE], ACC)
    end = tl.load(p_starts + i_row + 1)
    for i_first in range(tl.load(p_starts + i_row), end, TAKEN):
        o_taken = i_first + tl.arange(0, TAKEN)
        m_taken = o_taken < end
        b_place = tl.load(p_order + o_taken, mask=m_taken, other=0)  # [TAKEN]
        b_gate = tl.load(p_gates + b_place, mask=m_taken, other=0.0).to(ACC)
        o_group = b_place // (places - 1)
        o_laid = (o_group * H)[:, None] + o_h[None, :]
        o_laid = (o_laid * places + (b_place % (places - 1) + 1)[:, None]) * E + o_e[None, :]
        m_laid = m_taken[:, None] & m_f[None, :]
        b_dlaid_key = tl.load(p_dlaid_keys + o_laid, mask=m_laid, other=0.0).to(ACC)  # [TAKEN, H E]
        b_dlaid_value = tl.load(p_dlaid_values + o_laid, mask=m_laid, other=0.0).to(ACC)
        b_dgate = tl.sum(b_dlaid_value * b_value[None, :], axis=1)
        b_dvalue += tl.sum(b_dlaid_value * b_gate[:, None], axis=0)
        if GATE_KEYS:
            b_dgate += tl.sum(b_dlaid_key * b_key[None, :], axis=1)
            b_dlaid_key = b_dlaid_key * b_gate[:, None]
        b_dkey += tl.sum(b_dlaid_key, axis=0)
        tl.store(p_dgates + b_place, b_dgate.to(p_dgates.dtype.element_ty), mask=m_taken)
    o_to = i_row * H * E + o_in_row
    tl.store(p_dkeys + o_to, b_dkey.to(p_dkeys.dtype.element_ty), mask=m_f)
    tl.store(p_dvalues + o_to, b_dvalue.to(p_dvalues.dtype.element_ty), mask=m_f)


def forward(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    gate_keys: bool,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values [b, r h, 1 + k, e] of those of rows [b, r, k, h, e], which are not empty.

    With indices [b, c, r, k], of those of rows [b, m, r, h, e]: [b c, r h, 1 + k, e].
    """
    *streams, r, k = gates.shape
    h, e = keys.shape[-2:]
    keys, values = (
        t if t[0].is_contiguous() and indices is not None else t.contiguous() for t in (keys, values)
    )
    groups = math.prod(streams) * r
    laid_keys, laid_values = (
        torch.empty((groups // r, r * h, 1 + k, e), dtype=keys.dtype, device=keys.device) for _ in range(2)
    )
    rows, width = block(e, ELEMENTS)
    tiles = triton.cdiv(1 + k, rows)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        keys_values_fwd_kernel[(groups * h * tiles,)](
            keys,
            values,
            gates.contiguous(),
            gates if indices is None else indices.contiguous(),
            null_value if null_key is None else null_key.contiguous(),
            null_value.contiguous(),
            laid_keys,
            laid_values,
            1 + k,
            tiles,
            r,
            streams[-1],
            keys.shape[1],
            keys.stride(0),
            values.stride(0),
            H=h,
            E=e,
            INDEXED=indices is not None,
            HAS_NULL_KEY=null_key is not None,
            GATE_KEYS=gate_keys,
            BK=rows,
            BE=width,
            ACC=_accumulator(keys, gates),
            num_warps=4,
        )
    return laid_keys, laid_values


def backward(
    d_laid_keys: Tensor,
    d_laid_values: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys, values [b, r, k, h, e] and gates [b, r, k], which are not empty."""
    b, r, k, h, e = keys.shape
    d_keys, d_values = (torch.empty(keys.shape, dtype=keys.dtype, device=keys.device) for _ in range(2))
    d_gates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    rows, width = block(e, ELEMENTS // 4)
    tiles = triton.cdiv(k, rows)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        keys_values_bwd_kernel[(b * r * tiles,)](
            d_laid_keys.contiguous(),
            d_laid_values.contiguous(),
            keys.contiguous(),
            values.contiguous(),
            gates.contiguous(),
            d_keys,
            d_values,
            d_gates,
            1 + k,
            tiles,
            H=h,
            E=e,
            GATE_KEYS=gate_keys,
            BK=rows,
            BE=width,
            ACC=_accumulator(keys, gates),
            num_warps=4,
        )
    return d_keys, d_values, d_gates


def gathered_backward(
    d_laid_keys: Tensor,
    d_laid_values: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys, values [b, m, r, h, e] and gates [b, c, r, k] that indices [b, c, r, k] gathered."""
    b, m, r, h, e = keys.shape
    if not (keys[0].is_contiguous() and values[0].is_contiguous()):
        keys, values = keys.contiguous(), values.contiguous()
    d_keys, d_values = (torch.empty(keys.shape, dtype=keys.dtype, device=keys.device) for _ in range(2))
    d_gates = torch.zeros(gates.shape, dtype=gates.dtype, device=gates.device)  # some places may name no row
    # Which source row each place names; those that name none come after all others.
    rows = b * m * r
    stream = torch.arange(b, device=keys.device).view(b, 1, 1, 1)
    sets = torch.arange(r, device=keys.device)[:, None]
    named = torch.where((indices < 0) | (indices >= m), rows, (stream * m + indices) * r + sets)
    named, order = named.to(torch.int32).flatten().sort(stable=True)
    starts = torch.searchsorted(named, torch.arange(rows + 1, dtype=torch.int32, device=keys.device))
    heads, width = triton.next_power_of_2(h), triton.next_power_of_2(e)
    taken = max(1, min(16, SUMMED // (heads * width * keys.element_size())))
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        gathered_keys_values_bwd_kernel[(rows,)](
            d_laid_keys.contiguous(),
            d_laid_values.contiguous(),
            keys,
            values,
            gates.contiguous(),
            order,
            starts,
            d_keys,
            d_values,
            d_gates,
            1 + gates.shape[-1],
            m,
            r,
            keys.stride(0),
            values.stride(0),
            H=h,
            E=e,
            GATE_KEYS=gate_keys,
            HEADS=heads,
            BE=width,
            TAKEN=taken,
            ACC=_accumulator(keys, gates),
            num_warps=2,
        )
    return d_keys, d_values, d_gates


def _accumulator(keys: Tensor, gates: Tensor) -> tl.dtype:
    wide = torch.float64 in (compute_dtype(keys.dtype), gates.dtype)
    return tl.float64 if wide else tl.float32
