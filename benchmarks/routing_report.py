"""The tables and the CSV of benchmarks/routing.py and layers.py, and the picture of the first."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from measurement import Measurement

mpl.use("Agg")  # before pyplot: it must not look for a screen
import matplotlib.pyplot as plt

OURS, REFERENCE, PLAIN = "xlroute", "reference", "plain PyTorch"
PEERS = ("colt5 0.7.2", "colt5 0.11.2")

NOTES = """\
Milliseconds where no unit is given, medians; every result was checked before it was timed.
memory: the most GPU memory held beyond what was held before the call, its result included.
reference: the same call in PyTorch's own operations (backend="torch", use_triton=False).
plain PyTorch: for soft_topk, torch.topk and logsumexp; for scores, the matrix product alone; for the layer,
dense scaled_dot_product_attention to all memories with its projections. colt5: colt5-attention, in float32.
floor: bytes that must be read and written over the copy rate; for the layer, the memories once."""

LINES = {
    "layer": ("ConditionalRoutedCrossAttention", "#d62728", "o-"),
    "router": ("scores, selection and gather alone", "#ff9896", "o-"),
    "dense": ("dense attention to all memories, with projections", "#1f77b4", "s-"),
}


@dataclass(frozen=True)
class Work:
    """One piece of work, and what was measured of all who do it.

    Attributes:
        key: short and fixed, whatever the sizes are.
        name: as the table says it.
        reach: what xlroute is to reach.
        quantity: which number of a measurement counts.
        floor_bytes: what must be read and written once; None where that bounds nothing.
        floor_subject: one of the subjects, whose time is the floor instead.
        input_bytes: of the inputs, which stay in a cache that holds them.
        in_table: False for what only the CSV holds.
        measurements: one for each subject.
    """

    key: str
    name: str
    reach: str
    quantity: Literal["ms", "MiB", "relative error"] = "ms"
    floor_bytes: int | None = None
    floor_subject: str | None = None
    input_bytes: int | None = None
    in_table: bool = True
    measurements: list[Measurement] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """A time at m memories, on one of the lines of the picture."""

    line: str
    m: int
    measurement: Measurement


@dataclass(frozen=True)
class Machine:
    """What it was measured on.

    Attributes:
        facts: what a reader must know, by name.
        copy_rate: bytes read plus bytes written a second.
        cache_bytes: of the L2 cache; None on a CPU.
    """

    facts: dict[str, str]
    copy_rate: float
    cache_bytes: int | None

    def floor(self, work: Work) -> float | None:
        """Milliseconds that moving the work's bytes takes, or that its floor's subject took."""
        if work.floor_bytes is not None:
            return 1e3 * work.floor_bytes / self.copy_rate
        timings = [each.timing for each in work.measurements if each.subject == work.floor_subject]
        return timings[0].median if timings and timings[0] is not None else None


def value(work: Work, measurement: Measurement) -> float | None:
    """The number that counts; None where there is none."""
    if measurement.failure is not None:
        return None
    if work.quantity == "relative error":
        return measurement.checks[0].error
    if work.quantity == "MiB":
        return None if measurement.extra_bytes is None else measurement.extra_bytes / 2**20
    return None if measurement.timing is None else measurement.timing.median


def table(
    works: list[Work],
    machine: Machine,
    others: Sequence[str] = (REFERENCE, PLAIN, *PEERS),
    notes: str = NOTES,
) -> str:
    """The results as text, one line for each work, with a column for each of the other subjects."""
    columns = ("work", OURS, "20% to 80%", "memory", *others, "floor", "x floor", "reach")
    lines = [columns, *(_line(work, machine, others) for work in works if work.in_table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    facts = "; ".join(f"{name} {fact}" for name, fact in machine.facts.items())
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:], "", facts, notes])


def failures(works: list[Work], points: list[Point]) -> list[str]:
    """What went wrong, a line each."""
    measured = [(work.name, each) for work in works if work.quantity != "MiB" for each in work.measurements]
    measured += [(f"{LINES[point.line][0]}, m = {point.m:,}", point.measurement) for point in points]
    return [f"{name}, {each.subject}: {each.failure}" for name, each in measured if each.failure is not None]


def write_csv(path: Path, works: list[Work], points: list[Point], machine: Machine) -> None:
    """Everything that was measured, behind lines that say on what; a cell without a number is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {fact}\n" for name, fact in machine.facts.items())
        rows = [
            _csv_row(work, each, machine, "")
            for work in works
            for each in (work.measurements if work.quantity != "MiB" else [])
        ]
        for point in points:
            work = Work(f"sweep {point.line}", LINES[point.line][0] + ", forward", "")
            rows.append(_csv_row(work, point.measurement, machine, str(point.m)))
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, points: list[Point], bytes_a_row: int, machine: Machine) -> None:
    """Time over the number of memories, both in powers, with the floor as a line."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for line, (label, colour, style) in LINES.items():
        of_line = [point for point in points if point.line == line]
        timed = [(point.m, point.measurement.timing) for point in of_line if point.measurement.timing]
        if timed:
            sizes = [m for m, _ in timed]
            axes.plot(sizes, [timing.median for _, timing in timed], style, color=colour, label=label)
            low, high = ([getattr(timing, side) for _, timing in timed] for side in ("low", "high"))
            axes.fill_between(sizes, low, high, color=colour, alpha=0.25, linewidth=0)
    sizes = sorted({point.m for point in points})
    floor = [1e3 * m * bytes_a_row / machine.copy_rate for m in sizes]
    axes.plot(
        sizes, floor, "--", color="black", label=f"one read of the memories at {machine.facts['copy rate']}"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(
        title=f"Forward time on {machine.facts['device']}, {machine.facts['date'][:10]}",
        xlabel="memories",
        ylabel="milliseconds (band: 20% to 80%)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(work: Work, machine: Machine, others: Sequence[str]) -> tuple[str, ...]:
    by_subject = {each.subject: each for each in work.measurements}
    ours = by_subject[OURS]
    number, floor = value(work, ours), machine.floor(work)
    spread, memory = "-", "-"
    if work.quantity == "ms" and ours.timing is not None:
        spread = f"{_number(ours.timing.low)} to {_number(ours.timing.high)}"
        memory = "-" if ours.extra_bytes is None else _mebibytes(ours.extra_bytes / 2**20)
    return (
        work.name,
        _cell(work, ours),
        spread,
        memory,
        *(_cell(work, by_subject.get(name)) for name in others),
        "-" if floor is None else _number(floor),
        "-" if floor is None or number is None else _number(number / floor),
        work.reach,
    )


def _cell(work: Work, measurement: Measurement | None) -> str:
    if measurement is None:
        return "-"
    if measurement.failure is not None:
        red = [check for check in measurement.checks if not check.passed]
        return f"error {red[0].error:.1e}" if red else "failed"
    number = value(work, measurement)
    if number is None:
        return "-"
    if work.quantity == "MiB":
        return _mebibytes(number)
    return f"{number:.1e}" if work.quantity == "relative error" else _number(number)


def _number(number: float) -> str:
    """Three digits that count, and never an exponent."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:#.3g}".rstrip(".")


def _mebibytes(number: float) -> str:
    return f"{_number(number)} MiB" if number < 1024 else f"{number / 1024:.2f} GiB"


def _csv_row(work: Work, measurement: Measurement, machine: Machine, m: str) -> dict[str, str]:
    timing = measurement.timing if work.quantity == "ms" else None
    floor = machine.floor(work)
    cache = ""
    if machine.cache_bytes is not None and work.input_bytes is not None:
        fits = "fit in" if work.input_bytes < machine.cache_bytes else "exceed"
        sizes = f"{work.input_bytes / 1e6:.1f} MB {fits} the {machine.cache_bytes / 1e6:.0f} MB"
        cache = f"inputs of {sizes} of the L2 cache"
    row = {"work": work.name, "memories": m, "subject": measurement.subject}
    for prefix, each in (("", timing), ("cold_", measurement.cold)):
        for quantile in ("median", "low", "high"):
            row[f"{prefix}{quantile}_ms"] = "" if each is None else f"{getattr(each, quantile):.6g}"
    return row | {
        "extra_mib": "" if measurement.extra_bytes is None else f"{measurement.extra_bytes / 2**20:.3f}",
        "floor_ms": "" if floor is None else f"{floor:.6g}",
        "over_floor": "" if floor is None or timing is None else f"{timing.median / floor:.4g}",
        "reach": work.reach,
        "method": "" if timing is None else timing.method,
        "cache": cache,
        "checks": "; ".join(map(str, measurement.checks)),
        "failure": measurement.failure or "",
    }
