"""What `tao label` keeps and makes of it: the file, the next task, agreement, preference rows."""

from __future__ import annotations

import json
import math
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from opentao.cli import app
from opentao.cli_label import _serve
from opentao.errors import ConfigError, DataError
from opentao.preferences import Ranking, read_preferences, write_preferences
from opentao.store import Run, groups_to_table
from opentao.types import Group, Prompt
from opentao.web.agreement import alpha, between, with_oneself
from opentao.web.choices import SCHEMA, Choices, Item, Task, item_of
from opentao.web.items import read_items
from opentao.web.label import _facts
from opentao.web.next_task import Plan, for_everybody, next_task, pair_information, units
from opentao.web.preference_rows import import_rankings, rankings_of


def items(number: int, answers: int = 3) -> list[Item]:
    turns = [[{"role": "user", "content": f"prompt {i}"}] for i in range(number)]
    return [item_of(t, [f"answer {i}.{j}" for j in range(answers)]) for i, t in enumerate(turns)]


@pytest.fixture
def choices(tmp_path: Path) -> Choices:
    found = Choices(tmp_path / "choices.sqlite")
    found.add_items(items(4))
    for name in ("ann", "bo"):
        found.add_annotator(name)
    return found


def judge(
    choices: Choices, annotator: str, item: Item, shown: tuple[int, ...], answer: dict[str, Any], **more: Any
) -> Task:
    kind = "pair" if {"better", "tie"} & set(answer) else "rank" if "order" in answer else "mark"
    kind = more.pop("kind", kind)
    task = choices.add_task(annotator, item.id, kind, shown, "random", **more)
    assert choices.choose(task, answer)
    return task


# --- the file

WRITER = """
import sys
from pathlib import Path
from opentao.web.choices import Choices
from opentao.web.next_task import Plan, next_task
choices = Choices(Path(sys.argv[1]))
while True:
    task = next_task(choices, "ann", Plan(repeats=0.0))
    choices.choose(task, {"better": task.shown[0], "worse": task.shown[1]})
    print(task.id, flush=True)
"""


def test_nothing_is_lost_on_kill_9(tmp_path: Path) -> None:
    """What was confirmed before each kill is there after it, whole, and the next process goes on."""
    path = tmp_path / "choices.sqlite"
    first = Choices(path)
    first.add_items(items(200, 4))
    first.add_annotator("ann")
    first.close()
    confirmed: list[str] = []
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        confirmed += [writer.stdout.readline().strip() for _ in range(25)]
        writer.send_signal(signal.SIGKILL)
        confirmed += writer.stdout.read().split()
        writer.wait()
    made = Choices(path).choices()
    assert len(confirmed) >= 75
    assert [t for t in confirmed if t not in {c.task.id for c in made}] == []
    assert len({c.task.id for c in made}) == len(made) <= len(confirmed) + 3
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_tokens_are_known_by_their_hash_only(choices: Choices) -> None:
    token = choices.add_annotator("cy")
    assert choices.annotator_of(token) == "cy"
    assert choices.annotator_of("") is None and choices.annotator_of(token + "x") is None
    assert choices.annotator_of("\ud800") is None
    newer = choices.add_annotator("cy")
    assert choices.annotator_of(token) is None and choices.annotator_of(newer) == "cy"
    choices.close()
    assert newer.encode() not in choices.path.read_bytes()


def test_items_never_change_and_equal_answers_are_one(choices: Choices) -> None:
    assert choices.add_items(items(5)) == 1
    assert len(choices.items()) == 5
    assert item_of([], ["a", "b", "a"]).responses == ("a", "b")


def test_a_second_click_changes_nothing(choices: Choices) -> None:
    item = choices.items()[0]
    task = judge(choices, "ann", item, (0, 1), {"better": 0, "worse": 1})
    assert not choices.choose(task, {"better": 1, "worse": 0})
    assert [c.answer for c in choices.choices()] == [{"better": 0, "worse": 1}]


def test_undo_opens_the_task_again_and_keeps_the_trace(choices: Choices) -> None:
    item = choices.items()[0]
    first = judge(choices, "ann", item, (0, 1), {"better": 0, "worse": 1})
    last = judge(choices, "ann", item, (0, 2), {"better": 2, "worse": 0})
    later = next_task(choices, "ann", Plan())
    assert choices.undo("ann")
    assert next_task(choices, "ann", Plan()) == choices.open_task("ann")
    assert choices.open_task("ann").id == last.id  # type: ignore[union-attr]
    assert choices.choose(last, {"tie": True})
    assert choices.open_task("ann").id == later.id  # type: ignore[union-attr]
    assert [c.answer for c in choices.choices("ann")] == [{"better": 0, "worse": 1}, {"tie": True}]
    assert choices.undo("ann") and choices.undo("ann") and not choices.undo("ann") and not choices.undo("bo")
    assert choices.open_task("ann").id == first.id  # type: ignore[union-attr]
    rows = sqlite3.connect(choices.path).execute("SELECT count(*), count(undone) FROM choices").fetchone()
    assert rows == (3, 3)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("pair", {"better": 0, "worse": 0}),
        ("pair", {"better": 0, "worse": 2}),
        ("pair", {"better": 0}),
        ("pair", {"tie": False}),
        ("pair", {"order": [0, 1]}),
        ("rank", {"order": []}),
        ("rank", {"order": [0, 0]}),
        ("rank", {"order": [0, 7]}),
        ("rank", {"better": 0, "worse": 1}),
        ("mark", {"right": 1}),
        ("mark", {}),
        ("pair", {"skip": False}),
    ],
)
def test_answers_that_are_none(choices: Choices, kind: Any, answer: dict[str, Any]) -> None:
    task = choices.add_task("ann", choices.items()[0].id, kind, (0, 1), "random")
    with pytest.raises(DataError, match=f"not an answer to a {kind} task"):
        choices.choose(task, answer)
    assert choices.choices() == []


def test_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is not a database, it is a text of some length")
    with pytest.raises(DataError, match="not a file of choices"):
        Choices(tmp_path / "text")
    newer = sqlite3.connect(tmp_path / "newer.sqlite")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(DataError, match="another version of opentao"):
        Choices(tmp_path / "newer.sqlite")


# --- what comes next


def work_through(choices: Choices, annotator: str, plan: Plan, most: int = 1000) -> list[Task]:
    """Judge all there is; always the answer with the smaller index."""
    tasks = []
    while len(tasks) < most and (task := next_task(choices, annotator, plan)) is not None:
        a, b = sorted(task.shown)
        choices.choose(task, {"better": a, "worse": b})
        tasks.append(task)
    return tasks


def test_every_pair_comes_once_in_either_order(tmp_path: Path) -> None:
    choices = Choices(tmp_path / "c.sqlite")
    choices.add_items(items(30, 3))
    choices.add_annotator("ann")
    tasks = work_through(choices, "ann", Plan(repeats=0.0))
    assert len(tasks) == len({(t.item, *sorted(t.shown)) for t in tasks}) == 90
    swapped = sum(t.shown[0] > t.shown[1] for t in tasks)
    assert 25 <= swapped <= 65
    assert next_task(choices, "ann", Plan(repeats=0.0)) is None


def test_two_people_at_once_are_shown_different_pairs(tmp_path: Path) -> None:
    """What is open with one is held back from the other, unless it is for everybody; not for ever."""
    choices = Choices(tmp_path / "c.sqlite")
    choices.add_items(items(2, 2))
    for name in ("ann", "bo", "cy"):
        choices.add_annotator(name)
    plan = Plan(repeats=0.0, overlap=0.0, information={i.id: np.ones((2, 2)) for i in choices.items()})
    first, second = (next_task(choices, name, plan) for name in ("ann", "bo"))
    assert first and second and first.item != second.item
    assert next_task(choices, "cy", plan) is None
    with choices.db:
        choices.db.execute("UPDATE tasks SET issued = issued - 3600 WHERE annotator = 'ann'")
    again = next_task(choices, "cy", plan)
    assert again and again.item == first.item


def test_a_reload_shows_the_same(choices: Choices) -> None:
    assert next_task(choices, "ann", Plan()) == next_task(choices, "ann", Plan())


def test_a_share_of_tasks_is_repeated_later_and_once(tmp_path: Path) -> None:
    choices = Choices(tmp_path / "c.sqlite")
    choices.add_items(items(60, 3))
    choices.add_annotator("ann")
    tasks = work_through(choices, "ann", Plan(repeats=0.2), most=150)
    again = [t for t in tasks if t.repeat_of]
    assert 15 <= len(again) <= 45
    assert len({t.repeat_of for t in again}) == len(again)
    place = {t.id: n for n, t in enumerate(tasks)}
    assert all(place[t.id] - place[str(t.repeat_of)] > 5 for t in again)
    assert with_oneself(choices.choices()) == {"ann": {"agreement": 1.0, "units": len(again)}}


def test_a_ranking_agrees_with_itself_pair_by_pair(choices: Choices) -> None:
    """As it agrees with another person's: two of three pairs are alike after one swap."""
    item = choices.items()[0]
    judge(choices, "ann", item, (0, 1, 2), {"order": [0, 1, 2]})
    judge(choices, "bo", item, (0, 1, 2), {"order": [1, 0, 2]})
    [first] = choices.choices("ann")
    again = choices.add_task("ann", item.id, "rank", [2, 1, 0], "repeat", repeat_of=first.task.id)
    choices.choose(again, {"order": [1, 0, 2]})
    found = choices.choices()
    assert with_oneself(found) == {"ann": {"agreement": pytest.approx(2 / 3), "units": 3}}
    assert between(found)["ann"] == with_oneself(found)["ann"]


def test_what_teaches_most_comes_first(choices: Choices) -> None:
    """One informative pair a prompt, the most informative first; then the others."""
    all_items = choices.items()
    rng = np.random.default_rng(0)
    information = {item.id: pair_information(rng.normal(0, 2, (3, 4)).tolist()) for item in all_items}
    tasks = work_through(choices, "ann", Plan(repeats=0.0, information=information), most=4)
    assert {t.policy for t in tasks} == {"informative"}
    values = [information[t.item][tuple(sorted(t.shown))] for t in tasks]
    assert values == sorted(values, reverse=True)
    assert len({t.item for t in tasks}) == 4
    assert values[0] == max(float(table.max()) for table in information.values())


def test_information_by_hand() -> None:
    sure_and_split = pair_information([[20.0, -20.0], [-20.0, 20.0]])
    assert sure_and_split[0, 1] == pytest.approx(math.log(2), abs=1e-6)
    unsure = pair_information([[0.0, 0.0], [0.0, 0.0]])
    agreed = pair_information([[3.0, 3.0], [0.0, 0.0]])
    assert unsure[0, 1] == pytest.approx(0) and agreed[0, 1] == pytest.approx(0)
    p = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))]

    def entropy(x: float) -> float:
        return -x * math.log(x) - (1 - x) * math.log(1 - x)

    found = pair_information([[1.0, -2.0], [0.0, 0.0]])
    assert found[0, 1] == pytest.approx(entropy(sum(p) / 2) - sum(map(entropy, p)) / 2)
    assert np.allclose(found, found.T) and np.all(np.diag(found) == 0)


def test_some_pairs_are_for_everybody(tmp_path: Path) -> None:
    choices = Choices(tmp_path / "c.sqlite")
    choices.add_items(items(60, 3))
    for name in ("ann", "bo"):
        choices.add_annotator(name)
    plan = Plan(repeats=0.0, overlap=0.25)
    ann, bo = (work_through(choices, name, plan) for name in ("ann", "bo"))
    assert len(ann) == 180
    assert 25 <= len(bo) <= 65
    assert alpha(choices.choices()) == {"alpha": None, "units": len(bo)}  # everybody always said the same


def test_what_is_for_everybody_comes_to_everybody_who_stops_early(tmp_path: Path) -> None:
    choices = Choices(tmp_path / "c.sqlite")
    choices.add_items(items(100, 6))  # 1,500 pairs, and nobody judges them all
    for name in ("ann", "bo"):
        choices.add_annotator(name)
    plan = Plan(repeats=0.0, overlap=0.3)
    ann, bo = (work_through(choices, name, plan, most=80) for name in ("ann", "bo"))
    shared = {(t.item, *sorted(t.shown)) for t in ann} & {(t.item, *sorted(t.shown)) for t in bo}
    assert len(shared) == sum(for_everybody((t.item, *sorted(t.shown)), plan) for t in ann) > 10
    assert len({t.item for t in ann}) == 80  # one pair of each prompt before a second of any


def test_what_one_person_skips_is_left_to_others(choices: Choices) -> None:
    plan = Plan(repeats=0.0, overlap=0.0)
    task = next_task(choices, "ann", plan)
    assert task is not None
    choices.choose(task, {"skip": True})
    assert (task.item, *sorted(task.shown)) in {(t.item, *sorted(t.shown)) for t in work_through(choices, "bo", plan)}
    assert (task.item, *sorted(task.shown)) not in {
        (t.item, *sorted(t.shown)) for t in work_through(choices, "ann", plan)
    }


def test_only_what_was_named_is_asked(choices: Choices) -> None:
    wanted = choices.items()[2].id
    tasks = work_through(choices, "ann", Plan(repeats=0.0, items=frozenset({wanted})))
    assert {t.item for t in tasks} == {wanted} and len(tasks) == 3


def test_another_source_in_the_same_file_is_left_alone(choices: Choices) -> None:
    """Its open task and repeats are not shown, u does not take back what was judged there, and it does not count."""
    first, second = (frozenset({item.id}) for item in choices.items()[:2])
    earlier, later = Plan(repeats=0.0, items=first), Plan(repeats=1.0, items=second)
    judged = work_through(choices, "ann", earlier, most=2)
    waiting = next_task(choices, "ann", earlier)
    assert waiting is not None and not replace(earlier, kind="mark").fits(waiting)
    assert _facts(choices, later, "ann", None)["done"] == 0
    tasks = work_through(choices, "ann", later)
    assert tasks and {t.item for t in tasks} == second
    for _ in tasks:
        assert choices.undo("ann", later.fits)
    assert not choices.undo("ann", later.fits)
    assert [c.task for c in choices.choices("ann")] == judged
    assert next_task(choices, "ann", earlier) == waiting


def test_units_of_each_kind() -> None:
    (item,) = items(1, 3)
    assert units(item, Plan(kind="pair")) == [(item.id, 0, 1), (item.id, 0, 2), (item.id, 1, 2)]
    assert units(item, Plan(kind="rank")) == [(item.id, 0, 1, 2)]
    assert units(item, Plan(kind="rank", most=2)) == [(item.id, 0, 1)]
    assert units(item, Plan(kind="mark")) == [(item.id, 0), (item.id, 1), (item.id, 2)]


# --- agreement


def test_alpha_by_hand(choices: Choices) -> None:
    """Four pairs, two people: first first, first second, second second, second second: 1 − 7·2/30."""
    for item, ann, bo in zip(choices.items(), (0, 0, 1, 1), (0, 1, 1, 1), strict=True):
        judge(choices, "ann", item, (0, 1), {"better": ann, "worse": 1 - ann})
        judge(choices, "bo", item, (1, 0), {"better": bo, "worse": 1 - bo})  # the order on the page does not matter
    found = alpha(choices.choices())
    assert found["units"] == 4
    assert found["alpha"] == pytest.approx(1 - 7 * 2 / 30)
    assert between(choices.choices())["ann"] == {"agreement": 0.75, "units": 4}


def test_rankings_speak_of_pairs(choices: Choices) -> None:
    item = choices.items()[0]
    judge(choices, "ann", item, (0, 1, 2), {"order": [2, 0, 1]})
    judge(choices, "bo", item, (2, 1, 0), {"order": [2]})
    assert between(choices.choices())["ann"] == {
        "agreement": 1.0,
        "units": 2,
    }  # 2 over 0 and over 1; bo left 0 and 1 open


def test_skips_and_single_judges_say_nothing(choices: Choices) -> None:
    item = choices.items()[0]
    judge(choices, "ann", item, (0, 1), {"skip": True}, kind="pair")
    judge(choices, "bo", item, (0, 1), {"tie": True})
    assert alpha(choices.choices()) == {"alpha": None, "units": 0}
    assert between(choices.choices()) == {}


# --- preference rows


def test_choices_as_preference_rows(choices: Choices, tmp_path: Path) -> None:
    a, b, c, d = choices.items()
    judge(choices, "ann", a, (2, 0), {"better": 2, "worse": 0})
    judge(choices, "ann", b, (0, 1), {"tie": True, "both_bad": True})
    judge(choices, "bo", c, (2, 0, 1), {"order": [1, 2]})
    judge(choices, "bo", a, (0, 1), {"skip": True}, kind="pair")
    for index, right in ((0, False), (2, True)):
        judge(choices, "ann", d, (index,), {"right": right})
    judge(choices, "bo", d, (0,), {"right": True})
    found = rankings_of(choices)
    assert [(r.texts, r.ranks, r.ties_equal, r.annotator) for r in found] == [
        (("answer 0.0", "answer 0.2"), (2.0, 1.0), True, "ann"),
        (("answer 1.0", "answer 1.1"), (1.0, 1.0), True, "ann"),
        (("answer 2.0", "answer 2.1", "answer 2.2"), (3.0, 1.0, 2.0), False, "bo"),
        (("answer 3.0", "answer 3.2"), (2.0, 1.0), False, "ann"),
    ]
    assert [r.facts["order"] for r in found] == [[1, 0], [0, 1], [2, 0, 1], [0, 1]]
    assert found[1].facts["both_bad"] is True
    write_preferences(tmp_path / "out.jsonl", found)
    again = read_preferences(tmp_path / "out.jsonl")
    assert again.rankings == found and again.set_aside == []
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert set(row) == {"messages", "responses", "ranks", "annotator", "time", "order", "id", "policy"}


def test_what_is_exported_can_be_imported(choices: Choices, tmp_path: Path) -> None:
    for n, item in enumerate(choices.items()):
        judge(choices, "ann", item, (1, 0), {"better": n % 2, "worse": 1 - n % 2})
        judge(choices, "bo", item, (0, 1, 2), {"order": [2, 0, 1]})
    exported = rankings_of(choices)
    other = Choices(tmp_path / "other.sqlite")
    assert import_rankings(other, exported) == 8
    again = rankings_of(other)
    keep = [(r.prompt.id, r.texts, r.ranks, r.annotator, r.facts["order"]) for r in exported]
    assert [(r.prompt.id, r.texts, r.ranks, r.annotator, r.facts["order"]) for r in again] == keep
    assert Counter(c.task.policy for c in other.choices()) == {"import": 8}


def test_a_ranking_with_equals_is_imported_as_pairs(tmp_path: Path) -> None:
    ranking = Ranking(prompt=Prompt.from_text("x"), texts=("a", "b", "c"), ranks=(1.0, 1.0, 2.0))
    choices = Choices(tmp_path / "c.sqlite")
    assert import_rankings(choices, [ranking]) == 3
    assert sorted((r.texts, r.ranks) for r in rankings_of(choices)) == [
        (("a", "b"), (1.0, 1.0)),
        (("a", "c"), (1.0, 2.0)),
        (("b", "c"), (1.0, 2.0)),
    ]


def test_right_answers_are_not_ordered_by_the_way(choices: Choices, tmp_path: Path) -> None:
    """Of two right answers beside a wrong one nobody said which is better."""
    item = choices.items()[0]
    for place, right in ((0, True), (1, True), (2, False)):
        judge(choices, "ann", item, (place,), {"right": right})
    [exported] = rankings_of(choices)
    other = Choices(tmp_path / "other.sqlite")
    assert import_rankings(other, [exported]) == 2
    a, b, c = item.responses
    assert sorted((r.texts, r.ranks) for r in rankings_of(other)) == [((a, c), (1.0, 2.0)), ((b, c), (1.0, 2.0))]


def test_an_export_imported_where_it_came_from_changes_nothing(choices: Choices) -> None:
    """Marks are exported as rankings, under the id of one of them."""
    first, second, *_ = choices.items()
    for item, most in ((first, 2), (second, 3)):
        for place in range(most):
            judge(choices, "ann", item, (place,), {"right": place > 0})
    exported = rankings_of(choices)
    assert len(exported) == 2
    assert import_rankings(choices, exported) == 0
    assert rankings_of(choices) == exported


def test_a_file_imported_twice_changes_nothing(tmp_path: Path) -> None:
    time, prompt = "2026-01-02T03:04:05+00:00", Prompt.from_text("x")
    rankings = [
        Ranking(prompt=prompt, texts=("a", "b"), ranks=(1.0, 2.0), annotator="ann", facts={"time": time}),
        Ranking(prompt=prompt, texts=("a", "b"), ranks=(1.0, 2.0), annotator="ann", facts={"repeat": True}),
        Ranking(prompt=prompt, texts=("4", "4", "5"), ranks=(1.0, 1.0, 2.0)),
        Ranking(prompt=prompt, texts=("5", "5"), ranks=(1.0, 1.0)),
        Ranking(prompt=prompt, texts=("c", "d"), ranks=(1.0, 2.0)),
        Ranking(prompt=prompt, texts=("c", "d"), ranks=(1.0, 2.0)),  # somebody else, who also has no name
    ]
    choices = Choices(tmp_path / "c.sqlite")
    assert [import_rankings(choices, rankings) for _ in range(2)] == [5, 0]
    made = rankings_of(choices)
    assert made[0].facts["time"] == "2026-01-02T03:04:05.000+00:00"
    assert [r.facts.get("repeat", False) for r in made if r.annotator == "ann"] == [False, True]
    assert choices.open_task("import") is None


# --- what there is to judge


def test_ids_of_two_files_may_be_alike(choices: Choices) -> None:
    """Row numbers as ids are common; another choice of the same id is another choice."""
    files = [
        [Ranking(prompt=Prompt.from_text(q), texts=("a", "b"), ranks=(1.0, 2.0), annotator=who, facts={"id": "1"})]
        for q, who in (("one", "ann"), ("two", "ann"), ("one", "bo"))
    ]
    assert [import_rankings(choices, file) for file in files] == [1, 1, 1]
    assert [import_rankings(choices, file) for file in files] == [0, 0, 0]
    assert len(rankings_of(choices)) == 3
    together = [replace(r, facts={"id": "7"}, annotator="cy") for file in files[:2] for r in file]
    assert [import_rankings(choices, together) for _ in range(3)] == [2, 0, 0]


def test_an_earlier_export_does_not_bring_back_what_was_taken_back(choices: Choices) -> None:
    import_rankings(
        choices, [Ranking(prompt=Prompt.from_text("x"), texts=("a", "b"), ranks=(1.0, 2.0), annotator="ann")]
    )
    assert not choices.undo("ann")  # what came from elsewhere is not what she just pressed
    task = judge(choices, "ann", choices.items()[0], (0, 1), {"better": 0, "worse": 1})
    exported = rankings_of(choices)
    assert choices.undo("ann")
    choices.choose(task, {"better": 1, "worse": 0})
    assert import_rankings(choices, exported) == 0
    assert [r.ranks for r in rankings_of(choices)] == [(1.0, 2.0), (2.0, 1.0)]


def test_a_kill_between_an_imported_task_and_its_choice_loses_nothing(
    choices: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Ranking(prompt=Prompt.from_text("x"), texts=("a", "b"), ranks=(1.0, 2.0), annotator="ann", facts={"id": "7"})

    def killed(*_: object, **__: object) -> bool:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(Choices, "choose", killed)
        with pytest.raises(RuntimeError):
            import_rankings(choices, [row])
    assert import_rankings(choices, [row]) == 1
    assert [r.ranks for r in rankings_of(choices)] == [(1.0, 2.0)]


def test_a_start_that_fails_leaves_links_as_they_are(choices: Choices) -> None:
    token = choices.add_annotator("ann")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="--port"):
            _serve(choices, Plan(), ["ann"], "127.0.0.1", taken.getsockname()[1])
    assert choices.annotator_of(token) == "ann"


def test_what_a_row_says_beside_the_choice_is_kept(choices: Choices, tmp_path: Path) -> None:
    given = {"instruction": "cites the filing", "margin": 2.0, "subset": "finance"}
    ranking = Ranking(prompt=Prompt.from_text("x"), texts=("a", "b"), ranks=(1.0, 2.0), annotator="ann", **given)
    plain = Ranking(prompt=Prompt.from_text("x"), texts=("a", "b"), ranks=(1.0, 2.0), annotator="ann")
    assert import_rankings(choices, [ranking, plain]) == 2
    write_preferences(tmp_path / "out.jsonl", rankings_of(choices))
    exported = read_preferences(tmp_path / "out.jsonl").rankings
    assert [(r.instruction, r.margin, r.subset) for r in exported] == [tuple(given.values()), ("", 1.0, "")]
    assert import_rankings(choices, exported) == 0


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "choices.sqlite"
    old = SCHEMA.replace(",\n  extra TEXT NOT NULL DEFAULT '{}'", "")
    assert old != SCHEMA
    with closing(sqlite3.connect(path)) as db:
        db.executescript(old + "PRAGMA user_version = 1;")
        db.execute("INSERT INTO annotators VALUES ('ann', 'hash')")
        db.execute('INSERT INTO items VALUES (\'i\', 0, \'[{"role":"user","content":"x"}]\', \'["a","b"]\')')
        db.execute("INSERT INTO tasks VALUES ('t', 'ann', 'i', 'pair', '[0,1]', NULL, 'random', 1.0)")
        db.execute("INSERT INTO choices VALUES (1, 't', 2.0, 1.0, '{\"better\":1,\"worse\":0}', NULL)")
        db.commit()
    [ranking] = rankings_of(Choices(path))
    assert (ranking.texts, ranking.ranks, ranking.subset) == (("a", "b"), (2.0, 1.0), "")
    assert len(rankings_of(Choices(path))) == 1


def test_a_database_of_others_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "concerts.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE singer (name TEXT)")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(DataError, match="not a file of choices: an SQLite file with other tables"):
        Choices(path)
    assert path.read_bytes() == before


def test_an_export_does_not_write_over_the_choices(choices: Choices) -> None:
    import_rankings(choices, [Ranking(prompt=Prompt.from_text("x"), texts=("a", "b"), ranks=(1.0, 2.0))])
    choices.close()
    command = ["label", "export", "--db", str(choices.path), "--out", str(choices.path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "holds the choices; name another file" in result.stderr
    assert len(Choices(choices.path).choices()) == 1


def test_rows_set_aside_are_said_with_the_reason(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n{"prompt": "x"}\n')
    command = ["label", "import", "--db", str(tmp_path / "c.sqlite"), "--pairs", str(pairs)]
    said = CliRunner().invoke(app, command).stdout
    assert "1 choices added" in said and "1 rows set aside, first: line 2: expected `chosen` and `rejected`" in said
    [aside] = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["rows_set_aside"]
    assert aside["line"] == 2


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (("--kind", "rank", "--reward-model", "rm"), "--reward-model orders pairs, --kind is rank"),
        (("--annotator", " "), "--annotator: expected a name"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, given: tuple[str, ...], complaint: str) -> None:
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "x", "responses": ["a", "b"]}\n')
    result = CliRunner().invoke(app, ["label", "start", str(rows), "--db", str(tmp_path / "c.sqlite"), *given])
    assert result.exit_code == 2 and complaint in result.stderr
    assert not (tmp_path / "c.sqlite").exists()


def test_half_an_emoji_is_an_error_with_its_line(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "x", "responses": ["a", "b"]}\n{"prompt": "x", "responses": ["\\ud83d", "b"]}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid Unicode"):
        read_items(source)


def test_held_out_prompts_are_not_shown(tmp_path: Path) -> None:
    """A reward model of their choices would know the prompts that judge it."""

    def groups(*prompts: str) -> Any:
        return groups_to_table([Group.of_texts(Prompt.from_text(p), ["a", "b"]) for p in prompts])

    with Run(tmp_path / "run") as run:
        run.write_table("round-0/eval/groups/00000.parquet", "key", groups("held out"))
    with pytest.raises(DataError, match="answers to held-out prompts only"):
        read_items(tmp_path / "run")
    with Run(tmp_path / "run") as run:
        run.write_table("round-1/groups/00000.parquet", "key", groups("first"))
        run.write_table("round-2/groups/00000.parquet", "key", groups("second"))
        run.write_table("round-2/eval/groups/00000.parquet", "key", groups("held out"))
    assert [i.messages[-1]["content"] for i in read_items(tmp_path / "run")[0]] == ["second", "first"]


def test_items_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x", "responses": ["a", "b", "a"]}\n{"prompt": "y", "responses": ["a", "a"]}\n')
    items, without = read_items(path)
    assert [i.responses for i in items] == [("a", "b")]
    assert without == 1
    for bad, reason in (
        ('{"prompt": "x"}', "rows.jsonl:1: responses: expected a list of texts"),
        ('{"responses": ["a", "b"]}', "rows.jsonl:1: expected `prompt`"),
        ("{", "rows.jsonl:1: invalid JSON in the row"),
        ("", "no prompt with at least two different answers"),
    ):
        path.write_text(bad)
        with pytest.raises(DataError, match=reason):
            read_items(path)
