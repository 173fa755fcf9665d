"""benchmarks/memory.py at a tiny size: what it writes, and that a wrong result shows."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"
WORKS = (
    "append 16 x 8 fp16 and commit, not durable",
    "append 16 x 8 fp16 and commit, durable",
    "gather 10 random rows of 256, warm",
    "open 5,000 rows of 4, and a first gather",
    *(
        f"{how} 10 random rows of 256 on {place}, for the device{checked}"
        for place in ("the device", "the host", "disk")
        for how, checked in (("take", ""), ("gather", ", indices checked"))
    ),
    "route 5,000 rows of 4 on disk, 50 of them on the device, by stored scores",
)


def test_it_measures_everything_beside_its_peers(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for work in WORKS:
        assert f"\n{work} " in run.stdout
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    lines = (tmp_path / "memory.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert {row["work"] for row in rows} == {*WORKS, "gather 10 random rows of 64, warm"}
    assert all(float(row["median_ms"]) > 0 and "error 0.0e+00" in row["checks"] for row in rows)
    subjects = [row["subject"] for row in rows if row["work"] == WORKS[2]]
    assert subjects == ["xlroute", "raw", "zarr"]
