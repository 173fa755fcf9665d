"""How fast search_topk finds the k best keys of each query, beside what else finds them, in one run.

    python benchmarks/search.py           on a GPU; about a minute
    python benchmarks/search.py --tiny    on a CPU, to see that it runs: its times mean nothing

faiss is measured where it is installed: on the GPU if it was built for that, else on the CPU.

It writes search.csv to --out, with everything that was measured and how. No speed is printed of a result that
was not checked against scores in float64 first; where a check is red, the error stands in its place, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measurement import Check, close, measure
from routing import Progress, describe
from routing_report import OURS, REFERENCE, Work, failures, table, write_csv
from routing_settings import Sizes, normal
from timing import on_one_stream
from torch import Tensor

from xlroute.kernels import Backend, search_topk

Found = tuple[Tensor, Tensor]  # scores and indices, [n, k]

MATMUL, FAISS, FAISS_CPU, PRODUCT = "matmul + topk", "faiss GPU", "faiss CPU", "product alone"
OTHERS = (REFERENCE, MATMUL, FAISS, FAISS_CPU, PRODUCT)
NOTES = """\
Milliseconds, medians; every result was checked before it was timed. Keys and queries are bfloat16.
memory: the most GPU memory held beyond what was held before the call, its result included.
reference: the same call in PyTorch's own operations (backend="torch"): float32 products of blocks of keys.
matmul + topk: torch.matmul of blocks of keys and torch.topk, whose bfloat16 scores are not exact.
faiss: IndexFlatIP over the keys in float32; queries come from the host, and what is found goes there.
product alone: torch.matmul of blocks of keys. floor: queries and keys read once at the copy rate."""

SCORES_AT_ONCE = 1 << 27  # of one block of keys: 256 MiB in bfloat16
EXACT_AT_ONCE = 1 << 26  # of one block of keys, in float64


@dataclass(frozen=True)
class Size:
    """A search: n queries over m keys of width e."""

    n: int
    m: int
    k: int
    e: int = 64
    reach: str = ""


SIZES = (
    Size(1024, 1_048_576, 32, reach="1 ms, 64 MiB"),
    Size(1, 1_048_576, 32),
    Size(512, 131_072, 64),
    Size(4096, 262_144, 32),
)
TINY = (Size(20, 3000, 4, 16), Size(1, 3000, 4, 16))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the CSV")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU takes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, found none")
    if device.type == "cpu" and not options.tiny:
        parser.error("--tiny: expected on a CPU, where the full sizes would take hours")

    options.out.mkdir(parents=True, exist_ok=True)
    works: list[Work] = []
    progress = Progress()
    torch.set_float32_matmul_precision("highest")
    with on_one_stream(device):
        machine = describe(device, Sizes(copy_bytes=1 << 20) if options.tiny else Sizes())
        machine.facts["faiss"] = getattr(import_faiss(), "__version__", "not installed")
        for size in TINY if options.tiny else SIZES:
            with progress.step(f"{size.n:,} queries, {size.m:,} keys"):
                works.append(search(size, device))
    progress("done")
    print(table(works, machine, OTHERS, NOTES))
    write_csv(options.out / "search.csv", works, [], machine)
    wrong = failures(works, []) + progress.broken
    if wrong:
        print("\n" + "\n".join(wrong))
    return 1 if wrong else 0


def search(size: Size, device: torch.device) -> Work:
    """All who search, at one size."""
    queries = normal(size.n, size.e, device=device, seed=1, dtype=torch.bfloat16)
    keys = normal(size.m, size.e, device=device, seed=2, dtype=torch.bfloat16)
    best = exact_best(queries, keys, size.k)
    largest = keys.double().norm(dim=-1).max() * queries.double().norm(dim=-1).max()
    # Keys may stand for each other whose scores are within twice the bound that search_topk states.
    close_by = 2 * (size.e + 16) * 2.0**-21 * largest.item()
    rounded = 2 * torch.finfo(torch.bfloat16).eps * best.abs().max().item()

    def verify(tolerance: float) -> Callable[[Found], list[Check]]:
        def check(found: Found) -> list[Check]:
            scores, indices = (each.to(device) for each in found)
            exact = (queries.double()[:, None] * keys[indices].double()).sum(-1)
            ordered = indices.sort(-1).values
            worst = (best - exact.sort(-1, descending=True).values).abs().max().item()
            return [
                Check("the k best", worst, tolerance, "float64"),
                Check("keys found twice", float((ordered[:, 1:] == ordered[:, :-1]).sum()), 0.0, "none"),
                close("scores", scores, exact),
            ]

        return check

    def ours(backend: Backend | None) -> Callable[[], Found]:
        def run() -> Found:
            scores, indices = search_topk(queries[None], keys[None], size.k, backend=backend)
            return scores[0], indices[0]

        return run

    measurements = [
        measure(OURS, lambda: ours(None), verify(close_by), device),
        measure(REFERENCE, lambda: ours("torch"), verify(close_by), device),
        measure(MATMUL, lambda: lambda: plain_search(queries, keys, size.k), verify(rounded), device),
        measure(
            PRODUCT,
            lambda: lambda: product(queries, keys),
            lambda last: [close("product", last, queries.double() @ keys[-last.shape[1] :].double().mT)],
            device,
        ),
    ]
    faiss = import_faiss()
    if faiss is not None:
        on_gpu = device.type == "cuda" and hasattr(faiss, "GpuIndexFlatIP")
        measurements.append(
            measure(
                FAISS if on_gpu else FAISS_CPU,
                lambda: faiss_search(faiss, queries, keys, size.k, on_gpu),
                verify(close_by),
                device,
                graph=False,
            )
        )
    return Work(
        f"search {size.n} x {size.m}",
        f"{size.n:,} queries, {size.m:,} keys of {size.e}, k = {size.k}",
        size.reach,
        floor_bytes=(queries.numel() + keys.numel()) * queries.itemsize,
        input_bytes=(queries.numel() + keys.numel()) * queries.itemsize,
        measurements=measurements,
    )


def exact_best(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """The k highest scores of each query in float64, in descending order: [n, k]."""
    best = torch.empty(len(queries), 0, dtype=torch.float64, device=queries.device)
    for part in keys.split(EXACT_AT_ONCE // len(queries)):  # type: ignore[no-untyped-call]
        best = torch.cat([best, queries.double() @ part.double().mT], -1)
        best = best.topk(min(k, best.shape[1])).values
    return best


def plain_search(queries: Tensor, keys: Tensor, k: int) -> Found:
    """By what PyTorch has for it: a product and a topk for each block of keys, then a topk of those."""
    scores, indices, first = [], [], 0
    for part in keys.split(SCORES_AT_ONCE // len(queries)):  # type: ignore[no-untyped-call]
        values, places = (queries @ part.mT).topk(min(k, len(part)))
        scores.append(values)
        indices.append(places + first)
        first += len(part)
    values, places = torch.cat(scores, -1).topk(k)
    return values, torch.cat(indices, -1).gather(-1, places)


def product(queries: Tensor, keys: Tensor) -> Tensor:
    """All scores, a block of keys at a time; those of the last block."""
    scores = queries.new_empty(0)
    for part in keys.split(SCORES_AT_ONCE // len(queries)):  # type: ignore[no-untyped-call]
        scores = queries @ part.mT
    return scores


def import_faiss() -> Any:
    """The module, or None where it is not installed or does not load."""
    try:
        import faiss
    except (ImportError, RuntimeError):
        return None
    return faiss


def faiss_search(faiss: Any, queries: Tensor, keys: Tensor, k: int, on_gpu: bool) -> Callable[[], Found]:
    """A search of faiss over all keys, which it has taken over before."""
    e = keys.shape[1]
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), e) if on_gpu else faiss.IndexFlatIP(e)
    index.add(keys.float().cpu().numpy())
    host = queries.float().cpu().numpy()

    def run() -> Found:
        scores, indices = index.search(host, k)
        return torch.from_numpy(scores), torch.from_numpy(indices)

    return run


if __name__ == "__main__":
    sys.exit(main())
