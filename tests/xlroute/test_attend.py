from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import xlroute.attend as attention
from xlroute import RoutedTransformerXL
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [5, 8, 15])
def test_a_bias_inside_the_products_is_one_beside_them(
    masked: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(2, 3, n, width, dtype=torch.float64, requires_grad=True) for n in (5, 11, 11))
    bias = torch.randn(2, 3, 1, 11, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 1, 11) < 0.7) | (torch.arange(11) == 0) if masked else None
    expected = attend(q, k, v, mask=mask, bias=bias, backend="math")
    widths = []

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: float) -> Tensor:
        widths.extend(t.shape[-1] for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(attention, "_belongs_in_the_products", lambda q, mask, bias: True)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", sdpa)
    out = attend(q, k, v, mask=mask, bias=bias)
    assert widths == [{5: 8, 8: 16, 15: 16}[width]] * 3
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(expected)
    gradients = (torch.autograd.grad(way, (q, k, v, bias), cotangent) for way in (out, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_with_gradient_is_as_exact_on_a_gpu(masked: bool, dtype: torch.dtype) -> None:
    exact = [torch.randn(2, 4, n, 64, device="cuda", dtype=dtype).double() for n in (64, 129, 129)]
    exact += [torch.randn(2, 4, 1, 129, device="cuda", dtype=dtype).double()]
    mask = torch.arange(129, device="cuda") < torch.tensor([129, 70], device="cuda").view(2, 1, 1, 1)
    cotangent = torch.randn(2, 4, 64, 64, device="cuda", dtype=dtype).double()
    results = []
    for kind in (torch.float64, dtype):
        q, k, v, bias = inputs = [t.to(kind).requires_grad_() for t in exact]
        out = attend(q, k, v, mask=mask if masked else None, bias=bias)
        results.append([out, *torch.autograd.grad(out, inputs, cotangent.to(kind))])
    for wanted, got in zip(*results, strict=True):
        assert (got.double() - wanted).norm() < 2e-2 * wanted.norm()
    if masked:
        _, _, keys, values, bias = results[1]
        assert not any(gradient[1, :, 70:].any() for gradient in (keys, values, bias.mT))


@pytest.mark.parametrize("m", [1, 8, 11])
def test_rows_of_a_bias_begin_where_they_are_read_fastest(m: int) -> None:
    bias = torch.randn(2, 3, 1, m, requires_grad=True)
    aligned = attention._aligned(bias)
    assert all(stride % 8 == 0 for stride in aligned.stride()[:-1])
    assert torch.equal(aligned, bias)
    [gradient] = torch.autograd.grad(aligned.sum(), bias)
    assert torch.equal(gradient, torch.ones_like(bias))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [7, 64, 129])
def test_a_bias_without_gradient_is_as_exact_on_a_gpu(masked: bool, dtype: torch.dtype, m: int) -> None:
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=dtype) for n in (64, m, m))
    bias = torch.randn(2, 4, 1, m, device="cuda", dtype=dtype)
    lengths = torch.tensor([m, m // 2], device="cuda").view(2, 1, 1, 1)
    mask = torch.arange(m, device="cuda") < lengths if masked else None
    wanted = attend(q.double(), k.double(), v.double(), mask=mask, bias=bias.double(), backend="math")
    got = attend(q, k, v, mask=mask, bias=bias)
    assert (got.double() - wanted).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-3) * wanted.norm()


@pytest.mark.parametrize(
    "lack", ["GPU", "half precision", "gradient", "one bias for all queries", "one mask"]
)
def test_a_bias_stays_beside_the_products_where_that_is_as_fast(
    lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "prefers_no_bias", lambda device: True)
    q = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    bias = torch.randn(2, 3, 5, 11, requires_grad=True)
    mask = torch.ones(2, 1, 5, 11, dtype=torch.bool)
    assert attention._belongs_in_the_products(q, mask[:, :, :1], bias[:, :, :1])
    assert attention._belongs_in_the_products(q.half(), None, bias[0, 0, :1])
    assert not attention._belongs_in_the_products(q, None, bias[0, 0, 0])
    assert not attention._belongs_in_the_products(q, mask[0, 0, 0], bias[:, :, :1])
    for exact in (q.float(), q.double()):
        assert not attention._belongs_in_the_products(exact, None, bias[:, :, :1])
        with torch.autocast("cpu", torch.bfloat16):
            autocast = attention._belongs_in_the_products(exact, None, bias[:, :, :1])
        assert autocast is (exact.dtype == torch.float32)
    if lack == "GPU":
        monkeypatch.undo()
    assert not attention._belongs_in_the_products(
        q.float() if lack == "half precision" else q,
        mask if lack == "one mask" else mask[:, :, :1],
        bias[:, :, : 5 if lack == "one bias for all queries" else 1]
        .detach()
        .requires_grad_(lack != "gradient"),
    )


@pytest.mark.parametrize("routing", ["learned", "content"])
def test_a_memory_reads_the_same_with_its_bias_inside(
    build_model: Callable[..., RoutedTransformerXL], routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where products are of half precision by autocast, and the bias has a gradient."""
    options = {
        "memory_routing": routing,
        "routing_chunk": 3,
        "num_content_tokens_kv": 3,
        "routing_key_dim": 8,
    }
    model = build_model(**options)
    segments, calls, inside = [torch.randint(50, (2, 5)) for _ in range(4)], [], attention._with_bias_inside

    def noted(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(given[0].dtype)
        return inside(*given)

    def read() -> Tensor:
        state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
        for tokens in segments:
            logits, state = model(tokens, state)
        return logits

    def gradients() -> list[Tensor]:
        loss = read().square().sum()
        return [loss, *torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True)]

    expected = gradients()
    monkeypatch.setattr(attention, "_with_bias_inside", noted)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_belongs_in_the_products", lambda q, mask, bias: bias.shape[-2] == 1)
        torch.testing.assert_close(gradients(), expected)
    assert len(calls) == 2 * len(segments)
    calls.clear()
    monkeypatch.setattr(attention, "prefers_no_bias", lambda device: True)
    read()
    assert not calls
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            read()
        assert not calls
        read()
    assert len(calls) == 2 * len(segments)


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
