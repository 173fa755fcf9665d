"""Routing keys: what a query is compared with to find a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.scoring import RMS_EPS


def routing_keys(rows: Tensor, projection: Tensor, *, own: bool = False) -> Tensor:
    """Projections of rows over their root mean square, of unit length; differentiable in both.

    Args:
        rows: [..., d]; with `own`, [..., r, k, d].
        projection: [r, e, d].
        own: project the rows of each of r sets with its own projection alone.

    Returns:
        [..., r, e]; with `own`, [..., r, k, e]. float32 unless the rows are float64, under autocast too.
    """
    wide = compute_dtype(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        rows = F.rms_norm(rows.to(wide), rows.shape[-1:], eps=RMS_EPS)
        equation = "...rkd,red->...rke" if own else "...d,red->...re"
        return F.normalize(torch.einsum(equation, rows, projection.to(wide)), dim=-1)
