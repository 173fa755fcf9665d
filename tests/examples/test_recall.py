"""examples/recall.py: what its documents ask and how far back, scores, and a memory that recalls."""

import csv
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
Load = Callable[[str], ModuleType]
OPTIONS: dict[str, Any] = {"streams": 3, "pairs": 9, "value_len": 2, "gap": 30}


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Imports a module of the examples as the scripts do."""
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    torch.set_num_threads(threads)
    for name in {path.stem for path in EXAMPLES.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def seed() -> int:
    return int(torch.randint(2**31, ()))


def documents(tasks: ModuleType, kind: str, overwritten: bool) -> Any:
    options = {**OPTIONS, "overwritten": overwritten, "seed": seed()}
    if kind == "training":
        return tasks.training_documents(600, **options)
    return tasks.test_documents(600, questions=7, nearest=50, **options)


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize("kind", ["training", "test"])
def test_questions_are_answered_by_the_newest_fact(load: Load, kind: str, overwritten: bool) -> None:
    tasks = load("recall_tasks")
    made = documents(tasks, kind, overwritten)
    whole = made.piece(0, 600)
    announcements = 0
    for stream in range(3):
        text = tasks.written(whole.tokens[stream])
        assert text.count("=:") == 9 * (1 + overwritten)
        keys = set()
        for question, value in enumerate(made.questions.answers[stream]):
            # The answer is what is asked for, behind its key.
            (places,) = (whole.asked[stream] == question).nonzero(as_tuple=True)
            answer = int(places[0]) + 1
            assert whole.targets[stream, places].tolist() == value.tolist()
            marker, key = text[answer - 5], text[answer - 3 : answer]
            keys.add(key)
            assert text[answer - 4] == ":"
            # Its newest fact is the last one before it with that key, so far back.
            fact = text.rindex(f"=:{key}", 0, answer)
            distance = int(made.questions.distances[stream, question])
            assert fact + 5 == answer - distance
            assert text[fact + 5 : fact + 7] == text[answer : answer + 2] == tasks.written(value)
            told = [text[at + 5 : at + 7] for at in range(answer) if text.startswith(f"=:{key}", at)]
            assert len(told) == 1 + overwritten
            assert told.count(told[-1]) == 1
            # An announcement lies before it by the gap, and after the fact.
            announced = bool(made.questions.announced[stream, question])
            assert marker == "?!"[announced]
            if announced:
                announcements += 1
                assert fact < text.index(f"?{key}") <= answer - 5 - 30
            assert text.count(key) == 2 + overwritten + announced
        assert len(keys) == len(made.questions.answers[stream])
    assert 0 < announcements < made.questions.announced.numel()


def test_pieces_are_the_same_however_they_are_cut(load: Load) -> None:
    made = documents(load("recall_tasks"), "test", overwritten=True)
    whole = made.piece(0, 600)
    for start, stop in ((0, 1), (0, 77), (77, 500), (500, 600)):
        for cut, all_of_it in zip(made.piece(start, stop), whole, strict=True):
            assert torch.equal(cut, all_of_it[:, start:stop])
    assert torch.equal(whole.tokens[:, 1:], whole.targets[:, :-1])


def test_letters_are_drawn_evenly_and_differ_between_streams_and_seeds(load: Load) -> None:
    tasks = load("recall_tasks")
    first, second = (
        tasks.training_documents(26_000, **OPTIONS, overwritten=False, seed=each).piece(0, 26_000).tokens
        for each in (seed(), seed())
    )
    counts = torch.bincount(first[0], minlength=26)[:26]
    # 1,000 of each are expected, with a deviation of 31; the facts take a few.
    assert 800 < counts.min() <= counts.max() < 1200
    for one, other in ((first[0], first[1]), (first, second), (first[:, 1:], first[:, :-1])):
        assert 0.02 < (one == other).float().mean() < 0.06


def test_facts_lie_at_all_distances(load: Load) -> None:
    tasks = load("recall_tasks")
    made = tasks.test_documents(
        60_000,
        streams=20,
        pairs=30,
        questions=30,
        nearest=100,
        overwritten=False,
        value_len=2,
        gap=30,
        seed=seed(),
    )
    distances = made.questions.distances
    assert distances.min() >= 100
    doublings = distances.double().log2().floor().long().flatten().bincount()
    assert doublings[9:15].min() > 0.25 * doublings[9:15].max()


def test_documents_that_do_not_fit_are_refused(load: Load) -> None:
    tasks = load("recall_tasks")
    with pytest.raises(ValueError, match=r"length: expected room for 18 facts and questions, got 100 \(7\)"):
        tasks.training_documents(100, **OPTIONS, overwritten=False, seed=0)
    with pytest.raises(ValueError, match=r"length: expected room for 16 facts and questions, got 90 \(6\)"):
        tasks.test_documents(120, **OPTIONS, questions=7, nearest=30, overwritten=False, seed=0)


def test_answers_count_when_all_their_symbols_are_right(load: Load) -> None:
    tasks, training = load("recall_tasks"), load("recall_train")
    made = [documents(tasks, "test", overwritten) for overwritten in (False, True)]
    whole = [each.piece(0, 600) for each in made]
    targets = torch.cat([each.targets for each in whole])
    # The second symbol of question 3 is wrong in stream 2 of the first documents, and all letters are wrong.
    predicted = torch.where(targets < tasks.FIRST_KEY, (targets + 1) % 26, targets)
    place = (whole[0].asked[2] == 3).nonzero()[1]
    predicted[2, place] = (predicted[2, place] + 1) % len(tasks.SYMBOLS)

    class Reads:
        def initial_state(self, *, streams: int, memory: None) -> int:
            assert streams == 6
            return 0

        def __call__(self, tokens: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
            stop = start + tokens.shape[1]
            return torch.nn.functional.one_hot(predicted[:, start:stop], len(tasks.SYMBOLS)), stop

    first, second = training.ask(Reads(), "xl", made, training.Settings(segment_len=32))
    assert second.all()
    assert (~first).nonzero().tolist() == [[2, 3]]


def test_the_memory_recalls_what_the_window_cannot(load: Load) -> None:
    recall, training = load("recall"), load("recall_train")
    settings = training.Settings(seed=seed() % 1000, steps=60, training_len=256, learning_rate=2e-3)
    test = recall.Test((512,), pairs=8, questions=8, streams=8, passkeys=1, longest={})
    share = {}
    for mode in ("xl", "content1"):
        _, scores = recall.run_mode(mode, settings, test)
        asked = [score for score in scores if score.task == "pairs"]
        assert sum(score.questions for score in asked) == 64
        assert all(score.nearest >= 64 for score in asked)
        share[mode] = load("recall_report").accuracy(asked)
    assert share["xl"] <= 0.15
    assert share["content1"] >= 0.5


def test_a_short_run(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recall, training = load("recall"), load("recall_train")
    settings = training.Settings(streams=2, training_len=256, dim=16, heads=2, dim_head=8)
    test = recall.Test((256, 300), pairs=2, questions=2, streams=2, passkeys=3, longest={"everything": 256})
    monkeypatch.setitem(recall.PRESETS, "small", (settings, test))
    modes = ["xl", "content64", "both", "everything"]
    given = ["--modes", ",".join(modes), "--steps", "1", "--out", str(tmp_path / "run")]
    assert recall.main(given) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "run" / "recall.png").read_bytes().startswith(b"\x89PNG")
    tables = {}
    for name in ("trainings", "scores"):
        with (tmp_path / "run" / f"{name}.csv").open(encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file))
    assert [row["mode"] for row in tables["trainings"]] == modes
    # All modes read the same documents, in the same steps.
    assert {(row["steps"], row["updates"], row["tokens"]) for row in tables["trainings"]} == {
        tuple(tables["trainings"][0][name] for name in ("steps", "updates", "tokens"))
    }
    parameters = [int(row["parameters"]) for row in tables["trainings"]]
    assert max(parameters) < 1.15 * min(parameters)
    for mode in modes:
        assert f"{training.MODES[mode].label}: trained in " in printed
        for task, questions in (("passkey", 3), ("pairs", 4), ("overwritten", 4)):
            rows = [row for row in tables["scores"] if (row["mode"], row["task"]) == (mode, task)]
            for length in (256, 300):
                asked = [int(row["questions"]) for row in rows if row["length"] == str(length)]
                assert sum(asked) == (0 if mode == "everything" and length == 300 else questions)


PEER = """
import torch

class MemorizingTransformer(torch.nn.Module):
    def __init__(self, *, num_tokens, dim, memorizing_layers, num_retrieved_memories, **sizes):
        super().__init__()
        assert (memorizing_layers, num_retrieved_memories, sizes["xl_max_memories"]) == ((2,), 8, 16)
        self.embedding = torch.nn.Embedding(num_tokens, dim)
        self.to_logits = torch.nn.Linear(dim, num_tokens)

    def create_knn_memories(self, *, batch_size):
        return [batch_size]

    def forward(self, x, *, knn_memories, xl_memories):
        assert knn_memories == [len(x)]
        assert xl_memories is None or xl_memories[0].shape == x.shape
        return self.to_logits(self.embedding(x)), [x]
"""


def test_a_peer_reads_the_same_documents(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "memorizing_transformers_pytorch", raising=False)
    (tmp_path / "memorizing_transformers_pytorch.py").write_text(PEER)
    recall, training = load("recall"), load("recall_train")
    settings = training.Settings(streams=2, training_len=256, dim=16, heads=2, dim_head=8)
    test = recall.Test((256,), pairs=2, questions=2, streams=2, passkeys=3, longest={})
    monkeypatch.setitem(recall.PRESETS, "small", (settings, test))
    given = [
        "--modes",
        "xl,memorizing",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
        "--peer",
        str(tmp_path),
    ]
    assert recall.main(given) == 0
    sys.modules.pop("memorizing_transformers_pytorch")
    with (tmp_path / "run" / "trainings.csv").open(encoding="utf-8") as file:
        own, peer = csv.DictReader(file)
    assert peer["label"] == "MemorizingTransformer"
    assert own["tokens"] == peer["tokens"]
    with (tmp_path / "run" / "scores.csv").open(encoding="utf-8") as file:
        questions = [
            (row["mode"], row["task"], row["nearest"], row["questions"]) for row in csv.DictReader(file)
        ]
    assert [row[1:] for row in questions if row[0] == "xl"] == [
        row[1:] for row in questions if row[0] != "xl"
    ]
    for wrong, message in (
        (["--modes", "xl,memorizing"], "--modes: memorizing needs --peer"),
        (["--peer", "nowhere"], "--peer: expected a folder, got nowhere"),
    ):
        with pytest.raises(SystemExit):
            recall.main(wrong)
        assert message in capsys.readouterr().err


def test_tables_and_picture_count_questions(load: Load, tmp_path: Path) -> None:
    report = load("recall_report")

    def score(mode: str, length: int, announced: bool, nearest: int, questions: int, right: int) -> Any:
        return report.Score(
            mode, mode.upper(), "pairs", length, announced, nearest, 2 * nearest, questions, right
        )

    scores = [
        score("xl", 512, False, 64, 10, 1),
        score("xl", 512, False, 128, 30, 5),
        score("xl", 512, True, 128, 4, 4),
        score("learned", 1024, True, 64, 3, 1),
    ]
    assert report.accuracy(scores[:2]) == 6 / 40
    assert math.isnan(report.accuracy([]))
    trainings = [report.Training(mode, mode.upper(), 1234, 5, 6, 7, 8.0, 0.9) for mode in ("xl", "learned")]
    text = report.tables(trainings, scores)
    header, _, xl, learned = text.split("\n\n")[1].splitlines()
    assert header.split() == ["pairs", "512", "512,", "gap", "1,024,", "gap"]
    assert xl.split() == ["XL", "15.0%", "100.0%"]
    assert learned.split() == ["LEARNED", "33.3%"]
    report.draw(tmp_path / "recall.png", scores, chance=0.01)
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_a_mode_that_does_not_exist_is_refused(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("recall").main(["--modes", "xl,telepathy"])
    assert "--modes: expected some of none,xl," in capsys.readouterr().err


def test_an_update_follows_all_segments_whose_rows_carry_gradient(load: Load) -> None:
    training = load("recall_train")
    settings = training.Settings(steps=2, streams=2, training_len=256, dim=16, heads=2, dim_head=8)
    one_by_one = training.train("content1", settings)
    together = training.train("content1", replace(settings, memory_grad_segments=3))
    assert (together.steps, together.tokens) == (one_by_one.steps, one_by_one.tokens)
    # Documents of four segments, in the last of which at least something far is asked for.
    assert one_by_one.updates > together.updates == 2
