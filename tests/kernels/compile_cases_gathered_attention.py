"""How the kernels of attention to gathered rows are called: dtypes, sizes, with and without gated keys."""

from typing import Any

import torch

from xlroute.kernels import gathered_attention_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cases(dtype: torch.dtype, n: int, h: int, e: int, gate_keys: bool) -> list[Case]:
    found = []
    for kernel in (
        kernels.gathered_attention_fwd_kernel,
        kernels.gathered_attention_bwd_queries_kernel,
        kernels.gathered_attention_bwd_places_kernel,
    ):
        constants = kernels.constants(n, h, e, dtype, gate_keys)
        warps = constants.pop("num_warps")
        types = {name: "i32" for name in kernel.arg_names if name.islower()}
        types |= {name: f"*{NAMES[dtype]}" for name in types if name.startswith("p_")}
        types |= {name: "fp32" for name in ("scale", "factor") if name in types}
        types |= {name: "*fp32" for name in ("p_gates", "p_sums", "p_deltas") if name in types}
        types["p_indices"] = "*i64"
        found.append((kernel, types, constants, warps))
    return found


CASES = [
    case
    for dtype, n, h, e, gate_keys in (
        (torch.float32, 32, 4, 64, True),
        (torch.float32, 128, 1, 128, False),
        (torch.bfloat16, 32, 4, 64, False),
        (torch.bfloat16, 128, 8, 128, True),
    )
    for case in cases(dtype, n, h, e, gate_keys)
]
