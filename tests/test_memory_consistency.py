"""What the memory promises, each as a property: run `pytest -k memory_consistency`.

Reading a document in one go, or stopping anywhere, saving, and reading on in another process gives the same
logits, bit for bit. A memory holds exactly the rows read since the document began. Streams do not touch each
other, and no output depends on a later token. A store that was killed opens at its last commit; one that was
damaged says so.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.memory import (
    CorruptionError,
    FingerprintError,
    FormatError,
    MemoryStore,
    MemoryStoreError,
    ReadOnlyError,
    StoreLockedError,
    StoreNotFoundError,
)

BuildModel = Callable[..., RoutedTransformerXL]
TESTS = Path(__file__).parent

a_few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
cuts_of = st.lists(st.integers(1, 12), min_size=2, max_size=6)
seeds = st.integers(0, 2**31)


def random_tokens(seed: int, streams: int, length: int) -> Tensor:
    return torch.randint(50, (streams, length), generator=torch.Generator().manual_seed(seed))


def read(
    model: RoutedTransformerXL,
    state: TransformerXLState,
    tokens: Tensor,
    cuts: list[int],
    after_each: Callable[[TransformerXLState], TransformerXLState] = lambda state: state,
) -> tuple[Tensor, TransformerXLState]:
    """Logits of tokens [b, n], read in segments of the given lengths, and the last state."""
    logits = []
    with torch.no_grad():
        for piece in tokens.split(cuts, dim=1):
            out, state = model(piece, state)
            state = after_each(state)
            logits.append(out)
    return torch.cat(logits, dim=1), state


def fresh(model: RoutedTransformerXL, streams: int, **options: object) -> TransformerXLState:
    memory = model.create_memory(streams=streams, **options)  # type: ignore[arg-type]
    return model.initial_state(streams=streams, memory=memory)


# ---- Saving and reading on ----


@given(cuts=cuts_of, stops=st.sets(st.integers(0, 5)), on_disk=st.booleans(), route=st.booleans(), seed=seeds)
@a_few
def test_reading_on_from_a_saved_state_equals_never_having_stopped(
    build_model: BuildModel,
    routed_all: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    stops: set[int],
    on_disk: bool,
    route: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("reading")
    model = build_model(dtype=torch.float32, **(routed_all if route else {}))
    model.save_pretrained(folder / "model")
    tokens = random_tokens(seed, 2, sum(cuts))
    expected, _ = read(model, fresh(model, 2), tokens, cuts)

    segments = iter(range(len(cuts)))
    current = model

    def stop_and_go(state: TransformerXLState) -> TransformerXLState:
        """What another process would do: everything comes from the files."""
        nonlocal current
        if next(segments) not in stops:
            return state
        state.save(folder / "state")
        if state.memory is not None:
            state.memory.close()
        current = RoutedTransformerXL.from_pretrained(folder / "model")
        return current.load_state(folder / "state", "r+" if on_disk else "r")

    path = folder / "memory" if on_disk else None
    state = fresh(model, 2, path=path, capacity=None)
    logits = []
    with torch.no_grad():
        for piece in tokens.split(cuts, dim=1):
            out, state = current(piece, state)
            logits.append(out)
            state = stop_and_go(state)
    assert torch.equal(torch.cat(logits, 1), expected)
    assert state.memory is not None
    state.memory.close()


def test_a_saved_state_can_be_read_on_from_twice(build_model: BuildModel, tmp_path: Path) -> None:
    """A state in mode "r" leaves the store alone; "r+" rolls it back to the state's commit."""
    model = build_model()
    tokens = random_tokens(1, 2, 60)
    _, state = read(model, fresh(model, 2, path=tmp_path / "memory"), tokens[:, :20], [5] * 4)
    state.save(tmp_path / "state")
    expected, state = read(model, state, tokens[:, 20:40], [5] * 4)
    assert state.memory is not None
    state.memory.commit()
    state.memory.close()

    for mode in ("r", "r", "r+"):
        state = model.load_state(tmp_path / "state", mode)  # type: ignore[arg-type]
        assert state.positions.tolist() == [20, 20]
        again, state = read(model, state, tokens[:, 20:40], [5] * 4)
        assert torch.equal(again, expected)
        assert state.memory is not None
        state.memory.close()


def test_what_a_saved_state_names_stays_readable_until_it_is_replaced(
    build_model: BuildModel, tmp_path: Path
) -> None:
    model = build_model()
    tokens = random_tokens(1, 1, 200)
    _, state = read(model, fresh(model, 1, path=tmp_path / "memory"), tokens[:, :20], [5] * 4)
    state.save(tmp_path / "early")
    expected, _ = read(model, state.fork(), tokens[:, 20:30], [5, 5])
    for start in range(20, 120, 5):  # many more commits than are kept, each with its own saved state
        _, state = read(model, state, tokens[:, start : start + 5], [5])
        state.save(tmp_path / "late")
    assert state.memory is not None
    memory = state.memory
    assert len(memory.commits()) < 15
    again, _ = read(model, model.load_state(tmp_path / "early"), tokens[:, 20:30], [5, 5])
    assert torch.equal(again, expected)

    _, other = read(model, state, tokens[:, 120:130], [5, 5])
    other.save(tmp_path / "early")
    for _ in range(20):
        memory.commit()
    assert model.load_state(tmp_path / "early").positions.tolist() == [130]
    memory.close()


def test_a_memory_without_a_path_is_copied_into_the_folder(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    tokens = random_tokens(2, 2, 40)
    _, state = read(model, fresh(model, 2, capacity=7), tokens[:, :20], [5] * 4)
    for _ in range(3):  # each saving replaces the last, and leaves nothing of it behind
        state.save(tmp_path / "state")
        assert len(list((tmp_path / "state").iterdir())) == 2
    (tmp_path / "state").rename(tmp_path / "moved")
    expected, _ = read(model, state, tokens[:, 20:], [5] * 4)
    again, _ = read(model, model.load_state(tmp_path / "moved"), tokens[:, 20:], [5] * 4)
    assert torch.equal(again, expected)


def test_states_are_moved_and_copied_together_with_the_memory_beside_them(
    build_model: BuildModel, tmp_path: Path
) -> None:
    model = build_model()
    tokens = random_tokens(3, 1, 40)
    _, state = read(model, fresh(model, 1, path=tmp_path / "old" / "memory"), tokens[:, :20], [5] * 4)
    state.save(tmp_path / "old" / "states" / "20")
    assert state.memory is not None
    state.memory.close()
    expected, _ = read(model, model.load_state(tmp_path / "old" / "states" / "20"), tokens[:, 20:], [5] * 4)
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    (tmp_path / "old").rename(tmp_path / "moved")
    moved = {path: path.read_bytes() for path in (tmp_path / "moved").rglob("*") if path.is_file()}
    for name, mode in (("moved", "r"), ("copy", "r+"), ("moved", "r")):
        state = model.load_state(tmp_path / name / "states" / "20", mode)  # type: ignore[arg-type]
        again, state = read(model, state, tokens[:, 20:], [5] * 4)
        assert torch.equal(again, expected)
        if mode == "r+":
            assert state.memory is not None
            assert state.memory.path == tmp_path / "copy" / "memory"
            state.save(tmp_path / name / "states" / "40")
            state.memory.close()
    assert all(path.read_bytes() == content for path, content in moved.items())

    # A state that was moved alone, to where there is another memory, names its own all the same.
    (tmp_path / "other" / "states").mkdir(parents=True)
    fresh(model, 1, path=tmp_path / "other" / "memory").save(tmp_path / "other" / "states" / "0")
    shutil.copytree(tmp_path / "copy" / "states" / "40", tmp_path / "other" / "states" / "40")
    assert model.load_state(tmp_path / "other" / "states" / "40").positions.tolist() == [40]


def test_a_state_saved_over_the_one_it_came_from_can_be_read_on(
    build_model: BuildModel, tmp_path: Path
) -> None:
    model = build_model()
    tokens = random_tokens(2, 2, 40)
    _, state = read(model, fresh(model, 2), tokens[:, :20], [5] * 4)
    state.save(tmp_path)
    expected, _ = read(model, state, tokens[:, 20:], [5] * 4)
    state = model.load_state(tmp_path)
    for _ in range(2):  # its rows were to be read from the copy that this replaces
        state.save(tmp_path)
    again, _ = read(model, state, tokens[:, 20:], [5] * 4)
    assert torch.equal(again, expected)


def test_states_that_share_a_copied_memory_do_not_lose_it(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    tokens = random_tokens(2, 2, 200)
    first, second = tmp_path / "first", tmp_path / "second"
    _, state = read(model, fresh(model, 2), tokens[:, :20], [5] * 4)
    state.save(first)
    state = model.load_state(first, "r+")
    for start in range(20, 120, 10):  # more commits than are kept, all to the copy inside the first folder
        _, state = read(model, state, tokens[:, start : start + 10], [5, 5])
        state.save(second)
    assert state.memory is not None
    state.memory.close()
    assert model.load_state(first).positions.tolist() == [20, 20]

    fresh(model, 2).save(first)  # replaces the first state, but not the memory that the second one names
    expected, _ = read(model, model.load_state(second), tokens[:, 120:], [5] * 16)
    again, _ = read(model, model.load_state(second), tokens[:, 120:], [5] * 16)
    assert torch.equal(again, expected)
    assert model.load_state(second).positions.tolist() == [120, 120]


def test_a_copied_folder_leaves_the_state_it_was_copied_from_alone(
    build_model: BuildModel, tmp_path: Path
) -> None:
    model = build_model()
    tokens = random_tokens(2, 1, 200)
    _, state = read(model, fresh(model, 1, path=tmp_path / "memory"), tokens[:, :20], [5] * 4)
    state.save(tmp_path / "state")
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    for start in range(20, 140, 10):
        _, state = read(model, state, tokens[:, start : start + 10], [5, 5])
        state.save(tmp_path / "copy")
    assert state.memory is not None
    memory = state.memory
    assert model.load_state(tmp_path / "state").positions.tolist() == [20]
    state.save(tmp_path / "state")
    state.fork().save(tmp_path / "state")
    assert len(memory.pins()) == 1  # the last one of the copy
    memory.close()


def test_a_failed_save_leaves_no_pins_and_no_copies(
    build_model: BuildModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    state = fresh(model, 1, path=tmp_path / "memory")
    state.save(tmp_path / "state")
    assert state.memory is not None
    monkeypatch.setattr("xlroute.state.save_file", _full_disk)
    for failing in (state, state.fork()):
        with pytest.raises(OSError, match="No space left"):
            failing.save(tmp_path / "state")
    assert len(state.memory.pins()) == 1
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state.safetensors"]
    state.memory.close()


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_memory_may_be_kept_on_another_device_than_the_weights(build_model: BuildModel) -> None:
    """The routing tokens go to the rows; on a machine without a GPU the meta device shows that they do."""
    model = build_model()
    memory = model.create_memory(streams=1, device="meta")
    memory.append(torch.zeros(2, 1, 30, 16))
    router = model.blocks[1].memory.kv_router
    assert router.scores_by(memory.layer(0), router.routing_token).device.type == "meta"


def test_a_segment_left_open_by_generate_is_saved_too(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    prompt = random_tokens(3, 1, 13)
    new, state = model.generate(prompt, 5, fresh(model, 1), temperature=0)
    assert state.open.shape[2] == 2
    state.save(tmp_path)
    expected, _ = model.generate(new[:, -1:], 9, state, temperature=0)
    again, _ = model.generate(new[:, -1:], 9, model.load_state(tmp_path), temperature=0)
    assert torch.equal(again, expected)


# ---- What the memory holds ----


@given(cuts=cuts_of, other=cuts_of, seed=seeds)
@a_few
def test_the_cuts_do_not_change_which_positions_the_memory_holds(
    build_model: BuildModel, cuts: list[int], other: list[int], seed: int
) -> None:
    model = build_model()
    total = min(sum(cuts), sum(other))
    tokens = random_tokens(seed, 1, total)
    held = []
    for lengths in (cuts, other):
        state = fresh(model, 1)
        for piece in tokens.split(_fit(lengths, total), dim=1):
            _, state = model(piece, state)
        assert state.memory is not None
        count = int(state.memory.lengths[0])
        held.append(state.memory.positions(torch.arange(count)[None]).tolist())
        assert int(state.window_lengths[0]) + count == total == int(state.positions[0])
    assert held[0] == held[1] == [list(range(max(0, total - model.mem_len)))]


def _fit(cuts: list[int], total: int) -> list[int]:
    """The first cuts that make up the total, the last one shortened."""
    fitted: list[int] = []
    for cut in cuts:
        fitted.append(min(cut, total - sum(fitted)))
        if sum(fitted) == total:
            break
    return fitted


@given(
    segments=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=3, max_size=3),
            st.lists(st.sampled_from([False, False, False, True]), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    capacity=st.sampled_from([None, 4, 11]),
    route=st.booleans(),
    seed=seeds,
)
@a_few
def test_each_stream_reads_as_if_alone_and_holds_its_own_document(
    build_model: BuildModel,
    routed_all: dict[str, Any],
    segments: list[tuple[list[int], list[bool]]],
    capacity: int | None,
    route: bool,
    seed: int,
) -> None:
    """Ragged segments, documents that end at different times, eviction: a batch equals its streams alone."""
    model = build_model(**(routed_all if route else {}))
    n = 9
    # No token follows itself: of equal ones that begin a document, rounding says which is routed.
    drawn = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(50, generator=drawn) for _ in range(3)])
    tokens = order[:, torch.arange(n * len(segments)) % 50]
    pieces = tokens.split(n, dim=1)

    def run(streams: list[int]) -> tuple[list[list[Tensor]], TransformerXLState]:
        state = fresh(model, len(streams), capacity=capacity)
        logits: list[list[Tensor]] = [[] for _ in streams]
        with torch.no_grad():
            for piece, (lengths, ends) in zip(pieces, segments, strict=True):
                out, state = model(
                    piece[streams],
                    state,
                    lengths=torch.tensor([lengths[i] for i in streams]),
                    ends=torch.tensor([ends[i] for i in streams]),
                )
                for slot, stream in enumerate(streams):
                    logits[slot].append(out[slot, : lengths[stream]])
        return logits, state

    together, state = run([0, 1, 2])
    assert state.memory is not None
    for stream in range(3):
        read_now = 0
        for lengths, ends in segments:
            read_now = 0 if ends[stream] else read_now + lengths[stream]
        left = max(0, read_now - model.mem_len)
        held = left if capacity is None else min(left, capacity)
        assert int(state.positions[stream]) == read_now
        assert int(state.memory.lengths[stream]) == held

        alone, single = run([stream])
        torch.testing.assert_close(torch.cat(together[stream]), torch.cat(alone[0]))
        assert single.memory is not None
        held_positions = single.memory.positions(torch.arange(held)[None])
        assert held_positions.tolist() == [list(range(left - held, left))]
        for layer in range(2):
            torch.testing.assert_close(
                state.memory.rows(layer)[0][stream, :held], single.memory.rows(layer)[0][0]
            )


def test_eviction_keeps_exactly_the_last_rows(build_model: BuildModel) -> None:
    model = build_model(
        memory_layers=(1,)
    )  # the states that enter the first block do not depend on the memory
    tokens = random_tokens(5, 1, 70)
    _, everything = read(model, fresh(model, 1), tokens, [7] * 10)
    for capacity in (1, 5, 13, 100):
        _, state = read(model, fresh(model, 1, capacity=capacity), tokens, [7] * 10)
        assert state.memory is not None
        assert everything.memory is not None
        rows, whole = state.memory.rows(0)[0], everything.memory.rows(0)[0]
        assert torch.equal(rows, whole[:, -capacity:])
        assert rows.shape[1] == min(capacity, 64)


# ---- Causality ----


@pytest.mark.parametrize("kind", ["parallel", "eval", "steps"])
def test_nothing_before_a_changed_token_moves(build_model: BuildModel, kind: str) -> None:
    model = build_model()
    model.train(kind == "parallel")
    length, cuts = 24, [5, 7, 1, 11]
    tokens = random_tokens(6, 1, length)

    def logits_of(tokens: Tensor) -> Tensor:
        if kind != "steps":
            return read(model, fresh(model, 1), tokens, cuts)[0]
        from xlroute.open_segment import OpenSegment

        segment = OpenSegment(model, fresh(model, 1), segment_len=5)
        with torch.no_grad():
            return torch.cat([segment.read(tokens[:, i : i + 1]) for i in range(length)], dim=1)

    reference = logits_of(tokens)
    for t in range(length):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + torch.randint(1, 50, (1, length - t))) % 50
        other = logits_of(changed)
        assert torch.equal(other[:, :t], reference[:, :t]), t
        assert not torch.allclose(other[:, t], reference[:, t]), t


# ---- Crashes ----


def test_killed_in_the_middle_it_opens_at_the_last_commit_and_reads_on(
    build_model: BuildModel, tmp_path: Path
) -> None:
    model = build_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokens = random_tokens(7, 2, 4000)
    torch.save(tokens, tmp_path / "tokens.pt")
    state = fresh(model, 2, path=tmp_path / "memory")
    state.save(tmp_path / "state")
    assert state.memory is not None
    state.memory.close()

    # The whole document, uninterrupted.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, whole = read(model, fresh(model, 2), tokens, [5] * 800)
    assert whole.memory is not None

    command = [sys.executable, "-P", str(TESTS / "reading_child.py")]
    files = [str(tmp_path / name) for name in ("model", "state", "tokens.pt")]
    with subprocess.Popen([*command, *files], stdin=-1, stdout=-1, text=True, bufsize=1) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        reached = 0
        for _ in range(20):
            server.stdin.write("read\n")
            pid = int(server.stdout.readline().split()[1])
            acknowledged = [reached]
            # Some are killed before their first state and some after a few, however busy the machine is.
            for _ in range(random.randrange(3)):
                acknowledged.append(int(server.stdout.readline().split()[1]))
            time.sleep(random.uniform(0.0, 0.2))
            os.kill(pid, signal.SIGKILL)
            while (line := server.stdout.readline().split())[0] == "saved":
                acknowledged.append(int(line[1]))

            state = model.load_state(tmp_path / "state", "r")
            reached = int(state.positions[0])
            # What was reported as saved is there; at most one more, whose report was cut off.
            assert reached in (acknowledged[-1], acknowledged[-1] + 10)
            assert state.memory is not None
            count = max(0, reached - model.mem_len)
            assert state.memory.lengths.tolist() == [count, count]
            for layer in range(2):
                rows, _ = state.memory.rows(layer)
                assert torch.equal(rows, whole.memory.rows(layer)[0][:, :count])
            logits, _ = read(model, state, tokens[:, reached : reached + 20], [5] * 4)
            assert torch.equal(logits, expected[:, reached : reached + 20])
            with MemoryStore.open(tmp_path / "memory") as store:  # without a state: the last commit, whole
                assert set(store.lengths.tolist()) <= {count, max(0, reached + 10 - model.mem_len)}
        server.stdin.close()
    torch.set_num_threads(threads)
    assert reached > 0


# ---- Damage ----


def _saved(model: RoutedTransformerXL, folder: Path) -> None:
    state = fresh(model, 2, path=folder / "state" / "memory")
    _, state = read(model, state, random_tokens(8, 2, 30), [5] * 6)
    state.save(folder / "state")
    assert state.memory is not None
    state.memory.close()


def _refused_by_name_or_harmless(
    model: RoutedTransformerXL, folder: Path, damaged: Path, tokens: Tensor, expected: Tensor
) -> bool:
    """Whether reading on was refused: then it must name the file; otherwise nothing may have changed."""
    try:
        logits, _ = read(model, model.load_state(folder), tokens, [5, 5])
    except MemoryStoreError as refusal:
        message = str(refusal)
    else:
        assert torch.equal(logits, expected), damaged
        return False
    assert damaged.name in message, (damaged, message)
    return True


@pytest.mark.filterwarnings("ignore:the scores are computed anew:UserWarning")
def test_a_flipped_byte_in_any_file_is_refused_by_name_or_harmless(
    build_model: BuildModel, tmp_path: Path
) -> None:
    model = build_model()
    _saved(model, tmp_path)
    tokens = random_tokens(9, 2, 10)
    expected, _ = read(model, model.load_state(tmp_path / "state"), tokens, [5, 5])
    refused: set[str] = set()
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 6
    for path in files:
        size = path.stat().st_size
        # Chunk files are sparse and large; their rows lie at the front.
        for place in {0, size - 1, *(random.randrange(min(size, 3000)) for _ in range(6))}:
            with path.open("r+b") as file:
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ (1 << random.randrange(8))]))
            if _refused_by_name_or_harmless(model, tmp_path / "state", path, tokens, expected):
                refused.add(path.name)
            with path.open("r+b") as file:
                file.seek(place)
                file.write(byte)
    assert "state.safetensors" in refused
    assert len(refused) > 3
    read(model, model.load_state(tmp_path / "state"), tokens, [5, 5])


@pytest.mark.filterwarnings("ignore:the scores are computed anew:UserWarning")
def test_truncated_files_are_refused_by_name_or_harmless(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    _saved(model, tmp_path)
    tokens = random_tokens(9, 2, 10)
    expected, _ = read(model, model.load_state(tmp_path / "state"), tokens, [5, 5])
    refused: set[str] = set()
    for path in [path for path in (tmp_path / "state").rglob("*") if path.is_file() and path.stat().st_size]:
        size = path.stat().st_size
        with path.open("r+b") as file:
            content = file.read(10_000)
            file.truncate(min(size // 3, 100))
        if _refused_by_name_or_harmless(model, tmp_path / "state", path, tokens, expected):
            refused.add(path.name)
        with path.open("r+b") as file:
            file.write(content)
            file.truncate(size)
    assert "state.safetensors" in refused
    assert len(refused) > 3


# ---- Refusals ----


def test_other_weights_are_refused_unless_asked_for(build_model: BuildModel, tmp_path: Path) -> None:
    model, other = build_model(), build_model()
    _saved(model, tmp_path)
    with pytest.raises(FingerprintError, match=f"expected a state of these weights .{other.fingerprint()}"):
        other.load_state(tmp_path / "state")
    assert other.load_state(tmp_path / "state", allow_other_weights=True).positions.tolist() == [30, 30]
    with pytest.raises(FingerprintError, match=other.fingerprint()):
        MemoryStore.open(tmp_path / "state" / "memory", fingerprint=other.fingerprint())


def test_a_second_writer_is_told_of_the_first(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    _saved(model, tmp_path)
    first = model.load_state(tmp_path / "state", "r+")
    with pytest.raises(StoreLockedError, match=str(os.getpid())):
        model.load_state(tmp_path / "state", "r+")
    reader = model.load_state(tmp_path / "state", "r")
    assert reader.positions.tolist() == [30, 30]
    assert first.memory is not None
    first.memory.close()
    second = model.load_state(tmp_path / "state", "r+")
    assert second.memory is not None
    second.memory.close()


def test_a_read_only_store_refuses_to_be_written(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    _saved(model, tmp_path)
    with MemoryStore.open(tmp_path / "state" / "memory") as store:
        with pytest.raises(ReadOnlyError, match="memory: expected one that can be written, got mode='r'"):
            model.initial_state(streams=2, memory=store)
        state = model.initial_state(streams=2, memory=store.fork())
        read(model, state, random_tokens(1, 2, 20), [5] * 4)


def test_states_that_cannot_be_read_are_refused(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    with pytest.raises(StoreNotFoundError, match=r"state\.safetensors: there is no saved state"):
        model.load_state(tmp_path)
    _saved(model, tmp_path)
    with pytest.raises(ValueError, match="mode: expected 'r' or 'r\\+', got 'w'"):
        model.load_state(tmp_path / "state", "w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected depth=3, mem_len=7, dim=16, got depth=3, mem_len=6"):
        build_model(mem_len=7).load_state(tmp_path / "state", allow_other_weights=True)

    from safetensors.torch import save_file

    state_file = tmp_path / "state" / "state.safetensors"
    whole = state_file.read_bytes()
    save_file({"a": torch.zeros(1)}, state_file)
    with pytest.raises(FormatError, match="expected a state saved by xlroute"):
        model.load_state(tmp_path / "state")
    save_file({"a": torch.zeros(1)}, state_file, metadata={"xlroute": json.dumps({"format_version": 99})})
    with pytest.raises(FormatError, match="expected format version 1, got 99"):
        model.load_state(tmp_path / "state")
    state_file.write_bytes(whole[:50])
    with pytest.raises(CorruptionError, match=r"state\.safetensors: the file is damaged"):
        model.load_state(tmp_path / "state")
    state_file.write_bytes(whole)
    (tmp_path / "state" / "memory").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreNotFoundError, match="its memory is not there"):
        model.load_state(tmp_path / "state")


def test_a_save_that_fails_leaves_the_state_before_it(
    build_model: BuildModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    tokens = random_tokens(4, 2, 30)
    _, state = read(model, fresh(model, 2, path=tmp_path / "memory"), tokens[:, :15], [5] * 3)
    state.save(tmp_path / "state")
    _, state = read(model, state, tokens[:, 15:], [5] * 3)

    with monkeypatch.context() as patch:
        patch.setattr("xlroute.state.save_file", _full_disk)
        with pytest.raises(OSError, match="No space left"):
            state.save(tmp_path / "state")
    assert model.load_state(tmp_path / "state").positions.tolist() == [15, 15]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state.safetensors"]
    state.save(tmp_path / "state")
    assert model.load_state(tmp_path / "state").positions.tolist() == [30, 30]
    assert state.memory is not None
    state.memory.close()
