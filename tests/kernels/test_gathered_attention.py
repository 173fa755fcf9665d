"""gathered_attention against attention to gathered rows in float64, and in Triton against that."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels import gather_keys_values, gathered_attention

# Said once a process by whatever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 is wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
INDICES = 4  # their place among the arguments


def inputs(
    b: int, m: int, c: int, r: int, k: int, h: int, e: int, n: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, keys, values, gates, indices, null key and null value."""
    keys, values = (
        torch.randn(b, m, r, h, e, dtype=torch.float64, device=DEVICE).to(dtype) for _ in range(2)
    )
    q = torch.randn(b * c, r * h, n, e, dtype=torch.float64, device=DEVICE).to(dtype)
    gates = torch.rand(b, c, r, k, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    # Some rows are chosen by many windows, others by none; some windows lack rows, and the last has none.
    indices = (torch.rand(b, c, r, k, device=DEVICE) ** 2 * (m + 1)).long() - 1
    indices[0, -1] = -1 if c > 1 else 0
    null_key, null_value = (torch.randn(r * h, 1, e, device=DEVICE).to(dtype) for _ in range(2))
    return [q, keys, values, gates, indices, null_key, null_value]


def formula(arguments: list[Tensor], gate_keys: bool) -> Tensor:
    q, keys, values, gates, indices, null_key, null_value = arguments
    k, v = gather_keys_values(
        keys, values, gates, indices, null_key, null_value, gate_keys=gate_keys, backend="torch"
    )
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    heads = keys.shape[3]
    hidden = F.pad(indices < 0, (1, 0)).flatten(0, 1).repeat_interleave(heads, 1)[:, :, None]
    return logits.masked_fill(hidden, -math.inf).softmax(-1) @ v


def with_gradients(arguments: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments, and those of them that are to have a gradient."""
    arguments = [t.detach().requires_grad_(i != INDICES) for i, t in enumerate(arguments)]
    return arguments, arguments[:INDICES] + arguments[INDICES + 1 :]


@pytest.mark.parametrize("gate_keys", [False, True])
def test_reference(gate_keys: bool) -> None:
    arguments, leaves = with_gradients(inputs(2, 7, 3, 2, 5, 2, 4, 3))
    out = gathered_attention(*arguments, gate_keys=gate_keys, backend="torch")
    expected = formula(arguments, gate_keys)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_keys", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 3, 2, 40, 2, 24, 20), (1, 1, 1, 1, 1, 1, 1, 1), (1, 6, 2, 2, 70, 1, 64, 5)],
    ids=str,
)
def test_triton(
    shape: tuple[int, ...], gate_keys: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("xlroute.kernels.gathered_attention_triton", exc_type=ImportError)
    monkeypatch.setattr(kernels, "MOST_QUERIES", 32)  # so that some queries take two programs
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    arguments, leaves = with_gradients(inputs(*shape, dtype=dtype))
    wide, wide_leaves = with_gradients(
        [t if i == INDICES else t.double() for i, t in enumerate(t.detach() for t in arguments)]
    )
    expected = formula(wide, gate_keys)
    out = gathered_attention(*arguments, gate_keys=gate_keys, backend="triton")
    assert out.dtype == dtype
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    wanted = torch.autograd.grad(expected, wide_leaves, cotangent.double())
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-7
    for given, exact in zip((out, *gradients), (expected, *wanted), strict=True):
        assert not given.isnan().any()
        assert (given - exact).norm() <= 8 * eps * (exact.norm() + 0.1 * cotangent.norm())


def test_a_stream_does_not_depend_on_its_neighbours() -> None:
    pytest.importorskip("triton")
    q, keys, values, gates, indices, *nulls = inputs(3, 9, 2, 2, 6, 1, 16, 4, torch.float32)
    together = gathered_attention(q, keys, values, gates, indices, *nulls, backend="triton")
    one = slice(1, 2)
    alone = gathered_attention(
        q[2:4], keys[one], values[one], gates[one], indices[one], *nulls, backend="triton"
    )
    assert torch.equal(together[2:4], alone)
    # Rows that are cut out of longer ones.
    fewer = [keys[:, :5], values[:, :5]]
    cut = gathered_attention(q, *fewer, gates, indices.clamp(max=4), *nulls, backend="triton")
    fewer = [t.contiguous() for t in fewer]
    assert torch.equal(
        cut, gathered_attention(q, *fewer, gates, indices.clamp(max=4), *nulls, backend="triton")
    )


def test_wide_heads_float64_and_nothing_run_the_reference() -> None:
    pytest.importorskip("triton")
    for shape, dtype in (
        ((1, 5, 2, 1, 3, 1, 129, 2), torch.float32),
        ((1, 5, 2, 1, 3, 1, 8, 2), torch.float64),
        ((1, 5, 2, 1, 3, 1, 8, 0), torch.float32),
        ((1, 5, 2, 1, 0, 1, 8, 2), torch.float32),
        ((0, 5, 2, 1, 3, 1, 8, 2), torch.float32),
    ):
        arguments = inputs(*shape, dtype=dtype) if shape[0] else inputs(1, *shape[1:], dtype=dtype)
        if not shape[0]:
            arguments = [t[:0] if i < 5 else t for i, t in enumerate(arguments)]
        given = gathered_attention(*arguments, backend="triton")
        torch.testing.assert_close(given, gathered_attention(*arguments, backend="torch"))


def test_an_index_out_of_range_stands_for_no_row() -> None:
    """Where nothing checks them, as on a GPU: above all, no other stream is read, or given a gradient."""
    pytest.importorskip("triton")
    arguments = inputs(2, 7, 2, 1, 5, 2, 16, 3, torch.float32)
    indices = arguments[INDICES].clamp(min=0)
    missing = torch.where(indices == 2, -1, indices)
    results = []
    for given in (torch.where(indices == 2, 7, indices), missing):
        arguments[INDICES] = given
        out, sums = torch.ops.xlroute.gathered_attention(*arguments, False)
        gradients = torch.ops.xlroute.gathered_attention_backward(out, *arguments, out, sums, False)
        laid = torch.ops.xlroute.gather_keys_values(*arguments[1:], False, "triton")
        results.append((out, *gradients, *laid))
    for wrong, expected in zip(*results, strict=True):
        assert torch.equal(wrong, expected)


def test_autocast_changes_nothing() -> None:
    arguments = inputs(1, 7, 2, 1, 5, 2, 16, 3, torch.float32)
    expected = gathered_attention(*arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(gathered_attention(*arguments), expected)


def test_opcheck() -> None:
    pytest.importorskip("triton")
    arguments, _ = with_gradients(inputs(1, 7, 2, 1, 5, 2, 16, 3, torch.float32))
    ops = torch.ops.xlroute
    torch.library.opcheck(ops.gathered_attention.default, (*arguments, True))
    arguments = [t.detach() for t in arguments]
    out, sums = ops.gathered_attention(*arguments, True)
    torch.library.opcheck(ops.gathered_attention_backward.default, (out, *arguments, out, sums, True))


def test_errors() -> None:
    q, *others = inputs(2, 7, 3, 2, 5, 2, 4, 3)
    with pytest.raises(ValueError, match=r"q must have shape \[6, 4, n, 4\], got \(5, 4, 3, 4\)"):
        gathered_attention(q[1:], *others)
    with pytest.raises(TypeError, match=r"q must have the dtype of keys, torch.float64, got torch.float32"):
        gathered_attention(q.float(), *others)
    with pytest.raises(ValueError, match=r"q must be on the device of keys, .*, got meta"):
        gathered_attention(q.to("meta"), *others)
    with pytest.raises(TypeError, match="null_key must be a floating-point tensor, got NoneType"):
        gathered_attention(q, *others[:4], None, others[-1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gates must have shape"):
        gathered_attention(q, *others[:2], others[2][..., 1:], *others[3:])
