"""python -m xlroute.memory: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from xlroute.memory import MemoryStore
from xlroute.memory.command_line import main

ROW_BYTES = 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of 2 layers and 3 streams that hold 1,200, 7 and 0 rows, the first of them after 300 others."""
    with MemoryStore.create(
        tmp_path / "store",
        layers=2,
        streams=3,
        dim=8,
        capacity=1200,
        fingerprint="f",
        chunk_bytes=100 * ROW_BYTES,
    ) as store:
        store.pin(store.commits()[0])
        store.append(torch.randn(2, 3, 1500, 8), [1500, 7, 0])
        store.commit(durable=True)
    return tmp_path / "store"


def damage(path: Path, layer: int, stream: int, rows: list[int]) -> None:
    for row in rows:
        file = path / f"layer-{layer}.stream-{stream}.rows" / f"c.{row // 100}.0"
        data = bytearray(file.read_bytes())
        data[row % 100 * ROW_BYTES] ^= 1
        file.write_bytes(data)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """The exit status, and what was printed to stdout and stderr."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as refusal:
        status = int(refusal.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert err == ""
    return status, json.loads(out)


def commits(path: Path) -> list[str]:
    return sorted(file.stem for file in path.glob("commits/0*.json"))


def test_info_prints_tables(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "info", path)
    assert (status, err) == (0, "")
    first, last = commits(path)
    expected = rf"""path         {path}
format       2
shape        layers 2, streams 3, dim 8, float32
capacity     1,200 rows a stream, 230,400 bytes of rows
eviction     oldest first
fingerprint  f
rows held    1,207 in each layer, 77,248 bytes
routes       not recorded
on disk      [\d.,]+ KiB allocated, [\d.,]+ KiB apparent
chunk files  52, of up to 100 rows

stream  rows held  appended  evicted  positions held
------  ---------  --------  -------  --------------
     0      1,200     1,500      300    300 to 1,499
     1          7         7        0          0 to 6
     2          0         0        0            none

commit                 made \(UTC\)           age   rows  durable  pinned  fingerprint
---------------------  -------------------  ---  -----  -------  ------  -----------
{first}  \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  \d s      0  no       yes     f
{last}  \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  \d s  1,207  yes      no      f
"""
    assert re.fullmatch(expected, out), out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eviction": "lowest_score"}, "lowest routing score first"),
        ({"eviction": "every_nth", "keep_every": 8}, "positions that are multiples of 8 last"),
    ],
    ids=["lowest_score", "every_nth"],
)
def test_info_and_plot_show_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], text: str
) -> None:
    with MemoryStore.create(
        tmp_path / "s", layers=1, streams=2, dim=4, capacity_bytes=2 * 400 * 16, **options
    ) as store:
        for _ in range(9):
            store.append(torch.arange(100.0).flip(0)[None, None, :, None].expand(1, 2, 100, 4), [100, 10])
            store.layer(0).scores(torch.ones(1, 4), normalize=None, scale=1.0)
        store.commit()
        [(first, _), _] = store.info().positions
    out = run(capsys, "info", tmp_path / "s")[1]
    assert "capacity     400 rows a stream, 12,800 bytes of rows\n" in out
    assert f"eviction     {text}\n" in out
    assert "rows held    490 in each layer, 7,840 bytes\n" in out
    assert re.search(rf"\n +0 +400 +900 +500 +{first} to 899, with gaps\n +1 +90 +90 +0 +0 to 89\n", out)
    _, document = run_json(capsys, "info", tmp_path / "s")
    assert (document["capacity"], document["capacity_bytes"], document["rows_bytes"]) == (400, 12800, 7840)
    assert (document["eviction"], document["keep_every"]) == (options["eviction"], options.get("keep_every"))
    assert (document["evicted"], document["positions"]) == ([500, 0], [[first, 900], [0, 90]])
    assert run(capsys, "plot", tmp_path / "s", tmp_path / "a.png")[0] == 0
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3].reshape(-1, 3)
    for color in ("d0d4da", "7fb2d9", "1f77b4"):
        expected = np.array([int(color[place : place + 2], 16) / 255 for place in (0, 2, 4)])
        assert (np.abs(pixels - expected).max(1) < 0.01).any(), color


def test_info_as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = commits(path)
    status, document = run_json(capsys, "info", path)
    assert status == 0
    assert document["path"] == str(path)
    assert (document["dtype"], document["capacity"], document["rows"]) == ("float32", 1200, [1200, 7, 0])
    assert [commit["id"] for commit in document["commits"]] == [first, last]
    assert [commit["pinned"] for commit in document["commits"]] == [True, False]
    assert document["disk"]["chunk_files"] == 52
    assert run_json(capsys, "info", path, "--commit", first)[1]["rows"] == [0, 0, 0]


def test_verify_reports_damage_by_its_exit_status(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = commits(path)
    status, out, err = run(capsys, "verify", path)
    assert (status, err) == (0, "")
    assert out == f"{path}: 2,414 rows in all layers, of 1 commit\n  {last}\nno damage\n"
    assert f"{first}\n  {last}\nno damage\n" in run(capsys, "verify", path, "--all")[1]
    damage(path, 1, 0, [3, 4, 110, *range(500, 510, 2)])
    (path / "commits" / "tmp-0123456789abcdef").write_text("")
    status, out, err = run(capsys, "verify", path)
    assert (status, err) == (1, "")
    assert out.splitlines()[2:] == [
        "3 files damaged:",
        *(
            f"  layer-1.stream-0.rows/c.{chunk}.0: rows {rows}: expected every row to have its checksum, got "
            f"others: it or {path / 'layer-1.stream-0.crc32c' / f'c.{chunk}'} is damaged"
            for chunk, rows in ((0, "3 to 4"), (1, "110"), (5, "500, 502, 504, 506, ... (5 rows)"))
        ),
        "left behind, needed by no commit:",
        f"  {path / 'commits' / 'tmp-0123456789abcdef'}",
    ]
    status, document = run_json(capsys, "verify", path)
    assert (status, document["ok"], document["rows"]) == (1, False, 2414)
    assert document["damage"][0]["rows"] == [[3, 5]]
    assert document["damage"][0]["commits"] == [last]
    assert run(capsys, "verify", path, "--commit", first)[0] == 0


def test_leftovers_may_be_the_work_of_a_writer(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryStore.open(path, mode="r+") as store:
        store.append(torch.randn(2, 3, 200, 8), [0, 0, 200])
        _, out, _ = run(capsys, "verify", path)
    assert f"left behind, needed by no commit, or the work of process {os.getpid()} on " in out
    assert out.count("layer-1.stream-2.rows/c.") == 2


def test_repair_says_what_was_lost(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, last = commits(path)
    assert run(capsys, "repair", path) == (0, f"{path}: commit {last} stands as it was\n", "")
    damage(path, 1, 0, [3, 4, 1000])
    damage(path, 0, 1, [0])
    (path / "layer-0.stream-0.rows" / "zarr.json").unlink()
    (path / "commits" / "tmp-0123456789abcdef").write_text("")
    status, out, err = run(capsys, "repair", path)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    new = commits(path)[-1]
    assert lines[0] == f"{path}: commit {new} holds what was whole of commit {last}"
    assert lines[1] == "3 files damaged:"
    assert lines[5:] == [
        "lost:",
        *(
            "  ".join(
                ("", f"{stream:>6}", f"{held:<14}", f"{damaged:<17}", f"{kept:<12}", f"{lost:<26}", again)
            )
            for stream, held, damaged, kept, lost, again in (
                ("stream", "positions held", "damaged", "kept", "lost", "to be read again"),
                ("-" * 6, "-" * 14, "-" * 17, "-" * 12, "-" * 26, "-" * 19),
                (
                    *("0", "300 to 1,499", "303 to 304, 1,300", "305 to 1,299"),
                    *("300 to 304, 1,300 to 1,499", "from position 1,300"),
                ),
                ("1", "0 to 6", "0", "1 to 6", "0", "no"),
            )
        ),
        "written anew:",
        f"  {path / 'layer-0.stream-0.rows' / 'zarr.json'}",
        "left behind, removed:",
        f"  {path / 'commits' / 'tmp-0123456789abcdef'}",
    ]
    assert run_json(capsys, "verify", path)[0] == 0
    (path / "commits" / f"{new}.json").write_text("{}")
    status, document = run_json(capsys, "repair", path)
    assert (status, document["base"]) == (1, last)
    assert document["set_aside"] == [str(path / "commits" / f"{new}.json.damaged")]
    assert [loss["kept"] for loss in document["losses"]] == [[305, 1300], [1, 7]]


def test_compact_says_what_it_did(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "compact", path, "--zstd")
    assert (status, err) == (0, "")
    new = commits(path)[-1]
    size = r"[\d.,]+ KiB"
    # Stream 0 has 12 full chunk files in each layer; nothing else is full.
    assert re.fullmatch(
        rf"{path}: commit {new} has 2,400 rows in 1 shard\n"
        rf"before: 48 files, {size}\nafter:  5 files, {size}\n"
        rf"kept until earlier commits are dropped: 48 files, {size}\n",
        out,
    ), out
    out = run(capsys, "info", path)[1]
    assert re.search(r"\nshards       1, with 2,400 rows of all layers, [\d.]+ KiB\n", out), out
    assert run(capsys, "compact", path) == (0, f"{path}: nothing to rewrite\n", "")
    status, document = run_json(capsys, "compact", path)
    assert (status, document["commit"], document["rows"]) == (0, None, 0)
    with MemoryStore.open(path, mode="r+") as store:
        assert store.commits()[-1] == new
        store.append(torch.randn(2, 3, 300, 8), [0, 300, 0])
        store.commit()
        status, _, err = run(capsys, "compact", path)
        assert (status, err.count("\n")) == (2, 1)
    status, document = run_json(capsys, "compact", path, "--zstd", "19")
    assert (document["rows"], document["shards"], document["commit"]) == (2 * 300, 1, commits(path)[-1])
    document = json.loads((path / "commits" / f"{document['commit']}.json").read_text())
    assert [[shard["zstd"] for shard in shards] for shards in document["shards"]] == [[3], [19], []]
    assert run_json(capsys, "info", path)[1]["disk"]["shards"] == 2
    for level in ("0", "x"):
        assert run(capsys, "compact", path, "--zstd", level)[0] == 2


def test_export_and_plot_write_new_files(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = commits(path)
    target = tmp_path / "rows.npz"
    status, out, err = run(capsys, "export", path, target)
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"{target}: commit {last}, [\d.]+ KiB\n", out)
    with np.load(target) as arrays, MemoryStore.open(path) as store:
        assert np.array_equal(arrays["layer-1.stream-0.rows"], store.rows(1)[0][0])
        assert arrays["stream-0.positions"][0] == 300
    other = tmp_path / "rows.safetensors"
    status, document = run_json(capsys, "export", path, other, "--commit", first)
    assert document == {"commit": first, "target": str(other), "bytes": other.stat().st_size}

    picture = tmp_path / "rows.png"
    assert run(capsys, "plot", path, picture) == (0, f"{picture}\n", "")
    pixels = matplotlib.image.imread(picture)[..., :3]
    blue, grey = ((abs(pixels - np.array(colour)).max(-1) < 0.02) for colour in (_BLUE, _GREY))
    # Stream 0 holds rows 300 to 1,499: four parts blue beside one part grey.
    line = int(blue.sum(1).argmax())
    assert blue[line].sum() / grey[line].sum() == pytest.approx(4, rel=0.02)
    assert grey[line].argmax() < blue[line].argmax()
    for command, file in (("export", target), ("plot", picture)):
        data = file.read_bytes()
        status, out, err = run(capsys, command, path, file)
        assert (status, out) == (2, "")
        assert err.endswith(f"{command}: error: {file}: expected nothing, got something that exists\n")
        assert file.read_bytes() == data


_BLUE, _GREY = (0x1F / 255, 0x77 / 255, 0xB4 / 255), (0xD0 / 255, 0xD4 / 255, 0xDA / 255)


@pytest.mark.parametrize(("streams", "rows"), [(1, 0), (300, 5)])
def test_a_plot_of_an_empty_store_and_of_many_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], streams: int, rows: int
) -> None:
    with MemoryStore.create(tmp_path / "s", layers=1, streams=streams, dim=2, chunk_bytes=8) as store:
        store.append(torch.randn(1, streams, rows, 2))
        store.record_routes()
        store.layer(0).take_routed(torch.full((streams, 1), -1 if rows == 0 else 0))
        store.commit()
    assert run(capsys, "plot", tmp_path / "s", tmp_path / "a.png")[0] == 0
    assert matplotlib.image.imread(tmp_path / "a.png").shape[0] < 5000


@pytest.mark.parametrize("layers", [2, 5])
def test_info_and_plot_show_what_was_routed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: int
) -> None:
    with MemoryStore.create(tmp_path / "s", layers=layers, streams=2, dim=2, chunk_bytes=800) as store:
        store.append(torch.randn(layers, 2, 100, 2), [100, 60])
        store.record_routes()
        for layer in range(layers):  # the first half of stream 0 once, the last half of stream 1 ten times
            store.layer(layer).take_routed(torch.stack([torch.arange(50), torch.full((50,), -1)]))
            store.layer(layer).take_routed(
                torch.stack([torch.full((300,), -1), torch.arange(30, 60).repeat(10)])
            )
        store.commit()
    assert f"\nroutes       {layers * 350:,} in all layers\n" in run(capsys, "info", tmp_path / "s")[1]
    assert run_json(capsys, "info", tmp_path / "s")[1]["routed"] == [layers * 50, layers * 300]
    assert run(capsys, "plot", tmp_path / "s", tmp_path / "a.png")[0] == 0
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    pixels = pixels[:, : int(0.85 * pixels.shape[1])]  # without the bar that explains the colours
    shades = matplotlib.colormaps["plasma_r"]
    few, many = (np.abs(pixels - np.array(shades(end)[:3])).max(-1) < 0.02 for end in (0.0, 1.0))
    panels = 1 if layers > 4 else layers
    # Each has a strip in each panel, which lies where the rows do.
    strips = [np.flatnonzero(colour.sum(1) > 100) for colour in (few, many)]
    assert [len(np.flatnonzero(np.diff(lines, prepend=-9) > 1)) for lines in strips] == [panels, panels]
    first, last = few[strips[0][0]].nonzero()[0], many[strips[1][0]].nonzero()[0]
    assert len(last) / len(first) == pytest.approx(30 / 50, rel=0.03)
    assert (last[0] - first[0]) / len(first) == pytest.approx(30 / 50, rel=0.03)


def test_damage_to_what_nobody_needs_is_told_apart(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryStore.open(path, mode="r+") as store:
        store.layer(1).scores(torch.randn(2, 8), normalize=None, scale=1.0)
        store.record_routes()
        store.layer(0).take_routed(torch.tensor([[3], [-1], [-1]]))
        last = store.commit()
    [counts] = (path / "routes").glob("stream-0.1.*")
    [scores] = (path / "scores").glob("layer-1.*")
    counts.write_bytes(b"")
    file = scores / "layer-0.stream-0.rows" / "c.3.0"
    file.write_bytes(b"")
    status, out, _ = run(capsys, "verify", path)
    assert status == 0
    assert out.splitlines()[2:] == [
        "no damage",
        "stored scores damaged, which are computed anew:",
        f"  {file.relative_to(path)}: rows 300 to 399: expected a chunk file of 800 bytes, got 0",
        "counts of what was routed damaged, which are left out:",
        f"  {counts.relative_to(path)}: expected checksum {counts.name[-8:]}, got 00000000: "
        "the file is damaged",
    ]
    document = run_json(capsys, "verify", path)[1]
    assert [len(document[name]) for name in ("damage", "scores", "routes")] == [0, 1, 1]
    assert run(capsys, "repair", path) == (
        0,
        f"{path}: commit {last} stands as it was\n"
        f"damaged scores and counts of what was routed, removed:\n  {counts}\n  {scores}\n",
        "",
    )
    assert run(capsys, "verify", path)[1].endswith("no damage\n")


def test_what_cannot_be_done_is_said_in_one_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    for command, target in (
        ("info", ()),
        ("verify", ()),
        ("repair", ()),
        ("compact", ()),
        ("export", (tmp_path / "a.npz",)),
        ("plot", (tmp_path / "a.png",)),
    ):
        status, out, err = run(capsys, command, missing, *target)
        assert (status, out) == (2, "")
        assert err == (
            f"python -m xlroute.memory {command}: error: {missing}: expected a memory store, got nothing\n"
        )
    for arguments, message in (
        (("info", path, "--commit", "x"), "commit: expected an id like"),
        (("export", path, tmp_path / "a.csv"), "target: expected a name that ends in .npz or .safetensors"),
        (("plot", path, tmp_path / "a.pdf"), "target: expected a name that ends in .png"),
        (("verify", path, "--commit", "000000000009-00000000"), "commit: expected one of 0000"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
    for arguments in ((), ("look", path), ("verify", path, "--all", "--commit", "x")):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("usage: python -m xlroute.memory")
    with MemoryStore.open(path, mode="r+"):
        status, _, err = run(capsys, "repair", path)
        assert (status, err.count("\n")) == (2, 1)
        assert f"expected no other writer, got process {os.getpid()}" in err


def test_damage_that_stops_a_command_has_the_status_of_damage(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(path, 0, 0, [700])
    status, _, err = run(capsys, "export", path, tmp_path / "a.npz")
    assert (status, err.count("\n")) == (1, 1)
    assert "row 700 of array layer-0.stream-0.rows" in err
    assert not (tmp_path / "a.npz").exists()
    (path / "commits" / f"{commits(path)[-1]}.json").write_text("{}")
    status, _, err = run(capsys, "info", path)
    assert (status, err.count("\n")) == (1, 1)


def test_it_runs_as_a_module_and_shows_no_bar_where_nobody_looks(path: Path) -> None:
    command = [sys.executable, "-P", "-m", "xlroute.memory", "verify", str(path), "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["ok"] is True
    result = subprocess.run([*command[:-2], str(path / "nothing")], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_a_bar_is_shown_on_a_terminal(path: Path) -> None:
    command = [sys.executable, "-P", "-m", "xlroute.memory", "verify", str(path)]
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert result.returncode == 0
    assert shown.startswith("\rverify: ")
    assert result.stdout.endswith("no damage\n")
