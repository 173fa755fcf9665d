"""Scores of rows, kept beside them, so that routing with the same tokens scores no row twice."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xlroute.kernels import Backend, row_scores
from xlroute.kernels.arguments import compute_dtype


class Scoring(NamedTuple):
    """How rows are scored beside their routing tokens: the options of `row_scores`."""

    normalize: Literal["rms", "l2"] | None
    scale: float
    backend: Backend | None


class StoredScores:
    """Scores of rows of a buffer against the routing tokens that were asked for last.

    A row's score has the same bits whatever other rows it is scored with (see `row_scores`). So scores of
    different calls stand side by side, and are those that one call would give.

    Args:
        rows: The buffer, [size, d], in which a row never changes once it is asked for.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._tokens: Tensor | None = None  # a copy
        self._source: tuple[int, int] | None = None  # where they came from
        self._scoring: Scoring | None = None
        self._values = torch.empty(0)
        self._first = 0  # the rows from here to `stop` have scores
        self._stop = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the scores that are kept, with room for all rows of the buffer."""
        return self._values.nbytes

    def of(self, start: int, stop: int, tokens: Tensor, scoring: Scoring) -> Tensor:
        """The scores of rows `start` to `stop`, [r, stop - start], for reading only.

        While a CUDA graph is captured, nothing can be compared or kept. Then the tokens of the last call are
        known by where they are in memory, and all rows are scored in the graph where they are others.

        Args:
            start: First row.
            stop: Row behind the last.
            tokens: Routing tokens, [r, d]. If they are others than last time, all rows are scored again.
            scoring: How.
        """
        tokens = tokens.detach()
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            known = scoring == self._scoring and _source(tokens) == self._source
            if known and self._first <= start <= stop <= self._stop:
                return self._values[:, start:stop]
            return row_scores(self._rows[start:stop], tokens, **scoring._asdict())
        if not self._first <= start <= self._stop or scoring != self._scoring or not self._knows(tokens):
            # A tensor made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._tokens = tokens.clone()
                shape = (tokens.shape[0], self._rows.shape[0])
                dtype = compute_dtype(self._rows.dtype)
                self._values = torch.empty(shape, dtype=dtype, device=self._rows.device)
            self._scoring = scoring
            self._first = self._stop = start
        self._source = _source(tokens)
        if stop > self._stop:
            new = self._rows[self._stop : stop]
            self._values[:, self._stop : stop] = row_scores(new, tokens, **scoring._asdict())
            self._stop = stop
        return self._values[:, start:stop]

    def _knows(self, tokens: Tensor) -> bool:
        """Whether the tokens hold the same numbers: weights can change without leaving a trace elsewhere."""
        known = self._tokens
        return (
            known is not None
            and known.shape == tokens.shape
            and known.dtype == tokens.dtype
            and torch.equal(known, tokens)
        )


def _source(tokens: Tensor) -> tuple[int, int]:
    """Where a tensor is, and how often it was changed as far as it knows."""
    return tokens.data_ptr(), 0 if tokens.is_inference() else tokens._version
