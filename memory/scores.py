"""Scores of rows, kept beside them, so that routing with the same tokens scores no row twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from xlroute.kernels import Backend, row_scores
from xlroute.kernels.arguments import compute_dtype, resolve_backend
from xlroute.memory.routing_keys import routing_keys

# Rows that are scored again before scores from disk are trusted: another machine may sum in another order.
_SAMPLES = 16

# Room for scores of rows to come: as many as there are, but no more than this.
_MOST_ROOM = 1 << 24

# New rows of several streams that are copied to be scored together.
_MOST_TOGETHER = 1 << 16

ReadRows = Callable[[int, int], Iterable[Tensor]]
# Of a layer and stream, the highest score of each of its oldest rows, [k], from the last time that the layer
# was scored; or what reads it from disk. None if there are no scores.
LatestScores = Tensor | Callable[[], Tensor | None] | None

# What is kept of rows: scores of routing tokens; scores of a projection's rows, from which routing keys are
# made; and, whatever weights come later, the scores and the routing keys that each row got first.
Kind = Literal["scores", "keys", "first scores", "first keys"]


class Scoring(NamedTuple):
    """How rows are scored beside their routing tokens: the options of `row_scores`."""

    normalize: Literal["rms", "l2"] | None
    scale: float
    backend: Backend | None


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

    Of the kinds that a row gets first, each row is scored once, against the tokens of the first call that
    finds it; other tokens later change nothing.

    Args:
        dtype: Type of the rows.
        device: Where the scores go.
        persisted: What is on disk, or was kept of the rows before they were written anew.
        kind: What is kept.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        persisted: PersistedScores | None = None,
        kind: Kind = "scores",
    ) -> None:
        self._rows_dtype = dtype
        self._dtype = dtype if kind == "first keys" else compute_dtype(dtype)  # of what is kept
        self._device = device
        self._persisted = persisted
        self._kind = kind
        self._tokens: Tensor | None = None  # a copy
        self._source: tuple[int, int] | None = None  # where they came from
        self._scoring: Scoring | None = None
        self._values = torch.empty(0, 0)  # of rows from `base` on, [r, n], or routing keys [r, n, e]
        self._base = 0
        self._first = 0  # the rows from here to `stop` have scores
        self._stop = 0
        self._ends: list[int] = []  # where the stream ended whenever rows were scored, ascending
        self._end: int | None = None  # the last number that a row has been promised
        self._others: dict[Kind, StoredScores] = {}  # of the same rows, once they are asked for

    def of_kind(self, kind: Kind) -> StoredScores:
        """These, the scores of routing tokens; or what stands beside them, in memory alone."""
        if kind == self._kind:
            return self
        if kind not in self._others:
            self._others[kind] = StoredScores(self._rows_dtype, self._device, kind=kind)
        return self._others[kind]

    def forget_first(self) -> None:
        """Lets go of what each row got first: all rows get it anew from the next call."""
        self._others = {kind: each for kind, each in self._others.items() if not each._lasts}

    @property
    def _lasts(self) -> bool:
        """Whether a row keeps what it got first."""
        return self._kind in ("first scores", "first keys")

    def extended(self, start: int, stop: int) -> StoredScores:
        """The scores of a stream that goes on with the numbers `start` to `stop`.

        They are these, unless another stream, a fork, has gone on from here with other rows: then a copy.
        """
        if self._end is None or self._end == start:
            self._end = stop
            return self
        copy = self._up_to(start)
        copy._end = stop
        return copy

    def _up_to(self, stop: int) -> StoredScores:
        """A copy, with the scores of rows before `stop`."""
        copy = StoredScores(self._rows_dtype, self._device, self._persisted, self._kind)
        if self._first <= stop:
            copy._tokens, copy._scoring = self._tokens, self._scoring
            copy._first, copy._stop = self._first, min(self._stop, stop)
            copy._base = self._first
            copy._values = self._values[:, self._first - self._base : copy._stop - self._base].clone()
            copy._ends = [min(end, stop) for end in self._ends]
        copy._others = {kind: each._up_to(stop) for kind, each in self._others.items()}
        return copy

    @property
    def nbytes(self) -> int:
        """Bytes of the scores and keys that are kept, with room for those to come."""
        carried = 0 if self._carried is None else self._carried.values.nbytes
        return self._values.nbytes + carried + sum(each.nbytes for each in self._others.values())

    @property
    def _carried(self) -> KeptScores | None:
        """Scores that were kept of the rows before they were written anew, until others are asked for."""
        return self._persisted if isinstance(self._persisted, KeptScores) else None

    def of(self, start: int, stop: int, tokens: Tensor, scoring: Scoring, read: ReadRows) -> Tensor:
        """The scores of rows `start` to `stop`, [r, stop - start], for reading only; or keys [r, ..., e].

        While a CUDA graph is captured, nothing can be compared or kept. Then the tokens of the last call are
        known by where they are in memory, and all rows are scored in the graph where they are others.

        Args:
            start: First row.
            stop: Row behind the last.
            tokens: Routing tokens, [r, d]. If they are others than last time, all rows are scored again. For
                the keys that rows get first, the projection, [r, e, d].
            scoring: How.
            read: Gives the rows between two numbers, in blocks [k, d].
        """
        tokens = tokens.detach()
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            known = scoring == self._scoring and (self._lasts or _source(tokens) == self._source)
            if known and self._first <= start <= stop <= self._stop:
                return self._values[:, start - self._base : stop - self._base]
            parts = [self.computed(rows, tokens, scoring) for rows in read(start, stop)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if not self._has(start, tokens, scoring):
            self._begin(start, tokens, scoring, read)
        self._source = _source(tokens)
        if stop > self._stop:
            self.extend((self.computed(rows, tokens, scoring) for rows in read(self._stop, stop)), start)
        return self._values[:, start - self._base : stop - self._base]

    def ends(self, start: int, stop: int) -> list[int]:
        """Where a stream that ends at `stop` now ended whenever rows from `start` on were scored, ascending.

        A row was scored the first time that the stream ended behind it.
        """
        return [min(end, stop) for end in self._ends if end > start]

    def computed(self, rows: Tensor, tokens: Tensor, scoring: Scoring) -> Tensor:
        """What is kept of rows [n, d]."""
        if self._kind == "first keys":
            return routing_keys(rows, tokens).transpose(0, 1)
        return row_scores(rows, tokens, **scoring._asdict())

    @property
    def stop(self) -> int:
        """The row behind the last that has scores."""
        return self._stop

    def lacks(self, start: int, stop: int, tokens: Tensor, scoring: Scoring) -> bool:
        """Whether rows from `start` on have scores of these tokens, but not all up to `stop`."""
        return self._has(start, tokens, scoring) and self._stop < stop

    def serves(self, start: int, tokens: Tensor, scoring: Scoring) -> bool:
        """Whether there are scores of these tokens, here or on disk, for rows from `start` on."""
        return self._has(start, tokens, scoring) or self._finds(start, tokens, scoring)

    def kept(self, start: int, stop: int) -> KeptScores | None:
        """The scores there are of rows `start` to `stop`, from which the result counts."""
        if self._carried is not None:
            first, last = max(start, self._carried.first), min(stop, self._carried.stop)
            values = self._carried.read(first, last)
            return KeptScores(self._carried.stamp, first - start, values) if first < last else None
        first, last = max(start, self._first), min(stop, self._stop)
        if self._tokens is None or self._scoring is None or first >= last:
            return None
        values = self._values[:, first - self._base : last - self._base]
        return KeptScores(_stamp(self._tokens, self._scoring), first - start, values)

    def _has(self, start: int, tokens: Tensor, scoring: Scoring) -> bool:
        known = self._tokens
        # The numbers are compared: weights can change without leaving a trace on their tensor.
        return (
            known is not None
            and scoring == self._scoring
            and self._first <= start <= self._stop
            and known.shape == tokens.shape
            and known.dtype == tokens.dtype
            and (self._lasts or torch.equal(known, tokens))
        )

    def _finds(self, start: int, tokens: Tensor, scoring: Scoring) -> bool:
        on_disk = self._persisted
        return (
            on_disk is not None
            and on_disk.first <= start <= on_disk.stop
            and on_disk.stamp == _stamp(tokens, scoring)
        )

    def _begin(self, start: int, tokens: Tensor, scoring: Scoring, read: ReadRows) -> None:
        """Forgets all scores, and takes those of the tokens that are on disk."""
        # A tensor made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._tokens = tokens.clone()
            shape = (tokens.shape[0], 0, *tokens.shape[1:-1])
            self._values = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._scoring, self._ends = scoring, []
        self._base = self._first = self._stop = start
        on_disk = self._persisted
        found = on_disk is not None and on_disk.stop > start and self._finds(start, tokens, scoring)
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
        if torch.equal(row_scores(rows, tokens, **scoring._asdict()), values[:, samples]):
            self._add(values, start)

    def extend(self, blocks: Iterable[Tensor], oldest: int) -> None:
        """Appends what is kept of all new rows, in blocks."""
        for values in blocks:
            self._add(values, oldest)
        self._ends = [*(end for end in self._ends if end > oldest), self._stop]

    def _add(self, values: Tensor, oldest: int) -> None:
        """Appends scores [r, n, ...] of the rows from `stop` on; those before `oldest` may go."""
        stop = self._stop + values.shape[1]
        if stop - self._base > self._values.shape[1]:
            self._first = min(max(self._first, oldest), self._stop)
            live = self._values[:, self._first - self._base : self._stop - self._base]
            with torch.inference_mode(False), torch.no_grad():
                count = stop - self._first
                shape = (values.shape[0], count + min(count, _MOST_ROOM), *values.shape[2:])
                self._values = torch.empty(shape, dtype=self._dtype, device=self._device)
                self._values[:, : live.shape[1]] = live
            self._base = self._first
        self._values[:, self._stop - self._base : stop - self._base] = values
        self._stop = stop


class NumberedRows(NamedTuple):
    """The rows of one stream in the numbers of what keeps their scores.

    Attributes:
        stored: What keeps them.
        start: The number of the oldest row.
        stop: The number behind the newest.
        read: Gives the rows between two numbers, in blocks [k, d].
    """

    stored: StoredScores
    start: int
    stop: int
    read: ReadRows

    def kept_scores(self) -> KeptScores | None:
        """The scores that are kept, if there are any."""
        return self.stored.kept(self.start, self.stop)

    def of_kind(self, kind: Kind) -> NumberedRows:
        """The same rows, with what keeps another kind of scores."""
        return self._replace(stored=self.stored.of_kind(kind))

    def scores(self, tokens: Tensor, scoring: Scoring) -> Tensor:
        """See `StoredScores.of`."""
        return self.stored.of(self.start, self.stop, tokens, scoring, self.read)


def score_new_rows(streams: Sequence[NumberedRows], tokens: Tensor, scoring: Scoring) -> None:
    """Scores what is new of several streams in one go, where it is little, for `StoredScores.of` to find."""
    tokens = tokens.detach()
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    new = [each for each in streams if each.stored.lacks(each.start, each.stop, tokens, scoring)]
    counts = [each.stop - each.stored.stop for each in new]
    if len(new) > 1 and sum(counts) <= _MOST_TOGETHER:
        rows = torch.cat([block for each in new for block in each.read(each.stored.stop, each.stop)])
        values = new[0].stored.computed(rows, tokens, scoring)
        for each, part in zip(new, torch.split(values, counts, dim=1), strict=True):
            each.stored.extend([part], each.start)


def _source(tokens: Tensor) -> tuple[int, int]:
    """Where a tensor is, and how often it was changed as far as it knows."""
    return tokens.data_ptr(), 0 if tokens.is_inference() else tokens._version


def _stamp(tokens: Tensor, scoring: Scoring) -> str:
    """32 hexadecimal digits for everything that a row's score depends on but the row."""
    backend = resolve_backend(scoring.backend, tokens)
    how = (
        str(tokens.dtype),
        tuple(tokens.shape),
        scoring.normalize,
        scoring.scale,
        backend,
        tokens.device.type,
    )
    numbers = tokens.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr(how).encode() + numbers).hexdigest()[:32]
