"""Scores of rows, kept beside them, so that routing with the same tokens scores no row twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from xlroute.kernels import Backend, row_scores
from xlroute.kernels.arguments import compute_dtype, resolve_backend

# Rows that are scored again before scores from disk are trusted: another machine may sum in another order.
_SAMPLES = 16

# Room for scores of rows to come: as many as there are, but no more than this.
_MOST_ROOM = 1 << 24

ReadRows = Callable[[int, int], Iterable[Tensor]]
# Of a layer and stream, the highest score of each of its oldest rows, [k], from the last time that the layer
# was scored; or what reads it from disk. None if there are no scores.
LatestScores = Tensor | Callable[[], Tensor | None] | None


class Scoring:
    """Routing tokens, and how they score.

    One serves all streams that the same tokens score: they are compared with those of an earlier call once,
    for which the host waits for a GPU if it was not told how that ends, and copied once.

    Args:
        tokens: [r, d].
        normalize, scale, backend: As for `row_scores`.
    """

    def __init__(
        self, tokens: Tensor, *, normalize: Literal["rms", "l2"] | None, scale: float, backend: Backend | None
    ) -> None:
        self.tokens = tokens
        self.options: dict[str, Any] = {"normalize": normalize, "scale": scale, "backend": backend}
        self._copy: Scoring | None = None
        self._other: Scoring | None = None  # one that was found to differ

    def of(self, rows: Tensor) -> Tensor:
        """The scores of rows [m, d], [r, m]."""
        return row_scores(rows, self.tokens, **self.options)

    @property
    def differentiated(self) -> bool:
        """Whether gradient to the tokens is asked for."""
        return torch.is_grad_enabled() and self.tokens.requires_grad

    @property
    def source(self) -> tuple[int, int]:
        """Where the tokens are, and how often they were changed as far as they know."""
        return self.tokens.data_ptr(), 0 if self.tokens.is_inference() else self.tokens._version

    @property
    def key(self) -> Any:
        """What another one of the same tokens has too, as long as these live."""
        return self.source, self.tokens.shape, *self.options.values()

    @cached_property
    def stamp(self) -> str:
        """32 hexadecimal digits for everything that a row's score depends on but the row."""
        tokens = self.tokens.detach()
        how = (
            str(tokens.dtype),
            tuple(tokens.shape),
            self.options["normalize"],
            self.options["scale"],
            resolve_backend(self.options["backend"], tokens),
            tokens.device.type,
        )
        numbers = tokens.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(repr(how).encode() + numbers).hexdigest()[:32]

    def copy(self) -> Scoring:
        """The same, out of reach of changes of the tokens; or an earlier copy that was found to be that."""
        if self._copy is None:
            # A tensor made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._copy = Scoring(self.tokens.detach().clone(), **self.options)
        return self._copy

    def equals(self, copy: Scoring) -> bool:
        """Whether it is what an earlier one was when it was copied."""
        if copy is self._copy or copy is self._other:
            return copy is self._copy
        # The numbers are compared: weights can change without leaving a trace on their tensor.
        equal = self.comparable(copy) and torch.equal(self.tokens, copy.tokens)
        self.settle(copy, equal)
        return equal

    def comparable(self, copy: Scoring) -> bool:
        """Whether all but the numbers of the tokens is the same."""
        ours, theirs = self.tokens, copy.tokens
        same = ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
        return same and self.options == copy.options

    def settle(self, copy: Scoring, equal: bool) -> None:
        """Remembers whether it is what an earlier one was when it was copied."""
        if not equal:
            self._other = copy
        elif self._copy is None:
            self._copy = copy


class KeptScores(NamedTuple):
    """Scores of some adjacent rows of a stream.

    Attributes:
        stamp: Stands for the routing tokens and how they scored.
        first: The first row that has scores, counted from the oldest row held.
        values: The scores, [r, n].
    """

    stamp: str
    first: int
    values: Tensor

    @property
    def stop(self) -> int:
        """The row behind the last that has scores."""
        return self.first + self.values.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        """Those of rows `start` to `stop`, [r, stop - start]."""
        return self.values[:, start - self.first : stop - self.first]

    def chosen(self, rows: Tensor) -> KeptScores | None:
        """The scores of some rows, ascending int64 [k], which are then counted from the first of these."""
        first, last = (int(each) for each in torch.searchsorted(rows, torch.tensor([self.first, self.stop])))
        if first == last:
            return None
        columns = (rows[first:last] - self.first).to(self.values.device)
        return KeptScores(self.stamp, first, self.values[:, columns])


class PersistedScores(Protocol):
    """Scores of rows `first` to `stop` that were computed earlier, of which some are checked again."""

    @property
    def stamp(self) -> str:
        """Stands for the routing tokens and how they scored."""

    @property
    def first(self) -> int:
        """The first row that has scores."""

    @property
    def stop(self) -> int:
        """The row behind the last."""

    def read(self, start: int, stop: int) -> Tensor | None:
        """Those of rows `start` to `stop`, [r, stop - start]; None if they are damaged or gone."""


class StoredScores:
    """Scores of the rows of one stream against the routing tokens that were asked for last.

    A row's score has the same bits whatever other rows it is scored with (see `row_scores`). So scores of
    different calls stand side by side, and are those that one call would give. Rows are counted in any way in
    which a row keeps its number, and no other row ever gets it.

    Args:
        dtype: Type of the rows.
        device: Where the scores go.
        persisted: What is on disk, or was kept of the rows before they were written anew.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, persisted: PersistedScores | None = None
    ) -> None:
        self._dtype = compute_dtype(dtype)  # of the scores
        self._device = device
        self._persisted = persisted
        self._scoring: Scoring | None = None  # a copy
        self._source: tuple[int, int] | None = None  # where its tokens came from
        self._values = torch.empty(0, 0)  # of rows from `base` on
        self._base = 0
        self._first = 0  # the rows from here to `stop` have scores
        self._stop = 0
        self._end: int | None = None  # the last number that a row has been promised

    def extended(self, start: int, stop: int) -> StoredScores:
        """The scores of a stream that goes on with the numbers `start` to `stop`.

        They are these, unless another stream, a fork, has gone on from here with other rows: then a copy.
        """
        if self._end is None or self._end == start:
            self._end = stop
            return self
        copy = StoredScores(self._dtype, self._device, self._persisted)
        copy._end = stop
        if self._first <= start:
            copy._scoring = self._scoring
            copy._first, copy._stop = self._first, min(self._stop, start)
            copy._base = self._first
            copy._values = self._values[:, self._first - self._base : copy._stop - self._base].clone()
        return copy

    @property
    def nbytes(self) -> int:
        """Bytes of the scores that are kept, with room for those to come."""
        return self._values.nbytes + (0 if self._carried is None else self._carried.values.nbytes)

    @property
    def _carried(self) -> KeptScores | None:
        """Scores that were kept of the rows before they were written anew, until others are asked for."""
        return self._persisted if isinstance(self._persisted, KeptScores) else None

    def of(self, start: int, stop: int, scoring: Scoring, read: ReadRows) -> Tensor:
        """The scores of rows `start` to `stop`, [r, stop - start], for reading only.

        While a CUDA graph is captured, nothing can be compared or kept. Then the tokens of the last call are
        known by where they are in memory, and all rows are scored in the graph where they are others.

        Args:
            start: First row.
            stop: Row behind the last.
            scoring: Routing tokens, and how. If they are others than last time, all rows are scored again.
            read: Gives the rows between two numbers, in blocks [k, d].
        """
        if scoring.tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            known = self._scoring is not None and scoring.options == self._scoring.options
            if known and scoring.source == self._source and self._first <= start <= stop <= self._stop:
                return self._values[:, start - self._base : stop - self._base]
            parts = [scoring.of(rows) for rows in read(start, stop)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if not self._has(start, scoring):
            self._begin(start, scoring, read)
        # All streams then have one copy, to be compared with once.
        self._scoring, self._source = scoring.copy(), scoring.source
        if stop > self._stop:
            for rows in read(self._stop, stop):
                self._add(scoring.of(rows).detach(), start)
        return self._values[:, start - self._base : stop - self._base]

    def serves(self, start: int, scoring: Scoring) -> bool:
        """Whether there are scores of these tokens, here or on disk, for rows from `start` on."""
        return self._has(start, scoring) or self._finds(start, scoring)

    def kept(self, start: int, stop: int) -> KeptScores | None:
        """The scores there are of rows `start` to `stop`, from which the result counts."""
        if self._carried is not None:
            first, last = max(start, self._carried.first), min(stop, self._carried.stop)
            values = self._carried.read(first, last)
            return KeptScores(self._carried.stamp, first - start, values) if first < last else None
        first, last = max(start, self._first), min(stop, self._stop)
        if self._scoring is None or first >= last:
            return None
        values = self._values[:, first - self._base : last - self._base]
        return KeptScores(self._scoring.stamp, first - start, values)

    def _has(self, start: int, scoring: Scoring) -> bool:
        known = self._scoring
        return known is not None and self._first <= start <= self._stop and scoring.equals(known)

    def _finds(self, start: int, scoring: Scoring) -> bool:
        on_disk = self._persisted
        return (
            on_disk is not None and on_disk.first <= start <= on_disk.stop and on_disk.stamp == scoring.stamp
        )

    def _begin(self, start: int, scoring: Scoring, read: ReadRows) -> None:
        """Forgets all scores, and takes those of the tokens that are on disk."""
        # As in `Scoring.copy`.
        with torch.inference_mode(False), torch.no_grad():
            self._values = torch.empty(len(scoring.tokens), 0, dtype=self._dtype, device=self._device)
        self._scoring = scoring.copy()
        self._base = self._first = self._stop = start
        on_disk = self._persisted
        found = on_disk is not None and on_disk.stop > start and self._finds(start, scoring)
        if self._carried is not None:
            self._persisted = None
        if on_disk is None or not found:
            return
        values = on_disk.read(start, on_disk.stop)
        if values is None:
            return
        values = values.to(self._device)
        count = min(_SAMPLES, values.shape[1])
        # float32 could not count them.
        samples = torch.linspace(0, values.shape[1] - 1, count, dtype=torch.float64).long().tolist()
        rows = torch.cat([block for each in samples for block in read(start + each, start + each + 1)])
        if torch.equal(scoring.of(rows), values[:, samples]):
            self._add(values, start)

    def _add(self, values: Tensor, oldest: int) -> None:
        """Appends scores [r, n] of the rows from `stop` on; those before `oldest` may go."""
        stop = self._stop + values.shape[1]
        if stop - self._base > self._values.shape[1]:
            self._first = min(max(self._first, oldest), self._stop)
            live = self._values[:, self._first - self._base : self._stop - self._base]
            with torch.inference_mode(False), torch.no_grad():
                count = stop - self._first
                shape = (values.shape[0], count + min(count, _MOST_ROOM))
                self._values = torch.empty(shape, dtype=self._dtype, device=self._device)
                self._values[:, : live.shape[1]] = live
            self._base = self._first
        self._values[:, self._stop - self._base : stop - self._base] = values
        self._stop = stop
