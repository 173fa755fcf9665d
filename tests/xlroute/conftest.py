"""What tests of the routed layers share: routing and norms written out in loops, a forgetful compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from xlroute import ConditionalRoutedCrossAttention, CoordinateDescentRouter
from xlroute.kernels.scoring import RMS_EPS


class ByHand:
    """The parts that the routed layers share, row by row, in plain differentiable PyTorch."""

    @staticmethod
    def rms_norm(norm: nn.RMSNorm, row: Tensor) -> Tensor:
        eps = torch.finfo(row.dtype).eps
        return row / (row.square().mean() + eps).sqrt() * norm.weight

    @staticmethod
    def route(
        router: CoordinateDescentRouter, x: Tensor, k: int, mask: Tensor | None = None, r: int = 0
    ) -> dict[int, Tensor]:
        """Which rows of a stream x [m, d] routing token r chooses, and their gates."""
        valid = [i for i in range(len(x)) if mask is None or mask[i]]
        if not valid:
            return {}
        s = ByHand.scores(router, x, r)[valid]
        gates = ByHand.gates(s, s, min(k * router.fetch_k_ratio, len(valid)), router)
        order = sorted(range(len(valid)), key=lambda i: -float(s[i].detach()))
        return {valid[i]: gates[i] for i in order[:k]}

    @staticmethod
    def scores(router: CoordinateDescentRouter, x: Tensor, r: int = 0) -> Tensor:
        """Scores [m] of rows x [m, d] by routing token r."""
        token = router.routing_token
        assert token is not None
        rows = [row / (row.square().mean() + RMS_EPS).sqrt() for row in x]
        return torch.stack([row @ token[r] * x.shape[1] ** -0.5 for row in rows])

    @staticmethod
    def gates(s: Tensor, among: Tensor, budget: float, router: CoordinateDescentRouter) -> Tensor:
        """Gates of scores s by the level at which those of the scores `among` sum to the budget.

        It is found by trying how many of them lie above it; see `soft_topk`.
        """
        gates = torch.ones_like(s)
        ordered = among.sort(descending=True).values / router.eps
        for saturated in range(len(among)):
            left = budget - saturated
            if left <= 0 or left == len(among) - saturated:
                break
            level = math.log(left) - ordered[saturated:].logsumexp(0)
            if ordered[saturated] + level < 0:
                gates = (s / router.eps + level).clamp(max=0).exp()
                break
        return gates + (1 - gates).detach() if router.straight_through else gates

    @staticmethod
    def picked(
        router: CoordinateDescentRouter, s: Tensor, own: list[int], before: list[int], k: int, w: int
    ) -> dict[int, Tensor]:
        """Which tokens `own` of a window of w are routed by the level of those `before`, and their gates."""
        if k >= w:
            return {i: s.new_ones(()) for i in own}
        if not before:
            return {}
        wanted = -(-k * len(before) // w)
        threshold = s[before].sort(descending=True).values[wanted - 1]
        budget = min(k * router.fetch_k_ratio * len(before) / w, len(before))
        gates = ByHand.gates(s, s[before], budget, router)
        return {i: gates[i] for i in [i for i in own if s[i] >= threshold][:k]}

    @staticmethod
    def query(
        layer: ConditionalRoutedCrossAttention, x: Tensor, i: int, gate: Tensor, sets: list[dict[int, Tensor]]
    ) -> Tensor:
        """Token i of a stream x [n, d], a query of that gate, to sets of routed tokens, head by head."""
        assert layer.to_k is not None
        assert layer.null_key is not None
        h, r = layer.heads, layer.sets
        q = (layer.to_q.weight @ ByHand.rms_norm(layer.norm, x[i])).unflatten(0, (h, -1))
        if layer.multiply_queries_by_score:
            q = q * gate
        results = []
        for head in range(h):
            keys, values = [layer.null_key[head, 0]], [layer.null_value[head, 0]]
            for j, row_gate in sets[head // (h // r)].items():
                row = ByHand.rms_norm(layer.context_norm, x[j])
                key = (layer.to_k.weight @ row).unflatten(0, (h, -1))[head]
                key = key * row_gate if layer.multiply_keys_by_score else key
                keys.append(ByHand.turned(key, j) if layer.rotary_emb else key)
                values.append((layer.to_v.weight @ row).unflatten(0, (h, -1))[head] * row_gate)
            query = ByHand.turned(q[head], i) if layer.rotary_emb else q[head]
            weights = (torch.stack(keys) @ query / len(query) ** 0.5).softmax(0)
            results.append(weights @ torch.stack(values))
        return gate * (layer.to_out.weight @ torch.cat(results))

    @staticmethod
    def turned(row: Tensor, position: int) -> Tensor:
        """Pairs of channels as complex numbers, turned by the angle of the position."""
        first, second = row.chunk(2)
        count = len(first)
        angles = position * 10_000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
        pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag))

    @staticmethod
    def heavy(
        layer: ConditionalRoutedCrossAttention, x: Tensor, mask: Tensor | None, sizes: tuple[int, int]
    ) -> Tensor:
        """A stream x [n, d] to itself, query by query; sizes are those of both routings."""
        assert layer.q_router is not None
        queries = ByHand.route(layer.q_router, x, sizes[0], mask)
        sets = [ByHand.route(layer.kv_router, x, sizes[1], mask, i) for i in range(layer.sets)]
        null = torch.zeros_like(x[0]) if layer.null_q_token is None else layer.null_q_token
        rows = [ByHand.query(layer, x, i, queries[i], sets) if i in queries else null for i in range(len(x))]
        return torch.stack(rows)


@pytest.fixture(scope="session")
def by_hand() -> type[ByHand]:
    return ByHand


@pytest.fixture
def forgetful_compiler() -> Iterator[None]:
    """Shapes that vary from one test to the next are no reason to compile for any shape."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
