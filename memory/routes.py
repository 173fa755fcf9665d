"""How often routers have fetched each row of a store: noted while they do, added up when somebody asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlroute.memory.commits import CommittedRoutes
from xlroute.memory.layer import positions_of
from xlroute.memory.log import StreamLogs

_MOST_WAITING = 8 * 2**20  # bytes of what is not added up yet
_CALL_BYTES = 1024  # that a call takes up besides its indices


class RoutedRows(NamedTuple):
    """The rows of one layer and stream that were ever routed.

    Attributes:
        positions: Their positions, ascending, [n].
        counts: How often each was routed, at least 1, [n].
    """

    positions: NDArray[np.int64]
    counts: NDArray[np.int64]

    def and_more(self, positions: NDArray[np.int64], counts: NDArray[np.int64]) -> RoutedRows:
        """These and others, whose positions may be any."""
        both, places = np.unique(np.concatenate((self.positions, positions)), return_inverse=True)
        total = np.zeros(len(both), np.int64)
        np.add.at(total, places, np.concatenate((self.counts, counts)))
        return RoutedRows(both, total)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often the rows at some positions were routed, of the same shape."""
        if not self.positions.size:
            return np.zeros(positions.shape, np.int64)
        places = np.searchsorted(self.positions, positions).clip(max=len(self.positions) - 1)
        return np.where(self.positions[places] == positions, self.counts[places], 0)


NO_ROWS = RoutedRows(np.empty(0, np.int64), np.empty(0, np.int64))


class DocumentRoutes:
    """How often the rows of one stream were routed since its reset.

    Args:
        layers: Memory layers.
        committed: What the commit that was opened says of them, if anything.
        read: Reads that, by layer, or gives None if it is lost; called once, when it is needed.

    Attributes:
        committed: What a commit can say of them as they are; None if they are not written yet, or lost.
    """

    def __init__(
        self,
        layers: int,
        committed: CommittedRoutes | None = None,
        read: Callable[[], list[RoutedRows] | None] | None = None,
    ) -> None:
        self._layers = layers
        self._read = read
        self.committed = committed

    @cached_property
    def rows(self) -> list[RoutedRows]:
        """The rows that were routed, by layer."""
        rows = None if self._read is None else self._read()
        if rows is None:
            self.committed = None
        return [NO_ROWS] * self._layers if rows is None else rows

    @property
    def total(self) -> int:
        """How often any of them was routed."""
        return int(sum(each.counts.sum() for each in self.rows))

    @property
    def nbytes(self) -> int:
        """Bytes of the counts in memory."""
        rows = self.rows if "rows" in self.__dict__ else []
        return sum(each.positions.nbytes + each.counts.nbytes for each in rows)

    def add(self, layer: int, positions: NDArray[np.int64]) -> None:
        """Counts the rows of a layer at some positions, each as often as it is there."""
        if positions.size:
            self.rows[layer] = self.rows[layer].and_more(*np.unique(positions, return_counts=True))
            self.committed = None

    def copy(self) -> DocumentRoutes:
        """The same, to be counted on elsewhere."""
        other = DocumentRoutes(self._layers)
        other.rows = [*self.rows]
        return other


class _Routing(NamedTuple):
    """The indices [b, ...] that a router has fetched of a layer, on the CPU or on their way there."""

    layer: int
    logs: StreamLogs
    documents: tuple[DocumentRoutes, ...]
    indices: Tensor
    there: torch.cuda.Event | None


class RouteCounts:
    """How often routers have fetched each row of a store, by layer, stream and position.

    `MemoryStore.record_routes` begins to count, and `MemoryStore.routes` has what was counted. A row counts
    as often as a router chooses it, by `MemoryLayer.take_routed` or `count_routed`: with several routing
    tokens, once for each that has chosen it, and by token, once for each token and set. Rows that anybody
    gathers are not counted, nor those that a model reads because the row before was routed. Padding is no
    row.

    A row keeps its count when it is evicted. When its stream is reset, the counts of the stream begin anew:
    they are those of the document that is being read. A row that was ever routed takes 16 bytes, and on disk
    12, which a commit writes anew for every stream that was routed since the last one.

    For rows on a GPU, routing does not wait: indices are copied while it goes on, and added up once they take
    up 8 MiB, or when somebody asks. What is routed in a CUDA graph is not counted. What is routed again in
    the backward, because a layer is checkpointed, is counted again.

    Args:
        layers: Memory layers.
        documents: What was counted of each stream before.

    Attributes:
        recording: Whether what is routed is counted now.
    """

    def __init__(self, layers: int, documents: Sequence[DocumentRoutes]) -> None:
        self.recording = False
        self._layers = layers
        self._documents = (*documents,)
        self._waiting: deque[_Routing] = deque()
        self._waiting_bytes = 0

    def of(self, layer: int, stream: int) -> tuple[Tensor, Tensor]:
        """The rows of a layer and stream that were routed since the stream's reset, held or not.

        Returns:
            Their positions, ascending, and how often each was routed, both int64 [n] on the CPU.

        Raises:
            IndexError: There is no such layer or stream.
        """
        for name, given, count in (
            ("layer", layer, self._layers),
            ("stream", stream, len(self._documents)),
        ):
            if not 0 <= given < count:
                raise IndexError(f"{name}: expected 0 to {count - 1}, got {given}")
        positions, counts = self.documents[stream].rows[layer]
        return torch.tensor(positions), torch.tensor(counts)

    @property
    def totals(self) -> tuple[int, ...]:
        """How often any row was routed, of each stream since its reset, in all layers together, [b]."""
        return tuple(document.total for document in self.documents)

    @property
    def nbytes(self) -> int:
        """Bytes of the counts in memory, and of what is not added up yet."""
        return sum(document.nbytes for document in self._documents) + self._waiting_bytes

    @property
    def documents(self) -> tuple[DocumentRoutes, ...]:
        """What was counted of each stream since its reset, up to now."""
        self._add_up(0)
        return self._documents

    def counter(self, layer: int, logs: StreamLogs) -> Callable[[Tensor], None] | None:
        """What counts the indices [b, ...] of rows that are fetched of a layer whose streams hold `logs`.

        It goes on counting for the documents of this moment, whatever is reset later. None if nothing is
        counted.
        """
        if not self.recording:
            return None
        return partial(self._note, layer, logs, self._documents)

    def reset(self, streams: set[int]) -> None:
        """Begins anew for some streams."""
        self._documents = tuple(
            DocumentRoutes(self._layers) if stream in streams else document
            for stream, document in enumerate(self._documents)
        )

    def fork(self) -> RouteCounts:
        """The same counts, from which both go on by themselves."""
        fork = RouteCounts(self._layers, [document.copy() for document in self.documents])
        fork.recording = self.recording
        return fork

    def _note(
        self,
        layer: int,
        logs: StreamLogs,
        documents: tuple[DocumentRoutes, ...],
        indices: Tensor,
    ) -> None:
        there = None
        if indices.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # A copy in any case: the indices are the router's.
        copy = indices.to("cpu", non_blocking=True, copy=True)
        if there is not None:
            there.record(torch.cuda.current_stream(indices.device))
        self._waiting.append(_Routing(layer, logs, documents, copy, there))
        self._waiting_bytes += copy.nbytes + _CALL_BYTES
        if self._waiting_bytes > _MOST_WAITING:
            # The older half has been there for long.
            self._add_up(_MOST_WAITING // 2)

    def _add_up(self, left: int) -> None:
        """Adds up the oldest routings that wait, until they take up so many bytes, or fewer."""
        found: dict[tuple[DocumentRoutes, int], list[NDArray[np.int64]]] = {}
        while self._waiting_bytes > left:
            layer, logs, documents, indices, there = self._waiting.popleft()
            self._waiting_bytes -= indices.nbytes + _CALL_BYTES
            if there is not None:
                there.synchronize()
            positions = positions_of(indices.reshape(len(logs), -1), logs)
            for document, own in zip(documents, positions, strict=True):
                found.setdefault((document, layer), []).append(own[own >= 0].numpy())
        for (document, layer), parts in found.items():
            document.add(layer, np.concatenate(parts))
