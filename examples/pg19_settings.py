"""Command line, presets and the run folder of examples/pg19.py."""

import argparse
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from pg19_data import HELD_OUT, UserError

from xlroute.transformer_xl import MemoryRouting

# Without memory, with XL memory, and with XL and a long-term memory whose rows are chosen in one of the ways
# that `RoutedTransformerXL` knows.
ROUTINGS = get_args(MemoryRouting)
MODES = ("none", "xl", *ROUTINGS)
DEFAULT_MODES = ("none", "xl", "content")

TIMED_SCHEDULE = 1000  # what stands for the number of steps where that is not known before
# Steps between two checkpoints. On a GPU steps are quick, and memories large.
CHECKPOINT_EVERY = {"small": 100, "10m": 10_000, "50m": 10_000}

# What a run writes; --overwrite removes these and nothing else.
TOKENIZER_FILE = "tokenizer.json"  # a BPE that was trained for the run
FILES = ("settings.json", TOKENIZER_FILE, "metrics.jsonl", "results.json", "curves.png", "sample.txt")
FOLDERS = (*MODES, "persistence")


@dataclass(frozen=True)
class Settings:
    """Everything that the results depend on. A run remembers them, and is resumed with the same ones."""

    preset: str = "small"
    data: str = "plays"
    tokenizer: str | None = None
    bpe: int = 0  # tokens; 0 for none
    tokenizer_digest: str | None = None  # of the file, once it is there
    max_books: int | None = None
    max_bytes: int | None = None
    split: str = "test"
    modes: tuple[str, ...] = DEFAULT_MODES
    seed: int = 0
    device: str = "cpu"
    steps: int | None = 500  # None where time alone bounds the training
    minutes: float | None = None
    streams: int = 16
    segment_len: int = 64
    mem_len: int = 64
    dim: int = 128
    depth: int = 3
    heads: int = 4
    dim_head: int = 32
    memory_layers: tuple[int, ...] = (2, 3)
    num_tokens_kv: int = 256
    routing_tokens: int = 1
    routing_chunk: int = 1
    num_content_tokens_kv: int = 8
    routing_shortlist: float | None = None
    capacity: int = 2048
    routed_self_attention: bool = False
    routed_feedforward: bool = False
    memory_grad_segments: int = 0
    dropout: float = 0.0
    learning_rate: float = 3e-3

    @property
    def schedule(self) -> int:
        """Steps that the learning rate is planned for; where time alone counts, so many shares of it."""
        return TIMED_SCHEDULE if self.steps is None else self.steps


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "10m": {
        "steps": 20_000,
        "streams": 32,
        "segment_len": 512,
        "mem_len": 512,
        "dim": 384,
        "depth": 6,
        "heads": 8,
        "dim_head": 64,
        "memory_layers": (3, 5),
        "num_tokens_kv": 512,
        "capacity": 65_536,
        "learning_rate": 1e-3,
    },
    "50m": {
        "steps": 20_000,
        "streams": 16,
        "segment_len": 512,
        "mem_len": 512,
        "dim": 512,
        "depth": 14,
        "heads": 8,
        "dim_head": 64,
        "memory_layers": (5, 9),
        "num_tokens_kv": 512,
        "capacity": 65_536,
        "learning_rate": 6e-4,
    },
}


@dataclass(frozen=True)
class Command:
    """What the command line asks for: the settings, and how to go about it."""

    settings: Settings
    given: dict[str, Any]  # the settings named on the command line, as they will be stored
    out: Path
    resume: bool
    overwrite: bool
    checkpoint_every: int | None  # steps; None for what suits the preset
    stop_after: float | None
    keep_bf16: bool
    read_on: Path | None


class Parser(argparse.ArgumentParser):
    """Raises UserError for a command line that does not fit."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message} (--help lists the options)")


def at_least(least: int) -> Any:
    """An option that is a whole number of at least so much."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {text!r}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """An option that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(mode for mode in MODES if mode in text.split(","))
    if not modes or len(modes) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(MODES)}, got {text!r}")
    return modes


def _layers(text: str) -> tuple[int, ...]:
    return tuple(at_least(1)(part) for part in text.split(","))


def parse(arguments: list[str] | None = None) -> Command:
    """Read the command line.

    Raises:
        UserError: for options that do not exist or do not fit.
    """
    parser = Parser(
        prog="pg19.py",
        description="Train and compare a Transformer-XL without memory, with XL and with routed memory.",
        # Only the options that were given are set, so that presets and a resumed run fill in the rest.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, help="the run folder (default: run)")
    add("--resume", action="store_true", help="go on with the run in the run folder")
    add("--overwrite", action="store_true", help="replace the run in the run folder")
    add(
        "--checkpoint-every",
        type=at_least(1),
        metavar="N",
        help="steps between two checkpoints (default: 100; 10,000 with a larger preset)",
    )
    add(
        "--stop-after",
        type=positive,
        metavar="SECONDS",
        help="stop as for Ctrl-C once the process has run so long",
    )
    add("--keep-bf16", action="store_true", help="also write MODE/model-bf16: the weights in half the bytes")
    add("--preset", choices=PRESETS, help="sizes: small (2 CPU cores), or about 10m or 50m weights (one GPU)")
    add("--data", help="plays (default), pg19 (the Hugging Face hub), or a folder in PG-19's layout")
    add("--tokenizer", metavar="PATH", help="a tokenizers JSON (default: every byte is a token)")
    add(
        "--bpe",
        type=at_least(257),
        metavar="N",
        help="train a byte-level BPE of N tokens on the training books, once, and use that",
    )
    add("--max-books", type=at_least(1), metavar="N", help="read the first N books of each split only")
    add("--max-bytes", type=at_least(4), metavar="N", help="read the first N bytes of each book only")
    add("--split", choices=HELD_OUT, help="what to evaluate on (default: test)")
    add("--modes", type=_modes, help=f"some of {','.join(MODES)} (default: {','.join(DEFAULT_MODES)})")
    add("--seed", type=at_least(0))
    add("--device", help="cpu (default) or cuda")
    add("--steps", type=at_least(1), help="training steps of each mode")
    add("--minutes", type=positive, help="of training for each mode, instead of steps or at most")
    add("--streams", type=at_least(1), help="documents read side by side in training")
    add("--segment-len", type=at_least(1), help="tokens of a document read at once")
    add("--mem-len", type=at_least(1), help="tokens in the XL window")
    for name in ("dim", "depth", "heads", "dim-head"):
        add(f"--{name}", type=at_least(1))
    add("--memory-layers", type=_layers, metavar="N,N", help="blocks with routed memory, counted from 1")
    add("--num-tokens-kv", type=at_least(1), help="memory rows that each learned token chooses")
    add("--routing-tokens", type=at_least(1), help="sets of memory rows; divides the heads")
    add("--routing-chunk", type=at_least(1), help="tokens that share rows chosen by content (default: 1)")
    add(
        "--num-content-tokens-kv",
        type=at_least(1),
        help="memory rows that a token, or a chunk, chooses in each set",
    )
    add(
        "--routing-shortlist",
        type=float,
        metavar="F",
        help="in training, choose memory rows, but those of chunks, out of F times as many (default: all)",
    )
    add("--capacity", type=at_least(1), help="memory rows kept of each stream and layer")
    for name, what in (
        ("self-attention", "attention to the near tokens, and of few to routed rows"),
        ("feedforward", "a light feedforward, and a heavy one for few tokens"),
    ):
        add(
            f"--routed-{name}",
            action="store_true",
            default=argparse.SUPPRESS,
            help=f"{what}, in all modes (CoLT5)",
        )
    add(
        "--memory-grad-segments",
        type=at_least(0),
        metavar="N",
        help="segments back through which memory rows are trained; a step then reads N + 1 (default: 0)",
    )
    add("--dropout", type=float)
    add("--learning-rate", type=float)
    # The second process of the proof of persistence is this script again.
    add("--read-on", type=Path, help=argparse.SUPPRESS)

    given = vars(parser.parse_args(arguments))
    command = {
        name: given.pop(name, default)
        for name, default in (
            ("out", Path("run")),
            ("resume", False),
            ("overwrite", False),
            ("checkpoint_every", None),
            ("stop_after", None),
            ("keep_bf16", False),
            ("read_on", None),
        )
    }
    sizes = PRESETS[given.get("preset", "small")] | ({"steps": None} if "minutes" in given else {})
    return Command(settings=Settings(**(sizes | given)), given=json.loads(json.dumps(given)), **command)


def find_settings(command: Command) -> Settings:
    """The settings of the run: those of the run to resume, or those of the command line. Changes nothing.

    Raises:
        UserError: the folder holds a run and nobody said what to do with it, or the run to resume has other
            settings.
    """
    out, stored = command.out, command.out / "settings.json"
    if command.resume and command.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out names a folder")
    if command.resume and not stored.exists():
        raise UserError(f"{out} holds no run to resume")
    if not stored.exists() or command.overwrite:
        return command.settings
    if not command.resume:
        if (out / "results.json").exists():
            raise UserError(f"{out} holds a finished run: --resume shows it again, --overwrite replaces it")
        raise UserError(f"{out} holds an unfinished run: --resume goes on with it, --overwrite replaces it")
    settings = load_settings(stored)
    values = json.loads(json.dumps(asdict(settings)))
    for name, value in command.given.items():
        if values[name] != value:
            raise UserError(
                f"{out} holds a run with other settings: {name} {values[name]!r}, not {value!r} "
                "(--resume takes them from the run)"
            )
    return settings


def load_settings(path: Path) -> Settings:
    """The settings that a run wrote."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return Settings(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def prepare_folder(command: Command, settings: Settings) -> None:
    """Write the settings; with --overwrite, first remove the run that the folder holds and nothing else."""
    if command.overwrite:
        for name in FILES:
            (command.out / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(command.out / name, ignore_errors=True)
    write_json(command.out / "settings.json", asdict(settings))


def note_tokenizer(settings: Settings, digest: str, out: Path) -> Settings:
    """The settings of the run in a folder with the digest of its tokenizer, which it keeps from now on.

    Raises:
        UserError: the run was begun with another tokenizer.
    """
    if settings.tokenizer_digest not in (None, digest):
        raise UserError(
            f"{settings.tokenizer or out / TOKENIZER_FILE} is not the tokenizer that {out} began with"
        )
    settings = replace(settings, tokenizer_digest=digest)
    write_json(out / "settings.json", asdict(settings))
    return settings


def check(settings: Settings) -> None:
    """Raise UserError for settings that make no sense or do not fit this machine."""
    if settings.device not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {settings.device!r}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here")
    if settings.tokenizer and settings.bpe:
        raise UserError("--tokenizer and --bpe exclude each other")
    if not 0 < settings.learning_rate < 1:
        raise UserError(f"--learning-rate: expected between 0 and 1, got {settings.learning_rate}")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
