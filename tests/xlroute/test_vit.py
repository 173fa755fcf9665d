from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlroute.position import sincos_2d
from xlroute.vit import ConditionalRoutedViT, StandardEmbedding, standard_embedding

STANDARD = {"patch_norm": False, "learned_positions": True}


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


@pytest.mark.parametrize("share", [False, True], ids=["numbers", "shares"])
def test_padding_changes_nothing(share: bool) -> None:
    numbers = {"attn_num_heavy_tokens_q": 0.4, "attn_num_heavy_tokens_kv": 0.5, "ff_num_heavy_tokens": 0.3}
    vit = build(attn_light_window_size=2, **(numbers if share else {})).double()
    for norm in (module for module in vit.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.uniform_(norm.bias)
    images = [torch.randn(1, 3, *size).double() for size in ((10, 8), (6, 20), (2, 12))]
    padded, mask = torch.randn(3, 3, 12, 20).double(), torch.zeros(3, 6, 5, dtype=torch.bool)
    for i, image in enumerate(images):
        _, _, height, width = image.shape
        padded[i, :, :height, :width] = image[0]
        mask[i, : height // 2, : width // 4] = True
    padded.requires_grad_()
    logits, features = vit(padded, mask=mask, return_features=True)
    for i, image in enumerate(images):
        alone, of_patches = vit(image, return_features=True)
        torch.testing.assert_close(logits[i : i + 1], alone)
        torch.testing.assert_close(features[i][mask[i]], of_patches.flatten(0, 2))
    (gradient,) = torch.autograd.grad(logits.square().sum(), padded)
    pixels = mask.repeat_interleave(2, 1).repeat_interleave(4, 2)[:, None].expand_as(gradient)
    assert (gradient[~pixels] == 0).all()
    assert (gradient[pixels] != 0).any()
    assert vit(padded, mask=mask & (torch.arange(3) != 1)[:, None, None]).isfinite().all()
    with pytest.raises(ValueError, match=r"mask: expected bool \(3, 6, 5\), got torch.bool \(3, 12, 20\)"):
        vit(padded, mask=mask.new_ones(3, 12, 20))


def test_statistics_are_those_of_the_layers() -> None:
    vit, img = build(), torch.randn(2, 3, 12, 8)
    logits, features, stats = vit(img, return_features=True, return_stats=True)
    torch.testing.assert_close(logits, vit(img))
    assert vit(img, return_stats=True)[1][0].attention.overlap.shape == (2, 1)
    x = vit.to_patch_embedding(img) + sincos_2d(6, 2, 16, device=img.device, dtype=img.dtype)
    for (attention, feedforward), of_layer in zip(vit.transformer.layers, stats, strict=True):
        attended, expected = attention(x, return_stats=True)
        x = x + attended
        torch.testing.assert_close(of_layer.attention, expected)
        fed, expected = feedforward(x.flatten(1, 2), return_stats=True)
        x = x + fed.view(x.shape)
        torch.testing.assert_close(of_layer.feedforward, expected)
    torch.testing.assert_close(features, x)


def of_standard_vit(dim: int, grid: tuple[int, int], class_token: bool) -> tuple[nn.Conv2d, Tensor]:
    convolution = nn.Conv2d(3, dim, (2, 4), stride=(2, 4)).double()
    return convolution, torch.randn(1, grid[0] * grid[1] + class_token, dim, dtype=torch.float64)


@pytest.mark.parametrize("class_token", [False, True])
def test_the_embedding_of_a_standard_vit(class_token: bool) -> None:
    vit = build(**STANDARD, dim=18).double()
    convolution, positions = of_standard_vit(18, (6, 2), class_token)
    vit.load_embedding(StandardEmbedding(convolution.weight, convolution.bias, positions), grid=(6, 2))
    seen = []
    vit.transformer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for height, width in ((12, 8), (20, 12)):
        img = torch.randn(2, 3, height, width).double()
        vit(img)
        table = positions[:, -12:].mT.unflatten(-1, (6, 2))
        if (height, width) != (12, 8):
            table = F.interpolate(table, size=(10, 3), mode="bicubic", antialias=True)
        torch.testing.assert_close(seen.pop(), (convolution(img) + table).permute(0, 2, 3, 1))


def test_positions_of_another_grid_are_resampled() -> None:
    vit = build(**STANDARD, image_size=(8, 16)).double()
    convolution, positions = of_standard_vit(16, (6, 6), class_token=True)
    # Channels that stand for a place stand for it at the new grid too: 4 of 4 rows and columns.
    row, column = torch.arange(36).double() // 6, torch.arange(36).double() % 6
    positions[0, 1:, 0], positions[0, 1:, 1], positions[0, 1:, 2] = row, column, 7.0
    vit.load_embedding(StandardEmbedding(convolution.weight, convolution.bias, positions))
    assert vit.positions is not None
    middle = torch.arange(1, 3).double() * 1.5 + 0.25
    torch.testing.assert_close(vit.positions[1:3, :, 0], middle[:, None].expand(2, 4), rtol=0, atol=0.1)
    torch.testing.assert_close(vit.positions[:, 1:3, 1], middle.expand(4, 2), rtol=0, atol=0.1)
    torch.testing.assert_close(vit.positions[..., 2], torch.full((4, 4), 7.0).double())


@pytest.mark.parametrize(
    "names",
    [
        ("patch_embed.proj", "pos_embed"),
        ("conv_proj", "encoder.pos_embedding"),
        ("embeddings.patch_embeddings.projection", "embeddings.position_embeddings"),
        ("vit.embeddings.patch_embeddings.projection", "vit.embeddings.position_embeddings"),
    ],
)
def test_well_known_names_are_found(names: tuple[str, str]) -> None:
    convolution, positions = of_standard_vit(8, (2, 2), class_token=True)
    weights = {
        "cls_token": torch.randn(1, 1, 8),
        "decoder_pos_embed": torch.randn(1, 5, 4),
        f"{names[0]}.weight": convolution.weight,
        f"{names[0]}.bias": convolution.bias,
        names[1]: positions,
        "blocks.0.attn.proj.weight": torch.randn(8, 8),
    }
    assert standard_embedding(weights) == (convolution.weight, convolution.bias, positions)
    twice = {**weights, f"teacher.{names[1]}": positions}
    with pytest.raises(ValueError, match=r"state_dict: expected one key that ends in pos_embed or .*teacher"):
        standard_embedding(twice)
    del weights[names[1]]
    with pytest.raises(ValueError, match=r"state_dict: expected one key that ends in pos_embed or .*\[\]"):
        standard_embedding(weights)


@pytest.mark.parametrize(
    ("options", "dim", "grid", "message"),
    [
        ({"patch_norm": True}, 16, (6, 2), "expected a model built with patch_norm=False and learned"),
        (
            {"learned_positions": False},
            16,
            (6, 2),
            "expected a model built with patch_norm=False and learned",
        ),
        ({"patch_size": 2}, 16, (6, 2), r"patch_weight, patch_bias: expected \(16, 3, 2, 2\) and \(16,\)"),
        ({}, 12, (6, 2), r"patch_weight.*got \(12, 3, 2, 4\) and \(12,\)"),
        ({}, 16, None, r"positions: expected \[1, n, 16\] with n = 3 x 3, and 1 more.*got \(1, 12, 16\)"),
        ({}, 16, (5, 2), r"positions: expected \[1, n, 16\] with n = 5 x 2"),
    ],
    ids=str,
)
def test_an_embedding_that_does_not_fit_is_refused(
    options: dict[str, Any], dim: int, grid: tuple[int, int] | None, message: str
) -> None:
    vit = build(**{**STANDARD, **options})
    before = {name: weight.clone() for name, weight in vit.state_dict().items()}
    convolution, positions = of_standard_vit(dim, (6, 2), class_token=False)
    with pytest.raises(ValueError, match=message):
        vit.load_embedding(StandardEmbedding(convolution.weight, convolution.bias, positions), grid=grid)
    assert all(torch.equal(before[name], weight) for name, weight in vit.state_dict().items())


def test_patches_that_are_not_routed_start_without_heavy_attention() -> None:
    x = torch.randn(1, 6, 2, 16)
    for attention, _ in build().transformer.layers:
        changed = (attention(x) - attention.light_attn(x)).flatten(0, 2).norm(dim=-1)
        assert (changed > 1e-3).sum() == 4
