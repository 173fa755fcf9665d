"""The rows of one memory layer as they stood at one moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute.kernels import Backend, gather_rows_apart, row_places, unit_projections
from xlroute.kernels.arguments import HAS_TRITON
from xlroute.memory.at_hand import RowsAtHand
from xlroute.memory.buffer import Rows
from xlroute.memory.cold import ColdRows
from xlroute.memory.kept_values import KeptOfLayer, KeptValues
from xlroute.memory.log import StreamLogs
from xlroute.memory.routing_keys import RoutingKeys
from xlroute.memory.scores import LatestScores, Scoring
from xlroute.memory.side_by_side import Streams
from xlroute.memory.to_device import integers

# Whether scores or keys are kept for the next call; "first" for those that each row got first.
Keep = bool | Literal["first"]


def checked_indices(indices: Tensor, lengths: Tensor) -> Tensor:
    """Returns `indices` [b, ...] as int64 after checking them against `lengths` [b].

    Raises:
        TypeError: `indices` is not an integer tensor.
        ValueError: The first size is not b.
        IndexError: An index is below -1 or not below the length of its stream.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices: expected an integer tensor, got {type(indices).__name__}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"indices: expected an integer tensor, got {indices.dtype}")
    streams = lengths.shape[0]
    if indices.ndim == 0 or indices.shape[0] != streams:
        raise ValueError(f"indices: expected shape [{streams}, ...], got {list(indices.shape)}")
    indices = indices.long()
    if indices.numel():
        # One wait, where they are on a GPU.
        bounds = torch.stack(indices.reshape(streams, -1).aminmax(dim=1)).tolist()
        for stream, (low, high, length) in enumerate(zip(*bounds, lengths.tolist(), strict=True)):
            if low < -1 or high >= length:
                raise IndexError(
                    f"indices: expected -1 (no row) to {length - 1} in stream {stream}, "
                    f"which holds {length} rows, got {low if low < -1 else high}"
                )
    return indices


def positions_of(indices: Tensor, logs: StreamLogs) -> Tensor:
    """Positions of the rows at `indices` [b, ...], int64 of the same shape; -1 where the index is -1.

    Args:
        indices: Rows, 0 the oldest held; -1 for no row. All exist.
        logs: What each stream holds, [b].

    Raises:
        CorruptionError: The positions of rows on disk are damaged.
    """
    appended, held = logs.counts(indices.device)
    positions = torch.where(indices < 0, indices, indices + _along(appended - held, indices))
    for stream, log in enumerate(logs):
        if log.surviving:
            index, own = indices[stream], log.own_positions(indices.device)
            among = (index >= 0) & (index < log.surviving)
            found = own[torch.where(among, index, 0)]
            positions[stream] = torch.where(among, found, positions[stream])
    return positions


def _along(values: Tensor, indices: Tensor) -> Tensor:
    """Values [b] of streams, as they broadcast to indices [b, ...]."""
    return values.view(-1, *[1] * (indices.ndim - 1))


class MemoryLayer:
    """The rows of one layer at the moment of `MemoryStore.layer`; nothing that happens later changes them.

    Rows are counted from 0, the oldest. They carry no gradient. What the methods return of rows that the
    store keeps on disk is checked against its checksums.

    Attributes:
        device: Where the rows and everything computed from them live.
        dtype: The type of the rows.
    """

    def __init__(
        self,
        streams: Streams,
        logs: StreamLogs,
        *,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kept: KeptOfLayer,
        latest_scores: list[LatestScores] | None,
        count_routed: Callable[[Tensor], None] | None,
    ) -> None:
        self._streams = streams
        self._logs = logs
        self._dim = dim
        self._kept = kept
        # Where the store wants to know of each stream's scores, the highest of each row.
        self._latest_scores = latest_scores
        # Where the store wants to know which rows are routed.
        self._count_routed = count_routed
        self._longest = max(logs.lengths)
        # By what they are known by, scorings that are compared with those of the values that are kept.
        self._compared: dict[Any, Scoring] = {}
        self.dtype = dtype
        self.device = device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Streams, rows of the longest stream, and width: (b, m, d)."""
        return len(self._streams), self._longest, self._dim

    @cached_property
    def lengths(self) -> Tensor:
        """Rows held by each stream, int64 [b] on the CPU."""
        return integers(self._logs.lengths)

    @cached_property
    def even(self) -> bool:
        """Whether all streams hold equally many rows, and any at all: then `mask` is True everywhere."""
        return min(self._logs.lengths) == self._longest > 0

    @cached_property
    def mask(self) -> Tensor:
        """Which rows exist, bool [b, m]."""
        # As in `integers`: whoever reads it first, it stays for all.
        with torch.inference_mode(False):
            return (
                torch.arange(self.shape[1], device=self.device) < self._logs.counts(self.device)[1, :, None]
            )

    def views(self) -> list[Tensor]:
        """The rows of each stream, b tensors [m_i, d], oldest first, without a copy: for reading only."""
        return [rows.span().view() for rows in self._streams]

    def at_hand(self, newer: Tensor) -> RowsAtHand | None:
        """The rows by tensors alone, for code that is compiled.

        Args:
            newer: How many rows of each stream have come since, that are elsewhere, int64 [b] on the CPU.

        Returns:
            The rows; None where they are not all in memory and on one device, where some have positions of
            their own, or where the store counts what is routed.
        """
        if self._count_routed is not None or self._logs.surviving:
            return None
        lengths, together = self._logs.lengths, self._streams.side_by_side
        rows, begins = None, None
        if self.device.type == "cuda":
            if HAS_TRITON and not torch.cuda.is_current_stream_capturing():
                begins = row_places(self._addresses(), lengths, self.device)
        elif together is not None:
            rows, begins = together.columns, together.begins
        elif len(lengths) == 1 and (view := self._streams[0].at_hand()) is not None:
            rows, begins = view[None], [0]
        if begins is None:
            return None
        table = integers([begins, lengths, newer.tolist()], self.device)
        return RowsAtHand(rows, table[0], table[1], table[2], self._dim, self.dtype, self.even)

    def _addresses(self) -> list[int]:
        """Where the oldest row of each stream is in memory; none if some are not on the device."""
        if self._streams.side_by_side is not None:
            return self._streams.side_by_side.addresses()
        held = [rows for stream in self._streams if (rows := stream.at_hand()) is not None]
        return [rows.data_ptr() for rows in held] if len(held) == len(self._streams) else []

    def of_stream(self, stream: int) -> Rows:
        """The rows of one stream, wherever they are."""
        return self._streams[stream]

    def gather(self, indices: Tensor) -> Tensor:
        """Copies the rows at the given indices.

        Args:
            indices: Integers [b, ...]; -1 means no row and gathers zeros.

        Returns:
            Rows, [b, ..., d].

        Raises:
            TypeError: `indices` is not an integer tensor.
            ValueError: The first size is not b.
            IndexError: An index is below -1, or not below the number of rows of its stream.
            CorruptionError: A row on disk is damaged.
        """
        return self.take(checked_indices(indices, self.lengths))

    def prefetch(self, indices: Tensor) -> None:
        """Begins to fetch rows that will be gathered soon and are on disk; returns at once.

        Args:
            indices: As for `gather`.

        Raises:
            TypeError, ValueError, IndexError: As `gather`.
            CorruptionError: The file that a row is in is damaged or missing.
        """
        flat = checked_indices(indices, self.lengths).reshape(len(self._streams), -1)
        for rows, index in zip(self._streams, flat, strict=True):
            if len(rows):
                rows.prefetch(index)

    def take_routed(self, indices: Tensor) -> Tensor:
        """As `take`, for the rows that a router has chosen: a store that records routes counts them."""
        rows = self.take(indices)
        self.count_routed(indices)
        return rows

    def count_routed(self, indices: Tensor) -> None:
        """Counts rows at int64 indices [b, ...] as chosen by a router; -1 means no row."""
        if self._count_routed is not None:
            self._count_routed(indices)

    def take(self, indices: Tensor) -> Tensor:
        """As `gather`, for indices that are in range for sure, as those of a router are: nothing is checked.

        Args:
            indices: int64 [b, ...]; -1 means no row and gathers zeros.

        Returns:
            Rows, [b, ..., d]. For rows on a GPU, nothing waits for it.

        Raises:
            CorruptionError: A row on disk is damaged.
        """
        if self._streams.side_by_side is not None:
            found = self._streams.side_by_side.take(indices.to(self.device))
            if found is not None:
                return found
        flat = indices.reshape(len(self._streams), -1)
        at_hand = [held for rows in self._streams if (held := rows.at_hand()) is not None]
        if len(at_hand) == len(self._streams) > 1:
            return gather_rows_apart(at_hand, indices.to(self.device))
        parts = [
            rows.gather(index) if len(rows) else self._no_rows(index.shape[0])
            for rows, index in zip(self._streams, flat, strict=True)
        ]
        taken = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        return taken.view(*indices.shape, self._dim)

    def _no_rows(self, count: int) -> Tensor:
        return torch.zeros(count, self._dim, dtype=self.dtype, device=self.device)

    def positions(self, indices: Tensor) -> Tensor:
        """How many rows the stream had appended before each of these since its reset.

        Args:
            indices: Integers [b, ...]; -1 means no row and stays -1.

        Returns:
            Positions, int64 of the shape of `indices`. Eviction does not change a row's position.

        Raises:
            TypeError: `indices` is not an integer tensor.
            ValueError: The first size is not b.
            IndexError: An index is below -1, or not below the number of rows of its stream.
        """
        return self._positions(checked_indices(indices, self.lengths))

    def _positions(self, indices: Tensor) -> Tensor:
        return positions_of(indices, self._logs)

    def ages(self, indices: Tensor) -> Tensor:
        """How many rows the stream has appended from each of these on: 1 for the newest.

        Args:
            indices: int64 [b, ...], all in range, as for `take`; -1 means no row.

        Returns:
            Ages, int64 of the same shape; for no row, more than those of all rows.
        """
        return _along(self._logs.counts(indices.device)[0], indices) - self._positions(indices)

    def followers(self, indices: Tensor) -> Tensor:
        """Which rows were appended right after some others.

        Args:
            indices: int64 [b, ...], all in range; -1 means no row.

        Returns:
            Indices, int64 of the same shape; -1 where there is no such row, or where it has left.
        """
        newest = _along(self._logs.counts(indices.device)[1], indices) - 1
        following = torch.where((indices >= 0) & (indices < newest), indices + 1, -1)
        if self._logs.surviving:
            distance = self._positions(following) - self._positions(indices)
            following = torch.where(distance == 1, following, -1)
        return following

    def tokens_of_streams(self, tokens: Tensor) -> Tensor:
        """The routing tokens of each stream, [b, r, d], of those given, [r, d] or [b, r, d].

        Raises:
            ValueError: `tokens` has another shape.
        """
        self._check_tokens(tokens)
        return tokens.expand(len(self._streams), *tokens.shape[-2:])

    def _check_tokens(self, tokens: Tensor) -> None:
        streams, _, dim = self.shape
        if tokens.ndim not in (2, 3) or tokens.shape[-1] != dim or tokens.shape[:-2] not in ((), (streams,)):
            raise ValueError(
                f"tokens: expected shape [r, {dim}] or [{streams}, r, {dim}], got {list(tokens.shape)}"
            )

    def scores(
        self,
        tokens: Tensor,
        *,
        normalize: Literal["rms", "l2"] | None,
        scale: float,
        backend: Backend | None = None,
        keep: Keep = True,
        copy: bool = True,
    ) -> Tensor:
        """Scores every row against routing tokens: `scale * <normalize(row), token>`.

        Where no gradient is asked for, scores are kept in memory beside the rows. As long as the tokens stay
        the same, a call reads only rows that are new, and gives the same bits as one that reads all. A store
        with eviction "lowest_score" goes by what its layers were scored with last, if that was to be kept.

        Where tokens change from call to call, as in training, each row can keep the scores that it got first,
        from the first such call that found it, here or before the store was forked. These are kept besides,
        in memory alone: after opening a store, and for rows that are written anew since others have left from
        between them, the next call is the first one. `score_ages` tells how long ago it was.

        Args:
            tokens: Routing tokens, [r, d] for all streams or [b, r, d].
            normalize: How rows are normalised first: "rms", "l2" or None.
            scale: Factor on the scores.
            backend: As for `xlroute.kernels.row_scores`.
            keep: Keep the scores for the next call; False for tokens that will not come again, beside which
                those that are kept stay; "first" for the scores that rows got first, without gradient, by
                tokens [r, d].
            copy: The scores are the caller's own; False where they are only read, right away, and so may be
                those that are kept.

        Returns:
            Scores, [b, r, m], float32 (float64 for float64 rows), differentiable in `tokens`; columns beyond
            a stream's length are 0.

        Raises:
            ValueError: `tokens` has another shape.
            CorruptionError: A row on disk is damaged.
        """
        self._check_tokens(tokens)
        if keep == "first" and tokens.ndim == 3:
            raise ValueError(
                f"tokens: expected shape [r, {self._dim}] for first scores, got {[*tokens.shape]}"
            )

        def scoring(tokens: Tensor) -> Scoring:
            return Scoring(tokens, normalize=normalize, scale=scale, backend=backend)

        alike = scoring(tokens)
        alike = self._compared.get(alike.key, alike)
        side_by_side = self._streams.side_by_side
        if keep == "first":
            scores = self._kept_scores(self._kept.first_scores, alike, copy)
        elif keep and self._kept.scores is not None and tokens.ndim == 2 and not alike.differentiated:
            scores = self._kept_scores(self._kept.scores, alike, copy)
        elif side_by_side is not None and (not keep or alike.differentiated):
            scores = self._to_the_left(alike.of(side_by_side.columns), side_by_side.begins)
        elif tokens.ndim == 2 and not alike.differentiated:
            scores = self._in_columns([rows.scores(alike, keep) for rows in self._streams])
        else:
            pairs = zip(self._streams, self.tokens_of_streams(tokens), strict=True)
            scores = self._in_columns([rows.scores(scoring(each), keep) for rows, each in pairs])
        # What a CUDA graph computes is there only once it runs.
        capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        if keep and self._latest_scores is not None and not capturing:
            highest = scores.detach().amax(1)
            self._latest_scores[:] = [
                each[:length] for each, length in zip(highest, self._logs.lengths, strict=True)
            ]
        return scores

    @torch.no_grad()
    def _kept_scores(self, kept: KeptValues, scoring: Scoring, copy: bool) -> Tensor:
        """The scores [b, r, m] of all rows, those that are kept and new ones; or a view of what is kept."""
        found = kept.of(self._read_whole(), self._logs, scoring, len(scoring.tokens))
        if found is None:
            return self._in_columns([rows.scores(scoring, keep=False) for rows in self._streams])
        values = found.values[..., 0]
        return self._to_the_left(values.clone() if copy else values, found.begins)

    def _to_the_left(self, scores: Tensor, begins: Sequence[int]) -> Tensor:
        """Scores [b, r, c] of which those of a stream begin at some column, as [b, r, m], 0 for no row."""
        m = self.shape[1]
        if self.even and scores.shape[2] == m:
            return scores
        if (
            scores.is_cuda and torch.cuda.is_current_stream_capturing()
        ):  # which could not learn of the columns
            parts = zip(scores, begins, self._logs.lengths, strict=True)
            return self._in_columns([each[:, begin : begin + length] for each, begin, length in parts])
        columns = integers(begins, scores.device)[:, None, None]
        columns = (columns + torch.arange(m, device=scores.device)).clamp(max=scores.shape[2] - 1)
        there = scores.gather(-1, columns.expand(-1, scores.shape[1], -1))
        return there.masked_fill(~self.mask[:, None], 0.0)

    def _in_columns(self, scores: list[Tensor]) -> Tensor:
        """Those of each stream [r, m_i] in one tensor [b, r, m], 0 for no row."""
        # A copy even of one: what is kept stays as it is, whatever becomes of the result. Padding by nothing
        # would copy once more.
        lacking = [self.shape[1] - each.shape[-1] for each in scores]
        return torch.stack(
            [F.pad(each, (0, n)) if n else each for each, n in zip(scores, lacking, strict=True)]
        )

    def _read_whole(self) -> Streams:
        """The rows of each stream; those on disk are read, and stay in memory."""
        if self._streams.side_by_side is not None:
            return self._streams
        return Streams(rows.span() if isinstance(rows, ColdRows) else rows for rows in self._streams)

    @torch.no_grad()
    def keys(self, projection: Tensor, *, keep: Keep) -> RoutingKeys:
        """Routing keys of every row, see `routing_keys`, in the type of the rows, without gradient.

        Args:
            projection: [r, e, d].
            keep: Keep the keys in memory: as long as the projection stays the same, a call projects only rows
                that are new, and gives the same bits as one that projects all. False for a projection that is
                about to change: products of matrices are faster. "first" for the keys that rows got first, as
                for `scores`.

        Raises:
            CorruptionError: A row on disk is damaged.
        """
        (b, m, _), (r, e, _) = self.shape, projection.shape
        streams = self._read_whole()
        if keep:
            kept = self._kept.first_keys if keep == "first" else self._kept.keys
            # The products of a key are scores of its row.
            scoring = self._key_scoring(projection)
            scoring = self._compared.get(scoring.key, scoring)
            found = kept.of(streams, self._logs, scoring, r)
            if found is not None:
                return RoutingKeys(*found)
        if self._streams.side_by_side is not None:
            columns = self._streams.side_by_side.columns
            keys = torch.empty(b, r, columns.shape[1], e, dtype=self.dtype, device=self.device)
            unit_projections(columns, projection, keys)
            return RoutingKeys(keys, self._streams.side_by_side.begins, self._logs.lengths)
        keys = torch.empty(b, r, m, e, dtype=self.dtype, device=self.device)
        for rows, out in zip(streams, keys[:, None], strict=True):
            held, start = rows.at_hand(), 0
            for read in rows.blocks(0, len(rows)) if held is None else (held,):
                unit_projections(read[None], projection, out[:, :, start : start + len(read)])
                start += len(read)
        return RoutingKeys(keys, [0] * b, self._logs.lengths)

    def kept_scoring(
        self, tokens: Tensor, *, normalize: Literal["rms", "l2"] | None, scale: float, backend: Backend | None
    ) -> tuple[Scoring, KeptValues] | None:
        """How `scores` would score, and the scores that are kept; None if it compares nothing."""
        return self._beside(
            self._kept.scores, Scoring(tokens, normalize=normalize, scale=scale, backend=backend)
        )

    def kept_key_scoring(self, projection: Tensor) -> tuple[Scoring, KeptValues] | None:
        """As `kept_scoring`, for `keys`."""
        return self._beside(self._kept.keys, self._key_scoring(projection))

    def _beside(self, kept: KeptValues | None, scoring: Scoring) -> tuple[Scoring, KeptValues] | None:
        tokens = scoring.tokens
        capturing = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        if kept is None or kept.scoring is None or tokens.ndim != 2 or scoring.differentiated or capturing:
            return None
        self._compared[scoring.key] = scoring
        return scoring, kept

    @staticmethod
    def _key_scoring(projection: Tensor) -> Scoring:
        return Scoring(projection.flatten(0, 1), normalize=None, scale=1.0, backend=None)

    def score_ages(self, indices: Tensor, kind: Literal["first scores", "first keys"]) -> Tensor:
        """How many rows the stream has appended since each of these got its first scores or keys.

        Args:
            indices: int64 [b, ...], all in range, as for `take`, of rows that have some; -1 means no row.
            kind: Which of both.

        Returns:
            int64 of the same shape, 0 for rows that were scored after the newest had come; -1 for no row.
        """
        kept = self._kept.first_scores if kind == "first scores" else self._kept.first_keys
        ends = [kept.ends(stream, log) for stream, log in enumerate(self._logs)]
        times = 1 + max(map(len, ends))
        filled = [
            each + [length] * (times - len(each))
            for each, length in zip(ends, self._logs.lengths, strict=True)
        ]
        table = integers(filled, indices.device)  # [b, times], ascending
        flat = indices.reshape(len(ends), -1)
        ages = table[:, -1:] - table.gather(1, torch.searchsorted(table, flat, right=True))
        return ages.masked_fill(flat < 0, -1).view(indices.shape)
