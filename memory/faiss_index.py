"""The rows of one stream in an index of faiss, added at the newest end and taken away at the oldest.

faiss cannot delete from every kind of index, and from no kind without going through all of it. So rows that
have left stay where they are, and searches pass over them; whoever keeps the index builds it anew when
`outdated` says so.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlroute.memory.errors import CorruptionError

FaissKind = Literal["flat", "hnsw", "ivf", "ivfpq"]
FAISS_KINDS: tuple[FaissKind, ...] = ("flat", "hnsw", "ivf", "ivfpq")
TRAINED_KINDS: tuple[FaissKind, ...] = ("ivf", "ivfpq")

# Lists are trained on rows drawn with this seed.
_SEED = 20240229
# Fewer rows than these are not worth lists: all of them are scored.
_LEAST_TRAINED = 4096
_TRAINED_PER_LIST = 64
# An index is trained anew when it holds so many times the rows that it was trained for.
_OUTGROWN = 4
# Of the lists, a search looks into one in so many, and into as many as hold so many times k rows.
_LISTS_PER_PROBE = 8
_ROWS_PER_FOUND = 16
# Neighbours of a row in the graph of HNSW, and how many it is chosen from.
_LINKS, _LINK_CANDIDATES = 32, 128
# Rounding to float16 swaps neighbours, and codes order rows roughly: so many more than k, and so many times
# k are fetched, for the caller to choose from.
_SPARE = 32
_FETCHED_PER_CODE = 2
_CODE_BITS = 8
_LARGEST_HALF = torch.finfo(torch.float16).max
# What the kernels of faiss can return.
_MOST_ON_GPU = 2048


def import_faiss(kind: str) -> Any:
    """The module faiss.

    Raises:
        ImportError: It is not installed, or not in a way that works.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            f"kind: expected faiss to be installed for {kind!r}, got none ({error}): pip install "
            "'xlroute[faiss]', or use kind='exact'"
        ) from error
    except RuntimeError as error:
        # What a wheel for GPUs raises that does not find its CUDA libraries.
        raise ImportError(
            f"kind: expected a faiss that can be imported for {kind!r}, got one that fails ({error}): "
            "install the CUDA libraries that faiss-gpu needs, or faiss-cpu in its place; never both"
        ) from error


def list_count(rows: int) -> int:
    """How many lists an index of so many rows has: about 2 sqrt(rows), a power of two; 0 if it has none."""
    return 2 ** round(math.log2(2 * math.sqrt(rows))) if rows >= _LEAST_TRAINED else 0


class FaissIndex:
    """Rows of one stream in faiss. Rows count from 0, the oldest that has not been removed.

    Args:
        kind: "flat", "hnsw", "ivf" or "ivfpq".
        index: faiss's own index.
        device: Where the rows are. On a GPU, all kinds but "hnsw" go there if faiss has it.
        trained_for: How many rows there were when it was trained; 0 if it never was.
        removed: How many of the rows in it have left.
    """

    def __init__(
        self, kind: FaissKind, index: Any, device: torch.device, *, trained_for: int = 0, removed: int = 0
    ) -> None:
        self.kind = kind
        self.trained_for = trained_for
        self.removed = removed
        self._faiss = faiss = import_faiss(kind)
        self._on_gpu = device.type == "cuda" and kind != "hnsw" and hasattr(faiss, "StandardGpuResources")
        if self._on_gpu:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
        self._index = index

    @classmethod
    def empty(
        cls, kind: FaissKind, dim: int, device: torch.device, rows: int, read: Callable[[Tensor], Tensor]
    ) -> FaissIndex:
        """An index without rows, trained for those to come.

        Args:
            kind: "flat", "hnsw", "ivf" or "ivfpq".
            dim: Width of a row.
            device: Where the rows are.
            rows: How many rows will be added at once.
            read: Reads some of them, [n, d], by their indices, int64 [n]. It is asked for a sample.

        Raises:
            ImportError: faiss is not installed, or not in a way that works.
        """
        faiss = import_faiss(kind)
        lists = list_count(rows) if kind in TRAINED_KINDS else 0
        if kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = _LINK_CANDIDATES
        elif not lists:
            index = faiss.IndexFlatIP(dim)
        else:
            quantizer = faiss.IndexFlatIP(dim)
            if kind == "ivf":
                half, by_residual = faiss.ScalarQuantizer.QT_fp16, False
                index = faiss.IndexIVFScalarQuantizer(
                    quantizer, dim, lists, half, faiss.METRIC_INNER_PRODUCT, by_residual
                )
            else:
                index = faiss.IndexIVFPQ(
                    quantizer, dim, lists, _code_bytes(dim), _CODE_BITS, faiss.METRIC_INNER_PRODUCT
                )
            generator = torch.Generator().manual_seed(_SEED)
            drawn = torch.randint(rows, (_TRAINED_PER_LIST * lists,), generator=generator)
            for clustering in (index.cp, index.pq.cp) if kind == "ivfpq" else (index.cp,):
                clustering.seed = _SEED
                # Lists of few rows are no mistake here: faiss would warn of them.
                clustering.min_points_per_centroid = 1
            index.train(_as_array(read(torch.unique(drawn))))
        return cls(kind, index, device, trained_for=rows if lists else 0)

    @classmethod
    def deserialize(
        cls,
        kind: FaissKind,
        dim: int,
        device: torch.device,
        data: bytes,
        *,
        held: int,
        trained_for: int,
        removed: int,
    ) -> FaissIndex:
        """The index that `serialize` made bytes of.

        Raises:
            ImportError: faiss is not installed, or not in a way that works.
            CorruptionError: It is another one, or faiss cannot read it.
        """
        faiss = import_faiss(kind)
        try:
            index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            message = next(iter(str(error).splitlines()), "")
            raise CorruptionError(
                f"expected an index that faiss can read, got one that it refuses: {message}"
            ) from error
        found = (index.d, index.ntotal, index.metric_type)
        expected = (dim, removed + held, faiss.METRIC_INNER_PRODUCT)
        if found != expected:
            raise CorruptionError(f"expected width, rows and metric {expected}, got {found}")
        return cls(kind, index, device, trained_for=trained_for, removed=removed)

    def serialize(self) -> bytes:
        """The index as bytes, with the rows that have left."""
        index = self._faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index
        data: bytes = self._faiss.serialize_index(index).tobytes()
        return data

    def __len__(self) -> int:
        """The number of rows held."""
        return int(self._index.ntotal) - self.removed

    def outdated(self, dropped: int, rows: int) -> bool:
        """Whether to build anew rather than to remove `dropped` rows and go on to hold `rows`.

        So it is when more rows would have left than are held, and when an index with lists would hold four
        times the rows that it was trained for. On average a row is then added a constant number of times.
        """
        if self.removed + dropped > rows:
            return True
        return self.kind in TRAINED_KINDS and rows >= max(_OUTGROWN * self.trained_for, _LEAST_TRAINED)

    def add(self, rows: Tensor) -> None:
        """Adds rows [n, d] at the newest end."""
        if self.kind == "ivf" and self.trained_for:
            # A search needs numbers that float16 has; the caller scores with those that the rows have.
            rows = rows.clamp(-_LARGEST_HALF, _LARGEST_HALF)
        with self._in_order():
            self._index.add(_as_array(rows))

    def remove_oldest(self, count: int) -> None:
        """Lets go of the oldest rows."""
        self.removed += count

    def search(self, tokens: Tensor, k: int, nprobe: int | None) -> Tensor:
        """Finds about the rows of highest inner product with each token.

        Args:
            tokens: Routing tokens [r, d].
            k: How many are looked for.
            nprobe: Into how many lists to look; None for the default.

        Returns:
            Indices of rows, int64 [r, c] on the CPU, ascending, each at most once, with -1 in front for none.
            Up to k, or more to choose from; on a GPU at most 2,048.
        """
        if self.kind == "ivf":
            k += _SPARE
        elif self.kind == "ivfpq":
            k *= _FETCHED_PER_CODE
        k = min(k, len(self))
        if k == 0:
            return torch.empty(tokens.shape[0], 0, dtype=torch.int64)
        # On a GPU rows cannot be passed over: more are fetched, and those that have left count as none.
        fetched = min(k + self.removed, _MOST_ON_GPU) if self._on_gpu else k
        _, found = self._index.search(_as_array(tokens), fetched, params=self._parameters(k, nprobe))
        found = np.where(found >= self.removed, found - self.removed, -1)
        return torch.from_numpy(np.sort(found, axis=-1))

    def _parameters(self, k: int, nprobe: int | None) -> Any:
        """How hard faiss searches, and for which rows."""
        faiss = self._faiss
        selected: dict[str, Any] = {}
        if self.removed and not self._on_gpu:
            selected["sel"] = faiss.IDSelectorRange(self.removed, self._index.ntotal)
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=2 * k, **selected)
        if not self.trained_for:
            return faiss.SearchParameters(**selected) if selected else None
        lists = self._index.nlist
        if nprobe is None:
            enough = math.ceil(_ROWS_PER_FOUND * k * lists / len(self))
            nprobe = max(lists // _LISTS_PER_PROBE, enough)
        return faiss.SearchParametersIVF(nprobe=min(nprobe, lists), **selected)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Adds to a graph in one thread: with several, it depends on which of them comes first."""
        if self.kind != "hnsw":
            yield
            return
        threads = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(threads)


def _code_bytes(dim: int) -> int:
    """Bytes of a row's code: one for each of as many equal parts of it as are 4 wide or more."""
    return max(parts for parts in range(1, max(dim // 4, 1) + 1) if dim % parts == 0)


def _as_array(rows: Tensor) -> NDArray[np.float32]:
    """Rows as faiss takes them."""
    array: NDArray[np.float32] = rows.detach().to("cpu", torch.float32).contiguous().numpy()
    return array
