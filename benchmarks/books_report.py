"""The report of benchmarks/books.py: what finished runs gave, by mode, and compared with XL memory."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: it must not look for a screen
import matplotlib.pyplot as plt
import torch
from pg19_data import UserError
from pg19_report import LABELS, draw_along, label, word_perplexity
from pg19_settings import MODES, PRESETS

from xlroute import RoutedTransformerXL

PART_BYTES = 15 * 2**20  # of a part of weights.tar
MOST_PARTS = 4
XL = ("xl", "", False)  # what others are compared with
# What a run is copied home with, besides its routing picture.
KEPT = ("settings.json", "metrics.jsonl")


class GridRun(NamedTuple):
    """One run: a preset, "bytes" or "bpeN", a mode, a seed, and an option of its own, if any."""

    size: str
    tokenizer: str
    mode: str
    seed: int
    option: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(str(part) for part in self if part != "")


@dataclass(frozen=True)
class Finished:
    """A run that was made, its settings, and its rows of the table: one, or two with the memory emptied."""

    run: GridRun
    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]


def finished_runs(out: Path) -> list[Finished]:
    """The finished runs in a folder, by size, tokenizer, mode and seed."""
    found = []
    for path in sorted(out.glob("*/*/rows.json")):
        folder, mode = path.parents[1], path.parent.name
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        tokenizer = Path(settings["tokenizer"]).stem if settings["tokenizer"] else "bytes"
        run = GridRun(settings["preset"], tokenizer, mode, settings["seed"])
        run = run._replace(option=folder.name.removeprefix(run.name).removeprefix("-"))
        found.append(Finished(run, folder, settings, json.loads(path.read_text(encoding="utf-8"))))
    sizes = list(PRESETS)
    return sorted(
        found,
        key=lambda each: (
            sizes.index(each.run.size),
            each.run.tokenizer != "bytes",
            len(each.run.tokenizer),  # so that BPEs come by their number of tokens
            each.run.tokenizer,
            MODES.index(each.run.mode),
            each.run.option,
            each.run.seed,
        ),
    )


def write_report(out: Path, weights: Sequence[GridRun]) -> Path:
    """Write the report of a folder of runs; the path of report.md.

    Raises:
        UserError: there is no finished run, runs that are to be compared had other settings, or there are no
            weights of a run, or too many.
    """
    runs = finished_runs(out)
    if not runs:
        raise UserError(f"{out} holds no finished run")
    groups: dict[tuple[str, str], list[Finished]] = {}
    for each in runs:
        groups.setdefault((each.run.size, each.run.tokenizer), []).append(each)
    for group in groups.values():
        _check_alike(group)
    packed = _packed_weights(out, weights)
    folder = out / "report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _write_csv(folder / "results.csv", runs)
    _draw(folder / "books.png", groups)
    _pack(folder / "runs.tar.gz", runs)
    for number, start in enumerate(range(0, len(packed), PART_BYTES)):
        (folder / f"weights.tar.{number}").write_bytes(packed[start : start + PART_BYTES])
    report = folder / "report.md"
    report.write_text(_text(groups), encoding="utf-8")
    return report


def _check_alike(group: list[Finished]) -> None:
    first = group[0]
    for other in group[1:]:
        own = {each.run.option.partition("=")[0].replace("-", "_") for each in (first, other)}
        for name, value in first.settings.items():
            if name not in {"modes", "seed", *own} and other.settings[name] != value:
                raise UserError(
                    f"{first.run.name} and {other.run.name} cannot be compared: {name} {value!r} and "
                    f"{other.settings[name]!r}"
                )


def _text(groups: dict[tuple[str, str], list[Finished]]) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    parts = [
        "# Real books",
        f"Reported on {device}, Python {platform.python_version()}, PyTorch {torch.__version__}. ± is half "
        "of the difference between the highest and the lowest seed. Differences to XL memory are means over "
        "the seeds that both have. Beyond window: words that stood in the book before, but only beyond what "
        "XL memory sees.",
    ]
    for (size, tokenizer), group in groups.items():
        told = {
            name: value
            for name, value in group[0].settings.items()
            if not name.startswith("tokenizer") and name not in ("preset", "modes", "seed") and value
        }
        parts += [
            f"## {size}, {tokenizer}",
            ", ".join(f"{name} {value}" for name, value in told.items()),
            *(_table(columns, group) for columns in (QUALITY, _columns_by_split(group), COST) if columns),
        ]
    return "\n\n".join(parts) + "\n"


Value = Callable[[dict[str, Any]], float | None]


class Column(NamedTuple):
    """A column of a table: what it shows of a row, how, and whether the difference to XL memory follows."""

    title: str
    value: Value
    form: str
    compared: bool = False


def _of_kind(kind: str) -> Value:
    return lambda row: row["kinds"][kind]["bits_per_byte"]


QUALITY = (
    Column("bits per byte", lambda row: row["bits_per_byte"], ".4f", compared=True),
    Column("beyond window", _of_kind("beyond"), ".4f", compared=True),
    Column("in sight", _of_kind("in sight"), ".4f"),
    Column("new words", _of_kind("new"), ".4f"),
    Column("the rest", _of_kind("rest"), ".4f"),
    Column("word perplexity", lambda row: row["word_perplexity"], ",.1f"),
)
COST = (
    Column("steps", lambda row: row["steps"], ",.0f"),
    Column("trained tokens/s", lambda row: row["tokens_per_second"], ",.0f"),
    Column("ms a step", lambda row: row["ms_per_step"], ",.2f"),
    Column("read tokens/s", lambda row: row["read_tokens_per_second"], ",.0f"),
    Column("memory rows", lambda row: row["memory_rows"], ",.0f"),
    Column("peak memory, MiB", lambda row: row["peak_bytes"] / 2**20, ",.0f"),
    Column("parameters", lambda row: row["parameters"], ",.0f"),
    Column("multiply-adds", lambda row: row["multiply_adds"], ",.0f"),
)


def _columns_by_split(group: list[Finished]) -> list[Column]:
    """What is said of validation and test books apart; nothing where only one of them was read."""
    splits = list(dict.fromkeys(book["split"] for book in group[0].rows[0]["books"]))
    if len(splits) == 1:
        return []
    columns = []
    for split in splits:
        columns += [
            Column(f"{split}: bits per byte", _of_split(split), ".4f", compared=True),
            Column("beyond window", _of_split(split, "beyond"), ".4f", compared=True),
            Column("word perplexity", _word_perplexity(split), ",.1f"),
        ]
    return columns


def _of_split(split: str, *kinds: str) -> Value:
    """Bits per byte of the books of a split, of some kinds of tokens or of all."""

    def value(row: dict[str, Any]) -> float | None:
        nats, size = _sums(row, split, kinds or tuple(row["kinds"]))
        return nats / math.log(2) / size if size else None

    return value


def _word_perplexity(split: str) -> Value:
    def value(row: dict[str, Any]) -> float:
        words = sum(book["words"] for book in row["books"] if book["split"] == split)
        return word_perplexity(_sums(row, split, tuple(row["kinds"]))[0], words)

    return value


def _sums(row: dict[str, Any], split: str, kinds: tuple[str, ...]) -> tuple[float, int]:
    """Nats and bytes of some kinds of tokens in the books of a split."""
    chosen = [book["kinds"][kind] for book in row["books"] if book["split"] == split for kind in kinds]
    return sum(each["nats"] for each in chosen), sum(each["bytes"] for each in chosen)


Kind = tuple[str, str, bool]  # mode, option, whether the memory is emptied


def _by_kind(group: list[Finished]) -> dict[Kind, dict[int, dict[str, Any]]]:
    """The rows of each kind of model, by seed."""
    rows: dict[Kind, dict[int, dict[str, Any]]] = {}
    for each in group:
        for row in each.rows:
            kind = (each.run.mode, each.run.option, row["emptied"])
            rows.setdefault(kind, {})[each.run.seed] = row | {"option": each.run.option}
    return rows


def _table(columns: Sequence[Column], group: list[Finished]) -> str:
    rows = _by_kind(group)
    xl = rows.get(XL, {})
    titles = ["mode", "seeds"]
    for column in columns:
        titles += [column.title, "to XL"] if column.compared else [column.title]
    lines = [titles, ["---"] * len(titles)]
    for kind, of_seed in rows.items():
        line = [label(next(iter(of_seed.values()))), ", ".join(map(str, of_seed))]
        for column in columns:
            numbers = {seed: column.value(row) for seed, row in of_seed.items()}
            line.append(_spread([n for n in numbers.values() if n is not None], column.form))
            if column.compared:
                references = {seed: column.value(row) for seed, row in xl.items()}
                pairs = [(n, references.get(seed)) for seed, n in numbers.items()]
                shares = [n / r - 1 for n, r in pairs if n and r and kind != XL]
                line.append(_spread(shares, "+.2%"))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(numbers: list[float], form: str) -> str:
    """The mean, and half of the difference between the highest and the lowest, if there is one."""
    if not numbers:
        return ""
    half = (max(numbers) - min(numbers)) / 2
    return f"{mean(numbers):{form}}" + (f" ± {half:{form.removeprefix('+')}}" if half else "")


def _write_csv(path: Path, runs: list[Finished]) -> None:
    """A line for each run, and for each with the memory emptied."""
    lines = []
    for each in runs:
        for row in each.rows:
            numbers = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
            kinds = {
                f"{kind.replace(' ', '_')}_{name}": value
                for kind, values in row["kinds"].items()
                for name, value in values.items()
            }
            lines.append(each.run._asdict() | {"minutes": each.settings["minutes"]} | numbers | kinds)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(lines)


def _draw(path: Path, groups: dict[tuple[str, str], list[Finished]]) -> None:
    """Bits per byte by position in the book, means over seeds: for each size and tokenizer two panels.

    Differences are to XL memory, or the first kind of model, with the same seeds.
    """
    figure = plt.figure(figsize=(14, 5 * len(groups)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for ((size, tokenizer), group), part in zip(groups.items(), parts, strict=True):
        absolute, compared = part.subplots(1, 2)
        kinds = _by_kind(group)
        reference = XL if XL in kinds else next(iter(kinds))
        rows = [_mean_row(list(of_seed.values())) for of_seed in kinds.values()]
        same_seeds = [
            [row for seed, row in kinds[reference].items() if seed in of_seed] for of_seed in kinds.values()
        ]
        draw_along(absolute, compared, rows, [_mean_row(each) if each else None for each in same_seeds])
        absolute.set_title(f"{size}, {tokenizer}: held-out books")
        compared.set_title(f"compared with {LABELS[reference[0]]} of the same seeds (below 0 is better)")
        for axes in (absolute, compared):
            axes.grid(alpha=0.3)
        part.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the rows of several seeds, with the means of what is drawn."""
    return rows[0] | {
        "bits_per_byte": mean(row["bits_per_byte"] for row in rows),
        "bin_bits": [
            None if None in bits else mean(bits)
            for bits in zip(*(row["bin_bits"] for row in rows), strict=True)
        ],
    }


def _pack(path: Path, runs: list[Finished]) -> None:
    """The small files of all runs."""
    with tarfile.open(path, "w:gz") as archive:
        for each in runs:
            names = [*KEPT, *(f"{each.run.mode}/{name}" for name in ("rows.json", "routing.png"))]
            for name in names:
                if (each.folder / name).exists():
                    archive.add(each.folder / name, f"{each.run.name}/{name}")


def _packed_weights(out: Path, runs: Sequence[GridRun]) -> bytes:
    """A tar of the weights of some runs in bfloat16, as `save_pretrained` writes them; empty for none."""
    if not runs:
        return b""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for run in runs:
            saved = out / run.name / run.mode / "model"
            if not saved.exists():
                raise UserError(f"{out} holds no weights of {run.name}")
            model = RoutedTransformerXL.from_pretrained(saved).to(torch.bfloat16)
            half = saved.with_name("model-bf16")
            model.save_pretrained(half)
            archive.add(half, run.name)
    if packed.tell() > MOST_PARTS * PART_BYTES:
        raise UserError(
            f"--weights: expected at most {MOST_PARTS * PART_BYTES:,} bytes together, got {packed.tell():,}"
        )
    return packed.getvalue()
