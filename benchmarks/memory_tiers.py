"""Rows on a GPU, in the host's memory and on disk: gathers, and routing over more rows than a GPU holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from measurement import Check, equal, measure
from memory_work import OURS, RAW, Sizes, Work
from torch import Tensor

from xlroute import CoordinateDescentRouter
from xlroute.memory import MemoryLayer, MemoryStore

DTYPE = torch.float16
BLOCK = 1 << 18  # rows appended at once
DRAWS = 200  # of the rows of a gather


def gather_tiers(sizes: Sizes, folder: Path, device: torch.device) -> Iterator[Work]:
    """Random rows that are all on the device, all on the host or all on disk: beside plain PyTorch.

    A router takes rows at indices that are on the device and in range for sure; `gather` checks them first.
    """
    m, dim = max(sizes.gather), sizes.dim
    row = 2 * dim * DTYPE.itemsize  # a buffer has room for twice the rows
    rows = torch.randn(m, dim, dtype=DTYPE)
    draws = [torch.randint(m, (1, sizes.chosen)).to(device) for _ in range(DRAWS)]
    expected = rows[draws[0][0].cpu()].to(device)
    for place, path, budget, reach in (
        ("on the device", None, None, "0.02 ms"),
        ("on the host", None, row, "0.15 ms"),
        ("on disk", folder / "tiers", row, "3 ms"),
    ):
        with MemoryStore.create(
            path, layers=1, streams=1, dim=dim, dtype=DTYPE, device=device, device_bytes=budget
        ) as store:
            for part in torch.split(rows, BLOCK):
                store.append(part[None, None])
            if path is not None:
                store.commit()
            layer = store.layer(0)
            name = f"{sizes.chosen:,} random rows of {m:,} {place}, for the device"
            beside = _plain(place, rows, path, device)
            verify = partial(_same_rows, expected)
            yield Work(
                f"take {name}",
                reach,
                [
                    measure(OURS, partial(_each, draws, partial(_take, layer)), verify, device),
                    measure(RAW, partial(_each, draws, beside), verify, device),
                ],
            )
            yield Work(
                f"gather {name}, indices checked",
                reach,
                [measure(OURS, partial(_each, draws, partial(_gather, store)), verify, device)],
            )


def _take(layer: MemoryLayer, index: Tensor) -> Tensor:
    return layer.take(index)[0]


def _gather(store: MemoryStore, index: Tensor) -> Tensor:
    return store.gather(0, index)[0]


def _plain(place: str, rows: Tensor, path: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What reads such rows with nothing around it."""
    if place == "on the device":
        held = rows.to(device)
        return lambda index: held.index_select(0, index[0])
    if path is not None:
        rows.numpy().tofile(path.with_suffix(".raw"))
        file = np.memmap(path.with_suffix(".raw"), np.float16, "r", shape=tuple(rows.shape))
        return lambda index: torch.from_numpy(file[index[0].cpu().numpy()]).to(device)
    return lambda index: rows.index_select(0, index[0].cpu()).to(device)


def _each(draws: list[Tensor], call: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """A call with other indices each time: the same rows would stay in the caches."""
    following = cycle(draws)
    return lambda: call(next(following))


def _same_rows(expected: Tensor, out: Tensor) -> list[Check]:
    return [equal("rows", out, expected, "what was written")]


def route_large(sizes: Sizes, folder: Path, device: torch.device) -> Work:
    """The best rows of a store much larger than the device, by scores that are stored: exact.

    The store is written, closed and opened again; the last hundredth of its rows comes then, and is on the
    device. Beside it, torch.topk of the same scores, and the rows from a memmap.
    """
    m, dim, k = sizes.large, sizes.large_dim, sizes.chosen
    hot = m // 100
    router = CoordinateDescentRouter(dim).to(device)
    path = folder / "routed"
    budget = 2 * hot * dim * DTYPE.itemsize
    with MemoryStore.create(
        path, layers=1, streams=1, dim=dim, dtype=DTYPE, device=device, device_bytes=budget
    ) as store:
        _fill(store, m - hot, router, k)
        store.commit()
    torch.cuda.empty_cache()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with MemoryStore.open(path, mode="r+", device=device, device_bytes=budget) as store:
        _fill(store, hot, router, k)
        layer = store.layer(0)

        @torch.no_grad()
        def route() -> tuple[Tensor, Tensor]:
            out = router(layer, num_tokens=k)
            return out.indices[0], out.tokens[0]

        @torch.no_grad()
        def scores() -> Tensor:
            assert router.routing_token is not None
            assert router.score_scale is not None
            return layer.scores(router.routing_token, normalize="rms", scale=router.score_scale)[0, 0]

        beside = _Memmap(path, dim)

        def plain() -> tuple[Tensor, Tensor]:
            index = scores().topk(k).indices
            return index, beside.rows(index).to(device)

        verify = partial(_same_choice, plain)
        work = Work(
            f"route {m:,} rows of {dim} on disk, {hot:,} of them on the device, by stored scores",
            "5 ms, 1.5 GiB",
            [
                measure(OURS, lambda: route, verify, device),
                measure(RAW, lambda: plain, verify, device),
            ],
        )
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            work.notes.append(f"most memory on the device from opening the store on: {peak:.2f} GiB")
        return work


@torch.no_grad()
def _fill(store: MemoryStore, count: int, router: CoordinateDescentRouter, k: int) -> None:
    """Appends random rows, and routes over them, so that they are scored while they are on the device."""
    for start in range(0, count, BLOCK):
        rows = torch.randn(1, 1, min(BLOCK, count - start), store.dim, dtype=DTYPE, device=store.device)
        store.append(rows)
        router(store.layer(0), num_tokens=k)


class _Memmap:
    """Rows of a store's chunk files by plain memmaps, with no check."""

    def __init__(self, path: Path, dim: int) -> None:
        folder = path / "layer-0.stream-0.rows"
        names = sorted(folder.glob("c.*"), key=lambda name: int(name.name.split(".")[1]))
        self._chunks = [np.memmap(name, np.float16, "r").reshape(-1, dim) for name in names]

    def rows(self, index: Tensor) -> Tensor:
        chunk, local = np.divmod(index.cpu().numpy(), self._chunks[0].shape[0])
        out = np.empty((index.numel(), self._chunks[0].shape[1]), np.float16)
        for each in np.unique(chunk):
            out[chunk == each] = self._chunks[each][local[chunk == each]]
        return torch.from_numpy(out)


def _same_choice(plain: Callable[[], tuple[Tensor, Tensor]], out: tuple[Tensor, Tensor]) -> list[Check]:
    index, rows = out
    best, theirs = plain()
    order, expected = index.argsort(), best.argsort()
    return [
        equal("indices", index[order], best[expected], "torch.topk"),
        equal("rows", rows[order], theirs[expected], "a memmap"),
    ]
