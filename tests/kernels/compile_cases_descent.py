"""How the kernels of coordinate descent are called: rows and tiles, masks and dtypes."""

import itertools
from typing import Any

import torch
import triton

from xlroute.kernels import descent_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int] | tuple[Any, dict[str, str], dict[str, Any], int, int]

SCALARS = {"p_k", "p_state", "p_top", "p_parts", "p_parts_out", "p_dk"}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def signature(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, str]:
    """The types of a kernel's arguments for scores of a dtype, in the order of the arguments."""
    found = {}
    for name in kernel.arg_names:
        if name in constants:
            found[name] = "constexpr"
        elif name in SCALARS:
            found[name] = "*fp64"
        elif name == "p_mask":
            found[name] = "*i1" if constants["HAS_MASK"] else f"*{TYPES[dtype]}"
        elif name == "p_words":
            found[name] = "*i64"
        elif name == "p_terms":
            found[name] = f"*{TYPES[kernels.compute_dtype(dtype)]}"
        elif name.startswith("p_"):
            found[name] = f"*{TYPES[dtype]}"
        elif name.startswith(("eps", "inverse", "log_")):
            found[name] = "fp64"
        else:
            found[name] = "i32"
    return found


def case(
    kernel: Any, block: kernels.Block, dtype: torch.dtype, masked: bool, capability: int = 80, **more: Any
) -> Case:
    """A kernel on contiguous scores: strides of 1 are constants, as they are in a call."""
    ones = {name: 1 for name in ("stride_n", "stride_grad_n", "stride_mask_n") if name in kernel.arg_names}
    constants = {
        **ones,
        "HAS_MASK": masked,
        "DTYPE": kernels.TRITON_DTYPE[kernels.compute_dtype(dtype)],
        "E": block.depth,
        "C": block.columns,
        **more,
    }
    return kernel, signature(kernel, dtype, constants), constants, block.warps, capability


def row_cases(n: int, dtype: torch.dtype, masked: bool) -> list[Case]:
    found = []
    for kernel, largest in (
        (kernels.coordinate_descent_rows_fwd_kernel, kernels.LARGEST_ROW),
        (kernels.coordinate_descent_rows_bwd_kernel, kernels.LARGEST_ROW_BACKWARD),
    ):
        block = kernels.row_block(n, kernels.compute_dtype(dtype), largest)
        if block is not None:
            found.append(case(kernel, block, dtype, masked, BR=block.rows))
    return found


def tile_cases(n: int, dtype: torch.dtype, masked: bool) -> list[Case]:
    wide = kernels.compute_dtype(dtype)
    block, n_blocks, n_tiles = kernels.tile_block(n, wide, kernels.TILE)
    one = {"n_blocks": 1} if n_blocks == 1 else {}
    sums = {"BP": triton.next_power_of_2(n_tiles), **one}
    found = [case(kernels.coordinate_descent_tiles_survey_fwd_kernel, block, dtype, masked, **one)]
    for first, last in ((True, False), (False, False), (False, True)):
        flags = {"FIRST": first, "LAST": last, **sums}
        found.append(case(kernels.coordinate_descent_tiles_fwd_kernel, block, dtype, masked, **flags))
    if wide == torch.float32 and n_blocks == 1:
        grid = {"BP": triton.next_power_of_2(n_tiles)}
        found.append(case(kernels.coordinate_descent_grid_fwd_kernel, block, dtype, masked, **grid))
    block, n_blocks, n_tiles = kernels.tile_block(n, wide, kernels.TILE_BACKWARD)
    one = {"n_blocks": 1} if n_blocks == 1 else {}
    terms = {"BT": kernels.TERMS_AT_ONCE, **one}
    found.append(case(kernels.coordinate_descent_tiles_sum_bwd_kernel, block, dtype, masked, **terms))
    sums = {"BP": triton.next_power_of_2(n_tiles), **one}
    found.append(case(kernels.coordinate_descent_tiles_bwd_kernel, block, dtype, masked, **sums))
    return found


CASES = [
    *itertools.chain.from_iterable(row_cases(n, torch.float32, False) for n in (1, 64, 512, 8192, 32768)),
    *row_cases(1000, torch.bfloat16, True),
    *itertools.chain.from_iterable(row_cases(n, torch.float64, True) for n in (64, 4096)),
    *tile_cases(1 << 17, torch.float32, False),
    *tile_cases(1 << 27, torch.bfloat16, True),
    *tile_cases(100_000, torch.float64, True),
]
