"""The routed layers at the sizes of colt5-attention's examples, each with all who do the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from layers_contest import LIGHT, PRODUCTS, Reach, dense, light_branch, matrix_products, peer, routed, works
from layers_dense import DenseBlock, DenseFeedForward, DenseSelfAttention
from routing_report import Work
from routing_settings import normal
from torch import Tensor, nn

from xlroute import (
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
)

# The feedforward of a block routes what rounding has touched, and bfloat16 results can only be compared if
# they route the same tokens with nearly the same gates. So scores, whose spread is about 1, keep this far
# from the one that divides routed tokens from others, and ε is so large that few gates reach 1, where their
# gradient ends.
MARGIN = 0.02
SMOOTH_EPS = 1.0


@dataclass(frozen=True)
class LayerSizes:
    """How large the work is."""

    streams: int = 2
    causal_tokens: int = 8192
    tokens: int = 32_768
    dense_tokens: tuple[int, ...] = (16_384, 65_536)
    dim: int = 512
    heads: int = 8
    dim_head: int = 64
    window: int = 128
    num_heavy_tokens: int = (
        1024  # in each stream: of queries, of keys and values, of tokens in the feedforward
    )
    causal_heavy_tokens_q: int = 32  # in each window
    causal_routed_kv: int = 2
    light_ff_mult: float = 0.5
    heavy_ff_mult: float = 4
    channels: int = 32
    image_sides: tuple[int, int] = (256, 256)
    image_window: int = 32


TINY = LayerSizes(
    causal_tokens=50,
    tokens=60,
    dense_tokens=(20, 30),
    dim=16,
    heads=2,
    dim_head=8,
    window=8,
    num_heavy_tokens=12,
    causal_heavy_tokens_q=3,
    channels=8,
    image_sides=(12, 8),
    image_window=4,
)


def autoregressive(sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Beside causal attention of all tokens."""
    x, cotangent = inputs(sizes.streams, sizes.causal_tokens, sizes.dim, device=device, dtype=dtype)
    options = {
        "dim": sizes.dim,
        "num_heavy_tokens_q": sizes.causal_heavy_tokens_q,
        "num_heavy_tokens_kv": sizes.num_heavy_tokens,
        "num_routed_kv": sizes.causal_routed_kv,
        "light_window_size": sizes.window,
        "use_flash_attn": True,
        **heads(sizes),
    }
    attention = DenseSelfAttention(sizes.dim, sizes.heads, sizes.dim_head, causal=True)
    contenders = [
        *routed(
            builder(
                ConditionalRoutedAutoregressiveAttention, {**options, "router_kwargs": {"eps": SMOOTH_EPS}}
            ),
            x,
            cotangent,
        ),
        dense(attention, x, cotangent),
        *peer("ConditionalRoutedAutoregressiveAttention", x, cotangent, **options),
    ]
    reach = {
        torch.float32: Reach("2.5 ms", "7 ms", "1 GiB"),
        torch.bfloat16: Reach("0.8 ms", "2.2 ms", "0.5 GiB"),
    }
    yield from works("autoregressive", x, contenders, reach[dtype])


def block(sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Beside a block with attention of all tokens to all, and the wide feedforward for all."""
    reach = {torch.float32: Reach("6 ms", "17 ms"), torch.bfloat16: Reach("1.2 ms", "3.5 ms")}
    yield from _blocks("block", (sizes.streams, sizes.tokens), sizes, device, dtype, reach[dtype])


def against_dense(sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """One stream through the block, forward and backward: the longer, the more routing saves."""
    for tokens, reach in zip(sizes.dense_tokens, ("dense / 5", "dense / 20"), strict=True):
        yield from _blocks("block", (1, tokens), sizes, device, dtype, Reach(None, reach))


def _blocks(
    name: str,
    shape: tuple[int, int],
    sizes: LayerSizes,
    device: torch.device,
    dtype: torch.dtype,
    reach: Reach,
) -> Iterator[Work]:
    x, cotangent = inputs(*shape, sizes.dim, device=device, dtype=dtype)
    options = {
        "dim": sizes.dim,
        "num_heavy_attn_tokens_q": sizes.num_heavy_tokens,
        "num_heavy_attn_tokens_kv": sizes.num_heavy_tokens,
        "num_heavy_ff_tokens": sizes.num_heavy_tokens,
        "light_ff_mult": sizes.light_ff_mult,
        "heavy_ff_mult": sizes.heavy_ff_mult,
        "light_window_size": sizes.window,
        "use_flash_attn": True,
        **heads(sizes),
    }
    build = builder(ConditionalRoutedTransformerBlock, {**options, "router_kwargs": {"eps": SMOOTH_EPS}})
    x = keep_apart(build(False).to(x), x, sizes.num_heavy_tokens)
    contenders = [
        *routed(build, x, cotangent),
        dense(DenseBlock(sizes.dim, sizes.heads, sizes.dim_head, sizes.heavy_ff_mult), x, cotangent),
        *peer("ConditionalRoutedTransformerBlock", x, cotangent, **options),
    ]
    yield from works(name, x, contenders, reach)


def feedforward(sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Beside the wide feedforward for all tokens, and beside its own matrix products."""
    x, cotangent = inputs(sizes.streams, sizes.tokens, sizes.dim, device=device, dtype=dtype)
    options = {
        "dim": sizes.dim,
        "num_heavy_tokens": sizes.num_heavy_tokens,
        "light_ff_mult": sizes.light_ff_mult,
        "heavy_ff_mult": sizes.heavy_ff_mult,
    }
    build = builder(ConditionalRoutedFeedForward, options)
    contenders = [
        *routed(build, x, cotangent),
        matrix_products(build(None), x, cotangent, sizes.num_heavy_tokens),
        dense(DenseFeedForward(sizes.dim, mult=sizes.heavy_ff_mult, bias=True), x, cotangent),
        *peer("ConditionalRoutedFeedForward", x, cotangent, **options),
    ]
    yield from works("feedforward", x, contenders, Reach("1.3 x floor", "1.3 x floor"), PRODUCTS)


def image(sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Beside attention of all places to all, and its light branch; both have maps that end in channels."""
    x, cotangent = inputs(1, sizes.channels, *sizes.image_sides, device=device, dtype=dtype)
    options = {
        "dim": sizes.channels,
        "num_heavy_tokens_q": sizes.num_heavy_tokens,
        "num_heavy_tokens_kv": sizes.num_heavy_tokens,
        "light_window_size": sizes.image_window,
        "channel_first": True,
        "use_flash_attn": True,
        **heads(sizes),
    }
    build = builder(ConditionalRoutedImageAttention, options)
    maps = [each.movedim(1, -1).contiguous() for each in (x, cotangent)]
    places = [each.flatten(1, 2) for each in maps]
    contenders = [
        *routed(build, x, cotangent),
        light_branch(build(None).light_attn, *maps),
        dense(DenseSelfAttention(sizes.channels, sizes.heads, sizes.dim_head, causal=False), *places),
        *peer("ConditionalRoutedImageAttention", x, cotangent, **options),
    ]
    yield from works("image", x, contenders, Reach("1.3 x floor", "1.3 x floor"), LIGHT)


BOTH = (torch.float32, torch.bfloat16)
# What --only chooses from, and the dtypes of each.
WORK = {
    "autoregressive": (autoregressive, BOTH),
    "block": (block, BOTH),
    "feedforward": (feedforward, BOTH),
    "image": (image, BOTH),
    "dense": (against_dense, BOTH[1:]),
}


def inputs(*shape: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and a cotangent of a layer."""
    x, cotangent = (normal(*shape, device=device, seed=seed, dtype=dtype) for seed in (1, 2))
    return x, cotangent


def heads(sizes: LayerSizes) -> dict[str, int]:
    """The heads of both branches."""
    return {
        f"{branch}_{name}": number
        for branch in ("light", "heavy")
        for name, number in (("heads", sizes.heads), ("dim_head", sizes.dim_head))
    }


def builder(layer: Callable[..., Any], options: dict[str, Any]) -> Callable[[bool | None], Any]:
    """Makes a layer of ours, with the same weights each time."""

    def build(use_triton: bool | None) -> Any:
        torch.manual_seed(0)
        built = layer(**options, use_triton=use_triton)
        # The output of tokens that are not routed is large, and no error would be seen beside it.
        for name, parameter in built.named_parameters():
            if name.endswith("null_q_token"):
                nn.init.zeros_(parameter)
        return built

    return build


@torch.no_grad()
def keep_apart(block: ConditionalRoutedTransformerBlock, x: Tensor, num_heavy_tokens: int) -> Tensor:
    """Move the tokens of x [b, n, d] that the block's feedforward scores within the margin out of it."""
    wide, router = x.double(), block.double().conditional_ff.router
    assert router.routing_token is not None
    s = router.scores(wide + block.conditional_attn(wide))[:, 0]
    level = s.topk(num_heavy_tokens + 1).values[:, -2:].mean(-1, keepdim=True)
    step = torch.where((s - level).abs() < MARGIN, 2 * MARGIN * (s - level).sign(), 0)
    direction: Tensor = router.routing_token[0] * router.dim**0.5 / router.routing_token[0].square().sum()
    return (wide + step[..., None] * direction).to(x)
