"""Routing keys: what a query is compared with to find a row, of all rows of a layer side by side.

Shapes: b streams, m rows of the longest, n queries, d dim, r sets of keys, e width of a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels import Backend, search_topk
from xlroute.kernels.arguments import compute_dtype
from xlroute.kernels.norm import norm_beside
from xlroute.kernels.projections import SHORTEST, projections
from xlroute.memory.to_device import integers


def routing_keys(rows: Tensor, projection: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Projections of rows, of unit length; differentiable in both.

    Products are those of the rows' type, float32 for float16: for rows in bfloat16, the projection is rounded
    to that, and so are they, as keys that are kept.

    Args:
        rows: [..., d].
        projection: [r, e, d].
        backend: "torch", "triton", or None to pick by device.

    Returns:
        [..., r, e], float32 unless the rows are float64, under autocast too.
    """
    with torch.autocast(rows.device.type, enabled=False):
        products = projections(rows, projection).to(compute_dtype(rows.dtype))
        e = products.shape[-1]
        # A key is of unit length if its root mean square is that of e numbers which add up to 1 when squared.
        to_unit = products.new_full((e,), e**-0.5)
        return norm_beside(products, to_unit, eps=SHORTEST**2 / e, readers=0, backend=backend)[0]


def keys_of_sets(rows: Tensor, projection: Tensor) -> Tensor:
    """As `routing_keys`, of rows [b, r, m, d] that have each the key of their set alone: [b, r, m, e]."""
    with torch.autocast(rows.device.type, enabled=False):
        if rows.dtype == torch.float16:
            rows = rows.float()
        products = (rows @ projection.to(rows.dtype).mT).to(compute_dtype(rows.dtype))
        e = products.shape[-1]
        return cast(Tensor, F.rms_norm(products, (e,), eps=SHORTEST**2 / e) * e**-0.5)


class RoutingKeys:
    """The routing keys of all rows of a layer, for the search of the best.

    Args:
        keys: [b, r, c, e], out of a longer buffer or not. Those of a stream stand side by side in some of the
            c columns; the others mean nothing.
        begins: The column of each stream's oldest row.
        lengths: How many rows each stream holds.
    """

    def __init__(self, keys: Tensor, begins: Sequence[int], lengths: Sequence[int]) -> None:
        self.keys = keys
        self._begins = begins
        self._lengths = lengths

    def of_stream(self, stream: int) -> Tensor:
        """Those of one stream, [r, m_i, e], without a copy."""
        return self.keys[stream].narrow(1, self._begins[stream], self._lengths[stream])

    def search(self, queries: Tensor, k: int, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
        """The rows whose keys have the highest inner product with each query; see `search_topk`.

        Args:
            queries: [b, r, n, e], rounded to the type of the keys.
            k: How many.
            backend: As for `search_topk`.

        Returns:
            Scores [b, r, n, min(k, m)], and rows, int64; -inf and -1 where a stream has no more.
        """
        b, r = queries.shape[:2]
        k = min(k, max(self._lengths))
        scores, found = search_topk(
            queries.to(self.keys.dtype).flatten(0, 1),
            self.keys.flatten(0, 1),
            k,
            mask=self._mask,
            backend=backend,
        )
        scores, found = (torch.unflatten(t, 0, (b, r)) for t in (scores, found))
        if any(self._begins):
            found = torch.where(found < 0, -1, found - self._spans[0].view(-1, 1, 1, 1))
        return scores, found

    @cached_property
    def _spans(self) -> Tensor:
        """The columns of each stream, from the first to behind the last, int64 [2, b], on the device."""
        stops = [begin + length for begin, length in zip(self._begins, self._lengths, strict=True)]
        return integers([self._begins, stops], self.keys.device)

    @cached_property
    def _mask(self) -> Tensor | None:
        """Which columns hold keys of each stream and set, bool [b r, c]; None if all do."""
        _, r, columns, _ = self.keys.shape
        if min(self._lengths) == columns:
            return None
        # As in `integers`: a search in inference mode may not be the last one.
        with torch.inference_mode(False):
            column = torch.arange(columns, device=self.keys.device)
            first, stop = self._spans[..., None]
            mask: Tensor = (column >= first) & (column < stop)
            return mask.repeat_interleave(r, dim=0)
