"""Writers of a store in an object store: killed, replaced and refused, at every request that they make."""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from xlroute.memory import (
    CorruptionError,
    MemoryStore,
    S3Path,
    StoreExistsError,
    StoreLockedError,
    StoreWriteError,
    shards,
)
from xlroute.memory.shards import list_shards, shard_name

Act = Callable[[], None]
# What puts, and what deletes.
WRITES = ("swap", "write_bytes", "delete", "writing")


class Killed(BaseException):
    """The process has ended."""


@pytest.fixture
def url(quick_bucket: str) -> str:
    return f"{quick_bucket}/store"


def create(url: str, **options: Any) -> MemoryStore:
    """A store of one layer and one stream, with chunk files of 4 rows."""
    return MemoryStore.create(
        url, layers=1, streams=1, dim=3, chunk_bytes=48, **{"keep_commits": 2, **options}
    )


def numbered(store: MemoryStore, count: int, first: int) -> None:
    """Appends rows that hold the numbers from `first` on."""
    store.append(torch.arange(first, first + count).float()[None, None, :, None].expand(1, 1, count, 3))


def held(store: MemoryStore) -> list[int]:
    rows = store.rows(0)[0][0]
    assert torch.equal(rows, rows[:, :1].expand(-1, 3))
    return [int(number) for number in rows[:, 0]]


def read(url: str, **options: Any) -> list[int]:
    with MemoryStore.open(url, **options) as store:
        return held(store)


@contextmanager
def before_write(number: int, act: Act, *, after: bool = False, on: bool = False) -> Iterator[list[str]]:
    """Calls `act` before, or after, the write of this number, from 0; gives what has been written.

    With `on` it is called at those that follow, too.
    """
    done: list[str] = []
    acting = False

    @contextmanager
    def noted(text: str) -> Iterator[None]:
        nonlocal acting
        if acting:
            yield
            return
        done.append(text)
        due = len(done) == number + 1 or (on and len(done) > number)
        for moment in (False, True):
            if due and after == moment:
                acting = True
                try:
                    act()
                finally:
                    acting = False
            if not moment:
                yield

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(S3Path, name)

        def write(path: S3Path, *arguments: Any) -> Any:
            with noted(f"{name} {path}"):
                return real(path, *arguments)

        @contextmanager
        def writing(path: S3Path) -> Iterator[Callable[[bytes], None]]:
            with noted(f"{name} {path}"), real(path) as part:
                yield part

        return writing if name == "writing" else write

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(S3Path, name, wrapped(name))
        yield done


def fail() -> None:
    raise OSError("no answer")


def take_over(url: str) -> MemoryStore:
    assert MemoryStore.unlock(url)
    return MemoryStore.open(url, mode="r+")


def test_the_second_writer_is_told(bucket: str) -> None:
    url = f"{bucket}/store"
    with create(url) as store:
        for _ in range(2):
            with pytest.raises(StoreLockedError, match=rf"process {os.getpid()} on .*unlock {url}"):
                MemoryStore.open(url, mode="r+")
        assert MemoryStore.verify(url).writer
        numbered(store, 2, 0)
        store.commit()
    with MemoryStore.open(url, mode="r+") as store:
        assert held(store) == [0, 1]
    assert MemoryStore.verify(url).writer is None


@pytest.mark.parametrize("answer", ["refused", "lost"])
def test_a_commit_that_fails_at_any_request_loses_nothing(url: str, answer: str) -> None:
    failed = 0
    with create(url) as store:
        total = 0
        for number in range(20):
            for _ in range(2):
                # So that there is something to drop, and to delete.
                store.reset([0])
                numbered(store, 6, total)
                total += 6
                store.commit()
            before, kept = store.commits(), held(store)
            numbered(store, 3, total)
            with before_write(number, fail, after=answer == "lost") as done:
                try:
                    commit = store.commit()
                except StoreWriteError:
                    failed += 1
                    assert store.commits() == before
                    assert read(url) == kept
                else:
                    assert store.commits()[-1] == commit
            total += 3
            expected = [*kept, *range(total - 3, total)]
            assert held(store) == expected
            store.commit()
            assert read(url) == expected
            if len(done) <= number:
                break
    assert failed >= 3
    assert MemoryStore.verify(url, all_commits=True).ok
    assert not MemoryStore.verify(url).leftovers
    assert read(url) == expected


@pytest.mark.parametrize("when", ["commit", "close", "open"])
def test_a_commit_whose_record_could_not_be_put_is_carried_out_later(url: str, when: str) -> None:
    real = S3Path.write_bytes

    def write_bytes(path: S3Path, data: bytes) -> None:
        if path.name.startswith("0000"):
            raise OSError("no answer")
        real(path, data)

    store = create(url)
    numbered(store, 2, 0)
    last = store.commit()
    numbered(store, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Path, "write_bytes", write_bytes)
        with pytest.raises(StoreWriteError, match="the commit is made"):
            store.commit()
        assert store.commits()[-1] == last
        assert read(url) == [0, 1]
        numbered(store, 6, 3)
        with pytest.raises(StoreWriteError):
            store.commit()
        if when == "open":
            store.close()
            assert read(url) == [0, 1]
    if when == "commit":
        store.commit()
        assert read(url) == [*range(9)]
    store.close()
    with MemoryStore.open(url, mode="r+") as store:
        assert held(store) == [*range(9 if when == "commit" else 3)]
        [*_, made] = store.commits()
        assert int(made[:12]) == (5 if when == "commit" else 3)
        numbered(store, 6, 50)
        store.commit()
    assert MemoryStore.verify(url, all_commits=True).ok


def test_an_append_that_fails_changes_nothing(url: str) -> None:
    with create(url) as store:
        numbered(store, 6, 0)
        for number in range(8):
            with before_write(number, fail) as done, suppress(StoreWriteError):
                numbered(store, 9, 6)
                break
            assert held(store) == [*range(6)]
        assert len(done) == number > 3
        assert held(store) == [*range(15)]
        store.commit()
    assert read(url) == [*range(15)]
    assert MemoryStore.verify(url).ok


@pytest.mark.parametrize("place", ["quick_bucket", "bucket"])
def test_a_writer_that_is_replaced_at_any_request_commits_no_more(
    place: str, request: pytest.FixtureRequest
) -> None:
    url = f"{request.getfixturevalue(place)}/store"
    outcomes = set()
    # Of the requests to a server one before the commit and the one after it.
    for number in range(20) if place == "quick_bucket" else (random.randrange(3), 3):
        path = f"{url}-{number}"
        store = create(path)
        for start in (0, 4):
            numbered(store, 4, start)
            store.commit()
        numbered(store, 2, 8)
        store.commit()
        numbered(store, 5, 10)
        second: list[MemoryStore] = []

        def act(path: str = path, second: list[MemoryStore] = second) -> None:
            second.append(take_over(path))
            numbered(second[0], 7, 100)
            second[0].commit()

        made = None
        with before_write(number, act) as done, suppress(StoreLockedError):
            made = store.commit()
        if not second:
            assert len(done) <= number
            break
        outcomes.add(made is not None)
        expected = [*range(15 if made else 10), *range(100, 107)]
        assert held(second[0]) == expected
        for attempt in range(2):
            with suppress(StoreLockedError):
                numbered(store, 4, 50)
            with pytest.raises(StoreLockedError, match="taken over"):
                store.commit()
            numbered(second[0], 3, 200 + attempt)
            expected += range(200 + attempt, 203 + attempt)
            second[0].commit()
        assert read(path) == held(second[0]) == expected
        store.close()
        with pytest.raises(StoreLockedError):
            MemoryStore.open(path, mode="r+")
        second[0].close()
        names = [name[:12] for name in second[0]._disk.list_commits()] if second[0]._disk else []
        assert len({*names}) == len(names)
        assert MemoryStore.verify(path, all_commits=True).ok
    assert outcomes == {True, False}


def test_a_killed_writer_leaves_its_last_commit_or_the_next(url: str) -> None:
    found = set()
    for number in range(20):
        path = f"{url}-{number}"
        store = create(path)
        for start in (0, 4):
            numbered(store, 4, start)
            store.commit()
        numbered(store, 6, 8)

        def kill() -> None:
            raise Killed

        dead = False
        with before_write(number, kill) as done:
            try:
                store.commit()
            except Killed:
                dead = True
        if not dead:
            assert len(done) <= number
            break
        assert read(path) in ([*range(8)], [*range(14)])
        with pytest.raises(StoreLockedError, match="unlock"):
            MemoryStore.open(path, mode="r+")
        with take_over(path) as store:
            kept = held(store)
            found.add(len(kept))
            assert kept in ([*range(8)], [*range(14)])
            assert read(path) == kept
            numbered(store, 9, 100)
            store.commit()
            store.commit()
        assert read(path) == [*kept, *range(100, 109)]
        report = MemoryStore.verify(path, all_commits=True)
        assert report.ok
        assert not report.leftovers
    assert found == {8, 14}


def test_a_writer_that_is_replaced_before_it_has_written_anything(url: str) -> None:
    with create(url) as store:
        numbered(store, 2, 0)
        store.commit()
    first = MemoryStore.open(url, mode="r+")
    with take_over(url) as second:
        numbered(second, 1, 2)
        second.commit()
        # The last chunk, which it reads now, is the second one's.
        with pytest.raises(StoreLockedError, match="taken over"):
            numbered(first, 2, 50)
        with pytest.raises(StoreLockedError, match="taken over"):
            first.commit()
        assert read(url) == held(second) == [0, 1, 2]


def test_a_request_that_is_carried_out_late_changes_nothing(url: str) -> None:
    for number in range(20):
        path = f"{url}-{number}"
        store = create(path)
        for start in (0, 4):
            numbered(store, 4, start)
            store.commit()
        numbered(store, 6, 8)
        late: list[Act] = []
        with late_write(number, late), suppress(StoreWriteError):
            store.commit()
        if not late:
            break
        with take_over(path) as second:
            kept = held(second)
            assert kept in ([*range(8)], [*range(14)])
            numbered(second, 7, 100)
            second.commit()
            late[0]()
            numbered(second, 3, 200)
            second.commit()
            assert read(path) == held(second) == [*kept, *range(100, 107), *range(200, 203)]
            generations = [name[:12] for name in second.commits()]
            assert len({*generations}) == len(generations)
        assert MemoryStore.verify(path, all_commits=True).ok
    assert number > 5


@pytest.mark.parametrize("what", ["replaced", "refused", "lost", "late"])
def test_positions_are_as_safe_as_rows(url: str, what: str) -> None:
    policy: dict[str, Any] = {"capacity": 8, "eviction": "every_nth", "keep_every": 3}

    def both(store: MemoryStore, twin: MemoryStore, count: int, first: int) -> None:
        numbered(store, count, first)
        numbered(twin, count, first)

    found = set()
    for number in range(25):
        path = f"{url}-{number}"
        store = create(path, **policy)
        before = MemoryStore.create(layers=1, streams=1, dim=3, **policy)
        for start in (0, 6, 12):
            both(store, before, 6, start)
            store.commit()
        store.close()
        store = MemoryStore.open(path, mode="r+")
        after = before.fork()
        both(store, after, 6, 18)
        late: list[Act] = []
        seconds: list[MemoryStore] = []

        def act(path: str = path, seconds: list[MemoryStore] = seconds) -> None:
            seconds.append(take_over(path))
            numbered(seconds[0], 7, 100)
            seconds[0].commit()

        done: list[str] = []
        if what == "late":
            with late_write(number, late), suppress(StoreWriteError):
                store.commit()
        else:
            lost = what == "lost"
            with (
                before_write(number, act if what == "replaced" else fail, after=lost) as done,
                suppress(StoreWriteError, StoreLockedError),
            ):
                store.commit()
        if not (late or seconds or len(done) > number):
            break
        second = seconds[0] if seconds else take_over(path)
        if seconds:
            for twin in (before, after):
                numbered(twin, 7, 100)
        twin = after if held(second) == held(after) else before
        assert read(path) == held(second)
        found.add(twin is after)
        both(second, twin, 7, 200)
        second.commit()
        for arrive in late:
            arrive()
        both(second, twin, 5, 300)
        second.commit()
        assert read(path) == held(second) == held(twin)
        indices = torch.arange(len(held(twin)))[None]
        for commit in second.commits():
            MemoryStore.open(path, commit=commit).close()
        second.close()
        with MemoryStore.open(path) as reader:
            assert torch.equal(reader.positions(indices), twin.positions(indices))
        # What was put after the second one had looked for such is found by the next.
        with MemoryStore.open(path, mode="r+") as third:
            third.commit()
        report = MemoryStore.verify(path, all_commits=True)
        assert report.ok
        assert not [each for each in report.leftovers if "positions" in str(each)]
    assert found == {False, True}
    assert number > 5


@contextmanager
def late_write(number: int, late: list[Act]) -> Iterator[None]:
    """The write of this number, from 0, gets no answer, and is put aside to be carried out later."""
    count = itertools.count()

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(S3Path, name)

        def write(path: S3Path, *arguments: Any) -> Any:
            if next(count) != number:
                return real(path, *arguments)
            arguments = tuple([*each] if isinstance(each, Iterator) else each for each in arguments)
            late.append(lambda: real(path, *arguments))
            raise OSError("no answer")

        @contextmanager
        def writing(path: S3Path) -> Iterator[Callable[[bytes], None]]:
            if next(count) != number:
                with real(path) as part:
                    yield part
                return
            parts: list[bytes] = []
            yield parts.append
            late.append(lambda: path.write_bytes(b"".join(parts)))
            raise OSError("no answer")

        return writing if name == "writing" else write

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(S3Path, name, wrapped(name))
        yield


def test_a_store_that_cannot_be_made_leaves_nothing(url: str, tmp_path: Path) -> None:
    with MemoryStore.create(layers=1, streams=1, dim=3) as source:
        numbered(source, 9, 0)
        for number in range(20):
            with before_write(number, fail) as done, suppress(StoreWriteError):
                source.copy_to(url)
                break
            assert not S3Path.from_url(url).sizes()
        assert len(done) == number > 6
    assert read(url) == [*range(9)]
    assert MemoryStore.verify(url).writer is None


def test_of_two_that_make_a_store_one_does(url: str) -> None:
    for number in range(4):
        path = f"{url}-{number}"

        def act(path: str = path) -> None:
            with suppress(StoreExistsError):
                create(path, fingerprint="second").close()

        with before_write(number, act), suppress(StoreExistsError):
            create(path, fingerprint="first").close()
        with MemoryStore.open(path, mode="r+") as store:
            assert store.fingerprint == ("first" if number else "second")
            assert len(store.commits()) == 1
        assert MemoryStore.verify(path).ok


def test_two_that_take_a_store_at_once(bucket: str) -> None:
    url = f"{bucket}/store"
    create(url).close()
    others: list[MemoryStore] = []
    with (
        before_write(0, lambda: others.append(MemoryStore.open(url, mode="r+"))),
        pytest.raises(StoreLockedError, match="expected no other writer"),
    ):
        MemoryStore.open(url, mode="r+")
    others[0].commit()
    others[0].close()


def test_what_the_writer_has_decided_may_be_damaged(url: str) -> None:
    store = create(url)
    numbered(store, 2, 0)
    store.commit()
    path = S3Path.from_url(f"{url}/commits/writer.json")
    for data in (b"{}", b"", path.read_bytes().replace(b'"format": 1', b'"format": 2')):
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match=re.escape(str(path))):
            MemoryStore.open(url, mode="r+")
        assert read(url) == [0, 1]
        assert MemoryStore.verify(url).ok
    assert MemoryStore.unlock(url) == "a writer whose name is damaged"
    assert MemoryStore.unlock(url) is None
    with MemoryStore.open(url, mode="r+") as other:
        assert held(other) == [0, 1]
    with pytest.raises(StoreLockedError):
        store.commit()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner chunks of 3 rows, and shards of 2 chunks."""
    monkeypatch.setattr(shards, "_INNER_BYTES", 3 * 12)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 2 * 4 * 12)


def compact(store: MemoryStore, number: int) -> str | None:
    """Rewrites rows into shards, which are compressed for an odd number; the commit that was made."""
    return store.compact(compression="zstd" if number % 2 else None).commit


def to_compact(path: str) -> MemoryStore:
    """A store of 14 rows, 4 of them in a shard and 8 in full chunks; its writer has done nothing yet."""
    with create(path) as store:
        numbered(store, 5, 0)
        store.commit()
        compact(store, 0)
        numbered(store, 9, 5)
        store.commit()
    return MemoryStore.open(path, mode="r+")


def check_clean(path: str) -> None:
    """Nothing is damaged, and what was left is gone once a writer has come and committed."""
    assert MemoryStore.verify(path).ok
    with MemoryStore.open(path, mode="r+") as store:
        for _ in range(3):
            store.commit(durable=True)
        named = {shard_name(0, shard) for shard in store._disk.files.shards[0]}  # type: ignore[union-attr]
        assert list_shards(S3Path.from_url(path)) == named
    report = MemoryStore.verify(path, all_commits=True)
    assert (report.ok, report.leftovers) == (True, ())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("answer", ["refused", "lost"])
def test_a_compact_that_fails_at_any_request_loses_nothing(url: str, answer: str) -> None:
    failed = set()
    for number in itertools.count():
        path = f"{url}-{number}"
        with to_compact(path) as store:
            last = store.commits()[-1]
            with before_write(number, fail, after=answer == "lost") as done:
                try:
                    compact(store, number)
                except StoreWriteError as error:
                    made = "the commit is made" in str(error)
                    failed.add(made)
                    # Its record may be there.
                    assert store.commits()[-1] == last or (made and answer == "lost")
            assert held(store) == read(path) == read(path, commit=last) == [*range(14)]
            assert MemoryStore.verify(path, all_commits=True).ok
            if number % 3:
                store.close()
                store = MemoryStore.open(path, mode="r+")
                assert held(store) == [*range(14)]
            compact(store, number)
            assert compact(store, number) is None
            numbered(store, 6, 14)
            store.commit()
            assert held(store) == read(path) == [*range(20)]
            store.close()
        check_clean(path)
        if len(done) <= number:
            break
    assert failed == {False, True}
    assert number > 10


@pytest.mark.usefixtures("small_shards")
def test_a_writer_killed_at_any_request_of_a_compact_leaves_what_the_next_removes(url: str) -> None:
    def kill() -> None:
        raise Killed

    found = set()
    for number in itertools.count():
        path = f"{url}-{number}"
        store = to_compact(path)
        last = store.commits()[-1]
        dead = False
        with before_write(number, kill, on=True) as done:
            try:
                compact(store, number)
            except Killed:
                dead = True
        if not dead:
            assert len(done) <= number
            break
        assert read(path) == read(path, commit=last) == [*range(14)]
        with take_over(path) as second:
            found.add(second.commits()[-1] == last)
            assert held(second) == [*range(14)]
            numbered(second, 2, 14)
            second.commit()
            assert read(path) == [*range(16)]
        check_clean(path)
    assert found == {False, True}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("place", "after"), [("quick_bucket", False), ("quick_bucket", True), ("bucket", False)]
)
def test_a_writer_that_is_replaced_at_any_request_of_a_compact_takes_nothing_along(
    place: str, after: bool, request: pytest.FixtureRequest
) -> None:
    url = f"{request.getfixturevalue(place)}/store"
    outcomes = set()
    # Of the requests to a server one before the commit and the one after it.
    for number in itertools.count() if place == "quick_bucket" else (random.randrange(7), 7):
        path = f"{url}-{number}"
        store = to_compact(path)
        second: list[MemoryStore] = []

        def act(path: str = path, number: int = number, second: list[MemoryStore] = second) -> None:
            second.append(take_over(path))
            numbered(second[0], 3, 14)
            second[0].commit()
            compact(second[0], number + 1)
            # The chunk files of its rows are gone, and those of the first one's shards as well.
            for _ in range(3):
                second[0].commit(durable=True)

        made = None
        with before_write(number, act, after=after) as done, suppress(StoreLockedError):
            made = compact(store, number)
        if not second:
            assert len(done) <= number
            break
        outcomes.add(made is not None)
        expected = [*range(17)]
        assert read(path) == held(second[0]) == expected
        with pytest.raises(StoreLockedError, match="taken over"):
            store.commit() if made else compact(store, number)
        store.close()
        numbered(second[0], 6, 17)
        second[0].commit()
        compact(second[0], number)
        assert read(path) == held(second[0]) == [*range(23)]
        second[0].close()
        check_clean(path)
    assert outcomes == {True, False}


@pytest.mark.usefixtures("small_shards")
def test_a_request_of_a_compact_that_is_carried_out_late_changes_nothing(url: str) -> None:
    for number in itertools.count():
        path = f"{url}-{number}"
        store = to_compact(path)
        late: list[Act] = []
        with late_write(number, late), suppress(StoreWriteError):
            compact(store, number)
        if not late:
            break
        with take_over(path) as second:
            numbered(second, 3, 14)
            second.commit()
            compact(second, number)
            for _ in range(3):
                second.commit(durable=True)
            late[0]()
            numbered(second, 3, 17)
            second.commit()
            assert read(path) == held(second) == [*range(20)]
        check_clean(path)
    assert number > 10


@pytest.mark.usefixtures("small_shards")
def test_a_shard_stays_while_a_commit_may_turn_out_to_name_it(url: str) -> None:
    store = to_compact(url)
    answers = 0
    real = S3Path.swap

    def swap(path: S3Path, *arguments: Any) -> Any:
        nonlocal answers
        real(path, *arguments)
        answers += 1
        raise OSError("no answer")

    with pytest.MonkeyPatch.context() as patch, before_write(0, lambda: None) as done:
        patch.setattr(S3Path, "swap", swap)
        with pytest.raises(StoreWriteError):
            compact(store, 0)
    # It was carried out, and whoever comes next goes on from it.
    assert answers == 1
    assert not [each for each in done if each.startswith("delete")]
    with take_over(url) as second:
        disk = second.info().disk
        assert disk is not None
        assert disk.shard_rows == 12
        assert held(second) == [*range(14)]
    check_clean(url)
