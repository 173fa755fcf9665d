"""benchmarks/routing.py at a tiny size on the CPU: what it writes, and that nothing unchecked is printed."""

import csv
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from xlroute.kernels import coordinate_descent

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TINY = ["--tiny", "--device", "cpu"]
ROWS = (
    "coordinate descent 2 x 500, T = 20, forward",
    "coordinate descent 2 x 500, T = 20, backward",
    "soft_topk with indices, 2 x 700, k = 10, forward",
    "soft_topk with indices, 2 x 700, k = 10, backward",
    "scores of 512 x 32 bf16, R = 2",
    "scores of 512 x 32 bf16, R = 3",
    "ConditionalRoutedCrossAttention, 512 memories bf16, forward",
    "the same, forward + backward",
    "the same, extra GPU memory",
    "the same with stored scores, forward, 512 memories",
    "the same with stored scores, forward, 1,024 memories",
    "gradient error, n = 64, k = 8, T = 50, eps 4 to 0.03",
)
STEPS = ("descent", "soft_topk", "scores", "routed_attention", "stored_attention", "gradient_error")

Load = Callable[[str], ModuleType]


def lines_of(text: str) -> dict[str, str]:
    """The rest of each line of the table, by the work that it begins with."""
    lines = text.splitlines()
    return {row: line.removeprefix(row) for line in lines for row in ROWS if line.startswith(f"{row} ")}


def csv_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    return comments, list(csv.DictReader(lines[len(comments) :]))


def test_table_csv_and_picture(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("routing").main([*TINY, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    lines = lines_of(printed)
    assert tuple(lines) == ROWS
    for row in ROWS:
        if row != "the same, extra GPU memory":  # which a CPU does not tell
            assert float(lines[row].split()[0]) > 0, row
    assert "device CPU" in printed

    comments, rows = csv_rows(tmp_path / "routing.csv")
    assert {"# device", "# copy rate", "# PyTorch", "# date"} <= {line.split(":")[0] for line in comments}
    timed = [row for row in rows if row["work"].split(",")[0] != "gradient error"]
    assert all(float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"]) for row in timed)
    assert all(row["checks"] and not row["failure"] for row in rows)
    assert all("clock" in row["method"] for row in timed)
    assert {row["subject"] for row in rows} == {"xlroute", "reference", "plain PyTorch"}
    assert sorted(row["memories"] for row in rows if row["memories"]) == ["1024"] * 3 + ["256"] * 3
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def only(load: Load, patch: pytest.MonkeyPatch, step: str) -> None:
    """Leave one step in the run."""
    for name in STEPS:
        if name != step:
            patch.setattr(load("routing"), name, lambda sizes, device: [])
    if step != "gradient_error":
        empty = load("routing_report").Work("nothing", "nothing", "", in_table=False)
        patch.setattr(load("routing"), "gradient_error", lambda sizes, device: empty)


@pytest.mark.parametrize(
    ("step", "op", "row"),
    [
        ("descent", "coordinate_descent", ROWS[0]),
        ("descent", "coordinate_descent", ROWS[1]),
        ("soft_topk", "soft_topk_with_indices", ROWS[2]),
        ("scores", "row_scores", ROWS[4]),
    ],
)
def test_a_red_check_prints_the_error_instead_of_a_speed(
    step: str,
    op: str,
    row: str,
    load: Load,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = getattr(load("routing_ops"), op)

    def wrong(*arguments: Any, backend: str | None, **options: Any) -> Any:
        result = right(*arguments, backend=backend, **options)
        if backend is not None:
            return result
        return (result[0], result[1].flip(-1)) if isinstance(result, tuple) else result * 1.01

    only(load, monkeypatch, step)
    monkeypatch.setattr(load("routing_ops"), op, wrong)
    assert load("routing").main([*TINY, "--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    cells = lines_of(printed)[row].split()
    assert cells[0] == "error"
    assert float(cells[1]) > 1e-3
    assert cells[2] == "-"  # no quantiles
    assert f"{row}, xlroute: " in printed
    assert "tolerance" in printed

    _, rows = csv_rows(tmp_path / "routing.csv")
    (ours,) = (each for each in rows if each["work"] == row and each["subject"] == "xlroute")
    assert ours["failure"]
    assert not ours["median_ms"]
    (reference,) = (each for each in rows if each["work"] == row and each["subject"] == "reference")
    assert reference["median_ms"]
    assert not (tmp_path / "routing.png").exists()


def test_a_call_that_breaks_hides_no_other(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    right = load("routing_ops").coordinate_descent

    def broken(*arguments: Any, backend: str | None, **options: Any) -> Any:
        if backend is None:
            raise RuntimeError("out of registers\nand more")
        return right(*arguments, backend=backend, **options)

    monkeypatch.setattr(load("routing_ops"), "coordinate_descent", broken)
    works = load("routing_ops").descent(load("routing_settings").TINY, CPU)
    report = load("routing_report")
    machine = report.Machine({"device": "a CPU"}, 1e9, None)
    lines = lines_of(report.table(works, machine))
    for row in ROWS[:2]:
        cells = lines[row].split()
        assert cells[:3] == ["failed", "-", "-"]
        assert float(cells[3]) > 0  # the reference
        assert f"{row}, xlroute: RuntimeError: out of registers" in report.failures(works, [])


def test_a_step_that_breaks_hides_no_other(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory left")

    only(load, monkeypatch, "descent")
    monkeypatch.setattr(load("routing"), "scores", broken)
    monkeypatch.setattr(load("routing"), "sweep", broken)
    assert load("routing").main([*TINY, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert float(lines_of(printed)[ROWS[0]].split()[0]) > 0
    assert "scores: RuntimeError: no memory left\nsweep: RuntimeError: no memory left\n" in printed
    assert csv_rows(tmp_path / "routing.csv")[1]


def test_tolerances(load: Load) -> None:
    measurement = load("measurement")
    exact = torch.randn(1000, dtype=torch.float64)
    reference = (exact * (1 + 1e-5)).float()
    for factor, passed in ((1.5e-5, True), (3e-5, False), (math.nan, False)):
        check = measurement.earned("it", (exact * (1 + factor)).float(), reference, exact)
        assert check.passed is passed, str(check)
    # A reference that is wrong earns nothing.
    wrong = (exact * 1.1).float()
    assert not measurement.earned("it", wrong, wrong, exact).passed
    assert not measurement.close("it", exact[:-1].float(), exact).passed
    assert not measurement.equal("it", torch.tensor([1, 2]), torch.tensor([1, 3]), "it").passed
    assert not measurement.finite("it", torch.tensor([1.0, math.nan])).passed
    zero = torch.zeros(3)
    assert measurement.close("it", zero, zero).passed
    assert not measurement.close("it", zero + 1, zero).passed


def test_its_own_formulas(load: Load) -> None:
    settings, ops, layer = load("routing_settings"), load("routing_ops"), load("routing_layer")
    s = torch.randn(3, 200, dtype=torch.float64)
    gates = coordinate_descent(
        s, k=9, n_iters=20, eps=settings.EPS, eps_init=settings.EPS_INIT, eps_decay=settings.EPS_DECAY
    )
    torch.testing.assert_close(ops.unrolled_descent(s, 9, 20), gates, rtol=0, atol=1e-10)

    dense = layer.DenseCrossAttention(16, 2, 8).double()
    x, context = torch.randn(1, 5, 16).double(), torch.randn(1, 50, 16).double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(layer, "ROWS_AT_ONCE", 7)
        torch.testing.assert_close(dense.exact(x, context), dense(x, context), rtol=0, atol=1e-12)


def test_the_rows_that_a_router_chose_are_checked(load: Load) -> None:
    layer, settings = load("routing_layer"), load("routing_settings")
    routed = layer.routed_layer(settings.TINY, CPU, None).to(torch.bfloat16)
    tokens = routed.kv_router.routing_token
    context = torch.randn(1, 300, settings.TINY.dim).to(torch.bfloat16)
    with torch.no_grad():
        indices = routed.route(context).indices[0]
    best = indices[:, :1]
    worst = torch.tensor([[next(i for i in range(300) if i not in row)] for row in indices.tolist()])
    for chosen, passed in (
        (indices, True),
        (torch.cat((best, indices[:, :-1]), 1), False),
        (torch.cat((worst, indices[:, 1:]), 1), False),
        (torch.where(indices == best, 300, indices), False),
    ):
        checks = layer._chosen(chosen, context, tokens)
        assert all(check.passed for check in checks) is passed, [str(check) for check in checks]


def test_measurements_travel_as_json(load: Load) -> None:
    measurement = load("measurement")
    check = measurement.Check("it", 1.0, 2.0, "float64")
    timing = load("timing").Timing(1.0, 0.5, 2.0, "by hand")
    for each in (
        measurement.Measurement("one", timing, None, 12, (check,)),
        measurement.Measurement("two", failure="it broke"),
    ):
        assert measurement.Measurement.from_json(each.to_json()) == each


def test_a_peer_that_does_not_run_says_why(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "peer" / "colt5_attention"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    metadata = tmp_path / "peer" / "colt5_attention-0.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: colt5-attention\nVersion: 0.9.0\n")
    only(load, monkeypatch, "descent")
    arguments = [*TINY, "--out", str(tmp_path / "out"), "--peer-0112", str(tmp_path / "peer")]
    monkeypatch.setattr(load("routing"), "sweep", lambda sizes, device: iter(()))
    assert load("routing").main(arguments) == 1
    printed = capsys.readouterr().out
    assert lines_of(printed)[ROWS[0]].split()[8] == "failed"
    assert f"{ROWS[0]}, colt5 0.11.2: error: expected colt5-attention 0.11.2, found 0.9.0" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--tiny: expected on a CPU"),
        (
            [*TINY, "--peer-072", "nowhere"],
            "--peer-072: expected a folder that holds colt5_attention, got nowhere",
        ),
    ],
)
def test_refused_options(
    arguments: list[str], message: str, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        load("routing").parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "routing.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--peer-072" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_hold_what_they_can(load: Load) -> None:
    timing, device = load("timing"), torch.device("cuda")
    x = torch.randn(1 << 20, device=device)
    with timing.on_one_stream(device):
        assert "CUDA graph" in timing.time_call(lambda: x * 2, device).method
        assert "events" in timing.time_call(lambda: (x * 2).sum().item(), device).method
        assert "flushed" in timing.time_call(lambda: x * 2, device, cold=True).method
        assert timing.extra_bytes(lambda: x * 2, device) == 4 << 20
        assert 1e11 < timing.copy_rate(1 << 28, device) < 1e13
