"""Which words of a book are in sight, beyond the window, or new: against a search of all that was read."""

import importlib
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from xlroute import RoutedTransformerXL

EXAMPLES = Path(__file__).parents[2] / "examples"
CHARACTERS = "aabAé œ ½2_-’\r\n🐳"


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("pg19_words")
    for name in {path.stem for path in EXAMPLES.glob("*.py")} & set(sys.modules):
        del sys.modules[name]


def searched(text: str, starts: list[int], segment_len: int, mem_len: int) -> list[str]:
    """The kind of each token, by trying for each word all words before it and all that can be looked at."""
    sizes = [len(character.encode()) for character in text]
    places = [sum(sizes[:i]) for i in range(len(text) + 1)]
    spans, begin = [], None
    for i, character in enumerate(text + " "):
        if character.isalpha() and begin is None:
            begin = i
        elif not character.isalpha() and begin is not None:
            spans.append((begin, i))
            begin = None
    # Of a character in several tokens, all but the last have no bytes of their own.
    ends = [*starts[1:], places[-1]]
    ends = [places[places.index(a) + 1] if a == b else b for a, b in zip(starts, ends, strict=True)]

    def tokens_of(span: tuple[int, int]) -> list[int]:
        low, high = places[span[0]], places[span[1]]
        return [t for t, (a, b) in enumerate(zip(starts, ends, strict=True)) if max(a, low) < min(b, high)]

    kinds = ["rest"] * len(starts)
    for number, span in enumerate(spans):
        word = text[slice(*span)]
        mine = tokens_of(span)
        segment = next(s for s in range(0, len(starts), segment_len) if s <= mine[0] < s + segment_len)
        # The place t of what is read holds token t - 1, and looks at all places from the window's first on. A
        # token that ends one occurrence and begins the next is the last that is known of either.
        looked_at = set(range(segment - mem_len, mine[0] + 2))
        before = [tokens_of(other)[0] + 1 for other in spans[:number] if text[slice(*other)] == word]
        kind = "in sight" if looked_at & set(before) else "beyond" if before else "new"
        for token in mine:
            if kinds[token] == "rest":
                kinds[token] = kind
    return kinds


def check(words: ModuleType, text: str, starts: list[int], segment_len: int, mem_len: int) -> list[str]:
    kinds = words.kinds_of_tokens(text.encode(), np.array(starts), segment_len=segment_len, mem_len=mem_len)
    assert kinds.dtype == np.int64
    got = [words.KINDS[kind] for kind in kinds]
    assert got == searched(text, starts, segment_len, mem_len), (text, starts, segment_len, mem_len)
    return got


@pytest.mark.parametrize("tokens", ["bytes", "pieces"])
def test_kinds_against_a_search(words: ModuleType, tokens: str) -> None:
    found = set()
    for _ in range(60):
        text = "".join(random.choices(CHARACTERS, k=random.randint(1, 80)))
        size = len(text.encode())
        if tokens == "bytes":
            starts = list(range(size))
        else:
            # Tokens of any length, which cross words; some characters are in two.
            places = np.cumsum([0, *(len(character.encode()) for character in text[:-1])]).tolist()
            starts = [0, *sorted(random.choices(places, k=len(places) // 2))]
        found |= set(check(words, text, starts, random.randint(1, 12), random.choice([0, 1, 5, 12])))
    assert found == set(words.KINDS)


def test_what_is_in_sight_ends_with_the_window(words: ModuleType) -> None:
    # In segments of 4 bytes: |ab..|..ab|: the second word is predicted at place 6, which sees from 4 on.
    text = "ab....ab"
    starts = list(range(8))
    assert check(words, text, starts, 4, 3)[6:] == ["in sight"] * 2
    assert check(words, text, starts, 4, 2)[6:] == ["beyond"] * 2
    assert check(words, text, starts, 8, 0)[6:] == ["in sight"] * 2
    assert check(words, "ab Ab ab", starts, 8, 0)[3:5] == ["new"] * 2


@pytest.mark.parametrize("mem_len", [0, 3, 6])
def test_in_sight_is_what_attention_reaches(words: ModuleType, mem_len: int) -> None:
    """In a model of one block, in which a token is seen through attention to it alone."""
    segment_len, length = 4, 16
    model = RoutedTransformerXL(
        vocab_size=20, dim=16, depth=1, heads=2, dim_head=8, mem_len=mem_len, memory_layers=()
    ).double()

    @torch.no_grad()
    def read(tokens: torch.Tensor) -> torch.Tensor:
        state = model.initial_state(streams=len(tokens))
        logits = []
        for piece in torch.split(tokens, segment_len, dim=1):
            out, state = model(piece, state)
            logits.append(out)
        return torch.cat(logits, dim=1)

    tokens = torch.randint(19, (length,)).repeat(length + 1, 1)
    tokens[range(length), range(length)] += 1  # in each row another place, and none in the last
    logits = read(tokens)
    changes = (logits[:-1] - logits[-1]).abs().amax(dim=-1)  # [place that differs, place of the logits]
    reached = changes > 1e-10  # beyond rounding
    for place in range(2, length):
        for before in range(place - 1):
            text = [" "] * length
            text[before] = text[place] = "a"
            kind = check(words, "".join(text), list(range(length)), segment_len, mem_len)[place]
            # What place t reads is token t - 1.
            assert (kind == "in sight") == bool(reached[before + 1, place])


def test_no_words(words: ModuleType) -> None:
    assert check(words, "123 4", list(range(5)), 4, 4) == ["rest"] * 5


def test_a_trained_bpe(words: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    data = importlib.import_module("pg19_data")
    vocabulary = ["whale", "Whale", "œuvre", "the", "“naïve”", "don’t", "🐳", "12"]
    texts = [" ".join(random.choices(vocabulary, k=200)).encode() for _ in range(3)]
    for name, order in (("a.json", texts), ("b.json", texts[::-1])):
        data.train_bpe(iter(order), 280, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    tokenizer = data.JsonTokenizer(tmp_path / "a.json")
    assert 256 < tokenizer.vocab_size <= 280
    text = texts[0] + " x é\r\n".encode()
    tokens, starts = tokenizer.encode(text), tokenizer.starts(text)
    assert tokenizer.decode(tokens.tolist()).encode() == text
    assert len(tokens) == len(starts) < len(text)
    # What lies between two starts is the token, where it holds whole characters.
    pieces = np.split(np.frombuffer(text, dtype=np.uint8), starts[1:])
    for token, piece in zip(tokens.tolist(), pieces, strict=True):
        if "�" not in tokenizer.decode([token]):
            assert tokenizer.decode([token]).encode() == piece.tobytes()
    assert math.isclose(data.bytes_per_token(one_book(data, text), tokenizer), len(text) / len(tokens))
    found = check(words, text.decode(), starts.tolist(), 16, 16)
    assert {"in sight", "new"} <= set(found)


def one_book(data: ModuleType, text: bytes) -> object:
    return data.Corpus(
        "one", "test", lambda epoch: iter(()), "", [data.Book("A", text, "test")], 1, None, False
    )
