"""How the kernels of the row scores are called: dtypes, few and many tokens, narrow and wide rows."""

from typing import Any

import triton
import triton.language as tl

from xlroute.kernels import scoring_triton as kernels

Case = tuple[Any, dict[str, str], dict[str, Any], int]

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
PARTS = {"bf16": 1, "fp16": 2, "fp32": 3}
SIZES = ("m", "tiles", "span", "programs", "per_stream", "stride_sr", "stride_ib")
STRIDES = ("stride_b", "stride_m", "stride_sb")


def arguments(dtype: str) -> dict[str, str]:
    """All that the kernels take besides compile-time constants."""
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    names = ("p_tokens", "p_scores", "p_inverse", "p_grad", "p_partial", "p_result")
    types = dict.fromkeys(names, wide) | dict.fromkeys(SIZES, "i32") | dict.fromkeys(STRIDES, "i64")
    return types | {"p_rows": f"*{dtype}", "p_parts": "*bf16", "scale": "fp64"}


def few(dtype: str, d: int, r: int) -> list[Case]:
    """Without tensor cores."""
    acc = tl.float64 if dtype == "fp64" else tl.float32
    rows, width, pieces = kernels.plan(d, r, ITEMSIZE[dtype])
    common = {"D": d, "R": r, "GROUP": min(r, kernels.FEW_TOKENS), "ACC": acc}
    forward = {"COUNT": d, "EPS": 1e-6, "BM": rows, "BD": width, "PIECES": pieces}
    vector = {"VEC": kernels.VECTOR // ITEMSIZE[dtype]}
    rows, width = kernels.backward_block(d, r, ITEMSIZE[dtype])
    backward = {"BM": rows, "BD": width, "WARPS": 4, "stride_d": 1}
    return [
        (kernels.row_scores_fwd_kernel, arguments(dtype), common | forward | vector, 4),
        (kernels.row_scores_bwd_tokens_kernel, arguments(dtype), common | backward, 4),
    ]


def many(dtype: str, d: int, r: int) -> list[Case]:
    """On the tensor cores."""
    padded = triton.cdiv(d, kernels.DOT_WIDTH) * kernels.DOT_WIDTH
    rows = kernels.DOT_ROWS * 2 // ITEMSIZE[dtype]
    group = kernels.dot_group(r)
    common = {"D": d, "R": r, "GROUP": group, "ROW_PARTS": PARTS[dtype], "DOT": tl.bfloat16}
    forward = {"COUNT": d, "EPS": 1e-6, "DP": padded, "RP": group, "TOKEN_PARTS": 3}
    blocks = {"BM": rows, "BD": kernels.DOT_WIDTH, "VEC": kernels.VECTOR // ITEMSIZE[dtype]}
    backward = {
        "BM": kernels.DOT_WIDTH,
        "BD": kernels.dot_backward_width(d, r, PARTS[dtype]),
        "stride_d": 1,
    }
    return [
        (kernels.row_scores_dot_fwd_kernel, arguments(dtype), common | forward | blocks, rows // 16),
        (kernels.row_scores_dot_bwd_tokens_kernel, arguments(dtype), common | backward, 8),
    ]


def of_rows(dtype: str, d: int, r: int) -> Case:
    """The gradient of the rows."""
    rows, width = kernels.backward_rows_block(d, ITEMSIZE[dtype])
    types = arguments(dtype) | {"p_result": f"*{dtype}"}
    acc = tl.float64 if dtype == "fp64" else tl.float32
    constants = {"D": d, "R": r, "COUNT": d, "BM": rows, "BD": width, "ACC": acc, "stride_d": 1}
    return kernels.row_scores_bwd_rows_kernel, types, constants, 4


def shared(r: int) -> list[Case]:
    """The parts of the tokens, and the sum over the programs."""
    split = {"D": 500, "R": r, "DP": 512, "RP": kernels.dot_group(r), "PARTS": 3, "BD": 512}
    reduce = {"N": r * 500, "BP": 128, "BN": 32, "ACC": tl.float32}
    return [
        (kernels.row_scores_split_kernel, arguments("bf16"), split, 4),
        (kernels.row_scores_bwd_reduce_kernel, arguments("bf16"), reduce, 4),
    ]


def used(case: Case) -> Case:
    """The case with the arguments that its kernel takes, and no others."""
    kernel, types, constants, num_warps = case
    names = kernel.arg_names
    types = {name: types[name] for name in names if name in types and name not in constants}
    return kernel, types, {name: constants[name] for name in names if name in constants}, num_warps


CASES = [
    used(case)
    for case in [
        *few("bf16", 512, 2),
        *few("bf16", 4096, 4),
        *few("fp16", 20, 1),
        *few("fp32", 768, 4),
        *few("fp64", 512, 33),
        *many("bf16", 512, 16),
        *many("bf16", 768, 64),
        *many("fp16", 20, 33),
        *many("fp32", 512, 32),
        of_rows("bf16", 512, 2),
        of_rows("fp32", 4096, 32),
        of_rows("fp64", 20, 2),
        *shared(33),
    ]
]
