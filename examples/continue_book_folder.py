"""The folder of examples/continue_book.py: a book, its memory, and saved states to go on from.

Shapes: N tokens of the book, n tokens in a segment. A model reads a token that begins the document, then
those of the book. Having read p + 1 of all these, it foresees the book's token p, counted from 0.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from pg19_data import Book, ByteTokenizer, JsonTokenizer, Tokenizer, UserError, load_corpus, read_text
from torch import Tensor
from tqdm import tqdm

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.memory import MemoryStore

SETTINGS, TEXT, TOKENIZER, MEMORY, STATES = "book.json", "book.txt", "tokenizer.json", "memory", "states"
LOCK = ".lock"
EVERY = 16  # segments between two saved states
PLACES_SHOWN = 5  # of a phrase that stands at several
SHOWN_BYTES = 40  # before each of them


@dataclass(frozen=True)
class Settings:
    """What a reading depends on. Its folder remembers it."""

    title: str
    text: str  # SHA-256
    tokenizer: str | None  # SHA-256 of the JSON; None where every byte is a token
    model: str  # its folder
    capacity: int | None
    every: int


class BookFolder:
    """A book that a model reads, or has read.

    It holds book.json, the settings, which is written last when the folder is made; book.txt; tokenizer.json,
    unless every byte is a token; memory/, a store with the rows of the whole book; and states/P/, the state
    after P tokens, which names a commit of that store.

    Raises:
        UserError: the folder holds no book, or one that was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.settings = Settings(**json.loads((path / SETTINGS).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} holds no book that was read") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path / SETTINGS} cannot be read: {error}") from None
        for name, expected in ((TEXT, self.settings.text), (TOKENIZER, self.settings.tokenizer)):
            if expected is not None and _hash(path / name) != expected:
                raise UserError(f"{path / name} was changed since the book was read")
        self.text = read_text(path / TEXT)
        self.tokenizer = load_tokenizer(path / TOKENIZER if self.settings.tokenizer else None)

    @cached_property
    def inputs(self) -> Tensor:
        """What a model reads, int64 [N + 1]: the token that begins a document, and those of the book."""
        tokens = self.tokenizer.encode(self.text).astype(np.int64)
        return torch.from_numpy(np.concatenate([[self.tokenizer.vocab_size], tokens]))

    @cached_property
    def bytes_before(self) -> npt.NDArray[np.int64]:
        """Bytes of the text before each token and, as the last, all of them: [N + 1]."""
        return np.append(self.tokenizer.starts(self.text), len(self.text))

    def last(self, model: RoutedTransformerXL) -> int:
        """After how many tokens the last whole segment ends, and with it the reading."""
        return (len(self.inputs) - 1) // model.segment_len * model.segment_len

    def saved(self) -> list[int]:
        """After how many tokens there are saved states, ascending."""
        return sorted(int(path.parent.name) for path in (self.path / STATES).glob("*/state.safetensors"))

    def state_folder(self, position: int) -> Path:
        """Where the state after so many tokens is saved."""
        return self.path / STATES / f"{position:09d}"

    def state_before(self, model: RoutedTransformerXL, point: int) -> tuple[TransformerXLState, int]:
        """The state at the start of the segment that foresees the book's token `point`.

        It is opened where it was saved last before that, and read on from there, cut as it was for the first
        time. Nothing is written to the folder.

        Returns:
            The state, and how many tokens it has read.

        Raises:
            UserError: the book was not read that far.
            MemoryStoreError: other weights have read it, or the folder is damaged.
        """
        saved = self.saved()
        before = [each for each in saved if each <= point]
        if not before:
            raise UserError(f"{self.path}: nothing of the book was read yet; the command read goes on")
        position = before[-1]
        if position == saved[-1] < min(point, self.last(model)):
            raise UserError(
                f"{self.path}: the book was read to byte {self.bytes_before[position]:,} so far, not to "
                f"{self.bytes_before[point]:,}; the command read goes on"
            )
        start = point - point % model.segment_len
        state = model.load_state(self.state_folder(position))
        for begin in range(position, start, model.segment_len):
            state = read_segment(model, self.inputs[begin : begin + model.segment_len], state)
        return state, start

    def find(self, at: str) -> int:
        """How many tokens come before a place: a number of bytes, or the end of a phrase that stands once.

        Any white space in the phrase stands for any in the book.

        Raises:
            UserError: there is no such place, or more than one.
        """
        if at.isascii() and at.isdigit():
            byte = int(at)
            if byte > len(self.text):
                raise UserError(f"--at: {self.settings.title} has {len(self.text)} bytes, got {byte}")
        else:
            pattern = rb"\s+".join(re.escape(word.encode()) for word in at.split())
            if not pattern:
                raise UserError("--at: expected a number of bytes or a phrase, got none")
            ends = [match.end() for match in re.finditer(pattern, self.text)]
            if not ends:
                raise UserError(f"--at: {self.settings.title} does not hold {at!r}")
            if len(ends) > 1:
                shown = "; ".join(f"{end} ({self._before(end)!r})" for end in ends[:PLACES_SHOWN])
                raise UserError(
                    f"--at: {self.settings.title} holds {at!r} {len(ends)} times: expected a longer phrase, "
                    f"or the byte after one of them: {shown}{'; ...' * (len(ends) > PLACES_SHOWN)}"
                )
            byte = ends[0]
        return int(np.searchsorted(self.bytes_before, byte))

    def _before(self, byte: int) -> str:
        """The end of the text before that byte, in one line."""
        return " ".join(self.text[max(0, byte - SHOWN_BYTES) : byte].decode("utf-8", errors="ignore").split())

    def describe(self) -> str:
        """What was read, in a line."""
        with MemoryStore.open(self.path / MEMORY) as memory:
            rows, layers, usage = int(memory.lengths[0]), memory.layers, memory.info().disk
        assert usage is not None
        states = [path for path in (self.path / STATES).rglob("*") if path.is_file()]
        return (
            f"{self.settings.title} is read: {len(self.text):,} bytes, {len(self.inputs) - 1:,} tokens; "
            f"{rows:,} memory rows in {layers} layer{'s' * (layers > 1)}, "
            f"{usage.allocated_bytes / 2**20:,.1f} MiB; {len(self.saved())} saved states, "
            f"{sum(path.stat().st_size for path in states) / 2**20:,.1f} MiB"
        )


def find_book(name: str) -> Book:
    """The text file of that name, or else the play.

    Raises:
        UserError: there is neither, or the file is empty or no UTF-8.
    """
    path = Path(name)
    if path.is_file():
        return Book(path.stem, read_text(path), "")
    if path.suffix or len(path.parts) != 1:
        raise UserError(f"no such file: {path}")
    wanted = name.replace("-", " ").casefold()
    for split in ("test", "validation"):
        plays = load_corpus("plays", split=split, seed=0)
        for book in (*plays.held_out, *plays.training(0)):
            if book.title.casefold() == wanted:
                return book
    raise UserError(
        f"no such book: {name} is neither a text file nor one of Shakespeare's plays, as Macbeth is"
    )


def load_tokenizer(path: Path | None) -> Tokenizer:
    """The tokenizer of a JSON file; bytes without one."""
    return ByteTokenizer() if path is None else JsonTokenizer(path)


def load_model(folder: Path, tokenizer: Tokenizer, device: str) -> RoutedTransformerXL:
    """A model with a routed memory, in evaluation mode.

    Raises:
        UserError: there is none, or it does not fit the tokenizer.
    """
    try:
        model = RoutedTransformerXL.from_pretrained(folder, device=device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not model.memory_layers or model.config["num_tokens_q"] is not None:
        raise UserError(f"{folder}: expected a model whose tokens all read a routed memory, got another one")
    if model.vocab_size != tokenizer.vocab_size + 1:
        raise UserError(
            f"{folder}: expected a model of {tokenizer.vocab_size + 1} tokens, those of the tokenizer and "
            f"the one that begins a document, got one of {model.vocab_size} (--tokenizer names another)"
        )
    return model


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make the folder if it is missing, and keep other readers out of it."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path / LOCK, timeout=0).acquire()
    except Timeout:
        raise UserError(f"another process is reading into {path}") from None
    with lock:
        yield


def prepare_folder(
    path: Path,
    book: Book,
    model_folder: Path,
    *,
    tokenizer_file: Path | None,
    capacity: int | None,
    every: int | None,
) -> BookFolder:
    """A new folder for a book, or the one that it was read into before, by the same settings.

    Args:
        path: of the folder, which is there.
        book: to be read.
        model_folder: of the model that reads it.
        tokenizer_file: None where every byte is a token.
        capacity: memory rows; None for all or, if the folder has another number, for that.
        every: segments between saved states; None for `EVERY`, or for what the folder has.

    Raises:
        UserError: the folder holds something else.
    """
    text = hashlib.sha256(book.text).hexdigest()
    tokenizer = None if tokenizer_file is None else _hash(tokenizer_file)
    if (path / SETTINGS).exists():
        folder = BookFolder(path)
        for name, found in (("text", text), ("tokenizer", tokenizer)):
            if getattr(folder.settings, name) != found:
                raise UserError(
                    f"{path} holds {folder.settings.title}, read with another {name}: it has changed since, "
                    "or is that of another book"
                )
        for name, given in (("capacity", capacity), ("every", every)):
            before = getattr(folder.settings, name)
            if given not in (None, before):
                raise UserError(f"{path} was read with --{name} {before}, not {given}")
        return folder
    others = {each.name for each in path.iterdir()} - {LOCK, TEXT, TOKENIZER, f"{SETTINGS}.tmp"}
    if others:
        raise UserError(f"{path} holds something else than a book that was read: {min(others)}")
    (path / TEXT).write_bytes(book.text)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, path / TOKENIZER)
    _write(path, Settings(book.title, text, tokenizer, str(model_folder.resolve()), capacity, every or EVERY))
    return BookFolder(path)


def read_book(folder: BookFolder, model: RoutedTransformerXL, model_folder: Path) -> None:
    """Read the book to its end from where it was saved last, and remember where the model is.

    Raises:
        MemoryStoreError: other weights have read it before, or the folder is damaged.
    """
    settings, n, last, saved = folder.settings, model.segment_len, folder.last(model), folder.saved()
    position = saved[-1] if saved else 0
    if saved:
        state = model.load_state(folder.state_folder(position), mode="r+" if position < last else "r")
    else:
        for name in (MEMORY, STATES):  # of a process that was killed before it saved any state
            shutil.rmtree(folder.path / name, ignore_errors=True)
        dtype = torch.bfloat16 if model.embedding.weight.is_cuda else None
        memory = model.create_memory(folder.path / MEMORY, streams=1, capacity=settings.capacity, dtype=dtype)
        state = model.initial_state(streams=1, memory=memory)
        state.save(folder.state_folder(0))
    _write(folder.path, replace(settings, model=str(model_folder.resolve())))
    assert state.memory is not None
    progress = tqdm(
        total=last,
        initial=position,
        desc=f"read {settings.title}",
        unit="token",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        dynamic_ncols=True,
        disable=position == last,
    )
    with state.memory, progress:
        for end in range(position + n, last + 1, n):
            state = read_segment(model, folder.inputs[end - n : end], state)
            if end % (settings.every * n) == 0 or end == last:
                state.save(folder.state_folder(end))
            progress.set_postfix_str(f"{memory_rows(state):,} memory rows", refresh=False)
            progress.update(n)


@torch.no_grad()
def read_segment(model: RoutedTransformerXL, tokens: Tensor, state: TransformerXLState) -> TransformerXLState:
    """The state after tokens [n]."""
    with autocast(model):
        _, state = model(tokens[None].to(state.window.device), state)
    return state


def memory_rows(state: TransformerXLState) -> int:
    """Rows in each layer of the memory."""
    assert state.memory is not None
    return int(state.memory.lengths[0])


def autocast(model: RoutedTransformerXL) -> torch.autocast:
    """Bfloat16 on a GPU, full precision on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=model.embedding.weight.is_cuda)


def _write(path: Path, settings: Settings) -> None:
    """Write the settings into a folder, whole or not at all."""
    temporary = path / f"{SETTINGS}.tmp"
    temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path / SETTINGS)


def _hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
