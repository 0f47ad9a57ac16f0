"""The experiments' own code: tasks and verifier agree, cells are measured once, numbers over seeds are over prompts."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentao.config import load_config
from opentao.preferences import Ranking
from opentao.types import Prompt

EVIDENCE = Path(__file__).parent.parent / "benchmarks" / "evidence"
sys.path.insert(0, str(EVIDENCE))
import compute  # noqa: E402
import decoders  # noqa: E402
import lab as labs  # noqa: E402
import objectives  # noqa: E402
import page  # noqa: E402
import pooled  # noqa: E402
import records  # noqa: E402
import small  # noqa: E402
import tasks  # noqa: E402


@pytest.fixture
def lab(tmp_path: Path) -> labs.Lab:
    return labs.Lab(work=tmp_path / "work", results=tmp_path / "evidence.json")


class TestTasks:
    @given(st.sampled_from(tasks.TASKS), st.integers(0, 10**6))
    def test_the_verifier_knows_right_from_wrong(self, task: str, seed: int) -> None:
        question, right, wrong = tasks.make(task, random.Random(seed))
        prompt = Prompt.from_text(question)
        assert tasks.right(prompt, right) == tasks.audit(prompt, f" {right}\n") == 1.0
        assert [tasks.right(prompt, text) for text in wrong if text != right] == [0.0] * sum(w != right for w in wrong)

    def test_the_corpus_is_half_right(self) -> None:
        rows = [row for row, _ in zip(tasks.corpus(random.Random(0)), range(2000), strict=False)]
        assert np.mean([answer == tasks.solution(question) for question, answer in rows]) == pytest.approx(
            0.5, abs=0.05
        )

    def test_a_decoder_is_trained_and_writes_what_a_run_can_load(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from opentao.models import load_model

        monkeypatch.setitem(decoders.SIZES, "tiny", (32, 1))
        facts = decoders.train(tasks.corpus, "tiny", tmp_path / "tiny", examples=10 * decoders.BATCH)
        model, tokenizer = load_model(str(tmp_path / "tiny"), dtype=decoders.torch.float32)
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())
        assert (
            tokenizer.decode(tokenizer.encode("Sort by name: lamp, desk 2021-03-03"))
            == "Sort by name: lamp, desk 2021-03-03"
        )
        assert tokenizer.eos_token_id == model.config.eos_token_id


class TestRecords:
    @given(st.integers(0, 10**6))
    def test_the_reward_goes_by_degrees(self, seed: int) -> None:
        question, right, wrong = records.make("records", random.Random(seed))
        prompt = Prompt.from_text(question)
        assert records.right(prompt, right) == records.audit(prompt, f" {right}\n") == 1.0
        record = json.loads(right)
        for text in wrong:
            try:
                same = sum(json.loads(text)[field] == value for field, value in record.items())
            except ValueError:
                same = 0
            assert records.right(prompt, text) == same / 4 < 1 and records.audit(prompt, text) == 0.0

    @pytest.mark.parametrize(
        ("text", "share"),
        [
            ('{"name": "Silva", "city": "Faro", "item": "lamp", "count": "7"}', 3 / 4),
            ('{"name": "Silva", "city": "Faro", "item": "lamp", "count": 7.0}', 3 / 4),
            ('{"name": "Silva", "city": "Faro", "item": "lamp", "count": 7, "note": ""}', 4 / 5),
            ('{"item": "lamp"}', 1 / 4),
            ("[7]", 0.0),
            ("7", 0.0),
            ("", 0.0),
        ],
    )
    def test_shares(self, text: str, share: float) -> None:
        prompt = Prompt.from_text("Write as JSON: Ana Silva from Faro orders 3 lamps and 4 more.")
        assert records.right(prompt, text) == share

    def test_the_corpus_is_half_right(self) -> None:
        rows = [row for row, _ in zip(records.corpus(random.Random(0)), range(2000), strict=False)]
        assert np.mean([answer == records.solution(question) for question, answer in rows]) == pytest.approx(
            0.5, abs=0.05
        )


class TestLab:
    def test_a_cell_is_measured_once(self, lab: labs.Lab) -> None:
        calls: list[int] = []

        def measure() -> dict[str, Any]:
            calls.append(1)
            return {"value": len(calls)}

        first = lab.cell("e", "a/0", measure, {"rate": 1e-4})
        assert lab.cell("e", "a/0", measure, {"rate": 1e-4}) == first
        assert first["value"] == len(calls) == 1
        assert lab.cell("e", "a/1", measure, {"rate": 1e-4})["value"] == 2
        assert set(lab.kept("e")) == {"a/0", "a/1"}

    def test_a_cell_of_other_settings_is_measured_again(self, lab: labs.Lab) -> None:
        for i, rate in enumerate((1e-4, 2e-4, 2e-4, 1e-4)):
            lab.cell("e", "a/0", lambda i=i: {"value": i}, {"rate": rate})
        assert lab.kept("e")["a/0"]["value"] == 3

    def test_a_folder_is_made_again_when_what_it_is_made_of_changed(self, tmp_path: Path) -> None:
        out, calls = tmp_path / "f", []

        def make(out: Path) -> None:
            calls.append(sorted(p.name for p in out.glob("[0-9]")))
            (out / str(len(calls))).touch()
            if len(calls) == 1:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            labs.made(out, ["a"], make)
        first = labs.made_of(labs.made(out, ["a"], make))
        labs.made(out, ["a"], make)
        assert labs.made_of(labs.made(out, ["b"], make)) != first
        assert calls == [[], ["1"], []]  # what stopped goes on, what changed starts from nothing

    def test_what_was_begun_of_something_else_goes_first(self, tmp_path: Path) -> None:
        out = tmp_path / "f"

        def stopped(out: Path) -> None:
            (out / "reward").touch()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            labs.made(out, ["a"], stopped)
        labs.made(out, ["b"], lambda out: (out / "prompts").touch())
        assert sorted(p.name for p in out.iterdir()) == ["made_of", "prompts"]

    def test_a_directory_of_other_settings_goes_first(self, lab: labs.Lab, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        found = []

        def measure() -> dict[str, Any]:
            found.append(directory.exists())
            directory.mkdir(exist_ok=True)
            if len(found) == 1:
                raise ZeroDivisionError
            return {}

        with pytest.raises(ZeroDivisionError):
            lab.cell("e", "a/0", measure, 1, directory)
        for of in (1, 2):
            lab.cell("e", "a/0", measure, of, directory)
        assert found == [False, True, False]

    def test_seeds_of_other_settings_are_not_kept(self, lab: labs.Lab) -> None:
        for of in ("old", "new"):
            for name in ("a/0", "a/1", "b/0", "c"):
                if (of, name) not in {("new", "a/1"), ("new", "b/0")}:
                    lab.cell("e", name, dict, of)
        assert set(lab.kept("e")) == {"a/0", "b/0", "c"}

    def test_a_comment_is_no_change(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one.py", tmp_path / "two.py"
        one.write_text('"""One."""\na = 1  # one\n')
        two.write_text('"""Two."""\n# two\na=1')
        assert labs.meaning(one) == labs.meaning(two)
        two.write_text("a = 2\n")
        assert labs.meaning(one) != labs.meaning(two)

    def test_what_fails_is_not_kept(self, lab: labs.Lab) -> None:
        lab.cell("e", "a", lambda: {"value": 1}, None)
        with pytest.raises(ZeroDivisionError):
            lab.cell("e", "b", lambda: {"value": 1 / 0}, None)
        assert set(lab.kept("e")) == {"a"}

    def test_a_copy_has_no_lock_and_no_policy(self, tmp_path: Path) -> None:
        for name in ("lock", "owner.json", "manifest.jsonl", "round-1/policy/w", "round-1/groups/0"):
            path = tmp_path / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        labs.copy_run(tmp_path / "run", tmp_path / "copy")
        copied = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
        assert copied == {"manifest.jsonl", "round-1/groups/0"}


@pytest.mark.parametrize("names", [tasks.TASKS, records.TASKS])
def test_rates_are_chosen_on_other_questions(names: tuple[str, ...]) -> None:
    own, other = small.QUESTIONS, objectives.OTHER_QUESTIONS
    first = {question for _, question, _ in small.questions(names, own)}
    second = {question for _, question, _ in small.questions(names, other, first)}
    assert len(first) == len(second) == small.NUM_PROMPTS
    assert not first & second


class TestConfigs:
    @pytest.mark.parametrize("variant", objectives.VARIANTS)
    @pytest.mark.parametrize("reward", objectives.REWARDS)
    @pytest.mark.parametrize(
        ("config", "exact"),
        [(small.CONFIG, small.EXACT), (small.RECORDS, small.EXACT_RECORDS)],
        ids=["small", "records"],
    )
    def test_every_variant_is_a_config(
        self, tmp_path: Path, variant: str, reward: str, config: labs.Facts, exact: list[labs.Facts]
    ) -> None:
        (tmp_path / "tao.yaml").write_text(json.dumps({"model": "m"} | config))
        task = objectives.Task(name="t", folder=tmp_path, choosing=tmp_path, exact=exact)
        settings = {"scorers": objectives.scorers(task, reward)} | objectives.VARIANTS[variant]
        assert load_config(tmp_path / "tao.yaml", labs.changes(settings)).audit

    def test_a_quarter_is_turned(self) -> None:
        rankings = [
            Ranking(prompt=Prompt.from_text(str(i)), texts=("a", "b", "c"), ranks=(1.0, 2.0, 2.0)) for i in range(40)
        ]
        turned = [r.ranks for r in small.flip(rankings, 0.25)]
        assert sorted(turned) == [(1.0, 2.0, 2.0)] * 30 + [(2.0, 1.0, 1.0)] * 10


def cell(base: dict[str, float | None], after: dict[str, float]) -> dict[str, Any]:
    sides = {"base": base, "after": after}
    tries = {s: {"id": [*v], "audit": [*v.values()], "reward": [*v.values()]} for s, v in sides.items()}
    return {"first_tries": tries, "verdict": "promote", "wall_seconds": 60.0}


class TestPooled:
    def test_prompts_count_and_seeds_do_not(self) -> None:
        """Each prompt has one value, the mean of its seeds: three equal seeds make no interval narrower."""
        values = {str(i): float(i % 2) for i in range(20)}
        one, three = ([cell(values, values)] * n for n in (1, 3))
        assert pooled.first_try(one, "base", "audit") == pooled.first_try(three, "base", "audit")

    def test_gain_is_prompt_by_prompt(self) -> None:
        cells = [
            cell({"a": 0.0, "b": 1.0, "c": None}, {"a": 1.0, "b": 1.0, "c": 1.0}),
            cell({"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 1.0}),
        ]
        assert pooled.gain(cells, "audit").mean == pytest.approx((0.5 + 0.25) / 2)
        assert pooled.gain(cells, "audit").n == 2
        assert pooled.worst(cells, "audit") == pytest.approx(0.25)

    def test_prompts_of_one_database_are_drawn_together(self) -> None:
        values = {str(i): float(i < 10) for i in range(20)}
        alone = cell(values, values)
        together = cell(values, values)
        base = together["first_tries"]["base"]
        base["db_id"] = [f"{int(value)}{i % 4}" for i, value in enumerate(base["audit"])]
        narrow, wide = (pooled.first_try([c], "base", "audit") for c in (alone, together))
        assert wide.low < narrow.low and narrow.high < wide.high

    def test_one_against_another_is_prompt_by_prompt(self) -> None:
        """Prompts differ far more than the two do: each alone is uncertain, their difference is not."""
        low = {str(i): i / 20 for i in range(20)}
        high = {i: v + 0.1 for i, v in low.items()}
        difference = pooled.better([cell(low, high)], [cell(low, low)], "audit")
        assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))

    def test_apart(self) -> None:
        low, high = ({str(i): v for i in range(20)} for v in (0.2, 0.8))
        assert pooled.clear([cell(low, high)], "audit")
        assert not pooled.clear([cell(high, low)], "audit")


def test_the_page_shows_what_was_measured(lab: labs.Lab) -> None:
    mean = {"mean": 0.5}
    facts = {
        "base": {"best_of": {"16": {"mean": 0.9}}},
        "after": {"kl": mean, "length": mean},
        "seconds": {"train": 1.0},
    }
    for seed in labs.SEEDS:
        made = cell(dict.fromkeys("abcdefgh", 0.25), dict.fromkeys("abcdefgh", 0.75)) | facts
        lab.cell("recipes", f"text_to_sql/{seed}", lambda made=made: dict(made), None)
        lab.cell("objectives", f"small/exact/distill/{seed}", lambda made=made: made | {"rate": 2e-4}, None)
        lab.cell("compute", f"8/{seed}", lambda made=made: {str(r): made for r in compute.ROUNDS}, None)
    text = "\n".join(page.evidence(lab))
    assert "| text_to_sql (3 seeds) | 8 / 8 | 0.250 (0.250 to 0.250) | 0.750 (0.750 to 0.750) | yes | +0.500 |" in text
    assert "| 0.750 (0.750 to 0.750) | 0.900 |" in text  # after, best of 16
    assert "not run" in text
    assert "| distill | 0.0002 | 0.750" in text
    assert "| regress |" not in text
    assert "; 3,072 |" in text  # 8 answers, 4 rounds, 96 prompts
