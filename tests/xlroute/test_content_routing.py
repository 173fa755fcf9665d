"""RoutedTransformerXL with memory rows that are routed by content, or at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xlroute.memory.scores as scores
from xlroute import RoutedTransformerXL, TransformerXLState
from xlroute.content_routing import ChunkRouting, TokenRouting
from xlroute.memory import MemoryStore
from xlroute.memory.chunks import Chunks
from xlroute.memory.routing_keys import RoutingKeys, routing_keys
from xlroute.open_segment import OpenSegment
from xlroute.position import age_bias, age_place
from xlroute.token_memory import TokenMemoryAttention

BuildModel = Callable[..., RoutedTransformerXL]

KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"memory_routing": "content", "routing_chunk": 1},
    "chunks": {"memory_routing": "content", "routing_chunk": 3},
    "both": {"memory_routing": "both", "routing_chunk": 3},
    "both by tokens": {"memory_routing": "both", "routing_chunk": 1},
}


@pytest.fixture(params=KINDS)
def content(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a small model that routes by content."""
    return {"num_content_tokens_kv": 2, "routing_key_dim": 8, "segment_len": 7, **KINDS[request.param]}


def draw(*shape: int) -> Tensor:
    """Tokens [..., n], distinct in each row: a document that begins with the same token twice has equal rows,
    whose scores differ by rounding, and so may be taken for one another.
    """
    return torch.rand(*shape[:-1], 50).argsort(dim=-1)[..., : shape[-1]]


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


def grown(build_model: BuildModel, content: dict[str, Any], **options: Any) -> RoutedTransformerXL:
    """A model whose memory matters, whatever is routed."""
    return build_model(**{**content, "mem_len": 4, **options})


# ---- What is read ----


def unit(row: Tensor) -> Tensor:
    return row / row.square().sum().sqrt()


def rms(row: Tensor) -> Tensor:
    return row / (row.square().mean() + 1e-6).sqrt()


def test_a_token_reads_the_rows_whose_keys_are_most_like_its_own(build_model: BuildModel) -> None:
    model = build_model(
        memory_routing="content", routing_chunk=1, num_content_tokens_kv=4, routing_key_dim=8, depth=2,
        memory_layers=(2,), kv_routing_tokens=2,
    )  # fmt: skip
    state = read(model, fresh(model), draw(2, 30), 10)[1]
    entering: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    assert state.memory is not None
    rows, mask = state.memory.rows(0)
    _, _, (routing,) = model(draw(2, 5), state, return_routing=True)
    memory = model.typed_blocks()[1].content_memory
    assert memory is not None
    assert isinstance(memory.content_routing, TokenRouting)
    assert routing.indices.shape == (2, 5, 2, 4)
    for stream in range(2):
        for token in range(5):
            for j, projection in enumerate(memory.content_routing.projection):
                query = unit(projection @ rms(entering[0][stream, token]))
                cosines = torch.stack([query @ unit(projection @ rms(row)) for row in rows[stream]])
                best = cosines.argsort(descending=True)[:4]
                assert routing.indices[stream, token, j].tolist() == best.tolist()
    assert mask.all()
    assert torch.equal(routing.positions, routing.indices)


def test_a_token_weighs_what_followed_its_rows_by_cosines_and_ages(build_model: BuildModel) -> None:
    model = build_model(
        **KINDS["tokens"], num_content_tokens_kv=3, routing_key_dim=8, depth=2, memory_layers=(2,), mem_len=4,
        kv_routing_tokens=2, heads=4, dim_head=4,
    )  # fmt: skip
    branch = model.typed_blocks()[1].content_memory
    assert isinstance(branch, TokenMemoryAttention)
    with torch.no_grad():
        for parameter in (branch.age_bias.weight, branch.null_value, branch.row_gain, branch.log_scale):
            parameter.copy_(torch.randn_like(parameter))
    state = read(model, fresh(model), draw(2, 30), 10)[1]
    assert state.memory is not None
    rows = state.memory.rows(0)[0]
    calls: list[tuple[Any, Tensor]] = []
    original = branch.gated

    def record(x: Tensor, *others: Any) -> Tensor:
        out = original(x, *others)
        calls.append((x, out))
        return out

    branch.gated = record  # type: ignore[method-assign]
    entering: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    _, _, (routing,) = model(draw(2, 5), state, return_routing=True)
    (_, out), x = calls[0], entering[0]
    values = branch.to_v.weight.view(4, 4, -1)
    newest = torch.zeros(16, dtype=torch.float64)
    for b in range(2):
        for t in range(5):
            heads = []
            for h in range(4):
                projection = branch.content_routing.projection[h // 2]
                found = routing.indices[b, t, h // 2].tolist()
                query = unit(projection @ rms(x[b, t]))
                cosines = torch.stack([query @ unit(projection @ rms(rows[b, i])) for i in found])
                ages = torch.tensor([rows.shape[1] - i + model.mem_len for i in found])
                table = branch.age_bias.weight[:, None, h : h + 1]
                logits = cosines * branch.log_scale[h].exp() + age_bias(table, age_place(ages)[None])[0, 0]
                weights = torch.cat((branch.null_logit[h], logits)).softmax(0)
                after = [rms(rows[b, i + 1]) if i + 1 < rows.shape[1] else newest for i in found]
                read_values = [values[h] @ (branch.row_gain * row) for row in after]
                heads.append(weights @ torch.stack([branch.null_value[h], *read_values]))
            expected = branch.memory_gate.tanh() * branch.to_out(torch.cat(heads))
            torch.testing.assert_close(out[b, t], expected)


def test_a_chunk_is_routed_by_tokens_made_of_the_chunk_before(build_model: BuildModel) -> None:
    model = build_model(
        memory_routing="content", routing_chunk=3, num_content_tokens_kv=4, depth=2, memory_layers=(2,),
        mem_len=4,
    )  # fmt: skip
    for cuts in ([2, 8], [20, 8]):  # without and with enough in the XL window for the first chunk
        memory_rows = torch.randn(1, 2, 20, 16, dtype=torch.float64)
        memory = model.create_memory(streams=2)
        memory.append(memory_rows)
        state = model.initial_state(streams=2, memory=memory)
        pieces = draw(2, sum(cuts)).split(cuts, dim=1)
        entering: list[Tensor] = []
        with model.blocks[1].register_forward_pre_hook(lambda _, args, to=entering: to.append(args[0])):
            for piece in pieces:
                rows = state.memory.rows(0)[0]  # type: ignore[union-attr]
                _, state, (routing,) = model(piece, state, return_routing=True)
        branch = model.typed_blocks()[1].content_memory
        assert branch is not None
        assert isinstance(branch.content_routing, ChunkRouting)
        assert routing.indices.shape == (2, 3, 2, 4)
        for stream in range(2):
            for chunk in range(3):
                for r in range(2):
                    strip = torch.cat([each[stream] for each in entering])
                    end = cuts[0] + 3 * chunk
                    source = torch.stack([rms(row) for row in strip[max(end - 3, 0) : end]])
                    weights = (source @ branch.content_routing.pool[r]).softmax(0)
                    token = rms(branch.content_routing.projection[r] @ (weights @ source))
                    scores = torch.stack([rms(row) @ token for row in rows[stream]])
                    best = scores.argsort(descending=True)[:4]
                    assert routing.indices[stream, chunk, r].tolist() == best.tolist()


def test_the_first_chunk_of_all_has_learned_routing_tokens(build_model: BuildModel) -> None:
    model = build_model(memory_routing="content", routing_chunk=3, num_content_tokens_kv=2)
    memory = model.create_memory(streams=1)
    memory.append(torch.randn(2, 1, 20, 16, dtype=torch.float64))
    tokens = draw(1, 5)
    _, _, (routing, _) = model(tokens, model.initial_state(streams=1, memory=memory), return_routing=True)
    router = model.typed_blocks()[1].content_memory.kv_router  # type: ignore[union-attr]
    assert router.routing_token is not None
    rows = memory.rows(0)[0][0]
    for r in range(2):
        scores = torch.stack([rms(row) @ router.routing_token[r] for row in rows])
        assert routing.indices[0, 0, r].tolist() == scores.argsort(descending=True)[:2].tolist()


def test_with_room_for_all_rows_chunks_attend_to_all_of_them(build_model: BuildModel) -> None:
    model = build_model(**KINDS["chunks"], num_content_tokens_kv=100)
    everything = build_model(num_tokens_kv=100)
    weights = {
        name.replace("content_memory", "memory"): value
        for name, value in model.state_dict().items()
        if "content_routing" not in name
    }
    missing = everything.load_state_dict(weights, strict=False).missing_keys
    assert all("routing_token" in name for name in missing)
    tokens, lengths = draw(2, 24), torch.tensor([8, 3])
    logits = []
    for each in (model, everything):
        state = fresh(each)
        for piece in tokens.split(8, dim=1):
            out, state = each(piece, state, lengths=lengths)
        logits.append(torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)]))
    torch.testing.assert_close(*logits)


# ---- Causality and generation ----


@pytest.mark.parametrize("training", [False, True])
def test_nothing_before_a_changed_token_moves(
    build_model: BuildModel, content: dict[str, Any], training: bool
) -> None:
    model = grown(build_model, content)
    n = 24
    tokens = draw(n)
    # Stream t has other tokens from place t on; the last stream has none.
    other = (tokens + torch.randint(1, 50, (n + 1, n))) % 50
    changed = torch.where(torch.arange(n) < torch.arange(n + 1)[:, None], tokens, other)
    with torch.set_grad_enabled(training):
        logits, _ = read(model, fresh(model, n + 1), changed, [5, 7, 1, 11])
    for t in range(n):
        torch.testing.assert_close(logits[t, :t], logits[n, :t])
        assert not torch.allclose(logits[t, t], logits[n, t]), t


def test_a_chunk_changes_what_the_next_one_reads(build_model: BuildModel) -> None:
    model = build_model(memory_routing="content", routing_chunk=3, num_content_tokens_kv=8)
    _, state = read(model, fresh(model, 1), draw(1, 50), 10)
    tokens = draw(1, 9)
    other = tokens.clone()
    other[0, 3:6] = draw(3)
    reports = [model(piece, state.fork(), return_routing=True)[2][0].indices[0] for piece in (tokens, other)]
    assert torch.equal(reports[0][:2], reports[1][:2])
    assert not torch.equal(reports[0][2], reports[1][2])


@pytest.mark.parametrize("before", [0, 2])
def test_step_by_step_equals_the_parallel_forward_on_the_same_cuts(
    build_model: BuildModel, content: dict[str, Any], before: int
) -> None:
    model = grown(build_model, content)
    tokens = draw(2, 23)
    starts = [fresh(model) for _ in range(2)]
    for _ in range(before):
        piece, lengths = draw(2, 8), torch.tensor([8, 5])
        starts = [model(piece, state, lengths=lengths)[1] for state in starts]
    with torch.no_grad():
        parallel, _ = read(model, starts[0], tokens, 7)
        segment = OpenSegment(model, starts[1], 7)
        steps = [segment.read(piece) for piece in tokens.split([7, 1, 1, 1, 6, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), parallel)


def test_generating_in_two_calls_is_generating_in_one(
    build_model: BuildModel, content: dict[str, Any], tmp_path: Path
) -> None:
    """The open segment is saved in the middle of a chunk."""
    model = grown(build_model, content)
    _, start = read(model, fresh(model), draw(2, 14), 7)
    prompt = draw(2, 8)
    one, _ = model.generate(prompt, 14, start.fork(), temperature=0)
    first, state = model.generate(prompt, 6, start, temperature=0)
    assert state.open.shape[2] == 6
    state.save(tmp_path)
    for stopped in (state, model.load_state(tmp_path)):
        second, _ = model.generate(first[:, -1:], 8, stopped, temperature=0)
        assert torch.equal(torch.cat((first, second), 1), one)


# ---- State and streams ----


@pytest.mark.parametrize("capacity", [{}, {"capacity": 8, "eviction": "lowest_score"}])
def test_reading_goes_on_from_a_saved_state_bit_for_bit(
    build_model: BuildModel, content: dict[str, Any], capacity: dict[str, Any], tmp_path: Path
) -> None:
    model = grown(build_model, content)
    tokens = draw(2, 35)
    with torch.no_grad():
        begun = [model.create_memory(path, streams=2, **capacity) for path in (None, tmp_path / "memory")]
        plain, state = (model.initial_state(streams=2, memory=memory) for memory in begun)
        whole, _ = read(model, plain, tokens, 7)
        _, state = read(model, state, tokens[:, :21], 7)
        state.save(tmp_path / "state")
        after, _ = read(model, model.load_state(tmp_path / "state"), tokens[:, 21:], 7)
    assert torch.equal(after, whole[:, 21:])


def test_each_stream_reads_as_if_alone(build_model: BuildModel, content: dict[str, Any]) -> None:
    model = grown(build_model, content)
    tokens, lengths = draw(3, 32).unflatten(1, (4, 8)), torch.tensor([8, 5, 1])
    ends = torch.tensor([[False, False, False, False], [False, True, False, False], [False] * 4])

    def logits(streams: list[int]) -> list[list[Tensor]]:
        state, found = fresh(model, len(streams)), []
        for step in range(4):
            out, state = model(
                tokens[streams, step], state, lengths=lengths[streams], ends=ends[streams, step]
            )
            found.append([row[: lengths[stream]] for row, stream in zip(out, streams, strict=True)])
        return found

    together = logits([0, 1, 2])
    for stream in range(3):
        for step, (out,) in enumerate(logits([stream])):
            torch.testing.assert_close(out, together[step][stream])


def test_the_rows_of_a_memory_are_projected_once(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, scores, and scores that are not kept do not put each other out."""
    counted: list[tuple[int, int]] = []
    original = scores.row_scores

    def count(rows: Tensor, tokens: Tensor, **options: Any) -> Tensor:
        counted.append((rows.shape[0], tokens.shape[0]))
        return original(rows, tokens, **options)

    monkeypatch.setattr(scores, "row_scores", count)
    memory = build_model().create_memory(streams=1)
    projection, learned = torch.randn(2, 8, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    for n in (9, 4, 2):
        memory.append(torch.randn(2, 1, n, 16, dtype=torch.float64))
        for _ in range(2):
            layer = memory.layer(0)
            layer.scores(learned, normalize="rms", scale=1.0)
            layer.keys(projection, keep=True)
            layer.scores(torch.randn(3, 16, dtype=torch.float64), normalize="rms", scale=1.0, keep=False)
        held = int(memory.lengths)
        assert counted == [(n, 3), (n, 16), (held, 3), (held, 3)]
        counted.clear()


@pytest.mark.parametrize("place", ["memory", "disk", "tiers", "opened", "opened in tiers"])
def test_keys_are_the_same_kept_or_not_and_wherever_rows_are(place: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 2, "streams": 2, "dim": 16, "dtype": torch.float64}
    budget = {"device_bytes": 2048} if "tiers" in place else {}
    memory = MemoryStore.create(None if place == "memory" else tmp_path / "memory", **sizes, **budget)
    projection = torch.randn(3, 8, 16, dtype=torch.float64)
    for n in (4, 0, 70):
        memory.append(torch.randn(2, 2, n, 16, dtype=torch.float64), lengths=torch.tensor([n, n // 2]))
        if place.startswith("opened"):
            memory.commit()
            read_from = MemoryStore.open(tmp_path / "memory", **budget)
        else:
            read_from = memory
        layer = read_from.layer(1)
        rows, _ = read_from.rows(1)
        for _ in range(2):
            kept, anew = (layer.keys(projection, keep=keep) for keep in (True, False))
            for stream, length in enumerate(layer.lengths.tolist()):
                expected = torch.empty(3, length, 8, dtype=torch.float64)
                for j, row in enumerate(rows[stream, :length]):
                    expected[:, j] = torch.stack([unit(each @ rms(row)) for each in projection])
                for keys in (kept, anew):
                    torch.testing.assert_close(keys.of_stream(stream), expected)
    memory.close()


def test_rows_on_disk_are_read_once_for_all_projections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore.create(tmp_path / "memory", layers=1, streams=1, dim=16) as memory:
        memory.append(torch.randn(1, 1, 20, 16))
        memory.commit()
    memory = MemoryStore.open(tmp_path / "memory", mode="r+")
    memory.layer(0).keys(torch.randn(2, 8, 16), keep=False)
    monkeypatch.setattr(Chunks, "blocks", lambda *_: pytest.fail("rows are read from disk again"))
    for _ in range(2):
        memory.append(torch.randn(1, 1, 3, 16))
        projection = torch.randn(2, 8, 16)
        keys = memory.layer(0).keys(projection, keep=False)
        expected = routing_keys(memory.rows(0)[0][0], projection).transpose(0, 1)
        torch.testing.assert_close(keys.of_stream(0), expected)
    memory.close()


# ---- Training ----


def test_training_reaches_every_parameter(build_model: BuildModel, content: dict[str, Any]) -> None:
    model = grown(build_model, content, mem_len=0, router_kwargs={"eps": 1.0}).train()
    state = fresh(model)
    loss = torch.zeros(())
    for i in range(4):
        ends = torch.tensor([False, i == 1])
        logits, state = model(draw(2, 9), state, ends=ends)
        loss = loss + (logits * torch.randn_like(logits)).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["tokens", "chunks"])
def test_gradients_of_the_routing_are_those_of_its_gates(build_model: BuildModel, kind: str) -> None:
    """Not passed straight through, they change smoothly as long as the same rows are chosen."""
    options = {"straight_through": False, "eps": 1.0}
    model = build_model(
        **KINDS[kind], num_content_tokens_kv=3, routing_key_dim=8, router_kwargs=options, depth=2,
        memory_layers=(2,),
    )  # fmt: skip
    _, state = read(model, fresh(model), draw(2, 18), 6)
    tokens = draw(2, 6)
    cotangent = torch.randn(2, 6, 50, dtype=torch.float64)

    def loss() -> tuple[Tensor, Tensor]:
        logits, _, (routing,) = model(tokens, state.fork(), return_routing=True)
        return (logits * cotangent).sum(), routing.indices

    routing = model.typed_blocks()[1].content_memory.content_routing  # type: ignore[union-attr]
    assert routing is not None
    for parameter in routing.parameters():
        direction = torch.randn_like(parameter)
        value, chosen = loss()
        (gradient,) = torch.autograd.grad(value, parameter)
        values, step = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                moved, same = loss()
                parameter -= sign * step * direction
            values.append(moved)
            assert torch.equal(same, chosen)
        expected = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_what_was_written(
    build_model: BuildModel, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows that keep their graph, gradients are those of all that was computed: finite differences."""
    searched: list[Tensor] = []
    search = RoutingKeys.search

    def searching(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        scores, found = search(*arguments, **options)
        searched.append(found.sort(-1).values)
        return scores, found

    monkeypatch.setattr(RoutingKeys, "search", searching)
    model = grown(
        build_model,
        content,
        memory_grad_segments=9,
        mems_grad=True,
        router_kwargs={"straight_through": False, "eps": 1.0},
    )
    cotangent = torch.randn(2, 9, 50, dtype=torch.float64)
    parameters = [*model.blocks[0].parameters(), *model.blocks[1].parameters()]
    directions = [torch.randn_like(parameter) for parameter in parameters]

    def loss(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        state, chosen = fresh(model), []
        searched.clear()
        for piece in tokens.split([9, 4, 8, 9], dim=1):
            logits, state, routings = model(piece, state, return_routing=True)
            for routing in routings:
                chosen += [routing.indices, routing.gates == 1]
        return (logits * cotangent).sum(), [*chosen, *searched]

    def moved(tokens: Tensor, step: float) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
            value = loss(tokens)
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=step)
        return value

    step = 1e-6
    for _ in range(9):
        tokens = draw(2, 30)
        value, chosen = loss(tokens)
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        (above, *other), (below, *another) = moved(tokens, step), moved(tokens, -step)
        # Where rows are nearly equally good, the choice itself may change, and the loss jumps; or what there
        # is to choose from, or which gates are wide open, and the loss has a kink.
        if all(map(torch.equal, [*chosen, *chosen], [*other[0], *another[0]])):
            break
    else:
        pytest.fail("with no tokens the choice stayed the same")
    slope = sum(
        (gradient * direction).sum()
        for gradient, direction in zip(found, directions, strict=True)
        if gradient is not None
    )
    torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-5)


# The compiler looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("forgetful_compiler")
@pytest.mark.parametrize("kind", ["both", "both by tokens"])
def test_a_block_compiles_to_one_graph(build_model: BuildModel, kind: str) -> None:
    model = build_model(**KINDS[kind], num_content_tokens_kv=2, depth=2, memory_layers=(2,))
    tokens = draw(2, 16)
    _, state = model(tokens[:, :8], fresh(model))
    plain, _ = model(tokens[:, 8:], state.fork())
    model.blocks[1].compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(tokens[:, 8:], state)[0], plain)


def test_gradient_checkpointing_changes_nothing(build_model: BuildModel, content: dict[str, Any]) -> None:
    model = grown(build_model, content)
    saving = grown(build_model, content, gradient_checkpointing=True)
    saving.load_state_dict(model.state_dict())
    tokens = draw(2, 20)
    results = []
    for each in (model, saving):
        logits, _ = read(each, fresh(each), tokens, 5)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in each.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision(build_model: BuildModel, content: dict[str, Any]) -> None:
    model = grown(build_model, content).float()
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            logits, state = model(draw(2, 5), state)
        logits.sum().backward()
    assert logits.isfinite().all()
    model = model.bfloat16()
    logits, _ = read(model, fresh(model), draw(2, 20), 5)
    assert logits.isfinite().all()


def test_autocast_does_not_touch_the_choice(build_model: BuildModel) -> None:
    """With gradient, rows are scored again, as exactly as they were when they were found.

    Gates, highest first, are compared: scores that are equal but for rounding may change places.
    """
    model = build_model(torch.float32, **KINDS["tokens"], num_content_tokens_kv=4, routing_key_dim=8)
    with torch.no_grad():
        state = read(model, fresh(model), draw(2, 40), 20)[1]
    tokens = draw(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, (with_gradient, *_) = model(tokens, state.fork(), return_routing=True)
        with torch.no_grad():
            _, _, (without, *_) = model(tokens, state, return_routing=True)
    torch.testing.assert_close(with_gradient.gates, without.gates, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_weights_and_memory_of_any_type(
    build_model: BuildModel, content: dict[str, Any], dtype: torch.dtype, rows: torch.dtype
) -> None:
    model = grown(build_model, content, dtype=dtype, memory_grad_segments=2)
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2, dtype=rows))
    for _ in range(3):
        logits, state = model(draw(2, 7), state, lengths=torch.tensor([7, 1]))  # one has no rows
    logits.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("rows", [torch.float64, torch.bfloat16], ids=str)
def test_autocast_leaves_weights_in_float64(
    build_model: BuildModel, content: dict[str, Any], rows: torch.dtype
) -> None:
    model = grown(build_model, content)
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2, dtype=rows))
    tokens = draw(2, 14)
    state = read(model, state, tokens[:, :7], 7)[1]
    plain, _ = model(tokens[:, 7:], state.fork())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model(tokens[:, 7:], state)
    torch.testing.assert_close(logits, plain)
    logits.sum().backward()


# ---- Random routing ----


def test_random_routing_is_a_control_without_a_router(build_model: BuildModel) -> None:
    model = build_model(memory_routing="random", num_tokens_kv=5)
    _, state = read(model, fresh(model), draw(2, 40), 10)
    tokens = draw(2, 5)
    drawn = []
    for _ in range(8):
        logits, _, report = model(tokens, state.fork(), return_routing=True)
        for routing in report:
            for row in routing.indices.flatten(0, 1).tolist():
                assert len(set(row)) == 5
                assert set(row) <= set(range(34))
        drawn.append(report[0].indices)
    assert len({str(each.tolist()) for each in drawn}) == 8
    assert len(torch.stack(drawn).unique()) > 20
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached or "routing_token" in name, name


# ---- Options ----


def test_the_options_are_saved(build_model: BuildModel, content: dict[str, Any], tmp_path: Path) -> None:
    model = grown(build_model, content)
    model.save_pretrained(tmp_path / "new")
    loaded = RoutedTransformerXL.from_pretrained(tmp_path / "new")
    assert loaded.config == model.config
    tokens = draw(1, 21)
    outputs = [read(each, fresh(each, 1), tokens, 7)[0] for each in (model, loaded)]
    assert torch.equal(*outputs)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(json.dumps(config | {"memory_routing": "learned"}))
    with pytest.raises(
        ValueError, match=r"config.json: expected the options of the weights .* in one of them"
    ):
        RoutedTransformerXL.from_pretrained(tmp_path / "new")


def test_half_of_the_heads_each(build_model: BuildModel) -> None:
    sizes = []
    for kind in ("learned", "both"):
        model = build_model(memory_routing=kind, routing_chunk=2)
        projections = {f"to_{name}" for name in ("q", "v", "out")}
        sizes.append(
            sum(p.numel() for name, p in model.named_parameters() if projections & set(name.split(".")))
        )
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_routing": "none"}, r"memory_routing: expected one of \('learned', .* got 'none'"),
        ({"routing_chunk": 0}, "routing_chunk: expected at least 1, got 0"),
        (
            {"memory_routing": "both", "kv_routing_tokens": 0},
            "kv_routing_tokens: expected at least 1, got 0",
        ),
        ({"num_content_tokens_kv": 0}, "num_content_tokens_kv: expected at least 1, got 0"),
        ({"routing_key_dim": 0}, "routing_key_dim: expected at least 1, got 0"),
        (
            {"memory_routing": "content", "num_tokens_q": 4},
            "num_tokens_q: expected None with memory_routing='content', got 4",
        ),
        (
            {"memory_routing": "both", "heads": 6, "kv_routing_tokens": 2},
            "heads: expected a multiple of 4 with memory_routing='both', .* got 6",
        ),
        *(
            ({"memory_routing": "content", "routing_chunk": chunk, **options}, message)
            for chunk in (1, 3)
            for options, message in (
                ({"heads": 6, "kv_routing_tokens": 4}, "heads: expected a multiple of the 4 .*, got 6"),
                (
                    {"router_kwargs": {"num_routing_tokens": 3}},
                    "router_kwargs: expected no num_routing_tokens",
                ),
            )
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedTransformerXL(**{"depth": 3, "memory_layers": (2,), **options})
