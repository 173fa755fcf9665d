"""The numerical ops of routing: one plain-PyTorch reference each, behind one function each."""

from xlroute.kernels.arguments import Backend
from xlroute.kernels.bias_gelu import bias_gelu
from xlroute.kernels.descent import coordinate_descent
from xlroute.kernels.gather import (
    gather_gated_rows,
    gather_pinned_rows,
    gather_rows,
    gather_rows_apart,
    gather_rows_at,
    row_places,
    scatter_rows,
)
from xlroute.kernels.gathered_attention import gathered_attention
from xlroute.kernels.gathered_products import gathered_products, gathered_sums
from xlroute.kernels.keys_values import gated_keys_values, gather_keys_values
from xlroute.kernels.local_attention import local_attention
from xlroute.kernels.norm import norm_beside
from xlroute.kernels.projections import unit_projections
from xlroute.kernels.scoring import row_scores
from xlroute.kernels.search import search_topk
from xlroute.kernels.selection import top_indices
from xlroute.kernels.water_level import soft_topk, soft_topk_with_indices, top_gates, water_levels

__all__ = [
    "Backend",
    "bias_gelu",
    "coordinate_descent",
    "gated_keys_values",
    "gather_gated_rows",
    "gather_keys_values",
    "gather_pinned_rows",
    "gather_rows",
    "gather_rows_apart",
    "gather_rows_at",
    "gathered_attention",
    "gathered_products",
    "gathered_sums",
    "local_attention",
    "norm_beside",
    "row_places",
    "row_scores",
    "scatter_rows",
    "search_topk",
    "soft_topk",
    "soft_topk_with_indices",
    "top_gates",
    "top_indices",
    "unit_projections",
    "water_levels",
]
