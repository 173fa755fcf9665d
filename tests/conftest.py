"""Fresh random inputs in every run, which can be drawn again: XLROUTE_TEST_SEED=N pytest ..."""

from __future__ import annotations

import os
import random
import zlib

import pytest
import torch

SEED = int(os.environ.get("XLROUTE_TEST_SEED", random.SystemRandom().randrange(10**6)))


def pytest_report_header() -> str:
    return f"XLROUTE_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()))
