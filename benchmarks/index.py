"""How many rows an index finds, and how fast: MemoryIndex by kind beside exact search, on one CPU.

    python benchmarks/index.py                    1,000,000 clustered rows of width 128; some minutes
    python benchmarks/index.py --rows FILE.npy    hidden states of a model, [m, d]
    python benchmarks/index.py --peer FOLDER      with KNNMemory, which is in requirements-peers-memory.txt
    python benchmarks/index.py --tiny             to see that it runs: its numbers mean nothing

Queries come one at a time. They are rows like the others, taken out before, so that none finds itself. The
table and index.csv in --out say what share of the k best rows each kind finds, over all queries, and how many
queries it answers a second, in --threads threads; indexes are built in all that there are. No speed is
printed of a result that was not checked against float64 first; where a check is red, the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import itertools
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from knn_memory import NAME as KNN
from knn_memory import knn_memory
from measurement import Check, Measurement, close, equal, measure
from torch import Tensor

from xlroute.memory import IndexKind, MemoryIndex, MemoryStore

Found = tuple[Tensor, Tensor]  # scores and indices, [k]
Search = Callable[[Tensor], Found]

CPU = torch.device("cpu")
PLAIN = "plain PyTorch"
EXACT = (PLAIN, "exact", "flat")
KINDS: tuple[IndexKind, ...] = ("exact", "flat", "hnsw", "ivf", "ivfpq")
COLUMNS = (
    "search",
    "recall",
    "queries a second",
    "ms",
    "20% to 80%",
    "x exact",
    "x fastest exact",
    "built in s",
    "reach",
)
REACHES = {"ivf": "0.95 at 10 x exact"}
NOTES = """\
x exact: how many times as fast as MemoryIndex with kind="exact".
x fastest exact: as the fastest of those that find the k best rows for sure: plain PyTorch, exact and flat."""
KNN_NOTE = """\
KNNMemory: that of memorizing-transformers-pytorch, a graph of faiss (HNSW); it gives the keys that it finds,
and their values, out of a memmap."""
CLUSTERS = 2000
# Rows that are copied to float64 at a time.
ROWS_AT_ONCE = 1 << 17
# Of which all scores are in memory at once, in float64.
QUERIES_AT_ONCE = 20


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    rows: Path | None
    count: int
    dim: int
    queries: int
    k: int
    kinds: tuple[IndexKind, ...]
    nprobe: int | None
    threads: int
    peer: Path | None


@dataclass(frozen=True)
class Result:
    """What was measured of one search.

    Attributes:
        name: the kind of index, or what else searched.
        recall: the share of the k best rows that it found.
        built: seconds until it could be asked.
        measurement: of one query.
    """

    name: str
    recall: float
    built: float
    measurement: Measurement

    @property
    def milliseconds(self) -> float | None:
        """Of one query, the median."""
        timing = self.measurement.timing
        return None if timing is None else timing.median


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    set_threads(options.threads)
    try:
        rows, queries = inputs(options)
        results = run(rows, queries, options)
    finally:
        set_threads(threads)
    facts = describe(rows, queries, options)
    print(table(results, facts))
    write_csv(options.out / "index.csv", results, facts)
    wrong = [f"{each.name}: {each.measurement.failure}" for each in results if each.measurement.failure]
    if wrong:
        print("\n" + "\n".join(wrong))
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> Options:
    """The options, or an exit with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the CSV")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE.npy", help="rows [m, d] in place of synthetic ones"
    )
    parser.add_argument("--tiny", action="store_true", help="6,000 rows of width 32, k = 64")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=("exact", "flat", "ivf", "ivfpq"), help="kinds of index"
    )
    parser.add_argument(
        "--nprobe", type=int, help="lists that ivf and ivfpq look into; default: the library's"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of PyTorch and of faiss, for queries; default: 1"
    )
    parser.add_argument("--peer", type=Path, help="where KNNMemory was installed")
    given = parser.parse_args(arguments)
    if given.peer is not None and not given.peer.is_dir():
        parser.error(f"--peer: expected a folder, got {given.peer}")
    if given.rows is not None and not given.rows.is_file():
        parser.error(f"--rows: expected a file, got {given.rows}")
    for name in ("threads", "nprobe"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(given, name)}")
    count, dim, queries, k = (6000, 32, 20, 64) if given.tiny else (1_000_000, 128, 200, 1024)
    kinds = tuple(given.kinds)
    return Options(
        given.out, given.rows, count, dim, queries, k, kinds, given.nprobe, given.threads, given.peer
    )


def set_threads(count: int) -> None:
    """Tell PyTorch and, where it is installed, faiss how many threads to use."""
    torch.set_num_threads(count)
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(count)


def inputs(options: Options) -> tuple[Tensor, Tensor]:
    """Rows [m, d] and queries [q, d] of the same kind, none in both."""
    generator = torch.Generator().manual_seed(0)
    if options.rows is None:
        rows = clustered(options.count + options.queries, options.dim, generator)
    else:
        rows = torch.from_numpy(np.load(options.rows)).float()
    if rows.ndim != 2 or rows.shape[0] <= options.queries + options.k:
        sys.exit(f"--rows: expected [m, d] with m > {options.queries + options.k}, got {list(rows.shape)}")
    order = torch.randperm(rows.shape[0], generator=generator)
    taken = torch.zeros(rows.shape[0], dtype=torch.bool)
    taken[order[: options.queries]] = True
    return rows[~taken], rows[taken]


def clustered(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows around centres: both normal, with a variance of 1 each."""
    centres = torch.randn(CLUSTERS, dim, generator=generator)
    rows = torch.randn(count, dim, generator=generator)
    for start in range(0, count, ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        part += centres[torch.randint(CLUSTERS, (part.shape[0],), generator=generator)]
    return rows


def run(rows: Tensor, queries: Tensor, options: Options) -> list[Result]:
    """Measure one kind after the other."""
    store = MemoryStore.create(layers=1, streams=1, dim=rows.shape[1])
    store.append(rows[None, None])
    truth = exact_scores(rows, queries[:1])[0]
    results = [timed(PLAIN, lambda q: plain_search(rows, q, options.k), queries, truth, options.k, 1.0, 0.0)]
    for kind in options.kinds:
        print(f"building {kind}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        lists = options.nprobe if kind in ("ivf", "ivfpq") else None
        index = MemoryIndex(store, kind, nprobe=lists)
        set_threads(os.cpu_count() or 1)
        index.update()
        built = time.perf_counter() - start
        recall = index.recall(0, queries, options.k)
        set_threads(options.threads)
        results.append(timed(kind, searcher(index, options.k), queries, truth, options.k, recall, built))
    if options.peer is not None:
        print(f"building {KNN}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results.append(run_peer(options.peer, Path(folder), rows, queries, truth, options))
    return results


def run_peer(
    peer: Path, folder: Path, rows: Tensor, queries: Tensor, truth: Tensor, options: Options
) -> Result:
    """Measure KNNMemory; where it breaks, the result says how."""
    try:
        set_threads(os.cpu_count() or 1)
        start = time.perf_counter()
        memory = knn_memory(peer, rows.shape[1], rows.shape[0], folder / "knn")
        for first in range(0, rows.shape[0], ROWS_AT_ONCE):
            keys = rows[first : first + ROWS_AT_ONCE]
            # Each value says which row it belongs to; float32 can count as far as 2^24.
            values = torch.zeros_like(keys)
            values[:, 0] = torch.arange(first, first + keys.shape[0])
            memory.add(torch.stack((keys, values), dim=1)[None])
        built = time.perf_counter() - start
        search = peer_searcher(memory, options.k)
        recall = share_found(search, rows, queries, options.k)
        set_threads(options.threads)
        return timed(KNN, search, queries, truth, options.k, recall, built)
    except Exception as error:  # the others have been measured
        return Result(KNN, math.nan, math.nan, Measurement.broken(KNN, error))


def peer_searcher(memory: Any, k: int) -> Search:
    """Asks KNNMemory for one query [d]; scores and indices are those of the keys and values it gives."""

    def search(query: Tensor) -> Found:
        found, exist = (each[0, 0] for each in memory.search(query[None, None], k))
        scores = torch.mv(found[:, 0], query).masked_fill(~exist, -math.inf)
        return scores, found[:, 1, 0].long().masked_fill(~exist, -1)

    return search


def share_found(search: Search, rows: Tensor, queries: Tensor, k: int) -> float:
    """The recall of a search as `MemoryIndex.recall` has it, by scores in float64."""
    hits = 0
    for some in queries.split(QUERIES_AT_ONCE):  # type: ignore[no-untyped-call]
        for query, scores in zip(some, exact_scores(rows, some), strict=True):
            _, found = search(query)
            hits += int((scores[found[found >= 0]] >= scores.topk(k).values[-1]).sum())
    return hits / (len(queries) * k)


def searcher(index: MemoryIndex, k: int) -> Search:
    """Asks an index for one query [d]."""

    def search(query: Tensor) -> Found:
        scores, indices = index.search(0, query[None], k)
        return scores[0, 0], indices[0, 0]

    return search


def plain_search(rows: Tensor, query: Tensor, k: int) -> Found:
    """The exact result, by what PyTorch has for it."""
    scores, indices = torch.mv(rows, query).topk(k)
    return scores, indices


def exact_scores(rows: Tensor, queries: Tensor) -> Tensor:
    """All scores in float64, [q, m]."""
    parts = [queries.double() @ part.double().T for part in rows.split(ROWS_AT_ONCE)]  # type: ignore[no-untyped-call]
    return torch.cat(parts, -1)


def timed(
    name: str, search: Search, queries: Tensor, truth: Tensor, k: int, recall: float, built: float
) -> Result:
    """Check what a search finds for the first query, then time it, another query every time."""

    def build() -> Callable[[], Found]:
        following = itertools.cycle(queries)
        return lambda: search(next(following))

    def verify(found: Found) -> list[Check]:
        scores, indices = found
        exist = indices >= 0
        checks = [
            close("scores", scores[exist], truth[indices[exist]]),
            equal(
                "rows found twice",
                torch.unique(indices[exist]),
                indices[exist].sort().values,
                "none",
            ),
        ]
        if name in EXACT:
            checks.append(close("the k best", scores, truth.topk(k).values))
        return checks

    return Result(name, recall, built, measure(name, build, verify, CPU))


def speedups(result: Result, results: list[Result]) -> tuple[str, str]:
    """How many times as fast a search is as kind "exact", and as the fastest that is exact for sure."""
    times = {each.name: each.milliseconds for each in results if each.milliseconds is not None}
    certain = [times[name] for name in EXACT if name in times]

    def ratio(other: float | None) -> str:
        return f"{other / times[result.name]:.3g}" if result.name in times and other is not None else "-"

    return ratio(times.get("exact")), ratio(min(certain, default=None))


def describe(rows: Tensor, queries: Tensor, options: Options) -> dict[str, str]:
    """What a reader must know, by name."""
    source = "synthetic, clustered" if options.rows is None else str(options.rows)
    return {
        "rows": f"{rows.shape[0]:,} x {rows.shape[1]} float32, {source}",
        "queries": f"{queries.shape[0]}, one at a time",
        "k": f"{options.k:,}",
        "nprobe": "default" if options.nprobe is None else str(options.nprobe),
        "threads": str(options.threads),
        "device": f"CPU {platform.machine()}",
        "PyTorch": torch.__version__,
        "faiss": version_of_faiss(),
        **({} if options.peer is None else {KNN: version_of_peer(options.peer)}),
        "Python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def version_of_faiss() -> str:
    """As the module says, whichever package it came with."""
    try:
        import faiss
    except ImportError:
        return "not installed"
    return str(faiss.__version__)


def version_of_peer(peer: Path) -> str:
    """Of the package that KNNMemory is in."""
    found = importlib.metadata.distributions(name="memorizing-transformers-pytorch", path=[str(peer)])
    return next((each.version for each in found), "of unknown version")


def table(results: list[Result], facts: dict[str, str]) -> str:
    """The results as text, one line for each search."""
    lines = [COLUMNS, *(_line(each, results) for each in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    on = "; ".join(f"{name} {fact}" for name, fact in facts.items())
    notes = [NOTES, *([KNN_NOTE] if KNN in facts else [])]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:], "", on, *notes])


def _line(result: Result, results: list[Result]) -> tuple[str, ...]:
    timing, reach = result.measurement.timing, REACHES.get(result.name, "")
    if timing is None:
        return (result.name, "failed", *["-"] * 6, reach)
    return (
        result.name,
        f"{result.recall:.4f}",
        f"{1e3 / timing.median:,.1f}",
        f"{timing.median:.3g}",
        f"{timing.low:.3g} to {timing.high:.3g}",
        *speedups(result, results),
        f"{result.built:.1f}",
        reach,
    )


def write_csv(path: Path, results: list[Result], facts: dict[str, str]) -> None:
    """Everything that was measured, behind lines that say on what; a cell without a number is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {fact}\n" for name, fact in facts.items())
        lines = [_csv_row(each, results) for each in results]
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _csv_row(result: Result, results: list[Result]) -> dict[str, str]:
    timing = result.measurement.timing
    row = {"search": result.name, "recall": "" if math.isnan(result.recall) else f"{result.recall:.6f}"}
    for quantile in ("median", "low", "high"):
        row[f"{quantile}_ms"] = "" if timing is None else f"{getattr(timing, quantile):.6g}"
    of_exact, of_fastest = ("" if each == "-" else each for each in speedups(result, results))
    return row | {
        "x_exact": of_exact,
        "x_fastest_exact": of_fastest,
        "built_s": "" if math.isnan(result.built) else f"{result.built:.3f}",
        "method": "" if timing is None else timing.method,
        "checks": "; ".join(map(str, result.measurement.checks)),
        "failure": result.measurement.failure or "",
    }


if __name__ == "__main__":
    sys.exit(main())
