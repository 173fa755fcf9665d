"""The numerical ops of routing: one plain-PyTorch reference each, behind one function each."""

from xlroute.kernels.descent import coordinate_descent
from xlroute.kernels.gather import gather_rows
from xlroute.kernels.scoring import row_scores
from xlroute.kernels.selection import top_indices
from xlroute.kernels.water_level import soft_topk

__all__ = ["coordinate_descent", "gather_rows", "row_scores", "soft_topk", "top_indices"]
