"""gated_keys_values against the plain formula, and in Triton against the reference."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor

from xlroute.kernels import gated_keys_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inputs(
    b: int, r: int, k: int, h: int, e: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    keys, values = (
        torch.randn(b, r, k, h, e, dtype=torch.float64, device=DEVICE).to(dtype) for _ in range(2)
    )
    gates = torch.rand(b, r, k, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    null_key, null_value = (torch.randn(r * h, 1, e, device=DEVICE).to(dtype) for _ in range(2))
    return keys, values, gates, null_key, null_value


def formula(
    keys: Tensor, values: Tensor, gates: Tensor, null_key: Tensor, null_value: Tensor, gate_keys: bool
) -> tuple[Tensor, Tensor]:
    values = values * gates[..., None, None]
    if gate_keys:
        keys = keys * gates[..., None, None]
    laid = []
    for null, rows in ((null_key, keys), (null_value, values)):
        by_head = rearrange(rows, "b r k h e -> b (r h) k e")
        laid.append(torch.cat((repeat(null, "h one e -> b h one e", b=len(rows)), by_head), dim=2))
    return laid[0], laid[1]


@pytest.mark.parametrize("gate_keys", [False, True])
def test_equals_the_formula(gate_keys: bool) -> None:
    leaves = tuple(t.requires_grad_() for t in inputs(2, 3, 5, 2, 4))
    expected = formula(*leaves, gate_keys)
    given = gated_keys_values(*leaves, gate_keys=gate_keys, backend="torch")
    cotangents = [torch.randn_like(out) for out in expected]
    for ours, plain in zip(given, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(given, leaves, cotangents), torch.autograd.grad(expected, leaves, cotangents)
    )


def test_gradcheck() -> None:
    leaves = tuple(t.requires_grad_() for t in inputs(2, 1, 3, 2, 2))
    for gate_keys in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, gate_keys=gate_keys: gated_keys_values(*t, gate_keys=gate_keys, backend="torch"),
            leaves,
        )


@pytest.mark.parametrize("gate_keys", [False, True])
def test_keys_are_kept_for_the_backward_only_if_they_are_gated(gate_keys: bool) -> None:
    given = inputs(2, 2, 5, 3, 4)
    kept: list[int] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        gated_keys_values(*(t.requires_grad_() for t in given), gate_keys=gate_keys)
    keys, values, *_ = given
    assert values.data_ptr() in kept
    assert (keys.data_ptr() in kept) == gate_keys


def test_a_null_key_of_zeros() -> None:
    keys, values, gates, null_key, null_value = inputs(2, 2, 3, 2, 4)
    given = gated_keys_values(keys, values, gates, None, null_value, backend="torch")
    expected = gated_keys_values(keys, values, gates, torch.zeros_like(null_key), null_value, backend="torch")
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1], expected[1])


def test_errors() -> None:
    keys, values, gates, null_key, null_value = inputs(2, 2, 3, 2, 4)
    with pytest.raises(ValueError, match=r"the same, got \(2, 2, 3, 2, 4\) and \(2, 2, 2, 2, 4\)"):
        gated_keys_values(keys, values[:, :, 1:], gates, null_key, null_value)
    with pytest.raises(ValueError, match=r"gates must have shape \(2, 2, 3\), got \(2, 2, 2\)"):
        gated_keys_values(keys, values, gates[..., 1:], null_key, null_value)
    with pytest.raises(ValueError, match=r"null_key must have shape \(4, 1, 4\), got \(3, 1, 4\)"):
        gated_keys_values(keys, values, gates, null_key[1:], null_value)
    with pytest.raises(
        TypeError, match=r"values must have the dtype of keys, torch.float64, got torch.float32"
    ):
        gated_keys_values(keys, values.float(), gates, null_key, null_value)
    with pytest.raises(TypeError, match="gates must be a floating-point tensor"):
        gated_keys_values(keys, values, gates.long(), null_key, null_value)
    with pytest.raises(ValueError, match=r"gates must be on the device of keys, .*, got meta"):
        gated_keys_values(keys, values, gates.to("meta"), null_key, null_value)


@pytest.mark.usefixtures("no_interpreter")
def test_backend_errors() -> None:
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA tensor, got a tensor on cpu"):
        gated_keys_values(*(t.cpu() for t in inputs(1, 1, 2, 1, 2)), backend="triton")


@pytest.mark.parametrize("gate_keys", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 37, 2, 24), (1, 1, 1, 1, 1), (1, 2, 70, 1, 64), (3, 1, 0, 2, 4)], ids=str
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
    b, r, k, h, e = shape
    tensors = inputs(b, r, k, h, e, dtype)
    results = []
    cotangents: list[Tensor] = []
    for backend in ("torch", "triton"):
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        out = gated_keys_values(*leaves, gate_keys=gate_keys, backend=backend)
        cotangents = cotangents or [torch.randn_like(each) for each in out]
        results.append((*out, *torch.autograd.grad(out, leaves, cotangents)))
    # Products are rounded once in both; the interpreter cuts off where it should round to bfloat16.
    rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    for i, (given, expected) in enumerate(zip(results[1], results[0], strict=True)):
        if i == 4:  # the gates: sums, in another order
            torch.testing.assert_close(given, expected)
        else:
            torch.testing.assert_close(given, expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    leaves = tuple(t.requires_grad_() for t in inputs(2, 2, 3, 2, 4, torch.float32))
    ops = torch.ops.xlroute
    torch.library.opcheck(ops.gated_keys_values.default, (*leaves, True, backend))
    keys, values, gates, _, null_value = (t.detach() for t in leaves)
    torch.library.opcheck(
        ops.gated_keys_values.default, (keys, values, gates, None, null_value, False, backend)
    )
    d_keys, d_values = torch.randn(2, 2, 4, 4, 4, device=DEVICE)
    torch.library.opcheck(
        ops.gated_keys_values_backward.default, (d_keys, d_values, keys, values, gates, True, backend)
    )
