"""Routing and norms written out in loops, for the tests of the routed layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from xlroute import CoordinateDescentRouter
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
        """Which rows of a stream x [m, d] routing token r chooses, and their gates.

        The water level is found by trying how many scores lie above it; see `soft_topk`.
        """
        valid = [i for i in range(len(x)) if mask is None or mask[i]]
        if not valid:
            return {}
        token = router.routing_token
        assert token is not None
        s = torch.stack(
            [x[i] / (x[i].square().mean() + RMS_EPS).sqrt() @ token[r] * x.shape[1] ** -0.5 for i in valid]
        )
        order = sorted(range(len(valid)), key=lambda i: -float(s[i].detach()))
        budget = min(k * router.fetch_k_ratio, len(valid))
        gates = torch.ones_like(s)
        for saturated in range(len(valid)):
            left = budget - saturated
            rest = s[order[saturated:]] / router.eps
            if left <= 0 or left == len(valid) - saturated:
                break
            level = math.log(left) - rest.logsumexp(0)
            if rest[0] + level < 0:
                gates = gates.index_put((torch.tensor(order[saturated:]),), (rest + level).exp())
                break
        if router.straight_through:
            gates = gates + (1 - gates).detach()
        return {valid[i]: gates[i] for i in order[:k]}


@pytest.fixture(scope="session")
def by_hand() -> type[ByHand]:
    return ByHand
