"""What tests of the memory share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from xlroute.kernels import row_scores
from xlroute.memory import scores


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call has scored."""
    counts: list[int] = []

    def counting(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
        counts.append(rows.shape[:-1].numel())
        return row_scores(rows, *arguments, **options)

    monkeypatch.setattr(scores, "row_scores", counting)
    return counts
