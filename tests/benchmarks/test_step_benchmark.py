"""benchmarks/step.py at a tiny size on the CPU: what it writes, and that nothing unchecked is printed."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

Load = Callable[[str], ModuleType]
MEMORY_MODES = (
    "learned",
    "learned-shortlist",
    "content-64",
    "content-1",
    "content-1-shortlist",
    "both",
)
KINDS = ("training", "evaluation", "memory, training", "memory, evaluation")


def rows_of(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def run(load: Load, out: Path, *arguments: str) -> int:
    command = ["--sizes", "tiny", "--device", "cpu", "--out", str(out), *arguments]
    code: int = load("step").main(command)
    return code


def test_table_and_csv(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(load, tmp_path, "--grad-segments", "1") == 0
    printed = capsys.readouterr().out.splitlines()
    rows = rows_of(tmp_path / "step.csv")
    assert all(float(row["median_ms"]) > 0 and row["checks"] and not row["failure"] for row in rows)
    plain = [
        (row["mode"], row["streams"], row["rows"], row["kind"]) for row in rows if row["segments"] == "1"
    ]
    memories = (("2", "32"), ("1", "80"))
    assert plain == [
        *((mode, b, "0", kind) for mode in ("none", "xl") for b in "21" for kind in KINDS[:2]),
        *((mode, *memory, kind) for mode in MEMORY_MODES for memory in memories for kind in KINDS),
    ]
    for mode in MEMORY_MODES:
        (line,) = (each for each in printed if each.startswith("tiny") and f", {mode}, 2 x 32 rows  " in each)
        assert line.count("%") == 3  # two steps beside those of xl, and the share of gradient
    for row in rows:
        assert bool(row["floor"]) is row["kind"].startswith("memory")
    attached = [
        (row["mode"], row["segments"], row["grad_segments"]) for row in rows if row["segments"] != "1"
    ]
    assert attached == [(mode, "2", grad) for mode in ("learned", "content-1") for grad in "01"]


def test_parts(load: Load, tmp_path: Path) -> None:
    options = ("--modes", "xl", "learned", "--rows", "80", "--parts", "memory")
    assert run(load, tmp_path, *options) == 0
    rows = rows_of(tmp_path / "step.csv")
    assert [(row["mode"], row["rows"], row["kind"]) for row in rows] == [
        ("learned", "80", "memory, training"),
        ("learned", "80", "memory, evaluation"),
    ]


@pytest.mark.parametrize(("broken", "kinds"), [("logits", {"evaluation"}), ("rows", {*KINDS})])
def test_a_red_check_prints_the_error_instead_of_a_speed(
    broken: str,
    kinds: set[str],
    load: Load,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = load("step_work")
    right = work.Reader.evaluate

    def evaluate(reader: Any) -> Tensor:
        out: Tensor = right(reader)
        return out * 1.01

    def filled(reader: Any, streams: int) -> Any:
        state = reader.model.initial_state(
            streams=streams, memory=reader.model.create_memory(streams=streams)
        )
        return reader.model(reader.text[0, 0], state)[1].detach()

    if broken == "logits":
        monkeypatch.setattr(work.Reader, "evaluate", evaluate)
    else:
        monkeypatch.setattr(work.Reader, "_filled", filled)
    assert run(load, tmp_path, "--modes", "learned", "--rows", "32", "--parts", "step", "memory") == 1
    assert "error" in capsys.readouterr().out
    for row in rows_of(tmp_path / "step.csv"):
        assert bool(row["failure"]) is (row["kind"] in kinds)
        assert bool(row["median_ms"]) is not bool(row["failure"])


def test_the_table_of_what_a_gpu_is_busy_for(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the step of xl, 2 ms; of others, 3. The floor of the memory's part is said to be 1.25 ms."""
    step = load("step")
    busy = iter([2.0, 2.0, 3.0, 3.0, 2.5, 5.0])
    monkeypatch.setattr(step, "busy_time", lambda call, device: next(busy))
    monkeypatch.setattr(step.Rates, "milliseconds", lambda rates, floor: 1.25)
    assert run(load, tmp_path, "--modes", "xl", "learned", "--rows", "32", "--parts", "step", "memory") == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("GPU busy: model"))
    xl, learned = (line.split("  ") for line in lines[begin + 2 : begin + 4])
    assert [each.strip() for each in xl if each][1:] == ["2.00", "-", "2.00", *"-----"]
    assert [each.strip() for each in learned if each][1:] == [
        *("3.00", "+1.00 (+50.0%)", "3.00", "+1.00 (+50.0%)", "2.50", "2.00", "5.00", "4.00")
    ]
    assert [float(row["busy_ms"]) for row in rows_of(tmp_path / "step.csv")] == [2, 2, 3, 3, 2.5, 5]


def test_what_a_gpu_is_busy_for(load: Load) -> None:
    """Kernels one after the other, at the same time, and inside of another; not the host, and no notes."""

    def event(start: float, end: float, device: DeviceType = DeviceType.CUDA, note: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(time_range=span, device_type=device, is_user_annotation=note)

    busy_of = load("timing").busy_of
    assert busy_of([]) == 0
    kernels = [event(500, 600), event(0, 100), event(50, 150), event(60, 70), event(150, 200)]
    others = [event(0, 10_000, note=True), event(0, 10_000, DeviceType.CPU)]
    assert busy_of(kernels + others) == 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_busy_for_as_long_as_a_graph_takes(load: Load) -> None:
    timing, device = load("timing"), torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    with timing.on_one_stream(device):
        took = timing.time_call(lambda: x @ x, device, graph=True).median
        busy = timing.busy_time(lambda: x @ x, device)
    assert 0.7 * took < busy < 1.3 * took


@pytest.mark.parametrize("mode", ["learned", "content-1"])
def test_the_products_of_the_floor_are_those_of_the_work(load: Load, mode: str) -> None:
    """But for those inside of ops, which are not counted: of the search, and of attention."""
    work = load("step_work")
    size = work.SIZES["tiny"]
    reader = work.Reader(work.build_model(size, mode, torch.device("cpu")), streams=2, rows=80)
    call = reader.memory_part(training=False)
    call()
    with FlopCounterMode(display=False) as counted:
        call()
    k, search = (8, 0) if mode == "learned" else (3, 2 * 2 * 2 * 12 * 80 * 8)
    attention = 4 * 2 * 12 * k * 32
    floor = work.memory_floor(reader, training=False)
    assert floor.products == counted.get_total_flops() + search + attention


@pytest.mark.parametrize(
    ("mode", "training", "evaluation"),
    [
        # Of 2 streams with 80 rows of 64 bytes: all rows, and twice as many chosen ones, once or twice; by
        # token, only what followed those. Shortlists of twice as many rows.
        ("learned", 2 * 10_240 + 2 * 2 * 2048, 2 * 2 * 80 * 4 + 2 * 2048),
        ("learned-shortlist", 2 * 2 * 80 * 4 + 2 * 4096 + 2 * 2 * 2048, 2 * 2 * 80 * 4 + 2 * 2048),
        ("content-64", 2 * 10_240 + 2 * 2 * 768, 10_240 + 2 * 768),
        ("content-1", 10_240 + 2 * 9216, 2 * 2 * 80 * 8 * 4 + 9216),
        ("content-1-shortlist", 2 * 2 * 80 * 8 * 4 + 2 * 10_240 + 2 * 9216, 2 * 2 * 80 * 8 * 4 + 9216),
        ("both", 2 * 10_240 + 2 * 2 * (1024 + 384), 10_240 + 2 * 80 * 4 + 2 * (1024 + 384)),
    ],
)
def test_the_bytes_of_the_floor(load: Load, mode: str, training: int, evaluation: int) -> None:
    work = load("step_work")
    model = work.build_model(work.SIZES["tiny"], mode, torch.device("cpu"))
    reader = work.Reader(model, streams=2, rows=80)
    assert work.memory_floor(reader, training=True).read == training
    assert work.memory_floor(reader, training=False).read == evaluation


def test_refused_options(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--sizes", "10M", "--device", "cpu"], "--sizes: expected tiny on a CPU"),
        (
            ["--sizes", "tiny", "--rows", "33"],
            "--rows: expected some of [32, 80] with --sizes tiny, got [33]",
        ),
        (["--sizes", "tiny", "--grad-segments", "0"], "--grad-segments: expected at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            load("step").main([*arguments, "--out", str(tmp_path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
