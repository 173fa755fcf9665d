"""The routed layers beside colt5-attention 0.11.2: equal where it is right, and what it gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from xlroute import (
    ConditionalRoutedAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
)
from xlroute.cross_attention import ConditionalRoutedCrossAttention
from xlroute.feedforward import FeedForward
from xlroute.vit import ConditionalRoutedViT

peer: Any = pytest.importorskip("colt5_attention.transformer_block")

# The peer's own settings, which are not ours: raw inner products, annealed.
ROUTER = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
HEADS = {
    "light_dim_head": 8,
    "light_heads": 2,
    "light_window_size": 8,
    "heavy_dim_head": 8,
    "heavy_heads": 4,
}
DIM = 16


def pair(
    name: str, router_options: dict[str, Any] | None = None, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """The layer, whose router has further options, and the peer's, built alike."""
    layers = {
        "FeedForward": ConditionalRoutedFeedForward,
        "Attention": ConditionalRoutedAttention,
        "ImageAttention": ConditionalRoutedImageAttention,
        "TransformerBlock": ConditionalRoutedTransformerBlock,
    }
    ours = {**ROUTER, "score_scale": None, **(router_options or {})}
    layer = layers[name](DIM, router_kwargs=ours, **options)
    theirs = getattr(peer, f"ConditionalRouted{name}")(DIM, router_kwargs=ROUTER, **options)
    ready(layer)
    return layer, theirs


def ready(layer: nn.Module) -> None:
    """Change a layer in the ways that let the peer's be equal to it."""
    for module in layer.modules():
        if isinstance(module, ConditionalRoutedCrossAttention):
            module.context_norm = module.norm  # the peer has one for both
    for name, parameter in layer.named_parameters():
        if "routing_token" in name:
            parameter.data *= 0.02  # so that few gates reach 1, and choosing by gates is choosing by scores


def feedforward_weights(ff: FeedForward) -> dict[str, Tensor]:
    return {
        "0.gamma": ff[0].weight,
        "1.weight": ff[1].weight,
        "1.bias": ff[1].bias,
        "3.weight": ff[4].weight,
        "3.bias": ff[4].bias,
    }


def attention_weights(heavy: ConditionalRoutedCrossAttention) -> dict[str, Tensor]:
    assert heavy.to_k is not None
    assert heavy.null_key is not None
    keys, values = (each.weight.unflatten(0, (heavy.heads, -1)) for each in (heavy.to_k, heavy.to_v))
    return {
        "norm.gamma": heavy.norm.weight,
        "null_kv": torch.stack((heavy.null_key[:, 0], heavy.null_value[:, 0])),
        "to_q.weight": heavy.to_q.weight,
        "to_kv.weight": torch.cat((keys, values), 1).flatten(0, 1),
        "to_out.weight": heavy.to_out.weight,
    }


def peer_weights(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer under the peer's names; gradient flows back through them."""

    def below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}.{name}": weight for name, weight in weights.items()}

    if isinstance(layer, ConditionalRoutedTransformerBlock):
        return below("conditional_ff", peer_weights(layer.conditional_ff)) | below(
            "conditional_attn", peer_weights(layer.conditional_attn)
        )
    if isinstance(layer, ConditionalRoutedFeedForward):
        assert layer.router.routing_token is not None
        return (
            {"router.routing_token": layer.router.routing_token}
            | below("light_ff", feedforward_weights(layer.light_ff))
            | below("heavy_ff", feedforward_weights(layer.heavy_ff))
        )
    assert isinstance(layer, ConditionalRoutedAttention | ConditionalRoutedImageAttention)
    heavy = layer.heavy_attn
    assert heavy.q_router is not None
    weights = {
        "q_router.routing_token": heavy.q_router.routing_token,
        "kv_router.routing_token": heavy.kv_router.routing_token,
        "null_q_token": heavy.null_q_token,
    }
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    weights |= below("heavy_attn", attention_weights(heavy))
    if layer.light_attn is not None:
        light = dict(layer.light_attn.named_parameters())
        if isinstance(layer, ConditionalRoutedImageAttention):
            light["norm.gamma"] = light.pop("norm.weight")
        weights |= below("light_attn", light)
    return weights


def run_peer(layer: nn.Module, theirs: nn.Module, x: Tensor, **options: Any) -> Any:
    return functional_call(theirs, peer_weights(layer), (x,), options, strict=False)


def assert_equal(given: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest entry, in float32."""
    scale = float(expected.detach().abs().amax().clamp(min=1))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5 * scale)


ATTENTION = {"num_heavy_tokens_q": 6, "num_heavy_tokens_kv": 7, **HEADS}
BLOCK = {
    "num_heavy_attn_tokens_q": 6,
    "num_heavy_attn_tokens_kv": 7,
    "num_heavy_ff_tokens": 5,
    **HEADS,
}
CASES = [
    ("FeedForward", {"num_heavy_tokens": 5}, {}, 3, 24),
    ("FeedForward", {"num_heavy_tokens": 5, "router_straight_through": False}, {}, 3, 24),
    ("FeedForward", {"num_heavy_tokens": 5, "light_ff_mult": 1, "heavy_ff_mult": 2}, {}, 3, 4),
    ("Attention", ATTENTION, {}, 3, 24),
    ("Attention", {**ATTENTION, "rotary_emb": True, "router_straight_through": False}, {}, 3, 24),
    ("Attention", {**ATTENTION, "has_light_attn": False, "use_null_q_tokens": False}, {}, 3, 21),
    (
        "Attention",
        {
            **ATTENTION,
            "multiply_keys_by_score": True,
            "multiply_queries_by_score": True,
            "router_straight_through": False,
        },
        {},
        3,
        24,
    ),
    # Of several routing tokens it is right about one stream.
    ("Attention", {**ATTENTION, "num_routed_kv": 2, "rotary_emb": True}, {}, 1, 24),
    # With no more tokens than are routed, it does not solve for gates: they are 1, as in the exact limit.
    ("Attention", {**ATTENTION, "rotary_emb": True}, {"n_iters": None}, 3, 4),
    ("TransformerBlock", BLOCK, {}, 3, 24),
]
IMAGE = {**ATTENTION, "light_window_size": 4}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("name", "options", "router", "b", "n"), CASES, ids=lambda value: str(value)[:40])
def test_outputs_and_gradients_are_equal(
    name: str, options: dict[str, Any], router: dict[str, Any], b: int, n: int, masked: bool
) -> None:
    layer, theirs = pair(name, router, **options)
    x = torch.randn(b, n, DIM, requires_grad=True)
    mask = None
    if masked:
        # It is right as long as there are tokens enough to choose from, or all are chosen.
        mask = torch.arange(n) < torch.randint(n * 2 // 3, n + 1, (b, 1)) if n > 8 else None
    valid = torch.ones(b, n, 1) if mask is None else mask[..., None].float()
    cotangent = torch.randn(b, n, DIM) * valid
    out, expected = layer(x, mask=mask), run_peer(layer, theirs, x, mask=mask)
    assert_equal(out * valid, expected * valid)
    inputs = (x, *layer.parameters())
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    given = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    for mine, reference, tensor in zip(given, wanted, inputs, strict=True):
        zero = torch.zeros_like(tensor)
        assert_equal(zero if mine is None else mine, zero if reference is None else reference)


@pytest.mark.parametrize("channel_first", [False, True], ids=["last", "first"])
def test_images_of_one_window_are_equal(channel_first: bool) -> None:
    """Of more than one, the peer routes in each window by itself."""
    layer, theirs = pair("ImageAttention", **{**IMAGE, "channel_first": channel_first})
    x = torch.randn(3, *((DIM, 4, 4) if channel_first else (4, 4, DIM)), requires_grad=True)
    out, expected = layer(x), run_peer(layer, theirs, x)
    assert_equal(out, expected)
    inputs, cotangent = (x, *layer.parameters()), torch.randn_like(out)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for mine, reference in zip(torch.autograd.grad(out, inputs, cotangent), wanted, strict=True):
        assert_equal(mine, reference)


def test_a_vit_of_one_window_is_equal() -> None:
    vit_module: Any = pytest.importorskip("colt5_attention.vit")
    options = {
        "image_size": 8,
        "patch_size": 2,
        "num_classes": 3,
        "dim": DIM,
        "depth": 2,
        "attn_num_heavy_tokens_q": 6,
        "attn_num_heavy_tokens_kv": 7,
        "attn_heavy_dim_head": 8,
        "attn_heavy_heads": 4,
        "attn_light_dim_head": 8,
        "attn_light_heads": 2,
        "attn_light_window_size": 4,
        "ff_num_heavy_tokens": 5,
        "ff_heavy_mult": 4,
        "ff_light_mult": 0.5,
        "flash_attn": False,
    }
    router = {"n_iters": 20, "eps_init": 4.0, "eps_decay": 0.7}
    vit = ConditionalRoutedViT(**options, router_kwargs={**router, "score_scale": None})
    theirs = vit_module.ConditionalRoutedViT(**options, router_kwargs=router)
    ready(vit)
    weights = {name: weight for name, weight in vit.named_parameters() if not name.startswith("transformer")}
    for i, layers in enumerate(vit.transformer.layers):
        for j, layer in enumerate(layers):
            weights |= {f"transformer.layers.{i}.{j}.{name}": w for name, w in peer_weights(layer).items()}
    img = torch.randn(3, 3, 8, 8, requires_grad=True)
    out, expected = vit(img), functional_call(theirs, weights, (img,))
    assert_equal(out, expected)
    inputs, cotangent = (img, *vit.parameters()), torch.randn_like(out)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for mine, reference in zip(torch.autograd.grad(out, inputs, cotangent), wanted, strict=True):
        assert_equal(mine, reference)


def test_its_images_end_at_their_windows() -> None:
    layer, theirs = pair("ImageAttention", **IMAGE)
    x = torch.randn(1, 8, 8, DIM)
    other = x.clone()
    other[:, :4, :4] = torch.randn(1, 4, 4, DIM)
    numbers = {"num_heavy_tokens_q": 12, "num_heavy_tokens_kv": 12}  # of the 16 places of a window
    everyone = {"num_heavy_tokens_q": 64, "num_heavy_tokens_kv": 60}  # so that all windows are among them
    for run, options, sees in ((theirs, numbers, False), (layer, everyone, True)):
        moved = (run(other, **options) - run(x, **options))[:, 4:, 4:].abs().max()
        assert bool(moved > 1e-4) == sees
    with pytest.raises(Exception, match="can't divide axis"):
        theirs(torch.randn(1, 6, 8, DIM))
    assert layer(torch.randn(1, 6, 8, DIM)).isfinite().all()
    # A window of 16 places and 16 routed ones leave it nothing to route.
    with pytest.raises(RuntimeError, match="shape mismatch"):
        theirs(x, num_heavy_tokens_q=16)
    assert layer(x, num_heavy_tokens_q=16).isfinite().all()


def test_its_gates_saturate_and_then_it_chooses_any_rows() -> None:
    layer = ConditionalRoutedFeedForward(512, num_heavy_tokens=64)
    theirs = peer.ConditionalRoutedFeedForward(512, num_heavy_tokens=64)
    x = torch.randn(1, 1024, 512)
    theirs.router.routing_token.data.copy_(layer.router.routing_token)
    best = set((x[0] @ layer.router.routing_token[0]).topk(64).indices.tolist())
    its = theirs.router(x, num_tokens=64)
    assert len(best & set(its.indices[0].tolist())) < 48
    for router, trains in ((theirs.router, False), (layer.router, True)):
        chosen = router(x, num_tokens=64)
        (gradient,) = torch.autograd.grad(chosen.scores @ torch.randn(64), router.routing_token)
        assert bool(gradient.abs().max() > 1e-6) == trains
    normalised = x / x.square().mean(-1, keepdim=True).sqrt()
    best = set((normalised[0].double() @ layer.router.routing_token[0].double()).topk(64).indices.tolist())
    # In float32 the last one may be a tie.
    assert len(best & set(layer.router(x, num_tokens=64).indices[0].tolist())) >= 63


def test_with_two_routing_tokens_it_reads_other_streams() -> None:
    layer, theirs = pair("Attention", **{**ATTENTION, "num_routed_kv": 2})
    x = torch.randn(2, 24, DIM)
    other = torch.cat((torch.randn(1, 24, DIM), x[1:]))
    for run, leaks in ((theirs, True), (layer, False)):
        first, second = run(x), run(other)
        for alone in (second[1], run(x[1:])[0]):
            assert torch.allclose(first[1], alone, atol=1e-5) != leaks


def test_it_routes_bfloat16_in_bfloat16() -> None:
    layer, theirs = pair("FeedForward", num_heavy_tokens=32, router_straight_through=False)
    theirs.router.routing_token.data.copy_(layer.router.routing_token)
    x = torch.randn(2, 512, DIM).bfloat16()
    errors = []
    for router in (theirs.router, layer.router):
        half = router.to(torch.bfloat16)(x, num_tokens=32).scores.double()
        errors.append((half - router.double()(x.double(), num_tokens=32).scores).abs().max().item())
    assert errors[0] > 3e-3
    assert errors[1] < 1e-5


def test_its_local_attention_sees_the_padding() -> None:
    layer, theirs = pair("Attention", **ATTENTION)
    x, everything = torch.randn(2, 21, DIM), torch.ones(2, 21, dtype=torch.bool)
    assert (run_peer(layer, theirs, x) - run_peer(layer, theirs, x, mask=everything)).abs().max() > 1e-3
    torch.testing.assert_close(layer(x), layer(x, mask=everything))
    torch.testing.assert_close(layer(x), run_peer(layer, theirs, x, mask=everything), rtol=1e-5, atol=1e-5)


def test_in_blocks_it_fails_on_few_tokens_and_drops_the_last_ones() -> None:
    options = {"num_heavy_tokens": 4, "router_kwargs": {"route_block_size": 16}}
    layer = ConditionalRoutedFeedForward(DIM, **options)
    theirs = peer.ConditionalRoutedFeedForward(DIM, **options)
    x = torch.randn(2, 10, DIM)
    with pytest.raises(ZeroDivisionError):
        theirs(x)
    assert layer(x).isfinite().all()
    # The last token is by far the best.
    x = torch.randn(1, 20, DIM)
    x[:, -1] = theirs.router.routing_token.data
    layer.router.routing_token.data.copy_(theirs.router.routing_token)
    assert 19 not in theirs.router(x, num_tokens=4).indices
    assert 19 in layer.router(x, num_tokens=4).indices
