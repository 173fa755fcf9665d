"""Layers whose norms add up gradients in Triton: the same results, fewer passes, watched modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from xlroute import (
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
    RoutedTransformerXL,
)
from xlroute.beside import call_beside, is_plain, normed_beside
from xlroute.feedforward import FeedForward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS: dict[str, Any] = {
    "light_dim_head": 8,
    "light_heads": 2,
    "light_window_size": 6,
    "heavy_dim_head": 8,
    "heavy_heads": 4,
    "router_kwargs": {"eps": 1.0},
}


def feedforward() -> nn.Module:
    return FeedForward(16, mult=1.5, bias=True, dropout=0.3)


def block() -> nn.Module:
    return ConditionalRoutedTransformerBlock(
        16,
        num_heavy_attn_tokens_q=5,
        num_heavy_attn_tokens_kv=6,
        num_heavy_ff_tokens=0.3,
        num_routed_kv=2,
        **HEADS,
    )


def autoregressive() -> nn.Module:
    return ConditionalRoutedAutoregressiveAttention(16, num_heavy_tokens_q=3, num_heavy_tokens_kv=7, **HEADS)


def image() -> nn.Module:
    layer = ConditionalRoutedImageAttention(
        16, num_heavy_tokens_q=5, num_heavy_tokens_kv=6, **{**HEADS, "light_window_size": 3}
    )
    return nn.Sequential(nn.Unflatten(1, (4, 7)), layer, nn.Flatten(1, 2))


@pytest.fixture
def run_norms(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has norms and hidden units, and nothing else, run on a backend that is named."""

    def run(backend: str) -> None:
        for module in ("beside", "feedforward"):
            monkeypatch.setattr(f"xlroute.{module}.pick_backend", lambda *_: backend)

    return run


def tokens() -> Tensor:
    return torch.randn(2, 28, 16, device=DEVICE, requires_grad=True)


def seeded(layer: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)  # of the dropout
    return layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [feedforward, block, autoregressive, image])
def test_triton_gives_what_pytorch_gives(
    build: Callable[[], nn.Module], run_norms: Callable[[str], None]
) -> None:
    pytest.importorskip("triton")
    layer, x = build().to(DEVICE), tokens()
    results: list[tuple[Tensor | None, ...]] = []
    cotangent = torch.randn_like(x)
    for backend in ("torch", "triton"):
        run_norms(backend)
        out = seeded(layer, x)
        gradients = torch.autograd.grad(out, (x, *layer.parameters()), cotangent, allow_unused=True)
        results.append((out, *gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_triton_gives_what_pytorch_gives_in_a_model(
    build_model: Callable[..., RoutedTransformerXL],
    routed_all: dict[str, Any],
    run_norms: Callable[[str], None],
) -> None:
    pytest.importorskip("triton")
    model = build_model(dtype=torch.float32, **routed_all).to(DEVICE)
    segment = torch.randint(50, (2, 5), device=DEVICE)
    results = []
    for backend in ("torch", "triton"):
        run_norms(backend)
        state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
        first, state = model(segment, state)
        second, _ = model(segment.flip(1), state)
        loss = first.square().sum() + second.square().sum()
        results.append((first, second, *torch.autograd.grad(loss, model.parameters(), allow_unused=True)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_the_block_leaves_no_gradients_to_be_added(run_norms: Callable[[str], None]) -> None:
    pytest.importorskip("triton")
    layer, x = block().to(DEVICE), tokens()
    run_norms("triton")
    out = layer(x)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        torch.autograd.grad(out, (x, *layer.parameters()), torch.randn_like(out), allow_unused=True)
    added = [event for event in profile.events() if event.name in ("aten::add", "aten::add_")]
    whole = [event for event in added if event.input_shapes[:2] == [list(x.shape)] * 2]
    assert not whole


def test_it_compiles_to_one_graph(run_norms: Callable[[str], None]) -> None:
    pytest.importorskip("triton")
    layer, x = feedforward().to(DEVICE).eval(), tokens()
    run_norms("triton")

    def residual(x: Tensor) -> Tensor:
        x, fed = call_beside(layer, FeedForward, x)
        return x + fed

    expected = residual(x)
    given = torch.compile(residual, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(given, expected)
    cotangent = torch.randn_like(expected)
    leaves = (x, *layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(given, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("build", [block, autoregressive])
def test_who_watches_a_module_sees_its_calls(
    build: Callable[[], nn.Module], backend: str, run_norms: Callable[[str], None]
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    run_norms(backend)
    layer, x = build().to(DEVICE), tokens()
    expected = layer(x)

    def calls(watched: dict[str, nn.Module]) -> set[str]:
        seen = set()
        handles = [
            module.register_forward_hook(lambda *_, name=name: seen.add(name))
            for name, module in watched.items()
        ]
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()
        return seen

    everything = {name: module for name, module in layer.named_modules() if name}
    called = calls(everything)
    assert {"heavy_attn.to_q", "light_attn.norm"} <= {
        name.removeprefix("conditional_attn.") for name in called
    }
    for name in sorted(called):
        assert calls({name: everything[name]}) == {name}


def test_only_plain_modules_are_passed_over() -> None:
    def hook(*_: Any) -> None: ...

    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        norm = nn.RMSNorm(4)
        assert is_plain(norm, nn.RMSNorm)
        handle = getattr(norm, register)(hook)
        assert not is_plain(norm, nn.RMSNorm)
        handle.remove()
        assert is_plain(norm, nn.RMSNorm)
    handle = nn.modules.module.register_module_forward_pre_hook(hook)  # of all modules
    assert not is_plain(norm, nn.RMSNorm)
    handle.remove()
    assert is_plain(norm, nn.RMSNorm)
    compiled = nn.RMSNorm(4)
    compiled.compile(backend="eager")
    assert not is_plain(compiled, nn.RMSNorm)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain(norm, nn.RMSNorm)
    assert not is_plain(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear)
    assert not is_plain(type("Mine", (nn.RMSNorm,), {})(4), nn.RMSNorm)


def test_what_stands_in_place_of_a_module_is_called() -> None:
    x = torch.randn(2, 3, 4)
    ff = FeedForward(4, mult=2, bias=True)
    assert [t.data_ptr() for t in call_beside(nn.Identity(), FeedForward, x)] == [x.data_ptr()] * 2
    assert torch.equal(call_beside(ff, FeedForward, x)[1], ff(x))
    (same,) = normed_beside(nn.Identity(), x, readers=0)
    assert torch.equal(same, x)
    without_weight = nn.LayerNorm(4, elementwise_affine=False)
    assert torch.equal(normed_beside(without_weight, x)[1], without_weight(x))


def test_weights_of_a_feedforward_keep_their_names() -> None:
    names = ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"]
    assert list(FeedForward(4, mult=2, bias=True).state_dict()) == names
