"""How the kernels of the search are called: dtypes, widths, numbers of queries, with and without a mask."""

from typing import Any

import torch

from xlroute.kernels import search_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STRIDES = ("stride_kb", "stride_km", "stride_mb", "stride_mm")


def cases(dtype: torch.dtype, n: int, e: int, masked: bool, narrow: bool) -> list[Case]:
    keys, mask = torch.empty(1, 1, e, dtype=dtype), torch.empty(1, 1) if masked else None
    block = kernels.NARROW if narrow else kernels.group_of(keys)
    given = kernels.prepare_keys(keys, mask, block)
    first = given.constants | kernels.maxima_constants(n, given.keys) | {"DOT": kernels.DOT[dtype]}
    scores = given.constants | {"BE": kernels.scored_width(given.keys), "SCORED": kernels.SCORED}
    return [
        (kernel, types(kernel, dtype, masked), constants, constants.pop("num_warps", 4))
        for kernel, constants in (
            (kernels.search_maxima_kernel, first),
            (kernels.search_scores_kernel, scores),
        )
    ]


def types(kernel: Any, dtype: torch.dtype, masked: bool) -> dict[str, str]:
    tensors = {"p_maxima": "*fp32", "p_scores": "*fp32", "p_found": "*fp32"}
    tensors |= dict.fromkeys(("p_blocks", "p_chosen", "p_places", "p_indices"), "*i64")
    tensors |= {"p_mask": "*i1"} if masked else {}
    return {
        name: tensors.get(name, f"*{NAMES[dtype]}" if name.startswith("p_") else "i32")
        for name in kernel.arg_names
        if name.islower()
    }


def blocks_cases(groups: int, chosen: int, blocks: int) -> list[Case]:
    kernel, constants = kernels.search_blocks_kernel, kernels.blocks_constants(groups, chosen, blocks)
    return [(kernel, types(kernel, torch.float32, False), constants, constants.pop("num_warps"))]


FOUND = {"BK": kernels.FOUND, "BLOCK": 128}
CASES = [
    *(
        case
        for dtype, n, e, masked, narrow in (
            (torch.bfloat16, 1024, 64, False, False),
            (torch.bfloat16, 1024, 64, False, True),
            (torch.float16, 1, 200, True, True),
            (torch.bfloat16, 64, 512, False, True),
            (torch.float32, 1024, 64, True, True),
            (torch.float32, 64, 256, False, False),
        )
        for case in cases(dtype, n, e, masked, narrow)
    ),
    *(
        case
        for groups, chosen, blocks in ((512, 24, 4), (2048, 512, 4), (2048, 9, 2))
        for case in blocks_cases(groups, chosen, blocks)
    ),
    (kernels.search_found_kernel, types(kernels.search_found_kernel, torch.float32, False), FOUND, 1),
]
