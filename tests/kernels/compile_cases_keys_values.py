"""How the kernels of keys and values are called: dtypes, with and without a null key and gated keys."""

from typing import Any

import triton.language as tl

from xlroute.kernels import keys_values_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]


def cases(dtype: str, h: int, e: int, gate_keys: bool) -> list[Case]:
    wide = dtype == "fp64"
    forward, backward = kernels.keys_values_fwd_kernel, kernels.keys_values_bwd_kernel
    types = {name: f"*{dtype}" for name in forward.arg_names + backward.arg_names if name.startswith("p_")}
    types |= dict.fromkeys(("p_gates", "p_dgates"), "*fp64" if wide else "*fp32")
    types |= dict.fromkeys(("places", "tiles", "sets"), "i32")
    found = []
    for kernel, elements in ((forward, kernels.ELEMENTS), (backward, kernels.ELEMENTS // 4)):
        rows, width = kernels.block(e, elements)
        constants = {"H": h, "E": e, "GATE_KEYS": gate_keys, "BK": rows, "BE": width}
        constants["ACC"] = tl.float64 if wide else tl.float32
        if kernel is forward:
            constants["HAS_NULL_KEY"] = not gate_keys
        names = {name: types[name] for name in kernel.arg_names if name in types}
        found.append((kernel, names, constants, 4))
    return found


CASES = [
    case
    for dtype, h, e, gate_keys in (("bf16", 4, 64, False), ("fp32", 8, 128, True), ("fp64", 1, 1, True))
    for case in cases(dtype, h, e, gate_keys)
]
