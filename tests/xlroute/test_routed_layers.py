"""What every routed layer keeps: dtypes, streams that do not touch, one graph, gradient everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xlroute import (
    ConditionalRoutedAttention,
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
)

# Said once a process by whatever test comes first.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
HEADS: dict[str, Any] = {
    "light_dim_head": 8,
    "light_heads": 2,
    "light_window_size": 6,
    "heavy_dim_head": 8,
    "heavy_heads": 4,
    "num_routed_kv": 2,
    "router_kwargs": {"eps": 1.0},
}


def feedforward() -> nn.Module:
    return ConditionalRoutedFeedForward(16, num_heavy_tokens=5, router_kwargs={"eps": 1.0})


def attention() -> nn.Module:
    return ConditionalRoutedAttention(
        16, num_heavy_tokens_q=5, num_heavy_tokens_kv=0.4, rotary_emb=True, **HEADS
    )


def autoregressive() -> nn.Module:
    return ConditionalRoutedAutoregressiveAttention(
        16, num_heavy_tokens_q=3, num_heavy_tokens_kv=7, rotary_emb=True, **{**HEADS, "heavy_window_size": 5}
    )


def block() -> nn.Module:
    numbers = {"num_heavy_attn_tokens_q": 5, "num_heavy_attn_tokens_kv": 6, "num_heavy_ff_tokens": 0.3}
    return ConditionalRoutedTransformerBlock(16, **numbers, **HEADS)


class Image(ConditionalRoutedImageAttention):
    """Takes tokens as all the others do."""

    def forward(self, x: Tensor, *, mask: Tensor, **options: Any) -> Any:
        out = super().forward(x.unflatten(1, (5, 5)), mask=mask.unflatten(1, (5, 5)), **options)
        return (out[0].flatten(1, 2), out[1]) if isinstance(out, tuple) else out.flatten(1, 2)


def image() -> nn.Module:
    return Image(16, num_heavy_tokens_q=5, num_heavy_tokens_kv=0.4, **{**HEADS, "light_window_size": 3})


def tokens(b: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(b, 25, 16, device=DEVICE), torch.rand(b, 25, device=DEVICE) < 0.7


LAYERS = [feedforward, attention, autoregressive, block, image]
Build = Callable[[], nn.Module]


@pytest.mark.parametrize("build", LAYERS)
def test_a_stream_does_not_depend_on_its_neighbours(build: Build) -> None:
    layer = build().to(DEVICE).double()
    x, mask = tokens()
    x = x.double()
    mask[1] = False
    out = layer(x, mask=mask)
    assert out.isfinite().all()
    for b in range(3):
        torch.testing.assert_close(layer(x[b : b + 1], mask=mask[b : b + 1])[0], out[b])
    order = [2, 0, 1]
    torch.testing.assert_close(layer(x[order], mask=mask[order]), out[order])
    # Nor does a valid token on what masked ones hold.
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    torch.testing.assert_close(layer(other, mask=mask)[mask], out[mask])


@pytest.mark.parametrize("build", LAYERS)
def test_gradient_reaches_every_parameter(build: Build) -> None:
    layer = build().to(DEVICE)
    x, mask = tokens()
    out = layer(x, mask=mask)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [feedforward, attention, autoregressive, image])
def test_half_precision_routes_as_float64_does(build: Build, dtype: torch.dtype) -> None:
    layer = build().to(DEVICE, dtype)
    x, mask = tokens()
    x = x.to(dtype)
    out = layer(x, mask=mask)
    assert out.dtype == dtype
    expected = layer.double()(x.double(), mask=mask)
    assert (out - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("build", [feedforward, attention, autoregressive, image])
def test_autocast(build: Build) -> None:
    layer = build().to(DEVICE)
    x, mask = tokens()
    expected = layer(x, mask=mask)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, stats = layer(x, mask=mask, return_stats=True)
    assert stats is not None
    assert (out - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("build", [autoregressive, block, image])
def test_it_compiles_to_one_graph(build: Build) -> None:
    layer = build().to(DEVICE)
    x, mask = tokens()
    x.requires_grad_()
    inputs = (x, *layer.parameters())
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    out, expected = (
        torch.compile(layer, fullgraph=True, backend=backend)(x, mask=mask),
        layer(x, mask=mask),
    )
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    given = torch.autograd.grad(out, inputs, cotangent)
    for ours, reference in zip(given, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("build", LAYERS)
def test_a_gpu_computes_what_a_cpu_does(build: Build) -> None:
    layer = build().double()
    x, mask = tokens()
    x = x.cpu().double().requires_grad_()
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    out = layer(x, mask=mask.cpu())
    expected = (out, *torch.autograd.grad(out, (x, *layer.parameters()), cotangent))
    layer, x = layer.to(DEVICE), x.detach().to(DEVICE).requires_grad_()
    out = layer(x, mask=mask)
    given = (out, *torch.autograd.grad(out, (x, *layer.parameters()), cotangent.to(DEVICE)))
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)
