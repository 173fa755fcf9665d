"""KNNMemory of memorizing-transformers-pytorch, out of the folder that it was installed in.

pip install --no-deps --target peer-memory -r benchmarks/requirements-peers-memory.txt
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

NAME = "KNNMemory"


def knn_memory(peer: Path, dim: int, rows: int, file: Path) -> Any:
    """An empty one for one stream.

    Args:
        peer: Where the package was installed.
        dim: Width of a row.
        rows: How many it has room for; with one more, it forgets all.
        file: Where the rows go.
    """
    if str(peer) not in sys.path:
        sys.path.append(str(peer))
    package = importlib.import_module("memorizing_transformers_pytorch")
    return package.KNNMemory(dim, rows, 1, str(file), multiprocessing=False)
