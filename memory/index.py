"""The rows of a memory that have the highest inner products with given routing tokens."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.kernels.arguments import check_floating, compute_dtype
from xlroute.kernels.scoring import L2_EPS, RMS_EPS
from xlroute.kernels.search import take_best
from xlroute.memory.buffer import Rows
from xlroute.memory.errors import CorruptionError, NoPathError, StoreWriteError
from xlroute.memory.exact_search import search_rows
from xlroute.memory.faiss_index import FAISS_KINDS, TRAINED_KINDS, FaissIndex, FaissKind, import_faiss
from xlroute.memory.index_files import SavedRows, read_index, write_index
from xlroute.memory.layer import MemoryLayer
from xlroute.memory.layout import check_positive
from xlroute.memory.log import Extent, StreamLog
from xlroute.memory.store import MemoryStore

IndexKind = Literal["exact"] | FaissKind

# Rows are copied to float32 before faiss takes them: so many at a time.
_ROWS_AT_ONCE = 2**16


class _Followed(NamedTuple):
    """The index of one layer and stream, and the rows of the log that it holds."""

    extents: tuple[Extent, ...]
    rows: FaissIndex


class MemoryIndex:
    """Finds the k rows of a memory layer with the highest inner product with each routing token.

    An index follows its store: what was appended, evicted or reset since the last call is taken over by the
    next one, which reads no other rows. Streams are independent of each other.

    | kind | finds | keeps |
    |---|---|---|
    | "exact" | the k best, equal ones by the lower index; reads all rows, a block at a time | nothing |
    | "flat" | the k best up to rounding | the rows in float32 |
    | "hnsw" | about the k best, through a graph of neighbours | the rows in float32, and the graph |
    | "ivf" | about the k best, in the lists nearest to the token | the rows in float16, in lists |
    | "ivfpq" | about the k best, in the same lists, by codes | a byte for every four numbers or so |

    All but "exact" are those of faiss (Douze et al., arXiv 2401.08281), with product quantisation after Jégou
    et al. (2011) and HNSW after Malkov and Yashunin (arXiv 1603.09320). Whatever the kind is, the scores that
    are returned are those of `xlroute.kernels.row_scores`, of the rows found. The same calls give the same
    result: lists are trained on rows that are drawn with a fixed seed, and graphs grow in one thread.

    Lists are for 4,096 rows or more; below, all rows are scored. There are about 2 sqrt(m) of them, a power
    of two, for the m rows there are at the time, trained on 64 rows for each list; they are trained anew when
    m has become four times as many. Nothing is deleted from an index of faiss: rows that have left stay in it
    until they are more than those held, and then it is built anew. For a store on a GPU all kinds but "hnsw"
    live there too where faiss has one; they then find up to 2,048 rows.

    Args:
        store: The memory. The index can be used as long as it is open.
        kind: "exact", or one of faiss: "flat", "hnsw", "ivf", "ivfpq".
        normalize: How rows are normalised first: "rms", "l2" or None, as for `MemoryLayer.scores`.
        nprobe: For "ivf" and "ivfpq", the lists that are looked into. None for one in 8, and as many as hold
            16 times k rows on average.
        path: A folder of its own where the index is kept, outside of the store's. If it holds one that
            belongs to rows of this store, that one goes on from there.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `kind` or `normalize` is another one, `nprobe` is below 1 or given for a kind without
            lists, or `path` is inside of the store's folder or given for "exact".
        ImportError: faiss is not installed, or not in a way that works.

    Warns:
        UserWarning: What is at `path` is damaged, or was made with other settings; the index is built anew.
    """

    def __init__(
        self,
        store: MemoryStore,
        kind: IndexKind = "exact",
        *,
        normalize: Literal["rms", "l2"] | None = None,
        nprobe: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if kind != "exact" and kind not in FAISS_KINDS:
            raise ValueError(
                f"kind: expected one of 'exact', {', '.join(map(repr, FAISS_KINDS))}, got {kind!r}"
            )
        if normalize not in ("rms", "l2", None):
            raise ValueError(f"normalize: expected 'rms', 'l2' or None, got {normalize!r}")
        if nprobe is not None:
            check_positive("nprobe", nprobe)
            if kind not in TRAINED_KINDS:
                raise ValueError(f"nprobe: expected None for kind={kind!r}, which has no lists, got {nprobe}")
        self.kind: IndexKind = kind
        self._faiss_kind = None if kind == "exact" else kind
        self._store = store
        self._normalize = normalize
        self._nprobe = nprobe
        self._path = None if path is None else self._checked_path(Path(path).absolute())
        self._followed: dict[tuple[int, int], _Followed] = {}
        if self._faiss_kind is not None:
            import_faiss(self._faiss_kind)
            if self._path is not None:
                self._load(self._faiss_kind, self._path)

    def search(self, layer: int, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the rows of a layer with the highest inner products.

        Args:
            layer: Layer.
            tokens: Routing tokens, [r, d] for all streams or [b, r, d].
            k: How many rows to find for each token and stream.

        Returns:
            Scores [b, r, k], highest first, float32 (float64 for float64 rows); and which rows they are of,
            int64 [b, r, k], 0 the oldest held now, as `MemoryStore.gather` takes them. Where a stream holds
            fewer rows, or an approximate kind has found fewer, they are -inf and -1. Neither carries a
            gradient; both are on the store's device.

        Raises:
            TypeError: `tokens` is no floating-point tensor, or `k` is no integer.
            ValueError: `tokens` has another shape, or `k` is below 1.
            IndexError: There is no such layer.
            StoreClosedError: The store was closed.
            CorruptionError: A row on disk is damaged.
        """
        held, per_stream = self._checked(layer, tokens, k)
        if self._faiss_kind is None:
            return self._exact(held, per_stream, k)
        logs = self._store.logs
        results = []
        with torch.no_grad():
            for stream, queries in enumerate(per_stream):
                rows = held.of_stream(stream)
                index = self._up_to_date(self._faiss_kind, layer, stream, logs[stream], rows)
                found = index.search(queries, k, self._nprobe).to(held.device)
                results.append(self._scored(rows, queries, found, k))
        scores, indices = zip(*results, strict=True)
        return torch.stack(scores), torch.stack(indices)

    def recall(self, layer: int, tokens: Tensor, k: int) -> float:
        """The share of the k best rows that `search` finds, over all streams and tokens: its recall@k.

        A row counts if its score is at least that of the k-th best row, so that it does not matter which of
        equal ones were found. Without rows to find, the recall is 1.

        Args:
            layer: Layer.
            tokens: Routing tokens, [r, d] for all streams or [b, r, d].
            k: How many rows to find for each token and stream.

        Raises:
            TypeError, ValueError, IndexError, StoreClosedError, CorruptionError: As `search`.
        """
        held, per_stream = self._checked(layer, tokens, k)
        _, indices = self._exact(held, per_stream, k)
        # As the rows that were found are scored: on a GPU, bits depend on how many tokens are scored at once.
        best = torch.stack(
            [
                self._scored(held.of_stream(stream), queries, index.sort(-1).values, k)[0]
                for stream, (queries, index) in enumerate(zip(per_stream, indices, strict=True))
            ]
        )
        found, _ = self.search(layer, tokens, k)
        exist = best > -math.inf
        least = torch.where(exist, best, math.inf).amin(-1, keepdim=True)
        expected = int(exist.sum())
        return int((found >= least).sum()) / expected if expected else 1.0

    def update(self) -> None:
        """Takes over now what has changed in the store, in all layers, so that no search has to.

        Raises:
            StoreClosedError: The store was closed.
            CorruptionError: A row on disk is damaged.
        """
        logs = self._store.logs
        if self._faiss_kind is None:
            return
        for layer in range(self._store.layers):
            held = self._store.layer(layer)
            for stream, log in enumerate(logs):
                self._up_to_date(self._faiss_kind, layer, stream, log, held.of_stream(stream))

    def save(self) -> None:
        """Brings the index up to date and writes it to `path` in place of what was there, all or nothing.

        It belongs to the rows that the store holds now; commit those first. Opened with a later commit, it
        goes on from what that still holds of them; with another one, it is built anew.

        Raises:
            NoPathError: The index has no path, or the store lives in memory.
            StoreWriteError: The operating system refused to write; what was there is there still.
            StoreClosedError: The store was closed.
            CorruptionError: A row on disk is damaged.
        """
        if self._path is None or self._store.path is None:
            lacks = "an index" if self._path is None else "a store"
            raise NoPathError(f"save: expected {lacks} with a path, got one without")
        self.update()
        saved = [
            SavedRows(
                layer,
                stream,
                each.extents,
                each.rows.trained_for,
                each.rows.removed,
                each.rows.serialize(),
            )
            for (layer, stream), each in sorted(self._followed.items())
        ]
        try:
            write_index(self._path, self._settings(), saved)
        except OSError as error:
            text = f"{self._path}: expected to write, got {error.strerror or error}"
            raise StoreWriteError(error.errno, text) from error

    def _checked_path(self, path: Path) -> Path:
        if self.kind == "exact":
            raise ValueError(f"path: expected None for kind='exact', which keeps nothing, got {path}")
        store = self._store.path
        if isinstance(store, Path) and path.resolve().is_relative_to(store.resolve()):
            raise ValueError(f"path: expected a folder outside of the store {store}, got {path}")
        return path

    def _checked(self, layer: int, tokens: Tensor, k: int) -> tuple[MemoryLayer, Tensor]:
        """The layer as it is now, and the tokens of each stream."""
        check_floating("tokens", tokens)
        check_positive("k", k)
        held = self._store.layer(layer)
        return held, held.tokens_of_streams(tokens).detach().to(held.device)

    def _exact(self, held: MemoryLayer, per_stream: Tensor, k: int) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(held.dtype)
        results = []
        with torch.no_grad():
            for stream, queries in enumerate(per_stream):
                rows = held.of_stream(stream)
                blocks = rows.blocks(0, len(rows))
                results.append(search_rows(blocks, queries, k, normalize=self._normalize, dtype=dtype))
        scores, indices = zip(*results, strict=True)
        return torch.stack(scores), torch.stack(indices)

    def _scored(self, rows: Rows, queries: Tensor, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of the rows found, int64 [r, c], by their scores in full precision."""
        taken = rows.gather(found.reshape(-1)).view(*found.shape, self._store.dim)
        scores = row_scores(taken, queries[:, None], normalize=self._normalize)[:, 0]
        return take_best(scores.masked_fill(found < 0, -math.inf), found, k)

    def _up_to_date(self, kind: FaissKind, layer: int, stream: int, log: StreamLog, rows: Rows) -> FaissIndex:
        """The index of a stream once it holds what the log says."""
        followed = self._followed.get((layer, stream))
        if followed is not None and followed.extents == log.extents:
            return followed.rows
        # What fails half way must not be taken for an index.
        self._followed.pop((layer, stream), None)
        kept = 0
        if followed is not None:
            index, kept = followed.rows, kept_rows(followed.extents, log.extents)
            if kept and index.outdated(len(index) - kept, log.held):
                kept = 0
        if kept:
            index.remove_oldest(len(index) - kept)
        else:
            index = FaissIndex.empty(
                kind,
                self._store.dim,
                self._store.device,
                log.held,
                lambda drawn: self._normalized(rows.gather(drawn)),
            )
        for block in rows.blocks(kept, len(rows)):
            for start in range(0, block.shape[0], _ROWS_AT_ONCE):
                index.add(self._normalized(block[start : start + _ROWS_AT_ONCE]))
        self._followed[layer, stream] = _Followed(log.extents, index)
        return index

    def _normalized(self, rows: Tensor) -> Tensor:
        """The rows as they are scored."""
        wide = rows.to(compute_dtype(rows.dtype))
        if self._normalize == "rms":
            return wide / (wide.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()
        if self._normalize == "l2":
            return wide / (wide.square().sum(-1, keepdim=True) + L2_EPS).sqrt()
        return wide

    def _settings(self) -> dict[str, Any]:
        """What a saved index must have been made with to be of use here."""
        store = self._store
        return {
            "kind": self.kind,
            "normalize": self._normalize,
            "layers": store.layers,
            "streams": store.streams,
            "dim": store.dim,
        }

    def _load(self, kind: FaissKind, path: Path) -> None:
        try:
            for saved in read_index(path, self._settings()):
                index = FaissIndex.deserialize(
                    kind,
                    self._store.dim,
                    self._store.device,
                    saved.data,
                    held=sum(extent.stop - extent.start for extent in saved.extents),
                    trained_for=saved.trained_for,
                    removed=saved.removed,
                )
                self._followed[saved.layer, saved.stream] = _Followed(saved.extents, index)
        except CorruptionError as error:
            self._followed.clear()
            warnings.warn(f"{path}: the index is built anew: {error}", stacklevel=3)


def kept_rows(before: tuple[Extent, ...], now: tuple[Extent, ...]) -> int:
    """How many of the rows held before are the oldest of those held now, all others of them having left.

    Row and writer together name a row for ever, whichever commit refers to it.

    Returns:
        The number of the newest rows of `before` that `now` begins with; 0 if what lies between is not that.
    """
    if not before or not now:
        return 0
    first = now[0]
    dropped = 0
    for extent in before:
        if extent.writer == first.writer and extent.start <= first.start < extent.stop:
            dropped += first.start - extent.start
            break
        dropped += extent.stop - extent.start
    held = StreamLog(before).held
    kept = held - dropped
    if StreamLog(now).held < kept or StreamLog(now).part(0, kept) != StreamLog(before).part(dropped, held):
        return 0
    return kept
