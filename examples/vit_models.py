"""The two models of examples/vit.py, and how many multiply-adds they take for an image.

Both embed patches of 2 x 2 pixels and learn their positions. Each layer has attention and a feedforward.

Shapes: b images, n patches, d dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from xlroute.attend import attend
from xlroute.cross_attention import ConditionalRoutedCrossAttention
from xlroute.feedforward import ConditionalRoutedFeedForward, FeedForward
from xlroute.image_attention import WindowAttention
from xlroute.router import rows_to_route
from xlroute.vit import ConditionalRoutedViT

DIGITS, PATCH, CLASSES = 8, 2, 10  # pixels of a side, of a patch's side; digits
PATCHES = (DIGITS // PATCH) ** 2
DIM, DEPTH, HEADS, DIM_HEAD, FF_MULT = 64, 3, 4, 16, 4.0


class Attention(nn.Module):
    """Every patch attends to all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.to_qkv = nn.Linear(DIM, 3 * HEADS * DIM_HEAD, bias=False)
        self.to_out = nn.Linear(HEADS * DIM_HEAD, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, d] -> [b, n, d]."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (three h e) -> three b h n e", three=3, h=HEADS)
        return self.to_out(rearrange(attend(q, k, v), "b h n e -> b n (h e)"))  # type: ignore[no-any-return]


class PlainViT(nn.Module):
    """Vision transformer (arXiv 2010.11929) that averages its patches for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(PATCH * PATCH, DIM)
        self.positions = nn.Parameter(0.5 * torch.randn(PATCHES, DIM))
        self.layers = nn.ModuleList(
            nn.ModuleList((Attention(), FeedForward(DIM, mult=FF_MULT, bias=True))) for _ in range(DEPTH)
        )
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def forward(self, img: Tensor) -> Tensor:
        """Logits [b, 10] of images [b, 1, 8, 8]."""
        patches = rearrange(img, "b 1 (p u) (q v) -> b (p q) (u v)", u=PATCH, v=PATCH)
        x = self.embedding(patches) + self.positions
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feedforward = layer
            x = x + attention(x)
            x = x + feedforward(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def routed_vit() -> ConditionalRoutedViT:
    """Of the same width and depth, with light branches for all patches and heavy ones for a quarter of them.

    The heavy feedforward is narrower than that of the plain model, so that the two branches together have
    about as many parameters.
    """
    return ConditionalRoutedViT(
        image_size=DIGITS,
        patch_size=PATCH,
        num_classes=CLASSES,
        channels=1,
        dim=DIM,
        depth=DEPTH,
        attn_num_heavy_tokens_q=4,
        attn_num_heavy_tokens_kv=8,
        attn_heavy_dim_head=DIM_HEAD,
        attn_heavy_heads=HEADS,
        attn_light_dim_head=8,
        attn_light_heads=2,
        attn_light_window_size=2,
        ff_num_heavy_tokens=4,
        ff_heavy_mult=2.9,
        ff_light_mult=0.5,
        default_coor_descent_eps=0.3,
        router_straight_through=False,  # a patch that only just is routed counts for less
        patch_norm=False,  # it would make white patches of black ones
        learned_positions=True,
    )


def multiply_adds(model: PlainViT | ConditionalRoutedViT) -> int:
    """Of all matrix products for one image, the scores of the routers among them, from the layers' sizes."""
    embedding: nn.Module
    layers: Any  # pairs of attention and feedforward
    if isinstance(model, PlainViT):
        embedding, layers, head = model.embedding, model.layers, model.head
        parts = [_attention(attention) + _linears(feedforward, PATCHES) for attention, feedforward in layers]
    else:
        embedding, layers, head = model.to_patch_embedding, model.transformer.layers, model.linear_head
        parts = [
            _window_attention(attention.light_attn)
            + _routed_attention(attention.heavy_attn)
            + _routed_feedforward(feedforward)
            for attention, feedforward in layers
        ]
    return _linears(embedding, PATCHES) + sum(parts) + _linears(head, 1)


def _linears(module: nn.Module, rows: int) -> int:
    linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
    return rows * sum(each.in_features * each.out_features for each in linears)


def _attention(attention: Attention) -> int:
    return _linears(attention, PATCHES) + 2 * PATCHES * PATCHES * attention.to_out.in_features


def _window_attention(light: WindowAttention) -> int:
    side = min(light.window_size, DIGITS // PATCH)
    rows = (math.ceil(DIGITS / PATCH / side) * side) ** 2  # of all windows, those beyond the border too
    return _linears(light, rows) + 2 * rows * side * side * light.to_out.in_features


def _routed_attention(heavy: ConditionalRoutedCrossAttention) -> int:
    assert heavy.num_tokens_q is not None
    queries, keys = (rows_to_route(num, PATCHES) for num in (heavy.num_tokens_q, heavy.num_tokens_kv))
    inner = heavy.to_out.in_features
    scores = PATCHES * DIM * (1 + heavy.sets)
    # Each set of keys and values is for its share of the heads; a null key stands beside them.
    projections = 2 * (queries + keys) * DIM * inner
    return scores + projections + 2 * queries * (1 + keys) * inner


def _routed_feedforward(feedforward: ConditionalRoutedFeedForward) -> int:
    routed = rows_to_route(feedforward.num_heavy_tokens, PATCHES)
    scores = PATCHES * DIM
    return scores + _linears(feedforward.light_ff, PATCHES) + _linears(feedforward.heavy_ff, routed)
