"""How the kernels of products with gathered rows, and of sums of them, are called."""

from typing import Any

import torch
import triton

from xlroute.kernels import gathered_products_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cases(dtype: torch.dtype, h: int, d: int) -> list[Case]:
    found = []
    for kernel in (
        kernels.gathered_products_kernel,
        kernels.gathered_sums_kernel,
        kernels.gathered_row_sums_kernel,
    ):
        constants = kernels.constants(h, d, dtype)
        warps = constants.pop("num_warps")
        if kernel is kernels.gathered_row_sums_kernel:
            width = min(triton.next_power_of_2(d), kernels.WIDEST)
            constants = {"H": h, "D": d, "BH": triton.next_power_of_2(h), "BD": width}
        types = {name: "i32" for name in kernel.arg_names if name.islower()}
        types |= {name: f"*{NAMES[dtype]}" for name in types if name.startswith("p_")}
        types |= {name: "*fp32" for name in ("p_weights", "p_products") if name in types}
        types |= {name: "*i64" for name in ("p_indices", "p_named", "p_order", "p_ends") if name in types}
        found.append((kernel, types, constants, warps))
    return found


CASES = [
    case
    for dtype, h, d in (
        (torch.float32, 1, 64),
        (torch.float32, 4, 512),
        (torch.bfloat16, 4, 512),
        (torch.bfloat16, 16, 1024),
        (torch.float16, 3, 40),
    )
    for case in cases(dtype, h, d)
]
