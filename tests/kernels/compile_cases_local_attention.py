"""How the kernels of local attention are called: dtypes, widths of heads, with and without a mask."""

from typing import Any

import torch

from xlroute.kernels import local_attention_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cases(dtype: torch.dtype, e: int, causal: bool, masked: bool) -> list[Case]:
    found = []
    for kernel in (
        kernels.local_attention_fwd_kernel,
        kernels.local_attention_bwd_queries_kernel,
        kernels.local_attention_bwd_keys_kernel,
    ):
        backward = kernel is not kernels.local_attention_fwd_kernel
        constants = kernels.constants(e, dtype, causal, masked, backward=backward)
        warps = constants.pop("num_warps")
        types = {name: "i32" for name in kernel.arg_names if name.islower()}
        types |= {name: f"*{NAMES[dtype]}" for name in types if name.startswith("p_")}
        types |= {name: "fp32" for name in ("scale", "factor") if name in types}
        types |= {name: "*fp32" for name in ("p_sums", "p_deltas") if name in types}
        if masked:
            types["p_mask"] = "*i1"
        found.append((kernel, types, constants, warps))
    return found


CASES = [
    case
    for dtype, e, causal, masked in (
        (torch.float32, 64, True, False),
        (torch.float32, 128, False, True),
        (torch.bfloat16, 64, False, False),
        (torch.bfloat16, 128, True, True),
        (torch.float16, 5, True, True),
    )
    for case in cases(dtype, e, causal, masked)
]
