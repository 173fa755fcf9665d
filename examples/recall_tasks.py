"""Documents of examples/recall.py: facts in distractor text, and questions about them at known distances.

A fact is a key and its value: =:QXK07. A question is answered at once, ?:QXK07; or it is announced, ?QXK,
and answered a gap later, !:QXK07, so that a router that looks at the chunk before can know what will be
asked. Keys are three capitals and values digits; all else is small letters, drawn at random. No key is asked
for twice, so that no answer can be read off an earlier one.

There are three tasks: one fact (passkey); many (pairs); and many that are told again later with other values
(overwritten), of which the newest count. Who guesses v digits is right once in 10^v times.

No document is ever held as a whole: a piece of it is made when it is read.

Shapes: b streams, n tokens, p pairs, f facts of a pair, q questions, v symbols of a value.
"""

from __future__ import annotations

import math
import string
from typing import NamedTuple

import torch
from torch import Tensor

LETTERS, KEYS, VALUES, MARKERS = string.ascii_lowercase, string.ascii_uppercase, string.digits, "=?!:"
SYMBOLS = LETTERS + KEYS + VALUES + MARKERS
FIRST_KEY, FIRST_VALUE = SYMBOLS.index(KEYS[0]), SYMBOLS.index(VALUES[0])
FACT, QUESTION, ANSWER, COLON = (SYMBOLS.index(marker) for marker in MARKERS)
KEY_LEN = 3
MOST_PAIRS = len(KEYS) ** KEY_LEN
ASKING = 2 + KEY_LEN  # symbols of a marker, a colon and a key
SPARE = 1  # places by which a fact or question may lie later in its slot


class Questions(NamedTuple):
    """What is asked in each document."""

    answers: Tensor  # int64 [b, q, v], symbols
    distances: Tensor  # int64 [b, q], tokens from the value of the newest fact to the answer
    announced: Tensor  # bool [b, q], a gap before it is answered


class Piece(NamedTuple):
    """Tokens that follow each other in each document."""

    tokens: Tensor  # int64 [b, n]
    targets: Tensor  # int64 [b, n], the token after each one
    asked: Tensor  # int64 [b, n], the question whose answer that one belongs to, or -1


class Documents:
    """Documents of one length, one for each stream, of which any piece can be made.

    Facts and questions stand in slots, which have room for an announcement in front.

    Args:
        length: tokens of each document.
        fact_slots: int64 [b, p, f], where each pair is told; the last counts.
        question_slots: int64 [b, q], where the first q pairs are asked for.
        value_len: v.
        gap: tokens from an announcement to the answer, at least.
        seed: of everything that is drawn.

    Attributes:
        questions: what is asked.
    """

    def __init__(
        self, length: int, fact_slots: Tensor, question_slots: Tensor, *, value_len: int, gap: int, seed: int
    ) -> None:
        (b, p, f), q = fact_slots.shape, question_slots.shape[1]
        drawn = torch.Generator().manual_seed(seed)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=drawn)

        keys = torch.rand(b, MOST_PAIRS, generator=drawn).topk(p, 1).indices
        values = draw(10**value_len, b, p, 1)
        # Earlier values of a pair are others.
        values = torch.cat(((values + draw(10**value_len - 1, b, p, f - 1) + 1) % 10**value_len, values), 2)
        key_symbols = FIRST_KEY + _digits(keys, len(KEYS), KEY_LEN)  # [b, p, 3]
        value_symbols = FIRST_VALUE + _digits(values, len(VALUES), value_len)  # [b, p, f, v]

        width = slot_width(value_len)
        fact_starts = width * fact_slots + ASKING + draw(1 + SPARE, b, p, f)
        question_starts = width * question_slots + ASKING + draw(1 + SPARE, b, q)
        announcing_slots = question_slots - math.ceil(gap / width)
        announced = (draw(2, b, q) == 1) & (announcing_slots > fact_slots[:, :q, -1])
        self.questions = Questions(
            value_symbols[:, :q, -1], question_starts - fact_starts[:, :q, -1], announced
        )

        numbers = torch.arange(q).expand(b, q)
        told = _text(
            torch.full((b, p, f), FACT), key_symbols[:, :, None].expand(-1, -1, f, -1), value_symbols
        )
        asked = _text(torch.where(announced, ANSWER, QUESTION), key_symbols[:, :q], self.questions.answers)
        announcing = torch.cat((torch.full((b, q, 1), QUESTION), key_symbols[:, :q]), 2)[announced]
        streams = torch.arange(b)[:, None].expand(b, q)[announced]
        everything = [
            _spread(torch.arange(b)[:, None, None].expand(b, p, f), fact_starts, told),
            _spread(torch.arange(b)[:, None].expand(b, q), question_starts, asked, numbers),
            _spread(streams, (width * announcing_slots)[announced], announcing),
        ]
        # [4, e]: stream, position, symbol and question of everything that is not a letter drawn at random.
        marks = torch.cat(everything, 1)
        self._marks = marks[:, marks[1].argsort()]
        self.length = length
        self.streams = b
        self._seed = seed

    def piece(self, start: int, stop: int) -> Piece:
        """The tokens from `start` up to `stop`."""
        positions = torch.arange(start, stop + 1)
        tokens = _letters(self._seed, self.streams, positions)
        asked = torch.full_like(tokens, -1)
        first, last = torch.searchsorted(self._marks[1], torch.tensor([start, stop + 1])).tolist()
        streams, places, symbols, numbers = self._marks[:, first:last]
        tokens[streams, places - start] = symbols
        asked[streams, places - start] = numbers
        return Piece(tokens[:, :-1], tokens[:, 1:], asked[:, 1:])


def slot_width(value_len: int) -> int:
    """Tokens of the slot in which a fact or a question stands."""
    return ASKING + SPARE + ASKING + value_len


def training_documents(
    length: int, *, streams: int, pairs: int, overwritten: bool, value_len: int, gap: int, seed: int
) -> Documents:
    """Documents that ask for all their pairs, wherever chance puts facts and questions.

    Raises:
        ValueError: if they do not fit.
    """
    facts = 1 + overwritten
    drawn = torch.Generator().manual_seed(seed)
    _check_room(length, pairs * (facts + 1), value_len)
    slots = torch.rand(streams, length // slot_width(value_len), generator=drawn).argsort(1)
    slots = slots[:, : pairs * (facts + 1)].reshape(streams, pairs, facts + 1).sort(2).values
    return Documents(length, slots[..., :-1], slots[..., -1], value_len=value_len, gap=gap, seed=seed)


def test_documents(
    length: int,
    *,
    streams: int,
    pairs: int,
    questions: int,
    nearest: int,
    overwritten: bool,
    value_len: int,
    gap: int,
    seed: int,
) -> Documents:
    """Documents that ask at their end, for facts at all distances, about equally many in each doubling.

    Args:
        length: tokens.
        streams: b.
        pairs: p.
        questions: q, at most p.
        nearest: tokens between the facts and the first question, at least.
        overwritten: every pair is told twice.
        value_len: v.
        gap: see `Documents`.
        seed: of everything that is drawn.

    Raises:
        ValueError: if they do not fit.
    """
    facts = 1 + overwritten
    drawn = torch.Generator().manual_seed(seed)
    width = slot_width(value_len)
    _check_room(length - nearest, pairs * facts + questions, value_len)
    slots = length // width
    before = (length - nearest) // width - questions
    # The largest of these are a draw with chances of 1 / distance (Gumbel's trick).
    gumbel = -torch.rand(streams, before, generator=drawn).log().neg().log()
    chances = gumbel - torch.arange(slots, slots - before, -1).log()
    told = chances.topk(pairs * facts).indices
    told = told.gather(1, torch.rand(told.shape, generator=drawn).argsort(1))
    told = told.reshape(streams, pairs, facts).sort(2).values
    asking = slots - questions + torch.rand(streams, questions, generator=drawn).argsort(1)
    return Documents(length, told, asking, value_len=value_len, gap=gap, seed=seed)


def _check_room(length: int, needed: int, value_len: int) -> None:
    room = length // slot_width(value_len)
    if needed > room:
        raise ValueError(f"length: expected room for {needed} facts and questions, got {length} ({room})")


def _digits(numbers: Tensor, base: int, count: int) -> Tensor:
    """Numbers [...] written with `count` digits, [..., count]."""
    return numbers[..., None] // base ** torch.arange(count - 1, -1, -1) % base


def _text(marker: Tensor, *parts: Tensor) -> Tensor:
    """Symbols of a marker [...], a colon, and what follows, [..., t] each, in one tensor."""
    return torch.cat((marker[..., None], torch.full_like(marker, COLON)[..., None], *parts), -1)


def _spread(streams: Tensor, starts: Tensor, symbols: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Stream, position, symbol and question of each of the symbols [..., t], int64 [4, e].

    Those behind marker and key belong to the question, if there is one.
    """
    places = torch.arange(symbols.shape[-1])
    owners = torch.full_like(symbols, -1)
    if numbers is not None:
        owners = torch.where(places >= ASKING, numbers[..., None], -1)
    parts = (streams[..., None], starts[..., None] + places, symbols, owners)
    return torch.stack([part.expand(symbols.shape).flatten() for part in parts])


def _letters(seed: int, streams: int, positions: Tensor) -> Tensor:
    """A letter for each stream and position, int64 [b, n]: a hash, so that any piece can be made alone."""
    x = positions + (torch.arange(streams)[:, None] << 40) + seed * 0x9E3779B97F4A7C15 % 2**62
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        x = (x ^ (x >> 31)) * factor
    return (x >> 33) % len(LETTERS)


def written(tokens: Tensor) -> str:
    """Tokens [n] as text."""
    return "".join(SYMBOLS[token] for token in tokens.tolist())
