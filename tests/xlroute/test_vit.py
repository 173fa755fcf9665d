from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from xlroute.position import sincos_2d
from xlroute.vit import ConditionalRoutedViT


def build(**options: Any) -> ConditionalRoutedViT:
    small = {
        "image_size": (12, 8),
        "patch_size": (2, 4),
        "num_classes": 5,
        "dim": 16,
        "depth": 2,
        "attn_num_heavy_tokens_q": 4,
        "attn_num_heavy_tokens_kv": 5,
        "attn_heavy_dim_head": 8,
        "attn_heavy_heads": 4,
        "attn_light_dim_head": 8,
        "attn_light_heads": 2,
        "attn_light_window_size": 4,
        "ff_num_heavy_tokens": 3,
        "ff_heavy_mult": 4,
        "ff_light_mult": 0.5,
        "attn_num_routed_kv": 2,
    }
    return ConditionalRoutedViT(**{**small, **options})


def test_it_classifies_the_mean_of_its_features() -> None:
    vit = build().double()
    img = torch.randn(2, 3, 12, 8).double()
    logits, features = vit(img, return_features=True)
    assert torch.equal(logits, vit(img))
    assert features.shape == (2, 6, 2, 16)
    torch.testing.assert_close(vit.linear_head[2](vit.linear_head[1](features.mean((1, 2)))), logits)
    # The layers, patch by patch.
    x = torch.zeros(2, 6, 2, 16, dtype=torch.float64)
    for p in range(6):
        for q in range(2):
            pixels = img[:, :, 2 * p : 2 * p + 2, 4 * q : 4 * q + 4].permute(0, 2, 3, 1).flatten(1)
            x[:, p, q] = vit.to_patch_embedding[1:](pixels)
            for i in range(4):
                angles = [place / 10_000 ** (i / 3) for place in (q, p)]
                waves = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
                x[:, p, q, i::4] += torch.tensor(waves, dtype=torch.float64)
    for attention, feedforward in vit.transformer.layers:
        x = x + attention(x)
        x = x + feedforward(x.reshape(2, 12, 16)).reshape(x.shape)
    torch.testing.assert_close(features, x)


def test_the_size_of_images_may_vary() -> None:
    vit = build(attn_num_heavy_tokens_q=0.3)
    for height, width in ((12, 8), (2, 4), (30, 20)):
        assert vit(torch.randn(2, 3, height, width)).shape == (2, 5)
    with pytest.raises(
        ValueError, match=r"img: expected sides that are multiples of \(2, 4\), got \(12, 10\)"
    ):
        vit(torch.randn(2, 3, 12, 10))
    with pytest.raises(ValueError, match=r"img: expected \[b, 3, height, width\], got \(2, 1, 12, 8\)"):
        vit(torch.randn(2, 1, 12, 8))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size: expected sides that are multiples of \(5, 5\)"):
        build(image_size=12, patch_size=5)
    with pytest.raises(ValueError, match="dim: expected a multiple of 4"):
        build(dim=18)


def test_positions_of_the_fewest_frequencies_are_finite() -> None:
    table = sincos_2d(2, 3, 4, device=torch.device("cpu"), dtype=torch.float32)
    assert table.shape == (2, 3, 4)
    place = [math.sin(2), math.cos(2), math.sin(1), math.cos(1)]
    torch.testing.assert_close(table[1, 2], torch.tensor(place))
