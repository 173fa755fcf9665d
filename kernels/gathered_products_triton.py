"""Products with gathered rows, weighted sums of them, and sums by row, in one launch each.

A program has one place, whose few vectors it multiplies with the rows that the place gathers as one small
matrix product. For sums by row, the places are sorted by the row that they name, and a program adds up those
of one row, in their order: so no sum depends on the order in which programs run.
"""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # that a program reads at once; half of them in float32
COLUMNS = 256  # of those; half of them in float32
WIDEST = 512  # columns that a program of sums by row adds up

_SIZES = ("n", "k", "m", "places")


@triton.jit  # type: ignore[untyped-decorator]
def load_gathered(
    p_rows: tl.tensor,
    p_indices: tl.tensor,
    o_k: tl.tensor,
    o_d: tl.tensor,
    k: tl.tensor,
    m: tl.tensor,
    stride_m: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """The rows [o_k, o_d] that a place gathers, 0 for none."""
    b_index = tl.load(p_indices + o_k, mask=o_k < k, other=-1)
    m_k = (b_index >= 0) & (b_index < m)
    p_from = p_rows + (b_index * stride_m)[:, None] + o_d[None, :]
    return tl.load(p_from, mask=m_k[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gathered_products_kernel(
    p_vectors: tl.tensor,
    p_rows: tl.tensor,
    p_indices: tl.tensor,
    p_products: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    m: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Products [H, k] of the vectors [H, D] of one place with the rows that it gathers."""
    i_place = tl.program_id(0).to(tl.int64)
    p_stream = p_rows + i_place // n * stride_b
    o_h = tl.arange(0, BH)
    for i_k in range(0, k, BK):
        o_k = i_k + tl.arange(0, BK)
        b_sum = tl.zeros([BH, BK], tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            p_v = p_vectors + ((i_place * H + o_h) * D)[:, None] + o_d[None, :]
            b_vector = tl.load(p_v, mask=(o_h < H)[:, None] & (o_d < D)[None, :], other=0.0)  # [BH, BD]
            b_row = load_gathered(p_stream, p_indices + i_place * k, o_k, o_d, k, m, stride_m, D)  # [BK, BD]
            b_sum += tl.dot(b_vector, tl.trans(b_row), input_precision=PRECISION)
        p_to = p_products + ((i_place * H + o_h) * k)[:, None] + o_k[None, :]
        tl.store(p_to, b_sum, mask=(o_h < H)[:, None] & (o_k < k)[None, :])


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gathered_sums_kernel(
    p_weights: tl.tensor,
    p_rows: tl.tensor,
    p_indices: tl.tensor,
    p_sums: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    m: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BD columns of the sums [H, D] of the rows that one place gathers, weighted [H, k]."""
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    i_place = (tl.program_id(0) // CHUNKS).to(tl.int64)
    p_stream = p_rows + i_place // n * stride_b
    o_d = tl.program_id(0) % CHUNKS * BD + tl.arange(0, BD)
    o_h = tl.arange(0, BH)
    b_sum = tl.zeros([BH, BD], tl.float32)
    for i_k in range(0, k, BK):
        o_k = i_k + tl.arange(0, BK)
        p_w = p_weights + ((i_place * H + o_h) * k)[:, None] + o_k[None, :]
        b_weight = tl.load(p_w, mask=(o_h < H)[:, None] & (o_k < k)[None, :], other=0.0)  # [BH, BK]
        b_row = load_gathered(p_stream, p_indices + i_place * k, o_k, o_d, k, m, stride_m, D)  # [BK, BD]
        b_sum += tl.dot(b_weight.to(tl.float32).to(b_row.dtype), b_row, input_precision=PRECISION)
    p_to = p_sums + ((i_place * H + o_h) * D)[:, None] + o_d[None, :]
    tl.store(p_to, b_sum.to(p_sums.dtype.element_ty), mask=(o_h < H)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gathered_row_sums_kernel(
    p_weights: tl.tensor,
    p_vectors: tl.tensor,
    p_named: tl.tensor,
    p_order: tl.tensor,
    p_ends: tl.tensor,
    p_result: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    m: tl.tensor,
    places: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """BD columns of weight x vector, added up over the places that name one row, into the result [b, m, D].

    ``p_named`` has the rows [b, places] that are named, sorted, ``p_order`` the places that name them and
    ``p_ends`` where the places of the same row end. The program of the first of those does the work.
    """
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    i_sorted = (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b, i_first = i_sorted // places, i_sorted % places
    o_d = tl.program_id(0) % CHUNKS * BD + tl.arange(0, BD)
    o_h = tl.arange(0, BH)
    m_h, m_d = o_h < H, o_d < D
    index = tl.load(p_named + i_sorted)
    before = tl.load(p_named + i_sorted - 1, mask=i_first > 0, other=-1)
    if (index >= 0) & (index < m) & (index != before):
        b_sum = tl.zeros([BD], tl.float32)
        for i in tl.range(i_first, tl.load(p_ends + i_sorted)):
            i_place = tl.load(p_order + i_b * places + i)
            i_n, i_k = i_b * n + i_place // k, i_place % k
            b_weight = tl.load(p_weights + (i_n * H + o_h) * k + i_k, mask=m_h, other=0.0).to(tl.float32)
            p_v = p_vectors + ((i_n * H + o_h) * D)[:, None] + o_d[None, :]
            b_vector = tl.load(p_v, mask=m_h[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BH, BD]
            b_sum += tl.sum(b_weight[:, None] * b_vector, axis=0)
        tl.store(p_result + (i_b * m + index) * D + o_d, b_sum.to(p_result.dtype.element_ty), mask=m_d)


def constants(h: int, d: int, dtype: torch.dtype) -> dict[str, object]:
    """What the first two kernels are compiled for."""
    wide = dtype == torch.float32
    return {
        "H": h,
        "D": d,
        "BH": max(16, triton.next_power_of_2(h)),
        "BK": ROWS // 2 if wide else ROWS,
        "BD": max(16, min(COLUMNS // 2 if wide else COLUMNS, triton.next_power_of_2(d))),
        "PRECISION": "tf32x3" if wide else "ieee",
        "num_warps": 4,
    }


def products(vectors: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """[b, n, h, k], float32, of vectors [b, n, h, d] and rows [b, m, d]; nothing is empty."""
    b, n, h, d = vectors.shape
    k = indices.shape[-1]
    rows = _with_whole_rows(rows)
    result = torch.empty((b, n, h, k), dtype=torch.float32, device=rows.device)
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        gathered_products_kernel[(b * n,)](
            vectors.contiguous(),
            rows,
            indices.contiguous(),
            result,
            n,
            k,
            rows.shape[1],
            rows.stride(0),
            rows.stride(1),
            **constants(h, d, rows.dtype),
        )
    return result


def sums(weights: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """[b, n, h, d], as the rows [b, m, d], of weights [b, n, h, k]; nothing is empty."""
    b, n, h, k = weights.shape
    d = rows.shape[-1]
    rows = _with_whole_rows(rows)
    result = torch.empty((b, n, h, d), dtype=rows.dtype, device=rows.device)
    options = constants(h, d, rows.dtype)
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        gathered_sums_kernel[(b * n * triton.cdiv(d, options["BD"]),)](
            weights.contiguous(),
            rows,
            indices.contiguous(),
            result,
            n,
            k,
            rows.shape[1],
            rows.stride(0),
            rows.stride(1),
            **options,
        )
    return result


def row_sums(weights: Tensor, vectors: Tensor, indices: Tensor, m: int) -> Tensor:
    """[b, m, d], as the vectors [b, n, h, d], of weights [b, n, h, k] at indices [b, n, k]; none is empty."""
    b, n, h, d = vectors.shape
    k = indices.shape[-1]
    result = torch.zeros((b, m, d), dtype=vectors.dtype, device=vectors.device)
    # What is sorted keeps its strides.
    named, order = indices.flatten(1).contiguous().sort(dim=1, stable=True)
    ends = torch.searchsorted(named, named, right=True)
    bd = min(triton.next_power_of_2(d), WIDEST)
    with torch.cuda.device_of(vectors):  # type: ignore[no-untyped-call]
        gathered_row_sums_kernel[(b * n * k * triton.cdiv(d, bd),)](
            weights.contiguous(),
            vectors.contiguous(),
            named,
            order,
            ends,
            result,
            n,
            k,
            m,
            n * k,
            H=h,
            D=d,
            BH=triton.next_power_of_2(h),
            BD=bd,
            num_warps=4,
        )
    return result


def _with_whole_rows(rows: Tensor) -> Tensor:
    """Rows whose columns lie side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
