"""How fast routing is: one table, beside the physical floor and what else does the same work, in one run.

    python benchmarks/routing.py                    on a GPU; three minutes, then the picture
    python benchmarks/routing.py --quick            the table alone, without colt5-attention; under a minute
    python benchmarks/routing.py --tiny             on a CPU, to see that it runs: its times mean nothing

Beside colt5-attention, each release in a folder of its own:

    pip install --no-deps --target peer-0.7.2 -r benchmarks/requirements-peers-0.7.2.txt
    pip install --no-deps --target peer-0.11.2 -r benchmarks/requirements-peers-0.11.2.txt
    python benchmarks/routing.py --peer-072 peer-0.7.2 --peer-0112 peer-0.11.2

It writes to --out: routing.csv, with everything that was measured and how, and routing.png, the time over the
number of memories. No speed is printed of a result that was not checked first; where a check is red, the
error stands in its place, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from measurement import Measurement
from routing_layer import DTYPE, routed_attention, stored_attention, sweep
from routing_ops import descent, gradient_error, scores, soft_topk
from routing_report import PEERS, Machine, Point, Work, draw, failures, table, write_csv
from routing_settings import TINY, Sizes
from timing import copy_rate, on_one_stream

PEER_SECONDS = 120  # after which the process of a peer is given up


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    device: torch.device
    quick: bool
    tiny: bool
    peers: dict[str, Path]  # version: folder


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes, device = TINY if options.tiny else Sizes(), options.device
    steps: dict[str, Callable[[], list[Work]]] = {
        "coordinate descent": lambda: descent(sizes, device),
        "soft_topk": lambda: soft_topk(sizes, device),
        "scores": lambda: scores(sizes, device),
        "layer": lambda: routed_attention(sizes, device),
        "layer with stored scores": lambda: list(stored_attention(sizes, device)),
        "gradient error": lambda: [gradient_error(sizes, device)],
    }
    works: list[Work] = []
    points: list[Point] = []
    progress = Progress()
    with on_one_stream(device):
        machine = describe(device, sizes)
        for name, step in steps.items():
            with progress.step(name):
                works += step()
        for version, folder in options.peers.items():
            with progress.step(f"colt5-attention {version}"):
                add_peer(works, version, folder, options)
        # Before the sweep, which takes most of the memory.
        print(table(works, machine), flush=True)
        write_csv(options.out / "routing.csv", works, points, machine)
        if not options.quick:
            with progress.step("sweep"):
                for point in sweep(sizes, device):
                    progress(f"{point.line} at {point.m:,} memories")
                    points.append(point)
        if points:
            write_csv(options.out / "routing.csv", works, points, machine)
            draw(options.out / "routing.png", points, sizes.dim * DTYPE.itemsize, machine)
    progress("done")
    wrong = failures(works, points) + progress.broken
    if wrong:
        print("\n" + "\n".join(wrong))
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> Options:
    """The options, or an exit with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder of the CSV and the picture"
    )
    parser.add_argument("--quick", action="store_true", help="the table alone, without colt5-attention")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU takes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    folders = {"0.7.2": "072", "0.11.2": "0112"}
    for version, short in folders.items():
        parser.add_argument(
            f"--peer-{short}",
            type=Path,
            metavar="FOLDER",
            default=os.environ.get(f"XLROUTE_PEER_{short}"),
            help=f"where colt5-attention {version} lies; default: the variable XLROUTE_PEER_{short}",
        )
    given = parser.parse_args(arguments)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, found none")
    if device.type == "cpu" and not given.tiny:
        parser.error("--tiny: expected on a CPU, where the full sizes would take hours")
    peers: dict[str, Path] = {}
    for version, short in folders.items():
        folder = getattr(given, f"peer_{short}")
        if folder is None or given.quick:
            continue
        if not (folder / "colt5_attention").is_dir():
            parser.error(f"--peer-{short}: expected a folder that holds colt5_attention, got {folder}")
        peers[version] = folder
    return Options(given.out, device, given.quick, given.tiny, peers)


class Progress:
    """Says on stderr what is being measured, and when; one step that breaks does not end the run.

    Attributes:
        broken: the steps that broke, and how.
    """

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.broken: list[str] = []

    def __call__(self, what: str) -> None:
        """One line, with the seconds since the start."""
        print(f"[{time.monotonic() - self.start:5.1f} s] {what}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce what is done inside, and note it if it breaks."""
        self(name)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.broken.append(f"{name}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")


def describe(device: torch.device, sizes: Sizes) -> Machine:
    """The device, the versions, the date, and how fast memory is copied."""
    rate = copy_rate(sizes.copy_bytes, device)
    facts = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU {platform.machine()}",
        "copy rate": f"{rate / 1e9:,.4g} GB/s read plus written",
        "xlroute": _version("xlroute"),
        "PyTorch": torch.__version__,
        "Triton": _version("triton"),
        "CUDA": torch.version.cuda or "none",
        "Python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None
    return Machine(facts, rate, cache)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def add_peer(works: list[Work], version: str, folder: Path, options: Options) -> None:
    """Measure a release of colt5-attention in a process of its own, and add what it did to the works."""
    if options.device.type == "cuda":
        torch.cuda.empty_cache()  # for the other process
    measured = run_peer(version, folder, options)
    # The memory is that of forward and backward.
    measured["layer memory"] = measured.get("layer forward + backward")
    for work in works:
        result = measured.get(work.key)
        if result is not None:
            work.measurements.append(result)


def run_peer(version: str, folder: Path, options: Options) -> dict[str, Measurement | None]:
    """What the process of a release measured; the failure in all of its places if it broke."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("peers.py")),
        version,
        "--device",
        options.device.type,
    ]
    path = os.pathsep.join(filter(None, (str(folder.resolve()), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if options.tiny else [])],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=PEER_SECONDS,
            check=True,
        )
        values = json.loads(done.stdout.splitlines()[-1])
        return {key: Measurement.from_json(each) for key, each in values.items()}
    except subprocess.CalledProcessError as error:
        failure = (error.stderr.splitlines() or ["no message"])[-1]
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        failure = f"{type(error).__name__}: {error}"
    keys = {"0.7.2": ("layer forward", "layer forward + backward")}.get(
        version, ("descent forward", "descent backward", "gradient error")
    )
    (subject,) = (name for name in PEERS if name.endswith(f" {version}"))
    return {key: Measurement(subject, failure=failure) for key in keys}


if __name__ == "__main__":
    sys.exit(main())
