"""Writers that are killed at random instants, and whether the store is what the last commit left."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from crash_work import History, Made, Step, WrongError, create, number_of

from xlroute.memory import Eviction, MemoryStore

KEEP = 3
SECONDS = 0.12  # after which a writer is killed at the latest
CALLS = 500  # of the operating system, of which it dies in one at the latest
# What a writer changes files with.
NAMES = ("open", "pwrite", "ftruncate", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


class Killed(NamedTuple):
    """What came of the writers.

    Attributes:
        rounds: how many were killed.
        told: how many commits they were told of.
        untold: how many commits stood that nobody had been told of yet.
    """

    rounds: int
    told: int
    untold: int


class Told(NamedTuple):
    """What somebody was told of a commit: the number that it is at, and whether it is durable."""

    number: int
    durable: bool


def kill_writers(
    path: Path, rounds: int, seed: int, tick: Callable[[], object], eviction: Eviction
) -> Killed:
    """Kills as many writers, one after the other, and examines the store after each.

    Args:
        path: where the store goes.
        rounds: how many.
        eviction: which rows leave the store first.
        seed: of the steps and the instants.
        tick: called after each.

    Raises:
        WrongError: A commit that a writer was told of is lost, or one does not hold what it must.
        MemoryStoreError: The store cannot be read or written.
    """
    chance = random.Random(seed)
    history = History(seed, eviction)
    standing = {create(path, keep_commits=KEEP, eviction=eviction): Told(0, durable=False)}
    told = untold = 0
    for _ in range(rounds):
        back = chance.choice([*standing]) if chance.random() < 0.2 else None
        new = _killed_writer(path, seed, back, chance)
        expected = standing | new
        standing = _examine(path, expected, history)
        told += len(new)
        untold += len(standing.keys() - expected.keys())
        if chance.random() < 0.1:
            report = MemoryStore.repair(path)
            if report.losses or report.damage or report.restored or report.set_aside:
                raise WrongError(f"{path}: expected nothing to repair, got {report}")
            if left := MemoryStore.verify(path).leftovers:
                raise WrongError(f"{path}: expected no leftovers after a repair, got {left}")
        tick()
    return Killed(rounds, told, untold)


def _killed_writer(path: Path, seed: int, back: str | None, chance: random.Random) -> dict[str, Told]:
    """A writer that goes on, or goes back to a commit, until it dies; the commits that it was told of."""
    at_call = chance.randrange(CALLS) if chance.random() < 0.5 else None
    seconds = chance.uniform(0, SECONDS)
    instants = chance.getrandbits(32)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        if at_call is not None:
            die_in_call(at_call, random.Random(instants))
        _write_on(path, seed, back, writing)
    os.close(writing)
    if at_call is None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise WrongError(f"{path}: expected a writer that goes on until it is killed, got status {status}")
    told = (line.split() for line in lines)
    return {name: Told(int(number), durable == "True") for name, number, durable in told}


def _write_on(path: Path, seed: int, back: str | None, pipe: int) -> NoReturn:
    """Takes step after step, in a process of its own, and writes to the pipe what it was told."""
    try:
        with MemoryStore.open(path, mode="r+", commit=back) as store:
            number = number_of(store)
            # Going back is a commit.
            info = store.info().commits[-1]
            _tell(pipe, Made(info.id, number, info.durable))
            while True:
                for made in Step.of(seed, number).take(store, number):
                    _tell(pipe, made)
                number += 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _tell(pipe: int, made: Made) -> None:
    os.write(pipe, f"{made.commit} {made.number} {made.durable}\n".encode())


def die_in_call(last: int, chance: random.Random) -> None:
    """Makes this process kill itself in call number `last` that changes files: before, amid or after it."""
    left = last

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if name == "pwrite":
                    file, data, offset = arguments
                    real(file, data[: chance.randint(0, len(data))], offset)
                elif chance.random() < 0.5:
                    real(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in NAMES:
        setattr(os, name, dying(name, getattr(os, name)))


def _examine(path: Path, told: dict[str, Told], history: History) -> dict[str, Told]:
    """Compares every commit of the store with what it must hold; returns all of them.

    Raises:
        WrongError: One holds something else, or one that somebody was told of is lost.
    """
    report = MemoryStore.verify(path, all_commits=True)
    if not report.ok:
        raise WrongError(f"{path}: expected no damage, got {report.damage}")
    standing = {}
    with MemoryStore.open(path) as store:
        commits = store.info().commits
    for info in commits:
        with MemoryStore.open(path, commit=info.id) as store:
            standing[info.id] = Told(number_of(store), info.durable)
            history.at(number_of(store)).check(store)
        if told.get(info.id, standing[info.id]) != standing[info.id]:
            raise WrongError(f"{path}: expected {info.id} to be {told[info.id]}, got {standing[info.id]}")
    untold = standing.keys() - told.keys()
    if len(untold) > 1 or min(untold, default="~") < max(told):
        raise WrongError(f"{path}: expected at most one commit after {max(told)}, got {[*untold]}")
    last = _generation(max(standing))
    must = {name for name in told if _generation(name) > last - KEEP}
    newest = max((name for name in told if told[name].durable), default=None)
    if newest is not None and not any(standing[name].durable for name in untold):
        must.add(newest)
    if not must <= standing.keys():
        raise WrongError(f"{path}: expected {sorted(must)} to stand, got {sorted(standing)}")
    history.forget(min(number for number, _ in standing.values()))
    return standing


def _generation(commit: str) -> int:
    """The place of a commit in the order of commits."""
    return int(commit[:12])
