"""A process that reads on from a saved state and saves it again and again, until it is killed.

    python -P tests/reading_child.py MODEL STATE TOKENS

(-P keeps the folder tests/xlroute from hiding the package.) It imports everything once; then, for each line
on standard input, it forks a child that loads the state for writing, reads TOKENS (a .pt file, int64 [b, n])
on from where the state stands, five at a time, and saves the state after every second segment. The child
prints its process id, then the position of each state that it saved.
"""

from __future__ import annotations

import os
import sys

import torch

from xlroute import RoutedTransformerXL


def read_until_killed(model: RoutedTransformerXL, folder: str, tokens: torch.Tensor) -> None:
    state = model.load_state(folder, "r+")
    position = int(state.positions[0])
    with torch.no_grad():
        for number, piece in enumerate(tokens[:, position:].split(5, dim=1), start=1):
            _, state = model(piece, state)
            if number % 2 == 0:
                state.save(folder)
                # In one write, which a pipe takes whole or not at all: the process dies at any moment.
                os.write(sys.stdout.fileno(), f"saved {int(state.positions[0])}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    model_folder, state_folder, tokens_file = sys.argv[1:]
    model = RoutedTransformerXL.from_pretrained(model_folder)
    tokens = torch.load(tokens_file)
    # The first calls import what the compiler needs, which would take each child a second.
    state = model.initial_state(streams=len(tokens), memory=model.create_memory(streams=len(tokens)))
    with torch.no_grad():
        for piece in tokens[:, :20].split(5, dim=1):
            _, state = model(piece, state)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            print("pid", os.getpid(), flush=True)
            read_until_killed(model, state_folder, tokens)
            os._exit(0)
        os.waitpid(child, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    main()
