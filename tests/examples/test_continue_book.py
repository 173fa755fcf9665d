"""examples/continue_book.py at a tiny size: what is read and saved, that it goes on exactly, and its error lines."""

import importlib
import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xlroute import RoutedTransformerXL, TransformerXLState

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = "the of and to in he was that his it café with as had for on her she".split()
PHRASE = "a dagger of the mind"
CAPACITY = 70  # memory rows, fewer than the book has
EVERY = 3
OPTIONS = {
    "learned": {},
    "content": {"memory_routing": "content", "routing_chunk": 2, "num_content_tokens_kv": 3},
    "both": {"memory_routing": "both", "routing_chunk": 1, "num_content_tokens_kv": 3},
}

Load = Callable[[str], ModuleType]
Main = Callable[..., tuple[int, str, str]]
Books = Callable[[str], Path]


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Imports a module of the examples as the scripts do."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    for name in {path.stem for path in EXAMPLES.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def main(load: Load, capsys: pytest.CaptureFixture[str]) -> Main:
    """Runs the script in this process: the exit code, what it printed, and its errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = load("continue_book").main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def text() -> str:
    """A book: CRLF ends, not all ASCII, and a phrase that stands once."""
    lines = [" ".join(random.choices(WORDS, k=6)) for _ in range(30)]
    lines.insert(random.randrange(10, 20), PHRASE.replace("of ", "of\r\n"))
    return "\r\n".join(lines)


@pytest.fixture(scope="module")
def book(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_bytes(text.encode())
    return path


@pytest.fixture(scope="module")
def models(
    build_model: Callable[..., RoutedTransformerXL], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a model that routes in that way."""
    folder = tmp_path_factory.mktemp("models")

    def model(routing: str) -> Path:
        if not (folder / routing).exists():
            build_model(vocab_size=257, **OPTIONS[routing]).save_pretrained(folder / routing)
        return folder / routing

    return model


@pytest.fixture(scope="module")
def read(load: Load, book: Path, models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Books:
    """The folder of the book, read by a model that routes in that way."""
    folder = tmp_path_factory.mktemp("read")

    def of(routing: str) -> Path:
        out = folder / routing
        if not out.exists():
            code = load("continue_book").main(read_command(book, models(routing), out))
            assert code == 0
        return out

    return of


def read_command(book: Path, model: Path, out: Path) -> list[str]:
    sizes = ["--capacity", str(CAPACITY), "--every", str(EVERY)]
    return ["read", str(book), "--model", str(model), "--out", str(out), *sizes]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def straight(model: RoutedTransformerXL, text: str, stop: int) -> tuple[TransformerXLState, list[torch.Tensor]]:
    """Reads the segments that begin before token `stop`, in one go: the state, and the logits of each."""
    inputs = torch.tensor([256, *text.encode()])[None]
    memory = model.create_memory(streams=1, capacity=CAPACITY)
    state, logits = model.initial_state(streams=1, memory=memory), []
    with torch.no_grad():
        for start in range(0, stop, model.segment_len):
            found, state = model(inputs[:, start : start + model.segment_len], state)
            logits.append(found)
    return state, logits


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from continue_book_folder import BookFolder, load_model
torch.set_num_threads(1)
out, points = sys.argv[2], [int(point) for point in sys.argv[4:]]
folder = BookFolder(Path(out))
model = load_model(Path(folder.settings.model), folder.tokenizer, "cpu")
logits = []
for point in points:
    state, start = folder.state_before(model, point)
    with torch.no_grad():
        logits.append(model(folder.inputs[None, start : start + model.segment_len], state)[0])
torch.save(logits, sys.argv[3])
"""


@pytest.mark.parametrize("routing", OPTIONS)
def test_another_process_goes_on_with_the_same_logits(
    routing: str, read: Books, models: Callable[[str], Path], text: str, tmp_path: Path
) -> None:
    model = RoutedTransformerXL.from_pretrained(models(routing))
    points = [0, len(text.encode()), *random.sample(range(len(text.encode())), 4)]
    out = read(routing)
    before = contents(out)
    command = [sys.executable, "-c", CHILD, str(EXAMPLES), str(out), str(tmp_path / "logits.pt")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _, logits = straight(model, text, len(text.encode()) + 1)
    torch.set_num_threads(threads)
    subprocess.run([*command, *map(str, points)], check=True, timeout=120)
    for point, found in zip(points, torch.load(tmp_path / "logits.pt"), strict=True):
        assert torch.equal(found, logits[point // model.segment_len])
    assert contents(out) == before


def test_a_killed_reading_goes_on(
    read: Books, models: Callable[[str], Path], book: Path, text: str, main: Main, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = read_command(book, models("learned"), out)
    process = subprocess.Popen([sys.executable, str(EXAMPLES / "continue_book.py"), *command])
    deadline = time.monotonic() + 120
    while len(list(out.glob("states/*/state.safetensors"))) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    code, _, error = main("continue", "--out", out, "--at", len(text.encode()))
    assert (code, error.count("\n")) == (2, 1)
    assert "so far, not to" in error

    assert main(*command)[0] == 0
    saved = [path.name for path in sorted((out / "states").iterdir())]
    assert saved == [path.name for path in sorted((read("learned") / "states").iterdir())]
    point = random.randrange(len(text.encode()))
    results = [
        main("continue", "--out", folder, "--at", point, "--length", 12, "--score", 40, "--json")
        for folder in (out, read("learned"))
    ]
    assert results[0][0] == 0
    assert results[0] == results[1]

    before = contents(out)
    code, stdout, _ = main(*command)
    assert code == 0
    assert stdout.startswith("book is read: ")
    assert contents(out) == before


@pytest.mark.parametrize("routing", OPTIONS)
def test_what_is_found(
    routing: str, read: Books, models: Callable[[str], Path], text: str, main: Main, load: Load
) -> None:
    """The numbers and the texts are those of the model itself."""
    model, tokens = RoutedTransformerXL.from_pretrained(models(routing)), text.encode()
    # Beyond the capacity, and with a character that is not cut behind it.
    point = len(text[: random.randrange(200, len(text) - 60)].encode())
    seed = random.randrange(10**6)
    code, stdout, error = main(
        "continue", "--out", read(routing), "--at", point, "--length", 14, "--score", 33, "--seed", seed, "--json"
    )
    assert code == 0, error
    found = json.loads(stdout)
    assert (found["byte"], found["bytes"], found["scored_bytes"]) == (point, len(tokens), 33)
    assert found["book"].encode()[:12] == tokens[point : point + 12]

    start = point - point % model.segment_len
    state, _ = straight(model, text, start)
    assert state.memory is not None
    assert found["memory_rows"] == int(state.memory.lengths[0]) == CAPACITY
    inputs = torch.tensor([256, *tokens])[None]
    for emptied, key in ((False, "bits_per_byte"), (True, "bits_per_byte_emptied")):
        reader, nats = state.fork(), 0.0
        for first in range(start, point + 33, model.segment_len):
            if emptied:
                reader.clear_memory()
            with torch.no_grad():
                logits, reader = model(inputs[:, first : first + model.segment_len], reader)
            for i, token in enumerate(inputs[0, first + 1 : first + 1 + model.segment_len]):
                if point <= first + i < point + 33:
                    nats -= float(F.log_softmax(logits[0, i], dim=-1)[token])
        assert found[key] == pytest.approx(nats / math.log(2) / 33, rel=1e-9)
    assert found["bits_per_byte"] != found["bits_per_byte_emptied"]

    generator = torch.Generator().manual_seed(seed)
    new, _ = model.generate(
        inputs[:, start : point + 1], 14, state, temperature=0.8, top_p=0.95, generator=generator
    )
    decode = load("pg19_data").ByteTokenizer().decode
    assert found["with_memory"] == decode(new[0].tolist())

    for reading in (found["read_to_write"], found["read_to_foresee"]):
        shares = [reading["nothing"], reading["book"], reading["itself"]]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= -1e-6
        assert 0 < sum(passage["share"] for passage in reading["passages"]) <= 1 + 1e-6
        for passage in reading["passages"]:
            assert passage["byte"] + passage["bytes_back"] == point
            assert point - CAPACITY - model.segment_len - model.mem_len <= passage["byte"] < point
            before, _, after = passage["text"].partition("|")
            around = tokens[: passage["byte"]].decode(errors="ignore"), tokens[passage["byte"] :].decode(errors="ignore")
            assert " ".join(around[0].split()).endswith(before.split()[-1])
            assert " ".join(around[1].split()).startswith(after.split()[0])
