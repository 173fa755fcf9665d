from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xlroute import RoutedTransformerXL, RouterOutput
from xlroute.blocks import RoutedMemoryAttention
from xlroute.memory import FingerprintError, MemoryStore
from xlroute.open_segment import OpenSegment

BuildModel = Callable[..., RoutedTransformerXL]


def read(
    model: RoutedTransformerXL, tokens: Tensor, cuts: list[int], **options: Any
) -> tuple[Tensor, MemoryStore]:
    """Logits of tokens [b, n] read in segments of the given lengths, and the memory."""
    memory = model.create_memory(streams=tokens.shape[0], **options)
    state = model.initial_state(streams=tokens.shape[0], memory=memory)
    logits = []
    for piece in tokens.split(cuts, dim=1):
        out, state = model(piece, state)
        logits.append(out)
    return torch.cat(logits, dim=1), memory


def test_memory_layers_hold_the_states_that_enter_their_blocks(build_model: BuildModel) -> None:
    model = build_model()
    tokens = torch.randint(50, (2, 14))
    _, memory = read(model, tokens, [14])
    entering: list[Tensor] = []
    for number in (2, 3):
        model.blocks[number - 1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    read(model, tokens, [14])
    for layer in range(2):
        rows, mask = memory.rows(layer)
        assert mask.all()
        assert torch.equal(rows, entering[layer][:, :8])


def test_the_xl_window_is_what_a_longer_segment_would_show(build_model: BuildModel) -> None:
    """For one layer, whose keys do not depend on the cuts, reading in segments is reading at once."""
    model = build_model(depth=1, memory_layers=(), mem_len=20)
    tokens = torch.randint(50, (2, 17))
    state = model.initial_state(streams=2)
    whole, _ = model(tokens, state.fork())
    pieces = []
    for piece in tokens.split([4, 1, 7, 5], dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_every_kind_of_memory_is_used(build_model: BuildModel) -> None:
    model = build_model()
    tokens = torch.randint(50, (1, 25))
    with_memory, _ = read(model, tokens, [5] * 5)
    state = model.initial_state(streams=1)
    window_only = []
    for piece in tokens.split(5, dim=1):
        logits, state = model(piece, state)
        window_only.append(logits)
    without = torch.cat(window_only, 1)
    # An empty memory still gives the learned null value, so compare from where rows exist.
    assert (with_memory[:, 15:] - without[:, 15:]).abs().max() > 1e-3
    alone, _ = model(tokens[:, 20:], model.initial_state(streams=1))
    assert (without[:, 20:] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("n", [4, 6, 9])
def test_windows_move_alike_beside_a_stream_that_ends_early(build_model: BuildModel, n: int) -> None:
    """Whatever is copied of them, for segments shorter than the window, as long, and longer."""
    model = build_model(mem_len=6)
    states = [model.initial_state(streams=b, memory=model.create_memory(streams=b)) for b in (2, 3)]
    for step in range(4):
        tokens = torch.randint(50, (3, n))
        ends = torch.tensor([step == 2, False, False])
        _, states[0] = model(tokens[:2], states[0], ends=ends[:2])
        _, states[1] = model(tokens, states[1], lengths=torch.tensor([n, n, n - 1]), ends=ends)
        alone, beside = states
        torch.testing.assert_close(alone.window, beside.window[:, :2])
        assert torch.equal(alone.window_lengths, beside.window_lengths[:2])
        assert alone.memory is not None
        assert beside.memory is not None
        for layer in range(2):
            rows, mask = alone.memory.rows(layer)
            others, theirs = beside.memory.rows(layer)
            assert torch.equal(mask, theirs[:2, : mask.shape[1]])
            torch.testing.assert_close(rows, others[:2, : mask.shape[1]])


def test_routed_rows_come_with_the_rows_that_followed_them(build_model: BuildModel) -> None:
    model = build_model(num_tokens_kv=30)
    tokens = torch.randint(50, (2, 26))
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
    _, state = model(tokens, state, lengths=torch.tensor([26, 12]))
    assert state.memory is not None
    for layer, block in enumerate((1, 2)):
        memory = model.open_memories(state)[block]
        assert memory is not None
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        rows, _ = model.route(block, 0, memory, x, state.window[block], model.window_mask(state))
        held, _ = state.memory.rows(layer)
        for stream, length in enumerate((20, 6)):
            for indices, followers in zip(rows.routed.indices[stream], rows.followers[stream], strict=True):
                assert indices.max() == length - 1
                for index, follower in zip(indices.tolist(), followers, strict=True):
                    if 0 <= index < length - 1:
                        assert torch.equal(follower, held[stream, index + 1])
                    else:
                        assert not follower.any()


def test_a_memory_that_records_routes_counts_what_each_layer_has_chosen(build_model: BuildModel) -> None:
    """The rows that come along because they followed a chosen one are not counted."""
    model = build_model()
    memory = model.create_memory(streams=2)
    counts = memory.record_routes()
    state = model.initial_state(streams=2, memory=memory)
    expected = [[Counter[int]() for _ in range(2)] for _ in range(2)]
    ends = torch.tensor([False, True])
    for step in range(12):
        tokens, lengths = torch.randint(50, (2, 5)), torch.tensor([5, 3])
        _, state, report = model(tokens, state, lengths=lengths, ends=ends & (step == 5), return_routing=True)
        for streams, routing in zip(expected, report, strict=True):
            for counter, positions, chosen in zip(streams, routing.positions, routing.mask, strict=True):
                counter.update(positions[chosen].tolist())
        if step == 5:
            assert all(streams[1] for streams in expected)
            for streams in expected:
                streams[1].clear()
    assert [counter.total() > 0 for streams in expected for counter in streams] == [True] * 4
    for layer, streams in enumerate(expected):
        for stream, counter in enumerate(streams):
            positions, times = counts.of(layer, stream)
            assert dict(zip(positions.tolist(), times.tolist(), strict=True)) == counter
    before = counts.totals
    model.generate(torch.randint(50, (2, 1)), 4, state)  # routes once, where its segment begins
    assert [now - then for now, then in zip(counts.totals, before, strict=True)] == [2 * 3 * 2] * 2


def test_an_untrained_memory_finds_what_followed_the_present_state() -> None:
    """Queries and keys share their projection, so each token attends to the row that equals it."""
    memory = RoutedMemoryAttention(64, heads=4, dim_head=16, num_tokens_kv=50, kv_routing_tokens=2)
    torch.nn.init.eye_(memory.to_out.weight)
    x, followers = torch.randn(2, 50, 64), torch.randn(2, 2, 50, 64)
    routed = RouterOutput(
        torch.arange(50).expand(2, 2, -1), torch.ones(2, 2, 50), x[:, None].expand(-1, 2, -1, -1), None
    )
    found = memory.attend(memory.queries(x), memory.keys_values(routed, followers))
    values = memory.to_v(memory.context_norm(followers))  # [b, r, k, h e]
    first, second = found.chunk(2, dim=-1)  # the heads of either set
    assert torch.cosine_similarity(first, values[:, 0, :, :32], dim=-1).median() > 0.95
    assert torch.cosine_similarity(second, values[:, 1, :, 32:], dim=-1).median() > 0.95


def test_cleared_memory_changes_what_is_read_and_keeps_the_window(build_model: BuildModel) -> None:
    model = build_model()
    memory = model.create_memory(streams=1)
    state = model.initial_state(streams=1, memory=memory)
    for _ in range(4):
        _, state = model(torch.randint(50, (1, 5)), state)
    emptied = state.fork()
    emptied.clear_memory()
    assert emptied.memory is not None
    assert emptied.memory.lengths.tolist() == [0]
    assert memory.lengths.tolist() == [14]
    piece = torch.randint(50, (1, 5))
    a, _ = model(piece, state)
    b, _ = model(piece, emptied)
    assert (a - b).abs().max() > 1e-3


def test_training_reaches_every_parameter(build_model: BuildModel) -> None:
    model = build_model(router_kwargs={"eps": 1.0}, num_tokens_kv=4).train()
    memory = model.create_memory(streams=2)
    state = model.initial_state(streams=2, memory=memory)
    loss = torch.zeros(())
    for i in range(6):  # one backward over several segments, with resets and growing memory in between
        ends = torch.tensor([False, i == 2])
        logits, state = model(torch.randint(50, (2, 9)), state, ends=ends)
        loss = loss + (logits * torch.randn_like(logits)).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_one_backward_over_several_segments_equals_one_for_each(build_model: BuildModel) -> None:
    model = build_model(router_kwargs={"eps": 1.0})
    tokens = torch.randint(50, (2, 24))
    cotangents = torch.randn(4, 2, 6, 50, dtype=torch.float64)
    gradients = []
    for together in (True, False):
        state = model.initial_state(streams=2, memory=model.create_memory(streams=2, capacity=9))
        total = torch.zeros(())
        model.zero_grad()
        for i, (piece, cotangent) in enumerate(zip(tokens.split(6, dim=1), cotangents, strict=True)):
            logits, state = model(piece, state, ends=torch.tensor([False, i == 1]))
            loss = (logits * cotangent).sum()
            if together:
                total = total + loss
            else:
                loss.backward()
        if together:
            total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_gradient_checkpointing_changes_nothing(build_model: BuildModel) -> None:
    model = build_model()
    saving = build_model(gradient_checkpointing=True)
    saving.load_state_dict(model.state_dict())
    tokens = torch.randint(50, (2, 20))
    results = []
    for m in (model, saving):
        logits, _ = read(m, tokens, [5] * 4)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in m.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_only_in_training(build_model: BuildModel) -> None:
    model = build_model(dropout=0.5)
    tokens = torch.randint(50, (1, 5))
    a, b = (model(tokens, model.initial_state(streams=1))[0] for _ in range(2))
    assert torch.equal(a, b)
    model.train()
    a, b = (model(tokens, model.initial_state(streams=1))[0] for _ in range(2))
    assert not torch.equal(a, b)


def test_tied_and_untied_embeddings(build_model: BuildModel) -> None:
    assert build_model().to_logits.weight is not None
    tied, untied = build_model(), build_model(tie_embeddings=False)
    assert tied.to_logits.weight is tied.embedding.weight
    assert untied.to_logits.weight is not untied.embedding.weight


def test_autocast_runs_and_keeps_states_in_the_type_of_the_weights(build_model: BuildModel) -> None:
    model = build_model().float()
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            logits, state = model(torch.randint(50, (2, 5)), state)
    assert logits.isfinite().all()
    assert state.window.dtype == torch.float32
    assert state.memory is not None
    assert state.memory.rows(0)[0].dtype == torch.bfloat16


# The compiler looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_block_compiles_to_one_graph(build_model: BuildModel) -> None:
    model = build_model()
    plain, _ = read(model, tokens := torch.randint(50, (2, 20)), [5] * 4)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled, _ = read(model, tokens, [5] * 4)
    torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize(
    "options", [{"mem_len": 0}, {"memory_layers": ()}, {"mem_len": 0, "memory_layers": ()}]
)
def test_without_window_or_without_memory(build_model: BuildModel, options: dict[str, Any]) -> None:
    model = build_model(**options)
    memory = model.create_memory(streams=2) if model.memory_layers else None
    state = model.initial_state(streams=2, memory=memory)
    for _ in range(3):
        logits, state = model(torch.randint(50, (2, 5)), state, lengths=torch.tensor([5, 2]))
    assert logits.isfinite().all()
    if memory is not None:
        assert memory.lengths.tolist() == [15, 6]


# ---- Generation ----


@pytest.mark.parametrize("segment_len", [1, 4, 5, 100])
@pytest.mark.parametrize("before", [0, 3])
def test_step_by_step_equals_the_parallel_forward_on_the_same_cuts(
    build_model: BuildModel, segment_len: int, before: int
) -> None:
    model = build_model()
    tokens = torch.randint(50, (2, 23))
    starts = [model.initial_state(streams=2, memory=model.create_memory(streams=2)) for _ in range(2)]
    for _ in range(before):
        piece = torch.randint(50, (2, 5))
        starts = [model(piece, state)[1] for state in starts]
    with torch.no_grad():
        parallel, state = [], starts[0]
        for piece in tokens.split(segment_len, dim=1):
            logits, state = model(piece, state)
            parallel.append(logits)
        segment = OpenSegment(model, starts[1], segment_len)
        steps = [segment.read(piece) for piece in tokens.split([7, 1, 1, 1, 6, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), torch.cat(parallel, 1))
    segment.leave()
    model.end_open_segment(starts[1])
    torch.testing.assert_close(starts[1].window, state.window)
    assert torch.equal(starts[1].positions, state.positions)
    assert starts[1].memory is not None
    assert state.memory is not None
    for layer in range(2):
        torch.testing.assert_close(starts[1].memory.rows(layer)[0], state.memory.rows(layer)[0])


def test_generating_in_two_calls_is_generating_in_one(build_model: BuildModel) -> None:
    model = build_model()
    prompt = torch.randint(50, (2, 8))
    one, _ = model.generate(
        prompt, 14, model.initial_state(streams=2, memory=model.create_memory(streams=2)), temperature=0
    )
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
    first, state = model.generate(prompt, 6, state, temperature=0)
    second, state = model.generate(first[:, -1:], 8, state, temperature=0)
    assert torch.equal(torch.cat((first, second), 1), one)
    assert state.positions.tolist() == [8 + 13] * 2


def test_generate_takes_the_likeliest_token_of_the_forward(build_model: BuildModel) -> None:
    model = build_model()
    prompt = torch.randint(50, (1, 5))
    state = model.initial_state(streams=1, memory=model.create_memory(streams=1))
    logits, _ = model(prompt, state.fork())
    new, _ = model.generate(prompt, 1, state, temperature=0)
    assert new[0, 0] == logits[0, -1].argmax()


def test_sampling_is_seeded_and_restricted(build_model: BuildModel) -> None:
    model = build_model()
    prompt = torch.randint(50, (3, 5))

    def draw(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        state = model.initial_state(streams=3, memory=model.create_memory(streams=3))
        return model.generate(prompt, 9, state, generator=generator, **options)[0]

    assert torch.equal(draw(), draw())
    assert torch.equal(draw(top_k=1), draw(temperature=0))
    assert torch.equal(draw(top_p=1e-9), draw(temperature=0))
    assert not torch.equal(draw(temperature=5.0), draw(temperature=0))


def test_a_segment_left_open_ends_before_the_next_call(build_model: BuildModel) -> None:
    model = build_model()
    prompt = torch.randint(50, (2, 7))
    state = model.initial_state(streams=2, memory=model.create_memory(streams=2))
    new, state = model.generate(prompt, 3, state, temperature=0)
    assert state.open.shape[2] == 4
    read_so_far = torch.cat((prompt, new[:, :-1]), 1)
    piece = torch.randint(50, (2, 5))
    after, state = model(piece, state)
    assert state.open.shape[2] == 0
    expected, _ = read(model, torch.cat((read_so_far, piece), 1), [5, 4, 5])
    torch.testing.assert_close(after, expected[:, 9:])


def test_generate_leaves_the_training_mode_as_it_was(build_model: BuildModel) -> None:
    model = build_model().train()
    model.generate(torch.zeros(1, 2, dtype=torch.int64), 2, model.initial_state(streams=1))
    assert model.training


# ---- Saving weights ----


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_pretrained(build_model: BuildModel, tmp_path: Path, tied: bool) -> None:
    model = build_model(tie_embeddings=tied, router_kwargs={"eps": 0.5})
    model.save_pretrained(tmp_path / "model")
    loaded = RoutedTransformerXL.from_pretrained(tmp_path / "model")
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.config == model.config
    tokens = torch.randint(50, (1, 12))
    assert torch.equal(read(loaded, tokens, [4] * 3)[0], read(model, tokens, [4] * 3)[0])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_damaged_or_foreign_model_is_refused(build_model: BuildModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json: there is no saved model"):
        RoutedTransformerXL.from_pretrained(tmp_path)
    build_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="expected weights with fingerprint"):
        RoutedTransformerXL.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "GPT", "config_version": 1}')
    with pytest.raises(ValueError, match="expected model RoutedTransformerXL with config version 1, got GPT"):
        RoutedTransformerXL.from_pretrained(tmp_path)


def test_the_fingerprint_sees_every_weight(build_model: BuildModel) -> None:
    model = build_model()
    seen = {model.fingerprint()}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-12
        seen.add(model.fingerprint())
    assert len(seen) == 1 + len(list(model.parameters()))


# ---- Errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"dim_head": 3}, "dim_head: expected an even number"),
        (
            {"memory_layers": (0, 1)},
            r"memory_layers: expected increasing block numbers from 1 to 3, got \(0, 1\)",
        ),
        ({"memory_layers": (3, 2)}, r"memory_layers: expected increasing block numbers from 1 to 3"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and less than 1, got 1.0"),
        ({"mem_len": -1}, "mem_len: expected at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedTransformerXL(**{"depth": 3, **options})


def test_refused_calls_read_nothing(build_model: BuildModel) -> None:
    model = build_model()
    memory = model.create_memory(streams=2)
    state = model.initial_state(streams=2, memory=memory)
    tokens = torch.randint(50, (2, 9))
    _, state = model(tokens, state)
    good = {"tokens": tokens, "state": state}
    for bad, error, message in (
        ({"tokens": tokens.float()}, TypeError, "tokens: expected int64"),
        ({"tokens": tokens[:1]}, ValueError, r"tokens: expected \[2, n\] with n at least 1, got \(1, 9\)"),
        ({"tokens": tokens[:, :0]}, ValueError, r"tokens: expected \[2, n\] with n at least 1, got \(2, 0\)"),
        ({"tokens": tokens + 50}, ValueError, "tokens: expected 0 to 49, got"),
        ({"lengths": torch.tensor([1, 10])}, ValueError, r"lengths: expected 0 to 9, got \[1, 10\]"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths: expected integers \[2\]"),
        ({"ends": torch.tensor([1, 0])}, ValueError, r"ends: expected bool \[2\]"),
        ({"state": None}, TypeError, "state: expected a TransformerXLState, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            model(**{**good, **bad})  # type: ignore[call-overload]
    for options, message in (
        ({"length": 0}, "length: expected a whole number of at least 1, got 0"),
        ({"length": 3, "temperature": -1.0}, "temperature: expected at least 0, got -1.0"),
        ({"length": 3, "top_k": 0}, "top_k: expected None or at least 1, got 0"),
        ({"length": 3, "top_p": 0.0}, "top_p: expected None or more than 0 and at most 1, got 0.0"),
        ({"length": 3, "segment_len": 0}, "segment_len: expected a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, state=state, **options)
    assert memory.lengths.tolist() == [3, 3]
    model(tokens, state)


def test_a_consumed_state_is_refused_and_a_fork_is_not(build_model: BuildModel) -> None:
    model = build_model()
    memory = model.create_memory(streams=1)
    state = model.initial_state(streams=1, memory=memory)
    tokens = torch.randint(50, (1, 9))
    fork = state.fork()
    expected, after = model(tokens, state)
    for use in (lambda: model(tokens, state), state.fork, state.clear_memory):
        with pytest.raises(ValueError, match="state: expected one that was not read on from"):
            use()
    assert torch.equal(model(tokens, fork)[0], expected)
    assert memory.lengths.tolist() == [3]
    memory.reset([0])
    with pytest.raises(ValueError, match="state: its memory store was changed by someone else"):
        model(tokens, after)


def test_a_memory_that_does_not_fit_is_refused(build_model: BuildModel) -> None:
    model = build_model()
    for options, message in (
        ({"layers": 1, "streams": 2, "dim": 16}, "memory: expected layers=2, got layers=1"),
        ({"layers": 2, "streams": 3, "dim": 16}, "memory: expected streams=2, got streams=3"),
        ({"layers": 2, "streams": 2, "dim": 8}, "memory: expected dim=16, got dim=8"),
    ):
        with pytest.raises(ValueError, match=message):
            model.initial_state(streams=2, memory=MemoryStore.create(**options))
    memory = model.create_memory(streams=2)
    model(torch.randint(50, (2, 9)), model.initial_state(streams=2, memory=memory))
    model.initial_state(streams=2, memory=memory)
    with pytest.raises(FingerprintError, match="memory: expected rows of these weights"):
        build_model().initial_state(streams=2, memory=memory)
    with pytest.raises(ValueError, match="memory: expected None for a model without memory_layers"):
        build_model(memory_layers=()).initial_state(streams=2, memory=memory)
