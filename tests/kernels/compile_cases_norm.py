"""How the kernels of norms are called: dtypes, widths, and how many other gradients are added."""

from typing import Any

from xlroute.kernels import norm_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]


def cases(dtype: str, d: int, centered: bool, others: int) -> list[Case]:
    found = []
    for kernel, elements in (
        (kernels.norm_fwd_kernel, kernels.FORWARD),
        (kernels.norm_bwd_kernel, kernels.BACKWARD),
    ):
        types = {name: f"*{dtype}" if name.startswith("p_") else "i32" for name in kernel.arg_names}
        types |= {"p_stats": "*fp32", "p_parts": "*fp32", "eps": "fp32"}
        rows, width, warps = kernels.block(d, elements)
        constants = {
            "D": d,
            "BR": rows,
            "BD": width,
            "OTHERS": others,
            "CENTERED": centered,
            "HAS_BIAS": centered,
        }
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
        found.append((kernel, arguments, constants, warps))
    return found


CASES = [
    case
    for dtype, d, centered, others in (
        ("bf16", 512, False, 1),
        ("bf16", 512, True, 3),
        ("fp32", 8192, True, 3),
        ("fp16", 5, False, 0),
    )
    for case in cases(dtype, d, centered, others)
]
