"""Attention to gathered rows: each program reads the rows that its queries see from where they are.

Forward as in `local_attention_triton`, over the places of `keys_values_triton`: the null row, then the rows
at the indices, gated. The backward writes the gradients of the places, and adds them up by row as that does.
"""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.keys_values_triton import gathered_backward, load_behind
from xlroute.kernels.local_attention_triton import fold, load_tile, logit_scale

PLACES = 64  # that a program reads at once; fewer in float32
MOST_QUERIES = 64  # that it holds; half of them in float32

_SIZES = ("tiles", "n", "h", "windows", "places", "m")


@triton.jit  # type: ignore[untyped-decorator]
def load_places(
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_null_key: tl.tensor,
    p_null_value: tl.tensor,
    o_place: tl.tensor,
    places: tl.tensor,
    m: tl.tensor,
    stride_row: tl.tensor,
    E: tl.constexpr,
    BE: tl.constexpr,
    GATE_KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Keys and values [places, BE] of one head, and which of the places hold something."""
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    m_row = (o_place > 0) & (o_place < places)
    b_index = tl.load(p_indices + o_place - 1, mask=m_row, other=-1)
    b_gate = tl.load(p_gates + o_place - 1, mask=m_row, other=0.0).to(tl.float32)
    m_row = (b_index >= 0) & (b_index < m)
    m_null = o_place == 0
    o_from = b_index * stride_row
    b_key = load_behind(
        p_keys, p_null_key, o_from, o_e, b_gate, m_row, m_null, m_e, True, GATE_KEYS, tl.float32
    )
    b_value = load_behind(
        p_values, p_null_value, o_from, o_e, b_gate, m_row, m_null, m_e, True, True, tl.float32
    )
    return b_key.to(p_keys.dtype.element_ty), b_value.to(p_values.dtype.element_ty), m_row | m_null


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gathered_attention_fwd_kernel(
    p_q: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_null_key: tl.tensor,
    p_null_value: tl.tensor,
    p_out: tl.tensor,
    p_sums: tl.tensor,
    tiles: tl.tensor,
    n: tl.tensor,
    h: tl.tensor,
    windows: tl.tensor,
    places: tl.tensor,
    m: tl.tensor,
    stride_keys: tl.tensor,
    stride_values: tl.tensor,
    scale: tl.float32,
    H: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    GATE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BQ queries of one head of a window: their output, and log2 of the sum of their exponentials."""
    i_head = (tl.program_id(0) // tiles).to(tl.int64)  # of all windows
    i_h = i_head % h
    i_stream = i_head // h // windows
    o_set = i_head // H * (places - 1)
    o_q = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    b_q = load_tile(p_q + i_head * n * E, o_q, n, E, E, BE)  # [BQ, BE]
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_out = tl.zeros([BQ, BE], tl.float32)
    for i_place in range(0, places, BK):
        b_key, b_value, m_place = load_places(
            p_keys + i_stream * stride_keys + i_h * E,
            p_values + i_stream * stride_values + i_h * E,
            p_gates + o_set,
            p_indices + o_set,
            p_null_key + i_h * E,
            p_null_value + i_h * E,
            i_place + tl.arange(0, BK),
            places,
            m,
            h * E,
            E,
            BE,
            GATE_KEYS,
        )
        b_s = tl.dot(b_q, tl.trans(b_key), input_precision=PRECISION) * scale  # [BQ, BK]
        b_s = tl.where(m_place[None, :], b_s, float("-inf"))
        b_max, b_sum, b_out = fold(b_s, b_value, b_max, b_sum, b_out, PRECISION)
    m_q = o_q < n
    o_e = tl.arange(0, BE)
    o_to = (i_head * n + o_q)[:, None] * E + o_e[None, :]
    b_out = (b_out / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_to, b_out, mask=m_q[:, None] & (o_e < E)[None, :])
    tl.store(p_sums + i_head * n + o_q, b_max + tl.log2(b_sum), mask=m_q)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gathered_attention_bwd_queries_kernel(
    p_q: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_null_key: tl.tensor,
    p_null_value: tl.tensor,
    p_out: tl.tensor,
    p_sums: tl.tensor,
    p_dout: tl.tensor,
    p_dq: tl.tensor,
    p_deltas: tl.tensor,
    tiles: tl.tensor,
    n: tl.tensor,
    h: tl.tensor,
    windows: tl.tensor,
    places: tl.tensor,
    m: tl.tensor,
    stride_keys: tl.tensor,
    stride_values: tl.tensor,
    scale: tl.float32,
    factor: tl.float32,
    H: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    GATE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradient of BQ queries of one head of a window, and their <gradient of the output, output>."""
    i_head = (tl.program_id(0) // tiles).to(tl.int64)
    i_h = i_head % h
    i_stream = i_head // h // windows
    o_set = i_head // H * (places - 1)
    o_q = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    m_q = o_q < n
    b_q = load_tile(p_q + i_head * n * E, o_q, n, E, E, BE)  # [BQ, BE]
    b_dout = load_tile(p_dout + i_head * n * E, o_q, n, E, E, BE)
    b_out = load_tile(p_out + i_head * n * E, o_q, n, E, E, BE)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), axis=1)
    tl.store(p_deltas + i_head * n + o_q, b_delta, mask=m_q)
    b_sum = tl.load(p_sums + i_head * n + o_q, mask=m_q, other=0.0)
    b_dq = tl.zeros([BQ, BE], tl.float32)
    for i_place in range(0, places, BK):
        b_key, b_value, m_place = load_places(
            p_keys + i_stream * stride_keys + i_h * E,
            p_values + i_stream * stride_values + i_h * E,
            p_gates + o_set,
            p_indices + o_set,
            p_null_key + i_h * E,
            p_null_value + i_h * E,
            i_place + tl.arange(0, BK),
            places,
            m,
            h * E,
            E,
            BE,
            GATE_KEYS,
        )
        b_s = tl.dot(b_q, tl.trans(b_key), input_precision=PRECISION) * scale  # [BQ, BK]
        b_p = tl.where(m_q[:, None] & m_place[None, :], tl.exp2(b_s - b_sum[:, None]), 0.0)
        b_dp = tl.dot(b_dout, tl.trans(b_value), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += tl.dot(b_ds.to(b_key.dtype), b_key, input_precision=PRECISION)
    o_e = tl.arange(0, BE)
    o_to = (i_head * n + o_q)[:, None] * E + o_e[None, :]
    tl.store(p_dq + o_to, (b_dq * factor).to(p_dq.dtype.element_ty), mask=m_q[:, None] & (o_e < E)[None, :])


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gathered_attention_bwd_places_kernel(
    p_q: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_null_key: tl.tensor,
    p_null_value: tl.tensor,
    p_sums: tl.tensor,
    p_dout: tl.tensor,
    p_deltas: tl.tensor,
    p_dlaid_keys: tl.tensor,
    p_dlaid_values: tl.tensor,
    tiles: tl.tensor,
    n: tl.tensor,
    h: tl.tensor,
    windows: tl.tensor,
    places: tl.tensor,
    m: tl.tensor,
    stride_keys: tl.tensor,
    stride_values: tl.tensor,
    scale: tl.float32,
    factor: tl.float32,
    H: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    GATE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradients of the keys and values at BK places of one head of a window, as attention sees them."""
    i_head = (tl.program_id(0) // tiles).to(tl.int64)
    i_h = i_head % h
    i_stream = i_head // h // windows
    o_set = i_head // H * (places - 1)
    o_place = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    b_key, b_value, m_place = load_places(
        p_keys + i_stream * stride_keys + i_h * E,
        p_values + i_stream * stride_values + i_h * E,
        p_gates + o_set,
        p_indices + o_set,
        p_null_key + i_h * E,
        p_null_value + i_h * E,
        o_place,
        places,
        m,
        h * E,
        E,
        BE,
        GATE_KEYS,
    )
    b_dkey = tl.zeros([BK, BE], tl.float32)
    b_dvalue = tl.zeros([BK, BE], tl.float32)
    for i_q in range(0, n, BQ):
        o_q = i_q + tl.arange(0, BQ)
        m_q = o_q < n
        b_q = load_tile(p_q + i_head * n * E, o_q, n, E, E, BE)  # [BQ, BE]
        b_dout = load_tile(p_dout + i_head * n * E, o_q, n, E, E, BE)
        b_sum = tl.load(p_sums + i_head * n + o_q, mask=m_q, other=0.0)
        b_delta = tl.load(p_deltas + i_head * n + o_q, mask=m_q, other=0.0)
        b_s = tl.dot(b_key, tl.trans(b_q), input_precision=PRECISION) * scale  # [BK, BQ]
        b_p = tl.where(m_place[:, None] & m_q[None, :], tl.exp2(b_s - b_sum[None, :]), 0.0)
        b_dvalue += tl.dot(b_p.to(b_dout.dtype), b_dout, input_precision=PRECISION)
        b_dp = tl.dot(b_value, tl.trans(b_dout), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dkey += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    o_e = tl.arange(0, BE)
    o_to = (i_head * places + o_place)[:, None] * E + o_e[None, :]
    m_to = (o_place < places)[:, None] & (o_e < E)[None, :]
    tl.store(p_dlaid_keys + o_to, (b_dkey * factor).to(p_dlaid_keys.dtype.element_ty), mask=m_to)
    tl.store(p_dlaid_values + o_to, b_dvalue.to(p_dlaid_values.dtype.element_ty), mask=m_to)


def constants(n: int, heads: int, e: int, dtype: torch.dtype, gate_keys: bool) -> dict[str, object]:
    """What the kernels are compiled for."""
    # Three products of TensorFloat32 leave few registers.
    wide = dtype == torch.float32
    width = max(16, triton.next_power_of_2(e))
    return {
        "H": heads,
        "E": e,
        "BE": width,
        "BQ": max(16, min(MOST_QUERIES // (2 if wide else 1), triton.next_power_of_2(n))),
        "BK": PLACES if not wide else PLACES // 2 if width <= 64 else PLACES // 4,
        "GATE_KEYS": gate_keys,
        "PRECISION": "tf32x3" if wide else "ieee",
        "num_warps": 4 if not wide else 2 if width <= 64 else 8,
        "num_stages": 1,
    }


def forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor]:
    """The output [b c, h, n, e] for what is not empty, and log2 of the sums, float32 [b c, h, n]."""
    groups, h, n, e = q.shape
    q, rows, sizes = _prepare(q, keys, values, gates, indices, null_key, null_value)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = torch.empty((groups, h, n), dtype=torch.float32, device=q.device)
    options = constants(n, keys.shape[3], e, q.dtype, gate_keys)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        tiles = triton.cdiv(n, options["BQ"])
        gathered_attention_fwd_kernel[(groups * h * tiles,)](
            q, *rows, out, sums, tiles, *sizes, logit_scale(e), **options
        )
    return out, sums


def backward(
    grad: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    indices: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    out: Tensor,
    sums: Tensor,
    gate_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, keys, values, gates, null_key and null_value."""
    groups, h, n, e = q.shape
    q, rows, sizes = _prepare(q, keys, values, gates, indices, null_key, null_value)
    grad = grad.contiguous()
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    deltas = torch.empty_like(sums)
    places = 1 + indices.shape[-1]
    d_laid_keys, d_laid_values = (
        torch.empty((groups, h, places, e), dtype=q.dtype, device=q.device) for _ in range(2)
    )
    options = constants(n, keys.shape[3], e, q.dtype, gate_keys)
    factors = (logit_scale(e), e**-0.5)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        tiles = triton.cdiv(n, options["BQ"])
        gathered_attention_bwd_queries_kernel[(groups * h * tiles,)](
            q, *rows, out, sums, grad, d_q, deltas, tiles, *sizes, *factors, **options
        )
        tiles = triton.cdiv(places, options["BK"])
        gathered_attention_bwd_places_kernel[(groups * h * tiles,)](
            q, *rows, sums, grad, deltas, d_laid_keys, d_laid_values, tiles, *sizes, *factors, **options
        )
    d_rows = gathered_backward(d_laid_keys, d_laid_values, keys, values, gates, indices, gate_keys)
    d_null_key, d_null_value = (
        laid[:, :, :1].sum(0, dtype=torch.float32).to(null.dtype)
        for laid, null in ((d_laid_keys, null_key), (d_laid_values, null_value))
    )
    return d_q, *d_rows, d_null_key, d_null_value


def _prepare(
    q: Tensor, keys: Tensor, values: Tensor, *others: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], tuple[int, ...]]:
    """Queries, what the kernels read besides them, each in one piece, and the sizes."""
    groups, h, n, _ = q.shape
    if not (keys[0].is_contiguous() and values[0].is_contiguous()):
        keys, values = keys.contiguous(), values.contiguous()
    gates, indices, *nulls = (t.contiguous() for t in others)
    windows, places = groups // keys.shape[0], 1 + indices.shape[-1]
    sizes = (n, h, windows, places, keys.shape[1], keys.stride(0), values.stride(0))
    return q.contiguous(), (keys, values, gates, indices, *nulls), sizes
