"""The table and the pictures of examples/pg19.py."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("Agg")  # before pyplot: it must not look for a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LABELS = {
    "none": "no memory",
    "xl": "XL memory",
    "learned": "XL + learned memory",
    "content": "XL + content memory",
    "both": "XL + learned and content",
    "random": "XL + random memory",
}
EMPTIED = "the same, memory emptied"
COLOURS = {
    "none": "#8c8c8c",
    "xl": "#1f77b4",
    "learned": "#d62728",
    "content": "#ff7f0e",
    "both": "#9467bd",
    "random": "#8c564b",
}
SET_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd")
# Of the modes with memory, in whose names rows are drawn.
SETS = {
    "learned": ("learned token",),
    "content": ("content, set",),
    "both": ("learned token", "content, set"),
    "random": ("random, set",),
}
SEGMENTS_DRAWN = 24  # whose choices are drawn one by one
AGE_BINS = 32
KINDS = 14  # tokens in the bar chart


@dataclass(frozen=True)
class Routing:
    """Which rows each segment of a book chose to read.

    Attributes:
        starts: where each segment starts, int64 [s].
        chosen: the positions read, int64 [s, r, k], -1 for none.
        names: of the r sets of rows.
        window: tokens of the XL window, which lie between a segment and the newest row in memory.
        capacity: rows that the memory keeps.
    """

    starts: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]
    names: list[str]
    window: int
    capacity: int

    @classmethod
    def of(
        cls,
        mode: str,
        starts: list[int],
        chosen: list[list[npt.NDArray[np.int64]]],
        *,
        window: int,
        capacity: int,
    ) -> "Routing":
        """That of a mode out of the positions of each set of each segment, as `Evaluation` has them."""
        width = max((len(rows) for sets in chosen for rows in sets), default=0)
        padded = [
            [np.pad(rows, (0, width - len(rows)), constant_values=-1) for rows in sets] for sets in chosen
        ]
        each = len(chosen[0]) // len(SETS[mode])
        names = [f"{name} {number + 1}" for name in SETS[mode] for number in range(each)]
        return cls(np.array(starts), np.array(padded, dtype=np.int64), names, window, capacity)


def label(row: dict[str, Any]) -> str:
    """What a row of a table is called on its own, with the option that its run had besides, if any."""
    option = f", {row['option']}" if row.get("option") else ""
    return LABELS[row["mode"]] + option + (", emptied" if row["emptied"] else "")


def table(rows: list[dict[str, Any]]) -> str:
    """The results as text, one line for each mode."""
    header = ("mode", "bits per byte", "beyond window", "word perplexity", "trained/s", "ms a step", "read/s")
    lines = [(*header, "memory rows", "peak memory", "parameters", "multiply-adds")]
    for row in rows:
        lines.append(
            (
                f"  {EMPTIED}" if row["emptied"] else LABELS[row["mode"]],
                f"{row['bits_per_byte']:.4f}",
                _number(row["kinds"]["beyond"]["bits_per_byte"], ".4f"),
                f"{row['word_perplexity']:,.1f}",
                _number(row["tokens_per_second"], ",.0f"),
                _number(row["ms_per_step"], ",.1f"),
                _number(row["read_tokens_per_second"], ",.0f"),
                f"{row['memory_rows']:,}",
                f"{row['peak_bytes'] / 2**20:,.0f} MiB",
                f"{row['parameters']:,}",
                _number(row["multiply_adds"], ","),
            )
        )
    return _aligned(lines)


def table_of_kinds(rows: list[dict[str, Any]]) -> str:
    """Bits per byte of the words that are in sight, beyond, or new, and of the rest: see pg19_words.py."""
    kinds = rows[0]["kinds"]
    size = sum(kind["bytes"] for kind in kinds.values())
    titles = {"in sight": "words in sight", "beyond": "beyond window", "new": "new words", "rest": "the rest"}
    lines = [("bits per byte", *(titles[kind] for kind in kinds))]
    for row in rows:
        numbers = [kind["bits_per_byte"] for kind in row["kinds"].values()]
        name = f"  {EMPTIED}" if row["emptied"] else LABELS[row["mode"]]
        lines.append((name, *(_number(number, ".4f") for number in numbers)))
    lines.append(("share of the bytes", *(f"{kind['bytes'] / size:.1%}" for kind in kinds.values())))
    return _aligned(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def draw_curves(
    path: Path, metrics: list[dict[str, Any]], rows: list[dict[str, Any]], *, timed: bool
) -> None:
    """Bits per byte in training, over its steps or its time, and along the held-out books."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5.2), layout="constrained")
    for row in (row for row in rows if not row["emptied"]):
        lines = [line for line in metrics if line["mode"] == row["mode"]]
        places = [line["seconds"] / 60 if timed else line["step"] for line in lines]
        bits = [line["bits_per_byte"] for line in lines]
        width = 3.0 if row["mode"] == "xl" else 1.5  # lines that lie on each other stay visible
        left.plot(places, bits, color=COLOURS[row["mode"]], alpha=0.1, linewidth=0.8)
        left.plot(places, _smooth(bits), color=COLOURS[row["mode"]], linewidth=width)
    ends = [line["bits_per_byte"] for line in metrics[-50:]]
    left.set_ylim(0.9 * min(ends), 2.0 * min(ends))
    left.set(
        title="training (line: moving average)",
        xlabel="minutes in steps" if timed else "step",
        ylabel="bits per byte",
    )
    reference = next((row for row in rows if row["mode"] == "xl"), rows[0])
    draw_along(middle, right, rows, [reference] * len(rows))
    right.set_title(f"compared with {LABELS[reference['mode']]} (below 0 is better)")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_along(
    absolute: Axes, compared: Axes, rows: list[dict[str, Any]], references: Sequence[dict[str, Any] | None]
) -> None:
    """Bits per byte by position in the held-out books, and the difference of each row to its reference."""
    for row, reference in zip(rows, references, strict=True):
        counted = [i for i, bits in enumerate(row["bin_bits"]) if bits is not None]
        places = [(i + 0.5) * row["bin_width"] for i in counted]
        bits = [row["bin_bits"][i] for i in counted]
        plain, emptied = ("--", "-.") if row.get("option") else ("-", ":")
        style: dict[str, Any] = {
            "color": COLOURS[row["mode"]],
            "linestyle": emptied if row["emptied"] else plain,
            "marker": ".",
            "markersize": 4,
        }
        absolute.plot(places, bits, **style, label=f"{label(row)}: {row['bits_per_byte']:.4f}")
        if reference is not None:
            compared.plot(places, [row["bin_bits"][i] - reference["bin_bits"][i] for i in counted], **style)
    absolute.set(title="held-out books", ylabel="bits per byte")
    compared.set(ylabel="difference in bits per byte")
    for axes in (absolute, compared):
        axes.set(xlabel="tokens of the book read before")
        axes.xaxis.set_major_formatter("{x:,.0f}")


def _smooth(values: list[float], window: int = 25) -> npt.NDArray[np.float64]:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - window)
    means: npt.NDArray[np.float64] = (sums[stops] - sums[starts]) / (stops - starts)
    return means


def draw_routing(path: Path, routing: Routing, title: str, tokens: list[str]) -> None:
    """Which past positions each segment of a book chose to read, and what stands there.

    Args:
        path: of the picture.
        routing: what was chosen.
        title: of the book.
        tokens: of the book, each as text.
    """
    figure = plt.figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    positions, ages, kinds = (figure.add_subplot(at) for at in (grid[:, 0], grid[0, 1], grid[1, 1]))
    count = len(routing.starts)
    middle = range(count // 2, count // 2 + min(SEGMENTS_DRAWN, count - count // 2))
    _draw_positions(positions, routing, middle)
    positions.set_title(f"{title}:\nwhich past positions {len(middle)} of {count:,} segments read")
    _draw_ages(ages, routing)
    _draw_kinds(kinds, routing, tokens)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_positions(axes: Axes, routing: Routing, segments: range) -> None:
    places = np.arange(segments.start, segments.stop)
    starts, chosen = routing.starts[places], routing.chosen[places]
    newest = np.maximum(0, starts - routing.window)
    axes.bar(
        places,
        newest - np.maximum(0, newest - routing.capacity),
        bottom=np.maximum(0, newest - routing.capacity),
        width=1.0,
        color="#ebebeb",
        label="held in memory",
    )
    axes.step(places, starts, where="mid", color="black", linewidth=1, label="where the segment starts")
    for number in range(chosen.shape[1]):
        at, row = np.nonzero(chosen[:, number] >= 0)
        # Side by side, so that rows that several tokens chose show as such.
        axes.scatter(
            places[at] + (number + 0.5) / chosen.shape[1] - 0.5,
            chosen[at, number, row],
            s=3,
            linewidths=0,
            color=SET_COLOURS[number % len(SET_COLOURS)],
            label=routing.names[number],
            rasterized=True,
        )
    axes.set(xlabel="segment", ylabel="position in the book")
    axes.legend(loc="upper left", markerscale=3)


def _draw_ages(axes: Axes, routing: Routing) -> None:
    """How far back the rows lie that are read, over all segments for which the memory is full."""
    full = routing.starts >= routing.window + routing.capacity
    for number in range(routing.chosen.shape[1]):
        chosen = routing.chosen[full, number]
        ages = (routing.starts[full, None] - chosen)[chosen >= 0]
        axes.hist(
            ages,
            bins=AGE_BINS,
            weights=np.full(ages.shape, 100 / max(1, ages.size)),
            histtype="step",
            color=SET_COLOURS[number % len(SET_COLOURS)],
            label=routing.names[number],
        )
    axes.set(title="how far back they lie", xlabel="tokens before the segment", ylabel="share in %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")


def _draw_kinds(axes: Axes, routing: Routing, tokens: list[str]) -> None:
    """Which tokens the rows that are read had just seen, beside how common these are in the book."""
    # The row at position p is the state after reading the token before it; the row at 0 has read no text.
    everywhere = Counter(tokens)
    sets = [
        Counter(tokens[p - 1] for p in routing.chosen[:, number].ravel().tolist() if p > 0)
        for number in range(routing.chosen.shape[1])
    ]
    shown = sorted(everywhere, key=lambda token: -max(each[token] / max(1, each.total()) for each in sets))[
        :KINDS
    ]
    bars = [("in the book", "#bbbbbb", everywhere)] + [
        (routing.names[number], SET_COLOURS[number % len(SET_COLOURS)], each)
        for number, each in enumerate(sets)
    ]
    for number, (label, colour, counts) in enumerate(bars):
        heights = [100 * counts[token] / max(1, counts.total()) for token in shown]
        offsets = np.arange(len(shown)) + (number - (len(bars) - 1) / 2) * 0.8 / len(bars)
        axes.bar(offsets, heights, width=0.8 / len(bars), color=colour, label=label)
    axes.set_xticks(range(len(shown)), [*map(_name, shown)], parse_math=False)
    axes.set(title="what the rows that are read had just seen", xlabel="last token", ylabel="share in %")
    axes.legend()


def _name(token: str) -> str:
    """A token as a picture can show it: what has no glyph as it would be written in Python."""
    if token == " ":
        return "space"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in token)


def word_perplexity(nats: float, words: int) -> float:
    """exp(nats per word); infinite where that is beyond a float."""
    try:
        return math.exp(nats / words)
    except OverflowError:
        return math.inf
