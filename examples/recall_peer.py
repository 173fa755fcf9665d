"""MemorizingTransformer of memorizing-transformers-pytorch in examples/recall.py, out of a folder of its own.

pip install --no-deps --target peer-memory -r benchmarks/requirements-peers-memory.txt
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

MOST_ROWS = 1 << 14  # of a stream; with one more, it forgets all


class MemorizingPeer(nn.Module):
    """A MemorizingTransformer (arXiv 2203.08913) with XL memory, which starts as its package makes it.

    Args:
        folder: where the package was installed; it needs faiss besides.
        **sizes: arguments of its constructor.
    """

    def __init__(self, folder: str, **sizes: Any) -> None:
        super().__init__()
        if folder not in sys.path:
            sys.path.append(folder)
        package = importlib.import_module("memorizing_transformers_pytorch")
        files = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, files, ignore_errors=True)
        self.transformer = package.MemorizingTransformer(
            **sizes, max_knn_memories=MOST_ROWS, knn_memories_directory=files
        )

    def reader(self, streams: int) -> Callable[[Tensor], Tensor]:
        """What reads so many new documents, a segment of tokens [b, n] after the other: logits [b, n, v].

        It ends what was read before, whose memory has the same files.
        """
        memories = self.transformer.create_knn_memories(batch_size=streams)
        window: Any = None

        def read(tokens: Tensor) -> Tensor:
            nonlocal window
            logits: Tensor
            logits, window = self.transformer(tokens, knn_memories=memories, xl_memories=window)
            return logits

        return read
