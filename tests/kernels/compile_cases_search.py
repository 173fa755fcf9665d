"""How the kernels of the search are called: dtypes, widths, numbers of queries, with and without a mask."""

from typing import Any

import torch

from xlroute.kernels import search_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STRIDES = ("stride_kb", "stride_km", "stride_mb", "stride_mm")


def cases(dtype: torch.dtype, n: int, e: int, masked: bool) -> list[Case]:
    given = kernels.prepare_keys(torch.empty(1, 1, e, dtype=dtype), torch.empty(1, 1) if masked else None)
    first = given.constants | kernels.maxima_constants(n, given.keys) | {"DOT": kernels.DOT[dtype]}
    scores = given.constants | {"BE": kernels.scored_width(given.keys)}
    return [
        (kernel, types(kernel, dtype, masked), constants, constants.pop("num_warps", 4))
        for kernel, constants in (
            (kernels.search_maxima_kernel, first),
            (kernels.search_scores_kernel, scores),
        )
    ]


def types(kernel: Any, dtype: torch.dtype, masked: bool) -> dict[str, str]:
    tensors = {"p_maxima": "*fp32", "p_scores": "*fp32", "p_found": "*fp32"}
    tensors |= dict.fromkeys(("p_blocks", "p_places", "p_indices"), "*i64")
    tensors |= {"p_mask": "*i1"} if masked else {}
    return {
        name: tensors.get(name, f"*{NAMES[dtype]}" if name.startswith("p_") else "i32")
        for name in kernel.arg_names
        if name.islower()
    }


FOUND = {"BK": kernels.FOUND, "BLOCK": 128}
CASES = [
    case
    for dtype, n, e, masked in (
        (torch.bfloat16, 1024, 64, False),
        (torch.float16, 1, 200, True),
        (torch.bfloat16, 64, 512, False),
        (torch.float32, 1024, 64, True),
        (torch.float32, 64, 256, False),
    )
    for case in cases(dtype, n, e, masked)
] + [(kernels.search_found_kernel, types(kernels.search_found_kernel, torch.float32, False), FOUND, 1)]
