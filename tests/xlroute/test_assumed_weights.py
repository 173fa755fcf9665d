"""Blocks read on before it is known whether what the memory keeps is of the present weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.memory import kept_values

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB, B = 50, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))]
KINDS: dict[str, dict[str, Any]] = {
    "learned": {"memory_routing": "learned"},
    "tokens": {"memory_routing": "content"},
    "both": {"memory_routing": "both"},
}


@pytest.fixture(params=KINDS)
def build(request: pytest.FixtureRequest, build_model: BuildModel) -> BuildModel:
    options = {"num_content_tokens_kv": 2, "routing_key_dim": 8, **KINDS[request.param]}

    def built(device: str) -> RoutedTransformerXL:
        torch.manual_seed(0)
        return build_model(**options).to(device).eval()

    return built


class Reader:
    """A model that reads documents in evaluation, and how often its blocks have read."""

    def __init__(self, model: RoutedTransformerXL, monkeypatch: pytest.MonkeyPatch, *, assumes: bool) -> None:
        self.model, self.assumes, self.patch = model, assumes, monkeypatch
        self.device = model.embedding.weight.device
        self.state: TransformerXLState = model.initial_state(
            streams=B, memory=model.create_memory(streams=B, dtype=torch.float64)
        )
        self.reads = 0
        model.embedding.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.reads += 1

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> tuple[Tensor, int]:
        """The logits, and how often blocks have read for them."""
        self.patch.setattr(kept_values, "assumes", lambda device: self.assumes)
        self.reads = 0
        logits, self.state = self.model(tokens.to(self.device), self.state)
        return logits, self.reads

    def change(self, factor: float) -> None:
        """Change what rows are scored by, which leaves no trace on the tensors."""
        for block in self.model.typed_blocks():
            for memory in block.memories():
                for weight in (
                    memory.kv_router.routing_token,
                    getattr(memory.content_routing, "projection", None),
                ):
                    if weight is not None:
                        weight.data[..., 0] += factor


def draw() -> Tensor:
    return torch.randint(VOCAB, (B, 5))


@pytest.fixture(params=DEVICES)
def pair(request: pytest.FixtureRequest, build: BuildModel, monkeypatch: pytest.MonkeyPatch) -> list[Reader]:
    """One that assumes, and one that does not; both have read something."""
    readers = [
        Reader(build(request.param), monkeypatch, assumes=assumes)
        for assumes in (True, False)  # type: ignore[arg-type]
    ]
    for step in range(4):
        tokens = draw()
        (ours, reads), (theirs, _) = (each(tokens) for each in readers)
        assert torch.equal(ours, theirs)
        assert reads == 1, step
    return readers


def test_changed_weights_are_noticed_behind_the_blocks(pair: list[Reader]) -> None:
    for factor in (0.0, 3.0, 0.0, -5.0, 0.0, 0.0):
        for each in pair:
            each.change(factor)
        tokens = draw()
        (ours, reads), (theirs, once) = (each(tokens) for each in pair)
        assert torch.equal(ours, theirs)
        assert (reads, once) == (2 if factor else 1, 1)


@pytest.mark.parametrize("failure", ["in a block", "while it waits", "tokens"])
def test_a_call_that_fails_leaves_nothing_of_other_weights(
    pair: list[Reader], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights change, a call fails, and weights are as before: rows are not scored by both."""
    ours, theirs = pair

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        kept = {name: each.clone() for name, each in ours.model.state_dict().items()}
        ours.change(3.0)
        with monkeypatch.context() as patch:
            if failure == "in a block":
                patch.setattr(ours.model.typed_blocks()[-1], "forward", fail)
            elif failure == "while it waits":
                patch.setattr(kept_values, "begin_to_host", lambda values: fail)
            with pytest.raises(ValueError if failure == "tokens" else KeyboardInterrupt):
                ours(torch.full((B, 5), VOCAB) if failure == "tokens" else draw())
        ours.model.load_state_dict(kept)
        for _ in range(2):
            tokens = draw()
            assert torch.equal(ours(tokens)[0], theirs(tokens)[0])


def test_a_refused_call_keeps_what_is_kept(pair: list[Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is scored once more for it."""
    ours, theirs = pair
    with pytest.raises(ValueError, match="tokens: expected 0 to 49"):
        ours(torch.full((B, 5), VOCAB))
    rows: list[int] = []
    values = kept_values.KeptValues._values

    def noted(self: Any, new: Tensor, scoring: Any) -> Tensor:
        rows.append(new.shape[-2])
        return values(self, new, scoring)

    monkeypatch.setattr(kept_values.KeptValues, "_values", noted)
    tokens = draw()
    ours(tokens)
    once = [*rows]
    rows.clear()
    theirs(tokens)
    assert sum(once) <= sum(rows)


def test_a_memory_is_opened_by_present_weights(pair: list[Reader]) -> None:
    """By `generate`, which does not assume."""
    for each in pair:
        each.change(3.0)
    prompt, found = draw(), []
    for each in pair:
        each.patch.setattr(kept_values, "assumes", lambda device, each=each: each.assumes)
        found.append(each.model.generate(prompt.to(each.device), 6, each.state, temperature=0)[0])
    assert torch.equal(*found)
