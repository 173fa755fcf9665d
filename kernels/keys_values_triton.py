"""Keys and values of routed rows, gated and put in attention's order: one launch forward, one backward."""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype

ELEMENTS = 4096  # of the keys that a program of the forward moves; as many values

_SIZES = ("places", "tiles", "sets")


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
    m_e: tl.tensor,
    HAS_NULL: tl.constexpr,
    GATED: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Rows at ``o_from``, gated, and the null row where there is none: [BK, BE]."""
    b_row = tl.load(
        p_rows + o_from[:, None] + o_e[None, :], mask=m_row[:, None] & m_e[None, :], other=0.0
    ).to(ACC)
    if GATED:
        b_row = b_row * b_gate[:, None]
    if HAS_NULL:
        b_null = tl.load(p_null + o_e, mask=m_e, other=0.0).to(ACC)
        b_row = tl.where(m_row[:, None], b_row, b_null[None, :])
    return b_row


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def keys_values_fwd_kernel(
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_null_key: tl.tensor,
    p_null_value: tl.tensor,
    p_laid_keys: tl.tensor,
    p_laid_values: tl.tensor,
    places: tl.tensor,
    tiles: tl.tensor,
    sets: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    HAS_NULL_KEY: tl.constexpr,
    GATE_KEYS: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """BK places of one head of a group: the null row, then rows [groups, places - 1, H, E], gated."""
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
    o_from = (o_row * H + i_h) * E
    o_to = ((i_head * places + o_place) * E)[:, None] + o_e[None, :]
    m_to = (o_place < places)[:, None] & m_e[None, :]
    o_null = (i_group % sets * H + i_h) * E
    b_key = load_behind(
        p_keys, p_null_key + o_null, o_from, o_e, b_gate, m_row, m_e, HAS_NULL_KEY, GATE_KEYS, ACC
    )
    tl.store(p_laid_keys + o_to, b_key.to(p_laid_keys.dtype.element_ty), mask=m_to)
    b_value = load_behind(p_values, p_null_value + o_null, o_from, o_e, b_gate, m_row, m_e, True, True, ACC)
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


def forward(
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    null_key: Tensor | None,
    null_value: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Keys and values [b, r h, 1 + k, e] of those of rows [b, r, k, h, e], which are not empty."""
    b, r, k, h, e = keys.shape
    laid_keys, laid_values = (
        torch.empty((b, r * h, 1 + k, e), dtype=keys.dtype, device=keys.device) for _ in range(2)
    )
    rows, width = block(e, ELEMENTS)
    tiles = triton.cdiv(1 + k, rows)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        keys_values_fwd_kernel[(b * r * h * tiles,)](
            keys.contiguous(),
            values.contiguous(),
            gates.contiguous(),
            null_value if null_key is None else null_key.contiguous(),
            null_value.contiguous(),
            laid_keys,
            laid_values,
            1 + k,
            tiles,
            r,
            H=h,
            E=e,
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


def _accumulator(keys: Tensor, gates: Tensor) -> tl.dtype:
    wide = torch.float64 in (compute_dtype(keys.dtype), gates.dtype)
    return tl.float64 if wide else tl.float32
