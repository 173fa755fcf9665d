"""Processes that read whole commits beside a writer, and whether each is what the commit must hold."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from crash_work import History, Step, WrongError, create, number_of

from xlroute.memory import CommitNotFoundError, MemoryStore

READERS = 2
KEEP = 2  # few, so that commits are dropped while they are read
PAUSE = 0.02  # after each commit, so that some are still there when they are read


class Seen(NamedTuple):
    """What came of it.

    Attributes:
        written: commits that the writer made.
        read: commits that the readers read as a whole.
        dropped: commits that the writer dropped while they were read.
    """

    written: int
    read: int
    dropped: int


def read_beside_a_writer(path: Path, seconds: float, seed: int, tick: Callable[[], object]) -> Seen:
    """Lets a writer and a few readers run at the same time, each a process of its own.

    Args:
        path: where the store goes.
        seconds: for how long.
        seed: of the steps.
        tick: called every second.

    Raises:
        WrongError: A reader has read something else than a commit, or somebody gave up.
    """
    create(path, keep_commits=KEEP)
    stop = time.monotonic() + seconds
    processes = [_started(lambda: _write(path, seed, stop))]
    processes += [_started(lambda: _read(path, seed, stop)) for _ in range(READERS)]
    while time.monotonic() < stop:
        time.sleep(min(1.0, max(0.0, stop - time.monotonic())))
        tick()
    told, codes = [], []
    for child, pipe in processes:
        with os.fdopen(pipe) as lines:
            told.append([int(word) for word in lines.read().split()])
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if any(codes):
        raise WrongError(
            f"{path}: expected a writer and readers that find nothing wrong, got exit codes {codes}"
        )
    return Seen(told[0][0], sum(each[0] for each in told[1:]), sum(each[1] for each in told[1:]))


def _started(work: Callable[[], tuple[int, ...]]) -> tuple[int, int]:
    """A process that works and writes the numbers that it returns to a pipe: its id, and the pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work(work, writing)
    os.close(writing)
    return child, reading


def _work(work: Callable[[], tuple[int, ...]], pipe: int) -> NoReturn:
    code = 1
    try:
        os.write(pipe, " ".join(map(str, work())).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _write(path: Path, seed: int, stop: float) -> tuple[int]:
    """Takes step after step; the number of commits."""
    written = 0
    with MemoryStore.open(path, mode="r+") as store:
        number = number_of(store)
        while time.monotonic() < stop:
            for _ in Step.of(seed, number).take(store, number):
                written += 1
                time.sleep(PAUSE)
            number += 1
    return (written,)


def _read(path: Path, seed: int, stop: float) -> tuple[int, int]:
    """Reads the last commit again and again; how many as a whole, and how many were dropped meanwhile."""
    history = History(seed)
    read = dropped = 0
    while time.monotonic() < stop:
        with MemoryStore.open(path) as store:
            contents = history.at(number_of(store))
            try:
                for check in contents.checks(store):
                    check()
                    # Time for the writer to go on in between.
                    time.sleep(PAUSE / 4)
                read += 1
            except CommitNotFoundError:
                dropped += 1
        history.forget(contents.number)
    return read, dropped
