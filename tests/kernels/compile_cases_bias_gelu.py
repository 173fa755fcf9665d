"""How the kernels of GELU and bias are called: dtypes and widths."""

from typing import Any

from xlroute.kernels import bias_gelu_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]


def cases(dtype: str, d: int) -> list[Case]:
    rows, width = kernels.block(d)
    constants = {"D": d, "BR": rows, "BD": width}
    found = []
    for kernel in (kernels.bias_gelu_fwd_kernel, kernels.bias_gelu_bwd_kernel):
        types = {
            name: f"*{dtype}" if name.startswith("p_") else "i32"
            for name in kernel.arg_names
            if name not in constants
        }
        if "p_parts" in types:
            types["p_parts"] = "*fp32"
        found.append((kernel, types, constants, 4))
    return found


CASES = [case for dtype, d in (("bf16", 2048), ("fp32", 5)) for case in cases(dtype, d)]
