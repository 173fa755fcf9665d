"""gather_keys_values against a gather and the layout of what it took, and in Triton against the reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import gated_keys_values, gather_keys_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    b: int, m: int, c: int, r: int, k: int, h: int, e: int, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Keys, values, gates, indices, null key and null value."""
    keys, values = (
        torch.randn(b, m, r, h, e, dtype=torch.float64, device=DEVICE).to(dtype) for _ in range(2)
    )
    gates = torch.rand(b, c, r, k, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    # Some rows are chosen by many windows, others by none; some windows lack rows.
    indices = (torch.rand(b, c, r, k, device=DEVICE) ** 2 * (m + 1)).long() - 1
    null_key, null_value = (torch.randn(r * h, 1, e, device=DEVICE).to(dtype) for _ in range(2))
    return keys, values, gates, indices, null_key, null_value


def leaves_of(given: Inputs) -> list[Tensor]:
    return [t.detach().requires_grad_() for i, t in enumerate(given) if i != 3]


def composed(
    keys: Tensor, values: Tensor, gates: Tensor, indices: Tensor, *nulls: Tensor, gate_keys: bool
) -> tuple[Tensor, Tensor]:
    def taken(rows: Tensor) -> Tensor:
        windows = [
            torch.stack([rows[stream][indices[stream, window, s], s] for s in range(rows.shape[2])])
            for stream in range(rows.shape[0])
            for window in range(indices.shape[1])
        ]
        return torch.stack(windows) * (indices >= 0).flatten(0, 1)[..., None, None]

    return gated_keys_values(
        taken(keys), taken(values), gates.flatten(0, 1), *nulls, gate_keys=gate_keys, backend="torch"
    )


@pytest.mark.parametrize("gate_keys", [False, True])
def test_equals_a_gather_and_the_layout_of_what_it_took(gate_keys: bool) -> None:
    given = inputs(2, 7, 3, 2, 5, 2, 4)
    leaves = leaves_of(given)
    all_of = [*leaves[:3], given[3], *leaves[3:]]
    expected = composed(*all_of, gate_keys=gate_keys)
    ours = gather_keys_values(*all_of, gate_keys=gate_keys, backend="torch")
    cotangents = [torch.randn_like(out) for out in expected]
    for mine, plain in zip(ours, expected, strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents)
    )


@pytest.mark.parametrize("gate_keys", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 5, 3, 37, 2, 24), (1, 1, 1, 1, 1, 1, 1), (1, 6, 4, 2, 70, 1, 64), (2, 3, 2, 1, 0, 2, 4)],
    ids=str,
)
def test_triton(
    shape: tuple[int, ...], dtype: torch.dtype, gate_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    given = inputs(*shape, dtype=dtype)
    results = []
    cotangents: list[Tensor] = []
    for backend in ("torch", "triton"):
        leaves = leaves_of(given)
        out = gather_keys_values(*leaves[:3], given[3], *leaves[3:], gate_keys=gate_keys, backend=backend)
        cotangents = cotangents or [torch.randn_like(each) for each in out]
        results.append((*out, *torch.autograd.grad(out, leaves, cotangents)))
    # Products are rounded once in both; the interpreter cuts off where it should round to bfloat16.
    rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    for i, (mine, expected) in enumerate(zip(results[1], results[0], strict=True)):
        if i in (2, 3, 4):  # sums, in another order, and rounded once instead of twice
            error = (mine - expected).double().norm()
            assert error <= 4 * torch.finfo(dtype).eps * expected.double().norm() + 1e-30
        else:
            torch.testing.assert_close(mine, expected, rtol=rtol, atol=0.0)


def test_rows_that_are_cut_out_of_longer_ones_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    keys, values, gates, indices, null_key, null_value = inputs(2, 9, 2, 2, 3, 2, 4, torch.float32)
    indices = indices.clamp(max=5)
    expected = gather_keys_values(
        keys[:, :6].contiguous(), values[:, :6].contiguous(), gates, indices, null_key, null_value
    )
    contiguous = Tensor.contiguous

    def watched(t: Tensor, *options: Any) -> Tensor:
        assert t.ndim != 5, "the rows are copied"
        return contiguous(t, *options)

    monkeypatch.setattr(Tensor, "contiguous", watched)
    given = gather_keys_values(
        keys[:, :6], values[:, :6], gates, indices, null_key, null_value, backend="triton"
    )
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1], expected[1])


def test_errors() -> None:
    keys, values, gates, indices, *nulls = inputs(2, 7, 3, 2, 5, 2, 4)
    with pytest.raises(ValueError, match=r"\[b, m, r, heads of a set, e\], both the same, got"):
        gather_keys_values(keys[0], values, gates, indices, *nulls)
    with pytest.raises(ValueError, match=r"gates must have shape \(2, 3, 2, 5\), got \(2, 3, 2, 4\)"):
        gather_keys_values(keys, values, gates[..., 1:], indices, *nulls)
    with pytest.raises(ValueError, match=r"indices must have shape \[2, c, 2, k\], got \(1, 3, 2, 5\)"):
        gather_keys_values(keys, values, gates, indices[:1], *nulls)
    with pytest.raises(TypeError, match=r"indices must be an int64 tensor, got torch.int32"):
        gather_keys_values(keys, values, gates, indices.int(), *nulls)
    with pytest.raises(ValueError, match=r"indices must be on the device of keys, .*, got meta"):
        gather_keys_values(keys, values, gates, indices.to("meta"), *nulls)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=r"indices must be in \[-1, 7\), got values from .* to 7"):
            gather_keys_values(keys, values, gates, indices.where(indices != indices.max(), 7), *nulls)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    given = inputs(2, 7, 3, 2, 5, 2, 4, torch.float32)
    leaves = leaves_of(given)
    ops = torch.ops.xlroute
    torch.library.opcheck(ops.gather_keys_values.default, (*leaves[:3], given[3], *leaves[3:], True, backend))
    keys, values, gates, indices, _, null_value = given
    torch.library.opcheck(
        ops.gather_keys_values.default, (keys, values, gates, indices, None, null_value, False, backend)
    )
    d_keys, d_values = torch.randn(2, 6, 4, 6, 4, device=DEVICE)
    torch.library.opcheck(
        ops.gather_keys_values_backward.default,
        (d_keys, d_values, keys, values, gates, indices, True, backend),
    )
