"""How the kernel of unit projections is called: types, sets, widths, with TF32 and without."""

from typing import Any

import torch

from xlroute.kernels import projections_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def case(dtype: torch.dtype, r: int, e: int, d: int, tf32: bool) -> Case:
    kernel = kernels.unit_projections_kernel
    # A stride of 1 is a constant.
    constants = kernels.constants(r, e, d, dtype, tf32) | {"stride_oe": 1}
    types = {
        name: f"*{NAMES[dtype]}" if name.startswith("p_") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    types["p_projection"] = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    return kernel, types, constants, constants.pop("num_warps")


CASES = [
    case(*sizes)
    for sizes in (
        (torch.bfloat16, 1, 64, 512, False),
        (torch.bfloat16, 2, 64, 512, False),
        (torch.bfloat16, 4, 128, 2048, False),
        (torch.bfloat16, 3, 20, 333, False),
        (torch.float32, 2, 64, 512, False),
        (torch.float32, 1, 128, 300, True),
        (torch.float32, 4, 64, 512, True),
        (torch.float16, 4, 64, 512, False),
        (torch.float16, 1, 16, 256, True),
    )
]
