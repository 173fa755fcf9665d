"""How the kernels of the water level are called: dtypes, masks, short rows and long ones."""

from typing import Any

import triton.language as tl

from xlroute.kernels import selection_triton
from xlroute.kernels import water_level_triton as kernels


def cases(dtype: str, masked: bool) -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    wide = dtype == "fp64"
    names = (
        "n",
        "num",
        "rows",
        "inner",
        "stride_m0",
        "stride_m1",
        "stride_mn",
        "stride_k",
        "blocks",
        "spans",
        "span",
    )
    types = dict.fromkeys(names, "i32") | {
        "p_s": f"*{dtype}",
        "p_mask": "*i1" if masked else f"*{dtype}",
        "p_grad": f"*{dtype}",
        "p_gates": f"*{dtype}",
        "p_ds": f"*{dtype}",
        "p_indices": "*i64",
        "p_k": "*fp64",
        "p_dk": "*fp64",
        "p_levels": "*fp64",
        "p_sums": "*fp64",
        "stride_s": "i64",
        "stride_g": "i64",
        "number": "fp64",
        "eps": "fp64",
        "scale": "fp64",
    }
    common = {"HAS_MASK": masked, "DTYPE": tl.float64 if wide else tl.float32}
    backward = common | {"BLOCK": kernels.BACKWARD_BLOCK}
    found = [
        (kernels.water_level_fwd_kernel, common | {"BLOCK": kernels.BLOCK}, 8),
        (kernels.water_level_bwd_sums_kernel, backward, 8),
        (kernels.water_level_bwd_kernel, backward | {"WHOLE_ROWS": False, "SPANS": kernels.MAX_SPANS}, 8),
        (kernels.water_level_bwd_kernel, backward | {"WHOLE_ROWS": True, "SPANS": 1}, 8),
        (kernels.chosen_bwd_budget_kernel, {"DTYPE": common["DTYPE"], "BLOCK": 1024}, 8),
        (kernels.chosen_bwd_kernel, backward | {"WHOLE_ROWS": False, "INDICES": 1024}, 8),
        (kernels.chosen_bwd_kernel, backward | {"WHOLE_ROWS": True, "INDICES": 64}, 8),
    ]
    if not wide:
        for n in (32, 1000, selection_triton.SHORT):
            block, warps = selection_triton.sort_block(n)
            short = {"HAS_MASK": masked, "HAS_K": masked, "STRAIGHT": masked, "BLOCK": block}
            for chosen in (False, True):
                found.append((kernels.water_level_short_fwd_kernel, short | {"CHOSEN": chosen}, warps))
    return [
        (kernel, {name: types[name] for name in kernel.arg_names if name in types}, constants, warps)
        for kernel, constants, warps in found
    ]


CASES = [
    case
    for dtype, masked in (("fp32", False), ("bf16", True), ("fp64", True))
    for case in cases(dtype, masked)
]
