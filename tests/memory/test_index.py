"""The rows of highest inner product: exactly, and about so by the indexes of faiss."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlroute.memory import (
    IndexKind,
    MemoryIndex,
    MemoryStore,
    NoPathError,
    StoreClosedError,
    StoreWriteError,
    exact_search,
    faiss_index,
    index,
    index_files,
)
from xlroute.memory.cold import ColdRows
from xlroute.memory.faiss_index import FAISS_KINDS, FaissIndex, FaissKind, list_count
from xlroute.memory.log import Extent
from xlroute.memory.sealed import checksum, encode, read_document

# More lists than there are: all of them are looked into, and the result is exact.
ALL_LISTS = 1 << 20
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=FAISS_KINDS)
def kind(request: pytest.FixtureRequest) -> FaissKind:
    pytest.importorskip("faiss")
    chosen: FaissKind = request.param
    return chosen


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists for few rows, so that small tests have them."""
    monkeypatch.setattr(faiss_index, "_LEAST_TRAINED", 300)


def clustered(*shape: int, clusters: int = 100) -> Tensor:
    """Rows [..., d] around centres, as hidden states of a model are."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    centres = torch.randn(clusters, shape[-1], generator=generator)
    return centres[torch.randint(clusters, shape[:-1])] + 0.5 * torch.randn(shape)


def in_memory(states: Tensor, lengths: list[int] | None = None, **options: Any) -> MemoryStore:
    """A store in memory that holds rows [l, b, n, d]."""
    layers, streams, _, dim = states.shape
    store = MemoryStore.create(layers=layers, streams=streams, dim=dim, **{"dtype": states.dtype, **options})
    store.append(states, lengths)
    return store


def on_disk(path: Path, states: Tensor, **options: Any) -> MemoryStore:
    """A store at `path` that has committed rows [l, b, n, d], open for writing."""
    layers, streams, _, dim = states.shape
    store = MemoryStore.create(path, layers=layers, streams=streams, dim=dim, chunk_bytes=4096, **options)
    store.append(states)
    store.commit()
    return store


def expected(rows: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of rows [m, d] for tokens [r, d], in float64, by sorting all scores."""
    scores, indices = (tokens.double() @ rows.double().T).sort(dim=-1, descending=True, stable=True)
    missing = max(0, k - rows.shape[0])
    pad = torch.nn.functional.pad
    return pad(scores[:, :k], (0, missing), value=-math.inf), pad(indices[:, :k], (0, missing), value=-1)


def assert_right(store: MemoryStore, layer: int, tokens: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """Whatever was found: rows that are there, each once, with their scores, the highest first."""
    scores, indices = found
    rows = store.gather(layer, indices)
    exist = indices >= 0
    products = torch.einsum("brkd,rd->brk", rows.double(), tokens.double())
    torch.testing.assert_close(scores[exist].double(), products[exist], rtol=1e-5, atol=1e-5)
    assert (scores[~exist] == -math.inf).all()
    assert (scores.diff(dim=-1).nan_to_num(0.0) <= 0).all()
    for each in indices.flatten(0, 1):
        chosen = each[each >= 0]
        assert chosen.unique().numel() == chosen.numel()


@pytest.mark.parametrize("most", [1, 40, 2**24])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_exact_search_is_the_float64_product(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_search, "_MOST_SCORES", most)
    states, tokens = torch.randn(2, 3, 60, 8).to(dtype), torch.randn(4, 8, requires_grad=True)
    store = in_memory(states, [60, 0, 33])
    scores, indices = MemoryIndex(store).search(1, tokens, 40)
    assert (scores.shape, indices.shape) == ((3, 4, 40), (3, 4, 40))
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (indices.dtype, scores.requires_grad) == (torch.int64, False)
    for stream, length in enumerate((60, 0, 33)):
        best, chosen = expected(states[1, stream, :length], tokens.detach(), 40)
        torch.testing.assert_close(scores[stream].double(), best, rtol=1e-5, atol=1e-5)
        # Scores that float32 cannot tell apart may change places.
        apart = (best.diff(dim=-1).abs().nan_to_num(1.0) > 1e-4).all(-1)
        assert torch.equal(indices[stream][apart], chosen[apart])
        assert ((indices[stream] < 0) == (chosen < 0)).all()


@pytest.mark.parametrize("most", [1, 7, 2**24])
def test_equal_rows_are_found_by_the_lower_index(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_search, "_MOST_SCORES", most)
    row = torch.randn(5)
    worse = row - 3 * row.sign()
    states = torch.stack([worse, row, worse, row, row, worse, row, row])[None, None]
    for k in range(1, 9):
        _, indices = MemoryIndex(in_memory(states)).search(0, row[None], k)
        assert indices.flatten().tolist() == [1, 3, 4, 6, 7, 0, 2, 5][:k]


def test_each_stream_has_its_own_tokens_and_rows(kind: FaissKind) -> None:
    states, tokens = torch.randn(1, 3, 50, 6), torch.randn(3, 2, 6)
    store = in_memory(states)
    for each in ("exact", kind):
        together = MemoryIndex(store, each).search(0, tokens, 7)
        for stream in range(3):
            alone = MemoryIndex(in_memory(states[:, stream : stream + 1]), each).search(0, tokens[stream], 7)
            for given_, single in zip(together, alone, strict=True):
                assert torch.equal(given_[stream], single[0])


@pytest.mark.parametrize("normalize", ["rms", "l2"])
def test_normalized_rows_are_searched_as_the_layer_scores_them(
    normalize: Any, kind: FaissKind, short_lists: None
) -> None:
    states = torch.randn(1, 2, 400, 8) * torch.logspace(-2, 2, 400)[:, None]
    tokens = torch.randn(3, 8)
    store = in_memory(states)
    scores = store.layer(0).scores(tokens, normalize=normalize, scale=1.0)
    best, places = scores.sort(dim=-1, descending=True, stable=True)
    found, indices = MemoryIndex(store, normalize=normalize).search(0, tokens, 9)
    assert torch.equal(found, best[..., :9])
    assert torch.equal(indices, places[..., :9])
    probes = ALL_LISTS if kind in ("ivf", "ivfpq") else None
    recall = MemoryIndex(store, kind, normalize=normalize, nprobe=probes).recall(0, tokens, 9)
    assert recall >= (0.8 if kind in ("hnsw", "ivfpq") else 1.0)


def test_rows_on_disk_stay_there_when_searched_exactly(tmp_path: Path) -> None:
    states, tokens = torch.randn(2, 2, 500, 6), torch.randn(3, 6)
    on_disk(tmp_path / "s", states).close()
    with MemoryStore.open(tmp_path / "s") as store:
        found = MemoryIndex(store).search(1, tokens, 20)
        rows = store.layer(1).of_stream(0)
        assert isinstance(rows, ColdRows)
        assert not rows.loaded
        store.rows(1)
        assert rows.loaded
        again = MemoryIndex(store).search(1, tokens, 20)
    for one, other, loaded in zip(
        MemoryIndex(in_memory(states)).search(1, tokens, 20), found, again, strict=True
    ):
        assert torch.equal(one, other)
        assert torch.equal(one, loaded)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_nothing_to_find(kind: FaissKind, where: str, tmp_path: Path) -> None:
    path = tmp_path / "s" if where == "disk" else None
    with MemoryStore.create(path, layers=1, streams=2, dim=3) as store:
        for rows in (0, 5, 0):
            store.append(torch.randn(1, 2, rows, 3))
            for each in ("exact", kind):
                memory_index = MemoryIndex(store, each)
                assert memory_index.search(0, torch.randn(0, 3), 4)[0].shape == (2, 0, 4)
                assert memory_index.recall(0, torch.randn(0, 3), 4) == 1.0
                if not rows:
                    scores, indices = memory_index.search(0, torch.randn(2, 3), 4)
                    assert (scores == -math.inf).all()
                    assert (indices == -1).all()
                    assert memory_index.recall(0, torch.randn(2, 3), 4) == 1.0
            store.reset(range(2))


def test_a_row_that_is_no_number_is_not_found(kind: FaissKind) -> None:
    states = torch.randn(1, 1, 20, 4)
    states[0, 0, 5] = math.nan
    _, indices = MemoryIndex(in_memory(states)).search(0, torch.randn(2, 4), 20)
    assert 5 not in indices
    assert (indices >= 0).sum() == 2 * 19


@pytest.mark.parametrize(("rows", "floors"), [(20_000, (1.0, 0.9, 0.95, 0.85))], ids=["20,000 rows"])
def test_recall_on_clustered_rows(rows: int, floors: tuple[float, ...], kind: FaissKind) -> None:
    store = in_memory(clustered(1, 1, rows, 32))
    memory_index = MemoryIndex(store, kind)
    tokens = clustered(20, 32)
    recall = memory_index.recall(0, tokens, 100)
    assert recall >= floors[FAISS_KINDS.index(kind)]
    assert_right(store, 0, tokens, memory_index.search(0, tokens, 100))
    if kind in ("ivf", "ivfpq"):
        narrow = MemoryIndex(store, kind, nprobe=1).recall(0, tokens, 100)
        assert narrow < recall
        assert narrow < MemoryIndex(store, kind, nprobe=ALL_LISTS).recall(0, tokens, 100)


def test_rows_beyond_float16_are_found(kind: FaissKind, short_lists: None) -> None:
    states = torch.randn(1, 1, 500, 4) * 1e6
    store = in_memory(states)
    memory_index = MemoryIndex(store, kind)
    scores, indices = memory_index.search(0, states[0, 0, :3] / 1e6, 5)
    assert scores.isfinite().all()
    products = (states[0, 0, :3] / 1e6)[:, None] * states[0, 0][indices[0]]
    torch.testing.assert_close(scores[0], products.sum(-1))


def test_recall_counts_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_index = MemoryIndex(in_memory(torch.randn(1, 2, 30, 4)))
    tokens = torch.randn(3, 4)
    assert memory_index.recall(0, tokens, 10) == 1.0
    scores, indices = memory_index.search(0, tokens, 14)
    # The 4 best are missing: of the ten best, six are left.
    monkeypatch.setattr(memory_index, "search", lambda *_: (scores[..., 4:], indices[..., 4:]))
    assert memory_index.recall(0, tokens, 10) == pytest.approx(0.6)


step = st.one_of(
    st.tuples(st.just("append"), st.tuples(st.integers(0, 200), st.integers(0, 200))),
    st.tuples(st.just("reset"), st.integers(0, 1)),
    st.sampled_from([("search", None), ("save", None), ("reopen", None)]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(step, min_size=1, max_size=14),
    capacity=st.sampled_from([None, 50, 400]),
    seed=st.integers(0, 2**30),
)
def test_an_index_follows_its_store(
    kind: FaissKind, steps: list[tuple[str, Any]], capacity: int | None, seed: int, tmp_path_factory: Any
) -> None:
    """Against lists of rows, with saved indexes loaded now and then."""
    generator = torch.Generator().manual_seed(seed)

    def whole_numbers(*shape: int) -> Tensor:
        """Those whose products float32 holds exactly, so that only equal scores tie."""
        return torch.randint(-1000, 1001, shape, generator=generator).float()

    folder: Path = tmp_path_factory.mktemp("follow")
    options: dict[str, Any] = {"normalize": None}
    if kind in ("ivf", "ivfpq"):
        options["nprobe"] = ALL_LISTS
    store = MemoryStore.create(
        folder / "s", layers=2, streams=2, dim=4, capacity=capacity, chunk_bytes=2000, keep_commits=1
    )
    held = [torch.empty(2, 0, 4), torch.empty(2, 0, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss_index, "_LEAST_TRAINED", 300)  # product quantisation needs 256 rows
        memory_index = MemoryIndex(store, kind, path=folder / "index", **options)
        for verb, argument in [*steps, ("search", None)]:
            if verb == "append":
                states = whole_numbers(2, 2, 200, 4)
                store.append(states, argument)
                for stream, count in enumerate(argument):
                    rows = torch.cat([held[stream], states[:, stream, :count]], 1)
                    held[stream] = rows[:, -capacity:] if capacity else rows
            elif verb == "reset":
                store.reset([argument])
                held[argument] = torch.empty(2, 0, 4)
            elif verb == "save":
                store.commit()
                memory_index.save()
            elif verb == "reopen":
                store.commit()
                store.close()
                store = MemoryStore.open(folder / "s", mode="r+")
                memory_index = MemoryIndex(store, kind, path=folder / "index", **options)
            else:
                tokens = whole_numbers(3, 4)
                for layer in range(2):
                    found = memory_index.search(layer, tokens, 30)
                    assert_right(store, layer, tokens, found)
                    for stream in range(2):
                        best, chosen = expected(held[stream][layer], tokens, 30)
                        exact = MemoryIndex(store).search(layer, tokens, 30)
                        assert torch.equal(exact[1][stream], chosen)
                        assert torch.equal(exact[0][stream].double(), best)
                        if kind in ("flat", "ivf"):
                            assert torch.equal(found[0][stream].double(), best)
                        assert ((found[1][stream] >= 0).sum(-1) >= 0.7 * min(30, held[stream].shape[1])).all()
    store.close()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows went into indexes of faiss, call by call."""
    counts: list[int] = []
    right = FaissIndex.add

    def add(self: FaissIndex, rows: Tensor) -> None:
        counts.append(rows.shape[0])
        right(self, rows)

    monkeypatch.setattr(FaissIndex, "add", add)
    return counts


def total(counts: list[int]) -> int:
    """The rows since the last time."""
    result = sum(counts)
    counts.clear()
    return result


def test_only_new_rows_are_added(kind: FaissKind, added: list[int]) -> None:
    store = in_memory(torch.randn(2, 2, 100, 6), capacity=120)
    memory_index = MemoryIndex(store, kind)
    tokens = torch.randn(1, 6)
    memory_index.search(0, tokens, 3)
    assert total(added) == 2 * 100
    memory_index.update()
    assert total(added) == 2 * 100  # of the other layer
    memory_index.search(0, tokens, 3)
    assert total(added) == 0
    store.append(torch.randn(2, 2, 40, 6), [40, 7])  # 20 rows of the first stream leave
    memory_index.update()
    assert total(added) == 2 * 47
    store.reset([0])
    store.append(torch.randn(2, 2, 5, 6), [5, 0])
    memory_index.update()
    assert total(added) == 2 * 5
    assert_right(store, 1, tokens, memory_index.search(1, tokens, 30))


def test_rows_that_have_left_are_never_more_than_those_held(kind: FaissKind, added: list[int]) -> None:
    store = MemoryStore.create(layers=1, streams=1, dim=6, capacity=50)
    memory_index = MemoryIndex(store, kind)
    tokens = torch.randn(2, 6)
    for _ in range(60):
        store.append(torch.randn(1, 1, 10, 6))
        assert_right(store, 0, tokens, memory_index.search(0, tokens, 50))
        assert (memory_index.search(0, tokens, 50)[1] >= 0).sum() >= 0.7 * 2 * int(store.lengths)
        inside = memory_index._followed[0, 0].rows
        assert inside.removed <= len(inside) == int(store.lengths)
    # Of 600 rows, each was added twice on average at most.
    assert 600 < total(added) <= 2 * 600


@pytest.mark.parametrize("trained", ["ivf", "ivfpq"])
def test_lists_are_trained_anew_when_there_are_four_times_the_rows(
    trained: FaissKind, short_lists: None
) -> None:
    pytest.importorskip("faiss")
    store = MemoryStore.create(layers=1, streams=1, dim=8)
    memory_index = MemoryIndex(store, trained)
    seen = []
    for _ in range(20):
        store.append(clustered(1, 1, 100, 8))
        memory_index.update()
        seen.append(memory_index._followed[0, 0].rows.trained_for)
    assert seen == [0] * 2 + [300] * 9 + [1200] * 9
    assert memory_index.recall(0, clustered(10, 8), 20) > 0.8


def test_lists_are_about_twice_the_root_of_the_rows() -> None:
    assert [list_count(rows) for rows in (1, 4095, 4096, 10**6, 10**8)] == [0, 0, 128, 2048, 16384]


def test_the_same_calls_give_the_same_result(kind: FaissKind) -> None:
    faiss = pytest.importorskip("faiss")
    states, tokens = clustered(1, 1, 6000, 16), clustered(5, 16)
    threads = faiss.omp_get_max_threads()
    results = []
    try:
        faiss.omp_set_num_threads(4)
        for _ in range(2):
            store = in_memory(states[:, :, :5000])
            memory_index = MemoryIndex(store, kind)
            memory_index.update()
            store.append(states[:, :, 5000:])
            results.append(memory_index.search(0, tokens, 50))
            assert faiss.omp_get_max_threads() == 4
    finally:
        faiss.omp_set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_saved_index_gives_the_same_bits(kind: FaissKind, tmp_path: Path, added: list[int]) -> None:
    states, tokens = clustered(2, 2, 6000, 16), clustered(5, 16)
    with on_disk(tmp_path / "s", states[:, :, :4500], capacity=5000) as store:
        memory_index = MemoryIndex(store, kind, path=tmp_path / "index")
        memory_index.update()
        store.append(states[:, :, 4500:])  # 1,000 leave
        store.commit()
        found = memory_index.search(1, tokens, 50)
        memory_index.save()
        total(added)
        loaded = MemoryIndex(store, kind, path=tmp_path / "index")
        again = loaded.search(1, tokens, 50)
        assert total(added) == 0
        # Saving an index that was loaded and has not changed writes the same bytes.
        before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
        loaded.save()
        assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


def test_a_saved_index_goes_on_with_later_commits_and_not_with_others(
    kind: FaissKind, tmp_path: Path, added: list[int]
) -> None:
    states, tokens = torch.randn(1, 1, 90, 4), torch.randn(2, 4)

    def rows_added(commit: str | None) -> int:
        """How many rows a reader of a commit has to add to the saved index."""
        with MemoryStore.open(tmp_path / "s", commit=commit) as reader:
            loaded = MemoryIndex(reader, kind, path=tmp_path / "index")
            total(added)
            assert_right(reader, 0, tokens, loaded.search(0, tokens, 60))
            return total(added)

    with on_disk(tmp_path / "s", states[:, :, :50], capacity=70) as store:
        first = store.commits()[-1]
        memory_index = MemoryIndex(store, kind, path=tmp_path / "index")
        memory_index.save()
        assert rows_added(first) == 0
        store.append(states[:, :, 50:])
        second = store.commit()
        assert rows_added(second) == 40
        memory_index.save()
        assert (rows_added(second), rows_added(first)) == (0, 50)
        store.reset([0])
        store.append(states[:, :, :10])
        store.commit()
        assert rows_added(None) == 10


def test_rows_that_were_indexed_and_never_committed_are_not_found(kind: FaissKind, tmp_path: Path) -> None:
    store = on_disk(tmp_path / "s", torch.randn(1, 1, 20, 4))
    store.append(torch.full((1, 1, 20, 4), 100.0))
    MemoryIndex(store, kind, path=tmp_path / "index").save()
    store.close()
    tokens = torch.ones(1, 4)
    with MemoryStore.open(tmp_path / "s", mode="r+") as store:
        store.append(torch.full((1, 1, 20, 4), -100.0))  # in the same place
        found = MemoryIndex(store, kind, path=tmp_path / "index").search(0, tokens, 40)
        assert_right(store, 0, tokens, found)
        assert found[0].max() < 100


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[int(torch.randint(len(data), ()))] ^= 1 << int(torch.randint(8, ()))
    path.write_bytes(data)


def _reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = read_document(path)
    del document["crc32c"]
    change(document)
    path.write_bytes(encode({**document, "crc32c": checksum(document)}))


def _swap(folder: Path) -> None:
    """A directory in place of a file."""
    path = next(folder.glob("*.faiss"))
    path.unlink()
    path.mkdir()


def _forge(folder: Path) -> None:
    """What faiss cannot read, under a right checksum."""
    path = next(folder.glob("layer-0.stream-0.*"))
    saved = index_files.SavedRows(0, 0, (Extent(0, 60, 7),), 0, 0, b"IxFI" + bytes(path.stat().st_size - 4))
    index_files.write_index(folder, _settings(folder), [saved])


def _settings(folder: Path) -> dict[str, Any]:
    document = read_document(folder / "index.json")
    return {name: document[name] for name in ("kind", "normalize", "layers", "streams", "dim")}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the record": lambda folder: _flip(folder / "index.json"),
    "a bit of a file": lambda folder: _flip(next(folder.glob("*.faiss"))),
    "a file cut short": lambda folder: next(folder.glob("*.faiss")).write_bytes(b"IxFI"),
    "a file gone": lambda folder: next(folder.glob("*.faiss")).unlink(),
    "a folder for a file": _swap,
    "a folder for the record": lambda folder: (
        (folder / "index.json").unlink(),
        (folder / "index.json").mkdir(),
    ),
    "no JSON": lambda folder: (folder / "index.json").write_text("[]"),
    "another format": lambda folder: _reseal(folder / "index.json", lambda d: d.update(format=2)),
    "another shape": lambda folder: _reseal(folder / "index.json", lambda d: d.update(dim=5)),
    "no entries": lambda folder: _reseal(folder / "index.json", lambda d: d.pop("indexes")),
    "a way out": lambda folder: _reseal(
        folder / "index.json", lambda d: d["indexes"][0].update(crc32c="/../../x")
    ),
    "other rows": lambda folder: _reseal(
        folder / "index.json", lambda d: d["indexes"][0].update(extents=[[0, 9, 1]])
    ),
    "what faiss refuses": _forge,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_built_anew_with_a_warning(
    damage: str, kind: FaissKind, tmp_path: Path, added: list[int]
) -> None:
    tokens = torch.randn(2, 4)
    folder = tmp_path / "index"
    with on_disk(tmp_path / "s", torch.randn(1, 2, 60, 4)) as store:
        memory_index = MemoryIndex(store, kind, path=folder)
        memory_index.save()
        found = memory_index.search(0, tokens, 10)
        DAMAGES[damage](folder)
        total(added)
        with pytest.warns(UserWarning, match=f"{folder}: the index is built anew: .*expected"):
            again = MemoryIndex(store, kind, path=folder)
        rebuilt = again.search(0, tokens, 10)
        assert total(added) == 2 * 60
        assert torch.equal(found[0], rebuilt[0])
        assert torch.equal(found[1], rebuilt[1])


def test_an_index_of_another_kind_is_built_anew_with_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    with on_disk(tmp_path / "s", torch.randn(1, 1, 60, 4)) as store:
        MemoryIndex(store, "hnsw", path=tmp_path / "index").save()
        for kind, normalize in (("flat", None), ("hnsw", "rms")):
            with pytest.warns(UserWarning, match="expected an index with .* got"):
                MemoryIndex(store, kind, normalize=normalize, path=tmp_path / "index")  # type: ignore[arg-type]


def test_saving_removes_what_is_left_over_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    folder = tmp_path / "index"
    with on_disk(tmp_path / "s", torch.randn(1, 1, 60, 4)) as store:
        memory_index = MemoryIndex(store, "flat", path=folder)
        memory_index.save()
        (folder / "tmp-0123456789abcdef").write_text("half")
        (folder / "notes.txt").write_text("mine")
        store.append(torch.randn(1, 1, 5, 4))
        store.commit()
        memory_index.save()
    names = sorted(path.name.split(".")[0] for path in folder.iterdir())
    assert names == ["index", "layer-0", "notes"]


def test_a_failed_save_leaves_the_index_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: list[int]
) -> None:
    pytest.importorskip("faiss")
    tokens = torch.randn(2, 4)
    countdown = [0]
    right = index_files.replace_file

    def failing(path: Path, data: bytes, **options: Any) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise OSError(28, "No space left on device")
        right(path, data, **options)

    with on_disk(tmp_path / "s", torch.randn(1, 2, 60, 4)) as store:
        memory_index = MemoryIndex(store, "flat", path=tmp_path / "index")
        memory_index.save()
        store.append(torch.randn(1, 2, 5, 4))
        store.commit()
        monkeypatch.setattr(index_files, "replace_file", failing)
        for fails_at in (1, 2, 3):
            countdown[0] = fails_at
            with pytest.raises(StoreWriteError, match="index: expected to write, got No space left"):
                memory_index.save()
            total(added)
            again = MemoryIndex(store, "flat", path=tmp_path / "index")
            assert_right(store, 0, tokens, again.search(0, tokens, 65))
            assert total(added) == 2 * 5
        (tmp_path / "file").write_text("mine")
        with pytest.warns(UserWarning, match="built anew"):
            blocked = MemoryIndex(store, "flat", path=tmp_path / "file")
        with pytest.raises(StoreWriteError, match="file: expected to write, got File exists"):
            blocked.save()


def _tokens() -> Tensor:
    return torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: MemoryIndex(s, "pq"), ValueError, "kind: expected one of 'exact', 'flat', .* got 'pq'"),
        (lambda s: MemoryIndex(s, normalize="max"), ValueError, "normalize: expected 'rms', .* got 'max'"),
        (lambda s: MemoryIndex(s, "ivf", nprobe=0), ValueError, "nprobe: expected at least 1, got 0"),
        (lambda s: MemoryIndex(s, "ivf", nprobe=2.0), TypeError, "nprobe: expected an integer, got float"),
        (lambda s: MemoryIndex(s, "hnsw", nprobe=4), ValueError, "nprobe: expected None for kind='hnsw'"),
        (
            lambda s: MemoryIndex(s, path="there"),
            ValueError,
            "path: expected None for kind='exact', .*there",
        ),
        (
            lambda s: MemoryIndex(s, "flat", path=s.path / "i"),
            ValueError,
            "path: expected a folder outside of",
        ),
        (lambda s: MemoryIndex(s, "flat", path=s.path), ValueError, "path: expected a folder outside of"),
        (lambda s: MemoryIndex(s).search(2, _tokens(), 1), IndexError, "layer: expected 0 to 1, got 2"),
        (lambda s: MemoryIndex(s).search(0, _tokens(), 0), ValueError, "k: expected at least 1, got 0"),
        (lambda s: MemoryIndex(s).search(0, _tokens(), 1.0), TypeError, "k: expected an integer, got float"),
        (lambda s: MemoryIndex(s).search(0, torch.zeros(2, 5), 1), ValueError, r"tokens: .* got \[2, 5\]"),
        (lambda s: MemoryIndex(s).search(0, torch.zeros(2, 1, 4), 1), ValueError, r"got \[2, 1, 4\]"),
        (lambda s: MemoryIndex(s).search(0, _tokens().long(), 1), TypeError, "tokens must be a floating"),
        (lambda s: MemoryIndex(s).recall(0, [[1.0]], 1), TypeError, "tokens must be a floating"),
        (lambda s: MemoryIndex(s, "flat").save(), NoPathError, "save: expected an index with a path"),
        (lambda s: MemoryIndex(s.fork(), "flat", path="there").save(), NoPathError, "save: expected a store"),
    ],
)
def test_refused_calls_say_what_was_expected(
    call: Callable[[MemoryStore], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    with on_disk(tmp_path / "s", torch.randn(2, 3, 4, 4)) as store, pytest.raises(error, match=message):
        call(store)


@pytest.mark.parametrize("searched", ["exact", "flat"])
def test_a_closed_store_is_searched_no_more(searched: IndexKind) -> None:
    if searched != "exact":
        pytest.importorskip("faiss")
    store = in_memory(torch.randn(1, 1, 4, 4))
    memory_index = MemoryIndex(store, searched)
    memory_index.search(0, _tokens(), 1)
    store.close()
    for call in (lambda: memory_index.search(0, _tokens(), 1), memory_index.update):
        with pytest.raises(StoreClosedError):
            call()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("No module named 'faiss'"), r"got none .*: pip install 'xlroute\[faiss\]'"),
        (RuntimeError("libcudart.so.12"), "got one that fails .*libcudart.so.12.*never both"),
    ],
    ids=["none", "without CUDA"],
)
def test_a_faiss_that_cannot_be_imported(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(faiss_index.importlib, "import_module", fail)
    store = in_memory(torch.randn(1, 1, 4, 4))
    with pytest.raises(ImportError, match=f"kind: expected .* for 'ivf', {message}"):
        MemoryIndex(store, "ivf")
    assert MemoryIndex(store).search(0, _tokens(), 1)[0].shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        ([], [(0, 5, 1)], 0),
        ([(0, 5, 1)], [], 0),
        ([(0, 5, 1)], [(0, 5, 1)], 5),
        ([(0, 5, 1)], [(0, 9, 1)], 5),
        ([(0, 5, 1)], [(3, 9, 1)], 2),
        ([(0, 5, 1)], [(5, 9, 1)], 0),
        ([(0, 5, 1)], [(0, 5, 2)], 0),
        ([(0, 5, 1)], [(0, 3, 1)], 0),
        ([(0, 5, 1)], [(0, 3, 1), (3, 9, 2)], 0),
        ([(0, 5, 1), (5, 8, 2)], [(6, 8, 2), (8, 9, 3)], 2),
        ([(0, 5, 1), (7, 8, 1)], [(2, 5, 1), (7, 9, 1)], 4),
        ([(0, 5, 1), (7, 8, 1)], [(2, 5, 1), (6, 9, 1)], 0),
        ([(3, 5, 1)], [(0, 5, 1)], 0),
    ],
)
def test_which_rows_are_those_held_before(
    before: list[tuple[int, int, int]], now: list[tuple[int, int, int]], kept: int
) -> None:
    extents = [tuple(Extent(*each) for each in side) for side in (before, now)]
    assert index.kept_rows(*extents) == kept


class OnGpu:
    """What an index of faiss on a GPU lets one do."""

    def __init__(self, on_cpu: Any) -> None:
        self.on_cpu = on_cpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self.on_cpu, name)

    def search(self, tokens: Any, k: int, params: Any) -> Any:
        assert k <= 2048
        assert params is None or params.sel is None
        return self.on_cpu.search(tokens, k, params=params)


def test_an_index_moves_to_the_gpu_of_faiss_and_back(
    kind: FaissKind, short_lists: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = pytest.importorskip("faiss")
    moved: list[tuple[str, int]] = []

    def to_gpu(resources: str, device: int, on_cpu: Any) -> OnGpu:
        moved.append((resources, device))
        return OnGpu(on_cpu)

    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda there: there.on_cpu, raising=False)
    rows, tokens = torch.randn(3000, 8), torch.randn(4, 8)
    on_gpu, on_cpu = (
        FaissIndex.empty(kind, 8, torch.device(device), 3000, lambda drawn: rows[drawn])
        for device in ("cuda:1", "cpu")
    )
    assert moved == ([] if kind == "hnsw" else [("resources", 1)])
    for each in (on_gpu, on_cpu):
        each.add(rows)
        each.remove_oldest(1000)
    assert on_gpu.serialize() == on_cpu.serialize()
    for k in (5, 1500):
        there, here = on_gpu.search(tokens, k, ALL_LISTS), on_cpu.search(tokens, k, ALL_LISTS)
        assert there.shape[1] <= 2048
        assert there.max() < 2000
        for one, other in zip(there, here, strict=True):
            # Those that were to be found are among those fetched, as far as they are not more than 2,048.
            found = torch.isin(other[other >= 0], one)
            assert found.all() if k == 5 else found.float().mean() > 0.6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_on_a_gpu(kind: FaissKind) -> None:
    states, tokens = torch.randn(1, 2, 300, 8), torch.randn(3, 8)
    store = in_memory(states, device="cuda")
    for each in ("exact", kind):
        memory_index = MemoryIndex(store, each)
        scores, indices = memory_index.search(0, tokens, 10)
        assert (scores.device.type, indices.device.type) == ("cuda", "cuda")
        assert memory_index.recall(0, tokens, 10) >= 0.8
    exact = MemoryIndex(store).search(0, tokens, 10)
    on_cpu = MemoryIndex(in_memory(states)).search(0, tokens, 10)
    torch.testing.assert_close(exact[0].cpu(), on_cpu[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "flat"])
def test_rows_in_tiers_are_found_like_others(kind: IndexKind, tmp_path: Path) -> None:
    if kind != "exact":
        pytest.importorskip("faiss")
    plain = MemoryStore.create(layers=1, streams=2, dim=8, capacity=90)
    tiered = MemoryStore.create(
        tmp_path / "s", layers=1, streams=2, dim=8, capacity=90, chunk_bytes=4096, device_bytes=2048
    )
    indexes = MemoryIndex(plain, kind), MemoryIndex(tiered, kind)
    for count in (30, 50, 40, 7):
        states = clustered(1, 2, count, 8)
        for store in (plain, tiered):
            store.append(states)
        tokens = torch.randn(3, 8)
        (scores, found), (ours, same) = (each.search(0, tokens, 12) for each in indexes)
        assert torch.equal(ours, scores)
        assert torch.equal(same, found)
