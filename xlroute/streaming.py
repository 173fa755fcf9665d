"""Documents of any lengths, cut into segments for several streams read side by side.

    >>> from xlroute.streaming import read_documents
    >>> for tokens, lengths, ends in read_documents([[1, 2, 3], [4], [5, 6]], streams=2, segment_len=2):
    ...     print(tokens.tolist(), lengths.tolist(), ends.tolist())
    [[1, 2], [4, 0]] [2, 1] [False, True]
    [[3, 0], [5, 6]] [1, 2] [True, True]

Every segment goes to the model as it is: ``model(tokens, state, lengths=lengths, ends=ends)``.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Document: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[int]


def read_documents(
    documents: Iterable[Document], *, streams: int, segment_len: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Read documents in `streams` parallel streams, `segment_len` tokens of each at a time.

    A stream whose document has ended takes the next one, the lowest stream first, so every stream is busy
    until the documents run out; reading stops when the last of them has been read. A document is taken from
    `documents` only when a stream needs it, so `documents` may be lazy and without end. What is yielded
    depends on the documents alone: after skipping N segments, the rest are those of an uninterrupted reading.

    Args:
        documents: 1-D integer tensors, arrays (memory-mapped ones too: they are read segment by segment) or
            sequences, each of one token or more.
        streams: number of documents read side by side, `b`.
        segment_len: tokens of one document in one segment, `n`.

    Returns:
        An iterator of `(tokens, lengths, ends)` on the CPU: tokens int64 `[b, n]`, zero beyond a stream's
        length; lengths int64 `[b]`, the tokens of each stream that count, 0 for a stream without a document;
        ends bool `[b]`, whether the stream's document ends with this segment.

    Raises:
        TypeError: `streams` or `segment_len` is no integer; while reading, a document does not hold integers.
        ValueError: `streams` or `segment_len` is below 1; while reading, a document is empty or not 1-D.
    """
    for name, value in (("streams", streams), ("segment_len", segment_len)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not isinstance(documents, Iterable):
        raise TypeError(f"documents must be an iterable of documents, got {type(documents).__name__}")
    return _read(iter(documents), streams, segment_len)


def _read(
    documents: Iterator[Document], streams: int, segment_len: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    numbered = enumerate(documents)
    reading: list[Tensor | npt.NDArray[Any] | None] = [None] * streams
    starts = [0] * streams
    more = True
    while True:
        for stream in range(streams):
            if reading[stream] is None and more:
                try:
                    number, document = next(numbered)
                except StopIteration:
                    more = False
                else:
                    reading[stream], starts[stream] = _as_vector(document, number), 0
        if all(document is None for document in reading):
            return

        tokens = torch.zeros(streams, segment_len, dtype=torch.int64)
        lengths = torch.zeros(streams, dtype=torch.int64)
        ends = torch.zeros(streams, dtype=torch.bool)
        for stream, current in enumerate(reading):
            if current is None:
                continue
            piece = current[starts[stream] : starts[stream] + segment_len]
            # astype copies: an array that cannot be written to would make from_numpy warn.
            values = piece if isinstance(piece, Tensor) else torch.from_numpy(piece.astype(np.int64))
            tokens[stream, : len(piece)] = values
            starts[stream] += len(piece)
            lengths[stream] = len(piece)
            ends[stream] = starts[stream] == len(current)
            if starts[stream] == len(current):
                reading[stream] = None
        yield tokens, lengths, ends


def _as_vector(document: Document, number: int) -> Tensor | npt.NDArray[Any]:
    """The document as a tensor or array that can be sliced; `number`, counted from 0, is for errors."""
    vector: Tensor | npt.NDArray[Any]
    if isinstance(document, Tensor):
        vector = document
        integers = not (vector.is_floating_point() or vector.is_complex() or vector.dtype == torch.bool)
    else:
        try:
            # NumPy takes bytes for one string; here they are a sequence of integers, as everywhere in Python.
            vector = np.asarray(memoryview(document) if isinstance(document, bytes | bytearray) else document)
        except ValueError as error:
            raise TypeError(f"document {number} must be a 1-D sequence of integers: {error}") from None
        integers = np.issubdtype(vector.dtype, np.integer)
    if vector.ndim != 1:
        raise ValueError(f"document {number} must be 1-D, got shape {tuple(vector.shape)}")
    if len(vector) == 0:
        raise ValueError(f"document {number} is empty: a document has at least one token")
    if not integers:
        raise TypeError(f"document {number} must hold integers, got {vector.dtype}")
    return vector
