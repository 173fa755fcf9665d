"""What examples/continue_book.py finds out: how a book goes on, and what of it is read for that.

Shapes: n tokens in a segment, g chunks of c of them that share memory rows (one chunk, where a whole segment
does), h heads, r sets of rows, k rows in each. The row at position p is the state that foresees the book's
token p. To look at it is to read what followed there, which begins with that token.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from continue_book_folder import BookFolder, autocast, memory_rows
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.blocks import MemoryBranch, RoutedMemoryAttention
from xlroute.cross_attention import RoutedKeysValues
from xlroute.sampling import SamplingOptions
from xlroute.token_memory import TokenMemoryAttention, TokenRows

PASSAGES = 5
PASSAGE_BYTES = 56  # about so long is a passage
BEFORE_BYTES = 400  # shown of the book before the place


@dataclass(frozen=True)
class Passage:
    """A passage of the book that was read."""

    byte: int  # where the token stands that was read most
    bytes_back: int  # from the place where the text is continued
    share: float  # of what was looked at in the book
    text: tuple[str, str]  # before that token, and from it on
    read_for: tuple[str, str]  # where it was read most: before the token that was foreseen, and from it on


@dataclass(frozen=True)
class Reading:
    """What the memory's heads looked at while they foresaw a text: shares, and passages of the book."""

    nothing: float
    book: float  # before the place where it is continued
    itself: float  # the text, as far as it has entered the memory
    passages: list[Passage]


@dataclass(frozen=True)
class Continuation:
    """A book continued at a place."""

    title: str
    byte: int
    bytes: int  # of the book
    memory_rows: int
    before: str  # the end of what was read
    with_memory: str
    memory_emptied: str
    book: str
    scored_bytes: int
    bits_per_byte: float | None  # None at the end of the book
    bits_per_byte_emptied: float | None
    read_to_write: Reading
    read_to_foresee: Reading | None


class Looks(NamedTuple):
    """Where the tokens of a segment looked, in one branch of one block."""

    first: int  # which token of the book, or of the text in its place, the segment's first one foresees
    counted: int  # tokens of the segment that foresee what is in question
    positions: npt.NDArray[np.int64]  # of the rows, [g, r, k], -1 for none
    weights: npt.NDArray[np.float32]  # [g, r, c, k], 0 for tokens that do not count; the rest is for nothing


def continue_at(
    folder: BookFolder,
    model: RoutedTransformerXL,
    point: int,
    *,
    length: int,
    score_bytes: int,
    sampling: SamplingOptions,
    seed: int,
) -> Continuation:
    """Continue a book behind its first `point` tokens.

    Args:
        folder: of the book. Nothing is written there.
        model: that has read it.
        point: tokens of the book before the continuation.
        length: tokens to write.
        score_bytes: of the book to foresee, at most.
        sampling: how tokens are drawn.
        seed: of the random numbers, which are the same with the memory and with it emptied.

    Raises:
        UserError: the book was not read that far.
        MemoryStoreError: other weights have read it, or the folder is damaged.
    """
    state, start = folder.state_before(model, point)
    inputs, decode = folder.inputs, folder.tokenizer.decode
    texts = [
        write(model, state.fork(), inputs[start : point + 1], length, sampling, seed, forget=forget)
        for forget in (False, True)
    ]
    written = torch.cat((inputs[: point + 1], torch.tensor(texts[0])))
    _, looks = foresee(model, state.fork(), written, start, point)
    read_to_write = reading(folder, looks, written, point)

    byte = int(folder.bytes_before[point])
    stop = int(np.searchsorted(folder.bytes_before, byte + score_bytes, side="right")) - 1
    scored_bytes = int(folder.bytes_before[stop]) - byte
    bits: list[float | None] = [None, None]
    read_to_foresee = None
    if scored_bytes:
        foreseen = [
            foresee(model, state.fork(), inputs[: stop + 1], start, point, forget=forget)
            for forget in (False, True)
        ]
        bits = [nats / math.log(2) / scored_bytes for nats, _ in foreseen]
        read_to_foresee = reading(folder, foreseen[0][1], inputs, point)
    return Continuation(
        title=folder.settings.title,
        byte=byte,
        bytes=len(folder.text),
        memory_rows=memory_rows(state),
        before=folder.text[max(0, byte - BEFORE_BYTES) : byte].decode("utf-8", errors="ignore"),
        with_memory=decode(texts[0]),
        memory_emptied=decode(texts[1]),
        book=decode(inputs[point + 1 : point + 1 + length].tolist()),
        scored_bytes=scored_bytes,
        bits_per_byte=bits[0],
        bits_per_byte_emptied=bits[1],
        read_to_write=read_to_write,
        read_to_foresee=read_to_foresee,
    )


def write(
    model: RoutedTransformerXL,
    state: TransformerXLState,
    prompt: Tensor,
    length: int,
    sampling: SamplingOptions,
    seed: int,
    *,
    forget: bool,
) -> list[int]:
    """Read a prompt [n], the beginning of a segment, and write tokens.

    Args:
        model: that writes.
        state: at the start of the segment; it is consumed.
        prompt: int64.
        length: tokens to write.
        sampling: how they are drawn.
        seed: of the random numbers.
        forget: empty the memory before every segment.
    """
    device = state.window.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens, written = prompt[None].to(device), list[int]()
    while len(written) < length:
        if forget:
            state.clear_memory()
        # The last new token is not read: so many fill the segment.
        room = model.segment_len - state.open.shape[2] - tokens.shape[1] + 1
        with autocast(model):
            new, state = model.generate(
                tokens,
                min(room, length - len(written)),
                state,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                generator=generator,
            )
        tokens = new[:, -1:]
        written += new[0].tolist()
    return written


@torch.no_grad()
def foresee(
    model: RoutedTransformerXL,
    state: TransformerXLState,
    inputs: Tensor,
    start: int,
    point: int,
    *,
    forget: bool = False,
) -> tuple[float, list[Looks]]:
    """Score a text from one of its tokens on: the sum of their negative log-likelihoods, in nats.

    Args:
        model: that reads.
        state: after `start` tokens, the start of a segment; it is consumed.
        inputs: int64, the token that begins the document and those of the text.
        start: where reading begins.
        point: the first token that is scored, which the first segment foresees.
        forget: empty the memory before every segment.

    Returns:
        The nats, and where the tokens that foresee those looked in the memory.
    """
    nats, looks = 0.0, []
    with watched(model) as seen:
        for first in range(start, len(inputs) - 1, model.segment_len):
            piece = inputs[first : first + model.segment_len + 1].to(state.window.device)
            skipped, n = max(0, point - first), len(piece) - 1
            if forget:
                state.clear_memory()
            seen.clear()
            with autocast(model):
                logits, state, routings = model(piece[None, :-1], state, return_routing=True)
            nats += F.cross_entropy(
                logits[0, skipped:].double(), piece[1 + skipped :], reduction="sum"
            ).item()
            for routing, weights in zip(routings, seen, strict=True):
                positions = routing.positions[0].cpu().numpy()
                positions = positions if positions.ndim == 3 else positions[None]
                looks.append(
                    Looks(first, n - skipped, positions, by_set(weights, positions.shape[1], skipped, n))
                )
    return nats, looks


@contextmanager
def watched(model: RoutedTransformerXL) -> Iterator[list[Tensor]]:
    """Collects the attention of every branch that reads the memory, in the order of the model's routings.

    Each is [g, h, c, k]: that of the chunks' tokens, places that fill up the last chunk among them, to their
    rows.
    """
    found: list[Tensor] = []

    def watch(branch: MemoryBranch) -> None:
        def weights(memory: TokenRows) -> Tensor:
            assert isinstance(branch, TokenMemoryAttention)
            shares = type(branch).weights(branch, memory)
            found.append(shares[0, :, :, None, 1:])
            return shares

        if isinstance(branch, TokenMemoryAttention):
            branch.weights = weights  # type: ignore[method-assign]
            return
        assert isinstance(branch, RoutedMemoryAttention)

        def attend(q: Tensor, routed: RoutedKeysValues, bias: Tensor | None = None) -> Tensor:
            found.append(attention(branch, q, routed, bias))
            return type(branch).attend(branch, q, routed, bias)

        branch.attend = attend  # type: ignore[method-assign]

    branches = [branch for block in model.typed_blocks() for branch in block.memories()]
    for branch in branches:
        watch(branch)
    try:
        yield found
    finally:
        for branch in branches:
            for name in ("attend", "weights"):
                vars(branch).pop(name, None)


def attention(
    branch: RoutedMemoryAttention, q: Tensor, routed: RoutedKeysValues, bias: Tensor | None
) -> Tensor:
    """The weights by which `branch.attend` adds up the values of the rows, [g, h, c, k]."""
    assert branch.null_logit is not None
    assert bias is not None
    logits = (q @ routed.keys.to(q).mT * q.shape[-1] ** -0.5).float()
    null = branch.null_logit.float().expand(len(bias), -1, -1, -1)
    logits = logits + torch.cat((null, bias.float()), dim=-1)
    if routed.mask is not None:
        logits = logits.masked_fill(~routed.mask, -math.inf)
    weights: Tensor = logits.softmax(-1)[..., 1:]
    return weights


def by_set(weights: Tensor, sets: int, skipped: int, n: int) -> npt.NDArray[np.float32]:
    """Attention [g, h, c, k] to the rows of each set, as a share of all heads': [g, r, c, k].

    Of the tokens, g x c of them, those before `skipped` and from `n` on get 0.
    """
    g, h, c, _ = weights.shape
    counts = torch.arange(g * c, device=weights.device)
    counts = ((counts >= skipped) & (counts < n)).view(g, 1, c, 1)
    shares = torch.unflatten(weights * counts, 1, (sets, h // sets)).sum(2) / h
    return shares.cpu().numpy()


def reading(folder: BookFolder, looks: Sequence[Looks], inputs: Tensor, point: int) -> Reading:
    """What was looked at, and the passages of the book, those first that were looked at most.

    Args:
        folder: of the book.
        looks: where tokens looked, one or more.
        inputs: the token that begins the document, the book's first `point` tokens, and those foreseen.
        point: where the book is continued.
    """
    tokens, decode = inputs[1:].tolist(), folder.tokenizer.decode
    radius = max(1, round(PASSAGE_BYTES / 2 * (len(folder.inputs) - 1) / len(folder.text)))
    total = sum(each.counted for each in looks)
    shares = np.zeros(len(inputs))
    for each in looks:
        there = each.positions >= 0
        shares += np.bincount(each.positions[there], each.weights.sum(2)[there] / total, len(inputs))
    book, passages = float(shares[:point].sum()), list[Passage]()
    begins = range(0, point, 2 * radius)
    of_passages = np.array([shares[begin : min(begin + 2 * radius, point)].sum() for begin in begins])
    for number in (-of_passages).argsort(kind="stable")[:PASSAGES].tolist():
        if not of_passages[number]:
            break
        reader, mark = most_read(looks, begins[number], min(begins[number] + 2 * radius, point))
        byte = int(folder.bytes_before[mark])
        passages.append(
            Passage(
                byte=byte,
                bytes_back=int(folder.bytes_before[point]) - byte,
                share=float(of_passages[number]) / book,
                text=around(tokens, mark, radius, decode),
                read_for=around(tokens, reader, radius, decode),
            )
        )
    return Reading(
        nothing=float(1 - shares.sum()), book=book, itself=float(shares[point:].sum()), passages=passages
    )


def most_read(looks: Sequence[Looks], start: int, stop: int) -> tuple[int, int]:
    """The token for which rows at `start` to `stop` - 1 were read most, and the row it looked at most."""
    base = looks[0].first
    end = max(each.first + each.weights.shape[0] * each.weights.shape[2] for each in looks)
    table = np.zeros((end - base, stop - start))
    for each in looks:
        near = (each.positions >= start) & (each.positions < stop)
        chunks, sets, rows = near.nonzero()
        c = each.weights.shape[2]
        readers = each.first - base + chunks[:, None] * c + np.arange(c)
        columns = each.positions[near][:, None] - start
        np.add.at(table, (readers, columns), each.weights[chunks, sets, :, rows])
    reader = int(table.sum(axis=1).argmax())
    return base + reader, start + int(table[reader].argmax())


def around(tokens: list[int], place: int, radius: int, decode: Callable[[list[int]], str]) -> tuple[str, str]:
    """The text of up to `radius` tokens before a place, and of as many from there on, each in one line."""
    pieces = tokens[max(0, place - radius) : place], tokens[place : place + radius]
    # A character that is cut is left out.
    before, after = (re.sub(r"\s+", " ", decode(piece).replace("\ufffd", "")) for piece in pieces)
    return before, after
