"""RoutedTransformerXL with routed self-attention, routed feedforward and routed memory queries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import xlroute.causal_routing as causal_routing
from xlroute import ConditionalRoutedFeedForward, RoutedTransformerXL, RouterOutput, TransformerXLState
from xlroute.blocks import Block, RoutedRows, SelfAttention
from xlroute.open_segment import OpenSegment
from xlroute.state import STATE_FILE, _checksum, _read

BuildModel = Callable[..., RoutedTransformerXL]
V = 3  # tokens in a routing window, as `routed` has it


def fresh(model: RoutedTransformerXL, streams: int = 2) -> TransformerXLState:
    return model.initial_state(streams=streams, memory=model.create_memory(streams=streams))


def read(
    model: RoutedTransformerXL, state: TransformerXLState, tokens: Tensor, cuts: list[int] | int
) -> tuple[Tensor, TransformerXLState]:
    logits = []
    for piece in tokens.split(cuts, dim=1):
        out, state = model(piece, state)
        logits.append(out)
    return torch.cat(logits, dim=1), state


# ---- Written out in loops ----


def light_by_hand(by_hand: Any, light: SelfAttention, window: Tensor, x: Tensor) -> Tensor:
    """Self-attention of x [n, d] to at most `window_size` rows before each token, and itself."""
    states, h = torch.cat((window, x)), light.heads
    rows = []
    for i in range(len(window), len(states)):
        near = range(0 if light.window_size is None else max(i - light.window_size, 0), i + 1)
        q = (light.to_q.weight @ by_hand.rms_norm(light.norm, states[i])).unflatten(0, (h, -1))
        kv = [
            (light.to_kv.weight @ by_hand.rms_norm(light.norm, states[j])).unflatten(0, (2, h, -1))
            for j in near
        ]
        heads = []
        for head in range(h):
            query = by_hand.turned(q[head] + light.q_bias[head, 0], i)
            keys = [
                by_hand.turned(k[head] + light.k_bias[head, 0], j) for j, (k, _) in zip(near, kv, strict=True)
            ]
            weights = (torch.stack(keys) @ query / len(query) ** 0.5).softmax(0)
            heads.append(weights @ torch.stack([v[head] for _, v in kv]))
        rows.append(light.to_out.weight @ torch.cat(heads))
    return torch.stack(rows)


def heavy_by_hand(by_hand: Any, block: Block, window: Tensor, mem_len: int, x: Tensor) -> Tensor:
    """The heavy branch for x [n, d], with the XL window in front of it."""
    assert block.heavy_attention is not None
    layer = block.heavy_attention.heavy_attn
    start = -(-mem_len // V) * V
    rows = torch.cat((x.new_zeros(start - len(window), x.shape[1]), window, x))
    there = torch.arange(len(rows)) >= start - len(window)
    s = by_hand.scores(layer.q_router, rows)
    out = torch.zeros_like(x).unbind()
    out = list(out)
    for begin in range(start, len(rows), V):
        sets = [by_hand.route(layer.kv_router, rows[:begin], 2, there[:begin], r) for r in range(layer.sets)]
        if not sets[0]:
            continue
        own = list(range(begin, min(begin + V, len(rows))))
        queries = by_hand.picked(
            layer.q_router, s, own, [j for j in range(begin - V, begin) if there[j]], 2, V
        )
        for i in own:
            query = by_hand.query(layer, rows, i, queries[i], sets) if i in queries else layer.null_q_token
            out[i - start] = query
    return torch.stack(out)


def routed_by_hand(
    by_hand: Any, router: Any, before: list[Tensor], x: Tensor, places: int
) -> dict[int, Tensor]:
    """Which tokens of x [n, d] are routed, given the scores of all tokens before; these are added to."""
    known = len(before)
    s = torch.stack([*before, *by_hand.scores(router, x)])
    before += s[known:].detach().unbind()
    routed = {}
    for begin in range(known, len(s), V):
        own = list(range(begin, min(begin + V, len(s))))
        routed |= by_hand.picked(router, s, own, list(range(max(begin - V, 0), begin)), places, V)
    return {i - known: gate for i, gate in routed.items()}


def block_by_hand(
    by_hand: Any,
    block: Block,
    window: Tensor,
    mem_len: int,
    x: Tensor,
    rows: RoutedRows | None,
    scores: tuple[list[Tensor], list[Tensor]],
) -> Tensor:
    """A block for one stream x [n, d]; what the memory holds is attended to as the module does."""
    attended = light_by_hand(by_hand, block.attention, window, x)
    if block.heavy_attention is not None:
        attended = attended + heavy_by_hand(by_hand, block, window, mem_len, x)
    x = x + attended
    if rows is not None:
        memory = block.memory
        assert memory is not None
        out = memory.attend(memory.queries(x[None]), *memory.context(rows))[0]
        if memory.q_router is not None:
            gates = routed_by_hand(by_hand, memory.q_router, scores[0], x, 1)
            out = torch.stack(
                [gates[i] * out[i] if i in gates else memory.null_q_token for i in range(len(x))]
            )
        x = x + memory.memory_gate.tanh() * out
    if not isinstance(block.feedforward, ConditionalRoutedFeedForward):
        return x + block.feedforward(x)
    light, heavy = block.feedforward.light_ff, block.feedforward.heavy_ff
    gates = routed_by_hand(by_hand, block.feedforward.router, scores[1], x, 2)
    return x + torch.stack(
        [light(t) + gates[i] * heavy(t) if i in gates else light(t) for i, t in enumerate(x)]
    )


def test_it_is_what_loops_compute(build_model: BuildModel, routed: dict[str, Any], by_hand: Any) -> None:
    model = build_model(**routed, num_routed_kv=2, mem_len=5, light_window_size=4, router_kwargs={"eps": 0.7})
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    tokens = torch.randperm(50)[None, :25]  # of equal ones at the start, rounding says which is routed
    state = fresh(model, 1)
    scores: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in model.blocks]
    losses = [torch.zeros(()), torch.zeros(())]
    for piece in tokens.split([7, 2, 1, 6, 9], dim=1):
        x = model.embedding(piece[0])
        used = int(state.window_lengths[0])
        for i, block in enumerate(model.typed_blocks()):
            window = state.window[i, 0, model.mem_len - used :]
            memory = model.open_memories(state)[i]
            rows = None
            if memory is not None:
                rows, _ = model.route(i, 0, memory, x[None], state.window[i], model.window_mask(state))
            x = block_by_hand(by_hand, block, window, model.mem_len, x, rows, scores[i])
        expected = model.to_logits(model.norm(x))
        logits, state = model(piece, state)
        torch.testing.assert_close(logits[0], expected)
        cotangent = torch.randn_like(expected)
        for j, result in enumerate((logits[0], expected)):
            losses[j] = losses[j] + (result * cotangent).sum()
    given, wanted = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for (name, _), ours, theirs in zip(model.named_parameters(), given, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


# ---- Causality ----


@pytest.mark.parametrize("training", [True, False])
def test_nothing_before_a_changed_token_moves(
    build_model: BuildModel, routed: dict[str, Any], training: bool
) -> None:
    model = build_model(**routed).train(training)
    n = 24
    tokens = torch.randint(50, (n,))
    # Stream t has other tokens from place t on; the last stream has none.
    other = (tokens + torch.randint(1, 50, (n + 1, n))) % 50
    changed = torch.where(torch.arange(n) < torch.arange(n + 1)[:, None], tokens, other)
    logits, _ = read(model, fresh(model, n + 1), changed, [5, 7, 1, 11])
    for t in range(n):
        torch.testing.assert_close(logits[t, :t], logits[n, :t])
        assert not torch.allclose(logits[t, t], logits[n, t]), t


# ---- What is routed ----


def record(monkeypatch: pytest.MonkeyPatch) -> list[RouterOutput]:
    """All that tokens are routed to from now on."""
    routings: list[RouterOutput] = []
    original = causal_routing.route_newest

    def recorded(*args: Any, **options: Any) -> RouterOutput:
        routings.append(original(*args, **options))
        return routings[-1]

    for module in ("xlroute.causal_routing", "xlroute.autoregressive"):
        monkeypatch.setattr(f"{module}.route_newest", recorded)
    return routings


def test_a_window_has_so_many_places_and_who_comes_first_takes_them(
    build_model: BuildModel, routed_all: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(**routed_all)
    tokens = torch.randint(50, (2, 30))
    routings = record(monkeypatch)
    _, state = read(model, fresh(model), tokens, [8, 8, 8, 3, 3])
    places = [2, 2, *[2, 1, 2] * 2]  # of attention and feedforward, then of memory queries between them
    assert len(routings) == 5 * len(places)
    for number, routing in enumerate(routings):
        for indices in routing.indices:
            kept = indices[indices >= 0]
            assert kept.unique().numel() == kept.numel()
            assert (kept // V).bincount(minlength=1).max() <= places[number % len(places)]
        assert torch.equal(routing.scores != 0, routing.indices >= 0)

    routings.clear()
    for name, parameter in model.named_parameters():
        if "routing_token" in name:
            torch.nn.init.zeros_(parameter)  # every token reaches the level
    state = fresh(model)
    _, state = model(tokens[:, :8], state)
    first = len(routings)
    model(tokens[:, 8:16], state)
    for number, (begun, going_on) in enumerate(zip(routings[:first], routings[first:], strict=True)):
        k = places[number]
        expected = [window + i for window in (0, V, 2 * V) for i in range(k) if window + i < 8]
        for indices in going_on.indices:
            assert indices[indices >= 0].tolist() == expected
        for indices in begun.indices:  # nothing was read before the first window
            assert indices[indices >= 0].tolist() == [i for i in expected if i >= V]


def test_the_heavy_branch_sees_what_the_light_one_does_not(
    build_model: BuildModel, routed_all: dict[str, Any]
) -> None:
    options = {"depth": 1, "memory_layers": (), "mem_len": 20, "light_window_size": 2}
    # The level of a window reaches into the next, and the feedforward would show it.
    options |= {
        "routed_feedforward": False,
        "num_heavy_attn_tokens_q": 1.0,
        "num_heavy_attn_tokens_kv": 20,
    }
    model = build_model(**{**routed_all, **options})
    tokens = torch.randint(50, (1, 20))
    changed = torch.cat((tokens[:, :4] + 1, tokens[:, 4:]), dim=1) % 50

    def moved() -> list[bool]:
        a, b = (read(model, model.initial_state(streams=1), t, [6, 6, 8])[0] for t in (tokens, changed))
        return ((a - b).abs().amax(-1)[0] > 1e-9).tolist()

    assert all(moved()[12:])
    model.typed_blocks()[0].heavy_attention.heavy_attn.to_out.weight.data.zero_()
    assert moved() == [True] * 6 + [False] * 14


def test_the_light_window_reaches_over_cuts(build_model: BuildModel, routed_all: dict[str, Any]) -> None:
    """Each token sees so many before it, wherever segments begin."""
    options = {"depth": 1, "memory_layers": (), "light_window_size": 4, "mem_len": 5}
    model = build_model(**{**routed_all, **options, "routed_feedforward": False})
    heavy = model.typed_blocks()[0].heavy_attention
    assert heavy is not None
    torch.nn.init.zeros_(heavy.heavy_attn.to_out.weight)
    tokens = torch.randint(50, (2, 17))
    whole, _ = model(tokens, model.initial_state(streams=2))
    pieces, _ = read(model, model.initial_state(streams=2), tokens, [4, 1, 2, 7, 3])
    torch.testing.assert_close(pieces, whole)


def test_training_reaches_every_parameter(build_model: BuildModel, routed: dict[str, Any]) -> None:
    model = build_model(**routed, router_kwargs={"eps": 1.0}).train()
    state = fresh(model)
    loss = torch.zeros(())
    for i in range(5):
        logits, state = model(torch.randint(50, (2, 9)), state, ends=torch.tensor([False, i == 2]))
        loss = loss + (logits * torch.randn_like(logits)).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing(build_model: BuildModel, routed_all: dict[str, Any]) -> None:
    model = build_model(**routed_all)
    saving = build_model(**routed_all, gradient_checkpointing=True)
    saving.load_state_dict(model.state_dict())
    tokens = torch.randint(50, (2, 20))
    results = []
    for m in (model, saving):
        logits, _ = read(m, fresh(m), tokens, [5] * 4)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in m.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision(build_model: BuildModel, routed_all: dict[str, Any]) -> None:
    tokens = torch.randint(50, (2, 20))
    half, single = build_model(torch.bfloat16, **routed_all), build_model(torch.float32, **routed_all)
    logits, state = read(half, fresh(half), tokens, [5] * 4)
    assert logits.isfinite().all()
    assert (state.window.dtype, state.scores.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = read(single, fresh(single), tokens, [5] * 4)
    assert logits.isfinite().all()
    assert (state.window.dtype, state.scores.dtype) == (torch.float32, torch.float32)


# The compiler looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("forgetful_compiler")
def test_a_block_compiles_to_one_graph(build_model: BuildModel, routed_all: dict[str, Any]) -> None:
    model = build_model(**routed_all, depth=1, memory_layers=(1,))
    tokens = torch.randint(50, (2, 10))
    with torch.no_grad():
        _, state = read(model, fresh(model), tokens, [10])
    plain, _ = model(tokens, state.fork())
    model.blocks[0].compile(fullgraph=True, backend="eager")
    compiled, _ = model(tokens, state)
    torch.testing.assert_close(plain, compiled)


# ---- Generation and state ----


@pytest.mark.parametrize(("segment_len", "mem_len"), [(1, 6), (4, 0), (100, 2)])
def test_step_by_step_equals_the_parallel_forward_on_the_same_cuts(
    build_model: BuildModel, routed: dict[str, Any], segment_len: int, mem_len: int
) -> None:
    model = build_model(**routed, mem_len=mem_len)
    # No token comes twice: where nothing else is seen, its score would, but for rounding.
    tokens = torch.stack([torch.randperm(50)[:33] for _ in range(2)])
    with torch.no_grad():
        _, state = read(model, fresh(model), tokens[:, :10], [5, 5])
        other = state.fork()
        parallel, state = read(model, state, tokens[:, 10:], segment_len)
        segment = OpenSegment(model, other, segment_len)
        steps = [segment.read(piece) for piece in tokens[:, 10:].split([7, 1, 1, 1, 6, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), parallel)
    torch.testing.assert_close(other.scores, state.scores)


@pytest.mark.parametrize("first", [9, 14])
def test_a_segment_left_open_is_saved_and_read_on(
    build_model: BuildModel, routed_all: dict[str, Any], tmp_path: Path, first: int
) -> None:
    model = build_model(**routed_all)
    tokens = torch.stack([torch.randperm(50)[:25] for _ in range(2)])
    with torch.no_grad():
        expected, _ = read(model, fresh(model), tokens, 10)
        state = fresh(model)
        segment = OpenSegment(model, state, 10)
        begun = segment.read(tokens[:, :first])
        segment.leave()
        state.save(tmp_path)
        loaded = model.load_state(tmp_path)
        rest, again = (OpenSegment(model, each, 10).read(tokens[:, first:]) for each in (state, loaded))
    torch.testing.assert_close(torch.cat((begun, rest), dim=1), expected)
    assert torch.equal(again, rest)
    assert torch.equal(loaded.scores, state.scores)


def test_reading_goes_on_alike_from_a_fork_and_from_a_saved_state(
    build_model: BuildModel, routed: dict[str, Any], tmp_path: Path
) -> None:
    model = build_model(torch.float32, **routed)
    tokens = torch.randint(50, (2, 31))
    _, state = read(model, fresh(model), tokens[:, :14], [5, 5, 4])
    state.save(tmp_path)
    fork = state.fork()
    expected, _ = read(model, state, tokens[:, 14:], [5, 5, 7])
    for other in (fork, model.load_state(tmp_path)):
        again, _ = read(model, other, tokens[:, 14:], [5, 5, 7])
        assert torch.equal(again, expected)


def test_without_a_memory_and_after_one_that_was_filled_before(
    build_model: BuildModel, routed_all: dict[str, Any]
) -> None:
    """No scores are known then, of no token at all or of none that the memory holds."""
    model = build_model(**routed_all)
    tokens = torch.randint(50, (2, 20))
    logits, state = read(model, model.initial_state(streams=2), tokens, [9, 11])
    assert logits.isfinite().all()
    assert (state.scores[..., 0] == -torch.inf).all()
    assert state.scores[..., 1].isfinite().all()
    _, state = read(model, fresh(model), tokens, [9, 11])
    state = model.initial_state(streams=2, memory=state.memory)
    assert (state.scores == -torch.inf).all()
    assert read(model, state, tokens, [9, 11])[0].isfinite().all()


def test_nothing_beyond_the_lengths_is_read(build_model: BuildModel, routed: dict[str, Any]) -> None:
    """Streams whose segments are shorter than others read as if each were alone, with segments of its own."""
    model = build_model(**routed)
    lengths = torch.tensor([[7, 2, 7, 0, 5, 7], [1, 7, 3, 7, 4, 7]])
    state, alone = fresh(model), [fresh(model, 1) for _ in range(2)]
    # Of equal tokens at the start, rounding says which is routed.
    text = torch.stack([torch.randperm(50) for _ in range(2)])
    for tokens, of_streams in zip(text.split(7, dim=1), lengths.T, strict=False):
        logits, state = model(tokens, state, lengths=of_streams)
        for i, length in enumerate(of_streams.tolist()):
            if length:
                expected, alone[i] = model(tokens[i : i + 1, :length], alone[i])
                torch.testing.assert_close(logits[i : i + 1, :length], expected)


def test_a_document_that_ends_leaves_no_scores(build_model: BuildModel, routed_all: dict[str, Any]) -> None:
    model = build_model(**routed_all)
    _, state = model(torch.randint(50, (2, 9)), fresh(model), ends=torch.tensor([True, False]))
    assert (state.scores[:, 0] == -torch.inf).all()
    assert state.scores[:, 1, :, 1].isfinite().all()


def test_the_options_are_saved_and_what_was_saved_before_them_is_read(
    build_model: BuildModel, routed_all: dict[str, Any], tmp_path: Path
) -> None:
    model = build_model(**routed_all)
    model.save_pretrained(tmp_path / "routed")
    loaded = RoutedTransformerXL.from_pretrained(tmp_path / "routed")
    assert loaded.config == model.config
    tokens = torch.randint(50, (2, 12))
    assert torch.equal(
        read(loaded, fresh(loaded), tokens, [4] * 3)[0], read(model, fresh(model), tokens, [4] * 3)[0]
    )

    plain = build_model()
    plain.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    names = list(config)
    for name in names[names.index("router_kwargs") + 1 :]:
        if name != "memory_routing":
            del config[name]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    loaded = RoutedTransformerXL.from_pretrained(tmp_path / "plain")
    assert loaded.config == plain.config

    _, state = read(plain, fresh(plain), tokens, [4] * 3)
    state.save(tmp_path / "state")
    header, tensors = _read(tmp_path / "state")
    del tensors["scores"]
    header["checksum"] = _checksum(header, tensors)
    save_file(tensors, tmp_path / "state" / STATE_FILE, metadata={"xlroute": json.dumps(header)})
    expected, _ = read(plain, state, tokens, [4] * 3)
    assert torch.equal(read(plain, plain.load_state(tmp_path / "state"), tokens, [4] * 3)[0], expected)

    fresh(plain).save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"expected scores \(3, 2, 6, 2\), got \(3, 2, 0, 0\)"):
        model.load_state(tmp_path / "state", allow_other_weights=True)


# ---- Looking ahead, on request ----


def test_window_routing_looks_ahead_warns_in_training_and_does_not_generate(
    build_model: BuildModel, routed: dict[str, Any]
) -> None:
    causal_routing._warn_of_looking_ahead.cache_clear()
    model = build_model(**routed, query_routing="window")
    tokens = torch.randint(50, (1, 27))
    logits, _ = read(model, fresh(model, 1), tokens, [9] * 3)

    def moves_earlier_ones() -> bool:
        changed = torch.cat((tokens[:, :-1], torch.randint(50, (1, 1))), dim=1)
        other, _ = read(model, fresh(model, 1), changed, [9] * 3)
        return not torch.equal(other[:, :-1], logits[:, :-1])

    assert any(moves_earlier_ones() for _ in range(50))
    with pytest.raises(ValueError, match="query_routing: expected 'threshold' in a model that generates"):
        model.generate(tokens, 3, fresh(model, 1))
    with pytest.warns(UserWarning, match="query_routing='window' looks ahead"):
        read(model.train(), fresh(model, 1), tokens, [9] * 3)


# ---- Errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_routing": "top"}, "query_routing: expected 'threshold' or 'window', got 'top'"),
        ({"routing_window": 0}, "routing_window: expected at least 1, got 0"),
        ({"light_window_size": 0}, "light_window_size: expected at least 1, got 0"),
        ({"heavy_heads": 0}, "heavy_heads: expected at least 1, got 0"),
        ({"num_tokens_q": 0}, "num_tokens_q: expected at least 1, got 0"),
        (
            {"routed_self_attention": True, "num_heavy_attn_tokens_q": 1.5},
            r"num_heavy_tokens_q: expected an int, or a share in \(0, 1\], got 1.5",
        ),
        ({"routed_feedforward": True, "num_heavy_ff_tokens": 0}, "num_heavy_tokens: expected at least 1"),
        (
            {"routed_self_attention": True, "num_routed_kv": 3},
            "heads: expected a multiple of the 3 routing tokens, got 2",
        ),
    ],
)
def test_bad_options_are_refused(build_model: BuildModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**options)
