"""Blocks that are compiled as one read what they read one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.memory import MemoryStore

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB, N, DEPTH = 50, 5, 4

# Options, and the lengths of the runs that are read as one.
KINDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "no memory": ({"memory_layers": ()}, [4]),
    "learned": ({}, [4]),
    "layers apart": ({"memory_layers": (1, 2, 4)}, [4]),
    "shortlist": ({"routing_shortlist": 2.0}, [4]),
    "random": ({"memory_routing": "random"}, [4]),
    "by token": ({"memory_routing": "content"}, [1, 2, 1]),
    "by token before one": ({"memory_routing": "content", "memory_layers": (3,)}, [2, 2]),
    "before the first": ({"memory_routing": "content", "memory_layers": (1,)}, [4]),
    "by chunks": ({"memory_routing": "content", "routing_chunk": 3}, [1, 2, 1]),
    "both": ({"memory_routing": "both"}, [1, 2, 1]),
    "routed queries": ({"num_tokens_q": 2, "routing_window": 3}, [4]),
    "routed attention": (
        {"routed_self_attention": True, "routed_feedforward": True, "routing_window": 3, "mem_len": 6},
        [4],
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def build(build_model: BuildModel) -> Callable[[str], RoutedTransformerXL]:
    def build(kind: str, **options: Any) -> RoutedTransformerXL:
        sizes = {"depth": DEPTH, "memory_layers": (2, 4), "num_content_tokens_kv": 2, "routing_key_dim": 8}
        return build_model(**{**sizes, **KINDS[kind][0], **options})

    return build


def begin(model: RoutedTransformerXL, path: Path | None = None) -> TransformerXLState:
    memory = None
    if model.memory_layers:
        sizes = {"layers": len(model.memory_layers), "streams": 2, "dim": model.dim, "capacity": 11}
        memory = MemoryStore.create(path, dtype=torch.float64, **sizes)
    return model.initial_state(streams=2, memory=memory)


def count_runs(model: RoutedTransformerXL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each call reads, which stay as they are."""
    lengths: list[int] = []
    forward = model.block_run.forward

    def counting(blocks: Any, *inputs: Any) -> Any:
        lengths.append(len(blocks))
        return forward(blocks, *inputs)

    monkeypatch.setattr(model.block_run, "forward", counting)
    return lengths


def read(
    model: RoutedTransformerXL, state: TransformerXLState, texts: list[Tensor], **options: Any
) -> list[Tensor]:
    """Logits, gradients, and what the last state holds."""
    found = []
    lengths, ends = torch.tensor([N, N - 1]), torch.tensor([False, True])
    for i, text in enumerate(texts):
        torch.manual_seed(i)
        logits, state, *_ = model(text, state, lengths, ends if i == 3 else None, **options)
        found.append(logits.detach())
        if torch.is_grad_enabled():
            model.zero_grad()
            logits[:, : N - 1].square().mean().backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    found += [state.window, state.scores, state.positions]
    if state.memory is not None:
        for layer in range(state.memory.layers):
            found += state.memory.rows(layer)
    return found


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_runs_are_equal_to_blocks_one_by_one(
    build: Callable[..., RoutedTransformerXL], kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    texts = [torch.randint(VOCAB, (2, N)) for _ in range(7)]
    with torch.set_grad_enabled(training):
        expected = read(model, begin(model), texts)
        lengths = count_runs(model, monkeypatch)
        model.compiled_together = True
        given = read(model, begin(model), texts)
    # Of an empty memory, nothing is at hand.
    runs = KINDS[kind][1]
    assert lengths[-2 * len(runs) :] == 2 * runs
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("forgetful_compiler")
@pytest.mark.filterwarnings("ignore::UserWarning")  # what the compiler warns of is its own
@pytest.mark.parametrize("kind", ["learned", "by token before one"])
def test_compiled_runs(build: Callable[..., RoutedTransformerXL], kind: str) -> None:
    model = build(kind)
    texts = [torch.randint(VOCAB, (2, N)) for _ in range(5)]
    expected = read(model, begin(model), texts)
    model.compile_blocks(together=True, backend="aot_eager", fullgraph=True)
    for one, other in zip(read(model, begin(model), texts), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("why", ["routing", "checkpointing", "gradient", "disk"])
def test_else_blocks_are_read_one_by_one(
    build: Callable[..., RoutedTransformerXL], why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"checkpointing": {"gradient_checkpointing": True}, "gradient": {"memory_grad_segments": 1}}
    model = build("learned", **options.get(why, {}))
    texts = [torch.randint(VOCAB, (2, N)) for _ in range(4)]
    routing = {"return_routing": True} if why == "routing" else {}
    expected = read(model, begin(model, tmp_path / "one" if why == "disk" else None), texts, **routing)
    lengths = count_runs(model, monkeypatch)
    model.compiled_together = True
    given = read(model, begin(model, tmp_path / "other" if why == "disk" else None), texts, **routing)
    # Of a memory on disk, blocks before the first that reads it, and between, are runs.
    assert lengths == ([1, 1] * len(texts) if why == "disk" else [])
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other)


def test_a_compiled_model_can_be_copied(build: Callable[..., RoutedTransformerXL]) -> None:
    model = build("learned")
    names = model.state_dict().keys()
    model.compile_blocks(together=True, backend="eager")
    other = copy.deepcopy(model)
    assert other.state_dict().keys() == names
    text = [torch.randint(VOCAB, (2, N))]
    with torch.no_grad():
        for one, of_copy in zip(
            read(model, begin(model), text), read(other, begin(other), text), strict=True
        ):
            assert torch.equal(one, of_copy)


def test_each_block_by_itself(build: Callable[..., RoutedTransformerXL]) -> None:
    model = build("learned")
    model.compile_blocks(backend="eager")
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert not model.compiled_together
