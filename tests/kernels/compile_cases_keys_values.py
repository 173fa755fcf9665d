"""How the kernels of keys and values are called: dtypes, with and without a null key and gated keys."""

from typing import Any

import triton
import triton.language as tl

from xlroute.kernels import keys_values_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]


def cases(dtype: str, h: int, e: int, gate_keys: bool) -> list[Case]:
    wide = dtype == "fp64"
    forward, backward = kernels.keys_values_fwd_kernel, kernels.keys_values_bwd_kernel
    gathered = kernels.gathered_keys_values_bwd_kernel
    names = forward.arg_names + backward.arg_names + gathered.arg_names
    types = {name: f"*{dtype}" if name.startswith("p_") else "i32" for name in names if name.islower()}
    types |= dict.fromkeys(("p_gates", "p_dgates"), "*fp64" if wide else "*fp32")
    types |= dict.fromkeys(("p_indices", "p_order", "p_starts"), "*i64")
    common = {"H": h, "E": e, "GATE_KEYS": gate_keys, "ACC": tl.float64 if wide else tl.float32}
    found = []
    for indexed in (False, True):
        rows, width = kernels.block(e, kernels.ELEMENTS)
        blocks = {"BK": rows, "BE": width, "INDEXED": indexed, "HAS_NULL_KEY": not gate_keys}
        found.append((forward, common | blocks, 4))
    rows, width = kernels.block(e, kernels.ELEMENTS // 4)
    found.append((backward, common | {"BK": rows, "BE": width}, 4))
    heads, width = triton.next_power_of_2(h), triton.next_power_of_2(e)
    taken = max(1, min(16, kernels.SUMMED // (heads * width * (2 if dtype == "bf16" else 4))))
    found.append((gathered, common | {"HEADS": heads, "BE": width, "TAKEN": taken}, 2))
    return [
        (kernel, {name: types[name] for name in kernel.arg_names if name in types}, constants, warps)
        for kernel, constants, warps in found
    ]


CASES = [
    case
    for dtype, h, e, gate_keys in (("bf16", 4, 64, False), ("fp32", 8, 128, True), ("fp64", 1, 1, True))
    for case in cases(dtype, h, e, gate_keys)
]
