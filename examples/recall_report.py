"""The tables, the CSV and the picture of examples/recall.py."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: it must not look for a screen
import matplotlib.pyplot as plt

COLOURS = {
    "none": "#8c8c8c",
    "xl": "#1f77b4",
    "random": "#8c564b",
    "learned": "#9467bd",
    "content64": "#ff7f0e",
    "both": "#bcbd22",
    "content1": "#d62728",
    "everything": "#2ca02c",
    "full": "#17becf",
    "memorizing": "#e377c2",
}


@dataclass(frozen=True)
class Training:
    """How a mode was trained."""

    mode: str
    label: str
    parameters: int
    steps: int
    updates: int
    tokens: int
    seconds: float
    training_accuracy: float


@dataclass(frozen=True)
class Score:
    """How many questions of one kind a mode answered right in all symbols."""

    mode: str
    label: str
    task: str
    length: int  # tokens of the documents
    announced: bool  # answered after a gap, otherwise at once
    nearest: int  # tokens from fact to answer, at least
    farthest: int  # less than this
    questions: int
    right: int


def accuracy(scores: list[Score]) -> float:
    """The share of questions answered right; not a number without any."""
    questions = sum(score.questions for score in scores)
    return sum(score.right for score in scores) / questions if questions else math.nan


def tables(trainings: list[Training], scores: list[Score]) -> str:
    """How the modes were trained, and the accuracy of each at each task, document length and kind."""
    header = ("mode", "parameters", "steps", "updates", "tokens", "seconds", "symbols right in training")
    lines: list[tuple[str, ...]] = [header]
    for each in trainings:
        numbers = (each.parameters, each.steps, each.updates, each.tokens, round(each.seconds))
        lines.append((each.label, *(f"{n:,}" for n in numbers), f"{each.training_accuracy:.1%}"))
    parts = [_aligned(lines)]
    for task in dict.fromkeys(score.task for score in scores):
        of_task = [score for score in scores if score.task == task]
        kinds = sorted({(score.length, score.announced) for score in of_task})
        lines = [(task, *(f"{n:,}{', gap' if announced else ''}" for n, announced in kinds))]
        for training in trainings:
            of_mode = [score for score in of_task if score.mode == training.mode]
            shares = [
                accuracy([score for score in of_mode if (score.length, score.announced) == kind])
                for kind in kinds
            ]
            lines.append((training.label, *("" if math.isnan(share) else f"{share:.1%}" for share in shares)))
        parts.append(_aligned(lines))
    return "\n\n".join(parts)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def write_csv(path: Path, kind: type[Training] | type[Score], rows: list[Training] | list[Score]) -> None:
    """One line for each row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(kind)])
        writer.writeheader()
        writer.writerows(asdict(each) for each in rows)


def draw(path: Path, scores: list[Score], chance: float) -> None:
    """Accuracy over distance at each task, in the longest documents that each mode read, and by guessing."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        lines = list(_lines([score for score in scores if score.task == task]))
        for number, (mode, label, length, points) in enumerate(lines):
            axis.plot(
                *zip(*points, strict=True),
                marker=".",
                color=COLOURS[mode],
                linewidth=1.5 + 0.6 * (len(lines) - number),  # lines that lie on each other stay visible
                label=f"{label}, {length:,} tokens",
            )
        axis.axhline(chance, color="black", linestyle=":", linewidth=1, label="guessing")
        axis.set_xscale("log", base=2)
        axis.set(title=task, xlabel="tokens from fact to answer", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("share of answers that are right in all symbols")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _lines(scores: list[Score]) -> Iterator[tuple[str, str, int, list[tuple[float, float]]]]:
    """Mode, label, document length, and the accuracy at each distance."""
    for mode in dict.fromkeys(score.mode for score in scores):
        of_mode = [score for score in scores if score.mode == mode]
        length = max(score.length for score in of_mode)
        longest = [score for score in of_mode if score.length == length]
        points = []
        for nearest, farthest in sorted({(score.nearest, score.farthest) for score in longest}):
            share = accuracy([score for score in longest if score.nearest == nearest])
            points.append((math.sqrt(nearest * farthest), share))
        yield mode, of_mode[0].label, length, points
