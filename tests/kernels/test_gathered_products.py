"""gathered_products and gathered_sums against gathered rows in float64, and in Triton against that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import gather_rows, gathered_products, gathered_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 is wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
OPS = pytest.mark.parametrize("op", [gathered_products, gathered_sums], ids=lambda op: op.__name__)

Op = Callable[..., Tensor]


def inputs(
    op: Op, b: int, m: int, n: int, h: int, k: int, d: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Vectors or weights, rows and indices."""
    first = torch.randn(b, n, h, d if op is gathered_products else k, dtype=torch.float64, device=DEVICE)
    rows = torch.randn(b, m, d, dtype=torch.float64, device=DEVICE)
    # Some rows are gathered by many places, others by none; some places lack rows, and the last has none.
    indices = (torch.rand(b, n, k, device=DEVICE) ** 2 * (m + 1)).long() - 1
    indices[:, -1] = -1 if n > 1 else 0
    return [first.to(dtype), rows.to(dtype), indices]


def formula(op: Op, first: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    gathered = gather_rows(rows, indices, backend="torch")
    return first @ (gathered.mT if op is gathered_products else gathered)


def with_gradients(arguments: list[Tensor]) -> list[Tensor]:
    first, rows, indices = (t.detach() for t in arguments)
    return [first.requires_grad_(), rows.requires_grad_(), indices]


@OPS
def test_reference(op: Op) -> None:
    arguments = with_gradients(inputs(op, 2, 7, 5, 3, 4, 6))
    out, expected = op(*arguments, backend="torch"), formula(op, *arguments)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, arguments[:2], cotangent),
        torch.autograd.grad(expected, arguments[:2], cotangent),
    )


@OPS
def test_derivatives(op: Op) -> None:
    first, rows, indices = inputs(op, 1, 4, 3, 2, 2, 3)

    def of(first: Tensor, rows: Tensor) -> Tensor:
        return op(first, rows, indices, backend="torch")

    arguments = (first.requires_grad_(), rows.requires_grad_())
    assert torch.autograd.gradcheck(of, arguments)
    assert torch.autograd.gradgradcheck(of, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 4, 3, 40, 24), (1, 1, 1, 1, 1, 1), (1, 20, 2, 17, 5, 300)],
    ids=str,
)
@OPS
def test_triton(op: Op, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    arguments = with_gradients(inputs(op, *shape, dtype=dtype))
    wide = with_gradients([t.double() if t.is_floating_point() else t for t in arguments])
    out, expected = op(*arguments, backend="triton"), formula(op, *wide)
    assert out.dtype == (torch.float32 if op is gathered_products else dtype)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, arguments[:2], cotangent, create_graph=True)
    wanted = torch.autograd.grad(expected, wide[:2], cotangent.double(), create_graph=True)
    # And once more, through both.
    twice = torch.autograd.grad([g.float().square().sum() for g in gradients], arguments[:2])
    wanted_twice = torch.autograd.grad([g.square().sum() for g in wanted], wide[:2])
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-7
    for given, exact in zip((out, *gradients, *twice), (expected, *wanted, *wanted_twice), strict=True):
        assert not given.isnan().any()
        assert (given - exact).norm() <= 8 * eps * exact.norm() + 1e-6


@OPS
def test_rows_that_are_a_view(op: Op) -> None:
    pytest.importorskip("triton")
    first, rows, indices = inputs(op, 2, 12, 4, 2, 6, 20, torch.float32)
    indices = indices.clamp(max=4)
    for view in (
        rows[:, 3:8],
        rows[:, ::2][:, :5],
        rows.mT.contiguous().mT[:, :5],
        rows[:1].expand(2, -1, -1),
    ):
        expected = op(first, view.contiguous(), indices, backend="triton")
        assert torch.equal(op(first, view, indices, backend="triton"), expected)


@OPS
@pytest.mark.parametrize("shape", [(3, 9, 1, 2, 5, 16), (3, 9, 5, 2, 1, 16), (2, 9, 4, 2, 3, 16)], ids=str)
def test_indices_that_are_a_view(op: Op, shape: tuple[int, ...]) -> None:
    """Also where they lie stream beside stream, and what is computed of them may keep their strides."""
    pytest.importorskip("triton")
    first, rows, indices = with_gradients(inputs(op, *shape, dtype=torch.float32))
    cotangent = torch.randn_like(op(first, rows, indices))
    results = []
    for given in (indices, indices.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        out = op(first, rows, given, backend="triton")
        results.append((out, *torch.autograd.grad(out, (first, rows), cotangent)))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@OPS
def test_an_index_out_of_range_stands_for_no_row(op: Op) -> None:
    """Where nothing checks them, as on a GPU: above all, no other stream is read, or given a gradient."""
    pytest.importorskip("triton")
    first, rows, indices = inputs(op, 2, 7, 3, 2, 5, 16, torch.float32)
    indices = indices.clamp(min=0)
    raw = getattr(torch.ops.xlroute, op.__name__)
    vectors = first if op is gathered_products else torch.randn(2, 3, 2, 16, device=DEVICE)
    weights = torch.randn(2, 3, 2, 5, device=DEVICE)
    results = [
        (
            raw(first, rows, given, "triton"),
            torch.ops.xlroute.gathered_row_sums(weights, vectors, given, 7, "triton"),
        )
        for given in (torch.where(indices == 2, 7, indices), torch.where(indices == 2, -1, indices))
    ]
    for wrong, expected in zip(*results, strict=True):
        assert torch.equal(wrong, expected)


@OPS
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "shape", [(0, 5, 2, 1, 3, 8), (1, 5, 0, 1, 3, 8), (1, 5, 2, 1, 0, 8), (1, 0, 2, 1, 3, 8)]
)
def test_nothing(op: Op, shape: tuple[int, ...], backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    first, rows, indices = inputs(op, *(max(1, size) for size in shape), dtype=torch.float32)
    b, m, n, _, k, _ = shape
    arguments = with_gradients(
        [
            first[:b, :n] if op is gathered_products else first[:b, :n, :, :k],
            rows[:b, :m],
            indices[:b, :n, :k] if m else torch.full((b, n, k), -1, device=DEVICE),
        ]
    )
    out = op(*arguments, backend=backend)
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), arguments[:2]):
        assert not gradient.any()


@OPS
def test_autocast_changes_nothing(op: Op) -> None:
    arguments = inputs(op, 1, 7, 2, 1, 5, 16, torch.float32)
    expected = op(*arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(op(*arguments), expected)


@OPS
def test_opcheck(op: Op) -> None:
    pytest.importorskip("triton")
    arguments = with_gradients(inputs(op, 1, 7, 2, 1, 5, 16, torch.float32))
    ops = torch.ops.xlroute
    torch.library.opcheck(getattr(ops, op.__name__).default, (*arguments, "triton"))
    weights, vectors = torch.randn(1, 2, 1, 5, device=DEVICE), torch.randn(1, 2, 1, 16, device=DEVICE)
    torch.library.opcheck(
        ops.gathered_row_sums.default,
        (weights.requires_grad_(), vectors.requires_grad_(), arguments[-1], 7, "triton"),
    )


def test_errors() -> None:
    vectors, rows, indices = inputs(gathered_products, 2, 7, 3, 2, 5, 4)
    weights, *_ = inputs(gathered_sums, 2, 7, 3, 2, 5, 4)
    with pytest.raises(ValueError, match=r"vectors must have shape \[2, 3, h, 4\], got \(2, 3, 2, 3\)"):
        gathered_products(vectors[..., 1:], rows, indices)
    with pytest.raises(ValueError, match=r"weights must have shape \[2, 3, h, 5\], got \(2, 3, 2, 4\)"):
        gathered_sums(weights[..., 1:], rows, indices)
    with pytest.raises(
        TypeError, match=r"vectors must have the dtype of rows, torch.float64, got torch.float32"
    ):
        gathered_products(vectors.float(), rows, indices)
    with pytest.raises(TypeError, match=r"indices must be an int64 tensor, got torch.int32"):
        gathered_sums(weights, rows, indices.int())
    with pytest.raises(TypeError, match=r"weights must be a floating-point tensor, got NoneType"):
        gathered_sums(None, rows, indices)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows must have shape \[b, m, d\] and indices \[b, n, k\]"):
        gathered_sums(weights, rows[:1], indices)
    with pytest.raises(ValueError, match=r"weights must be on the device of rows, .*, got meta"):
        gathered_sums(weights.to("meta"), rows, indices)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=r"indices must be in \[-1, 7\), got values from"):
            gathered_products(vectors, rows, indices + 7)
