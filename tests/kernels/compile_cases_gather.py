"""How the kernels of gather and scatter are called: dtypes, with and without gates and rows."""

from typing import Any

import triton.language as tl

from xlroute.kernels import gather_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

SIZES = ("total", "k", "per_set", "m", "n", "tiles", "other_from", "stride_m", "stride_n")


def cases(dtype: str, d: int) -> list[Case]:
    names = ("p_x", "p_rows", "p_grad", "p_result", "p_base", "p_drows")
    types = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(SIZES, "i32") | {"stride_b": "i64"}
    types |= {
        "p_indices": "*i64",
        "p_places": "*i64",
        "p_counts": "*i64",
        "p_gates": "*fp32",
        "p_chosen": "*fp32",
        "p_dgates": "*fp32",
    }
    rows, width = kernels.gather_block(d)
    acc = tl.float64 if dtype == "fp64" else tl.float32
    gather = {"D": d, "BK": rows, "BD": width, "ACC": acc, "stride_d": 1}
    scatter = {"D": d, "BN": kernels.SCATTER_ROWS, "BK": kernels.INDICES // 2, "BD": kernels.scatter_width(d)}
    scatter |= {"ACC": acc, "stride_d": 1}
    return [
        (kernels.gather_rows_fwd_kernel, types, gather | {"GATED": True, "STRAIGHT": True}, 4),
        (
            kernels.gather_rows_fwd_kernel,
            types,
            gather | {"GATED": False, "STRAIGHT": False, "p_gates": None},
            4,
        ),
        (kernels.gather_rows_apart_kernel, types, gather | {"VEC": 16 // int(dtype[-2:]) * 8}, 4),
        (kernels.gather_rows_bwd_kernel, types, {"D": d, "BK": kernels.INDICES, "BD": width, "ACC": acc}, 4),
        (kernels.scatter_rows_bwd_kernel, types, {"D": d, "BK": rows, "BD": width, "ACC": acc}, 4),
        (
            kernels.scatter_rows_kernel,
            types | dict.fromkeys(("p_other", "p_residual"), f"*{dtype}"),
            scatter | dict.fromkeys(("HAS_ROWS", "GATED", "ADD", "HAS_OTHER", "HAS_RESIDUAL"), True),
            4,
        ),
        (
            kernels.scatter_rows_kernel,
            types,
            scatter
            | dict.fromkeys(("HAS_ROWS", "GATED", "ADD", "HAS_OTHER", "HAS_RESIDUAL"), False)
            | dict.fromkeys(("p_rows", "p_gates", "p_other", "p_residual")),
            4,
        ),
    ]


def used(case: Case) -> Case:
    """The case with the arguments that its kernel takes, and no others."""
    kernel, types, constants, num_warps = case
    names = kernel.arg_names
    types = {name: types[name] for name in names if name in types and name not in constants}
    return kernel, types, {name: constants[name] for name in names if name in constants}, num_warps


CASES = [used(case) for dtype, d in (("bf16", 512), ("fp32", 1), ("fp64", 1500)) for case in cases(dtype, d)]
