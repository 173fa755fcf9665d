"""The k largest scores of every row in three launches, and the water level of the soft top-k on the way.

1. ``selection_maxima_kernel`` deals the entries of a row out to some thousands of chunks and keeps the
   largest of each. At least k entries are as large as the k-th largest of these maxima.
2. ``selection_collect_kernel`` finds a threshold just below that maximum, in every program anew, which costs
   less than a launch, and collects the candidates: the entries that reach it. With random scores they are k
   and a few percent. The other entries are summed for the water level, relative to the threshold.
3. ``selection_rank_kernel`` counts for each candidate how many come before it. That is its place in the
   result, whatever order the candidates were collected in. Where rows are many, one program sorts those of a
   row. The last program of a row to finish solves for the level.

Entries are ordered by score and then by falling index, everywhere: no two are equal, so rows of equal scores
need no path of their own. Entries of a chunk are spread over the row without a pattern, so that neither a
cluster of high scores nor a period makes a few chunks hold most of the largest. Where that fails all the
same, and the candidates do not fit into their buffer, one program selects by radix: slower, but exact. Rows
short enough are sorted by one program, in one launch.

The only atomics are of integers, and float32 exponentials are summed as integers: a row has the same bits in
every run, in whatever batch and at whatever address. Counts and cuts are not specialised for, so that a
memory that grows does not compile a kernel for every length.
"""

# ruff: noqa: N803, SIM300

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype

LARGEST = 8192  # entries that can be selected from a row
LONGEST = 1 << 30  # entries of a row: indices are int32 and rounded up
SHORT = 2048  # entries of a row that one program sorts, if their keys are int32

SEGMENT = 128  # adjacent entries that one program reads at once, in the first pass
SEGMENT_ROWS = 32  # how many such segments make up one block
BLOCK = 2048  # entries that the second pass reads at once
MAX_TILES = 512  # of a row
MAX_FOLDS = 16  # tiles that share their chunks
COLLECT_PROGRAMS = 264  # of the second pass, in all: each of them searches for the threshold
RANK_BLOCK = 16  # candidates that are ranked at once
OTHERS = 512  # candidates that they are compared with at once
MANY_ROWS = 64  # from so many on, it is less work if one program sorts all candidates of a row
COUNTERS = 3  # of a row: candidates, programs that have finished, candidates of the radix selection

_HASH = tl.constexpr(0x3C6EF35F)  # odd, its bits without a pattern
# Exponentials of float32 scores, which are at most 1, are summed as multiples of 2**-50: at most 2**12 of
# them in one int64, then the upper and the lower 31 bits on their own. So the sum is exact, whoever adds up
# what.
_UNIT = tl.constexpr(2.0**50)
_MOST_TERMS = tl.constexpr(2**12)
_LOW_BITS = tl.constexpr(31)
_LOW_MASK = tl.constexpr(2**31 - 1)
_POISON = tl.constexpr(1 << 40)  # added to the count of valid entries for a NaN or +inf
_NO_INDEX = tl.constexpr(2**31 - 1)


class Plan(NamedTuple):
    """How the rows of one length are cut up, for one size of selection."""

    group: int  # adjacent entries that belong to one chunk
    tiles: int  # programs of the first pass
    segments: int  # of one tile
    tile_rows: int  # segments that its program reads at once
    tile_warps: int
    folds: int  # tiles that share their chunks
    chunks: int
    capacity: int  # of the buffer of candidates
    block: int  # entries that the second pass reads at once
    blocks: int
    warps: int  # of a program that holds all chunks, or all selected entries


@functools.lru_cache(maxsize=1024)
def plan(n: int, largest: int) -> Plan:
    """The plan for rows of n entries of which the ``largest`` are selected."""
    # Some three chunks for each selected entry keep the candidates few.
    target = min(max(triton.next_power_of_2(3 * largest), 512), 2 * LARGEST)
    group = next(group for group in (4, 2, 1) if n >= group * target or group == 1)
    tiles = min(triton.cdiv(n, SEGMENT), target * group // SEGMENT)
    chunks = tiles * SEGMENT // group
    # Long rows get more tiles than it takes for as many chunks.
    folds = 1
    while (
        folds < MAX_FOLDS
        and 2 * folds * tiles * SEGMENT * SEGMENT_ROWS <= n
        and 2 * folds * tiles <= MAX_TILES
    ):
        folds *= 2
    tiles *= folds
    segments = triton.cdiv(n, tiles * SEGMENT)
    tile_rows = min(SEGMENT_ROWS, triton.next_power_of_2(segments))
    block = min(BLOCK, max(128, triton.next_power_of_2(n)))
    return Plan(
        group=group,
        tiles=tiles,
        segments=segments,
        tile_rows=tile_rows,
        tile_warps=max(1, min(8, tile_rows * SEGMENT // 512)),
        folds=folds,
        chunks=chunks,
        capacity=min(n, max(256, 8 * triton.next_power_of_2(largest))),
        block=block,
        blocks=triton.cdiv(n, block),
        warps=8 if largest <= 2048 else 16,
    )


@triton.jit  # type: ignore[untyped-decorator]
def row_of_mask(
    p_mask: tl.tensor, i_row: tl.tensor, inner: tl.tensor, stride_m0: tl.tensor, stride_m1: tl.tensor
) -> tl.tensor:
    """Where the mask of a row starts: the row is entry (i_row // inner, i_row % inner) of two dimensions."""
    return p_mask + (i_row // inner) * stride_m0 + (i_row % inner) * stride_m1


@triton.jit  # type: ignore[untyped-decorator]
def load_scores(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    o_n: tl.tensor,
    n: tl.tensor,
    stride_mn: tl.tensor,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Scores of a row in the compute dtype, -inf where they are masked or beyond the row."""
    b_s = tl.load(p_s + o_n, mask=o_n < n, other=float("-inf")).to(DTYPE)
    if HAS_MASK:
        b_mask = tl.load(p_mask + o_n.to(tl.int64) * stride_mn, mask=o_n < n, other=0)
        b_s = tl.where(b_mask != 0, b_s, float("-inf"))
    return b_s


@triton.jit  # type: ignore[untyped-decorator]
def to_key(b_s: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Integers in the order of the scores; the lowest one for what can never be chosen, -inf and NaN."""
    b_s = tl.where(b_s == 0, 0.0, b_s)  # -0.0 equals 0.0
    if DTYPE == tl.float64:
        b_bits = b_s.to(tl.int64, bitcast=True)
        b_key = b_bits ^ ((b_bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        b_key = tl.where(b_s > float("-inf"), b_key, -0x8000000000000000)
    else:
        b_bits = b_s.to(tl.int32, bitcast=True)
        b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
        b_key = tl.where(b_s > float("-inf"), b_key, -0x80000000)
    return b_key


@triton.jit  # type: ignore[untyped-decorator]
def from_key(b_key: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The scores that have these keys; NaN for the lowest."""
    if DTYPE == tl.float64:
        b_bits = b_key ^ ((b_key >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        b_bits = b_key ^ ((b_key >> 31) & 0x7FFFFFFF)
    return b_bits.to(DTYPE, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def sort_row(b_key: tl.tensor, o_n: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """int32 keys in ascending order, equal ones by falling index, and their indices."""
    b_sorted = tl.sort((b_key.to(tl.int64) << 32) | (_NO_INDEX - o_n))
    return (b_sorted >> 32).to(tl.int32), (~b_sorted & 0x7FFFFFFF).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def top_of_row(b_key: tl.tensor, o_n: tl.tensor, TOP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The TOP highest int32 keys in descending order, equal ones by rising index, and their indices."""
    b_top = tl.topk((b_key.to(tl.int64) << 32) | (_NO_INDEX - o_n), TOP)
    return (b_top >> 32).to(tl.int32), (~b_top & 0x7FFFFFFF).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "p_s",
        "p_mask",
        "n",
        "num",
        "stride_s",
        "inner",
        "stride_m0",
        "stride_m1",
        "stride_mn",
    ]
)  # type: ignore[untyped-decorator]
def selection_short_kernel(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_indices: tl.tensor,
    n: tl.tensor,
    num: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,
) -> None:
    """Indices [rows, num] of the largest scores of a row, in one program that sorts the row.

    It sorts pieces of TOP entries and merges them, each time without the lower half.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    b_s = load_scores(p_s + i_row * stride_s, p_mask, o_n, n, stride_mn, HAS_MASK, tl.float32)  # [BLOCK]
    b_key, b_id = top_of_row(to_key(b_s, tl.float32), o_n, TOP)
    o_rank = tl.arange(0, TOP)
    b_id = tl.where(b_key > -0x80000000, b_id, -1).to(tl.int64)
    tl.store(p_indices + i_row * num + o_rank, b_id, mask=o_rank < num)


@triton.jit(do_not_specialize=["inner", "tiles", "segments"])  # type: ignore[untyped-decorator]
def selection_maxima_kernel(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_keys: tl.tensor,
    p_ids: tl.tensor,
    p_counters: tl.tensor,
    n: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    tiles: tl.tensor,
    segments: tl.tensor,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    COUNTERS: tl.constexpr,
) -> None:
    """Key and index of the first of each chunk, as far as it lies in a tile.

    One program takes a tile: one segment out of each ``tiles`` of a row. Which one that is, and by how much
    its columns are rotated, follows no pattern.
    """
    KEY: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    LOWEST: tl.constexpr = -0x8000000000000000 if DTYPE == tl.float64 else -0x80000000
    CHUNKS: tl.constexpr = SEGMENT // GROUP
    pid = tl.program_id(0)
    i_row = (pid // tiles).to(tl.int64)
    i_tile = pid % tiles
    p_s += i_row * stride_s
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    if i_tile == 0:
        o_counter = tl.arange(0, 4)
        tl.store(p_counters + i_row * COUNTERS + o_counter, 0, mask=o_counter < COUNTERS)

    o_row = tl.arange(0, ROWS)
    o_column = tl.arange(0, SEGMENT)
    b_best = tl.full([ROWS, SEGMENT], LOWEST, KEY)
    b_id = tl.full([ROWS, SEGMENT], _NO_INDEX, tl.int32)
    for first in range(0, segments, ROWS):
        o_step = (first + o_row)[:, None]
        o_segment = o_step * tiles + (i_tile + ((o_step * _HASH >> 8) & 0xFFFF)) % tiles
        b_rotation = ((o_segment * _HASH >> 20) & 0x7F) * GROUP
        o_n = o_segment * SEGMENT + (o_column[None, :] + b_rotation) % SEGMENT
        b_s = load_scores(p_s, p_mask, o_n, n, stride_mn, HAS_MASK, DTYPE)  # [ROWS, SEGMENT]
        b_key = to_key(b_s, DTYPE)
        # Indices rise from step to step: the first of equals stays.
        b_id = tl.where(b_key > b_best, o_n, b_id)
        b_best = tl.maximum(b_key, b_best)
    b_best = tl.reshape(b_best, [ROWS, CHUNKS, GROUP])
    b_id = tl.reshape(b_id, [ROWS, CHUNKS, GROUP])
    b_top = tl.max(tl.max(b_best, 2), 0)  # [CHUNKS]
    b_id = tl.where(b_best == b_top[None, :, None], b_id, _NO_INDEX)
    b_id = tl.min(tl.min(b_id, 2), 0)
    o_chunk = pid.to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    tl.store(p_keys + o_chunk, b_top)
    tl.store(p_ids + o_chunk, b_id)


@triton.jit  # type: ignore[untyped-decorator]
def find_threshold(
    p_keys: tl.tensor,
    p_ids: tl.tensor,
    chunks: tl.tensor,
    largest: tl.tensor,
    DTYPE: tl.constexpr,
    FOLDS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A key and an index: ``largest`` chunk maxima and not many more come before or are there.

    What can be chosen comes before or is there if its key is higher, or equal with an index no higher. The
    maxima come in [FOLDS, chunks].
    """
    KEY: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    LOWEST: tl.constexpr = -0x8000000000000000 if DTYPE == tl.float64 else -0x80000000
    HIGHEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if DTYPE == tl.float64 else 0x7FFFFFFF
    o_chunk = tl.arange(0, CHUNKS)
    b_key = tl.load(p_keys + o_chunk, mask=o_chunk < chunks, other=LOWEST)  # [CHUNKS]
    for i_fold in tl.static_range(1, FOLDS):
        b_fold = tl.load(p_keys + i_fold * chunks + o_chunk, mask=o_chunk < chunks, other=LOWEST)
        b_key = tl.maximum(b_key, b_fold)
    count = tl.sum((b_key > LOWEST).to(tl.int32))
    key = tl.full([], LOWEST, KEY)
    index = tl.full([], -1, tl.int32)
    if count >= largest:
        enough = largest + largest // 8
        key = tl.min(tl.where(b_key > LOWEST, b_key, HIGHEST))
        high = tl.max(b_key)
        while (key < high) & (count > enough):
            middle = (key | high) - ((key ^ high) >> 1)  # the mean, rounded up, without overflow
            above = tl.sum((b_key >= middle).to(tl.int32))
            if above >= largest:
                key = middle
                count = above
            else:
                high = middle - 1
        index = tl.full([], _NO_INDEX, tl.int32)
        if count > enough:
            # Too many maxima equal this key: take the first of them.
            b_tie = b_key == key
            b_id = tl.full([CHUNKS], _NO_INDEX, tl.int32)
            for i_fold in tl.static_range(FOLDS):
                b_fold = tl.load(p_keys + i_fold * chunks + o_chunk, mask=o_chunk < chunks, other=LOWEST)
                b_fold_id = tl.load(p_ids + i_fold * chunks + o_chunk, mask=o_chunk < chunks, other=_NO_INDEX)
                b_id = tl.minimum(b_id, tl.where(b_fold == key, b_fold_id, _NO_INDEX))
            wanted = largest - tl.sum((b_key > key).to(tl.int32))
            low = tl.min(tl.where(b_tie, b_id, _NO_INDEX))
            index = tl.max(tl.where(b_tie, b_id, -1))
            while low < index:
                between = low + (index - low) // 2
                below = tl.sum((b_tie & (b_id <= between)).to(tl.int32))
                if below >= wanted:
                    index = between
                else:
                    low = between + 1
    return key, index


@triton.jit  # type: ignore[untyped-decorator]
def finite_score(key: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The score of a threshold, 0 if it is none or +inf: what the sums below it are relative to."""
    score = from_key(key, DTYPE)
    return tl.where((score > float("-inf")) & (score < float("inf")), score, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def collect(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_keys: tl.tensor,
    p_ids: tl.tensor,
    p_count: tl.tensor,
    p_sums: tl.tensor,
    first: tl.tensor,
    blocks: tl.tensor,
    step: tl.tensor,
    parts: tl.tensor,
    n: tl.tensor,
    stride_mn: tl.tensor,
    key: tl.tensor,
    index: tl.tensor,
    scale: tl.tensor,
    capacity: tl.tensor,
    HAS_MASK: tl.constexpr,
    LEVEL: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Collects the candidates in every ``step``-th block of a row, and sums exp of the other entries.

    The sum is relative to the score of the threshold. It is stored in ``p_sums`` [3, parts], int64, with how
    many entries can be chosen: upper bits, lower bits, count. A sum of float64 scores is stored as it is, in
    place of the upper bits.
    """
    LOWEST: tl.constexpr = -0x8000000000000000 if DTYPE == tl.float64 else -0x80000000
    score = finite_score(key, DTYPE)
    o_block = tl.arange(0, BLOCK)
    total = tl.full([], 0.0, tl.float64)
    high = tl.full([], 0, tl.int64)
    low = tl.full([], 0, tl.int64)
    valid = tl.full([], 0, tl.int64)
    for start in range(first, blocks, step * _MOST_TERMS):
        b_sum = tl.full([BLOCK], 0, tl.float64 if DTYPE == tl.float64 else tl.int64)
        b_valid = tl.full([BLOCK], 0, tl.int32)
        b_bad = tl.full([BLOCK], 0, tl.int32)
        b_next = load_scores(p_s, p_mask, start * BLOCK + o_block, n, stride_mn, HAS_MASK, DTYPE)
        for i_block in range(start, tl.minimum(start + step * _MOST_TERMS, blocks), step):
            b_s = b_next  # [BLOCK]
            o_n = i_block * BLOCK + o_block
            b_next = load_scores(p_s, p_mask, o_n + step * BLOCK, n, stride_mn, HAS_MASK, DTYPE)
            b_key = to_key(b_s, DTYPE)
            m_chosen = (b_key > key) | ((b_key == key) & (o_n <= index))
            if LEVEL:
                m_rest = (b_key > LOWEST) & ((b_key < key) | ((b_key == key) & (o_n > index)))
                b_z = tl.where(m_rest, b_s, score) - score
                b_e = tl.where(m_rest, tl.exp2(tl.where(b_z < 0, b_z * scale, 0.0)), 0.0)
                b_sum += b_e if DTYPE == tl.float64 else (b_e * _UNIT + 0.5).to(tl.int64)
                b_valid += (b_key > LOWEST).to(tl.int32)
                b_bad |= ((b_s != b_s) | (b_s == float("inf"))).to(tl.int32)
            b_at = tl.atomic_add(p_count + o_block * 0, 1, mask=m_chosen, sem="relaxed")
            m_chosen = m_chosen & (b_at < capacity)
            tl.store(p_keys + b_at, b_key, mask=m_chosen)
            tl.store(p_ids + b_at, o_n, mask=m_chosen)
        if LEVEL:
            if DTYPE == tl.float64:
                total += tl.sum(b_sum)
            else:
                high += tl.sum(b_sum >> _LOW_BITS)
                low += tl.sum(b_sum & _LOW_MASK)
            valid += tl.sum(b_valid).to(tl.int64) + tl.max(b_bad).to(tl.int64) * _POISON
    if LEVEL:
        tl.store(p_sums + first, total.to(tl.int64, bitcast=True) if DTYPE == tl.float64 else high)
        tl.store(p_sums + parts + first, low)
        tl.store(p_sums + 2 * parts + first, valid)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["inner", "tiles", "largest", "capacity", "parts", "blocks"]
)
def selection_collect_kernel(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_chunk_keys: tl.tensor,
    p_chunk_ids: tl.tensor,
    p_keys: tl.tensor,
    p_ids: tl.tensor,
    p_counters: tl.tensor,
    p_thresholds: tl.tensor,
    p_sums: tl.tensor,
    n: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    tiles: tl.tensor,
    largest: tl.tensor,
    capacity: tl.tensor,
    parts: tl.tensor,
    blocks: tl.tensor,
    scale: tl.float64,
    HAS_MASK: tl.constexpr,
    LEVEL: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
    FOLDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTERS: tl.constexpr,
) -> None:
    """Keys and indices of the candidates of each row, and the sums of ``collect`` [rows, 3, parts]."""
    pid = tl.program_id(0)
    i_row = (pid // parts).to(tl.int64)
    i_part = pid % parts
    p_s += i_row * stride_s
    if HAS_MASK:
        p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
    o_chunk = i_row * tiles * TILE_CHUNKS
    chunks = tiles // FOLDS * TILE_CHUNKS
    key, index = find_threshold(
        p_chunk_keys + o_chunk, p_chunk_ids + o_chunk, chunks, largest, DTYPE, FOLDS, CHUNKS
    )
    if i_part == 0:
        tl.store(p_thresholds + i_row, key)
    collect(
        p_s,
        p_mask,
        p_keys + i_row * capacity,
        p_ids + i_row * capacity,
        p_counters + i_row * COUNTERS,
        p_sums + i_row * 3 * parts,
        i_part,
        blocks,
        parts,
        parts,
        n,
        stride_mn,
        key,
        index,
        tl.full([], scale, DTYPE),
        capacity,
        HAS_MASK,
        LEVEL,
        DTYPE,
        BLOCK,
    )


@triton.jit  # type: ignore[untyped-decorator]
def radix_threshold(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    n: tl.tensor,
    stride_mn: tl.tensor,
    largest: tl.tensor,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Key and index of the ``largest``-th entry of a row that has as many: eight bits in each pass."""
    KEY: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    LOWEST: tl.constexpr = -0x8000000000000000 if DTYPE == tl.float64 else -0x80000000
    KEY_BYTES: tl.constexpr = 8 if DTYPE == tl.float64 else 4
    o_digit = tl.arange(0, 256)
    left = tl.full([], largest, tl.int32)
    ties = left
    known = tl.full([], 0, KEY)
    prefix = tl.full([], 0, KEY)
    for i_byte in range(KEY_BYTES):
        shift = 8 * (KEY_BYTES - 1 - i_byte)
        b_count = tl.full([256], 0, tl.int32)
        for start in range(0, n, BLOCK):
            o_n = start + tl.arange(0, BLOCK)
            b_key = to_key(load_scores(p_s, p_mask, o_n, n, stride_mn, HAS_MASK, DTYPE), DTYPE)
            b_key = b_key ^ LOWEST  # as unsigned
            b_digit = ((b_key >> shift) & 255).to(tl.int32)
            b_count += tl.histogram(b_digit, 256, mask=((b_key & known) == prefix) & (o_n < n))
        b_reached = tl.cumsum(b_count, 0, reverse=True)  # entries of this digit and higher ones
        digit = tl.sum((b_reached >= left).to(tl.int32)) - 1
        left -= tl.sum(tl.where(o_digit > digit, b_count, 0))
        ties = tl.sum(tl.where(o_digit == digit, b_count, 0))
        prefix = prefix | (digit.to(KEY) << shift)
        known = known | (tl.full([], 255, KEY) << shift)
    key = prefix ^ LOWEST
    index = tl.full([], _NO_INDEX, tl.int32)
    if ties > left:
        known_bits = tl.full([], 0, tl.int32)
        index = tl.full([], 0, tl.int32)
        for i_byte in range(4):
            shift = 8 * (3 - i_byte)
            b_count = tl.full([256], 0, tl.int32)
            for start in range(0, n, BLOCK):
                o_n = start + tl.arange(0, BLOCK)
                b_key = to_key(load_scores(p_s, p_mask, o_n, n, stride_mn, HAS_MASK, DTYPE), DTYPE)
                m_tie = (b_key == key) & ((o_n & known_bits) == index) & (o_n < n)
                b_count += tl.histogram((o_n >> shift) & 255, 256, mask=m_tie)
            digit = tl.sum((tl.cumsum(b_count, 0) < left).to(tl.int32))
            left -= tl.sum(tl.where(o_digit < digit, b_count, 0))
            index = index | (digit << shift)
            known_bits = known_bits | (tl.full([], 255, tl.int32) << shift)
    return key, index


@triton.jit  # type: ignore[untyped-decorator]
def apply_after(
    a_first: tl.tensor, b_first: tl.tensor, a: tl.tensor, b: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The affine map r -> a r + b after another one."""
    return a_first * a, b_first * a + b


@triton.jit  # type: ignore[untyped-decorator]
def solve_level(
    b_z: tl.tensor,
    b_below: tl.tensor,
    o_rank: tl.tensor,
    picks: tl.tensor,
    tail: tl.tensor,
    valid: tl.tensor,
    k: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The level c for which Σ min(1, exp(z + c)) = k, and what the saturated entries leave of k; float64.

    With the scores in descending order, let r_j be the sum of exp(z_i - z_j) over the j-th and all after it.
    r_j = 1 + exp(z_{j+1} - z_j) r_{j+1}, so all of them come from one scan of affine maps, none of which can
    overflow. Entry j is saturated if k - j > r_j: an equal share of what is left would be more than 1.

    Args:
        b_z: exponents in ascending order, of which the last of the picks is 0.
        b_below: the exponent before each.
        o_rank: their places in descending order; beyond the picks and below 0 they do not count.
        picks: how many can saturate, the smallest of which comes first in ``b_z``.
        tail: Σ exp(z) over all entries but the picks. NaN makes the level NaN.
        valid: how many entries there are in all.
        k: the budget.
    """
    m_top = (o_rank >= 0) & (o_rank < picks)
    m_upper = (o_rank >= 0) & (o_rank < picks - 1)
    b_a = tl.where(m_upper, tl.exp(tl.where(m_upper, b_below - b_z, 0.0)), 0.0)
    b_b = tl.where(m_top, tl.where(m_upper, 1.0, 1.0 + tail), 0.0)
    _, b_r = tl.associative_scan((b_a, b_b), 0, apply_after)
    b_left = k - o_rank.to(tl.float64)
    j = tl.sum((m_upper & (b_left > b_r)).to(tl.int32))
    m_first = m_top & (o_rank == j)
    ratio = tl.sum(tl.where(m_first, b_left / tl.where(m_first, b_r, 1.0), 0.0))
    left = tl.sum(tl.where(m_first, b_left, 0.0))
    level = tl.log(tl.where(ratio > 0, ratio, 1.0)) - tl.sum(tl.where(m_first, b_z, 0.0))
    level = tl.where(k >= valid, float("inf"), level)
    level = tl.where(k <= 0, float("-inf"), level)
    return tl.where((tail != tail) | (k != k), float("nan"), level), left


@triton.jit  # type: ignore[untyped-decorator]
def exponents(
    b_s: tl.tensor, shift: tl.tensor, level: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """log2 of the gates before they are cut off at 1. An entry without a score counts as one at the shift.

    Scale and level, float64, go in as two parts each, so that a whole row is not off by one rounding.
    """
    level = level * 1.4426950408889634  # log2(e)
    finite = tl.where((level > float("-inf")) & (level < float("inf")), level, 0.0)
    level_low = (finite - finite.to(DTYPE).to(tl.float64)).to(DTYPE)
    scale_low = (scale - scale.to(DTYPE).to(tl.float64)).to(DTYPE)
    # -inf has no part in this: with a level of +inf it would make NaN.
    b_x = tl.where(b_s == float("-inf"), 0.0, b_s - shift.to(DTYPE))
    return (b_x * scale.to(DTYPE) + level.to(DTYPE)) + (b_x * scale_low + level_low)


@triton.jit  # type: ignore[untyped-decorator]
def gates_at(
    b_s: tl.tensor, shift: tl.tensor, level: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """The gates of scores: min(1, exp((s - shift) / eps + level)), 0 for -inf."""
    b_z = exponents(b_s, shift, level, scale, DTYPE)
    b_gate = tl.exp2(tl.where(b_z > 0, 0.0, b_z))  # not a minimum, which would drop NaN
    return tl.where(b_s == float("-inf"), 0.0, b_gate)


@triton.jit  # type: ignore[untyped-decorator]
def chosen_gates(
    b_s: tl.tensor,
    shift: tl.tensor,
    level: tl.tensor,
    scale: tl.tensor,
    STRAIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The gates of scores, straight through as 1 where they are numbers; 0 for -inf."""
    b_gate = gates_at(b_s, shift, level, scale, DTYPE)
    if STRAIGHT:
        b_gate = tl.where((b_s > float("-inf")) & (b_gate == b_gate), 1.0, b_gate)
    return b_gate


@triton.jit  # type: ignore[untyped-decorator]
def count_picks(k: tl.tensor, valid: tl.tensor, most: tl.tensor) -> tl.tensor:
    """How many entries of a row its budget can saturate: ceil(k), where there are as many. int32."""
    picks = tl.where(k == k, tl.minimum(tl.maximum(k, 0.0), valid), 0.0)
    return tl.minimum(tl.ceil(picks).to(tl.int32), most)


@triton.jit(do_not_specialize=["num", "rows", "inner", "stride_k", "largest", "capacity", "parts", "sums"])  # type: ignore[untyped-decorator]
def selection_rank_kernel(
    p_s: tl.tensor,
    p_mask: tl.tensor,
    p_keys: tl.tensor,
    p_ids: tl.tensor,
    p_counters: tl.tensor,
    p_thresholds: tl.tensor,
    p_sums: tl.tensor,
    p_sorted: tl.tensor,
    p_indices: tl.tensor,
    p_chosen: tl.tensor,
    p_k: tl.tensor,
    p_levels: tl.tensor,
    n: tl.tensor,
    num: tl.tensor,
    rows: tl.tensor,
    stride_s: tl.tensor,
    inner: tl.tensor,
    stride_m0: tl.tensor,
    stride_m1: tl.tensor,
    stride_mn: tl.tensor,
    stride_k: tl.tensor,
    largest: tl.tensor,
    capacity: tl.tensor,
    parts: tl.tensor,
    sums: tl.tensor,
    number: tl.float64,
    eps: tl.float64,
    scale: tl.float64,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    LEVEL: tl.constexpr,
    CHOSEN: tl.constexpr,
    STRAIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKED: tl.constexpr,
    OTHERS: tl.constexpr,
    SORTED: tl.constexpr,
    SUMS: tl.constexpr,
    TOP: tl.constexpr,
    COUNTERS: tl.constexpr,
) -> None:
    """Sorts the candidates of a row, and solves for its level: ``p_levels`` [3, rows].

    The first program of a row sorts up to SORTED candidates at once; more are counted.

    The last program of a row to finish solves for the level, and may give the gates [rows, num] of the
    largest; the counter tells which one that is.
    """
    LOWEST: tl.constexpr = -0x8000000000000000 if DTYPE == tl.float64 else -0x80000000
    pid = tl.program_id(0)
    i_row = (pid // parts).to(tl.int64)
    i_part = pid % parts
    p_keys += i_row * capacity
    p_ids += i_row * capacity
    p_sorted += i_row * capacity
    p_indices += i_row * num
    p_counters += i_row * COUNTERS
    p_sums += i_row * 3 * sums
    count = tl.load(p_counters)
    fits = count <= capacity
    first = i_part * RANKED
    step = tl.full([], parts * RANKED, tl.int32)
    mine = count
    if not fits:
        # The buffer did not take all candidates. One program of the row does everything.
        count = tl.full([], largest, tl.int32)
        step = tl.full([], RANKED, tl.int32)
        mine = tl.where(i_part == 0, count, 0)
        if i_part == 0:
            p_s += i_row * stride_s
            if HAS_MASK:
                p_mask = row_of_mask(p_mask, i_row, inner, stride_m0, stride_m1)
            key, index = radix_threshold(p_s, p_mask, n, stride_mn, largest, HAS_MASK, DTYPE, BLOCK)
            tl.store(p_thresholds + i_row, key)
            collect(
                p_s,
                p_mask,
                p_keys,
                p_ids,
                p_counters + 2,
                p_sums,
                0,
                tl.cdiv(n, BLOCK),
                1,
                sums,
                n,
                stride_mn,
                key,
                index,
                tl.full([], scale, DTYPE),
                capacity,
                HAS_MASK,
                LEVEL,
                DTYPE,
                BLOCK,
            )
            tl.debug_barrier()

    if SORTED > 0:  # noqa: SIM102  (a constant, unlike the next)
        if count <= SORTED:
            mine = tl.full([], 0, tl.int32)
            if i_part == 0:
                o_mine = tl.arange(0, SORTED)
                b_key = tl.load(p_keys + o_mine, mask=o_mine < count, other=LOWEST)  # [SORTED]
                b_key, b_id = sort_row(b_key, tl.load(p_ids + o_mine, mask=o_mine < count, other=_NO_INDEX))
                b_rank = SORTED - 1 - o_mine
                tl.store(p_sorted + b_rank, from_key(b_key, DTYPE), mask=b_rank < count)
                tl.store(p_indices + b_rank, b_id.to(tl.int64), mask=b_rank < tl.minimum(count, num))
    for i_first in range(first, mine, step):
        o_mine = i_first + tl.arange(0, RANKED)
        b_key = tl.load(p_keys + o_mine, mask=o_mine < count, other=LOWEST)[:, None]  # [RANKED, 1]
        b_id = tl.load(p_ids + o_mine, mask=o_mine < count, other=_NO_INDEX)[:, None]
        b_rank = tl.full([RANKED], 0, tl.int32)
        for j_first in range(0, count, OTHERS):
            o_other = j_first + tl.arange(0, OTHERS)
            b_other = tl.load(p_keys + o_other, mask=o_other < count, other=LOWEST)[None, :]  # [1, OTHERS]
            b_other_id = tl.load(p_ids + o_other, mask=o_other < count, other=_NO_INDEX)[None, :]
            m_before = (b_other > b_key) | ((b_other == b_key) & (b_other_id < b_id))
            b_rank += tl.sum(m_before.to(tl.int32), 1)
        b_score = from_key(tl.reshape(b_key, [RANKED]), DTYPE)
        b_index = tl.reshape(b_id, [RANKED]).to(tl.int64)
        tl.store(p_sorted + b_rank, b_score, mask=o_mine < count)
        tl.store(p_indices + b_rank, b_index, mask=(o_mine < count) & (b_rank < num))
    if i_part == 0:
        for start in range(count, num, OTHERS):
            o_missing = start + tl.arange(0, OTHERS)
            tl.store(p_indices + o_missing, tl.full([OTHERS], -1, tl.int64), mask=o_missing < num)

    if LEVEL:
        # The barrier orders the stores of all threads before the count, and the count before the loads below.
        tl.debug_barrier()
        done = tl.atomic_add(p_counters + 1, 1, sem="acq_rel")
        if done == parts - 1:
            o_sum = tl.arange(0, SUMS)
            m_sum = o_sum < tl.where(fits, sums, 1)
            b_high = tl.load(p_sums + o_sum, mask=m_sum, other=0)
            if DTYPE == tl.float64:
                total = tl.sum(b_high.to(tl.float64, bitcast=True))
            else:
                b_low = tl.load(p_sums + sums + o_sum, mask=m_sum, other=0)
                total = tl.sum(b_high).to(tl.float64) * (_LOW_MASK + 1) + tl.sum(b_low).to(tl.float64)
                total = total / _UNIT
            valid = tl.sum(tl.load(p_sums + 2 * sums + o_sum, mask=m_sum, other=0))
            total = tl.where(valid < _POISON, total, float("nan"))
            valid = (valid & (_POISON - 1)).to(tl.float64)
            k = tl.load(p_k + i_row * stride_k) if HAS_K else tl.full([], number, tl.float64)
            picks = count_picks(k, valid, tl.minimum(count, largest))
            shift = tl.load(p_sorted + tl.maximum(picks - 1, 0), mask=count > 0, other=0.0)
            shift = tl.where(shift < float("inf"), shift, 0.0).to(tl.float64)

            # What was not chosen: the candidates after the picks, and all that lie below the threshold.
            low = finite_score(tl.load(p_thresholds + i_row), DTYPE).to(tl.float64)
            tail = total * tl.exp(tl.where(low < shift, (low - shift) / eps, 0.0))
            for start in range(picks, count, OTHERS):
                o_rank = start + tl.arange(0, OTHERS)
                b_score = tl.load(p_sorted + o_rank, mask=o_rank < count, other=float("-inf")).to(tl.float64)
                b_e = tl.exp(tl.where(b_score < shift, (b_score - shift) / eps, 0.0))
                tail += tl.sum(tl.where(o_rank < count, b_e, 0.0))

            o_rank = picks - 1 - tl.arange(0, TOP)
            m_top = (o_rank >= 0) & (o_rank < tl.where(total == total, picks, 0))
            b_score = tl.load(p_sorted + o_rank, mask=m_top, other=0.0).to(tl.float64)  # [TOP], ascending
            m_upper = m_top & (o_rank < picks - 1)
            b_below = tl.load(p_sorted + o_rank + 1, mask=m_upper, other=0.0).to(tl.float64)
            level, left = solve_level(
                tl.where(m_top, b_score - shift, 0.0) / eps,
                tl.where(m_top, b_below - shift, 0.0) / eps,
                o_rank,
                picks,
                tail,
                valid,
                k,
            )
            tl.store(p_levels + i_row, shift)
            tl.store(p_levels + rows + i_row, level)
            tl.store(p_levels + 2 * rows + i_row, left)
            if CHOSEN:
                for start in range(0, num, OTHERS):
                    o_chosen = start + tl.arange(0, OTHERS)
                    m_chosen = o_chosen < tl.minimum(count, num)
                    b_chosen = tl.load(p_sorted + o_chosen, mask=m_chosen, other=float("-inf"))  # [OTHERS]
                    b_gate = chosen_gates(
                        b_chosen, shift, level, tl.full([], scale, tl.float64), STRAIGHT, DTYPE
                    )
                    b_gate = b_gate.to(p_chosen.dtype.element_ty)
                    tl.store(p_chosen + i_row * num + o_chosen, b_gate, mask=o_chosen < num)


class Rows(NamedTuple):
    """Scores [rows, n] and their mask as kernels take them: pointers and strides."""

    s: Tensor  # [rows, n], its last stride is 1
    mask: Tensor  # [outer, inner, n], broadcast by strides of 0; without a mask, s in its place
    strides: tuple[int, ...]  # of a row of s; inner, and of the three dimensions of mask
    has_mask: bool
    dtype: tl.dtype


def as_rows(t: Tensor) -> Tensor:
    """A tensor [..., n] as [rows, n] whose last stride is 1; a copy only where its strides forbid a view."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def prepare_rows(s: Tensor, mask: Tensor | None) -> Rows:
    """What the kernels take in place of scores [..., n] and a mask that broadcasts to them."""
    flat = as_rows(s)
    dtype = tl.float64 if compute_dtype(s.dtype) == torch.float64 else tl.float32
    if mask is None:
        return Rows(flat, flat, (flat.stride(0), 1, 0, 0, 0), False, dtype)
    mask = mask.expand(s.shape)
    # Two leading dimensions are enough for a mask that some of them share.
    mask = mask.reshape(-1, *mask.shape[-2:]) if mask.ndim > 3 else mask[(None,) * (3 - mask.ndim)]
    return Rows(flat, mask, (flat.stride(0), mask.shape[1], *mask.stride()), True, dtype)


def _cut(sizes: list[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Memory for tensors of these sizes, in one allocation."""
    return torch.split_with_sizes(torch.empty(sum(sizes), dtype=dtype, device=device), sizes)


def select(
    rows: Rows,
    largest: int,
    num: int,
    eps: float = 1.0,
    k: Tensor | None = None,
    number: float = 0.0,
    levels: Tensor | None = None,
    chosen: Tensor | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Indices [rows, num] of the largest scores of each row; solves for its level too, if asked.

    Args:
        rows: scores and mask.
        largest: how many to select, at least 1, ``num`` and ceil(k), at most n and ``LARGEST``.
        num: how many indices are wanted.
        eps: the temperature of the gates.
        k: the budget of each row, float64 [rows]; None for one number in all rows.
        number: that number.
        levels: filled with the shift and the level of each row and what saturated entries leave of its
            budget, float64 [3, rows].
        chosen: filled with the gates of the largest scores, [rows, num].
        straight_through: gates that are chosen are 1.
    """
    s, mask, strides, has_mask, dtype = rows
    count, n = s.shape
    cut = plan(n, largest)
    parts = min(cut.blocks, triton.cdiv(COLLECT_PROGRAMS, count))
    key_type = torch.int64 if dtype == tl.float64 else torch.int32
    # Cut from as few allocations as there are types, each part at a multiple of 16 bytes.
    candidates = count * cut.capacity
    sizes = [4 * count, count * cut.folds * cut.chunks, triton.cdiv(candidates, 4) * 4]
    if key_type == torch.int32:
        parts_of_rows = _cut(2 * sizes, key_type, s.device)
    else:
        parts_of_rows = _cut(sizes, key_type, s.device) + _cut(sizes, torch.int32, s.device)
    thresholds, chunk_keys, keys, counters, chunk_ids, ids = parts_of_rows
    ranked = torch.empty(candidates, dtype=compute_dtype(s.dtype), device=s.device)
    indices = torch.empty((count, num), dtype=torch.int64, device=s.device)
    sums = indices  # which nobody reads as sums
    if levels is not None:
        sums = torch.empty(count * 3 * parts, dtype=torch.int64, device=s.device)
    scale = math.log2(math.e) / eps

    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        selection_maxima_kernel[(count * cut.tiles,)](
            s,
            mask,
            chunk_keys,
            chunk_ids,
            counters,
            n,
            *strides,
            cut.tiles,
            cut.segments,
            HAS_MASK=has_mask,
            DTYPE=dtype,
            SEGMENT=SEGMENT,
            ROWS=cut.tile_rows,
            GROUP=cut.group,
            COUNTERS=COUNTERS,
            num_warps=cut.tile_warps,
        )
        selection_collect_kernel[(count * parts,)](
            s,
            mask,
            chunk_keys,
            chunk_ids,
            keys,
            ids,
            counters,
            thresholds,
            sums,
            n,
            *strides,
            cut.tiles,
            largest,
            cut.capacity,
            parts,
            cut.blocks,
            scale,
            HAS_MASK=has_mask,
            LEVEL=levels is not None,
            DTYPE=dtype,
            TILE_CHUNKS=SEGMENT // cut.group,
            FOLDS=cut.folds,
            CHUNKS=triton.next_power_of_2(cut.chunks),
            BLOCK=cut.block,
            COUNTERS=COUNTERS,
            num_warps=cut.warps,
        )
        # One block of candidates a program, with the usual number of them.
        rankers = min(triton.cdiv(largest + largest // 2, RANK_BLOCK), max(1, 1024 // count))
        sorted_at_once = triton.next_power_of_2(largest + largest // 4)
        if count < MANY_ROWS or dtype == tl.float64 or sorted_at_once > SHORT:
            sorted_at_once = 0
        selection_rank_kernel[(count * rankers,)](
            s,
            mask,
            keys,
            ids,
            counters,
            thresholds,
            sums,
            ranked,
            indices,
            chosen,
            k,
            levels,
            n,
            num,
            count,
            *strides,
            0 if k is None else k.stride(0),
            largest,
            cut.capacity,
            rankers,
            parts,
            number,
            eps,
            scale,
            HAS_MASK=has_mask,
            HAS_K=k is not None,
            LEVEL=levels is not None,
            CHOSEN=chosen is not None,
            STRAIGHT=straight_through,
            DTYPE=dtype,
            BLOCK=cut.block,
            RANKED=RANK_BLOCK,
            OTHERS=OTHERS,
            SORTED=sorted_at_once,
            SUMS=triton.next_power_of_2(parts),
            TOP=triton.next_power_of_2(largest),
            COUNTERS=COUNTERS,
            num_warps=cut.warps,
        )
    return indices


def sorts_whole_rows(s: Tensor) -> bool:
    """Whether one program sorts a row of ``s``."""
    return s.shape[-1] <= SHORT and s.dtype != torch.float64


def can_address(s: Tensor) -> bool:
    """Whether the rows of ``s`` are short enough for int32 indices within them."""
    return s.shape[-1] <= LONGEST


def can_select(s: Tensor, largest: int) -> bool:
    """Whether these kernels select the ``largest`` scores of each row of ``s``."""
    return sorts_whole_rows(s) or (can_address(s) and min(largest, s.shape[-1]) <= LARGEST)


def sort_block(n: int) -> tuple[int, int]:
    """The block in which a row of n entries is sorted, and the warps for it."""
    block = max(32, triton.next_power_of_2(n))
    return block, max(1, min(16, block // 128))


def top_block(num: int) -> int:
    """How many entries are selected at once, in order to have the first ``num``."""
    block: int = triton.next_power_of_2(num)
    return max(2, block)  # tl.topk does not select one before Triton 3.9


def top_indices(s: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """`xlroute.kernels.top_indices` where `can_select` says so, for k > 0."""
    rows = prepare_rows(s, mask)
    if not sorts_whole_rows(s):
        return select(rows, k, k).view(*s.shape[:-1], k)
    count, n = rows.s.shape
    indices = torch.empty((*s.shape[:-1], k), dtype=torch.int64, device=s.device)
    block, warps = sort_block(n)
    with torch.cuda.device_of(s):  # type: ignore[no-untyped-call]
        selection_short_kernel[(count,)](
            rows.s,
            rows.mask,
            indices,
            n,
            k,
            *rows.strides,
            HAS_MASK=rows.has_mask,
            BLOCK=block,
            TOP=top_block(k),
            num_warps=warps,
        )
    return indices
