"""Routing keys: what a query is compared with to find a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.scoring import RMS_EPS


def routing_keys(rows: Tensor, projection: Tensor) -> Tensor:
    """Projections of rows over their root mean square, of unit length; differentiable in both.

    Args:
        rows: [..., d].
        projection: [r, e, d].

    Returns:
        [..., r, e], float32 unless the rows are float64, under autocast too.
    """
    wide = compute_dtype(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        rows = F.rms_norm(rows.to(wide), rows.shape[-1:], eps=RMS_EPS)
        return F.normalize(torch.einsum("...d,red->...re", rows, projection.to(wide)), dim=-1)
