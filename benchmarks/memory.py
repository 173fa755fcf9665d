"""How fast the memory store is on disk: one table, beside a raw file, a numpy memmap and zarr, in one run.

    python benchmarks/memory.py                     about two minutes; 5 GB of disk below --folder
    python benchmarks/memory.py --peer FOLDER       with KNNMemory, which is in requirements-peers-memory.txt
    python benchmarks/memory.py --tiny              to see that it runs: its times mean nothing

Where there is a GPU, it measures too what a GPU gets from there, and takes ten minutes and 60 GB.

Everything is read warm, from the page cache. No time is printed of a result that was not checked first; where
a check is red, the cell says so, and the exit code is 1. It writes memory.csv and memory.png to --out.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import torch
import zarr
from knn_memory import NAME as KNN
from knn_memory import knn_memory
from measurement import Check, Measurement, equal, measure
from memory_large import build_large
from memory_tiers import DRAWS, gather_tiers, route_large
from memory_work import CPU, OURS, RAW, TINY, ZARR, Sizes, Work
from numpy.typing import NDArray
from timing import on_one_stream
from torch import Tensor

from xlroute.memory import MemoryStore

mpl.use("Agg")  # before pyplot: it must not look for a screen
import matplotlib.pyplot as plt

T = TypeVar("T")

COLUMNS = ("work", OURS, "20% to 80%", RAW, ZARR, KNN, "x raw", "reach")
NOTES = """\
Milliseconds, medians. raw: as many writes, and for durable as many fsyncs; one numpy memmap; for rows on a
GPU or in the host's memory, PyTorch's index_select; for routing, torch.topk and a memmap. KNNMemory: that
of memorizing-transformers-pytorch, which adds the rows to its index as well, and waits for its memmap."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder of CSV and picture"
    )
    parser.add_argument("--folder", type=Path, help="where the stores go for as long as it runs")
    parser.add_argument("--peer", type=Path, help="where KNNMemory was installed")
    parser.add_argument("--tiny", action="store_true", help="sizes that take a second")
    options = parser.parse_args(arguments)
    sizes = TINY if options.tiny else Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        gathers = list(gather(sizes, folder))
        works = [*append(sizes, folder, options.peer), gathers[-1][1], open_large(sizes, folder)]
        if device.type == "cuda" or options.tiny:
            with on_one_stream(device):
                works += [*gather_tiers(sizes, folder, device), route_large(sizes, folder, device)]
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores{gpu}",
        "PyTorch": torch.__version__,
        "zarr": zarr.__version__,
        "Python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }
    print(table(works, facts))
    write_csv(options.out / "memory.csv", works, gathers, facts)
    draw(options.out / "memory.png", gathers, sizes)
    wrong = [
        f"{work.name}, {each.subject}: {each.failure}"
        for work in [*works, *(work for _, work in gathers)]
        for each in work.measurements
        if each.failure is not None
    ]
    if wrong:
        print("\n" + "\n".join(wrong))
    return 1 if wrong else 0


def append(sizes: Sizes, folder: Path, peer: Path | None) -> Iterator[Work]:
    """A segment appended and committed: beside raw files with as many fsyncs, and zarr's own append."""
    states = torch.randn(1, 1, sizes.segment, sizes.dim).to(torch.float16)
    for durable in (False, True):
        kind = "durable" if durable else "not durable"
        name = f"append {sizes.segment:,} x {sizes.dim} fp16 and commit, {kind}"
        work = Work(name, "at most 1.25 x raw")
        store = MemoryStore.create(
            folder / f"append-{kind}",
            layers=1,
            streams=1,
            dim=sizes.dim,
            dtype=torch.float16,
            keep_commits=2,
            device_bytes=64 * states.nbytes,
        )
        with store:
            commit, check = partial(_commit, store, states, durable), partial(_check_store, store, states)
            work.measurements.append(_measured(OURS, commit, check))
        raw = RawLog(folder / f"raw-{kind}", durable)
        work.measurements.append(
            _measured(RAW, partial(raw.append, states[0, 0]), partial(_check_raw, raw, states[0, 0]))
        )
        if durable and peer is not None:
            work.measurements.append(_knn_memory(peer, sizes, folder))
        if not durable:  # zarr never calls fsync
            array = zarr.create_array(
                folder / "zarr-append",
                shape=(0, sizes.dim),
                chunks=(sizes.segment, sizes.dim),
                dtype="float16",
                compressors=None,
            )
            work.measurements.append(
                _measured(
                    ZARR,
                    partial(array.append, states.numpy()[0, 0]),
                    partial(_check_zarr, array, states[0, 0]),
                )
            )
        yield work


def _commit(store: MemoryStore, states: Tensor, durable: bool) -> None:
    store.append(states)
    store.commit(durable=durable)


def _knn_memory(peer: Path, sizes: Sizes, folder: Path) -> Measurement:
    """A segment added to the memory of another library, as keys and as values."""
    memory = knn_memory(peer, sizes.dim, 64 * sizes.segment, folder / "knn")
    rows = torch.randn(1, sizes.segment, 2, sizes.dim)

    def verify(_: object) -> list[Check]:
        return [equal("rows", torch.from_numpy(memory.db[0, : sizes.segment]), rows[0], "what was added")]

    return _measured(KNN, partial(memory.add, rows), verify)


def _check_store(store: MemoryStore, states: Tensor, _: object) -> list[Check]:
    held, count = int(store.lengths[0]), states.shape[2]
    assert store.path is not None
    with MemoryStore.open(store.path) as reader:
        last = reader.gather(0, torch.arange(held - count, held)[None])[0]
    return [equal("rows", last, states[0, 0], "what was appended")]


def _check_raw(raw: RawLog, rows: Tensor, _: object) -> list[Check]:
    return [equal("rows", raw.last(rows), rows, "what was appended")]


def _check_zarr(array: zarr.Array[Any], rows: Tensor, _: object) -> list[Check]:
    last = torch.from_numpy(np.asarray(array[-rows.shape[0] :]))
    return [equal("rows", last, rows, "what was appended")]


class RawLog:
    """Two files that grow, and a small third that is replaced: what a commit writes, with nothing around it.

    Args:
        folder: A new folder for them.
        durable: Whether to call fsync as often as a durable commit does.
    """

    def __init__(self, folder: Path, durable: bool) -> None:
        folder.mkdir()
        self._folder = folder
        self._durable = durable
        self._files = [
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND) for name in ("rows", "sums")
        ]

    def append(self, rows: Tensor) -> None:
        """Append rows and four bytes for each, and replace the record."""
        parts = (rows.numpy().tobytes(), bytes(4 * rows.shape[0]))
        for file, part in zip(self._files, parts, strict=True):
            os.write(file, part)
            if self._durable:
                os.fsync(file)
        temporary = self._folder / "record.tmp"
        with temporary.open("wb") as record:
            record.write(bytes(500))
            if self._durable:
                record.flush()
                os.fsync(record.fileno())
        os.replace(temporary, self._folder / "record")
        if self._durable:
            for _ in range(3):  # of the rows, of the checksums and of the records
                file = os.open(self._folder, os.O_RDONLY)
                os.fsync(file)
                os.close(file)

    def last(self, like: Tensor) -> Tensor:
        """The rows that were appended last."""
        rows = np.fromfile(self._folder / "rows", like.numpy().dtype)
        return torch.from_numpy(rows[-like.numel() :].reshape(like.shape))


def gather(sizes: Sizes, folder: Path) -> Iterator[tuple[int, Work]]:
    """Random rows of stores of several sizes: beside one memmap of all rows, and zarr's own indexing."""
    rng = np.random.default_rng(0)
    for m in sizes.gather:
        rows = rng.standard_normal((m, sizes.dim), np.float32).astype(np.float16)
        # Other rows in every call: the same ones would stay in the caches of the processor.
        draws = [rng.integers(m, size=sizes.chosen) for _ in range(DRAWS)]
        expected = torch.from_numpy(rows[draws[0]])
        path = folder / f"gather-{m}"
        with MemoryStore.create(path, layers=1, streams=1, dim=sizes.dim, dtype=torch.float16) as store:
            for start in range(0, m, 1 << 16):
                store.append(torch.from_numpy(rows[start : start + (1 << 16)])[None, None])
            store.commit()
        rows.tofile(folder / f"raw-{m}")
        raw: NDArray[np.float16] = np.memmap(folder / f"raw-{m}", np.float16, "r", shape=rows.shape)
        array = zarr.open_array(path / "layer-0.stream-0.rows", mode="r")
        work = Work(f"gather {sizes.chosen:,} random rows of {m:,}, warm", "at most 3 x raw")
        verify = partial(_check_rows, expected)
        with MemoryStore.open(path) as store:
            ours = partial(_gather_store, store, cycle(torch.from_numpy(draw)[None] for draw in draws))
            work.measurements.append(_measured(OURS, ours, verify))
        work.measurements.append(_measured(RAW, partial(_gather_memmap, raw, cycle(draws)), verify))
        work.measurements.append(_measured(ZARR, partial(_gather_zarr, array, cycle(draws)), verify))
        yield m, work


def _gather_store(store: MemoryStore, draws: Iterator[Tensor]) -> Tensor:
    return store.gather(0, next(draws))[0]


def _gather_memmap(rows: NDArray[np.float16], draws: Iterator[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(rows[next(draws)])


def _gather_zarr(array: zarr.Array[Any], draws: Iterator[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.asarray(array.oindex[next(draws)]))


def open_large(sizes: Sizes, folder: Path) -> Work:
    """A very large store, opened and asked for its first rows."""
    path = build_large(folder / "large", sizes.large, sizes.large_dim)
    index = torch.randint(sizes.large, (1, sizes.chosen), generator=torch.Generator().manual_seed(0))

    def call() -> Tensor:
        with MemoryStore.open(path) as store:
            return store.gather(0, index)[0]

    zeros = torch.zeros(sizes.chosen, sizes.large_dim, dtype=torch.float16)
    work = Work(f"open {sizes.large:,} rows of {sizes.large_dim}, and a first gather", "100 ms")
    work.measurements.append(_measured(OURS, call, partial(_check_rows, zeros)))
    return work


def _check_rows(expected: Tensor, out: Tensor) -> list[Check]:
    return [equal("rows", out, expected, "what was written")]


def _measured(subject: str, call: Callable[[], T], verify: Callable[[T], list[Check]]) -> Measurement:
    return measure(subject, lambda: call, verify, CPU)


def table(works: list[Work], facts: dict[str, str]) -> str:
    """The results as text, one line for each work."""
    lines = [COLUMNS, *map(_line, works)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells))
    machine = "; ".join(f"{name} {fact}" for name, fact in facts.items())
    notes = [f"{work.name}: {note}" for work in works for note in work.notes]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", *notes, machine, NOTES])


def _line(work: Work) -> tuple[str, ...]:
    medians: dict[str, float] = {}
    cells = dict.fromkeys((OURS, RAW, ZARR, KNN), "-")
    spread = "-"
    for each in work.measurements:
        cells[each.subject] = "failed"
        if each.failure is None and each.timing is not None:
            medians[each.subject] = each.timing.median
            cells[each.subject] = f"{each.timing.median:.3g}"
            if each.subject == OURS:
                spread = f"{each.timing.low:.3g} to {each.timing.high:.3g}"
    ratio = f"{medians[OURS] / medians[RAW]:.2f}" if {OURS, RAW} <= medians.keys() else "-"
    return work.name, cells[OURS], spread, cells[RAW], cells[ZARR], cells[KNN], ratio, work.reach


def write_csv(path: Path, works: list[Work], gathers: list[tuple[int, Work]], facts: dict[str, str]) -> None:
    """Everything that was measured, behind lines that say on what."""
    every = {work.name: work for work in [*works, *(work for _, work in gathers)]}
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {fact}\n" for name, fact in facts.items())
        writer = csv.writer(file)
        writer.writerow(("work", "subject", "median_ms", "low_ms", "high_ms", "method", "checks", "failure"))
        for work in every.values():
            for each in work.measurements:
                timing = each.timing
                numbers = [""] * 4
                if timing is not None:
                    numbers = [f"{number:.6g}" for number in (timing.median, timing.low, timing.high)]
                    numbers.append(timing.method)
                checks = "; ".join(map(str, each.checks))
                writer.writerow((work.name, each.subject, *numbers, checks, each.failure or ""))


def draw(path: Path, gathers: list[tuple[int, Work]], sizes: Sizes) -> None:
    """Time of a gather over the size of the store, both in powers."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for subject, colour in ((OURS, "#d62728"), (RAW, "black"), (ZARR, "#1f77b4")):
        timed = [
            (m, each.timing)
            for m, work in gathers
            for each in work.measurements
            if each.subject == subject and each.timing is not None
        ]
        if timed:
            axes.plot(
                [m for m, _ in timed],
                [timing.median for _, timing in timed],
                "o-",
                color=colour,
                label=subject,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(
        title=f"Gather of {sizes.chosen:,} random rows of width {sizes.dim} in fp16, warm",
        xlabel="rows of the store",
        ylabel="milliseconds",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
