"""Transformer-XL over very long documents with a routed long-term memory."""

from xlroute.attention import ConditionalRoutedAttention
from xlroute.autoregressive import (
    AutoregressiveCache,
    AutoregressiveStats,
    ConditionalRoutedAutoregressiveAttention,
)
from xlroute.cross_attention import AttentionStats, ConditionalRoutedCrossAttention
from xlroute.feedforward import ConditionalRoutedFeedForward
from xlroute.image_attention import ConditionalRoutedImageAttention
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats
from xlroute.state import TransformerXLState
from xlroute.topk import TopkReturn, topk
from xlroute.transformer_block import BlockStats, ConditionalRoutedTransformerBlock
from xlroute.transformer_xl import RoutedTransformerXL, Routing
from xlroute.vit import ConditionalRoutedViT

__all__ = [
    "AttentionStats",
    "AutoregressiveCache",
    "AutoregressiveStats",
    "BlockStats",
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "ConditionalRoutedViT",
    "CoordinateDescentRouter",
    "RoutedTransformerXL",
    "RouterOutput",
    "Routing",
    "RoutingStats",
    "TopkReturn",
    "TransformerXLState",
    "topk",
]
