"""How the kernels of the selection are called: dtypes, masks, and how many of 2 x 1,048,576 they select."""

from typing import Any

import triton
import triton.language as tl

from xlroute.kernels import selection_triton as kernels

N = 1 << 20


def row_arguments(dtype: str, masked: bool) -> dict[str, str]:
    """Scores and mask, with their strides."""
    sizes = ("n", "inner", "stride_m0", "stride_m1", "stride_mn")
    return {
        "p_s": f"*{dtype}",
        "p_mask": "*i1" if masked else f"*{dtype}",
        "stride_s": "i64",
    } | dict.fromkeys(sizes, "i32")


def cases(dtype: str, masked: bool, largest: int) -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    wide = dtype == "fp64"
    key = "*i64" if wide else "*i32"
    rows = row_arguments(dtype, masked)
    common = {"HAS_MASK": masked, "DTYPE": tl.float64 if wide else tl.float32}
    cut = kernels.plan(N, largest)
    counts = dict.fromkeys(("tiles", "largest", "capacity", "parts", "blocks", "sums", "num", "rows"), "i32")
    shared = {"p_keys": key, "p_ids": "*i32", "p_counters": "*i32", "p_thresholds": key, "p_sums": "*i64"}
    found = []
    for group in (1, 2, 4):
        found.append(
            (
                kernels.selection_maxima_kernel,
                rows
                | {"p_keys": key, "p_ids": "*i32", "p_counters": "*i32", "tiles": "i32", "segments": "i32"},
                common
                | {
                    "SEGMENT": kernels.SEGMENT,
                    "ROWS": kernels.SEGMENT_ROWS,
                    "GROUP": group,
                    "COUNTERS": kernels.COUNTERS,
                },
                8,
            )
        )
    for level in (False, True):
        found.append(
            (
                kernels.selection_collect_kernel,
                rows | counts | shared | {"p_chunk_keys": key, "p_chunk_ids": "*i32", "scale": "fp64"},
                common
                | {
                    "LEVEL": level,
                    "TILE_CHUNKS": kernels.SEGMENT // cut.group,
                    "FOLDS": cut.folds,
                    "CHUNKS": triton.next_power_of_2(cut.chunks),
                    "BLOCK": kernels.BLOCK,
                    "COUNTERS": kernels.COUNTERS,
                },
                cut.warps,
            )
        )
        results = {
            "p_sorted": "*fp64" if wide else "*fp32",
            "p_indices": "*i64",
            "p_chosen": "*fp64" if wide else "*fp32",
            "p_k": "*fp64",
            "p_levels": "*fp64",
        }
        found.append(
            (
                kernels.selection_rank_kernel,
                rows
                | counts
                | shared
                | results
                | {"stride_k": "i32", "number": "fp64", "eps": "fp64", "scale": "fp64"},
                common
                | {
                    "HAS_K": level and masked,
                    "LEVEL": level,
                    "CHOSEN": level,
                    "STRAIGHT": largest > 64,
                    "BLOCK": kernels.BLOCK,
                    "RANKED": kernels.RANK_BLOCK,
                    "OTHERS": kernels.OTHERS,
                    "SORTED": 2048 if dtype == "fp32" and largest <= 2048 else 0,
                    "SUMS": triton.next_power_of_2(kernels.COLLECT_PROGRAMS // 2),
                    "TOP": triton.next_power_of_2(largest),
                    "COUNTERS": kernels.COUNTERS,
                },
                cut.warps,
            )
        )
    if not wide:
        for n in (32, 1000, kernels.SHORT):
            block, warps = kernels.sort_block(n)
            found.append(
                (
                    kernels.selection_short_kernel,
                    rows | {"p_indices": "*i64", "num": "i32"},
                    {"HAS_MASK": masked, "BLOCK": block, "TOP": min(block, kernels.top_block(largest))},
                    warps,
                )
            )
    return [(kernel, keep(kernel, types), constants, warps) for kernel, types, constants, warps in found]


def keep(kernel: Any, types: dict[str, str]) -> dict[str, str]:
    """The types of the arguments that a kernel has."""
    return {name: types[name] for name in kernel.arg_names if name in types}


CASES = [
    case
    for dtype, masked, largest in (
        ("fp32", False, 1152),
        ("bf16", True, 64),
        ("fp64", True, 1152),
        ("fp32", False, kernels.LARGEST),
    )
    for case in cases(dtype, masked, largest)
]
