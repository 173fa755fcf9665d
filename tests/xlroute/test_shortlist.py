"""RoutedTransformerXL(routing_shortlist=f): rows are found by scores or keys that they got when they came."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xlroute import RoutedTransformerXL, Routing, TransformerXLState
from xlroute.blocks import RoutedMemoryAttention
from xlroute.kernels import row_scores, soft_topk
from xlroute.memory import MemoryLayer, MemoryStore
from xlroute.token_memory import TokenMemoryAttention

BuildModel = Callable[..., RoutedTransformerXL]
VOCAB = 50

KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "tokens": {"memory_routing": "content", "routing_chunk": 1},
    "both by tokens": {"memory_routing": "both", "routing_chunk": 1},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a small model that can route by shortlists."""
    return {"num_content_tokens_kv": 2, "routing_key_dim": 8, **KINDS[request.param]}


def draw(count: int, n: int = 5) -> list[Tensor]:
    """Segments of two streams in which no token follows itself; see test_memory_grad.py."""
    order = torch.stack([torch.randperm(VOCAB) for _ in range(2)])
    return [order[:, torch.arange(first, first + n) % VOCAB] for first in range(0, count * n, n)]


def twin(build_model: BuildModel, model: RoutedTransformerXL, **options: Any) -> RoutedTransformerXL:
    """A model of the same weights with other options."""
    other = build_model(**{**model.config, **options})
    other.load_state_dict(model.state_dict())
    return other


def begin(model: RoutedTransformerXL, path: Path | None = None, **options: Any) -> TransformerXLState:
    options = {"layers": len(model.memory_layers), "streams": 2, "dim": model.dim, **options}
    memory = MemoryStore.create(path, dtype=torch.float64, **options)
    return model.initial_state(streams=2, memory=memory)


def the_branch(model: RoutedTransformerXL) -> RoutedMemoryAttention | TokenMemoryAttention:
    [branch] = [branch for block in model.typed_blocks() for branch in block.memories()]
    assert isinstance(branch, RoutedMemoryAttention | TokenMemoryAttention)
    return branch


def change(model: RoutedTransformerXL, much: float) -> None:
    """What an optimizer's step does to all weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=much)


# ---- While weights stay ----


@pytest.mark.parametrize(
    "store",
    [
        {},
        {"path": True, "chunk_bytes": 2000},
        {"device_bytes": 5000},
        {"path": True, "device_bytes": 5000},
        {"capacity": 11},
        {"capacity": 11, "eviction": "every_nth", "keep_every": 2},
        {"capacity": 11, "eviction": "lowest_score"},
    ],
    ids=lambda options: ", ".join(options) or "memory",
)
def test_with_the_same_weights_all_is_chosen_as_without_a_shortlist(
    build_model: BuildModel, kind: dict[str, Any], store: dict[str, Any], tmp_path: Path
) -> None:
    """Indices always; gates where they are made among as many, or are 1 in value, as is the default."""
    gates = {"straight_through": kind.get("memory_routing") != "content"}
    exact = build_model(mem_len=2, router_kwargs=gates, **kind)
    model = twin(build_model, exact, routing_shortlist=random.choice([2, 2.5, 4]))
    states = [
        begin(each, **{**store, "path": tmp_path / name if "path" in store else None})
        for each, name in ((exact, "a"), (model, "b"))
    ]
    for step, tokens in enumerate(draw(7)):
        lengths, ends = torch.randint(0, 6, (2,)), torch.tensor([step == 3, False])
        found: list[tuple[Routing, ...]] = []
        logits = []
        for i, each in enumerate((exact, model)):
            out, states[i], routing = each(tokens, states[i], lengths, ends, return_routing=True)
            logits.append(out)
            found.append(routing)
        for stream, length in enumerate(lengths):
            torch.testing.assert_close(logits[1][stream, :length], logits[0][stream, :length])
            for theirs, ours in zip(*found, strict=True):
                # Of content, only for tokens that count.
                valid = slice(None) if ours.indices.ndim == 3 else slice(int(length))
                for name in ("indices", "positions", "mask", "gates"):
                    got, expected = (getattr(each, name)[stream][valid] for each in (ours, theirs))
                    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("grad_segments", [0, 9])
def test_gradients_are_those_of_a_choice_among_as_many(
    build_model: BuildModel, kind: dict[str, Any], grad_segments: int
) -> None:
    """Learned tokens choose among all rows otherwise, and single tokens among 2 k."""
    exact = build_model(mem_len=2, memory_grad_segments=grad_segments, **kind)
    factor = 2.0 if kind.get("memory_routing") == "content" else 100.0
    if kind.get("memory_routing") == "both":
        exact = twin(build_model, exact, num_content_tokens_kv=20)
    model = twin(build_model, exact, routing_shortlist=factor)
    segments, found = draw(5), []
    cotangents = torch.randn(5, 2, 5, VOCAB, dtype=torch.float64)
    for each in (exact, model):
        state, loss = begin(each), torch.zeros((), dtype=torch.float64)
        for tokens, cotangent in zip(segments, cotangents, strict=True):
            logits, state = each(tokens, state)
            loss = loss + (logits * cotangent).sum()
        names, parameters = zip(*each.named_parameters(), strict=True)
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for name, theirs, ours in zip(names, *found, strict=True):
        assert (theirs is None) == (ours is None), name
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    routed = [gradient for name, gradient in zip(names, found[1], strict=True) if "routing" in name]
    assert any(gradient is not None and gradient.any() for gradient in routed)


# ---- While weights change ----


def rms(row: Tensor) -> Tensor:
    return row / (row.square().mean() + 1e-6).sqrt()


def of_row(row: Tensor, weights: Tensor) -> Tensor:
    """Of a row [d]: scores [r] by tokens [r, d], or keys [r, e] by projections [r, e, d]."""
    found = weights @ rms(row)
    return found / len(row) ** 0.5 if found.ndim == 1 else F.normalize(found, dim=-1)


def ranked(scores: list[Tensor], among: list[int]) -> list[int]:
    return sorted(among, key=lambda i: -float(scores[i]))


@pytest.mark.parametrize("name", ["learned", "tokens"])
def test_rows_are_found_by_the_weights_of_when_they_came(build_model: BuildModel, name: str) -> None:
    """Row by row: what it got first, the shortlist, scores anew, the choice, its gates, and how old it is."""
    k = 3
    model = build_model(
        depth=2, memory_layers=(2,), mem_len=3, num_tokens_kv=k, num_content_tokens_kv=k, routing_key_dim=8,
        routing_shortlist=2.5, router_kwargs={"straight_through": False}, **KINDS[name],
    )  # fmt: skip
    branch, state = the_branch(model), begin(model)
    entering: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: entering.append(args[0].detach()))
    first: list[Tensor] = []  # what each row got first, [b, r] or [b, r, e]
    came: list[int] = []  # how many rows there were then
    for tokens in draw(7):
        assert state.memory is not None
        rows = state.memory.rows(0)[0]
        _, state, (routing,) = model(tokens, state, return_routing=True)
        content = branch.content_routing
        weights = branch.kv_router.routing_token if content is None else content.projection
        assert isinstance(weights, Tensor)
        now = [torch.stack([of_row(row, weights.detach()) for row in each]) for each in rows.transpose(0, 1)]
        first += now[len(first) :]
        came += [len(first)] * (len(first) - len(came))
        # Streams and sets of rows; or streams, tokens and sets.
        for at in itertools.product(*map(range, routing.indices.shape[:-1])):
            stream, r = at[0], at[-1]
            scores = [[each[stream, r] for each in known] for known in (first, now)]
            if content is not None:
                query = of_row(entering[-1][stream, at[1]], weights.detach())[r]
                scores = [[key @ query * 8**0.5 for key in keys] for keys in scores]
            among = ranked(scores[1], ranked(scores[0], list(range(len(first))))[:8])
            if content is not None:
                among = among[: 2 * k]
            chosen = among[:k]
            missing = [-1] * (routing.indices.shape[-1] - len(chosen))
            assert routing.indices[at].tolist() == chosen + missing
            assert routing.score_ages[at].tolist() == [len(first) - came[i] for i in chosen] + missing
            if among:
                budget = min(9 / 8 * k, len(among))
                gates = soft_topk(torch.stack([scores[1][i] for i in among]), k=budget, eps=0.5)
                torch.testing.assert_close(routing.gates[at][: len(chosen)], gates[: len(chosen)])
        change(model, 0.3)


def test_no_row_is_looked_at_again_but_those_of_the_shortlist(
    build_model: BuildModel, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(mem_len=2, routing_shortlist=2, **kind)
    scored = count_rows(monkeypatch)
    taken: list[int] = []
    take = MemoryLayer.take

    def counting(layer: MemoryLayer, indices: Tensor) -> Tensor:
        taken.append(indices.numel())
        return take(layer, indices)

    monkeypatch.setattr(MemoryLayer, "take", counting)
    state = begin(model, capacity=400)
    assert state.memory is not None
    state.memory.append(torch.randn(2, 2, 400, 16))
    state.note_memory()
    branches = 2 if kind.get("memory_routing") == "both" else 1
    for step, tokens in enumerate(draw(6, 3)):
        scored.clear()
        taken.clear()
        _, state = model(tokens, state)
        change(model, 0.1)
        # Two layers of two streams; of the first segment, two tokens stay in the window.
        assert sum(scored) == branches * 4 * [400, 1, 3][min(step, 2)]
        # At most three rows, what follows them, and a shortlist of twice as many, for each token or for all.
        assert sum(taken) <= branches * 4 * 2 * 3 * 3 * (1 + 1 + 2)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call has scored to keep it."""
    counts: list[int] = []

    def counting(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
        counts.append(rows.shape[:-1].numel())
        return row_scores(rows, *arguments, **options)

    monkeypatch.setattr("xlroute.memory.scores.row_scores", counting)
    return counts


def test_rows_that_are_chosen_out_of_a_shortlist_are_counted(
    build_model: BuildModel, kind: dict[str, Any]
) -> None:
    model = build_model(mem_len=2, routing_shortlist=3, **kind)
    state = begin(model)
    assert state.memory is not None
    counts, chosen = state.memory.record_routes(), [torch.zeros(20, dtype=torch.int64) for _ in range(2)]
    for tokens in draw(5):
        _, state, found = model(tokens, state, return_routing=True)
        for routing in found:
            for position in routing.positions[routing.mask].tolist():
                chosen[routing.layer - 2][position] += 1
    for layer, expected in enumerate(chosen):
        total = torch.zeros_like(expected)
        for stream in range(2):
            positions, times = (torch.as_tensor(each) for each in counts.of(layer=layer, stream=stream))
            total[positions.long()] += times.long()
        assert torch.equal(total, expected)


def test_evaluation_scores_only_new_rows(
    build_model: BuildModel, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shortlist or without: full streams too, whose rows get new buffers now and then."""
    scored = count_rows(monkeypatch)
    model = build_model(mem_len=3, routing_shortlist=2, **kind)
    state = begin(model, capacity=20)
    branches = 2 if kind.get("memory_routing") == "both" else 1
    with torch.no_grad():
        for step, tokens in enumerate(draw(20)):
            scored.clear()
            _, state = model(tokens, state)
            new = [0, 2, 5][min(step, 2)]
            assert sum(scored) == 4 * branches * new


def share_found(model: RoutedTransformerXL, state: TransformerXLState, tokens: Tensor) -> float:
    """Of the rows that the weights of now choose among all, the share that is chosen out of a shortlist."""
    _, _, found = model(tokens, state.fork(), return_routing=True)
    with torch.no_grad():
        _, _, exact = model(tokens, state.fork(), return_routing=True)
    both = wanted = 0
    for ours, theirs in zip(found, exact, strict=True):
        assert (theirs.score_ages <= 0).all()
        there = theirs.indices >= 0
        both += int(((theirs.indices[..., None] == ours.indices[..., None, :]).any(-1) & there).sum())
        wanted += int(there.sum())
    return both / wanted


@pytest.mark.parametrize("name", ["learned", "tokens"])
def test_what_a_shortlist_finds_in_training(
    build_model: BuildModel, name: str, record_property: Callable[[str, object], None]
) -> None:
    shares = {}
    for rate, factor in ((0.0, 2.0), (0.1, 2.0), (0.1, 100.0)):
        model = build_model(
            depth=2, memory_layers=(2,), mem_len=2, num_content_tokens_kv=2, routing_key_dim=8,
            routing_shortlist=factor, **KINDS[name],
        ).train()  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        state, found = begin(model, capacity=120), []
        for step, tokens in enumerate(draw(27, 6)):
            if step >= 15:
                found.append(share_found(model, state, tokens[:, :-1]))
            logits, state = model(tokens[:, :-1], state)
            F.cross_entropy(logits.mT, tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        shares[rate, factor] = sum(found) / len(found)
    assert shares[0.0, 2.0] == 1
    assert shares[0.1, 100.0] == 1  # all rows are on the list
    drifted = shares[0.1, 2.0]
    record_property("share of rows found after 15 to 27 steps", drifted)
    assert drifted < 1  # weights have changed enough to see it


# ---- State ----


def test_training_goes_on_from_a_saved_state_bit_for_bit(
    build_model: BuildModel, kind: dict[str, Any], tmp_path: Path
) -> None:
    model = build_model(mem_len=2, routing_shortlist=2, **kind)
    before, after = draw(6), draw(4)
    state = begin(model)
    for tokens in before:
        _, state = model(tokens, state)
        change(model, 0.2)
    state.save(tmp_path)
    stopped = [state, model.load_state(tmp_path)]
    for tokens in after:
        logits = []
        for i, each in enumerate(stopped):
            out, stopped[i], routing = model(tokens, each, return_routing=True)
            logits.append(out)
            assert routing[0].score_ages.max() <= 5 * 4
        assert torch.equal(*logits)
        change(model, 0.2)


def test_forks_go_on_by_themselves(build_model: BuildModel, kind: dict[str, Any]) -> None:
    model = build_model(mem_len=2, routing_shortlist=2, **kind)
    state, alone = begin(model), begin(model)
    weights = []
    segments = draw(10)
    for step, tokens in enumerate(segments):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        out, state = model(tokens, state)
        if step == 5:
            fork = state.fork()
        elif step > 5:
            _, fork = model(tokens.flip(1), fork)
        change(model, 0.2)
    for tokens, each in zip(segments, weights, strict=True):
        model.load_state_dict(each)
        expected, alone = model(tokens, alone)
    assert torch.equal(out, expected)


# ---- Options ----


def test_random_routing_needs_no_scores(build_model: BuildModel) -> None:
    exact = build_model(memory_routing="random", mem_len=2)
    model = twin(build_model, exact, routing_shortlist=2)
    segments, logits = draw(4), []
    for each in (exact, model):
        torch.manual_seed(7)
        state = begin(each)
        for tokens in segments:
            out, state = each(tokens, state)
        logits.append(out)
    assert torch.equal(*logits)


def test_the_option_is_saved_and_older_models_have_none(build_model: BuildModel, tmp_path: Path) -> None:
    build_model(routing_shortlist=2.5).save_pretrained(tmp_path)
    assert RoutedTransformerXL.from_pretrained(tmp_path).config["routing_shortlist"] == 2.5
    config = json.loads((tmp_path / "config.json").read_text())
    del config["routing_shortlist"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert RoutedTransformerXL.from_pretrained(tmp_path).config["routing_shortlist"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing_shortlist": 1.5}, "expected None or at least 2, .* got 1.5"),
        ({"routing_shortlist": float("nan")}, "expected None or at least 2, .* got nan"),
        (
            {"routing_shortlist": 2, "memory_routing": "both", "routing_chunk": 3},
            "expected None with routing_chunk > 1, .* got 2",
        ),
        (
            {"routing_shortlist": 2, "router_kwargs": {"route_block_size": 64}},
            "expected None with route_block_size, .* got 2",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"routing_shortlist: {message}"):
        RoutedTransformerXL(**options)
