"""Files of a store that are damaged at random, and whether anything wrong is read then."""

from __future__ import annotations

import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crash_work import Contents, History, Step, WrongError, create, number_of, scores_of, tokens_of

from xlroute.memory import CommitNotFoundError, Eviction, MemoryStore, MemoryStoreError
from xlroute.memory.layout import EVICTIONS

STEPS = 30
EXAMINED = 2  # commits that are read after each damage
WRITTEN = 0.1  # of all damages, those after which a writer goes on, and the store is repaired
KINDS = ("flipped", "cut off", "made longer", "removed")
SCORES = "scores"
WARNING = "the scores are computed anew: "


def damage_files(folder: Path, times: int, seed: int, tick: Callable[[], object]) -> Counter[str]:
    """Damages one file at a time, reads the store, and restores the file.

    Args:
        folder: where the store goes.
        times: how often.
        seed: of what the store holds and what is damaged.
        tick: called after each.

    Returns:
        How often which came of it: "refused", "scored anew" or "harmless" for what was read, and "gone on"
        or "repaired" for what was written.

    Raises:
        WrongError: Something wrong was read, or refused without naming the file.
    """
    folder.mkdir(parents=True)
    path, copy = folder / "store", folder / "copy"
    chance = random.Random(seed)
    eviction = chance.choice(EVICTIONS)
    history = History(seed, eviction)
    commits = _make(path, seed, history, eviction)
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    found: Counter[str] = Counter()
    for _ in range(times):
        name = chance.choice(files)
        file = path / name
        data = file.read_bytes()
        kind = chance.choice(KINDS)
        _damage(file, data, kind, chance)
        chosen = chance.sample([*commits], EXAMINED)
        try:
            found[_read(path, file, {each: commits[each] for each in chosen})] += 1
            if chance.random() < WRITTEN:
                shutil.copytree(path, copy)
                found[_write(copy, copy / name, seed, history)] += 1
                shutil.rmtree(copy)
        except BaseException as error:
            error.add_note(f"{file}: {kind}")
            raise
        file.write_bytes(data)
        tick()
    for commit, contents in commits.items():
        with MemoryStore.open(path, commit=commit) as store:
            contents.check(store)
    return found


def _make(path: Path, seed: int, history: History, eviction: Eviction) -> dict[str, Contents]:
    """Makes a store with scores, a pin, shards of both kinds and a few commits; what the commits hold."""
    create(path, keep_commits=4, eviction=eviction)
    with MemoryStore.open(path, mode="r+") as store:
        for number in range(STEPS):
            _take(Step.of(seed, number), store, number)
            if number == STEPS // 3:
                store.pin(_commit(store, number + 1))
            if number == STEPS - 5:
                _commit(store, number + 1)
                store.compact(compression="zstd")
        _commit(store, STEPS, durable=True)
        store.compact()
        commits = store.commits()
    contents = {}
    for commit in commits:
        with MemoryStore.open(path, commit=commit) as store:
            contents[commit] = history.at(number_of(store))
    return contents


def _take(step: Step, store: MemoryStore, number: int) -> None:
    """Takes a step whose commits nobody needs to know."""
    for _ in step.take(store, number):
        pass


def _commit(store: MemoryStore, number: int, *, durable: bool = False) -> str:
    """Commits a store that stands at the number, with scores."""
    scores_of(store, tokens_of(number - 1))
    store.fingerprint = str(number)
    return store.commit(durable=durable)


def _damage(file: Path, data: bytes, kind: str, chance: random.Random) -> None:
    """Damages a file that holds the data."""
    if kind == "removed":
        file.unlink()
    elif kind == "made longer" or not data:
        file.write_bytes(data + chance.randbytes(chance.randint(1, 9)))
    elif kind == "cut off":
        file.write_bytes(data[: chance.randrange(len(data))])
    else:
        place = chance.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ chance.randint(1, 255)]) + data[place + 1 :])


def _read(path: Path, file: Path, commits: dict[str, Contents]) -> str:
    """Reads commits of a store in which a file is damaged, and has it verified."""
    refused = scored_anew = False
    for commit, contents in commits.items():
        with _scored_anew(path, file) as anew:
            try:
                with MemoryStore.open(path, commit=commit) as store:
                    for check in contents.checks(store):
                        try:
                            check()
                        except MemoryStoreError as error:
                            refused |= _check_refusal(error, file, commit)
            except MemoryStoreError as error:
                refused |= _check_refusal(error, file, commit)
        scored_anew |= bool(anew)
    if refused and SCORES in file.relative_to(path).parts:
        raise WrongError(f"{file}: expected scores to be computed anew, got a refusal")
    try:
        report = MemoryStore.verify(path, all_commits=True)
    except MemoryStoreError as error:
        _check_refusal(error, file, None)
    else:
        if not all(str(file) in f"{damage.path} {damage.problem}" for damage in report.damage):
            raise WrongError(f"{file}: expected it to be all that is damaged, got {report.damage}")
        if refused and report.ok and file.exists():
            raise WrongError(f"{file}: expected it to be reported, got a report without damage")
    return "refused" if refused else "scored anew" if scored_anew else "harmless"


def _write(path: Path, file: Path, seed: int, history: History) -> str:
    """Writes to a store in which a file is damaged; where that is refused, has it repaired."""
    try:
        with _scored_anew(path, file), MemoryStore.open(path, mode="r+") as store:
            number = number_of(store)
            for step in (Step.of(seed, number), Step.of(seed, number + 1)):
                _take(step, store, number)
                number += 1
                _commit(store, number)
            history.at(number).check(store)
        with _scored_anew(path, file), MemoryStore.open(path) as store:
            history.at(number).check(store)
    except MemoryStoreError as error:
        _check_refusal(error, file, None)
        if SCORES in file.relative_to(path).parts:
            raise WrongError(f"{file}: expected a writer that goes on, got a refusal") from error
    else:
        return "gone on"
    try:
        MemoryStore.repair(path)
    except MemoryStoreError as error:
        _check_refusal(error, file, None)
        return "beyond repair"
    if not (report := MemoryStore.verify(path)).ok:
        raise WrongError(f"{file}: expected no damage after a repair, got {report.damage}")
    with MemoryStore.open(path) as store:
        history.at(number_of(store)).check_some(store)
    return "repaired"


def _check_refusal(error: MemoryStoreError, file: Path, commit: str | None) -> bool:
    """Whether it is more than that a commit is gone; raises WrongError unless the error names the file."""
    if isinstance(error, CommitNotFoundError) and file.stem == commit and not file.exists():
        return False
    if str(file) not in str(error):
        raise WrongError(f"{file}: expected a refusal that names it, got {error!r}") from error
    return True


@contextmanager
def _scored_anew(path: Path, file: Path) -> Iterator[list[str]]:
    """Notes of what inside is scored anew; raises WrongError where that is not because of the file."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        yield notes
    for warning in noted:
        text = str(warning.message)
        if (
            not text.startswith(WARNING)
            or str(file) not in text
            or SCORES not in file.relative_to(path).parts
        ):
            raise WrongError(f"{file}: expected no warning but of it, got {text}")
        notes.append(text)
