"""Whether a memory survives: writers killed at any instant, damaged files, readers beside a writer.

    python benchmarks/crash.py                                                 1,000 writers are killed
    python benchmarks/crash.py --rounds 50 --damage 300 --readers 3            half a minute, on one core
    python benchmarks/crash.py --damage 10000 --readers 60                     the whole

Writers append, reset, evict by each of the policies, score, commit and compact, and go back to earlier
commits, until they are killed: by the clock, or in the middle of a call that changes a file. After each, the
store must open at a commit that holds what it must, bit for bit, and every commit that a writer was told of
must stand. With
--damage, a byte of a file is changed, or the file is cut off or removed, as often: what is read must be right
or refused by the name of the file. With --readers, processes read whole commits beside a writer for as many
seconds.

It prints a line for each. What went wrong is printed with the place of the store, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from crash_damage import damage_files
from crash_kill import kill_writers
from crash_readers import read_beside_a_writer
from crash_work import prepare
from tqdm import tqdm

from xlroute.memory.layout import EVICTIONS


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(arguments)
    # Processes are forked: with one thread each, and none that shows progress beside them.
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    prepare()
    folder = Path(tempfile.mkdtemp(prefix="xlroute-crash-"))
    print(f"seed {options.seed}", file=sys.stderr)
    soaks: list[tuple[str, int, str, Callable[[Path, int, int, Callable[[], object]], str]]] = [
        ("kill", options.rounds, "writer", killed),
        ("damage", options.damage, "file", damaged),
        ("readers", options.readers, "s", undisturbed),
    ]
    for name, amount, unit, soak in soaks:
        if not amount:
            continue
        path = folder / name
        start = time.monotonic()
        try:
            with warnings.catch_warnings(), tqdm(total=amount, unit=f" {unit}", desc=name) as bar:
                warnings.simplefilter("error")
                line = soak(path, amount, options.seed, bar.update)
        except Exception:
            traceback.print_exc()
            print(f"{name}: FAILED with --seed {options.seed}; the store is at {path}")
            return 1
        print(f"{name}: {line}; {time.monotonic() - start:.0f} s", flush=True)
    shutil.rmtree(folder)
    return 0


def killed(path: Path, rounds: int, seed: int, tick: Callable[[], object]) -> str:
    """Kills writers, of stores of each policy of eviction in turn; a line on what came of it."""
    path.mkdir()
    results = []
    for number, eviction in enumerate(EVICTIONS):
        share = rounds // len(EVICTIONS) + (number < rounds % len(EVICTIONS))
        results.append(kill_writers(path / eviction, share, seed, tick, eviction))
    killed, told, untold = (sum(numbers) for numbers in zip(*results, strict=True))
    return (
        f"{killed:,} writers killed, {told:,} commits acknowledged, none lost, and "
        f"{untold:,} that stood before anyone was told"
    )


def damaged(path: Path, times: int, seed: int, tick: Callable[[], object]) -> str:
    """Damages files; a line on what came of it."""
    found = damage_files(path, times, seed, tick)
    read, written = (
        ", ".join(f"{found[each]:,} times {each}" for each in names)
        for names in (("refused", "scored anew", "harmless"), ("gone on", "repaired", "beyond repair"))
    )
    return f"{times:,} damaged files, nothing wrong read: {read}; written to after some: {written}"


def undisturbed(path: Path, seconds: int, seed: int, tick: Callable[[], object]) -> str:
    """Reads beside a writer; a line on what came of it."""
    seen = read_beside_a_writer(path, seconds, seed, tick)
    return (
        f"{seen.written:,} commits written, {seen.read:,} read as a whole beside the writer, none torn, and "
        f"{seen.dropped:,} dropped while they were read"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, or an exit with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000, help="writers to kill (default: 1,000)")
    parser.add_argument("--damage", type=int, default=0, help="files to damage (default: 0)")
    parser.add_argument(
        "--readers",
        type=int,
        default=0,
        metavar="SECONDS",
        help="how long to read beside a writer (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args(arguments)
    for name in ("rounds", "damage", "readers", "seed"):
        if getattr(given, name) < 0:
            parser.error(f"--{name}: expected 0 or more, got {getattr(given, name)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
