from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

import xlroute.attend as attention
from xlroute.attend import attend


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_backends_agree_with_the_formula(masked: bool, biased: bool) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 11, 11))
    mask = (torch.rand(2, 1, 5, 11) < 0.7) | (torch.arange(11) == 0) if masked else None
    bias = torch.randn(2, 3, 1, 11, dtype=torch.float64) if biased else None
    logits = torch.einsum("bhne,bhme->bhnm", q, k) / 8**0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -1e300)
    expected = torch.einsum("bhnm,bhme->bhne", logits.softmax(-1), v)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), cotangent)
    for backend in ("sdpa", "math"):
        out = attend(q, k, v, mask=mask, bias=bias, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(out, expected)
        for got, wanted in zip(torch.autograd.grad(out, (q, k, v), cotangent), gradients, strict=True):
            torch.testing.assert_close(got, wanted)


def test_half_precision_keeps_its_type() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3))
    for backend in ("sdpa", "math"):
        assert attend(q, k, v, bias=torch.randn(1, 2, 1, 5), backend=backend).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_unknown_backend_is_refused() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"backend: expected 'sdpa', 'math' or 'flash', got 'fast'"):
        attend(q, q, q, backend="fast")  # type: ignore[arg-type]


def test_flash_refuses_masks_and_the_cpu() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="'flash' takes neither a mask nor a bias"):
        attend(q, q, q, mask=torch.ones(2, 2, dtype=torch.bool), backend="flash")
    with pytest.raises(ValueError, match=r"got torch\.float32 on cpu"):
        attend(q, q, q, backend="flash")


def test_flash_gets_heads_behind_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package takes [b, n, h, e]; a stand-in shows that the layout is turned and turned back."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        assert q.shape == (2, 5, 3, 8)
        assert dropout_p == 0
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "_require_half_on_cuda", lambda q: None)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    assert torch.equal(attend(q, k, v, backend="flash"), attend(q, k, v))
