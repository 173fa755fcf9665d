"""What a step of a model with a memory costs: training, evaluation, and the memory alone beside its floor.

    python benchmarks/step.py                                       on a GPU; all of it takes minutes
    python benchmarks/step.py --sizes 50M --modes learned --rows 65536
    python benchmarks/step.py --sizes tiny                          on a CPU, to see that it runs

The difference is to the mode xl, at the same size and number of streams. It writes step.csv to --out, with
everything that was measured and how. No speed is printed of a result that was not checked first; where a
check is red, the error stands in its place, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from measurement import Check, Measurement, measure
from routing import Progress, describe
from routing_report import Machine
from routing_settings import Sizes
from step_work import BASELINE, MODES, SIZES, Floor, Reader, Size, build_model, memory_floor
from timing import busy_time, host_waits, on_one_stream, product_rate
from torch import Tensor

from xlroute import RoutedTransformerXL

PARTS = ("step", "memory", "gradient")
GRAD_MODES = ("learned", "content-1")
TOTAL_MS = 1000.0  # that a timing takes: hosts are now faster, now slower
PRODUCT_SIZE = 8192  # of the matrices whose product says how fast products are

NOTES = """\
Milliseconds, medians; every result was checked before it was timed. Blocks are compiled on a GPU, where
products are bfloat16 by autocast, and so are the rows. Memories are full of random rows, of the scale of the
states that enter the block: with them, routing has nothing to find, which takes as long.
+: to xl. peak: the most GPU memory held in the step, all included.
waits: of the host for the GPU in a step, but for the one behind the blocks, where it checks the tokens.
memory: what the model does with it in a segment, alone: opening, routing, taking rows, attention, appending;
in training forward and backward. Chosen rows are read with those that followed them.
floor: bytes that must be read over the copy rate, read plus written, and products over the product rate. Rows
are read where they are scored anew, once more for the gradient of routing tokens; else their scores or keys.
shortlist: training chooses out of twice as many rows as are read, found by the scores or keys that they got
when they came.
gradient: the share of chosen rows that carry gradient to the router, before training.
GPU busy: milliseconds of it, by a profiler: what is left where the host is far enough ahead."""

Kind = Literal["training", "evaluation", "memory, training", "memory, evaluation"]
STEPS: tuple[Kind, ...] = ("training", "evaluation")
MEMORIES: tuple[Kind, ...] = ("memory, training", "memory, evaluation")
COLUMNS = (
    "model, mode, streams",
    *("training", "+", "evaluation", "+"),
    *("memory, training", "floor", "x floor", "memory, evaluation", "floor", "x floor"),
    *("peak, training", "waits, training", "waits, evaluation", "gradient"),
)
BUSY_COLUMNS = (
    "GPU busy: model, mode, streams",
    *("training", "+", "evaluation", "+"),
    *("memory, training", "x floor", "memory, evaluation", "x floor"),
)


@dataclass(frozen=True)
class Result:
    """What was measured of one kind of work, in one mode, at one size.

    Attributes:
        parameters: of the model.
        rows: of each stream; 0 without a memory.
        segments: that it reads; the measurement is of all of them.
        peak_bytes: the most GPU memory held meanwhile; None on a CPU.
        waits: how often the host waits for the device; None on a CPU.
        busy_ms: for which the device is at work, of all segments; None on a CPU.
        floor: of a memory's part, in milliseconds.
        gradient_share: of the chosen rows.
    """

    size: str
    parameters: int
    mode: str
    streams: int
    rows: int
    kind: Kind
    measurement: Measurement
    segments: int = 1
    grad_segments: int = 0
    peak_bytes: int | None = None
    waits: int | None = None
    busy_ms: float | None = None
    floor: float | None = None
    gradient_share: float | None = None

    @property
    def milliseconds(self) -> float | None:
        """Of one segment; None where a check was red."""
        timing = self.measurement.timing
        return None if timing is None else timing.median / self.segments

    @property
    def busy(self) -> float | None:
        """Milliseconds for which the device is at work, of one segment; None where that was not measured."""
        return None if self.busy_ms is None else self.busy_ms / self.segments


@dataclass(frozen=True)
class Rates:
    """How fast the device reads, in bytes a second, and multiplies, two operations for each multiply-add."""

    read: float
    products: float

    def milliseconds(self, floor: Floor) -> float:
        """What reading and multiplying take, one after the other."""
        return 1e3 * (floor.read / self.read + floor.products / self.products)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the CSV")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10M", "50M"], help="default: 10M 50M")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="memories; default: all of a size")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="whole steps, the memory alone, memory_grad_segments; default: all",
    )
    parser.add_argument(
        "--grad-segments",
        nargs="+",
        type=int,
        default=[1, 4],
        metavar="G",
        help="memory_grad_segments, each beside 0; default: 1 4",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="compile blocks together, which takes two to three times as long",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, found none")
    if device.type == "cpu" and options.sizes != ["tiny"]:
        parser.error("--sizes: expected tiny on a CPU, where the others would take hours")
    for name in options.sizes:
        known = [rows for rows, _ in SIZES[name].memories]
        if options.rows is not None and not {*options.rows} <= {*known}:
            parser.error(f"--rows: expected some of {known} with --sizes {name}, got {options.rows}")
    if min(options.grad_segments) < 1:
        parser.error(f"--grad-segments: expected at least 1, got {min(options.grad_segments)}")

    options.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    progress = Progress()
    tiny = options.sizes == ["tiny"]
    # None falls back to running without.
    compiling = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with on_one_stream(device), compiling:
        machine = describe(device, Sizes(copy_bytes=1 << 20) if tiny else Sizes())
        rates = measured_rates(device, machine, 64 if tiny else PRODUCT_SIZE)
        machine.facts["blocks"] = "compiled together" if options.together else "compiled one by one"
        for size in (SIZES[name] for name in options.sizes):
            chosen = [rows for rows, _ in size.memories if options.rows is None or rows in options.rows]
            for mode in options.modes:
                with progress.step(f"{size.name}, {mode}"):
                    for result in steps(size, mode, chosen, options.parts, device, rates, options.together):
                        progress(f"{result.rows:,} rows, {result.kind}: {_cell(result)} ms")
                        results.append(result)
                torch._dynamo.reset()
            if "gradient" in options.parts and size.grad_rows in chosen:
                for mode in (each for each in options.modes if each in GRAD_MODES):
                    for segments in options.grad_segments:
                        with progress.step(f"{size.name}, {mode}, memory_grad_segments={segments}"):
                            results += with_gradient(size, mode, segments, device)
                        torch._dynamo.reset()
    progress("done")
    print("\n\n".join([*tables(results), "; ".join(f"{k} {v}" for k, v in machine.facts.items()), NOTES]))
    write_csv(options.out / "step.csv", results, machine)
    wrong = [
        f"{each.size}, {each.mode}, {each.rows:,} rows, {each.kind}: {each.measurement.failure}"
        for each in results
        if each.measurement.failure is not None
    ] + progress.broken
    if wrong:
        print("\n" + "\n".join(wrong))
    return 1 if wrong else 0


def measured_rates(device: torch.device, machine: Machine, size: int) -> Rates:
    """How fast the device is, which the machine's facts tell from now on."""
    products = product_rate(size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    machine.facts["products"] = f"{products / 1e12:,.3g} TFLOP/s, matrices of {size}"
    return Rates(machine.copy_rate, products)


def steps(
    size: Size,
    mode: str,
    rows: Sequence[int],
    parts: Sequence[str],
    device: torch.device,
    rates: Rates,
    together: bool,
) -> Iterator[Result]:
    """A mode at each number of rows; one without a memory, at each number of streams."""
    model = build_model(size, mode, device)
    reference = build_model(size, mode, device, use_triton=False)
    compile_blocks(model, together=together)
    remembers = bool(model.memory_layers)
    streams = [(m, size.streams(m)) for m in rows]

    def of_reader(rows: int, streams: int) -> Iterator[Result]:
        reader = Reader(model, streams=streams, rows=rows)
        share = reader.gradient_share() if remembers else None
        result = partial(measured, reader, size=size.name, mode=mode, gradient_share=share)
        if "step" in parts:
            yield result("training", reader.train, reader.verify_step)
            verify = partial(reader.verify_logits, expected=reader.reference(reference))
            yield result("evaluation", reader.evaluate, verify)
        if "memory" in parts and remembers:
            for training in (True, False):
                yield result(
                    "memory, training" if training else "memory, evaluation",
                    reader.memory_part(training=training),
                    reader.verify_part,
                    floor=rates.milliseconds(memory_floor(reader, training=training)),
                )

    # Each number of streams is compiled for; how many distinct rows are read changes from step to step.
    for m, b in streams if remembers else [(0, b) for b in dict.fromkeys(b for _, b in streams)]:
        torch._dynamo.reset()
        yield from of_reader(m, b)  # whose memory goes before the next comes


def with_gradient(size: Size, mode: str, grad_segments: int, device: torch.device) -> Iterator[Result]:
    """A step that reads one segment more than that, with rows that carry gradient, and with none."""
    streams, segments = size.streams(size.grad_rows), grad_segments + 1
    for each in (0, grad_segments):
        model = build_model(size, mode, device, grad_segments=each)
        compile_blocks(model)
        reader = Reader(model, streams=streams, rows=size.grad_rows, segments=segments)
        yield measured(reader, "training", reader.train, reader.verify_step, size=size.name, mode=mode)


def measured(
    reader: Reader,
    kind: Kind,
    call: Callable[[], Tensor],
    verify: Callable[[Tensor], Iterable[Check]],
    *,
    size: str,
    mode: str,
    floor: float | None = None,
    gradient_share: float | None = None,
) -> Result:
    """One kind of work of a reader, checked and then timed."""
    device, model = reader.device, reader.model
    on_gpu = device.type == "cuda"
    measurement = measure(kind, lambda: call, verify, device, graph=False, total_ms=TOTAL_MS)
    return Result(
        size,
        sum(each.numel() for each in model.parameters()),
        mode,
        reader.state.streams,
        reader.rows,
        kind,
        measurement,
        segments=len(reader.text) if kind == "training" else 1,
        grad_segments=model.memory_grad_segments,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        waits=host_waits(call, device) if measurement.failure is None else None,
        busy_ms=busy_time(call, device) if measurement.failure is None else None,
        floor=floor,
        gradient_share=gradient_share,
    )


def compile_blocks(model: RoutedTransformerXL, *, together: bool = False) -> None:
    """On a GPU, compile the blocks in place, as CUDA graphs but where rows carry gradient, which stay."""
    if model.embedding.weight.is_cuda:
        mode = "default" if model.memory_grad_segments else "reduce-overhead"
        model.compile_blocks(together=together, mode=mode)


def tables(results: Sequence[Result]) -> Iterator[str]:
    """Steps and memories, a line for each mode and number of rows; then steps whose rows carry gradient."""
    plain = [each for each in results if each.segments == 1]
    lines: list[tuple[str, ...]] = [COLUMNS]
    busy: list[tuple[str, ...]] = [BUSY_COLUMNS]
    for case in dict.fromkeys(map(Case.of, plain)):
        of_case = {each.kind: each for each in plain if Case.of(each) == case}
        baseline = {
            each.kind: each
            for each in plain
            if (each.size, each.mode, each.streams) == (case.size, BASELINE, case.streams)
        }
        cells, at_work = [str(case)], [str(case)]
        for kind in STEPS:
            result, than = of_case.get(kind), baseline.get(kind)
            cells += [_cell(result), _more(result, than)]
            at_work += [_busy(result), _more(result, than, busy=True)]
        for kind in MEMORIES:
            result = of_case.get(kind)
            cells += [_cell(result), _floor(result), _times_floor(result)]
            at_work += [_busy(result), _times_floor(result, busy=True)]
        first = next(iter(of_case.values()))
        training = of_case.get("training")
        cells += [_gibibytes(training), *(_waits(of_case.get(kind)) for kind in STEPS)]
        lines.append((*cells, "-" if first.gradient_share is None else f"{first.gradient_share:.0%}"))
        busy.append(tuple(at_work))
    if plain:
        yield _aligned(lines)
    if any(each.busy is not None for each in plain):
        yield _aligned(busy)
    lines = [("memory_grad_segments", "segments a step", "ms a segment", "+", "peak")]
    several = [each for each in results if each.segments > 1]
    for detached, attached in zip(several[::2], several[1::2], strict=True):
        for each in (detached, attached):
            more = "-" if each is detached else _more(attached, detached)
            name = f"{Case.of(each)}, {each.grad_segments}"
            lines.append((name, str(each.segments), _cell(each), more, _gibibytes(each)))
    if several:
        yield _aligned(lines)


class Case(NamedTuple):
    """A line of the table."""

    size: str
    parameters: int
    mode: str
    streams: int
    rows: int

    @classmethod
    def of(cls, result: Result) -> Case:
        """That of a result."""
        return cls(*(getattr(result, name) for name in cls._fields))

    def __str__(self) -> str:
        memory = f" x {self.rows:,} rows" if self.rows else ""
        return f"{self.size} ({self.parameters / 1e6:.1f}M), {self.mode}, {self.streams}{memory}"


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    if result.milliseconds is None:
        red = [check for check in result.measurement.checks if not check.passed]
        return f"error {red[0].error:.1e}" if red else "failed"
    return _digits(result.milliseconds)


def _busy(result: Result | None) -> str:
    return "-" if result is None or result.busy is None else _digits(result.busy)


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:#.3g}".rstrip(".")


def _time(result: Result | None, *, busy: bool) -> float | None:
    """What it takes, or for how much of that the device is at work."""
    if result is None:
        return None
    return result.busy if busy else result.milliseconds


def _more(result: Result | None, than: Result | None, *, busy: bool = False) -> str:
    """How much more time that takes."""
    ours, theirs = _time(result, busy=busy), _time(than, busy=busy)
    if ours is None or theirs is None or result is than:
        return "-"
    return f"{ours - theirs:+.2f} ({ours / theirs - 1:+.1%})"


def _floor(result: Result | None) -> str:
    return "-" if result is None or result.floor is None else _digits(result.floor)


def _times_floor(result: Result | None, *, busy: bool = False) -> str:
    took = _time(result, busy=busy)
    return "-" if result is None or result.floor is None or took is None else f"{took / result.floor:.2f}"


def _gibibytes(result: Result | None) -> str:
    return "-" if result is None or result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f} GiB"


def _waits(result: Result | None) -> str:
    return "-" if result is None or result.waits is None else str(result.waits)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for name, *cells in lines:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        rows.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def write_csv(path: Path, results: Sequence[Result], machine: Machine) -> None:
    """Everything that was measured, behind lines that say on what; a cell without a number is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {fact}\n" for name, fact in machine.facts.items())
        rows = []
        for each in results:
            row = {field.name: getattr(each, field.name) for field in fields(each)}
            measurement, timing = row.pop("measurement"), each.measurement.timing
            for name in ("median", "low", "high"):
                row[f"{name}_ms"] = None if timing is None else getattr(timing, name)
            row["method"] = None if timing is None else timing.method
            row["extra_bytes"] = measurement.extra_bytes
            row["checks"] = "; ".join(map(str, measurement.checks))
            rows.append(row | {"failure": measurement.failure})
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
