"""README's Python blocks run as they stand, one after the other, in an empty folder.

Those of full size do so on a GPU. On a CPU they run with smaller numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md block {number}", "exec"), names)


# How the sizes of the examples shrink: what is long first, so that no number is taken for a part of another.
SMALLER = {"1_048_576": "2048", "131072": "512", "32768": "256", "8192": "384", "1024": "64", "512": "48"}


@pytest.mark.filterwarnings("ignore:Triton was asked for:UserWarning")
@pytest.mark.parametrize("number", range(4))
def test_examples_of_full_size(number: int) -> None:
    blocks = re.findall(
        r"^```python full size\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 4
    block = blocks[number]
    if not torch.cuda.is_available():
        block = block.replace(".cuda()", "").replace("32, 256, 256", "32, 24, 40")
        for size, smaller in SMALLER.items():
            block = re.sub(rf"\b{size}\b", smaller, block)
    exec(compile(block, f"README.md full size {number}", "exec"), {})
