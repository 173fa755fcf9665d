"""Local attention: each program reads the keys that its queries may see, and no others.

The softmax runs along with the keys (Dao et al., arXiv 2205.14135): neither logits nor windows of keys are
ever written. The backward has two launches, one over queries and one over keys, so that no sum depends on the
order in which programs run.
"""

# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # queries, and keys, that a program takes at once; half of them in float32

_SIZES = ("tiles", "n", "w", "h")  # not the strides: that they are multiples of 16 makes loads wide


@triton.jit  # type: ignore[untyped-decorator]
def keys_of(
    i_first: tl.tensor, n: tl.tensor, w: tl.tensor, BQ: tl.constexpr, CAUSAL: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first of the keys that BQ queries see, and one past the last."""
    if CAUSAL:
        low = tl.maximum((i_first // w - 1) * w, 0)
        high = tl.minimum(i_first + BQ, n)
    else:
        low = tl.maximum(i_first - w, 0)
        high = tl.minimum(i_first + BQ + w, n)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(
    p: tl.tensor, o_row: tl.tensor, n: tl.tensor, stride_n: tl.tensor, E: tl.constexpr, BE: tl.constexpr
) -> tl.tensor:
    """Rows of one head, zero beyond the last: [rows, BE]."""
    o_e = tl.arange(0, BE)
    return tl.load(
        p + o_row.to(tl.int64)[:, None] * stride_n + o_e[None, :],
        mask=(o_row < n)[:, None] & (o_e < E)[None, :],
        other=0.0,
    )


@triton.jit  # type: ignore[untyped-decorator]
def sees(
    o_q: tl.tensor,
    o_k: tl.tensor,
    p_mask: tl.tensor,
    n: tl.tensor,
    w: tl.tensor,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
) -> tl.tensor:
    """Which of the queries see which of the keys; one of the two is a row, and the other a column."""
    m = (o_k < n) & (o_q < n)
    if CAUSAL:  # noqa: SIM108
        m = m & (o_k <= o_q) & (o_k >= (o_q // w - 1) * w)
    else:
        m = m & (tl.abs(o_k - o_q) <= w)
    if HAS_MASK:
        m = m & ((tl.load(p_mask + o_k, mask=o_k < n, other=0) != 0) | (o_k == o_q))
    return m


@triton.jit  # type: ignore[untyped-decorator]
def fold(
    b_s: tl.tensor,
    b_v: tl.tensor,
    b_max: tl.tensor,
    b_sum: tl.tensor,
    b_out: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds keys to a softmax of base 2: their logits [BQ, BK], -inf for unseen ones, and values [BK, BE].

    ``b_max`` is the largest logit so far, and what is summed is relative to it.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_base = tl.where(b_new > float("-inf"), b_new, 0.0)  # queries that saw nothing yet
    b_p = tl.exp2(b_s - b_base[:, None])
    b_old = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_old + tl.sum(b_p, axis=1)
    b_out = b_out * b_old[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_new, b_sum, b_out


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def local_attention_fwd_kernel(
    p_qkv: tl.tensor,
    p_mask: tl.tensor,
    p_out: tl.tensor,
    p_sums: tl.tensor,
    tiles: tl.tensor,
    n: tl.tensor,
    w: tl.tensor,
    h: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    scale: tl.float32,
    E: tl.constexpr,
    BE: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BQ queries of one head: their output, and the binary logarithm of the sum of their exponentials."""
    i_b = (tl.program_id(0) // tiles // h).to(tl.int64)
    i_h = tl.program_id(0) // tiles % h
    i_first = tl.program_id(0) % tiles * BQ
    p_q = p_qkv + i_b * stride_b + i_h * E
    p_k = p_q + h * E
    p_v = p_k + h * E
    p_mask += i_b * n
    o_q = i_first + tl.arange(0, BQ)
    b_q = load_tile(p_q, o_q, n, stride_n, E, BE)  # [BQ, BE]
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_out = tl.zeros([BQ, BE], tl.float32)
    low, high = keys_of(i_first, n, w, BQ, CAUSAL)
    for i_k in range(low, high, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = load_tile(p_k, o_k, n, stride_n, E, BE)  # [BK, BE]
        b_v = load_tile(p_v, o_k, n, stride_n, E, BE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BQ, BK]
        m = sees(o_q[:, None], o_k[None, :], p_mask, n, w, CAUSAL, HAS_MASK)
        b_s = tl.where(m, b_s, float("-inf"))
        b_max, b_sum, b_out = fold(b_s, b_v, b_max, b_sum, b_out, PRECISION)
    m_q = o_q < n
    b_sum = tl.where(m_q, b_sum, 1.0)
    o_e = tl.arange(0, BE)
    o_out = ((i_b * n + o_q)[:, None] * h + i_h) * E + o_e[None, :]
    b_out = (b_out / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_out, b_out, mask=m_q[:, None] & (o_e < E)[None, :])
    tl.store(p_sums + (i_b * h + i_h) * n + o_q, b_max + tl.log2(b_sum), mask=m_q)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def local_attention_bwd_queries_kernel(
    p_qkv: tl.tensor,
    p_mask: tl.tensor,
    p_out: tl.tensor,
    p_sums: tl.tensor,
    p_dout: tl.tensor,
    p_dqkv: tl.tensor,
    p_deltas: tl.tensor,
    tiles: tl.tensor,
    n: tl.tensor,
    w: tl.tensor,
    h: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    scale: tl.float32,
    factor: tl.float32,
    E: tl.constexpr,
    BE: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradient of BQ queries of one head, and their <gradient of the output, output>."""
    i_b = (tl.program_id(0) // tiles // h).to(tl.int64)
    i_h = tl.program_id(0) // tiles % h
    i_first = tl.program_id(0) % tiles * BQ
    p_q = p_qkv + i_b * stride_b + i_h * E
    p_k = p_q + h * E
    p_v = p_k + h * E
    p_mask += i_b * n
    p_out += (i_b * n * h + i_h) * E
    p_dout += (i_b * n * h + i_h) * E
    p_dqkv += (i_b * n * 3 * h + i_h) * E
    o_q = i_first + tl.arange(0, BQ)
    m_q = o_q < n
    b_q = load_tile(p_q, o_q, n, stride_n, E, BE)  # [BQ, BE]
    b_dout = load_tile(p_dout, o_q, n, h * E, E, BE)
    b_out = load_tile(p_out, o_q, n, h * E, E, BE)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), axis=1)
    o_row = (i_b * h + i_h) * n + o_q
    tl.store(p_deltas + o_row, b_delta, mask=m_q)
    b_sum = tl.load(p_sums + o_row, mask=m_q, other=0.0)
    b_dq = tl.zeros([BQ, BE], tl.float32)
    low, high = keys_of(i_first, n, w, BQ, CAUSAL)
    for i_k in range(low, high, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = load_tile(p_k, o_k, n, stride_n, E, BE)  # [BK, BE]
        b_v = load_tile(p_v, o_k, n, stride_n, E, BE)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BQ, BK]
        m = sees(o_q[:, None], o_k[None, :], p_mask, n, w, CAUSAL, HAS_MASK)
        b_p = tl.where(m, tl.exp2(b_s - b_sum[:, None]), 0.0)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    o_e = tl.arange(0, BE)
    o_to = o_q.to(tl.int64)[:, None] * (3 * h * E) + o_e[None, :]
    b_dq = (b_dq * factor).to(p_dqkv.dtype.element_ty)
    tl.store(p_dqkv + o_to, b_dq, mask=m_q[:, None] & (o_e < E)[None, :])


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def local_attention_bwd_keys_kernel(
    p_qkv: tl.tensor,
    p_mask: tl.tensor,
    p_sums: tl.tensor,
    p_dout: tl.tensor,
    p_dqkv: tl.tensor,
    p_deltas: tl.tensor,
    tiles: tl.tensor,
    n: tl.tensor,
    w: tl.tensor,
    h: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    scale: tl.float32,
    factor: tl.float32,
    E: tl.constexpr,
    BE: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradients of BK keys and values of one head."""
    i_b = (tl.program_id(0) // tiles // h).to(tl.int64)
    i_h = tl.program_id(0) // tiles % h
    i_first = tl.program_id(0) % tiles * BK
    p_q = p_qkv + i_b * stride_b + i_h * E
    p_k = p_q + h * E
    p_v = p_k + h * E
    p_mask += i_b * n
    p_dout += (i_b * n * h + i_h) * E
    p_dqkv += (i_b * n * 3 * h + i_h) * E
    o_k = i_first + tl.arange(0, BK)
    b_k = load_tile(p_k, o_k, n, stride_n, E, BE)  # [BK, BE]
    b_v = load_tile(p_v, o_k, n, stride_n, E, BE)
    b_dk = tl.zeros([BK, BE], tl.float32)
    b_dv = tl.zeros([BK, BE], tl.float32)
    if CAUSAL:
        low = i_first
        high = tl.minimum(((i_first + BK - 1) // w + 2) * w, n)
    else:
        low = tl.maximum(i_first - w, 0)
        high = tl.minimum(i_first + BK + w, n)
    for i_q in range(low, high, BQ):
        o_q = i_q + tl.arange(0, BQ)
        b_q = load_tile(p_q, o_q, n, stride_n, E, BE)  # [BQ, BE]
        b_dout = load_tile(p_dout, o_q, n, h * E, E, BE)
        o_row = (i_b * h + i_h) * n + o_q
        b_sum = tl.load(p_sums + o_row, mask=o_q < n, other=0.0)
        b_delta = tl.load(p_deltas + o_row, mask=o_q < n, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale  # [BK, BQ]
        m = sees(o_q[None, :], o_k[:, None], p_mask, n, w, CAUSAL, HAS_MASK)
        b_p = tl.where(m, tl.exp2(b_s - b_sum[None, :]), 0.0)
        b_dv += tl.dot(b_p.to(b_dout.dtype), b_dout, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    o_e = tl.arange(0, BE)
    o_to = o_k.to(tl.int64)[:, None] * (3 * h * E) + o_e[None, :]
    m_to = (o_k < n)[:, None] & (o_e < E)[None, :]
    b_dk = (b_dk * factor).to(p_dqkv.dtype.element_ty)
    tl.store(p_dqkv + h * E + o_to, b_dk, mask=m_to)
    tl.store(p_dqkv + 2 * h * E + o_to, b_dv.to(p_dqkv.dtype.element_ty), mask=m_to)


def constants(
    e: int, dtype: torch.dtype, causal: bool, has_mask: bool, *, backward: bool = False
) -> dict[str, object]:
    """What the kernels are compiled for."""
    width = max(16, triton.next_power_of_2(e))
    # Three products of TensorFloat32 leave few registers.
    wide = dtype == torch.float32
    small = wide and (backward or width > 64)
    return {
        "E": e,
        "BE": width,
        "BQ": BLOCK // 2 if small else BLOCK,
        "BK": BLOCK // 2 if wide else BLOCK,
        "CAUSAL": causal,
        "HAS_MASK": has_mask,
        "PRECISION": "tf32x3" if wide else "ieee",
        "num_warps": 8 if wide and width > 64 else 2 if small else 4,
        "num_stages": 1 if wide else 2,
    }


def forward(qkv: Tensor, mask: Tensor | None, window_size: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The output [b, n, h, e] for qkv [b, n, 3, h, e], not empty, and log2 of the sums, float32 [b, h, n]."""
    b, n, _, h, e = qkv.shape
    qkv, masks = _prepare(qkv, mask)
    out = torch.empty((b, n, h, e), dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty((b, h, n), dtype=torch.float32, device=qkv.device)
    options = constants(e, qkv.dtype, causal, mask is not None)
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        tiles = triton.cdiv(n, options["BQ"])
        local_attention_fwd_kernel[(b * h * tiles,)](
            qkv, masks, out, sums, tiles, n, window_size, h, *qkv.stride()[:2], logit_scale(e), **options
        )
    return out, sums


def backward(
    grad: Tensor, qkv: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, window_size: int, causal: bool
) -> Tensor:
    """The gradient of qkv [b, n, 3, h, e], from that of the output."""
    b, n, _, h, e = qkv.shape
    qkv, masks = _prepare(qkv, mask)
    d_qkv = torch.empty((b, n, 3, h, e), dtype=qkv.dtype, device=qkv.device)
    deltas = torch.empty_like(sums)
    grad = grad.contiguous()
    options = constants(e, qkv.dtype, causal, mask is not None, backward=True)
    sizes = (n, window_size, h, *qkv.stride()[:2], logit_scale(e), e**-0.5)
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        tiles = triton.cdiv(n, options["BQ"])
        local_attention_bwd_queries_kernel[(b * h * tiles,)](
            qkv, masks, out, sums, grad, d_qkv, deltas, tiles, *sizes, **options
        )
        tiles = triton.cdiv(n, options["BK"])
        local_attention_bwd_keys_kernel[(b * h * tiles,)](
            qkv, masks, sums, grad, d_qkv, deltas, tiles, *sizes, **options
        )
    return d_qkv


def _prepare(qkv: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows of each token in one piece; the mask, or something in its place."""
    if not qkv[0, 0].is_contiguous():
        qkv = qkv.contiguous()
    return qkv, qkv if mask is None else mask.contiguous()


def logit_scale(e: int) -> float:
    """The factor of the logits, whose exponentials are powers of two."""
    return math.log2(math.e) / math.sqrt(e)
