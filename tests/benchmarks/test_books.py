"""benchmarks/books.py at a tiny size: a grid that is stopped goes on, and what its report says."""

import csv
import io
import json
import random
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]
STEPS = 4
SIZES = (
    f"--split both --steps {STEPS} --streams 2 --segment-len 16 --mem-len 16 --dim 16 --depth 2 --heads 2 "
    "--dim-head 8 --memory-layers 2 --num-tokens-kv 4 --num-content-tokens-kv 2 --routing-chunk 4 "
    "--capacity 48"
).split()
RUNS = ("10m:bytes:xl,content:0,1", "10m:bytes:content:0:routing-chunk=2", "10m:bpe280:xl:0")
NAMES = (
    "bytes-xl-0",
    "bytes-xl-1",
    "bytes-content-0",
    "bytes-content-1",
    "bytes-content-0-routing-chunk=2",
    "bpe280-xl-0",
)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in PG-19's layout, of books of 60 words."""
    folder = tmp_path_factory.mktemp("books")
    lines = []
    for number, part in enumerate(("train", "train", "validation", "test")):
        (folder / part).mkdir(exist_ok=True)
        text = " ".join(random.choices(["the", "white", "whale", "Ahab", "and", "sea"], k=60))
        (folder / part / f"{number}.txt").write_text(text, encoding="utf-8")
        lines.append(f"{number},Book {number},1900,somewhere\n")
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def grid(load: Load) -> Iterator[ModuleType]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield load("books")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_grid_is_stopped_goes_on_and_is_reported(
    load: Load,
    grid: ModuleType,
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tokenizers")
    train = load("pg19_train")
    step, steps = train.train_step, []

    def train_step(training: Any, settings: Any, segments: Any) -> Any:
        steps.append((settings.modes, settings.seed, training.step))
        if len(steps) == 6:
            signal.raise_signal(signal.SIGALRM)
        return step(training, settings, segments)

    monkeypatch.setattr(train, "train_step", train_step)
    out = tmp_path / "grid"
    command = ["--out", str(out), "--data", str(books), *SIZES, "--runs", *RUNS]
    assert grid.main(command) == 128 + signal.SIGALRM
    assert "the same command goes on" in capsys.readouterr().err
    assert grid.main([*command, "--keep-bf16"]) == 0
    assert steps == [
        ((mode,), seed, number)
        for mode, seed in (("xl", 0), ("xl", 1), ("content", 0), ("content", 1), ("content", 0), ("xl", 0))
        for number in range(STEPS)
    ]
    assert {path.name for path in out.iterdir()} == {f"10m-{name}" for name in NAMES} | {"bpe280.json"}
    assert not list(out.rglob("checkpoints"))
    assert len(list(out.rglob("model-bf16"))) == len(NAMES)
    capsys.readouterr()
    # Finished runs are not made again, and only with the settings that they were made with.
    assert grid.main(command) == 0
    assert len(steps) == len(NAMES) * STEPS
    assert grid.main([*command, "--steps", "5"]) == 2
    assert "holds a run with other settings: steps 4, not 5" in capsys.readouterr().err

    assert grid.main(["--out", str(out), "--report", "--weights", "10m:bytes:content:1"]) == 0
    printed = capsys.readouterr().out
    folder = out / "report"
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert report in printed
    assert {path.name for path in folder.iterdir()} == {
        "report.md",
        "results.csv",
        "books.png",
        "runs.tar.gz",
        "weights.tar.0",
    }
    assert (folder / "books.png").read_bytes().startswith(b"\x89PNG")
    check_tables(report, out)
    check_csv(folder / "results.csv", out)
    with tarfile.open(folder / "runs.tar.gz") as archive:
        names = archive.getnames()
    assert {f"10m-{name}/metrics.jsonl" for name in NAMES} <= set(names)
    assert [name for name in names if name.endswith("routing.png")] == [
        f"10m-bytes-content-{seed}/content/routing.png" for seed in ("0", "1", "0-routing-chunk=2")
    ]
    with tarfile.open(fileobj=io.BytesIO((folder / "weights.tar.0").read_bytes())) as archive:
        archive.extractall(tmp_path, filter="data")
    from xlroute import RoutedTransformerXL

    model = RoutedTransformerXL.from_pretrained(tmp_path / "10m-bytes-content-1")
    kept = RoutedTransformerXL.from_pretrained(out / "10m-bytes-content-1" / "content" / "model-bf16")
    assert model.fingerprint() == kept.fingerprint()

    # Runs with other settings are not compared.
    path = out / "10m-bytes-xl-1" / "settings.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"steps": 4', '"steps": 5'), encoding="utf-8")
    assert grid.main(["--out", str(out), "--report"]) == 2
    assert "10m-bytes-xl-0 and 10m-bytes-xl-1 cannot be compared: steps 4 and 5" in capsys.readouterr().err
    assert (folder / "report.md").read_text(encoding="utf-8") == report


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(next(out.glob(f"10m-{name}/*/rows.json")).read_text())
    return rows


def check_tables(report: str, out: Path) -> None:
    xl = [rows_of(out, f"bytes-xl-{seed}")[0] for seed in (0, 1)]
    content = [rows_of(out, f"bytes-content-{seed}")[0] for seed in (0, 1)]
    line = next(line for line in report.splitlines() if line.startswith("| XL + content memory | 0, 1 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    for start, of_row in (
        (2, lambda row: row["bits_per_byte"]),
        (4, lambda row: row["kinds"]["beyond"]["bits_per_byte"]),
    ):
        bits = [of_row(row) for row in content]
        shares = [a / of_row(b) - 1 for a, b in zip(bits, xl, strict=True)]
        assert cells[start] == f"{mean(bits):.4f} ± {abs(bits[0] - bits[1]) / 2:.4f}"
        assert cells[start + 1] == f"{mean(shares):+.2%} ± {abs(shares[0] - shares[1]) / 2:.2%}"
    assert report.count("XL + content memory, emptied") == 3
    # Of the validation book alone.
    line = [line for line in report.splitlines() if line.startswith("| XL + content memory | 0, 1 |")][1]
    books = [[row["books"][0] for row in rows] for rows in (content, xl)]
    nats = [[sum(kind["nats"] for kind in book["kinds"].values()) for book in of_mode] for of_mode in books]
    assert {book["split"] for of_mode in books for book in of_mode} == {"validation"}
    shares = [a / b - 1 for a, b in zip(*nats, strict=True)]
    assert line.split(" | ")[3] == f"{mean(shares):+.2%} ± {abs(shares[0] - shares[1]) / 2:.2%}"
    assert report.count("## 10m, ") == 2
    assert report.count("| XL + content memory, routing-chunk=2 | 0 |") == 3


def check_csv(path: Path, out: Path) -> None:
    lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 9
    for line in lines:
        parts = (line[name] for name in ("tokenizer", "mode", "seed", "option") if line[name])
        row = rows_of(out, "-".join(parts))[line["emptied"] == "True"]
        assert float(line["bits_per_byte"]) == row["bits_per_byte"]
        assert int(line["beyond_bytes"]) == row["kinds"]["beyond"]["bytes"]


def finished(report: ModuleType, run: Any) -> Any:
    """A run of random results, read with its memory, if it has one, and with that emptied."""
    rows = [
        {
            "mode": run.mode,
            "emptied": emptied,
            "bits_per_byte": random.uniform(1, 2),
            "bin_width": 1000,
            "bin_bits": [random.uniform(1, 2) for _ in range(24)],
        }
        for emptied in (False, True)[: 1 if run.mode in ("none", "xl") else 2]
    ]
    return report.Finished(run, Path(run.name), {}, rows)


def drawn(report: ModuleType, groups: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure of a report, not closed yet."""
    figures: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(report.plt, "close", figures.append)
        report._draw(path, groups)
    (figure,) = figures
    return figure


def test_differences_are_to_the_same_seeds(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("books")  # which finds the examples
    report = load("books_report")
    xl = [finished(report, report.GridRun("10m", "bytes", "xl", seed)) for seed in (0, 1, 2)]
    content = [finished(report, report.GridRun("10m", "bytes", "content", seed)) for seed in (1, 2)]
    chunks = finished(report, report.GridRun("10m", "bytes", "content", 0, "routing-chunk=64"))
    alone = finished(report, report.GridRun("10m", "bytes", "both", 3))
    groups = {("10m", "bytes"): [*xl, *content, chunks, alone]}
    figure = drawn(report, groups, tmp_path / "books.png", monkeypatch)
    absolute, compared = figure.subfigs[0].axes
    report.plt.close(figure)

    def mean_bits(runs: list[Any], *, emptied: bool = False) -> list[float]:
        return [mean(bits) for bits in zip(*(run.rows[emptied]["bin_bits"] for run in runs), strict=True)]

    expected: list[list[float]] = [[0.0] * 24]
    for runs, same in ((content, xl[1:]), ([chunks], xl[:1])):  # there is none for the run of seed 3
        for emptied in (False, True):
            pairs = zip(mean_bits(runs, emptied=emptied), mean_bits(same), strict=True)
            expected.append([bits - reference for bits, reference in pairs])
    lines = [list(line.get_ydata()) for line in compared.lines]
    assert lines == [pytest.approx(line, abs=1e-12) for line in expected]
    assert "of the same seeds" in compared.get_title()
    # No two lines of a panel look alike.
    styles = {(line.get_color(), line.get_linestyle()) for line in absolute.lines}
    assert len(styles) == len(absolute.lines) == 7


def test_legends_lie_beside_the_axes(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("books")  # which finds the examples
    report = load("books_report")
    kinds = (
        ("xl", ""),
        ("learned", ""),
        ("content", "routing-chunk=1"),
        ("both", "num-content-tokens-kv=16"),
    )
    groups = {
        (size, "bytes"): [
            finished(report, report.GridRun(size, "bytes", mode, 0, option)) for mode, option in kinds
        ]
        for size in ("10m", "50m")
    }
    figure = drawn(report, groups, tmp_path / "books.png", monkeypatch)
    legends = [legend.get_window_extent() for part in figure.subfigs for legend in part.legends]
    axes = [each.get_tightbbox() for part in figure.subfigs for each in part.axes]
    report.plt.close(figure)
    assert (len(legends), len(axes)) == (2, 4)
    for legend in legends:
        assert not any(legend.overlaps(each) for each in axes)
        assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= legend.y0 < legend.y1 <= figure.bbox.y1


def test_weights_are_cut_in_parts(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("books")  # which finds the examples
    report = load("books_report")
    from xlroute import RoutedTransformerXL

    model = RoutedTransformerXL(dim=16, depth=1, heads=2, dim_head=8, memory_layers=())
    model.save_pretrained(tmp_path / "10m-bytes-xl-0" / "xl" / "model")
    run = report.GridRun("10m", "bytes", "xl", 0)
    size = len(report._packed_weights(tmp_path, [run]))
    monkeypatch.setattr(report, "PART_BYTES", size // 3)
    with pytest.raises(report.UserError, match=rf"--weights: expected at most {4 * (size // 3):,} bytes"):
        report._packed_weights(tmp_path, [run, run])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--runs: expected some, got none"),
        ("--runs 10m:bytes:xl", "--runs: expected SIZE:TOKENIZER:MODE:SEED, got '10m:bytes:xl'"),
        ("--runs 9m:bytes:xl:0", "--runs: expected a size of small, 10m, 50m, got '9m:bytes:xl:0'"),
        ("--runs 10m:bpe256:xl:0", "--runs: expected bytes, or bpe and a number above 256"),
        (
            "--runs 10m:bytes:xl,magic:0",
            "--runs: expected a mode of none, xl, learned, content, both, random",
        ),
        ("--runs 10m:bytes:xl:0,-1", "--runs: expected a seed of 0 or more"),
        ("--runs 10m:bytes:xl:0:chunk", "--runs: expected an option like routing-chunk=64"),
        ("--runs 10m:bytes:xl:0 --seed 1", "--seed: --runs says it"),
        ("--runs 10m:bytes:xl:0 --colour red", "unrecognized arguments: --colour red"),
        ("--runs 10m:bytes:xl:0 --data nowhere", "no such folder: nowhere"),
        ("--report", "{out} holds no finished run"),
    ],
)
def test_bad_options(
    grid: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    out = tmp_path / "grid"
    assert grid.main(["--out", str(out), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(out=out)}")
    assert error.count("\n") == 1
    assert not out.exists()
