"""The demo's own parts: its tickets, who gets a label, the stand-in for people, and the check of its claims."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from opentao.config import load_config
from opentao.demo import (
    CATEGORIES,
    NUM_PREFERENCE_TICKETS,
    SCHEMA,
    config_of,
    messages_of,
    prefer,
    tickets,
    write_tickets,
)
from opentao.errors import StoreError
from opentao.prompts import read_prompts
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import run_scorer
from opentao.split import split
from opentao.types import Group, Prompt, Response

ROOT = Path(__file__).parent.parent


def test_tickets_are_many_varied_and_of_six_categories() -> None:
    rows = tickets()
    counts = Counter(r["category"] for r in rows)
    assert set(counts) == set(CATEGORIES) and len(CATEGORIES) >= 6
    assert min(counts.values()) >= 50
    assert len({r["ticket"] for r in rows}) == len(rows) >= 300
    assert {r["priority"] for r in rows} == {"low", "medium", "high"}


def test_no_single_keyword_gives_a_category_away() -> None:
    """Telling a category by its best word, present or not, misses or mistakes more than half of it."""
    rows = tickets()
    by_word: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for word in set(re.findall(r"\w+", row["ticket"].lower())):
            by_word[word][row["category"]] += 1
    sizes = Counter(r["category"] for r in rows)
    for category in CATEGORIES:
        best = max(2 * c[category] / (sum(c.values()) + sizes[category]) for c in by_word.values())  # F1
        assert best < 0.6, category


def test_labels_are_written_for_the_audit_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path, 3)
    chosen = write_tickets(tmp_path, config, 3)
    assert len(chosen) == NUM_PREFERENCE_TICKETS <= 120
    reading = read_prompts(tmp_path / "tickets.jsonl")
    assert len(reading.prompts) == len(tickets()) - len(chosen) and not reading.set_aside
    asked = {p.messages[-1]["content"] for p in reading.prompts}
    assert not asked & {r["ticket"] for r in chosen}
    sides = split(reading.prompts, config.prompts)
    assert sides.train and not any("category" in p.meta for p in sides.train)
    truth = {r["ticket"]: r["category"] for r in tickets()}
    assert all(p.meta["category"] == truth[p.messages[-1]["content"]] for p in sides.heldout)


def test_seeds_choose_other_tickets(tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir(exist_ok=True)
    first, again, other = (write_tickets(f, config_of(f, s), s) for f, s in zip(folders, (0, 0, 1), strict=True))
    assert first == again != other
    with pytest.raises(StoreError, match=r"tickets\.jsonl: of another seed, or changed by hand; name another"):
        write_tickets(folders[0], config_of(folders[0], 1), 1)


def answer(category: str, summary: str = "A customer asks.") -> str:
    return json.dumps({"category": category, "priority": "low", "summary": summary})


def group_of(texts: list[str], category: str = "bug") -> Group:
    responses = tuple(
        Response(
            id=str(i), text=t, tokens_R=(1,), sampler_logprobs_R=(-1.0,), finish="stop", strategy="plain", seed=i,
            policy="p",
        )
        for i, t in enumerate(texts)
    )  # fmt: skip
    return Group(
        prompt=Prompt(messages=messages_of("It crashes."), meta={"category": category}),
        prompt_tokens_P=(1, 2),
        responses=responses,
    )


def grades(group: Group) -> list[int]:
    """2 right, 1 a wrong category, 0 not the asked JSON: by the demo's own scorers."""
    config = config_of(Path("unused"), 0)
    assert config.audit is not None
    form, right = run_scorer(build_scorer(config.scorers[0]), group), run_scorer(build_scorer(config.audit), group)
    return [int(f.value == 1.0) + int(r.value == 1.0) for f, r in zip(form, right, strict=True)]


def test_people_prefer_the_right_category_to_up_to_three_wrong_ones() -> None:
    texts = ["no JSON", answer("sales"), answer("bug"), answer("billing"), answer("account"), answer("delivery")]
    group = group_of(texts)
    assert grades(group) == [0, 1, 2, 1, 1, 1]
    ranking = prefer(group, grades)
    assert ranking is not None
    assert ranking.texts[0] == texts[2] and ranking.ranks == (1.0, 2.0, 2.0, 2.0)
    assert len(set(ranking.texts)) == 4 and "no JSON" not in ranking.texts
    assert prefer(group_of(["no JSON", answer("sales")]), grades) is None  # nothing right to prefer
    assert prefer(group_of(["no JSON", answer("bug")]), grades) is None  # nothing wrong to compare with


def test_the_demo_runs_what_a_user_could_write(tmp_path: Path) -> None:
    from opentao.config import dump_config

    config = config_of(tmp_path, 0)
    path = tmp_path / "tao.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert set(SCHEMA["properties"]["category"]["enum"]) == set(CATEGORIES)  # type: ignore[index]


def mean(value: float, half: float = 0.1) -> dict[str, Any]:
    return {"mean": value, "low": value - half, "high": value + half, "n": 48}


def summary(first: float, audit: float) -> dict[str, Any]:
    """Base: 2.0 by reward, 2.5 its best of 8, audit 0.2; one category 0.3."""
    return {
        "base": {"best_of": {"8": mean(2.5)}, "audit": {"first_try": mean(0.2)}},
        "rounds": [{"round": 1, "first_try": mean(first), "audit": {"first_try": mean(audit)}}],
        "best_round": 1,
        "baselines": [{"name": "always “bug”", "on": "audit", "value": mean(0.3)}],
    }


@pytest.mark.parametrize(
    ("first", "audit", "expected"),
    [
        (2.6, 0.7, [True, True, True]),
        (2.4, 0.7, [False, True, True]),
        (2.6, 0.45, [True, True, False]),
        (2.6, 0.35, [True, False, False]),
    ],
)
def test_the_check_of_the_claims_can_fail(first: float, audit: float, expected: list[bool]) -> None:
    spec = importlib.util.spec_from_file_location("check_demo", ROOT / "scripts" / "check_demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [holds for _, holds in module.checks(summary(first, audit))] == expected
