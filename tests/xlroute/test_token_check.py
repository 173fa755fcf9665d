"""Tokens are checked while the host goes on; a call that is refused leaves all as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState, transformer_xl
from xlroute.memory import MemoryStore
from xlroute.token_check import begin_check

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB = 50
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))]

KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "shortlist": {"routing_shortlist": 2.0},
    "tokens": {"memory_routing": "content"},
    "chunks": {"memory_routing": "content", "routing_chunk": 3},
    "both": {"memory_routing": "both"},
    "random": {"memory_routing": "random"},
    "rows with a graph": {"memory_grad_segments": 3},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"num_content_tokens_kv": 2, "routing_key_dim": 8, **KINDS[request.param]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_tokens_out_of_range_are_told(device: str, dtype: torch.dtype) -> None:
    tokens = torch.randint(VOCAB, (3, 7), device=device, dtype=dtype)
    tokens[0, :2] = torch.tensor([0, VOCAB - 1])
    begin_check(tokens, VOCAB)()
    for wrong, low, high in ((VOCAB, 0, VOCAB), (-1, -1, VOCAB - 1)):
        bad = tokens.clone()
        bad[2, 4] = wrong
        check = begin_check(bad, VOCAB)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"tokens: expected 0 to 49, got {low} to {high}"):
                check()


def read(
    model: RoutedTransformerXL, state: TransformerXLState, steps: int, *, uneven: bool
) -> TransformerXLState:
    for _ in range(steps):
        state = model(torch.randint(VOCAB, (2, 5)), state, torch.tensor([5, 4]) if uneven else None)[1]
    return state


def same(ours: TransformerXLState, theirs: TransformerXLState) -> None:
    for name in ("window", "window_lengths", "positions", "open", "scores"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.memory is not None
    assert theirs.memory is not None
    for layer in range(2):
        for a, b in zip(ours.memory.rows(layer), theirs.memory.rows(layer), strict=True):
            assert torch.equal(a, b)


def refuse(model: RoutedTransformerXL, state: TransformerXLState, tokens: Tensor) -> None:
    for wrong in (VOCAB, -1):
        bad = tokens.clone()
        bad[1, 2] = wrong
        with pytest.raises(ValueError, match="tokens: expected 0 to 49, got"):
            model(bad, state)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("left_open", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_a_refused_call_is_as_none(
    build_model: BuildModel,
    kind: dict[str, Any],
    uneven: bool,
    training: bool,
    left_open: bool,
    place: str,
    tmp_path: Path,
) -> None:
    model = build_model(**kind).train(training)
    ours, theirs = (
        model.initial_state(
            streams=2,
            memory=MemoryStore.create(
                tmp_path / name if place == "disk" else None,
                layers=2,
                streams=2,
                dim=model.dim,
                dtype=torch.float64,
                capacity=11,
                eviction="lowest_score",
            ),
        )
        for name in ("ours", "theirs")
    )
    seed, begun = torch.seed(), []
    for state in (ours, theirs):
        torch.manual_seed(seed)
        state = read(model, state, 3, uneven=uneven)
        if left_open:
            state = model.generate(torch.randint(VOCAB, (2, 2)), 2, state)[1]
            assert state.open.shape[2] == 3
        begun.append(state)
    ours, theirs = begun
    for _ in range(4):
        tokens, seed = torch.randint(VOCAB, (2, 5)), torch.seed()
        with torch.set_grad_enabled(training):
            torch.manual_seed(seed)
            refuse(model, ours, tokens)
            same(ours, theirs)
            given, ours = model(tokens, ours)
            torch.manual_seed(seed)
            expected, theirs = model(tokens, theirs)
        assert torch.equal(given, expected)
        same(ours, theirs)
    if training:
        weights = list(model.parameters())
        pairs = [torch.autograd.grad(each.sum(), weights, allow_unused=True) for each in (given, expected)]
        for mine, other in zip(*pairs, strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)


@pytest.mark.parametrize("left_open", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("given", [False, True], ids=["blocks read", "blocks are given rows"])
def test_the_host_waits_behind_all_that_changes_nothing(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch, left_open: bool, given: bool
) -> None:
    """A segment that is open would be ended, and rows that blocks are given might be counted."""
    model, events = build_model(gradient_checkpointing=given), []
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
    for _ in range(2):  # as many tokens of both streams, so that on a CPU blocks can read, too
        state = model(torch.randint(VOCAB, (2, 5)), state)[1]
    if left_open:
        state = model.generate(torch.randint(VOCAB, (2, 2)), 2, state)[1]

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            events.append(name)
            return call(*args, **options)

        return noted

    def begin(tokens: Tensor, vocab_size: int) -> Callable[[], None]:
        events.append("begin")
        return noting("wait", begin_check(tokens, vocab_size))

    monkeypatch.setattr(transformer_xl, "begin_check", begin)
    monkeypatch.setattr(model, "end_open_segment", noting("end", model.end_open_segment))
    monkeypatch.setattr(model, "begin_to_open", noting("open", model.begin_to_open))
    model.embedding.register_forward_pre_hook(lambda *_: events.append("embed"))
    model(torch.randint(VOCAB, (2, 5)), state)
    last = ["wait", "embed"] if given else ["embed", "wait"]
    assert events == ["begin", *(["wait", "end"] if left_open else []), "open", *last]
