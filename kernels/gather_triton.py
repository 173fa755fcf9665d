"""Gather of rows and their gates, its gradient, and scatter, in one launch each.

The gradient of a gather adds up the gradients of a row that was gathered several times. The program of the
first place that names the row looks for the others, in order, and sums. So nothing is sorted, and no sum
depends on the order in which programs run. A scatter asks for each row of the result which of the places
names it. Both compare all pairs: at the few thousand indices of a routed layer, that is far less work than
reading the rows.
"""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.gather import VECTOR

WIDEST = 1024  # columns that a program moves at once
ELEMENTS = 4096  # of the result that a program of a gather writes
INDICES = 1024  # that are compared at once
SCATTER_ROWS = 8  # rows of the result of a scatter that one program writes

_SIZES = ("total", "k", "per_set", "m", "n", "tiles", "other_from")
_TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def gather_block(d: int) -> tuple[int, int]:
    """Rows and columns of a block of a gather."""
    width = min(triton.next_power_of_2(d), WIDEST)
    return min(ELEMENTS // width, 64), width


def scatter_width(d: int) -> int:
    """Columns that a program of a scatter moves at once."""
    return int(min(triton.next_power_of_2(d), WIDEST // 4))


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gather_rows_fwd_kernel(
    p_x: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_rows: tl.tensor,
    p_chosen: tl.tensor,
    total: tl.tensor,
    k: tl.tensor,
    per_set: tl.tensor,
    m: tl.tensor,
    stride_b: tl.tensor,
    stride_m: tl.tensor,
    stride_d: tl.tensor,
    D: tl.constexpr,
    GATED: tl.constexpr,
    STRAIGHT: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Rows [total, D] at the indices [total], k of which belong to a stream and per_set to a row of gates."""
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    o_k = (tl.program_id(0) // CHUNKS).to(tl.int64) * BK + tl.arange(0, BK)
    o_d = tl.program_id(0) % CHUNKS * BD + tl.arange(0, BD)
    b_index = tl.load(p_indices + o_k, mask=o_k < total, other=-1)  # [BK]
    m_k = (b_index >= 0) & (b_index < m)
    m_d = (o_d < D)[None, :]
    p_from = p_x + ((o_k // k) * stride_b + b_index * stride_m)[:, None]
    p_from += (o_d.to(tl.int64) * stride_d)[None, :]
    b_x = tl.load(p_from, mask=m_k[:, None] & m_d, other=0.0).to(ACC)  # [BK, BD]
    # An index out of range must not be read, and not be taken for -1.
    b_x = tl.where((m_k | (b_index == -1))[:, None], b_x, float("nan"))
    p_to = p_rows + (o_k * D)[:, None] + o_d[None, :]
    tl.store(p_to, b_x.to(p_rows.dtype.element_ty), mask=(o_k < total)[:, None] & m_d)
    if GATED and tl.program_id(0) % CHUNKS == 0:
        b_gate = tl.load(p_gates + (o_k // per_set) * m + b_index, mask=m_k, other=0.0).to(ACC)
        if STRAIGHT:
            b_gate = tl.where(m_k & (b_gate == b_gate), 1.0, b_gate)
        b_gate = tl.where(m_k | (b_index == -1), b_gate, float("nan"))
        tl.store(p_chosen + o_k, b_gate.to(p_chosen.dtype.element_ty), mask=o_k < total)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gather_rows_apart_kernel(
    p_x: tl.tensor,
    p_places: tl.tensor,
    p_counts: tl.tensor,
    p_indices: tl.tensor,
    p_rows: tl.tensor,
    total: tl.tensor,
    k: tl.tensor,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Rows [total, D] at the indices [total], k of a stream, whose rows begin at p_x + VEC * its place."""
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    o_k = (tl.program_id(0) // CHUNKS).to(tl.int64) * BK + tl.arange(0, BK)
    o_d = tl.program_id(0) % CHUNKS * BD + tl.arange(0, BD)
    b_index = tl.load(p_indices + o_k, mask=o_k < total, other=-1)  # [BK]
    b_place = tl.load(p_places + o_k // k, mask=o_k < total, other=0)
    m_k = (b_index >= 0) & (b_index < tl.load(p_counts + o_k // k, mask=o_k < total, other=0))
    m_d = (o_d < D)[None, :]
    p_from = p_x + (b_place * VEC + b_index * D)[:, None] + o_d[None, :]
    b_x = tl.load(p_from, mask=m_k[:, None] & m_d, other=0.0).to(ACC)  # [BK, BD]
    # As in a gather of streams that lie together.
    b_x = tl.where((m_k | (b_index == -1))[:, None], b_x, float("nan"))
    p_to = p_rows + (o_k * D)[:, None] + o_d[None, :]
    tl.store(p_to, b_x.to(p_rows.dtype.element_ty), mask=(o_k < total)[:, None] & m_d)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def gather_rows_bwd_kernel(
    p_grad: tl.tensor,
    p_indices: tl.tensor,
    p_result: tl.tensor,
    k: tl.tensor,
    m: tl.tensor,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Adds the gradients [b, k, D] of the row that one place names to the result [b, m, D], which is zero."""
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    i_place = (tl.program_id(0) // CHUNKS).to(tl.int64)
    i_b = i_place // k
    o_d = tl.program_id(0) % CHUNKS * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_k = tl.arange(0, BK)
    first = i_b * k
    last = first + k
    index = tl.load(p_indices + i_place)
    if (index >= 0) & (index < m):
        before = 0
        for i_k in tl.range(first, i_place, BK):
            b_index = tl.load(p_indices + i_k + o_k, mask=i_k + o_k < i_place, other=-1)
            before += tl.sum((b_index == index).to(tl.int32), axis=0)
        if before == 0:
            b_sum = tl.load(p_grad + i_place * D + o_d, mask=m_d, other=0.0).to(ACC)
            for i_k in tl.range(i_place + 1, last, BK):
                b_index = tl.load(p_indices + i_k + o_k, mask=i_k + o_k < last, other=-1)
                b_same = (b_index == index).to(tl.int32)
                for _ in tl.range(0, tl.sum(b_same, axis=0)):
                    i_next = tl.min(tl.where(b_same != 0, o_k, BK), axis=0)
                    b_sum += tl.load(p_grad + (i_k + i_next) * D + o_d, mask=m_d, other=0.0).to(ACC)
                    b_same = tl.where(o_k > i_next, b_same, 0)
            p_to = p_result + (i_b * m + index) * D + o_d
            tl.store(p_to, b_sum.to(p_result.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def scatter_rows_kernel(
    p_base: tl.tensor,
    p_rows: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_other: tl.tensor,
    p_residual: tl.tensor,
    p_result: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    tiles: tl.tensor,
    other_from: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """BN rows of the result [b, n, D]: the rows [b, k, D] whose index names them, else those of the base.

    The rows are multiplied by their gates [b, k], and with ADD put on top of those of the base. The other [D]
    is added to rows of the base that none names, from ``other_from`` on; the residual [b, n, D] to all.
    """
    i_b = tl.program_id(0).to(tl.int64) // tiles
    o_n = (tl.program_id(0).to(tl.int64) % tiles) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    b_from = tl.full([BN], -1, tl.int32)
    for i_k in tl.range(0, k, BK):
        b_index = tl.load(p_indices + i_b * k + i_k + o_k, mask=i_k + o_k < k, other=-1)
        b_here = tl.where(b_index[None, :] == o_n[:, None], (i_k + o_k)[None, :], -1)  # [BN, BK]
        b_from = tl.maximum(b_from, tl.max(b_here, axis=1))
    m_n = o_n < n
    m_rows = m_n & (b_from >= 0)
    m_base = m_n if ADD else m_n & (b_from < 0)
    if GATED:
        b_gate = tl.load(p_gates + i_b * k + b_from, mask=m_rows, other=0.0).to(ACC)  # [BN]
    for i_d in tl.range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = (o_d < D)[None, :]
        p_b = p_base + i_b * stride_b + (o_n * stride_n)[:, None] + (o_d.to(tl.int64) * stride_d)[None, :]
        b_base = tl.load(p_b, mask=m_base[:, None] & m_d, other=0.0).to(ACC)  # [BN, BD]
        b_out = b_base
        o_to = (i_b * n + o_n)[:, None] * D + o_d[None, :]
        if HAS_OTHER:
            b_other = tl.load(p_other + o_d, mask=o_d < D, other=0.0).to(ACC)[None, :]
            b_out = b_base + tl.where((o_n >= other_from)[:, None], b_other, 0.0)
        if HAS_ROWS:
            p_r = p_rows + ((i_b * k + b_from) * D)[:, None] + o_d[None, :]
            b_rows = tl.load(p_r, mask=m_rows[:, None] & m_d, other=0.0).to(ACC)
            if GATED:
                b_rows = b_rows * b_gate[:, None]
            if ADD:
                b_rows += b_base
            b_out = tl.where(m_rows[:, None], b_rows, b_out)
        if HAS_RESIDUAL:
            b_out += tl.load(p_residual + o_to, mask=m_n[:, None] & m_d, other=0.0).to(ACC)
        tl.store(p_result + o_to, b_out.to(p_result.dtype.element_ty), mask=m_n[:, None] & m_d)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def scatter_rows_bwd_kernel(
    p_grad: tl.tensor,
    p_rows: tl.tensor,
    p_gates: tl.tensor,
    p_indices: tl.tensor,
    p_drows: tl.tensor,
    p_dgates: tl.tensor,
    total: tl.tensor,
    k: tl.tensor,
    n: tl.tensor,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Gradients of BK rows [total, D] and their gates [total], from the rows [b, n, D] that they went to."""
    o_k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    m_k = o_k < total
    b_index = tl.load(p_indices + o_k, mask=m_k, other=-1)  # [BK]
    m_there = (b_index >= 0) & (b_index < n)
    b_gate = tl.load(p_gates + o_k, mask=m_k, other=0.0).to(ACC)
    b_dgate = tl.zeros([BK], ACC)
    for i_d in tl.range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = (o_d < D)[None, :]
        p_from = p_grad + ((o_k // k) * n + b_index)[:, None] * D + o_d[None, :]
        b_grad = tl.load(p_from, mask=m_there[:, None] & m_d, other=0.0).to(ACC)  # [BK, BD]
        o_rows = (o_k * D)[:, None] + o_d[None, :]
        b_rows = tl.load(p_rows + o_rows, mask=m_there[:, None] & m_d, other=0.0).to(ACC)
        b_dgate += tl.sum(b_grad * b_rows, axis=1)
        b_drows = (b_grad * b_gate[:, None]).to(p_drows.dtype.element_ty)
        tl.store(p_drows + o_rows, b_drows, mask=m_k[:, None] & m_d)
    tl.store(p_dgates + o_k, b_dgate.to(p_dgates.dtype.element_ty), mask=m_k)


def gather(
    x: Tensor, gates: Tensor | None, indices: Tensor, straight_through: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of x [b, m, d] at indices [b, ...], and their gates [b, ..., m], without gates [0]; b, d > 0.

    x may be in pinned memory of the host; the others are on the GPU.
    """
    b, m, d = x.shape
    indices = indices.contiguous()
    rows = torch.empty((*indices.shape, d), dtype=x.dtype, device=indices.device)
    if gates is None:
        chosen = torch.empty(0, dtype=x.dtype, device=indices.device)
    else:
        gates = gates.contiguous()
        chosen = torch.empty(indices.shape, dtype=gates.dtype, device=indices.device)
    total = indices.numel()
    bk, bd = gather_block(d)
    wide = torch.float64 in (x.dtype, chosen.dtype)
    with torch.cuda.device_of(indices):  # type: ignore[no-untyped-call]
        gather_rows_fwd_kernel[(triton.cdiv(total, bk) * triton.cdiv(d, bd),)](
            x,
            gates,
            indices,
            rows,
            chosen,
            total,
            total // b,
            indices.shape[-1],
            m,
            *x.stride(),
            D=d,
            GATED=gates is not None,
            STRAIGHT=straight_through,
            BK=bk,
            BD=bd,
            ACC=tl.float64 if wide else tl.float32,
            num_warps=4,
        )
    return rows, chosen


def gather_apart(streams: list[Tensor], indices: Tensor, rows: Tensor) -> None:
    """Writes rows [b, k, d] of streams [m_i, d] at indices [b, k]; nothing of it is empty but streams."""
    addresses = [x.data_ptr() if len(x) else rows.data_ptr() for x in streams]
    together = all((each - addresses[0]) % VECTOR == 0 for each in addresses)
    if not together or (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
        for x, index, out in zip(streams, indices, rows, strict=True):
            out.copy_(gather(x[None], None, index[None])[0][0])
        return
    places = [(each - addresses[0]) // VECTOR for each in addresses], [len(x) for x in streams]
    # The host does not wait for the GPU to have it.
    on_device = torch.tensor(places).to(rows.device, non_blocking=True)
    gather_at(streams[0] if len(streams[0]) else rows, on_device[0], on_device[1], indices, rows)


def gather_at(origin: Tensor, places: Tensor, counts: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Writes rows [b, ..., d] at indices [b, k], of streams whose places [b] count from the origin."""
    total, d = indices.numel(), rows.shape[-1]
    bk, bd = gather_block(d)
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        gather_rows_apart_kernel[(triton.cdiv(total, bk) * triton.cdiv(d, bd),)](
            origin.view(rows.dtype),
            places,
            counts,
            indices.contiguous(),
            rows,
            total,
            indices.shape[1],
            D=d,
            BK=bk,
            BD=bd,
            VEC=VECTOR // rows.itemsize,
            ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            num_warps=4,
        )


def gather_backward(grad: Tensor, indices: Tensor, m: int) -> Tensor:
    """Sums [b, m, d] of gradients [b, k, d] by the indices [b, k]; nothing is empty."""
    b, k, d = grad.shape
    result = torch.zeros((b, m, d), dtype=grad.dtype, device=grad.device)
    bd = min(triton.next_power_of_2(d), WIDEST)
    with torch.cuda.device_of(grad):  # type: ignore[no-untyped-call]
        gather_rows_bwd_kernel[(b * k * triton.cdiv(d, bd),)](
            grad.contiguous(),
            indices.contiguous(),
            result,
            k,
            m,
            D=d,
            BK=min(triton.next_power_of_2(k), INDICES),
            BD=bd,
            ACC=_TL_DTYPE[compute_dtype(grad.dtype)],
            num_warps=4,
        )
    return result


def scatter(
    base: Tensor,
    rows: Tensor | None,
    gates: Tensor | None,
    indices: Tensor,
    other: Tensor | None = None,
    residual: Tensor | None = None,
    add: bool = False,
    other_from: int = 0,
) -> Tensor:
    """Base [b, n, d] with rows [b, k, d] times gates [b, k], or zeros, at the indices [b, k], or added there.

    Elsewhere the other [d] is added, from the place ``other_from`` on, and the residual [b, n, d] everywhere.
    The base is not empty.
    """
    b, n, d = base.shape
    k = indices.shape[1]
    result = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    tiles = triton.cdiv(n, SCATTER_ROWS)
    wide = any(t is not None and t.dtype == torch.float64 for t in (base, gates, other))
    with torch.cuda.device_of(base):  # type: ignore[no-untyped-call]
        scatter_rows_kernel[(b * tiles,)](
            base,
            None if rows is None else rows.contiguous(),
            None if gates is None else gates.contiguous(),
            indices.contiguous(),
            None if other is None else other.contiguous(),
            None if residual is None else residual.contiguous(),
            result,
            n,
            k,
            tiles,
            other_from,
            *base.stride(),
            D=d,
            HAS_ROWS=rows is not None,
            GATED=gates is not None,
            ADD=add,
            HAS_OTHER=other is not None,
            HAS_RESIDUAL=residual is not None,
            BN=SCATTER_ROWS,
            BK=INDICES // 2,
            BD=scatter_width(d),
            ACC=tl.float64 if wide else tl.float32,
            num_warps=4,
        )
    return result


def scatter_backward(grad: Tensor, rows: Tensor, gates: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [b, k, d] and gates [b, k] from that of the result [b, n, d]; nothing is empty."""
    _, n, d = grad.shape
    total = indices.numel()
    d_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    d_gates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    bk, bd = gather_block(d)
    wide = torch.float64 in (rows.dtype, gates.dtype)
    with torch.cuda.device_of(grad):  # type: ignore[no-untyped-call]
        scatter_rows_bwd_kernel[(triton.cdiv(total, bk),)](
            grad.contiguous(),
            rows.contiguous(),
            gates.contiguous(),
            indices.contiguous(),
            d_rows,
            d_gates,
            total,
            indices.shape[1],
            n,
            D=d,
            BK=bk,
            BD=bd,
            ACC=tl.float64 if wide else tl.float32,
            num_warps=4,
        )
    return d_rows, d_gates
