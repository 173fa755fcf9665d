"""A picture of what a memory has read, what it still holds, and what routers have fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from xlroute.memory.info import MemoryInfo
from xlroute.memory.new_file import new_file
from xlroute.memory.routes import RouteCounts
from xlroute.memory.store import MemoryStore

_INCHES_A_STREAM = 0.28
_PANEL_INCHES = 0.6, 6.0  # at least and at most
_MAX_INCHES = 30
_COLUMNS = 1000  # that can be told apart
_MOST_LAYERS = 4  # with panels of their own
_NEVER = "#f0f0f0"


def plot_rows(store: MemoryStore, target: Path) -> None:
    """Draws the rows of every stream by their position since the stream's reset, held or not, as a PNG.

    Where routes were recorded, panels below say how often rows were routed: one for each layer, or one for
    all of them together if they are many.

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
    info = store.info()
    width = max(1, -(-max(info.appended) // _COLUMNS))
    panels = {} if store.routes is None else _routed(store.routes, info, width)
    least, most = _PANEL_INCHES
    inches = min(most, max(least, _INCHES_A_STREAM * info.streams))
    height = min(_MAX_INCHES, 1.6 + _INCHES_A_STREAM * info.streams + len(panels) * (inches + 0.3))
    # The figure is made without pyplot, which would look for a screen.
    figure = Figure(figsize=(9, height), layout="constrained")
    ratios = [_INCHES_A_STREAM * info.streams + 0.3, *[inches] * len(panels)]
    axes = figure.subplots(1 + len(panels), squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    _draw_held(axes[0], store, info, width)
    _draw_routed(figure, axes, panels, info, width)
    for each in axes:
        each.set_ylim(info.streams - 0.5, -0.5)
        each.set_ylabel("stream")
        each.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=30, min_n_ticks=1))
        each.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlim(0, max(1, int(max(info.appended) * 1.02)))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[-1].set_xlabel("position: rows appended since the stream's reset")
    name = "memory" if info.path is None else info.path.name
    axes[0].set_title(f"{name}: layers {info.layers}, dim {info.dim}", loc="left", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    with new_file(target) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_held(axes: Axes, store: MemoryStore, info: MemoryInfo, width: int) -> None:
    """Bars of the rows that were read: those that have left, those held with gaps, and those held."""
    logs = store.logs
    surviving = np.array([log.surviving for log in logs])
    held, appended = np.array(info.rows), np.array(info.appended)
    streams = np.arange(info.streams)
    dense = appended - (held - surviving)
    gone = (appended - held).sum()
    axes.barh(streams, dense, color="#d0d4da", label=f"not held any more: {gone:,} rows")
    for stream, log in enumerate(logs):
        columns = np.unique(log.own_positions().numpy() // width) * width
        axes.broken_barh(
            [(start, width) for start in columns], (stream - 0.4, 0.8), color="#7fb2d9", linewidth=0
        )
    if surviving.any():
        axes.barh(0, 0, color="#7fb2d9", label=f"held, with gaps: {surviving.sum():,} rows")
    label = f"held: {(held - surviving).sum():,} rows"
    axes.barh(streams, appended - dense, left=dense, color="#1f77b4", label=label)


def _routed(counts: RouteCounts, info: MemoryInfo, width: int) -> dict[str, NDArray[np.float64]]:
    """How often a row was routed, the mean of every `width` rows, [b, columns], by what a panel is called.

    Not a number where a stream has no rows.
    """
    columns = max(1, -(-max(info.appended) // width))
    starts = np.arange(columns) * width
    rows = np.clip(np.array(info.appended)[:, None] - starts, 0, width).astype(np.float64)
    rows[rows == 0] = np.nan
    totals = np.zeros((info.layers, info.streams, columns))
    for layer in range(info.layers):
        for stream in range(info.streams):
            positions, times = (each.numpy() for each in counts.of(layer, stream))
            totals[layer, stream] = np.bincount(positions // width, weights=times, minlength=columns)
    if info.layers > _MOST_LAYERS:
        return {"routed, all layers": totals.sum(0) / rows}
    return {f"routed, layer {layer}": each / rows for layer, each in enumerate(totals)}


def _draw_routed(
    figure: Figure,
    axes: NDArray[np.object_],
    panels: dict[str, NDArray[np.float64]],
    info: MemoryInfo,
    width: int,
) -> None:
    """A strip of colours for each stream in each panel, on one scale; what was never routed is grey."""
    if not panels:
        return
    means = np.array([*panels.values()])
    positive = means[means > 0]
    least = positive.min() if positive.size else 1.0
    norm = LogNorm(least, positive.max(initial=10 * least))
    for each, (title, values) in zip(axes[1:], panels.items(), strict=True):
        label = "never routed" if each is axes[1] else None
        each.barh(np.arange(info.streams), info.appended, height=1, color=_NEVER, label=label)
        image = each.imshow(
            np.where(values > 0, values, np.nan),
            norm=norm,
            cmap="plasma_r",
            extent=(0, values.shape[1] * width, info.streams - 0.5, -0.5),
            aspect="auto",
            interpolation="nearest",
            zorder=2,
        )
        each.set_title(title, loc="left", fontsize="medium")
    of = f",\nmean of {width:,}" if width > 1 else ""
    figure.colorbar(image, ax=axes, label=f"times a row was routed{of}", aspect=8 * figure.get_figheight())
