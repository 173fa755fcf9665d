from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlroute.local_attention import LocalAttention, LocalCache

W = 4
LENGTHS = (1, 3, 4, 7, 8, 13)


def build(causal: bool, **options: int) -> LocalAttention:
    module = LocalAttention(
        **{"dim": 16, "window_size": W, "dim_head": 8, "heads": 2, **options}, causal=causal
    ).double()
    torch.nn.init.uniform_(module.norm.weight, 0.5, 2.0)
    torch.nn.init.normal_(module.norm.bias)
    return module


def seen(i: int, n: int, causal: bool) -> list[int]:
    """The places that token i looks at."""
    if causal:
        return [j for j in range(n) if j <= i and j // W >= i // W - 1]
    return [j for j in range(n) if abs(i - j) <= W]


def by_hand(module: LocalAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Token by token and head by head."""
    b, n, _ = x.shape
    e = module.to_out.in_features // module.heads
    qkv = module.to_qkv(module.norm(x)).unflatten(-1, (3, module.heads, e))
    rows = []
    for s in range(b):
        for i in range(n):
            places = [j for j in seen(i, n, module.causal) if mask is None or mask[s, j] or j == i]
            heads = []
            for h in range(module.heads):
                q, k, v = qkv[s, i, 0, h], qkv[s, places, 1, h], qkv[s, places, 2, h]
                heads.append((k @ q / e**0.5).softmax(0) @ v)
            rows.append(torch.cat(heads))
    return module.to_out(torch.stack(rows)).view(x.shape)  # type: ignore[no-any-return]


def gradients(out: Tensor, cotangent: Tensor, module: LocalAttention, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, (x, *module.parameters()), cotangent)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_it_is_attention_to_the_tokens_nearby(n: int, causal: bool, masked: bool) -> None:
    module = build(causal)
    x = torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, n) < 0.5 if masked else None
    out, expected = module(x, mask), by_hand(module, x, mask)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, wanted in zip(
        gradients(out, cotangent, module, x), gradients(expected, cotangent, module, x), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_it_equals_the_local_attention_package_with_the_same_weights(n: int, causal: bool) -> None:
    package = pytest.importorskip("local_attention")
    module = build(causal)
    options = {"exact_windowsize": False} if causal else {"look_backward": 1, "look_forward": 1}
    peer = package.LocalMHA(
        dim=16,
        window_size=W,
        dim_head=8,
        heads=2,
        causal=causal,
        prenorm=True,
        use_rotary_pos_emb=False,
        **options,
    ).double()
    peer.load_state_dict(module.state_dict())
    x = torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True)
    # Given a mask, it knows which tokens it has added to fill the last window.
    out, expected = module(x), peer(x, mask=torch.ones(2, n, dtype=torch.bool))
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    names = dict(peer.named_parameters())
    theirs = torch.autograd.grad(
        expected, (x, *(names[name] for name, _ in module.named_parameters())), cotangent
    )
    for got, wanted in zip(gradients(out, cotangent, module, x), theirs, strict=True):
        torch.testing.assert_close(got, wanted)
    if not causal:
        # Without one, the last tokens also look at that filling, unless nothing had to be filled.
        assert torch.allclose(peer(x), out) == (n % W == 0)


def test_causal_tokens_do_not_see_the_future() -> None:
    module, n = build(True), 11
    x = torch.randn(2, n, 16).double()
    out = module(x)
    for t in range(n):
        other = torch.cat((x[:, :t], 100 * torch.randn(2, n - t, 16).double()), dim=1)
        moved = module(other)
        torch.testing.assert_close(moved[:, :t], out[:, :t])
        assert (moved[:, t] - out[:, t]).abs().min() > 1e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pieces", [[1] * 14, [14], [3, 1, 6, 0, 4], [5, 9], [8, 6]], ids=str)
def test_steps_equal_the_whole(pieces: list[int], masked: bool) -> None:
    module = build(True)
    x = torch.randn(3, 14, 16).double()
    mask = torch.rand(3, 14) < 0.6 if masked else None
    cache: LocalCache | None = None
    outs, start = [], 0
    for n in pieces:
        part = slice(start, start + n)
        out, cache = module.step(x[:, part], cache, None if mask is None else mask[:, part])
        assert cache.keys_values.shape[1] < 2 * W
        outs.append(out)
        start += n
    torch.testing.assert_close(torch.cat(outs, dim=1), module(x, mask))


@pytest.mark.parametrize("causal", [False, True])
def test_streams_are_independent_and_masked_streams_finite(causal: bool) -> None:
    module = build(causal)
    x, mask = torch.randn(4, 9, 16).double(), torch.rand(4, 9) < 0.5
    mask[1] = False
    x.requires_grad_()
    out = module(x, mask)
    (gradient,) = torch.autograd.grad(out[1].sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[[0, 2, 3]].any()
    for i in range(4):
        torch.testing.assert_close(module(x[i : i + 1], mask[i : i + 1])[0], out[i])


@pytest.mark.parametrize("causal", [False, True])
def test_no_tokens_no_streams_and_windows_of_one(causal: bool) -> None:
    assert build(causal)(torch.randn(2, 0, 16).double()).shape == (2, 0, 16)
    assert build(causal)(torch.randn(0, 5, 16).double()).shape == (0, 5, 16)
    assert build(causal, window_size=1)(torch.randn(2, 5, 16).double()).shape == (2, 5, 16)


def test_half_precision_autocast_and_compilation() -> None:
    x = torch.randn(2, 9, 16)
    mask = torch.rand(2, 9) < 0.5
    for causal in (False, True):
        module = build(causal).float()
        expected = module(x, mask)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, mask), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(module(x, mask).float(), expected, rtol=0.05, atol=0.1)
        for dtype in (torch.bfloat16, torch.float16):
            half = module.to(dtype)(x.to(dtype), mask)
            assert half.dtype == dtype
            torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        build(True, window_size=0)
    module = build(False)
    x = torch.randn(2, 5, 16).double()
    with pytest.raises(ValueError, match=r"x: expected \[b, n, 16\], got \(2, 5, 15\)"):
        module(x[..., 1:])
    with pytest.raises(ValueError, match=r"mask: expected bool \(2, 5\), got torch.float32 \(2, 5\)"):
        module(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match="causal: expected True in a module that reads step by step"):
        module.step(x)
    causal = build(True)
    _, cache = causal.step(x)
    with pytest.raises(ValueError, match="x: expected the 2 streams of the cache, got 1"):
        causal.step(x[:1], cache)
