from __future__ import annotations

import warnings

import pytest
import torch

from xlroute import topk
from xlroute.backend import _warn_once


def test_values_and_indices_are_those_of_torch() -> None:
    x = torch.randn(3, 4, 100)
    out = topk(x, k=7)
    expected = x.topk(7)
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.values, expected.values)
    assert out.gates is not None
    assert out.coor_descent_values is not None
    torch.testing.assert_close(out.gates, torch.ones_like(out.gates))
    assert (out.coor_descent_values <= 1).all()


def test_gradient_reaches_entries_that_were_not_chosen() -> None:
    x = torch.randn(2, 50, requires_grad=True)
    out = topk(x, k=5, eps=1.0)
    (out.values * torch.randn(2, 5)).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).sum(-1).min() > 5


def test_gradient_is_that_of_value_times_gate() -> None:
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(5, dtype=torch.float64)
    out = topk(x, k=5, eps=0.5, n_iters=10)
    (grad,) = torch.autograd.grad((out.values * cotangent).sum(), x)
    # By the product rule: the chosen values' own gradient, and x times the gradient of the gates.
    again = topk(x, k=5, eps=0.5, n_iters=10)
    assert again.coor_descent_values is not None
    weight = (x.detach()[again.indices] * cotangent * again.coor_descent_values).sum()
    (through_gates,) = torch.autograd.grad(weight, x)
    expected = through_gates.index_add(0, again.indices, cotangent)
    torch.testing.assert_close(grad, expected)


def test_masked_entries_are_not_chosen() -> None:
    x = torch.randn(2, 20)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :10] = True
    mask[1, 3] = True
    out = topk(x, k=4, mask=mask)
    assert (out.indices[0] < 10).all()
    assert out.indices[1].tolist() == [3, -1, -1, -1]
    assert out.values[1, 1:].tolist() == [0, 0, 0]
    assert out.gates is not None
    assert out.gates[1].tolist() == [1, 0, 0, 0]


def test_non_differentiable_returns_no_gates() -> None:
    out = topk(torch.randn(20), k=3, non_differentiable=True)
    assert out.coor_descent_values is None
    assert out.gates is None


def test_fused_on_a_cpu_warns_once() -> None:
    _warn_once.cache_clear()
    x = torch.randn(20)
    with pytest.warns(UserWarning, match="Triton was asked for"):
        topk(x, k=3, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk(x, k=3, fused=True)


@pytest.mark.parametrize("k", [0, 21])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected 1 to 20, the length of x's last dimension, got {k}"):
        topk(torch.randn(20), k=k)
    with pytest.raises(ValueError, match=r"coor_descent_k_ratio: expected at least 1, got 0\.5"):
        topk(torch.randn(20), k=2, coor_descent_k_ratio=0.5)
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \(20,\), got \(7,\)"):
        topk(torch.randn(20), k=2, mask=torch.ones(7, dtype=torch.bool))
