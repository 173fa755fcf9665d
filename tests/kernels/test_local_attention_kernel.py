"""local_attention token by token, and in Triton against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute.kernels import local_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 is wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def by_hand(qkv: Tensor, w: int, causal: bool, mask: Tensor | None) -> Tensor:
    b, n, *_, e = qkv.shape
    i = torch.arange(n, device=qkv.device)
    distance = i - i[:, None]
    near = (distance <= 0) & (i // w >= i[:, None] // w - 1) if causal else distance.abs() <= w
    near = near.expand(b, n, n)
    if mask is not None:
        near = (near & mask[:, None]) | (distance == 0)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    logits = (q @ k.mT / math.sqrt(e)).masked_fill(~near[:, None], -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_reference(causal: bool, masked: bool) -> None:
    qkv = torch.randn(2, 23, 3, 2, 4, dtype=torch.float64, requires_grad=True, device=DEVICE)
    mask = torch.rand(2, 23, device=DEVICE) < 0.5 if masked else None
    out = local_attention(qkv, window_size=5, causal=causal, mask=mask, backend="torch")
    expected = by_hand(qkv, 5, causal, mask)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, cotangent), torch.autograd.grad(expected, qkv, cotangent)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("shape", "w"),
    [((2, 70, 3, 2, 24), 20), ((1, 40, 3, 1, 64), 32), ((3, 5, 3, 2, 16), 1), ((1, 40, 3, 1, 5), 200)],
    ids=str,
)
def test_triton(
    shape: tuple[int, ...],
    w: int,
    causal: bool,
    masked: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = pytest.importorskip("xlroute.kernels.local_attention_triton", exc_type=ImportError)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "BLOCK", 32)
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    b, n = shape[:2]
    qkv = (2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(b, n, device=DEVICE) < 0.5
        mask[1:] = mask[1:] & (torch.arange(b - 1, device=DEVICE) > 0)[:, None]
    cotangent = torch.randn(b, n, *shape[3:], device=DEVICE).to(dtype)
    wide = qkv.detach().double().requires_grad_()
    expected = by_hand(wide, w, causal, mask)
    d_expected = torch.autograd.grad(expected, wide, cotangent.double())[0]
    out = local_attention(qkv, window_size=w, causal=causal, mask=mask, backend="triton")
    assert out.dtype == dtype
    assert out.is_contiguous()
    d_qkv = torch.autograd.grad(out, qkv, cotangent)[0]
    tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 3e-6
    for given, wanted in ((out, expected), (d_qkv, d_expected)):
        assert not given.isnan().any()
        assert (given - wanted).norm() <= tolerance * wanted.norm()


def test_a_stream_does_not_depend_on_its_neighbours() -> None:
    pytest.importorskip("triton")
    qkv = torch.randn(3, 40, 3, 2, 16, device=DEVICE)
    together = local_attention(qkv, window_size=8, causal=True, backend="triton")
    alone = local_attention(qkv[1:2], window_size=8, causal=True, backend="triton")
    assert torch.equal(together[1:2], alone)
    # Rows of tokens that are not adjacent.
    wide = torch.randn(3, 40, 3 * 2 * 16 + 7, device=DEVICE)[..., 5:-2]
    cut = wide.unflatten(-1, (3, 2, 16))
    assert torch.equal(
        local_attention(cut, window_size=8, backend="triton"),
        local_attention(cut.contiguous(), window_size=8, backend="triton"),
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_may_be_wider_than_the_sequence(causal: bool, backend: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    qkv = torch.randn(1, 40, 3, 1, 16, device=DEVICE, requires_grad=True)
    wide, exact = (
        local_attention(qkv, window_size=w, causal=causal, backend=backend) for w in (2**31 - 1, 40)
    )
    assert torch.equal(wide, exact)
    cotangent = torch.randn_like(wide)
    assert torch.equal(*(torch.autograd.grad(out, qkv, cotangent)[0] for out in (wide, exact)))


def test_autocast_changes_nothing() -> None:
    qkv = torch.randn(1, 20, 3, 1, 16, device=DEVICE)
    expected = local_attention(qkv, window_size=4)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(local_attention(qkv, window_size=4), expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_rows_beyond_2_to_the_31_elements() -> None:
    stride = 60_000_000
    storage = torch.empty(40 * stride, dtype=torch.float16, device=DEVICE)
    qkv = storage.as_strided((1, 40, 3, 1, 16), (40 * stride, stride, 16, 16, 1))
    qkv.copy_(torch.randn(qkv.shape))
    assert torch.equal(local_attention(qkv, window_size=8), local_attention(qkv.contiguous(), window_size=8))


def test_wide_heads_and_float64_run_the_reference() -> None:
    pytest.importorskip("triton")
    for qkv in (torch.randn(1, 9, 3, 1, 129), torch.randn(1, 9, 3, 1, 8, dtype=torch.float64)):
        qkv = qkv.to(DEVICE)
        given = local_attention(qkv, window_size=3, backend="triton")
        assert torch.equal(given, local_attention(qkv, window_size=3, backend="torch"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_to_attend(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    for shape in ((0, 4, 3, 2, 8), (2, 0, 3, 2, 8)):
        out = local_attention(torch.randn(shape, device=DEVICE), window_size=3, backend=backend)  # type: ignore[arg-type]
        assert out.shape == (*shape[:2], 2, 8)


def test_opcheck() -> None:
    pytest.importorskip("triton")
    qkv = torch.randn(1, 20, 3, 1, 16, device=DEVICE, requires_grad=True)
    mask = torch.rand(1, 20, device=DEVICE) < 0.7
    torch.library.opcheck(torch.ops.xlroute.local_attention.default, (qkv, mask, 6, True))
    out, sums = torch.ops.xlroute.local_attention(qkv.detach(), mask, 6, True)
    torch.library.opcheck(
        torch.ops.xlroute.local_attention_backward.default, (out, qkv.detach(), mask, out, sums, 6, True)
    )


def test_errors() -> None:
    qkv = torch.randn(2, 5, 3, 1, 4)
    with pytest.raises(ValueError, match=r"qkv must have shape \[b, n, 3, h, e\], got \(2, 5, 2, 1, 4\)"):
        local_attention(qkv[:, :, 1:], window_size=2)
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        local_attention(qkv, window_size=0)
    with pytest.raises(TypeError, match="qkv must be a floating-point tensor"):
        local_attention(qkv.long(), window_size=2)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch.float32"):
        local_attention(qkv, window_size=2, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\), got \(1, 5\)"):
        local_attention(qkv, window_size=2, mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be on the device of qkv, cpu, got meta"):
        local_attention(qkv, window_size=2, mask=torch.ones(2, 5, dtype=torch.bool, device="meta"))
