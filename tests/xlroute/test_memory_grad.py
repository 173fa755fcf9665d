"""Rows of the memory that keep their graph: the numbers of those without, the gradients of a dense model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.attached import AttachedRows
from xlroute.blocks import RoutedRows
from xlroute.position import age_place

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB = 50


class Segment(NamedTuple):
    """What two streams read in one call, and the gradient of what comes out."""

    tokens: Tensor
    lengths: Tensor
    ends: Tensor
    cotangent: Tensor  # [b, n, vocab], 0 where no token counts


def segments(count: int = 7, *, ragged: bool = True) -> list[Segment]:
    """Segments of two streams, of other lengths; one document ends in the middle, and others begin.

    No token follows itself: states of the same token are then equal but for rounding, where it begins a
    document, and either may be chosen before the other.
    """
    drawn: list[Segment] = []
    order, first = torch.stack([torch.randperm(VOCAB) for _ in range(2)]), 0
    for i in range(count):
        n = int(torch.randint(3, 7, ()))
        lengths = torch.randint(0, n + 1, (2,)) if ragged else torch.full((2,), n)
        ends = torch.tensor([False, ragged and i == count // 2])
        cotangent = torch.randn(2, n, VOCAB, dtype=torch.float64)
        cotangent[torch.arange(n) >= lengths[:, None]] = 0
        tokens = order[:, torch.arange(first, first + n) % VOCAB]
        first += n
        drawn.append(Segment(tokens, lengths, ends, cotangent))
    return drawn


def begin(model: RoutedTransformerXL, **options: Any) -> TransformerXLState:
    return model.initial_state(streams=2, memory=model.create_memory(streams=2, **options))


def read(
    model: RoutedTransformerXL, state: TransformerXLState, pieces: Sequence[Segment]
) -> tuple[list[Tensor], Tensor, TransformerXLState]:
    """The logits of each segment, the loss of all, and the state after them."""
    logits, loss = [], torch.zeros((), dtype=torch.float64)
    for tokens, lengths, ends, cotangent in pieces:
        out, state = model(tokens, state, lengths=lengths, ends=ends)
        logits.append(out)
        loss = loss + (out * cotangent).sum()
    return logits, loss, state


def read_dense(
    model: RoutedTransformerXL,
    pieces: Sequence[Segment],
    *,
    grad_segments: int,
    mems_grad: bool,
    capacity: int | None = None,
) -> Tensor:
    """The loss of all segments, by a model that keeps all states of a stream side by side, and no store."""
    loss = torch.zeros((), dtype=torch.float64)
    for stream in range(2):
        history: list[list[tuple[int, Tensor]]] = [[] for _ in model.blocks]
        for now, (tokens, lengths, ends, cotangent) in enumerate(pieces):
            n = int(lengths[stream])
            if n:
                x = model.embedding(tokens[stream : stream + 1, :n])
                for block, states in zip(model.typed_blocks(), history, strict=True):
                    past = [s if now - then <= grad_segments else s.detach() for then, s in states]
                    whole = torch.cat((x[:, :0], *past), dim=1)
                    states.append((now, x))
                    window = whole[:, max(whole.shape[1] - model.mem_len, 0) :]
                    behind = whole[:, : whole.shape[1] - window.shape[1]]
                    behind = behind[:, max(behind.shape[1] - (capacity or 10**6), 0) :]
                    rows = []
                    if block.memory is not None:
                        routed = block.memory.kv_router(
                            behind, num_tokens=block.memory.num_tokens_kv, keep_one_route_dim=True
                        )
                        after = F.pad(behind, (0, 0, 0, 1))
                        ages = behind.shape[1] + window.shape[1] - routed.indices
                        followers = after[0, routed.indices + 1]
                        rows.append(RoutedRows(routed, followers, age_place(ages)))
                    lacking = model.mem_len - window.shape[1]
                    mask = torch.arange(model.mem_len)[None] >= lacking
                    window = F.pad(window, (0, 0, lacking, 0))
                    window = window if mems_grad else window.detach()
                    view = model.segment_view(mask, n)
                    x, _ = block(x, window, mask, view, rows, x.new_empty(1, 0, 0))
                loss = loss + (model.to_logits(model.norm(x)) * cotangent[stream : stream + 1, :n]).sum()
            if ends[stream]:
                history = [[] for _ in model.blocks]
    return loss


def gradients(model: RoutedTransformerXL, loss: Tensor, **options: Any) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, **options)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def twin(build_model: BuildModel, model: RoutedTransformerXL, **options: Any) -> RoutedTransformerXL:
    """A model of the same weights with other options."""
    other = build_model(**{**model.config, **options})
    other.load_state_dict(model.state_dict())
    return other


MEMORIES: dict[str, dict[str, Any]] = {
    "all": {},
    "oldest": {"capacity": 7},
    "lowest_score": {"capacity": 8, "eviction": "lowest_score"},
    "every_nth": {"capacity": 8, "eviction": "every_nth", "keep_every": 3},
    "bfloat16": {"dtype": torch.bfloat16},
}


# ---- The same numbers ----


@pytest.mark.parametrize(
    ("memory", "mems_grad", "routes"),
    [(memory, False, False) for memory in MEMORIES] + [("all", True, False), ("all", True, True)],
)
def test_logits_and_memory_are_those_without_it(
    build_model: BuildModel, routed_all: dict[str, Any], memory: str, mems_grad: bool, routes: bool
) -> None:
    plain = build_model(router_kwargs={"eps": 1.0}, mem_len=3, **(routed_all if routes else {}))
    keeping = twin(build_model, plain, memory_grad_segments=3, mems_grad=mems_grad)
    pieces = segments(9)
    (expected, _, before), (got, _, after) = (
        read(model, begin(model, **MEMORIES[memory]), pieces) for model in (plain, keeping)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert before.memory is not None
    assert after.memory is not None
    assert torch.equal(before.memory.lengths, after.memory.lengths)
    indices = torch.arange(int(before.memory.lengths.min())).expand(2, -1)
    assert torch.equal(before.memory.positions(indices), after.memory.positions(indices))
    for layer in range(2):
        assert torch.equal(before.memory.rows(layer)[0], after.memory.rows(layer)[0])


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_row_with_a_graph_stands_where_its_copy_does(build_model: BuildModel, memory: str) -> None:
    model = build_model(mem_len=3, memory_grad_segments=3)
    state = begin(model, **MEMORIES[memory])
    have_graph = 0
    for i, piece in enumerate(segments(9)):
        _, _, state = read(model, state, [piece])
        assert state.memory is not None
        if i == 5:
            state.clear_memory()
        longest = int(state.memory.lengths.max())
        indices = torch.arange(longest).expand(2, -1)
        indices = indices.masked_fill(indices >= state.memory.lengths[:, None], -1)
        tokens = torch.randn(2, 4, 16, dtype=torch.float64)
        for layer, block in ((0, 1), (1, 2)):
            stored = state.memory.layer(layer)
            attached = AttachedRows(state.attached, state.window_lengths).in_memory(stored, block)
            rows = attached.take(indices)
            have_graph += rows.requires_grad
            assert torch.equal(rows, stored.take(indices))
            options: dict[str, Any] = {"normalize": "rms", "scale": 0.25}
            assert torch.equal(attached.scores(tokens, **options), stored.scores(tokens, **options))
    assert have_graph


# ---- The same gradients as a dense model ----


@pytest.mark.parametrize("num_tokens_kv", [3, 1000], ids=["routed", "all_rows"])
@pytest.mark.parametrize(("grad_segments", "mems_grad"), [(1, False), (2, True), (99, False), (99, True)])
def test_gradients_are_those_of_a_dense_model(
    build_model: BuildModel, grad_segments: int, mems_grad: bool, num_tokens_kv: int
) -> None:
    model = build_model(
        mem_len=2,
        num_tokens_kv=num_tokens_kv,
        router_kwargs={"eps": 1.0},
        memory_grad_segments=grad_segments,
        mems_grad=mems_grad,
    )
    pieces = segments()
    _, loss, _ = read(model, begin(model), pieces)
    expected = read_dense(model, pieces, grad_segments=grad_segments, mems_grad=mems_grad)
    torch.testing.assert_close(loss, expected)
    assert_close(gradients(model, loss), gradients(model, expected))


def test_gradients_where_the_oldest_rows_leave(build_model: BuildModel) -> None:
    model = build_model(mem_len=2, router_kwargs={"eps": 1.0}, memory_grad_segments=3)
    pieces = segments()
    _, loss, _ = read(model, begin(model, capacity=5), pieces)
    expected = read_dense(model, pieces, grad_segments=3, mems_grad=False, capacity=5)
    assert_close(gradients(model, loss), gradients(model, expected))


def test_gradients_are_finite_differences(build_model: BuildModel) -> None:
    """Through all segments and windows, where all rows are chosen: another choice of rows would be a jump."""
    model = build_model(mem_len=3, num_tokens_kv=1000, memory_grad_segments=99, mems_grad=True)
    pieces = segments()
    parameters = list(model.blocks[0].parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
            _, loss, _ = read(model, begin(model), pieces)
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=step)
        return loss

    _, loss, _ = read(model, begin(model), pieces)
    found = torch.autograd.grad(loss, parameters)
    slope = sum((gradient * direction).sum() for gradient, direction in zip(found, directions, strict=True))
    step = 1e-6
    torch.testing.assert_close(slope, (moved(step) - moved(-step)) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routes", [False, True])
def test_gradients_of_recomputed_blocks(
    build_model: BuildModel, routed_all: dict[str, Any], routes: bool
) -> None:
    options = routed_all if routes else {}
    model = build_model(mem_len=3, memory_grad_segments=3, mems_grad=True, **options)
    saving = twin(build_model, model, gradient_checkpointing=True)
    pieces = segments()
    (_, loss, _), (_, other, _) = (read(each, begin(each), pieces) for each in (model, saving))
    assert_close(gradients(saving, other), gradients(model, loss))


# The compiler looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("forgetful_compiler")
def test_gradients_of_a_compiled_block(build_model: BuildModel) -> None:
    model = build_model(depth=2, memory_layers=(2,), mem_len=2, memory_grad_segments=2, mems_grad=True)
    before, after = segments(1, ragged=False), segments(1, ragged=False)
    _, loss, state = read(model, begin(model), before)
    expected = gradients(model, loss + read(model, state.fork(), after)[1], retain_graph=True)
    model.blocks[1].compile(fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, loss + read(model, state, after)[1]), expected)


# ---- How long it lasts ----


def reaches(model: RoutedTransformerXL, state: TransformerXLState, first: Segment) -> bool:
    """Whether the loss of a further segment, of other tokens, reaches the embeddings of the first one."""
    [piece] = segments(1, ragged=False)
    _, loss, _ = read(model, state, [piece._replace(tokens=piece.tokens % 25)])
    return bool(gradients(model, loss)["embedding.weight"][first.tokens].any())


def read_first(
    build_model: BuildModel, **options: Any
) -> tuple[RoutedTransformerXL, Segment, TransformerXLState, Tensor]:
    """A model that has read a segment of five tokens, the state after it, and its loss."""
    model = build_model(**{"mem_len": 2, "num_tokens_kv": 1000, "tie_embeddings": False, **options})
    tokens, ends = torch.randint(25, VOCAB, (2, 5)), torch.zeros(2, dtype=torch.bool)
    first = Segment(tokens, torch.tensor([5, 5]), ends, torch.randn(2, 5, VOCAB, dtype=torch.float64))
    _, loss, state = read(model, begin(model), [first])
    return model, first, state, loss


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"memory_grad_segments": 1}, True),
        ({"memory_grad_segments": 1, "mem_len": 5}, False),
        ({"memory_grad_segments": 1, "mem_len": 5, "mems_grad": True}, True),
        ({"memory_grad_segments": 1, "memory_layers": (3,)}, True),
    ],
)
def test_what_was_written_learns_from_what_reads_it(
    build_model: BuildModel, options: dict[str, Any], expected: bool
) -> None:
    model, first, state, _ = read_first(build_model, **options)
    assert reaches(model, state, first) == expected


def test_a_backward_ends_it_unless_the_graph_is_retained(build_model: BuildModel) -> None:
    model, first, state, loss = read_first(build_model, memory_grad_segments=9)
    gradients(model, loss, retain_graph=True)
    assert reaches(model, state.fork(), first)  # this one too has gone backward, through all that came before
    assert not reaches(model, state, first)


@pytest.mark.parametrize("mems_grad", [False, True])
def test_going_backward_at_any_time(build_model: BuildModel, mems_grad: bool) -> None:
    """Gradients are those of the segments between two backwards, whatever lies before them."""
    model = build_model(mem_len=2, memory_grad_segments=9, mems_grad=mems_grad)
    state, pieces = begin(model), segments()
    for part in (pieces[:1], pieces[1:4], pieces[4:5], pieces[5:]):
        detached = state.fork().detach()
        _, loss, state = read(model, state, part)
        _, expected, _ = read(model, detached, part)
        assert_close(gradients(model, loss), gradients(model, expected))


def test_a_detached_state_has_no_graph(build_model: BuildModel) -> None:
    model, first, state, _ = read_first(build_model, memory_grad_segments=9)
    detached = state.detach()
    with pytest.raises(ValueError, match="state: expected one that was not read on from"):
        state.detach()
    assert not reaches(model, detached, first)


@pytest.mark.parametrize("generates", [False, True], ids=["reads", "generates"])
def test_without_gradient_in_between_the_graph_is_let_go(build_model: BuildModel, generates: bool) -> None:
    model, first, state, _ = read_first(build_model, memory_grad_segments=9)
    fork = state.fork()
    if generates:
        _, state = model.generate(torch.randint(VOCAB, (2, 1)), 2, state)
        assert not state.attached
    else:
        with torch.no_grad():
            _, state = model(torch.randint(VOCAB, (2, 1)), state)
    assert not reaches(model, state, first)
    assert reaches(model, fork, first)


def test_forks_share_the_graph(build_model: BuildModel) -> None:
    model = build_model(mem_len=2, memory_grad_segments=9)
    before, after, others = segments(3), segments(3), segments(3)
    _, loss, state = read(model, begin(model), before)
    fork = state.fork()
    total = loss + read(model, state, after)[1] + read(model, fork, others)[1]
    # What was read before is counted by both of the others.
    expected = -read_dense(model, before, grad_segments=9, mems_grad=False)
    for last in (after, others):
        expected = expected + read_dense(model, [*before, *last], grad_segments=9, mems_grad=False)
    torch.testing.assert_close(total, expected)
    assert_close(gradients(model, total), gradients(model, expected))


def test_a_state_is_saved_whole_and_goes_on_with_its_graph(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model(mem_len=2, memory_grad_segments=9)
    before, after = segments(4), segments(3)
    _, loss, state = read(model, begin(model), before)
    state.save(tmp_path / "state")
    logits, more, state = read(model, state, after)
    expected = read_dense(model, [*before, *after], grad_segments=9, mems_grad=False)
    assert_close(gradients(model, loss + more), gradients(model, expected))

    loaded, _, other = read(model, model.load_state(tmp_path / "state"), after)
    assert all(torch.equal(a, b) for a, b in zip(logits, loaded, strict=True))
    assert state.memory is not None
    assert other.memory is not None
    for layer in range(2):
        assert torch.equal(state.memory.rows(layer)[0], other.memory.rows(layer)[0])


def test_a_refused_call_leaves_the_graph(build_model: BuildModel) -> None:
    model, first, state, _ = read_first(build_model, memory_grad_segments=9)
    with pytest.raises(ValueError, match="lengths: expected 0 to 1"):
        model(torch.randint(VOCAB, (2, 1)), state, lengths=torch.tensor([2, 0]))
    assert reaches(model, state, first)


# ---- Options ----


def test_options_are_saved_and_older_models_have_none(build_model: BuildModel, tmp_path: Path) -> None:
    build_model(memory_grad_segments=3, mems_grad=True).save_pretrained(tmp_path)
    loaded = RoutedTransformerXL.from_pretrained(tmp_path)
    assert (loaded.memory_grad_segments, loaded.mems_grad) == (3, True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["memory_grad_segments"], config["mems_grad"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = RoutedTransformerXL.from_pretrained(tmp_path)
    assert (loaded.memory_grad_segments, loaded.mems_grad) == (0, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_grad_segments": -1}, "memory_grad_segments: expected at least 0, got -1"),
        ({"mems_grad": True}, "mems_grad: expected False with memory_grad_segments=0, got True"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedTransformerXL(**options)
