"""Transformer-XL over very long documents with a routed long-term memory."""

from xlroute.cross_attention import ConditionalRoutedCrossAttention
from xlroute.feedforward import ConditionalRoutedFeedForward
from xlroute.router import CoordinateDescentRouter, RouterOutput, RoutingStats
from xlroute.state import TransformerXLState
from xlroute.topk import TopkReturn, topk
from xlroute.transformer_xl import RoutedTransformerXL, Routing

__all__ = [
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "CoordinateDescentRouter",
    "RoutedTransformerXL",
    "RouterOutput",
    "Routing",
    "RoutingStats",
    "TopkReturn",
    "TransformerXLState",
    "topk",
]
