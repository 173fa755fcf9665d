"""Models of several sizes, tokenizers and memories on real books: runs of examples/pg19.py, one by one.

    python benchmarks/books.py --data BOOKS --device cuda --minutes 2 --stop-after 540 --runs RUN ...
    python benchmarks/books.py --report --weights 10m:bytes:content:0

A run is SIZE:TOKENIZER:MODE:SEED: a preset and a mode of examples/pg19.py, and "bytes" or "bpeN", a BPE of N
tokens, which is trained on the training books once for all runs. Commas make several runs of one, in order:
10m:bytes:xl,content:0,1,2. A fifth part is an option of these alone: 10m:bytes:content:0:routing-chunk=64.
All other options are those of examples/pg19.py, the same for all runs.

Each run has a folder in --out, as examples/pg19.py makes it, but without the proof of persistence and the
sample of text. Once --stop-after seconds have passed, or on Ctrl-C, the run at work is checkpointed; the exit
code is 128 and the signal, 142 for the former. The same command goes on where it was. Checkpoints of finished
runs are removed.

--report reads the finished runs and writes into report/ in --out: report.md, with means, spreads, and
differences to XL memory; results.csv, a line for each run; books.png, bits per byte by position in the book;
runs.tar.gz, settings, metrics, results and routing pictures of all runs; and, in bfloat16, the weights of the
runs that --weights names, as weights.tar.0, weights.tar.1, ... (cat weights.tar.* | tar x).
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from books_report import GridRun, write_report
from pg19 import keep_bf16, open_run, run_mode
from pg19_data import UserError, load_corpus, trained_bpe
from pg19_settings import MODES, PRESETS, Command, Parser, find_settings, parse, positive
from pg19_train import Interrupt

from xlroute.memory import MemoryStoreError

OF_A_RUN = {"preset", "tokenizer", "bpe", "modes", "seed"}  # settings that a run's name says


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    interrupt = Interrupt()
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("run-grid"), help="folder of the runs (default: run-grid)")
    add("--runs", nargs="+", default=[], metavar="RUN", help="what to run, in order")
    add("--stop-after", type=positive, metavar="SECONDS", help="stop as for Ctrl-C after so long")
    add("--report", action="store_true", help="write report/ about the finished runs")
    add("--weights", nargs="+", default=[], metavar="RUN", help="whose weights go into report/")
    try:
        options, others = parser.parse_known_args(arguments)
        with interrupt.after(options.stop_after):
            if options.report:
                written = write_report(options.out, find_runs(options.weights, "--weights"))
                print(written.read_text(encoding="utf-8"))
                print(
                    f"wrote {written.parent}/: {', '.join(sorted(p.name for p in written.parent.iterdir()))}"
                )
            else:
                work(find_runs(options.runs, "--runs"), options.out, others, interrupt)
    except (UserError, MemoryStoreError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + interrupt.signal
    return 0


def find_runs(texts: list[str], option: str) -> list[GridRun]:
    """The runs that texts like 10m:bytes:xl,content:0,1 name, each once, in their order.

    Raises:
        UserError: for anything else.
    """
    found: dict[GridRun, None] = {}
    for text in texts:
        parts = [part.split(",") for part in text.split(":")]
        if len(parts) not in (4, 5):
            raise UserError(f"{option}: expected SIZE:TOKENIZER:MODE:SEED, got {text!r}")
        for size, tokenizer, mode, seed, *own in itertools.product(*parts):
            tokens = tokenizer.removeprefix("bpe")
            for what, known in (
                (f"a size of {', '.join(PRESETS)}", size in PRESETS),
                ("bytes, or bpe and a number above 256", tokenizer == "bytes" or _is_number(tokens, 257)),
                (f"a mode of {', '.join(MODES)}", mode in MODES),
                ("a seed of 0 or more", _is_number(seed, 0)),
                ("an option like routing-chunk=64", all(re.fullmatch(r"[a-z-]+=[\w.]+", o) for o in own)),
            ):
                if not known:
                    raise UserError(f"{option}: expected {what}, got {text!r}")
            found[GridRun(size, tokenizer, mode, int(seed), *own)] = None
    return list(found)


def _is_number(text: str, least: int) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= least


def work(runs: list[GridRun], out: Path, others: list[str], interrupt: Interrupt) -> None:
    """Make all runs, or go on with them."""
    if not runs:
        raise UserError("--runs: expected some, got none")
    wrong = sorted(OF_A_RUN & parse(others).given.keys())
    if wrong:
        raise UserError(f"--{wrong[0]}: --runs says it")
    for number, run in enumerate(runs, start=1):
        folder = out / run.name
        arguments = ["--preset", run.size, "--modes", run.mode, "--seed", str(run.seed), "--out", str(folder)]
        if run.tokenizer != "bytes":
            arguments += ["--tokenizer", str(out / f"{run.tokenizer}.json")]
        if run.option:
            arguments.append(f"--{run.option}")
        if (folder / "settings.json").exists():
            arguments.append("--resume")
        command = parse([*others, *arguments])
        if (folder / run.mode / "rows.json").exists():
            find_settings(command)  # which must be those that it was made with
        else:
            print(f"run {number} of {len(runs)}: {run.name}", flush=True)
            make(run, command, interrupt)
        shutil.rmtree(folder / run.mode / "checkpoints", ignore_errors=True)
        if command.keep_bf16 and not (folder / run.mode / "model-bf16" / "config.json").exists():
            keep_bf16((run.mode,), folder)


def make(run: GridRun, command: Command, interrupt: Interrupt) -> None:
    """Train and evaluate one run."""
    settings = command.settings
    if settings.tokenizer is not None and not Path(settings.tokenizer).exists():
        corpus = load_corpus(
            settings.data,
            split=settings.split,
            seed=0,
            max_books=settings.max_books,
            max_bytes=settings.max_bytes,
        )
        command.out.parent.mkdir(parents=True, exist_ok=True)
        trained_bpe(corpus, int(run.tokenizer.removeprefix("bpe")), Path(settings.tokenizer))
    with open_run(command, interrupt) as opened:
        run_mode(run.mode, opened)


if __name__ == "__main__":
    sys.exit(main())
