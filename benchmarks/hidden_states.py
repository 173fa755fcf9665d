"""Hidden states that a trained model keeps as it reads books, for benchmarks/index.py --rows.

    python benchmarks/hidden_states.py run/routed/model BOOKS FILE.npy

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
    count = -(-options.rows // max(1, len(books)))
    if not books or min(map(len, books)) < count:
        parser.error(
            f"books: expected files of at least {count:,} bytes, got {[len(book) for book in books]}"
        )
    model = RoutedTransformerXL.from_pretrained(options.model, device=options.device)
    tokens = torch.from_numpy(np.stack([np.frombuffer(book, np.uint8, count) for book in books])).long()
    rows = read(model, tokens.to(options.device))[: options.rows]
    np.save(options.target, rows.numpy())
    print(f"{rows.shape[0]:,} x {rows.shape[1]} hidden states of {len(books)} books in {options.target}")
    return 0


@torch.no_grad()
def read(model: RoutedTransformerXL, tokens: torch.Tensor) -> torch.Tensor:
    """The rows [m, d] that the first memory layer holds after tokens [b, n]."""
    layers, streams = len(model.memory_layers), tokens.shape[0]
    store = MemoryStore.create(layers=layers, streams=streams, dim=model.dim, device=tokens.device)
    state = model.initial_state(streams=streams, memory=store)
    for part in torch.split(tokens, model.segment_len, dim=1):
        _, state = model(part, state)
    rows, _ = store.rows(0)
    return rms_norm(rows.flatten(0, 1), rows.shape[-1:]).cpu()


if __name__ == "__main__":
    sys.exit(main())
