"""Scores of rows, kept beside them, so that routing with the same tokens scores no row twice."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xlroute.kernels import Backend, row_scores
from xlroute.kernels.arguments import compute_dtype


class StoredScores:
    """Scores of rows of a buffer against the routing tokens that were asked for last.

    A row's score has the same bits whatever other rows it is scored with (see `row_scores`). So scores of
    different calls stand side by side, and are those that one call would give.

    Args:
        rows: The buffer, [size, d], in which a row never changes once it is asked for.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._key: tuple[Tensor, str | None, float, Backend | None] | None = None
        self._values = torch.empty(0)
        self._first = 0  # the rows from here to `stop` have scores
        self._stop = 0

    def of(
        self,
        start: int,
        stop: int,
        tokens: Tensor,
        *,
        normalize: Literal["rms", "l2"] | None,
        scale: float,
        backend: Backend | None,
    ) -> Tensor:
        """The scores of rows `start` to `stop`, [r, stop - start], for reading only.

        Args:
            start: First row.
            stop: Row behind the last.
            tokens: Routing tokens, [r, d]. If they are others than last time, all rows are scored again.
            normalize: As for `row_scores`, like the rest.
            scale: See there.
            backend: See there.
        """
        if not self._first <= start <= self._stop or not self._is_for(tokens, normalize, scale, backend):
            # A tensor made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._key = (tokens.detach().clone(), normalize, scale, backend)
                shape = (tokens.shape[0], self._rows.shape[0])
                dtype = compute_dtype(self._rows.dtype)
                self._values = torch.empty(shape, dtype=dtype, device=self._rows.device)
            self._first = self._stop = start
        if stop > self._stop:
            new = self._rows[self._stop : stop]
            self._values[:, self._stop : stop] = row_scores(
                new, tokens.detach(), normalize=normalize, scale=scale, backend=backend
            )
            self._stop = stop
        return self._values[:, start:stop]

    def _is_for(self, tokens: Tensor, normalize: str | None, scale: float, backend: Backend | None) -> bool:
        if self._key is None or self._key[1:] != (normalize, scale, backend):
            return False
        known = self._key[0]
        # The numbers are compared: weights can change without leaving a trace on their tensor.
        return known.shape == tokens.shape and known.dtype == tokens.dtype and torch.equal(known, tokens)
