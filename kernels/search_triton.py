"""The k best keys of each query: block maxima on tensor cores, then the keys of the best blocks once more.

1. ``search_maxima_kernel`` multiplies queries with keys, and of each block of adjacent keys it writes nothing
   but the highest score.
2. ``search_blocks_kernel`` chooses blocks by their maxima: first among groups of them, as a group is as good
   as its best block, then among the blocks of those groups. Where a group is one block, `top_indices` does.
3. ``search_scores_kernel`` scores the keys of these blocks in float32.
4. `top_indices` chooses among them, and ``search_found_kernel`` looks up scores and indices of what it chose.

The k best blocks hold the k best keys, equal scores by the lower index: if a key lies in no chosen block,
each of k blocks has a maximum that is higher, or as high and of a block, so of a key, with a lower index. But
maxima are off by what tensor cores cut off of sums. So EXTRA blocks more are chosen: a key is missed only if
even more maxima lie that close to the k-th, and then one is found whose score does so too.

A score has the same bits in whatever batch or buffer its key lies: keys always come at multiples of 16 bytes,
with strides that are counted in 16 bytes, so one order of summation serves all of them.
"""

# ruff: noqa: N803

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from xlroute.kernels.scoring_triton import VECTOR
from xlroute.kernels.selection import top_indices
from xlroute.kernels.selection_triton import SHORT, to_key, top_block, top_of_row

EXTRA = 8  # blocks beyond k that are scored again
WIDEST = 1024  # bytes of a key
MOST_KEYS = 1 << 30  # of a stream: their indices are int32 on the way
MOST_QUERIES = 128  # that a program holds
STAGED = 1 << 16  # bytes of keys that a program has on their way
PROGRAMS = 1056  # of the first pass, about: each of them takes as many groups
FEWEST_GROUPS = 4  # for one program
NARROW = 32  # keys of a block, if not all of a group
SCORED = 128  # keys that the second pass multiplies at once
SCORED_WIDTH = 64  # elements of them
FOUND = 256  # keys that are looked up at once
SCRATCH = 48 << 20  # bytes of maxima, or of scores, and of what their selection takes; for one stream
MOST_SCRATCH = 4  # times that, for as many streams or more: the host launches less

DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SIZES = ("first", "n", "total", "m", "k", "tiles", "spans", "span", "groups", "blocks", "chosen", "parts")
_STRIDES = ("stride_kb", "stride_km", "stride_mb", "stride_mm")


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(
    p: tl.tensor,
    o_row: tl.tensor,
    stride: tl.tensor,
    I_E: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    VEC: tl.constexpr,
) -> tl.tensor:
    """BE columns of rows that exist, from I_E on, zero beyond E; the stride is counted in VEC elements."""
    o_e = I_E + tl.arange(0, BE)
    p_row = p + (o_row.to(tl.int64) * stride)[:, None] * VEC + o_e[None, :]
    if I_E + BE <= E:  # noqa: SIM108  (a constant)
        b_row = tl.load(p_row)
    else:
        b_row = tl.load(p_row, mask=(o_e < E)[None, :], other=0.0)
    return b_row


@triton.jit(do_not_specialize=(*_SIZES, *_STRIDES))  # type: ignore[untyped-decorator]
def search_maxima_kernel(
    p_queries: tl.tensor,
    p_keys: tl.tensor,
    p_mask: tl.tensor,
    p_maxima: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    tiles: tl.tensor,
    spans: tl.tensor,
    span: tl.tensor,
    groups: tl.tensor,
    stride_kb: tl.tensor,
    stride_km: tl.tensor,
    stride_mb: tl.tensor,
    stride_mm: tl.tensor,
    HAS_MASK: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BQ: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The highest score of each block in ``span`` groups for BQ queries: [b, n, groups * GROUP // BLOCK].

    Programs that read the same keys follow each other. In place of what lies beyond the last query or key
    they read that one once more, which changes no maximum but those of blocks without any key. Nor does NaN:
    the maximum passes over it.
    """
    BLOCKS: tl.constexpr = GROUP // BLOCK
    i_span = tl.program_id(0) // tiles % spans
    i_stream = (tl.program_id(0) // tiles // spans).to(tl.int64)
    o_q = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    o_last = tl.minimum(o_q, n - 1)
    p_queries += i_stream * n * E
    p_keys += i_stream * stride_kb * VEC
    p_mask += i_stream * stride_mb
    p_out = p_maxima + ((i_stream * n + o_q) * groups * BLOCKS)[:, None] + tl.arange(0, BLOCKS)[None, :]
    if BE >= E:
        b_q = load_rows(p_queries, o_last, E // VEC, 0, E, BE, VEC).to(DOT)  # [BQ, BE]
    for i_group in range(i_span * span, tl.minimum((i_span + 1) * span, groups)):
        o_key = tl.minimum(i_group * GROUP + tl.arange(0, GROUP), m - 1)
        if HAS_MASK:
            b_seen = tl.load(p_mask + o_key.to(tl.int64) * stride_mm)
        b_s = tl.zeros([BQ, GROUP], tl.float32)
        for i_e in tl.static_range(0, E, BE):
            if BE < E:
                b_q = load_rows(p_queries, o_last, E // VEC, i_e, E, BE, VEC).to(DOT)
            b_key = load_rows(p_keys, o_key, stride_km, i_e, E, BE, VEC).to(DOT)  # [GROUP, BE]
            b_s = tl.dot(b_q, tl.trans(b_key), b_s, input_precision=PRECISION)
        if HAS_MASK:
            b_s = tl.where((b_seen != 0)[None, :], b_s, float("-inf"))
        b_max = tl.max(tl.reshape(b_s, [BQ, BLOCKS, BLOCK]), axis=2)
        tl.store(p_out + i_group * BLOCKS, b_max, mask=(o_q < n)[:, None])


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def search_blocks_kernel(
    p_maxima: tl.tensor,
    p_chosen: tl.tensor,
    groups: tl.tensor,
    blocks: tl.tensor,
    chosen: tl.tensor,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOP: tl.constexpr,
) -> None:
    """The blocks with the highest maxima for a query, ascending, -1 in front for none: [rows, chosen].

    A group has BLOCKS blocks; those that follow the last block with keys in it are not chosen.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_maxima += i_row * groups * BLOCKS
    o_group = tl.arange(0, GROUPS)
    o_inner = tl.arange(0, BLOCKS)
    o_max = o_group[:, None] * BLOCKS + o_inner[None, :]
    b_max = tl.load(p_maxima + o_max, mask=(o_group < groups)[:, None], other=float("-inf"))
    b_key, b_group = top_of_row(to_key(tl.max(b_max, axis=1), tl.float32), o_group, TOP)
    o_block = b_group[:, None] * BLOCKS + o_inner[None, :]  # [TOP, BLOCKS]
    m_block = (b_key > -0x80000000)[:, None] & (o_block < blocks)
    b_max = tl.load(p_maxima + o_block, mask=m_block, other=float("-inf"))
    b_key = tl.reshape(to_key(b_max, tl.float32), [TOP * BLOCKS])
    b_key, b_block = top_of_row(b_key, tl.reshape(o_block, [TOP * BLOCKS]), TOP)
    o_rank = tl.arange(0, TOP)
    b_block = tl.where(b_key > -0x80000000, b_block, -1)
    b_block = tl.sort(tl.where(o_rank < chosen, b_block, 0x7FFFFFFF))
    tl.store(p_chosen + i_row * chosen + o_rank, b_block.to(tl.int64), mask=o_rank < chosen)


@triton.jit(do_not_specialize=(*_SIZES, *_STRIDES))  # type: ignore[untyped-decorator]
def search_scores_kernel(
    p_queries: tl.tensor,
    p_keys: tl.tensor,
    p_mask: tl.tensor,
    p_blocks: tl.tensor,
    p_scores: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    chosen: tl.tensor,
    parts: tl.tensor,
    stride_kb: tl.tensor,
    stride_km: tl.tensor,
    stride_mb: tl.tensor,
    stride_mm: tl.tensor,
    HAS_MASK: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
    VEC: tl.constexpr,
) -> None:
    """Scores of some chosen blocks for one query; -inf for what is no key: [rows, chosen * BLOCK].

    Row i is that of query (first + i) % n of its stream. A program takes SCORED keys, however many blocks
    they are: that many bytes are on their way at once, and sums have one order in blocks of any width.
    """
    i_out = (tl.program_id(0) // parts).to(tl.int64)
    i_row = first + i_out
    i_stream = i_row // n
    o_place = tl.program_id(0) % parts * SCORED + tl.arange(0, SCORED)
    m_place = o_place < chosen * BLOCK
    b_block = tl.load(p_blocks + i_out * chosen + o_place // BLOCK, mask=m_place, other=-1)  # [SCORED]
    o_key = b_block * BLOCK + o_place % BLOCK
    m_key = (b_block >= 0) & (o_key < m)
    if HAS_MASK:
        p_mask += i_stream * stride_mb
        m_key = m_key & (tl.load(p_mask + o_key * stride_mm, mask=m_key, other=0) != 0)
    p_key = p_keys + i_stream * stride_kb * VEC + (o_key * stride_km)[:, None] * VEC
    b_s = tl.zeros([SCORED], tl.float32)
    for i_e in tl.static_range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        b_q = tl.load(p_queries + i_row * E + o_e, mask=o_e < E, other=0.0).to(tl.float32)
        b_key = tl.load(p_key + o_e[None, :], mask=m_key[:, None] & (o_e < E)[None, :], other=0.0)
        b_s += tl.sum(b_key.to(tl.float32) * b_q[None, :], axis=1)
    b_s = tl.where(m_key, b_s, float("-inf"))
    tl.store(p_scores + i_out * chosen * BLOCK + o_place, b_s, mask=m_place)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def search_found_kernel(
    p_scores: tl.tensor,
    p_blocks: tl.tensor,
    p_places: tl.tensor,
    p_found: tl.tensor,
    p_indices: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    total: tl.tensor,
    k: tl.tensor,
    chosen: tl.tensor,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Scores and indices of what was chosen for a query, out of the ``total`` queries of a stream."""
    pid = tl.program_id(0).to(tl.int64)
    o_row = ((first + pid) // n * total + (first + pid) % n) * k
    for start in range(0, k, BK):
        o_k = start + tl.arange(0, BK)
        m_k = o_k < k
        b_place = tl.load(p_places + pid * k + o_k, mask=m_k, other=-1)
        m_found = b_place >= 0
        b_s = tl.load(p_scores + pid * chosen * BLOCK + b_place, mask=m_found, other=float("-inf"))
        b_block = tl.load(p_blocks + pid * chosen + b_place // BLOCK, mask=m_found, other=0)
        tl.store(p_found + o_row + o_k, b_s, mask=m_k)
        tl.store(p_indices + o_row + o_k, tl.where(m_found, b_block * BLOCK + b_place % BLOCK, -1), mask=m_k)


class Keys(NamedTuple):
    """Keys and mask as kernels take them."""

    keys: Tensor  # [b, m, e]: rows begin at multiples of 16 bytes
    mask: Tensor  # [b, m]; without a mask, the keys in its place
    strides: tuple[int, ...]  # of a stream and a key, in 16 bytes; of a stream and a key of the mask
    constants: dict[str, Any]


def group_of(keys: Tensor) -> int:
    """How many adjacent keys are multiplied at once."""
    return 128 if 2 * keys.shape[-1] * keys.itemsize <= WIDEST else 64


def block_of(keys: Tensor, k: int) -> int:
    """How many adjacent keys make up a block: NARROW, or a group."""
    # Blocks of 32 in place of 128 spare a query 96 keys for each of its k + EXTRA blocks (288 KiB for k = 16
    # and 64 numbers in bfloat16) and as many scores; the price is 3 m / 128 maxima more (6 KiB for 65,536
    # keys). It pays as long as one program chooses from all of them. A million keys would take 96 KiB more,
    # and so slices of few queries, each of which reads all keys; many blocks, more launches to choose them.
    group = group_of(keys)
    fits = triton.cdiv(keys.shape[1], group) <= SHORT and top_block(k + EXTRA) * group // NARROW <= SHORT
    return NARROW if fits else group


def can_search(keys: Tensor, k: int) -> bool:
    """Whether these kernels search such keys; not where they would choose half of the groups."""
    _, m, e = keys.shape
    if keys.dtype == torch.float64 or not 0 < e * keys.itemsize <= WIDEST or m > MOST_KEYS:
        return False
    return 2 * (k + EXTRA) * group_of(keys) <= m


def maxima_constants(n: int, keys: Tensor) -> dict[str, Any]:
    """What the first pass is compiled for, with n queries of a stream.

    Queries in float32 are not held: three products of TensorFloat32, which make up one in float32, take many
    registers.
    """
    width = max(16, triton.next_power_of_2(keys.shape[-1]))
    wide = keys.dtype == torch.float32
    most = MOST_QUERIES if width <= 128 and not wide else MOST_QUERIES // 2
    queries = max(16, min(most, triton.next_power_of_2(n)))
    return {
        "GROUP": group_of(keys),
        "BE": min(width, 32) if wide else width,
        "BQ": queries,
        "DOT": DOT[keys.dtype] if keys.is_cuda else tl.float32,
        "PRECISION": "tf32x3" if wide else "ieee",
        "num_warps": 8 if wide or queries == MOST_QUERIES else 4,
        "num_stages": 1 if wide else max(2, min(4, STAGED // (group_of(keys) * width * keys.itemsize))),
    }


def blocks_constants(groups: int, chosen: int, blocks: int) -> dict[str, Any]:
    """What choosing blocks from groups of ``blocks`` is compiled for."""
    most = triton.next_power_of_2(groups)
    # What is left to merge becomes ever less, and more warps would do the same.
    return {"GROUPS": most, "BLOCKS": blocks, "TOP": top_block(chosen), "num_warps": max(1, most // 512)}


def scored_width(keys: Tensor) -> int:
    """Elements of a key that the second pass multiplies at once."""
    width: int = triton.next_power_of_2(keys.shape[-1])
    return min(SCORED_WIDTH, width)


def rows_at_once(width: int, num: int, streams: int) -> int:
    """Rows of ``width`` scores that the scratch takes, with what selecting ``num`` of each takes."""
    selected: int = triton.next_power_of_2(num)
    scratch = min(streams, MOST_SCRATCH) * SCRATCH
    return max(1, scratch // (4 * width + 12 * max(256, 8 * selected) + 8 * max(512, 4 * selected)))


def search(queries: Tensor, keys: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`xlroute.kernels.search_topk` where `can_search` says so, for what is not empty."""
    b, n, _ = queries.shape
    block, chosen = block_of(keys, k), k + EXTRA
    given = prepare_keys(keys, mask, block)
    missing = given.keys.shape[-1] - queries.shape[-1]
    scores = torch.empty((b, n, k), dtype=torch.float32, device=queries.device)
    indices = torch.empty((b, n, k), dtype=torch.int64, device=queries.device)
    group = group_of(keys)
    step = max(1, rows_at_once(triton.cdiv(keys.shape[1], group) * group // block, chosen, b) // b)
    step -= step % MOST_QUERIES if step > MOST_QUERIES else 0
    rows = rows_at_once(chosen * block, k, b)
    with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
        for start in range(0, n, step):
            some = pad(queries[:, start : start + step], (0, missing)).contiguous()
            best = best_blocks(some, given, chosen)
            out = scores[:, start:], indices[:, start:]
            for first in range(0, len(best), rows):
                search_blocks(some, given, best[first : first + rows], first, k, n, out)
    return scores, indices


def best_blocks(queries: Tensor, given: Keys, chosen: int) -> Tensor:
    """The blocks with the highest maxima for each query, ascending, -1 for none: [b n, chosen]."""
    keys, mask, strides, constants = given
    b, n, _ = queries.shape
    m, group, block = keys.shape[1], group_of(keys), constants["BLOCK"]
    options = constants | maxima_constants(n, keys)
    groups = triton.cdiv(m, group)
    tiles = triton.cdiv(n, options["BQ"])
    span = max(FEWEST_GROUPS, triton.cdiv(b * tiles * groups, PROGRAMS))
    spans = triton.cdiv(groups, span)
    maxima = torch.empty((b * n, groups * group // block), dtype=torch.float32, device=keys.device)
    search_maxima_kernel[(b * spans * tiles,)](
        queries, keys, mask, maxima, n, m, tiles, spans, span, groups, *strides, **options
    )
    if block == group:
        return top_indices(maxima, chosen, backend="triton").sort(dim=-1).values
    best = torch.empty((b * n, chosen), dtype=torch.int64, device=keys.device)
    search_blocks_kernel[(b * n,)](
        maxima,
        best,
        groups,
        triton.cdiv(m, block),
        chosen,
        **blocks_constants(groups, chosen, group // block),
    )
    return best


def search_blocks(
    queries: Tensor, given: Keys, blocks: Tensor, first: int, k: int, total: int, out: tuple[Tensor, Tensor]
) -> None:
    """Writes the k best keys in the blocks of each query to ``out``, from row ``first`` of the queries on."""
    keys, mask, strides, constants = given
    n = queries.shape[1]
    rows, chosen = blocks.shape
    block = constants["BLOCK"]
    parts = triton.cdiv(chosen * block, SCORED)
    scores = torch.empty((rows, chosen * block), dtype=torch.float32, device=keys.device)
    search_scores_kernel[(rows * parts,)](
        queries,
        keys,
        mask,
        blocks,
        scores,
        first,
        n,
        keys.shape[1],
        chosen,
        parts,
        *strides,
        **constants,
        BE=scored_width(keys),
        SCORED=SCORED,
    )
    places = top_indices(scores, k, backend="triton")
    search_found_kernel[(rows,)](
        scores, blocks, places, *out, first, n, total, k, chosen, BK=FOUND, BLOCK=block, num_warps=1
    )


def prepare_keys(keys: Tensor, mask: Tensor | None, block: int) -> Keys:
    """What the kernels take in place of keys [b, m, e], in blocks of ``block``, and a mask [b, m]."""
    vector = VECTOR // keys.itemsize
    missing = -keys.shape[-1] % vector
    if missing:
        keys = pad(keys, (0, missing))
    elif (
        keys.stride(2) != 1 or keys.stride(0) % vector or keys.stride(1) % vector or keys.data_ptr() % VECTOR
    ):
        keys = keys.clone(memory_format=torch.contiguous_format)
    of_mask = (0, 0) if mask is None else mask.stride()
    strides = (keys.stride(0) // vector, keys.stride(1) // vector, *of_mask)
    constants = {"HAS_MASK": mask is not None, "E": keys.shape[-1], "BLOCK": block, "VEC": vector}
    return Keys(keys, keys if mask is None else mask, strides, constants)
