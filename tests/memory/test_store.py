"""What the names of the store mean, in memory and on disk alike."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import Tensor

from xlroute.memory import (
    FingerprintError,
    MemoryStore,
    NoPathError,
    ReadOnlyError,
    StoreClosedError,
    StoreExistsError,
    StoreNotFoundError,
)
from xlroute.memory.buffer import RowSpan

Make = Callable[..., MemoryStore]


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    def create(**options: Any) -> MemoryStore:
        path = tmp_path / "store" if request.param == "disk" else None
        return MemoryStore.create(
            path, **{"layers": 2, "streams": 3, "dim": 4, "chunk_bytes": 100, **options}
        )

    return create


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_come_back_in_the_type_of_the_store(make: Make, dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    with make(dtype=dtype) as store:
        store.append(states, torch.tensor([9, 0, 4]))
        rows, mask = store.rows(1)
        assert (rows.dtype, store.dtype, rows.requires_grad) == (dtype, dtype, False)
        assert mask.tolist() == [[True] * 9, [False] * 9, [True] * 4 + [False] * 5]
        assert torch.equal(rows[0], states[1, 0].to(dtype))
        assert torch.equal(rows[2, :4], states[1, 2, :4].to(dtype))
        assert not rows[~mask].any()


def test_gather_counts_from_the_oldest_row_and_reads_zeros_for_none(make: Make) -> None:
    states = torch.randn(2, 3, 5, 4)
    with make() as store:
        store.append(states, [5, 0, 2])
        indices = torch.tensor([[[4, 0], [-1, 4]], [[-1, -1], [-1, -1]], [[1, 1], [0, -1]]])
        rows = store.gather(0, indices)
        assert rows.shape == (3, 2, 2, 4)
        assert torch.equal(rows[0, 0], states[0, 0, [4, 0]])
        assert torch.equal(rows[2, 0], states[0, 2, [1, 1]])
        assert not rows[indices < 0].any()
        assert store.gather(0, torch.zeros(3, 0, dtype=torch.int32)).shape == (3, 0, 4)


def test_positions_go_on_counting_after_eviction_and_begin_anew_after_reset(make: Make) -> None:
    with make(capacity=3) as store:
        store.append(torch.randn(2, 3, 5, 4), [5, 2, 0])
        assert store.lengths.tolist() == [3, 2, 0]
        assert store.positions(torch.tensor([[0, 2], [0, 1], [-1, -1]])).tolist() == [
            [2, 4],
            [0, 1],
            [-1, -1],
        ]
        store.reset([0])
        store.append(torch.randn(2, 3, 1, 4))
        assert store.positions(torch.tensor([[0], [0], [0]])).tolist() == [[0], [0], [0]]
        store.append(torch.randn(2, 3, 1, 4))
        assert store.positions(torch.tensor([[1], [0], [1]])).tolist() == [[1], [1], [1]]


def test_capacity_keeps_exactly_the_last_rows(make: Make) -> None:
    states = torch.randn(2, 3, 40, 4)
    with make(capacity=7) as store:
        for start, stop in ((0, 3), (3, 6), (6, 7), (7, 8), (8, 30), (30, 40)):
            store.append(states[:, :, start:stop])
            assert torch.equal(store.rows(1)[0], states[1, :, max(0, stop - 7) : stop])


@pytest.mark.parametrize(
    ("streams", "left"),
    [
        ([0, 2], [0, 2, 0]),
        (torch.tensor([1]), [2, 0, 2]),
        (torch.tensor([True, False, False]), [0, 2, 2]),
        ([False, False, True], [2, 2, 0]),
        ([], [2, 2, 2]),
        (range(3), [0, 0, 0]),
    ],
    ids=str,
)
def test_reset_takes_numbers_or_a_mask(make: Make, streams: Any, left: list[int]) -> None:
    with make() as store:
        store.append(torch.randn(2, 3, 2, 4))
        store.reset(streams)
        assert store.lengths.tolist() == left


def _states(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.append(_states(2, 3, 4)), ValueError, r"states: expected shape \[2, 3, n, 4\], got"),
        (lambda s: s.append(_states(2, 3, 1, 5)), ValueError, r"got \[2, 3, 1, 5\]"),
        (lambda s: s.append(_states(1, 3, 1, 4)), ValueError, r"got \[1, 3, 1, 4\]"),
        (lambda s: s.append(_states(2, 3, 1, 4).long()), TypeError, "states: .* got torch.int64"),
        (lambda s: s.append([[1.0]]), TypeError, "states: .* got list"),
        (lambda s: s.append(_states(2, 3, 2, 4), [1, 3, 1]), ValueError, "lengths: .* stream 1, got 3"),
        (lambda s: s.append(_states(2, 3, 2, 4), [-1, 0, 0]), ValueError, "lengths: .* got -1"),
        (lambda s: s.append(_states(2, 3, 2, 4), [1, 1]), ValueError, r"lengths: expected shape \[3\]"),
        (
            lambda s: s.append(_states(2, 3, 2, 4), [float("nan")] * 3),
            TypeError,
            "lengths: expected integers",
        ),
        (lambda s: s.append(_states(2, 3, 2, 4), [True] * 3), TypeError, "lengths: expected integers"),
        (lambda s: s.reset([3]), IndexError, "streams: expected 0 to 2, got 3"),
        (lambda s: s.reset([0, -1]), IndexError, "streams: expected 0 to 2, got -1"),
        (lambda s: s.reset([0.5]), TypeError, "streams: "),
        (lambda s: s.reset([True, False]), ValueError, r"streams: expected a mask \[3\]"),
        (lambda s: s.rows(2), IndexError, "layer: expected 0 to 1, got 2"),
        (lambda s: s.layer(-1), IndexError, "layer: expected 0 to 1, got -1"),
        (lambda s: s.gather(0, torch.tensor([[2], [0], [0]])), IndexError, "indices: .* 2 rows, got 2"),
        (lambda s: s.gather(0, torch.tensor([[0], [-2], [0]])), IndexError, "stream 1.* got -2"),
        (lambda s: s.gather(0, torch.tensor([[0], [0]])), ValueError, r"indices: expected shape \[3, ...\]"),
        (lambda s: s.gather(0, torch.zeros(3, 1)), TypeError, "indices: .* got torch.float32"),
        (lambda s: s.gather(0, torch.zeros(3, 1, dtype=torch.bool)), TypeError, "got torch.bool"),
        (lambda s: s.gather(0, [0, 0, 0]), TypeError, "indices: .* got list"),
        (lambda s: s.positions(torch.tensor([[2], [0], [0]])), IndexError, "indices: "),
        (lambda s: setattr(s, "fingerprint", 3), TypeError, "fingerprint: .* got int"),
    ],
)
def test_refused_calls_say_what_was_expected_and_change_nothing(
    make: Make, call: Callable[[MemoryStore], object], error: type[Exception], message: str
) -> None:
    with make(fingerprint="f") as store:
        store.append(torch.randn(2, 3, 2, 4))
        before, version = store.rows(0)[0], store.version
        with pytest.raises(error, match=message):
            call(store)
        assert torch.equal(store.rows(0)[0], before)
        assert (store.version, store.lengths.tolist(), store.fingerprint) == (version, [2, 2, 2], "f")


REFUSED: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"layers": 0}, ValueError),
    ({"streams": -1}, ValueError),
    ({"dim": 1.5}, TypeError),
    ({"dim": 2**31}, ValueError),
    ({"capacity": 0}, ValueError),
    ({"capacity_bytes": 95}, ValueError),  # a row of each layer and stream takes 96
    ({"capacity_bytes": 1e6}, TypeError),
    ({"dtype": torch.int32}, ValueError),
    ({"device": 0}, TypeError),
    ({"device": "nowhere"}, ValueError),
    ({"keep_commits": 0}, ValueError),
    ({"chunk_bytes": 0}, ValueError),
    ({"chunk_bytes": 2**60}, ValueError),
    ({"fingerprint": 7}, TypeError),
    ({"device_bytes": 0}, ValueError),
    ({"device_bytes": 1e9}, TypeError),
    ({"host_bytes": 0, "device_bytes": 100}, ValueError),
    ({"host_bytes": 100}, ValueError),
    ({"eviction": "newest", "capacity": 9}, ValueError),
    ({"keep_every": 1, "eviction": "every_nth", "capacity": 9}, ValueError),
    ({"keep_every": 2}, ValueError),
]


@pytest.mark.parametrize(("options", "error"), REFUSED, ids=str)
def test_create_refuses_impossible_options_and_leaves_nothing(
    make: Make, tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(options))):
        make(**options)
    assert not list(tmp_path.iterdir())


def test_every_option_of_create_is_refused_before_a_store_is_made(quick_bucket: str) -> None:
    options = {*inspect.signature(MemoryStore.create).parameters} - {"path"}
    assert options == {name for refused, _ in REFUSED for name in list(refused)[:1]}
    shape = {"layers": 2, "streams": 3, "dim": 4}
    for refused, error in REFUSED:
        with pytest.raises(error, match=next(iter(refused))):
            MemoryStore.create(f"{quick_bucket}/store", **shape | refused)
        with pytest.raises(StoreNotFoundError):
            MemoryStore.open(f"{quick_bucket}/store")
    MemoryStore.create(f"{quick_bucket}/store", **shape).close()


def test_a_refused_open_does_not_go_back_to_an_earlier_commit(tmp_path: Path) -> None:
    with MemoryStore.create(tmp_path / "s", layers=1, streams=1, dim=2) as store:
        store.append(torch.randn(1, 1, 3, 2))
        commits = [*store.commits(), store.commit()]
    with pytest.raises(ValueError, match="host_bytes"):
        MemoryStore.open(tmp_path / "s", mode="r+", commit=commits[0], host_bytes=100)
    with MemoryStore.open(tmp_path / "s") as store:
        assert (store.commits(), store.lengths.tolist()) == (commits, [3])


def test_forks_are_independent_and_share_rows_until_one_side_writes(make: Make) -> None:
    states = torch.randn(2, 3, 6, 4)
    with make(fingerprint="f") as store:
        store.append(states[:, :, :3])
        one, two = store.fork(), store.fork()
        assert (one.path, one.mode, one.fingerprint) == (None, "r+", "f")
        assert one.layer(0).views()[0].data_ptr() == two.layer(0).views()[0].data_ptr()
        store.append(states[:, :, 3:])
        one.append(-states[:, :, 3:])
        one.fingerprint = "g"
        assert torch.equal(store.rows(0)[0], states[0])
        assert torch.equal(one.rows(0)[0], torch.cat([states[0, :, :3], -states[0, :, 3:]], 1))
        assert torch.equal(two.rows(0)[0], states[0, :, :3])
        assert store.fingerprint == "f"
    assert one.lengths.tolist() == [6, 6, 6]


def test_a_closed_store_refuses_and_its_layers_can_still_be_read(make: Make) -> None:
    states = torch.randn(2, 3, 2, 4)
    store = make()
    store.append(states)
    layer = store.layer(1)
    store.close()
    store.close()
    for call in (lambda: store.append(states), lambda: store.rows(0), lambda: store.lengths, store.fork):
        with pytest.raises(StoreClosedError, match="expected an open store"):
            call()
    assert torch.equal(torch.stack(layer.views()), states[1])


def test_a_store_in_memory_has_nothing_to_commit_to(tmp_path: Path) -> None:
    states = torch.randn(1, 2, 8, 3)
    store = MemoryStore.create(layers=1, streams=2, dim=3, capacity=5, fingerprint="f")
    store.append(states, [8, 1])
    for call in (store.commit, lambda: store.pin("000000000001-00000000")):
        with pytest.raises(NoPathError, match="expected a store with a path"):
            call()
    assert store.commits() == []
    commit = store.copy_to(tmp_path / "copy", durable=True)
    with MemoryStore.open(tmp_path / "copy", fingerprint="f") as copied:
        assert copied.commits() == [commit]
        assert copied.capacity == 5
        assert copied.positions(torch.tensor([[0], [0]])).tolist() == [[3], [0]]
        assert torch.equal(copied.rows(0)[0], store.rows(0)[0])
    with pytest.raises(StoreExistsError):
        store.copy_to(tmp_path / "copy")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_create_refuses_what_exists_and_open_what_does_not(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": 1, "streams": 1, "dim": 2}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(StoreExistsError, match=name):
            MemoryStore.create(tmp_path / name, **options)
    assert (tmp_path / "file").read_text() == "mine"
    with MemoryStore.create(tmp_path / "empty", **options) as store:
        assert len(store.commits()) == 1
        assert store.mode == "r+"
    with pytest.raises(StoreNotFoundError, match="nothing"):
        MemoryStore.open(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        MemoryStore.open(tmp_path / "missing", mode="r+")
    with pytest.raises(ValueError, match="mode: expected 'r' or 'r\\+', got 'w'"):
        MemoryStore.open(tmp_path / "empty", mode="w")  # type: ignore[arg-type]


def test_nothing_is_visible_before_the_commit_and_close_does_not_commit(tmp_path: Path) -> None:
    with MemoryStore.create(tmp_path / "s", layers=1, streams=1, dim=2) as store:
        store.append(torch.randn(1, 1, 3, 2))
        store.commit()
        store.append(torch.randn(1, 1, 3, 2))
        with MemoryStore.open(tmp_path / "s") as reader:
            assert reader.lengths.tolist() == [3]
    with MemoryStore.open(tmp_path / "s") as reader:
        assert reader.lengths.tolist() == [3]


def test_a_store_opened_for_reading_is_not_written_to(tmp_path: Path) -> None:
    states = torch.randn(1, 1, 3, 2)
    with MemoryStore.create(tmp_path / "s", layers=1, streams=1, dim=2) as store:
        store.append(states)
        store.commit()
    with MemoryStore.open(tmp_path / "s") as reader:
        assert reader.mode == "r"
        for call in (
            lambda: reader.append(states),
            lambda: reader.reset([0]),
            reader.commit,
            lambda: setattr(reader, "fingerprint", "g"),
        ):
            with pytest.raises(ReadOnlyError, match="expected a store opened with mode='r\\+'"):
                call()
        fork = reader.fork()
    fork.append(-states)
    assert torch.equal(fork.rows(0)[0], torch.cat([states[0], -states[0]], 1))


def test_the_fingerprint_is_recorded_by_the_next_commit_and_checked(tmp_path: Path) -> None:
    with MemoryStore.create(tmp_path / "s", layers=1, streams=1, dim=2, fingerprint="f") as store:
        first = store.commits()[0]
        store.fingerprint = "g"
        store.commit()
    assert MemoryStore.open(tmp_path / "s", fingerprint="g").fingerprint == "g"
    assert MemoryStore.open(tmp_path / "s", fingerprint="f", commit=first).fingerprint == "f"
    for mode in ("r", "r+"):
        with pytest.raises(FingerprintError, match="fingerprint 'f', got 'g'"):
            MemoryStore.open(tmp_path / "s", mode=mode, fingerprint="f")  # type: ignore[arg-type]
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        assert store.fingerprint == "g"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zarr_reads_the_committed_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    states = torch.randn(2, 2, 11, 3).to(dtype)
    with MemoryStore.create(
        tmp_path / "s", layers=2, streams=2, dim=3, dtype=dtype, chunk_bytes=4 * 3 * dtype.itemsize
    ) as store:
        for part in states.split(4, dim=2):
            store.append(part)
        store.commit()
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert len([name for name, _ in group.arrays()]) == 8
    for layer in range(2):
        for stream in range(2):
            array = group[f"layer-{layer}.stream-{stream}.rows"]
            assert isinstance(array, zarr.Array)
            assert array.chunks == (4, 3)
            assert array.attrs["dtype"] == str(dtype).removeprefix("torch.")
            rows = torch.from_numpy(array[:11])  # type: ignore[arg-type]
            assert torch.equal(rows.view(dtype), states[layer, stream])


def test_rows_of_width_one_are_written_whatever_their_strides(make: Make) -> None:
    states = torch.randn(1, 3, 1, 5).transpose(2, 3)
    with make(layers=1, dim=1) as store:
        store.append(states)
        assert torch.equal(store.rows(0)[0], states[0])


@pytest.mark.parametrize("lengths", [[None], ["a", "b", "c"], [1 << 70] * 3, object()], ids=type)
def test_lengths_that_are_no_numbers_are_named(make: Make, lengths: Any) -> None:
    with make() as store:
        with pytest.raises((TypeError, ValueError), match="lengths: expected integers, got"):
            store.append(torch.randn(2, 3, 1, 4), lengths)
        assert store.version == 0


@pytest.mark.parametrize("streams", [None, ["a"], [1 << 70], [[0], [1, 2]]], ids=repr)
def test_streams_that_are_no_numbers_are_named(make: Make, streams: Any) -> None:
    with make() as store:
        with pytest.raises((TypeError, ValueError), match="streams: expected numbers of streams"):
            store.reset(streams)
        assert store.version == 0


def test_an_interrupted_reset_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as store:
        store.append(torch.randn(2, 3, 4, 4))

        def dropped(rows: RowSpan, count: int) -> RowSpan:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RowSpan, "dropped", dropped)
            with pytest.raises(KeyboardInterrupt):
                store.reset([0, 2])
        assert store.lengths.tolist() == [4, 4, 4]
        assert store.rows(0)[1].all()


def test_a_layer_first_read_in_inference_mode_can_be_trained_on(make: Make) -> None:
    with make() as store:
        store.append(torch.randn(2, 3, 4, 4))
        with torch.inference_mode():
            layer = store.layer(0)
            assert layer.mask.all()
        scores = torch.randn(3, 4, requires_grad=True)
        torch.where(layer.mask, scores, 0.0).sum().backward()
        (scores.sum(1) * layer.lengths).sum().backward()
        assert not layer.lengths.is_inference()
