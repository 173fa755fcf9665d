"""Evaluation for examples/pg19.py: whole books, the proof that a memory persists, and a sample of text."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pg19_data import Book, Tokens, UserError, segments, with_start
from pg19_settings import Settings, write_json
from pg19_train import (
    Run,
    StepClock,
    autocast,
    begin_step,
    initial_state,
    memory_rows,
    random_model,
    token_nats,
)
from pg19_words import KINDS, kinds_of_tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.streaming import read_documents

BINS = 24  # of the position in the book, for the curve along it
PERSISTENCE = "persistence"  # the folder of the proof
PROMPT_LEN = 256  # tokens of the book in front of the sample
SAMPLE_LEN = 600  # tokens


@dataclass
class Evaluation:
    """What reading whole books gave."""

    # Of each book, by the kinds of tokens that `kinds_of_tokens` tells apart.
    kind_nats: npt.NDArray[np.float64]
    kind_bytes: npt.NDArray[np.int64]
    nats: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    memory_rows: int = 0  # most rows that one stream held in each memory layer
    bin_width: int = 1  # tokens
    bin_nats: list[float] = field(default_factory=lambda: [0.0] * BINS)
    bin_bytes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    segment_nats: list[float] = field(default_factory=list)  # of each segment of each book, in reading order
    gate_sums: list[float] = field(default_factory=list)  # the sum of the gates over the budget, by segment
    gradient_shares: list[float] = field(default_factory=list)  # of the chosen rows, by segment
    # For every segment of the first book: where it starts, and the positions that the first memory layer
    # chose to read, int64 [k] of each set of rows, once each.
    starts: list[int] = field(default_factory=list)
    chosen: list[list[npt.NDArray[np.int64]]] = field(default_factory=list)


@torch.no_grad()
def evaluate(name: str, model: RoutedTransformerXL, run: Run, *, forget: bool = False) -> Evaluation:
    """Read every held-out book from its first byte to its last, and score each token once.

    Books are read side by side, each with the memory of itself alone. Sums are in float64.

    Args:
        name: for the progress bar.
        model: is left in evaluation mode.
        run: whose held-out books are read.
        forget: empty the long-term memory after every segment.
    """
    model.eval()
    settings, tokenizer = run.settings, run.tokenizer
    torch.manual_seed(settings.seed)  # of rows drawn at random
    documents = [tokenizer.encode(book.text) for book in run.corpus.held_out]
    longest = max(len(document) for document in documents)
    streams = min(len(documents), settings.streams)
    shape = (len(documents), len(KINDS))
    result = Evaluation(np.zeros(shape), np.zeros(shape, dtype=np.int64), bin_width=-(-longest // BINS))
    kinds = []  # of each token: number of the book x kinds + kind
    for number, book in enumerate(run.corpus.held_out):
        starts = tokenizer.starts(book.text)
        of_book = kinds_of_tokens(
            book.text, starts, segment_len=settings.segment_len, mem_len=settings.mem_len
        )
        kinds.append(number * len(KINDS) + of_book)
        sizes = np.diff(starts, append=len(book.text))
        result.kind_bytes[number] = np.bincount(of_book, weights=sizes, minlength=len(KINDS))
        places = np.arange(len(starts)) // settings.segment_len * settings.segment_len // result.bin_width
        result.bin_bytes += np.bincount(places, weights=sizes, minlength=BINS).astype(np.int64)
    state = initial_state(model, settings, streams)
    first_book = True
    clock = StepClock(settings.device)
    progress = tqdm(
        total=sum(len(document) for document in documents),
        desc=f"eval  {name:6}",
        unit="token",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
        dynamic_ncols=True,
    )
    with progress:
        cut = {"streams": streams, "segment_len": settings.segment_len}
        cuts = zip(segments(iter(documents), tokenizer, **cut), read_documents(kinds, **cut), strict=True)
        for (tokens, targets, lengths, ends), (of_kind, _, _) in cuts:
            began = time.perf_counter()
            positions = state.positions
            begin_step()
            with autocast(settings):
                logits, state, routing = model(
                    tokens.to(settings.device), state, lengths=lengths, ends=ends, return_routing=True
                )
            by_token = token_nats(logits, targets, lengths).double()
            nats = by_token.sum(dim=1).tolist()
            if forget:
                state.clear_memory()
            seconds = time.perf_counter() - began
            result.seconds += clock.counted(seconds)
            result.nats += sum(nats)
            result.segment_nats += nats
            result.kind_nats += np.bincount(
                of_kind.flatten(), weights=by_token.cpu().flatten(), minlength=result.kind_nats.size
            ).reshape(shape)
            result.tokens += int(lengths.sum())
            result.memory_rows = max(result.memory_rows, memory_rows(state))
            for stream in range(streams):
                result.bin_nats[int(positions[stream]) // result.bin_width] += nats[stream]
            if routing and routing[0].mask.any():
                result.gate_sums.append(float(routing[0].gate_sum.mean()))
                result.gradient_shares.append(float(routing[0].gradient_share.mean()))
            if first_book and routing:
                result.starts.append(int(positions[0]))
                of_layer = [each for each in routing if each.layer == routing[0].layer]
                result.chosen.append([rows for each in of_layer for rows in _by_set(each.positions[0])])
            first_book = first_book and not bool(ends[0])
            progress.set_postfix_str(f"{memory_rows(state):,} memory rows", refresh=False)
            progress.update(int(lengths.sum()))
    return result


def _by_set(positions: Tensor) -> list[npt.NDArray[np.int64]]:
    """The positions [r, k], or those of chunks [g, r, k], that each set of rows holds, once each."""
    if positions.ndim == 3:
        positions = positions.transpose(0, 1).flatten(1)
    return [np.unique(rows[rows >= 0]) for rows in positions.cpu().numpy()]


@torch.no_grad()
def multiply_adds(mode: str, settings: Settings, vocab_size: int) -> int:
    """Multiply-adds of the matrix products for a token, when XL window and memory are full."""
    model = random_model(mode, settings, vocab_size).eval()
    state = model.initial_state(streams=1)
    if model.memory_layers:
        memory = model.create_memory(streams=1)
        rows = max(settings.num_tokens_kv, settings.num_content_tokens_kv)
        memory.append(torch.zeros(memory.layers, 1, rows, settings.dim))
        state = model.initial_state(streams=1, memory=memory)
    # The plain formula of attention is made of products, which can be counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, settings.segment_len, dtype=torch.int64), state)
    return int(counter.get_total_flops()) // (2 * settings.segment_len)


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """On a GPU, only algorithms that give the same bits every time; a CPU's do."""
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def read(
    model: RoutedTransformerXL, settings: Settings, state: TransformerXLState, tokens: Tokens
) -> tuple[TransformerXLState, list[str]]:
    """Read tokens of one document, segment by segment; a SHA-256 of the logits of each segment."""
    torch.manual_seed(settings.seed)  # of rows drawn at random
    digests = []
    for start in range(0, len(tokens), settings.segment_len):
        piece = torch.from_numpy(tokens[None, start : start + settings.segment_len].astype(np.int64))
        with autocast(settings):
            logits, state = model(piece.to(settings.device), state)
        digests.append(hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest())
    return state, digests


def prove_persistence(run: Run, model_folder: Path, book: Book) -> dict[str, Any]:
    """Read half a book, save the state, and let this process and a new one read the other half.

    The new process has the folder alone: it loads the weights, opens the memory at its commit, reads on.

    Returns:
        What was read, and whether the logits of both processes are identical, bit for bit.
    """
    settings, folder = run.settings, run.out / PERSISTENCE
    tokens = with_start(run.tokenizer.encode(book.text), run.tokenizer)
    half = len(tokens) // 2
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was interrupted
    folder.mkdir(parents=True)
    model = RoutedTransformerXL.from_pretrained(model_folder, device=settings.device)
    with deterministic(settings.device):
        state, _ = read(model, settings, initial_state(model, settings, 1, folder / "memory"), tokens[:half])
        rows = memory_rows(state)
        state.save(folder / "state")
        np.save(folder / "rest.npy", tokens[half:])
        write_json(
            folder / "task.json", {"model": str(model_folder.resolve()), "threads": torch.get_num_threads()}
        )
        _, digests = read(model, settings, state, tokens[half:])
    script = Path(__file__).with_name("pg19.py")
    child = subprocess.run(
        [sys.executable, str(script), "--read-on", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise UserError(f"the process that was to read on failed: {child.stderr.strip()}")
    other = json.loads((folder / "read_on.json").read_text(encoding="utf-8"))["digests"]
    return {
        "book": book.title,
        "tokens_before": half,
        "memory_rows": rows,
        "tokens_after": len(tokens) - half,
        "segments": len(digests),
        "different_segments": sum(a != b for a, b in zip(digests, other, strict=True)),
        "identical": digests == other,
    }


def read_on(folder: Path, settings: Settings) -> None:
    """The new process of `prove_persistence`: open what the first one saved and read on."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    model = RoutedTransformerXL.from_pretrained(task["model"], device=settings.device)
    state = model.load_state(folder / "state", mode="r")
    with deterministic(settings.device):
        _, digests = read(model, settings, state, np.load(folder / "rest.npy"))
    write_json(folder / "read_on.json", {"process": os.getpid(), "digests": digests})


def write_sample(run: Run, model_folder: Path, book: Book) -> None:
    """Continue a book from the memory of its first half, as `prove_persistence` saved it, in sample.txt."""
    settings, tokenizer = run.settings, run.tokenizer
    tokens = with_start(tokenizer.encode(book.text), tokenizer)
    half = len(tokens) // 2
    stop = half + PROMPT_LEN
    model = RoutedTransformerXL.from_pretrained(model_folder, device=settings.device)
    state = model.load_state(run.out / PERSISTENCE / "state", mode="r")
    rows = memory_rows(state)
    prompt = torch.from_numpy(tokens[None, half:stop].astype(np.int64)).to(settings.device)
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    with autocast(settings):
        new, _ = model.generate(prompt, SAMPLE_LEN, state, temperature=0.8, top_p=0.95, generator=generator)
    text = "\n".join(
        (
            f"{book.title}, continued by the model after {half:,} tokens read and with {rows:,} memory rows",
            "",
            "---- the book, the last that the model read ----",
            tokenizer.decode(tokens[max(1, stop - 2 * PROMPT_LEN) : stop].tolist()),
            "---- the model goes on ----",
            tokenizer.decode(new[0].tolist()),
            "---- the book goes on ----",
            tokenizer.decode(tokens[stop : stop + PROMPT_LEN].tolist()),
            "",
        )
    )
    (run.out / "sample.txt").write_text(text, encoding="utf-8")
