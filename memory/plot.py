"""A picture of what a memory has read and what it still holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from xlroute.memory.new_file import new_file
from xlroute.memory.store import MemoryStore

_INCHES_A_STREAM = 0.28
_MAX_INCHES = 30
_COLUMNS = 1000  # that can be told apart


def plot_rows(store: MemoryStore, target: Path) -> None:
    """Draws the rows of every stream by their position since the stream's reset, held or not, as a PNG.

    Args:
        store: The store.
        target: A new file, whose name ends in .png.

    Raises:
        ValueError: `target` ends in something else.
        FileExistsError: There is something at `target`.
        OSError: The operating system refused to write.
    """
    if target.suffix != ".png":
        raise ValueError(f"target: expected a name that ends in .png, got {target}")
    info, logs = store.info(), store.logs
    surviving = np.array([log.surviving for log in logs])
    held, appended = np.array(info.rows), np.array(info.appended)
    streams = np.arange(info.streams)
    height = min(_MAX_INCHES, 1.6 + _INCHES_A_STREAM * info.streams)
    # The figure is made without pyplot, which would look for a screen.
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    dense = appended - (held - surviving)
    gone = (appended - held).sum()
    axes.barh(streams, dense, color="#d0d4da", label=f"not held any more: {gone:,} rows")
    width = max(1, int(appended.max()) // _COLUMNS)
    for stream, log in enumerate(logs):
        columns = np.unique(log.own_positions().numpy() // width) * width
        axes.broken_barh(
            [(start, width) for start in columns], (stream - 0.4, 0.8), color="#7fb2d9", linewidth=0
        )
    if surviving.any():
        axes.barh(0, 0, color="#7fb2d9", label=f"held, with gaps: {surviving.sum():,} rows")
    label = f"held: {(held - surviving).sum():,} rows"
    axes.barh(streams, appended - dense, left=dense, color="#1f77b4", label=label)
    axes.set_ylim(info.streams - 0.5, -0.5)
    axes.set_xlim(0, max(1, int(appended.max()) * 1.02))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=30, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("position: rows appended since the stream's reset")
    axes.set_ylabel("stream")
    name = "memory" if info.path is None else info.path.name
    axes.set_title(f"{name}: layers {info.layers}, dim {info.dim}", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with new_file(target) as file:
        figure.savefig(file, format="png", dpi=150)
