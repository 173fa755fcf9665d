"""A vision transformer whose attention and feedforward are conditionally routed.

Shapes: b images, p rows and q columns of patches, d dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from xlroute.feedforward import ConditionalRoutedFeedForward
from xlroute.image_attention import ConditionalRoutedImageAttention
from xlroute.position import sincos_2d


class RoutedImageTransformer(nn.Module):
    """Layers of routed image attention and routed feedforward, each with a residual."""

    def __init__(
        self, dim: int, *, depth: int, attention: Mapping[str, Any], feedforward: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    ConditionalRoutedImageAttention(dim, **attention),
                    ConditionalRoutedFeedForward(dim, **feedforward),
                )
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b, p, q, d] -> [b, p, q, d]."""
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feedforward = layer
            x = attention(x) + x
            x = feedforward(x.flatten(1, 2)).unflatten(1, x.shape[1:3]) + x
        return x


class ConditionalRoutedViT(nn.Module):
    """Vision transformer (arXiv 2010.11929) of routed image attention and routed feedforward layers.

    Patches are embedded between two norms, get the sines and cosines of their row and column as positions
    (arXiv 2205.01580), and are averaged for the logits. Images of any size are taken, as long as patches of
    the same size divide them.

    Args:
        image_size: height and width of images in pixels, or one number for both; checked against the patches.
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
        router_use_triton: whether routing runs in Triton; None picks by device.
        flash_attn: see `use_flash_attn` of `ConditionalRoutedAttention`.
        attn_num_routed_kv: routing tokens of keys and values.
        default_coor_descent_eps: ε of the routers, unless `router_kwargs` names it.

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
    ) -> None:
        super().__init__()
        if dim % 4 != 0:
            raise ValueError(f"dim: expected a multiple of 4, for sines and cosines of two axes, got {dim}")
        self.channels = channels
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self._check_size(
            "image_size", (image_size, image_size) if isinstance(image_size, int) else image_size
        )
        height, width = self.patch_size
        patch_dim = channels * height * width
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (p height) (q width) -> b p q (height width c)", height=height, width=width),
            nn.LayerNorm(patch_dim),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )
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

    def forward(self, img: Tensor, *, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images.

        Args:
            img: [b, channels, height, width], sides that are multiples of the patch's.
            return_features: return the features of the patches too, for dense tasks.

        Returns:
            Logits [b, num_classes]; with `return_features`, those and features [b, p, q, d].

        Raises:
            ValueError: for images of other channels, or sides that the patches do not divide.
        """
        if img.ndim != 4 or img.shape[1] != self.channels:
            raise ValueError(f"img: expected [b, {self.channels}, height, width], got {tuple(img.shape)}")
        self._check_size("img", tuple(img.shape[2:]))
        x = self.to_patch_embedding(img)
        x = x + sincos_2d(*x.shape[1:], device=x.device, dtype=x.dtype)
        features = self.transformer(x)
        logits = self.linear_head(features)
        return (logits, features) if return_features else logits

    def _check_size(self, name: str, size: tuple[int, ...]) -> None:
        if any(side < patch or side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"{name}: expected sides that are multiples of {self.patch_size}, got {size}")
