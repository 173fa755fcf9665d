from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xlroute.streaming import Document, read_documents

document_lists = st.lists(st.lists(st.integers(1, 2**40), min_size=1, max_size=12), max_size=9)
sizes = st.integers(1, 5)


def reassemble(
    segments: list[tuple[Tensor, Tensor, Tensor]], streams: int
) -> list[tuple[int, int, list[int]]]:
    """(segment where it starts, stream, tokens) of every document, in the order in which they were taken."""
    found: list[tuple[int, int, list[int]]] = []
    for stream in range(streams):
        start, tokens = 0, list[int]()
        for number, (segment, lengths, ends) in enumerate(segments):
            length = int(lengths[stream])
            start = start if tokens else number
            tokens += segment[stream, :length].tolist()
            if ends[stream]:
                found.append((start, stream, tokens))
                tokens = []
        assert not tokens, "a document without an end"
    return sorted(found)


@given(document_lists, sizes, sizes)
def test_the_streams_reassemble_to_the_documents(
    documents: list[list[int]], streams: int, segment_len: int
) -> None:
    segments = list(read_documents(documents, streams=streams, segment_len=segment_len))
    assert [tokens for _, _, tokens in reassemble(segments, streams)] == documents
    for tokens, lengths, ends in segments:
        assert tokens.shape == (streams, segment_len)
        assert (tokens.dtype, lengths.dtype, ends.dtype) == (torch.int64, torch.int64, torch.bool)
        padding = torch.arange(segment_len) >= lengths[:, None]
        assert torch.equal(tokens == 0, padding)
        assert not ends[lengths == 0].any()
        assert (lengths > 0).any()
        assert ends[(lengths > 0) & (lengths < segment_len)].all()


@given(document_lists, sizes, sizes)
def test_a_stream_waits_only_when_the_documents_have_run_out(
    documents: list[list[int]], streams: int, segment_len: int
) -> None:
    taken = 0

    def counted() -> Iterator[list[int]]:
        nonlocal taken
        for document in documents:
            taken += 1
            yield document

    opened = 0
    reading = [False] * streams
    for _, lengths, ends in read_documents(counted(), streams=streams, segment_len=segment_len):
        opened += sum(int(length) > 0 and not busy for length, busy in zip(lengths, reading, strict=True))
        assert taken == opened, "a document was taken before a stream needed it"
        if (lengths == 0).any():
            assert taken == len(documents)
        reading = [bool(length > 0 and not end) for length, end in zip(lengths, ends, strict=True)]


@given(document_lists, sizes, sizes, st.integers(0, 8))
def test_skipping_segments_resumes(
    documents: list[list[int]], streams: int, segment_len: int, skip: int
) -> None:
    whole = list(read_documents(documents, streams=streams, segment_len=segment_len))
    resumed = list(islice(read_documents(documents, streams=streams, segment_len=segment_len), skip, None))
    assert len(resumed) == max(0, len(whole) - skip)
    for expected, got in zip(whole[skip:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_documents_without_end() -> None:
    reader = read_documents(([number] * 3 for number in count(1)), streams=2, segment_len=2)
    firsts = [tokens[:, 0].tolist() for tokens, _, _ in islice(reader, 4)]
    assert firsts == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_no_documents() -> None:
    assert list(read_documents([], streams=2, segment_len=2)) == []


def memory_mapped(folder: Path) -> Document:
    np.save(folder / "tokens.npy", np.array([7, 8, 9], dtype=np.uint16))
    mapped: Document = np.load(folder / "tokens.npy", mmap_mode="r")
    return mapped


@pytest.mark.parametrize("kind", ["list", "range", "bytes", "uint8 tensor", "read-only array", "memory map"])
def test_kinds_of_documents(kind: str, tmp_path: Path) -> None:
    frozen = np.array([7, 8, 9], dtype=np.int32)
    frozen.flags.writeable = False
    document: Document = {
        "list": [7, 8, 9],
        "range": range(7, 10),
        "bytes": b"\x07\x08\x09",
        "uint8 tensor": torch.tensor([7, 8, 9], dtype=torch.uint8),
        "read-only array": frozen,
        "memory map": memory_mapped(tmp_path),
    }[kind]
    tokens = [segment[0] for segment, _, _ in read_documents([document], streams=1, segment_len=2)]
    assert torch.stack(tokens).tolist() == [[7, 8], [9, 0]]


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        ([], ValueError, "document 1 is empty"),
        (b"", ValueError, "document 1 is empty"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "document 1 is empty"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"document 1 must be 1-D, got shape \(2, 2\)"),
        (torch.tensor(3), ValueError, r"document 1 must be 1-D, got shape \(\)"),
        ([0.5], TypeError, "document 1 must hold integers, got float64"),
        (torch.tensor([True]), TypeError, "document 1 must hold integers, got torch.bool"),
        ([True], TypeError, "document 1 must hold integers, got bool"),
        ("text", ValueError, "document 1 must be 1-D"),
        ([[1], [2, 3]], TypeError, "document 1 must be a 1-D sequence of integers"),
    ],
)
def test_a_bad_document_is_named(document: Document, error: type[Exception], message: str) -> None:
    reader = read_documents([[1], document], streams=1, segment_len=4)
    next(reader)
    with pytest.raises(error, match=message):
        next(reader)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"streams": 0, "segment_len": 1}, ValueError, "streams must be at least 1, got 0"),
        ({"streams": 1, "segment_len": -2}, ValueError, "segment_len must be at least 1, got -2"),
        ({"streams": 1.0, "segment_len": 1}, TypeError, "streams must be an integer, got float"),
        ({"streams": 1, "segment_len": True}, TypeError, "segment_len must be an integer, got bool"),
    ],
)
def test_arguments_are_checked_before_reading(
    arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_documents([[1]], **arguments)


def test_documents_must_be_iterable() -> None:
    with pytest.raises(TypeError, match="documents must be an iterable of documents, got int"):
        read_documents(3, streams=1, segment_len=1)  # type: ignore[arg-type]
