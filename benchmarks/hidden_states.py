"""Hidden states that a trained model keeps as it reads books, for benchmarks/index.py --rows.

    python benchmarks/hidden_states.py run/learned/model BOOKS FILE.npy

Every .txt file in the folder BOOKS is a document, and every byte of it a token. The file gets as many rows of
every book, in float32, as the model's router scores them: divided by their root mean square.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import rms_norm

from xlroute import RoutedTransformerXL
from xlroute.memory import MemoryStore


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a model that was saved")
    parser.add_argument("books", type=Path, help="folder of .txt files")
    parser.add_argument("target", type=Path, metavar="FILE.npy", help="where the rows go")
    parser.add_argument(
        "--rows", type=int, default=1_001_000, help="of all books together; default: 1,001,000"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    books = [path.read_bytes() for path in sorted(options.books.glob("*.txt"))]
    model = RoutedTransformerXL.from_pretrained(options.model, device=options.device)
    count = -(-options.rows // max(1, len(books)))
    try:
        rows = torch.cat(read(model, books, count, options.device))[: options.rows]
    except ValueError as error:
        parser.error(str(error))
    np.save(options.target, rows.numpy())
    print(f"{rows.shape[0]:,} x {rows.shape[1]} hidden states of {len(books)} books in {options.target}")
    return 0


@torch.no_grad()
def read(model: RoutedTransformerXL, books: list[bytes], count: int, device: str) -> list[torch.Tensor]:
    """The first `count` rows [count, d] of each book that come to the memory of the first memory layer.

    Raises:
        ValueError: A book is too short, or there is none.
    """
    shortest = min(map(len, books), default=0)
    tokens = torch.from_numpy(np.array([np.frombuffer(book, np.uint8, shortest) for book in books])).long()
    layers, streams = len(model.memory_layers), max(1, len(books))
    store = MemoryStore.create(layers=layers, streams=streams, dim=model.dim, device=device)
    state = model.initial_state(streams=streams, memory=store)
    for part in torch.split(tokens, model.segment_len, dim=1):
        _, state = model(part.to(device), state)
        # A state of what was read last is still in the window.
        if int(store.lengths[0]) >= count:
            rows, _ = store.rows(0)
            return [rms_norm(each[:count], each.shape[-1:]).cpu() for each in rows]
    raise ValueError(f"books: expected more than {count:,} bytes in each, got {sorted(map(len, books))}")


if __name__ == "__main__":
    sys.exit(main())
