"""A vision transformer whose attention and feedforward are conditionally routed.

Shapes: b images, p rows and q columns of patches, d dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from xlroute.feedforward import ConditionalRoutedFeedForward
from xlroute.image_attention import ConditionalRoutedImageAttention
from xlroute.position import sincos_2d
from xlroute.transformer_block import BlockStats

# What the parameters end in, in timm, torchvision and transformers.
STANDARD_NAMES = {
    "patch_weight": ("patch_embed.proj.weight", "conv_proj.weight", "patch_embeddings.projection.weight"),
    "patch_bias": ("patch_embed.proj.bias", "conv_proj.bias", "patch_embeddings.projection.bias"),
    "positions": ("pos_embed", "encoder.pos_embedding", "embeddings.position_embeddings"),
}


class StandardEmbedding(NamedTuple):
    """How a standard vision transformer (arXiv 2010.11929) embeds patches and their places."""

    patch_weight: Tensor  # of a convolution, [d, channels, height, width]
    patch_bias: Tensor  # [d]
    positions: Tensor  # [1, n, d] or [1, 1 + n, d], the class token first; the patches row by row


class RoutedImageTransformer(nn.Module):
    """Layers of routed image attention and routed feedforward, each with a residual."""

    def __init__(
        self, dim: int, *, depth: int, attention: Mapping[str, Any], feedforward: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            layer = ConditionalRoutedImageAttention(dim, **attention)
            assert layer.heavy_attn.null_q_token is not None
            # Patches that are not routed all get it: a random one would hide what they are.
            nn.init.zeros_(layer.heavy_attn.null_q_token)
            self.layers.append(nn.ModuleList((layer, ConditionalRoutedFeedForward(dim, **feedforward))))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_stats: bool = False
    ) -> tuple[Tensor, tuple[BlockStats, ...]]:
        """[b, p, q, d] -> [b, p, q, d], and how the layers' routings went if asked for; mask [b, p, q]."""
        places_mask = None if mask is None else mask.flatten(1, 2)
        stats = []
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feedforward = layer
            attended = attention(x, mask=mask, return_stats=return_stats)
            attended, *attention_stats = attended if return_stats else (attended,)
            x = attended + x
            fed = feedforward(x.flatten(1, 2), mask=places_mask, return_stats=return_stats)
            fed, *feedforward_stats = fed if return_stats else (fed,)
            x = fed.unflatten(1, x.shape[1:3]) + x
            if return_stats:
                stats.append(BlockStats(*attention_stats, *feedforward_stats))
        return x, tuple(stats)


class ConditionalRoutedViT(nn.Module):
    """Vision transformer (arXiv 2010.11929) of routed image attention and routed feedforward layers.

    Patches are embedded between two norms, get the sines and cosines of their row and column as positions
    (arXiv 2205.01580), and are averaged for the logits. There is no class token. Images of any size are
    taken, as long as patches of the same size divide them. What the heavy attention gives patches that are
    not routed is learned, from zero on.

    With `patch_norm=False, learned_positions=True` patches and positions are those of a standard vision
    transformer, whose weights `load_embedding` takes.

    Args:
        image_size: height and width of images in pixels, or one number for both; checked against the patches.
            It is the size at which positions are learned.
        patch_size: height and width of patches in pixels, or one number for both.
        num_classes: number of logits.
        dim: width d of patches, a multiple of 4.
        depth: layers.
        attn_num_heavy_tokens_q: patches of an image whose queries take the heavy attention; a float in (0, 1]
            is a share of them.
        attn_num_heavy_tokens_kv: patches that each routing token picks as keys and values; or a share.
        attn_heavy_dim_head: width of a head of the heavy attention.
        attn_heavy_heads: heads of the heavy attention.
        attn_light_dim_head: width of a head of the light attention.
        attn_light_heads: heads of the light attention.
        attn_light_window_size: side of a window of the light attention, in patches.
        ff_num_heavy_tokens: patches of an image that take the heavy feedforward; or a share.
        ff_heavy_mult: hidden width of the heavy feedforward over d.
        ff_light_mult: hidden width of the light feedforward over d.
        channels: channels of images.
        router_straight_through: gates of routed patches are 1 in value and keep their gradient.
        router_kwargs: further arguments of all `CoordinateDescentRouter`s.
        router_use_triton: `use_triton` of its routed layers.
        flash_attn: see `use_flash_attn` of `ConditionalRoutedAttention`.
        attn_num_routed_kv: routing tokens of keys and values.
        default_coor_descent_eps: ε of the routers, unless `router_kwargs` names it.
        patch_norm: pixels of a patch are normalised before they are embedded, and the embedding after. That
            makes patches of one colour all the same, black or white.
        learned_positions: positions are a learned table, resampled for images of another size.

    Raises:
        ValueError: for arguments out of range, or patches that do not divide the image.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        attn_num_heavy_tokens_q: int | float,
        attn_num_heavy_tokens_kv: int | float,
        attn_heavy_dim_head: int,
        attn_heavy_heads: int,
        attn_light_dim_head: int,
        attn_light_heads: int,
        attn_light_window_size: int,
        ff_num_heavy_tokens: int | float,
        ff_heavy_mult: float,
        ff_light_mult: float,
        channels: int = 3,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] = {},
        router_use_triton: bool | None = None,
        flash_attn: bool = True,
        attn_num_routed_kv: int = 1,
        default_coor_descent_eps: float = 1.0,
        patch_norm: bool = True,
        learned_positions: bool = False,
    ) -> None:
        super().__init__()
        if dim % 4 != 0 and not learned_positions:
            raise ValueError(f"dim: expected a multiple of 4, for sines and cosines of two axes, got {dim}")
        self.channels = channels
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._check_size("image_size", size)
        height, width = self.patch_size
        patch_dim = channels * height * width
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (p height) (q width) -> b p q (height width c)", height=height, width=width),
            nn.LayerNorm(patch_dim) if patch_norm else nn.Identity(),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim) if patch_norm else nn.Identity(),
        )
        self.positions: nn.Parameter | None = None
        if learned_positions:
            # As large as embedded patches; from 0.02, a small model took three times as many steps.
            self.positions = nn.Parameter(0.5 * torch.randn(size[0] // height, size[1] // width, dim))
        routing = {
            "router_straight_through": router_straight_through,
            "router_kwargs": {"eps": default_coor_descent_eps, **router_kwargs},
            "use_triton": router_use_triton,
        }
        self.transformer = RoutedImageTransformer(
            dim,
            depth=depth,
            attention={
                "num_heavy_tokens_q": attn_num_heavy_tokens_q,
                "num_heavy_tokens_kv": attn_num_heavy_tokens_kv,
                "num_routed_kv": attn_num_routed_kv,
                "light_dim_head": attn_light_dim_head,
                "light_heads": attn_light_heads,
                "light_window_size": attn_light_window_size,
                "heavy_dim_head": attn_heavy_dim_head,
                "heavy_heads": attn_heavy_heads,
                "use_flash_attn": flash_attn,
                **routing,
            },
            feedforward={
                "num_heavy_tokens": ff_num_heavy_tokens,
                "light_ff_mult": ff_light_mult,
                "heavy_ff_mult": ff_heavy_mult,
                **routing,
            },
        )
        self.linear_head = nn.Sequential(
            Reduce("b p q d -> b d", "mean"), nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        )

    def forward(
        self,
        img: Tensor,
        *,
        mask: Tensor | None = None,
        return_features: bool = False,
        return_stats: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Classify images.

        Args:
            img: [b, channels, height, width], sides that are multiples of the patch's.
            mask: bool [b, p, q], False for patches of padding: they are not routed, seen by none, and no part
                of the average.
            return_features: return the features of the patches too, for dense tasks.
            return_stats: return how the routings of each layer went too.

        Returns:
            Logits [b, num_classes]; a tuple of those and what was asked for in this order: features
            [b, p, q, d], and a tuple of `BlockStats`, one for each layer.

        Raises:
            ValueError: for images of other channels, sides that the patches do not divide, or a mask of
                another shape.
        """
        if img.ndim != 4 or img.shape[1] != self.channels:
            raise ValueError(f"img: expected [b, {self.channels}, height, width], got {tuple(img.shape)}")
        self._check_size("img", tuple(img.shape[2:]))
        x = self.to_patch_embedding(img)
        if mask is not None and (mask.shape != x.shape[:3] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask: expected bool {tuple(x.shape[:3])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if self.positions is None:
            x = x + sincos_2d(*x.shape[1:], device=x.device, dtype=x.dtype)
        else:
            x = x + resample(self.positions, x.shape[1], x.shape[2]).to(x.dtype)
        features, stats = self.transformer(x, mask, return_stats=return_stats)
        counted = features
        if mask is not None:
            # Weighted so that the mean of all patches is that of those which count.
            weights = mask * (mask[0].numel() / mask.sum((1, 2), keepdim=True).clamp(min=1))
            counted = features * weights[..., None].to(features.dtype)
        logits = self.linear_head(counted)
        if return_features and return_stats:
            return logits, features, stats
        if return_features:
            return logits, features
        return (logits, stats) if return_stats else logits

    @torch.no_grad()
    def load_embedding(self, embedding: StandardEmbedding, *, grid: tuple[int, int] | None = None) -> None:
        """Take over how a standard vision transformer embeds patches and their places.

        The convolution becomes the linear embedding of patches, with the same results. Positions are
        resampled to the grid of this model. That of the class token, which it has not, is left out.

        Args:
            embedding: see there; `standard_embedding` finds it among the weights of well-known models.
            grid: rows and columns of the positions; a square unless given.

        Raises:
            ValueError: if the model was not built with `patch_norm=False, learned_positions=True`, or for
                another width, patch size or number of channels, or positions that are no such grid. Then
                nothing was loaded.
        """
        linear = self.to_patch_embedding[2]
        assert isinstance(linear, nn.Linear)
        if self.positions is None or isinstance(self.to_patch_embedding[1], nn.LayerNorm):
            raise ValueError("expected a model built with patch_norm=False and learned_positions=True")
        weight, bias, positions = embedding
        shape = (linear.out_features, self.channels, *self.patch_size)
        if weight.shape != shape or bias.shape != shape[:1]:
            raise ValueError(
                f"patch_weight, patch_bias: expected {shape} and {shape[:1]}, "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        rows = positions.shape[1] if positions.ndim == 3 else 0
        p, q = grid or (math.isqrt(rows),) * 2
        if positions.shape != (1, rows, shape[0]) or rows - p * q not in (0, 1):
            raise ValueError(
                f"positions: expected [1, n, {shape[0]}] with n = {p} x {q}, and 1 more with a class token, "
                f"got {tuple(positions.shape)}; grid names the rows and columns of another"
            )
        linear.weight.copy_(rearrange(weight, "d c height width -> d (height width c)"))
        linear.bias.copy_(bias)
        table = positions[0, rows - p * q :].reshape(p, q, -1)
        self.positions.copy_(resample(table, *self.positions.shape[:2]))

    def _check_size(self, name: str, size: tuple[int, ...]) -> None:
        if any(side < patch or side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"{name}: expected sides that are multiples of {self.patch_size}, got {size}")


def standard_embedding(state_dict: Mapping[str, Tensor]) -> StandardEmbedding:
    """Find patch embedding and positions among the weights of a vision transformer.

    Args:
        state_dict: of a `VisionTransformer` of timm or torchvision, or a `ViTModel` of transformers, alone or
            within another model.

    Raises:
        ValueError: if one of the three is not found, or found twice.
    """
    found = {}
    for name, endings in STANDARD_NAMES.items():
        keys = [key for key in state_dict if f".{key}".endswith(tuple(f".{ending}" for ending in endings))]
        if len(keys) != 1:
            raise ValueError(f"state_dict: expected one key that ends in {' or '.join(endings)}, got {keys}")
        found[name] = state_dict[keys[0]]
    return StandardEmbedding(**found)


def resample(table: Tensor, rows: int, columns: int) -> Tensor:
    """A table of positions [p, q, d] at another grid, [rows, columns, d]: bicubic, with antialiasing."""
    if table.shape[:2] == (rows, columns):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32)).movedim(-1, 0)[None]
    resampled = F.interpolate(wide, size=(rows, columns), mode="bicubic", antialias=True)
    return resampled[0].movedim(0, -1).to(table.dtype)
