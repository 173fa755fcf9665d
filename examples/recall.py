"""Recall facts from long ago: ways to remember beside each other, where memory is the only way.

    python examples/recall.py

trains small models on documents of up to 512 tokens, the same steps on the same documents, and asks them for
facts that lie up to 8,192 tokens back. It prints tables and writes to run-recall/: trainings.csv, scores.csv
and recall.png, after each mode.

Expected: a memory in which each token routes for itself answers 99% of the pairs at 16 times the training
length, also where facts were told again with other values; attention to all rows of the memory 91% and 96%.
Without a memory, with XL memory, with random rows and with learned routing tokens it is chance. It takes
under four minutes of CPU time; --jobs 2 shares it out over two cores.

    python examples/recall.py --device cuda --preset long --out run-recall-long    up to a million tokens
    python examples/recall.py --device cuda --preset longest --modes content1 --out run-recall-longest    ten
    python examples/recall.py --peer FOLDER    with MemorizingTransformer, see recall_peer.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from recall_report import Score, Training, draw, tables, write_csv
from recall_tasks import VALUES, Documents, test_documents
from recall_train import MODES, PEER, Settings, ask, train
from torch import Tensor


@dataclass(frozen=True)
class Test:
    """Documents to be asked for facts."""

    lengths: tuple[int, ...]
    pairs: int
    questions: int  # in a document
    streams: int  # documents of pairs, and of overwritten ones
    passkeys: int  # documents of one fact
    longest: dict[str, int]  # documents that a mode reads, if not all


LONG = Settings(streams=16, training_len=4096, segment_len=256, mem_len=64, dim=128, rows=16, value_len=4)
# What attends to all that it has read takes the square of the time; the peer searches on a CPU.
SLOW = {"everything": 16_384, "full": 16_384, "memorizing": 16_384}
PRESETS = {
    "small": (
        Settings(),
        Test((1024, 8192), pairs=20, questions=20, streams=4, passkeys=8, longest={}),
    ),
    "long": (
        LONG,
        Test((16_384, 131_072, 1_048_576), pairs=256, questions=64, streams=2, passkeys=4, longest=SLOW),
    ),
    "longest": (
        LONG,
        Test((10_485_760,), pairs=256, questions=64, streams=1, passkeys=2, longest=SLOW),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="sizes (default: small)")
    add("--out", type=Path, default=Path("run-recall"), help="folder of what is written")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--modes", help=f"some of {','.join(MODES)}; default: all that can run")
    add("--peer", type=Path, help="where memorizing-transformers-pytorch was installed")
    add("--seed", type=int, default=0, help="of weights and documents (default: 0)")
    add("--steps", type=int, help="batches of documents, of each mode")
    add("--minutes", type=float, default=math.inf, help="the longest that a mode trains")
    add("--memory-grad-segments", type=int, default=0, help="segments whose rows carry gradient (default: 0)")
    add("--jobs", type=int, default=1, help="modes at work at the same time (default: 1)")
    options = parser.parse_args(arguments)
    if options.peer is not None and not options.peer.is_dir():
        parser.error(f"--peer: expected a folder, got {options.peer}")
    can_run = [mode for mode in MODES if mode != PEER or options.peer is not None]
    modes = can_run if options.modes is None else options.modes.split(",")
    unknown = set(modes) - set(MODES)
    if unknown:
        parser.error(f"--modes: expected some of {','.join(MODES)}, got {','.join(sorted(unknown))}")
    if not set(modes) <= set(can_run):
        parser.error(f"--modes: {PEER} needs --peer, where its package is")
    settings, test = PRESETS[options.preset]
    settings = replace(
        settings,
        device=options.device,
        seed=options.seed,
        minutes=options.minutes,
        memory_grad_segments=options.memory_grad_segments,
        peer=None if options.peer is None else str(options.peer),
    )
    if options.steps is not None:
        settings = replace(settings, steps=options.steps)

    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trainings: dict[str, Training] = {}
    scores: dict[str, list[Score]] = {}
    for mode, training, of_mode in results(modes, settings, test, options.jobs):
        trainings[mode], scores[mode] = training, of_mode
        print(f"{training.label}: trained in {training.seconds:.0f} s", flush=True)
        done = [each for each in modes if each in trainings]
        write(
            options.out,
            [trainings[each] for each in done],
            [score for each in done for score in scores[each]],
            settings,
        )
    print(f"\n{tables([trainings[mode] for mode in modes], [s for mode in modes for s in scores[mode]])}\n")
    print(f"wrote {options.out}/: trainings.csv, scores.csv, recall.png")
    return 0


def results(
    modes: list[str], settings: Settings, test: Test, jobs: int
) -> Iterator[tuple[str, Training, list[Score]]]:
    """What `run_mode` gives for each mode, as they finish."""
    if jobs == 1:
        for mode in modes:
            yield mode, *run_mode(mode, settings, test)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run_mode, mode, settings, test): mode for mode in modes}
        for finished in as_completed(running):
            yield running[finished], *finished.result()


def run_mode(mode: str, settings: Settings, test: Test) -> tuple[Training, list[Score]]:
    """Train one mode and ask it."""
    torch.set_num_threads(1)  # small products are not worth sharing out
    trained = train(mode, settings)
    training = Training(
        mode=mode,
        label=MODES[mode].label,
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        steps=trained.steps,
        updates=trained.updates,
        tokens=trained.tokens,
        seconds=trained.seconds,
        training_accuracy=trained.accuracy,
    )
    scores: list[Score] = []
    for length in test.lengths:
        if length <= test.longest.get(mode, length):
            documents = documents_of(length, settings, test)
            rights = ask(trained.model, mode, list(documents.values()), settings)
            for task, right in zip(documents, rights, strict=True):
                scores += count(mode, task, documents[task], right)
    return training, scores


def documents_of(length: int, settings: Settings, test: Test) -> dict[str, Documents]:
    """The documents of each task, the same for all modes."""
    shapes = {
        "passkey": (test.passkeys, 1, 1, False),
        "pairs": (test.streams, test.pairs, test.questions, False),
        "overwritten": (test.streams, test.pairs, test.questions, True),
    }
    return {
        task: test_documents(
            length,
            streams=streams,
            pairs=pairs,
            questions=questions,
            nearest=settings.nearest,
            overwritten=overwritten,
            value_len=settings.value_len,
            gap=settings.gap,
            seed=settings.seed - 1 - number,  # none of the training
        )
        for number, (task, (streams, pairs, questions, overwritten)) in enumerate(shapes.items())
    }


def count(mode: str, task: str, documents: Documents, right: Tensor) -> list[Score]:
    """The scores of a task, for each doubling of the distance, with and without a gap."""
    asked = documents.questions
    doublings = asked.distances.to(torch.float64).log2().floor().to(torch.int64)
    found = []
    for doubling in sorted(set(doublings.flatten().tolist())):
        for announced in (False, True):
            chosen = (doublings == doubling) & (asked.announced == announced)
            if chosen.any():
                found.append(
                    Score(
                        mode=mode,
                        label=MODES[mode].label,
                        task=task,
                        length=documents.length,
                        announced=announced,
                        nearest=2**doubling,
                        farthest=2 ** (doubling + 1),
                        questions=int(chosen.sum()),
                        right=int(right[chosen].sum()),
                    )
                )
    return found


def write(folder: Path, trainings: list[Training], scores: list[Score], settings: Settings) -> None:
    """Write everything that is known so far."""
    write_csv(folder / "trainings.csv", Training, trainings)
    write_csv(folder / "scores.csv", Score, scores)
    draw(folder / "recall.png", scores, chance=len(VALUES) ** -settings.value_len)


if __name__ == "__main__":
    sys.exit(main())
