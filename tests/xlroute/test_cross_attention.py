from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlroute import ConditionalRoutedCrossAttention
from xlroute.memory import MemoryStore


def build(**options: object) -> ConditionalRoutedCrossAttention:
    defaults = {"dim": 32, "num_tokens_q": None, "num_tokens_kv": 6, "heads": 4, "dim_head": 8}
    return ConditionalRoutedCrossAttention(**{**defaults, **options})  # type: ignore[arg-type]


def by_hand(module: ConditionalRoutedCrossAttention, x: Tensor, context: Tensor) -> Tensor:
    """Every query to the routed rows of its head's set, head by head, in loops."""
    heads, sets, e = module.heads, module.sets, module.null_value.shape[-1]
    out = module.kv_router(context, num_tokens=module.num_tokens_kv, keep_one_route_dim=True)
    q = module.to_q(module.norm(x)).unflatten(-1, (heads, e))
    to_k, key_norm = module.to_k, module.context_norm
    if to_k is None:
        to_k, key_norm = module.to_q, module.norm
    key_weight, value_weight = (each.weight.unflatten(0, (heads, e)) for each in (to_k, module.to_v))
    results = []
    for h in range(heads):
        r = h // (heads // sets)
        rows = out.tokens[:, r]
        gates = out.scores[:, r, :, None]
        keys = key_norm(rows) @ key_weight[h].T
        values = (module.context_norm(rows) @ value_weight[h].T) * gates
        if module.multiply_keys_by_score:
            keys = keys * gates
        values = torch.cat((module.null_value[h].expand(x.shape[0], 1, e), values), 1)
        if module.log_scale is None or module.null_logit is None:
            null = q[:, :, h] @ module.null_key[h].T / e**0.5
            logits = q[:, :, h] @ keys.mT / e**0.5
        else:
            null = module.null_logit[h].expand(x.shape[0], x.shape[1], 1)
            logits = torch.cosine_similarity(q[:, :, None, h], keys[:, None], dim=-1)
            logits = logits * module.log_scale[h].exp()
        weights = torch.cat((null, logits), -1).softmax(-1)
        results.append(weights @ values)
    return module.to_out(torch.cat(results, -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("sets", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"multiply_keys_by_score": True}, {"share_qk": True}, {"qk_norm": True}], ids=str
)
def test_it_is_attention_to_the_routed_rows(sets: int, options: dict[str, bool]) -> None:
    module = build(kv_routing_tokens=sets, router_straight_through=False, **options).double()
    for norm in (module.norm, module.context_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x, context = torch.randn(3, 9, 32).double(), torch.randn(3, 50, 32).double()
    torch.testing.assert_close(module(x, context), by_hand(module, x, context))


@pytest.mark.parametrize("backend", [None, False])
def test_backends_agree(backend: bool | None) -> None:
    module = build(use_flash_attn=backend).double()
    x, context = torch.randn(2, 9, 32).double(), torch.randn(2, 50, 32).double()
    mask = torch.rand(2, 50) < 0.1
    other = build().double()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x, context, context_mask=mask), other(x, context, context_mask=mask))


def test_an_empty_context_leaves_the_null_key() -> None:
    module = build(kv_routing_tokens=2)
    x, context = torch.randn(2, 5, 32), torch.randn(2, 50, 32)
    nothing = module(x, context, context_mask=torch.zeros(2, 50, dtype=torch.bool))
    expected = module.to_out(module.null_value.flatten()).expand(2, 5, 32)
    torch.testing.assert_close(nothing, expected)
    torch.testing.assert_close(module(x, context[:, :0]), expected)


def test_routed_queries_attend_and_the_others_get_the_learned_output() -> None:
    module = build(num_tokens_q=4).double()
    x, context = torch.randn(2, 10, 32).double(), torch.randn(2, 50, 32).double()
    out = module(x, context)
    everyone = build().double()
    everyone.load_state_dict(
        {k: v for k, v in module.state_dict().items() if not k.startswith(("q_router", "null_q_token"))}
    )
    attended = everyone(x, context)
    assert module.q_router is not None
    routed = module.q_router(x, num_tokens=4).indices
    for b in range(2):
        for i in range(10):
            expected = attended[b, i] if i in routed[b] else module.null_q_token
            torch.testing.assert_close(out[b, i], expected)


def test_masked_queries_are_not_routed_and_short_choices_do_not_overwrite() -> None:
    module = build(num_tokens_q=4)
    x, context = torch.randn(2, 10, 32), torch.randn(2, 50, 32)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, [3, 9]] = True
    out = module(x, context, mask=mask)
    assert module.null_q_token is not None
    for b in range(2):
        for i in range(10):
            assert torch.equal(out[b, i], module.null_q_token) != bool(mask[b, i])
    plain = build(num_tokens_q=4, use_null_q_tokens=False)
    assert not plain(x, context, mask=mask)[1].any()


def test_gradient_reaches_every_parameter() -> None:
    module = build(num_tokens_q=4, kv_routing_tokens=2, router_kwargs={"eps": 1.0})
    x, context = torch.randn(2, 10, 32), torch.randn(2, 80, 32)
    out = module(x, context)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_memory_layer_is_a_context_like_the_same_rows_in_a_tensor() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=32)
    states = torch.randn(1, 2, 60, 32)
    store.append(states, lengths=torch.tensor([60, 20]))
    module = build(kv_routing_tokens=2)
    x = torch.randn(2, 7, 32)
    mask = torch.arange(60) < torch.tensor([60, 20])[:, None]
    assert torch.equal(module(x, store.layer(0)), module(x, states[0], context_mask=mask))


def test_only_the_chosen_rows_leave_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=32)
    store.append(torch.randn(1, 2, 60, 32))
    layer = store.layer(0)
    asked: list[torch.Size] = []
    gather = layer.take

    def counting(indices: Tensor) -> Tensor:
        asked.append(indices.shape)
        return gather(indices)

    monkeypatch.setattr(layer, "take", counting)
    build(kv_routing_tokens=2)(torch.randn(2, 7, 32), layer)
    assert asked == [(2, 2, 6)]


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "share_qk": True}], ids=["plain", "cosine"])
def test_autocast_and_half_precision_run(options: dict[str, bool]) -> None:
    module = build(num_tokens_q=4, kv_routing_tokens=2, **options)
    x, context = torch.randn(2, 10, 32), torch.randn(2, 50, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x, context).isfinite().all()
    half = build(kv_routing_tokens=2, **options).to(torch.bfloat16)
    out = half(x.to(torch.bfloat16), context.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert half(x.to(torch.bfloat16), context).dtype == torch.bfloat16


def test_it_compiles_to_one_graph() -> None:
    module = build(num_tokens_q=4, kv_routing_tokens=2)
    x, context = torch.randn(2, 10, 32), torch.randn(2, 50, 32)
    mask, context_mask = torch.rand(2, 10) < 0.7, torch.rand(2, 50) < 0.7
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, context, mask=mask, context_mask=context_mask),
        module(x, context, mask=mask, context_mask=context_mask),
    )


def test_the_two_names_of_the_number_of_sets() -> None:
    assert build(num_sets_kv=2).sets == build(kv_routing_tokens=2).sets == 2
    assert build(num_sets_kv=2, kv_routing_tokens=2).sets == 2
    with pytest.raises(ValueError, match="num_sets_kv and kv_routing_tokens name the same number"):
        build(num_sets_kv=2, kv_routing_tokens=4)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="heads: expected a multiple of the 3 routing tokens, got 4"):
        build(kv_routing_tokens=3)
    with pytest.raises(ValueError, match="num_tokens_kv: expected at least 1, got 0"):
        build(num_tokens_kv=0)
    module = build()
    x = torch.randn(2, 7, 32)
    with pytest.raises(ValueError, match=r"x, context: expected \[b, n, d\] and \[b, m, d\]"):
        module(x, torch.randn(3, 9, 32))
    with pytest.raises(ValueError, match="num_tokens_q: expected None in a module built with"):
        module(x, torch.randn(2, 9, 32), num_tokens_q=3)


def test_router_options_reach_the_router() -> None:
    module = build(router_kwargs={"route_block_size": 7, "eps": 0.5})
    assert (module.kv_router.route_block_size, module.kv_router.eps) == (7, 0.5)
    for name in ("num_routing_tokens", "learned_routing_tokens"):
        with pytest.raises(ValueError, match=f"router_kwargs: expected no {name}"):
            build(router_kwargs={name: 1})
    with pytest.raises(ValueError, match="kv_routing_tokens: expected at least 1, got 0"):
        build(kv_routing_tokens=0)


def test_a_store_is_no_context_but_its_layers_are() -> None:
    store = MemoryStore.create(layers=1, streams=2, dim=32)
    with pytest.raises(TypeError, match=r"context: expected .* \(store\.layer\(i\)\), got MemoryStore"):
        build()(torch.randn(2, 7, 32), store)


def test_flash_refuses_what_it_cannot_take() -> None:
    module = build(use_flash_attn=True)
    with pytest.raises(ValueError, match="'flash' expected float16 or bfloat16 tensors on a CUDA device"):
        module(torch.randn(2, 7, 32), torch.randn(2, 9, 32))
