"""The command line: python -m xlroute.memory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xlroute.memory.compact import CompactReport
from xlroute.memory.damage import Damage, Ranges
from xlroute.memory.errors import CorruptionError, MemoryStoreError
from xlroute.memory.export import export_store
from xlroute.memory.info import MemoryInfo
from xlroute.memory.place import StorePath, store_path
from xlroute.memory.repair import RepairReport
from xlroute.memory.shards import DEFAULT_LEVEL, LEVELS
from xlroute.memory.store import Compression, MemoryStore
from xlroute.memory.verify import Progress, VerifyReport

FINE, DAMAGED, REFUSED = 0, 1, 2
_RANGES_SHOWN = 4
_FOLDER = "folder of the store"
_PLACES = {"repair": _FOLDER, "unlock": "url of the store: s3://..."}
_EPILOG = "Exit status: 0 if all is fine, 1 if damage was found, 2 if the command could not be carried out."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    Args:
        arguments: The command line without the program's name; None for that of the process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status, document, text = options.run(options)
    except (MemoryStoreError, OSError, ValueError) as error:
        sys.stderr.write(f"{parser.prog} {options.command}: error: {error}\n")
        return DAMAGED if isinstance(error, CorruptionError) else REFUSED
    sys.stdout.write(f"{json.dumps(document, indent=1)}\n" if options.json else text)
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xlroute.memory", description="Looks into a memory store on disk.", epilog=_EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, text in (
        ("info", _info, "what a store holds, what it takes up, and its commits"),
        ("verify", _verify, "read everything that a commit refers to and report all damage; change nothing"),
        ("repair", _repair, "keep what is whole of a damaged store, and say what was lost"),
        ("compact", _compact, "rewrite full chunk files into shards: fewer files, smaller ones with --zstd"),
        ("unlock", _unlock, "take a store at s3:// from its writer, who can commit no more"),
        ("export", _export, "write the rows and their positions to a file"),
        ("plot", _plot, "draw which rows were read, are held and were routed, as a PNG"),
    ):
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EPILOG
        )
        command.add_argument("path", help=_PLACES.get(name, f"{_FOLDER}, or its url: s3://..."))
        if name == "export":
            command.add_argument("target", type=Path, help="new file: .npz or .safetensors")
        elif name == "plot":
            command.add_argument("target", type=Path, help="new file: .png")
        elif name == "compact":
            text = (
                f"compress with zstd, at a level from {LEVELS[0]} to {LEVELS[-1]} (default: {DEFAULT_LEVEL})"
            )
            command.add_argument(
                "--zstd", nargs="?", type=int, const=DEFAULT_LEVEL, metavar="LEVEL", help=text
            )
        if name not in ("repair", "compact", "unlock"):
            which = command.add_mutually_exclusive_group()
            which.add_argument("--commit", metavar="ID", help="another commit than the last")
            if name == "verify":
                which.add_argument("--all", action="store_true", help="all commits")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    return parser


# What a command has to say: its exit status, as JSON and as text.
_Outcome = tuple[int, Any, str]


def _info(options: argparse.Namespace) -> _Outcome:
    with MemoryStore.open(options.path, commit=options.commit) as store:
        info = store.info()
    return FINE, _plain(info), _info_text(info, datetime.now(UTC))


def _verify(options: argparse.Namespace) -> _Outcome:
    with _progress("verify") as progress:
        report = MemoryStore.verify(
            options.path, commit=options.commit, all_commits=options.all, progress=progress
        )
    document = {"ok": report.ok, **_plain(report)}
    return FINE if report.ok else DAMAGED, document, _verify_text(report)


def _repair(options: argparse.Namespace) -> _Outcome:
    with _progress("repair") as progress:
        report = MemoryStore.repair(options.path, progress=progress)
    document = {"ok": report.ok, **_plain(report)}
    return FINE if report.ok else DAMAGED, document, _repair_text(report)


def _compact(options: argparse.Namespace) -> _Outcome:
    compression: Compression | None = None if options.zstd is None else "zstd"
    with MemoryStore.open(options.path, mode="r+") as store, _progress("compact") as progress:
        report = store.compact(compression=compression, level=options.zstd, progress=progress)
    return FINE, _plain(report), _compact_text(report)


def _unlock(options: argparse.Namespace) -> _Outcome:
    writer = MemoryStore.unlock(options.path)
    text = f"was held by {writer}" if writer else "was held by nobody"
    return FINE, {"writer": writer}, f"{options.path}: {text}\n"


def _export(options: argparse.Namespace) -> _Outcome:
    path = store_path(options.path)
    with _progress("export") as progress:
        commit = export_store(path, options.target, commit=options.commit, progress=progress)
    size = options.target.stat().st_size
    document = {"commit": commit, "target": str(options.target), "bytes": size}
    return FINE, document, f"{options.target}: commit {commit}, {_bytes(size)}\n"


def _plot(options: argparse.Namespace) -> _Outcome:
    # Imported here: it takes longer than most commands.
    from xlroute.memory.plot import plot_rows

    with MemoryStore.open(options.path, commit=options.commit) as store:
        plot_rows(store, options.target)
    return FINE, {"target": str(options.target)}, f"{options.target}\n"


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """Shows a bar on a terminal, and nothing elsewhere."""
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _plain(value: Any) -> Any:
    """The value in what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, StorePath):
        return str(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _info_text(info: MemoryInfo, now: datetime) -> str:
    assert info.disk is not None
    disk = info.disk
    dtype = str(info.dtype).removeprefix("torch.")
    capacity = "none"
    if info.capacity is not None:
        capacity = f"{info.capacity:,} rows a stream, {info.capacity_bytes:,} bytes of rows"
    eviction = {"oldest": "oldest first", "lowest_score": "lowest routing score first"}.get(info.eviction)
    facts = [
        ("path", str(info.path)),
        ("format", str(disk.format)),
        ("shape", f"layers {info.layers}, streams {info.streams}, dim {info.dim}, {dtype}"),
        ("capacity", capacity),
        ("eviction", eviction or f"positions that are multiples of {info.keep_every} last"),
        ("fingerprint", info.fingerprint or "none"),
        ("rows held", f"{sum(info.rows):,} in each layer, {info.rows_bytes:,} bytes"),
        ("routes", "not recorded" if info.routed is None else f"{sum(info.routed):,} in all layers"),
        ("on disk", f"{_bytes(disk.allocated_bytes)} allocated, {_bytes(disk.apparent_bytes)} apparent"),
        ("chunk files", f"{disk.chunk_files:,}, of up to {disk.chunk_rows:,} rows"),
    ]
    if disk.shards:
        text = f"{disk.shards:,}, with {disk.shard_rows:,} rows of all layers, {_bytes(disk.shard_bytes)}"
        facts.append(("shards", text))
    streams = [
        (
            str(stream),
            f"{held:,}",
            f"{info.appended[stream]:,}",
            f"{info.evicted[stream]:,}",
            _span(start, stop) + (", with gaps" if stop - start > held else ""),
        )
        for stream, (held, (start, stop)) in enumerate(zip(info.rows, info.positions, strict=True))
    ]
    commits = [
        (
            commit.id,
            f"{commit.time:%Y-%m-%d %H:%M:%S}",
            _age(now - commit.time),
            f"{sum(commit.rows):,}",
            "yes" if commit.durable else "no",
            "yes" if commit.pinned else "no",
            commit.fingerprint or "none",
        )
        for commit in info.commits
    ]
    return "\n".join(
        [
            *(f"{name:<13}{text}" for name, text in facts),
            "",
            *_table(
                ("stream", "rows held", "appended", "evicted", "positions held"),
                streams,
                right={0, 1, 2, 3, 4},
            ),
            "",
            *_table(
                ("commit", "made (UTC)", "age", "rows", "durable", "pinned", "fingerprint"),
                commits,
                right={2, 3},
            ),
            "",
        ]
    )


def _verify_text(report: VerifyReport) -> str:
    lines = [f"{report.path}: {report.rows:,} rows in all layers, of {_count(len(report.commits), 'commit')}"]
    lines += [f"  {name}" for name in report.commits]
    lines += _damage_lines(report.path, report.damage) or ["no damage"]
    if report.scores:
        lines.append("stored scores damaged, which are computed anew:")
        lines += _damage_lines(report.path, report.scores)[1:]
    if report.routes:
        lines.append("counts of what was routed damaged, which are left out:")
        lines += _damage_lines(report.path, report.routes)[1:]
    if report.leftovers:
        work = f", or the work of {report.writer}" if report.writer else ""
        lines.append(f"left behind, needed by no commit{work}:")
        lines += [f"  {path}" for path in report.leftovers]
    return "\n".join([*lines, ""])


def _repair_text(report: RepairReport) -> str:
    if report.commit is None:
        lines = [f"{report.path}: commit {report.base} stands as it was"]
    else:
        lines = [f"{report.path}: commit {report.commit} holds what was whole of commit {report.base}"]
    lines += _damage_lines(report.path, report.damage)
    if report.losses:
        rows = [
            (
                str(loss.stream),
                _span(*loss.held),
                _spans(loss.damaged),
                _span(*loss.kept),
                _spans(loss.lost),
                "no" if loss.kept[1] == loss.held[1] else f"from position {loss.kept[1]:,}",
            )
            for loss in report.losses
        ]
        header = ("stream", "positions held", "damaged", "kept", "lost", "to be read again")
        lines += ["lost:", *(f"  {line}" for line in _table(header, rows, right={0}))]
    for title, paths in (
        ("written anew", report.restored),
        ("set aside as damaged", report.set_aside),
        ("left behind, removed", report.removed),
        ("damaged scores and counts of what was routed, removed", report.derived),
    ):
        if paths:
            lines += [f"{title}:", *(f"  {path}" for path in paths)]
    return "\n".join([*lines, ""])


def _compact_text(report: CompactReport) -> str:
    if report.commit is None:
        return f"{report.path}: nothing to rewrite\n"
    lines = [
        f"{report.path}: commit {report.commit} has {report.rows:,} rows in {_count(report.shards, 'shard')}",
        f"before: {_count(report.files_before, 'file')}, {_bytes(report.bytes_before)}",
        f"after:  {_count(report.files_after, 'file')}, {_bytes(report.bytes_after)}",
    ]
    if report.files_kept:
        kept = f"{_count(report.files_kept, 'file')}, {_bytes(report.bytes_kept)}"
        lines.append(f"kept until earlier commits are dropped: {kept}")
    return "\n".join([*lines, ""])


def _damage_lines(root: StorePath, damage: Sequence[Damage]) -> list[str]:
    lines = [f"{_count(len(damage), 'file')} damaged:"] if damage else []
    for each in damage:
        rows = f": rows {_spans(each.rows)}" if each.rows else ""
        lines.append(f"  {str(each.path).removeprefix(f'{root}/')}{rows}: {each.problem}")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Lines of a table; the columns in `right` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


def _span(start: int, stop: int) -> str:
    """Numbers from `start` to before `stop`, as people write them."""
    if start == stop:
        return "none"
    return f"{start:,}" if stop == start + 1 else f"{start:,} to {stop - 1:,}"


def _spans(ranges: Ranges) -> str:
    """Ranges of numbers; of many only the first."""
    count = sum(stop - start for start, stop in ranges)
    shown = ", ".join(_span(*span) for span in ranges[:_RANGES_SHOWN]) or "none"
    return f"{shown}, ... ({count:,} rows)" if len(ranges) > _RANGES_SHOWN else shown


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _bytes(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count:,} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"


def _age(age: timedelta) -> str:
    seconds = max(0, int(age.total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
