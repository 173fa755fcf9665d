"""benchmarks/crash.py at a small size: the store survives, and one that would not is noticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(folder: Path, seed: int, *options: str, sabotage: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the script in a process of its own, which forks others, after it has changed the library."""
    imports = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import crash"
    program = f"{imports}\n{sabotage}\nsys.exit(crash.main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", program, "--seed", str(seed), *options],
        env={"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_killed_writers_damaged_files_and_readers_beside_a_writer(tmp_path: Path, test_seed: int) -> None:
    result = run(tmp_path, test_seed, "--rounds", "50", "--damage", "120", "--readers", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    kill, damage, readers = result.stdout.splitlines()
    [rounds, told, _] = numbers(kill.removeprefix("kill: "))
    assert rounds == 50
    assert told > 10  # as few writers get far on a busy machine
    [times, refused, anew, harmless, on, repaired, beyond] = numbers(damage.removeprefix("damage: "))
    assert times == 120 == refused + anew + harmless
    assert min(refused, anew, harmless, on) > 0
    assert on + repaired + beyond < 120
    [written, read, _] = numbers(readers.removeprefix("readers: "))
    assert min(written, read) > 5
    assert not [*tmp_path.glob("xlroute-crash-*")]


def numbers(line: str) -> list[int]:
    """The numbers in a line, but for the seconds at its end."""
    return [int(each.replace(",", "")) for each in re.findall(r"\d[\d,]*(?= )", line.rpartition(";")[0])]


SABOTAGE = {
    # A commit that was acknowledged and is not there.
    "--rounds": (
        "from xlroute.memory import disk; write = disk.write_commit\n"
        "disk.write_commit = lambda root, commit: write(root, commit) if commit.generation == 1 else None"
    ),
    # Rows that nobody checks.
    "--damage": (
        "from xlroute.memory import chunks; import numpy as np\n"
        "chunks.wrong_rows = lambda *arguments: np.empty(0, np.int64)\n"
        "import crash_damage; crash_damage.KINDS = ('flipped',)"
    ),
    # A commit that holds what another one must.
    "--readers": "import crash_readers; crash_readers.number_of = lambda store: int(store.fingerprint) or 7",
}


@pytest.mark.parametrize("option", SABOTAGE)
def test_a_store_that_does_not_survive_is_noticed(tmp_path: Path, test_seed: int, option: str) -> None:
    amounts = {"--rounds": "0", option: "3" if option == "--readers" else "100"}
    options = [word for pair in amounts.items() for word in pair]
    result = run(tmp_path, test_seed, *options, sabotage=SABOTAGE[option])
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"FAILED with --seed {test_seed}; the store is at {tmp_path}" in result.stdout
    assert "WrongError" in result.stderr


def test_amounts_below_zero_are_refused(tmp_path: Path) -> None:
    result = run(tmp_path, 0, "--damage", "-1")
    assert result.returncode == 2
    assert "--damage: expected 0 or more, got -1" in result.stderr
