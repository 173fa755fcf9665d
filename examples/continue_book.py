"""Read a whole book into a memory, then continue it from any place, with the memory and without it.

    python examples/pg19.py
    python examples/continue_book.py read macbeth --model run/content/model --capacity 2048 --out run-macbeth
    python examples/continue_book.py continue --out run-macbeth --at "Is this a dagger which I see before me"

The first command trains a model, with 2,048 memory rows. The second reads a book, one of Shakespeare's plays
or a text file, and keeps in the folder all memory rows, and a saved state every 16 segments. It may be killed
at any moment: the same command goes on. The third is another process, as many at once as you like, which
change nothing there. It opens the last state before the place, reads up to it, and continues the text twice
from the same random numbers: with the memory, and with it emptied before every segment, so that only the XL
window is left. It prints both beside the book's own text, how well each foresees that, and which passages of
the book were read for it.

A place is a number of bytes, or a phrase, after which the text is continued.

Every error that a person can put right is one line, with exit code 2.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from continue_book_folder import (
    EVERY,
    BookFolder,
    find_book,
    load_model,
    load_tokenizer,
    locked,
    prepare_folder,
    read_book,
)
from continue_book_report import report
from continue_book_text import continue_at
from pg19_data import UserError
from pg19_settings import Parser, at_least

from xlroute.memory import MemoryStoreError
from xlroute.sampling import SamplingOptions


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: for options that do not exist or do not fit.
    """
    parser = Parser(
        prog="continue_book.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("read", "read a book and keep its memory; or go on with that"),
        ("continue", "continue a book that was read"),
    ):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        command.add_argument("--out", type=Path, required=True, help="the folder of the book")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add = commands.choices["read"].add_argument
    add("book", help="a text file, or the name of one of Shakespeare's plays")
    add("--model", type=Path, required=True, help="folder of a model that examples/pg19.py trained")
    add("--tokenizer", type=Path, help="the tokenizers JSON it was trained with (default: bytes)")
    add(
        "--capacity",
        type=at_least(1),
        help="memory rows that are read at most, the newest (default: all)",
    )
    add("--every", type=at_least(1), metavar="N", help=f"segments between saved states (default: {EVERY})")
    add = commands.choices["continue"].add_argument
    add("--at", required=True, help="where: a number of bytes, or a phrase to go on after")
    add("--length", type=at_least(1), default=400, metavar="N", help="tokens to write (default: 400)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    add("--top-p", type=float, default=0.95, help="share of the probability drawn from (default: 0.95)")
    add("--seed", type=at_least(0), default=0, help="of the random numbers (default: 0)")
    add(
        "--score",
        type=at_least(0),
        default=2000,
        metavar="N",
        help="bytes of the book to foresee (default: 2000)",
    )
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        options = parse(arguments)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is no CUDA device here")
        if options.command == "read":
            read(options)
        else:
            go_on(options)
    except (UserError, MemoryStoreError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def read(options: argparse.Namespace) -> None:
    """Read the book to its end, from where an earlier process has stopped."""
    book, tokenizer = find_book(options.book), load_tokenizer(options.tokenizer)
    model = load_model(options.model, tokenizer, options.device)
    with locked(options.out):
        folder = prepare_folder(
            options.out,
            book,
            options.model,
            tokenizer_file=options.tokenizer,
            capacity=options.capacity,
            every=options.every,
        )
        read_book(folder, model, options.model)
    print(folder.describe())


def go_on(options: argparse.Namespace) -> None:
    """Continue the book at a place, and print what comes of it."""
    try:
        sampling = SamplingOptions(temperature=options.temperature, top_p=options.top_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = BookFolder(options.out)
    point = folder.find(options.at)
    continuation = continue_at(
        folder,
        load_model(Path(folder.settings.model), folder.tokenizer, options.device),
        point,
        length=options.length,
        score_bytes=options.score,
        sampling=sampling,
        seed=options.seed,
    )
    if options.json:
        print(json.dumps(asdict(continuation), indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(report(continuation, width))


if __name__ == "__main__":
    sys.exit(main())
