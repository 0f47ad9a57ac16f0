"""`tao predict`: its maths against brute force, what counts as flat, and that a run asks before it spends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_loop import Tree, go, prompts, scored_by, tree  # noqa: F401  # fixtures

from opentao.bestofn import Interval, paired_difference
from opentao.predict import picked, too_few, why_flat
from opentao.solved import full_marks, solved

HERE = Path(__file__).parent
NAN = math.nan
ARGS = {"confidence": 0.95, "resamples": 200, "seed": 0}
scores = st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.0]), min_size=1, max_size=5)


def by_hand(rewards: list[float], values: list[float], chosen: tuple[int, ...]) -> float:
    """The value of the best by reward; tied ones share evenly."""
    indices = set(chosen)
    best = max(rewards[i] for i in indices)
    tied = [i for i in chosen if rewards[i] == best]
    return sum(values[i] for i in tied) / len(tied)


class TestPicked:
    @given(scores, st.data())
    def test_every_subset(self, rewards: list[float], data: st.DataObject) -> None:
        n = data.draw(st.integers(1, len(rewards)))
        values = [float(i) for i in range(len(rewards))]
        every = [by_hand(rewards, values, chosen) for chosen in combinations(range(len(rewards)), n)]
        assert picked(np.array(rewards), np.array(values), n) == pytest.approx(sum(every) / len(every))

    @given(scores, st.integers(1, 9))
    def test_more_tries_than_answers_are_all_of_them(self, rewards: list[float], more: int) -> None:
        own = np.array(rewards)
        assert picked(own, own, len(rewards) + more) == pytest.approx(max(rewards))

    def test_unscored_answers_take_no_part(self) -> None:
        rewards, values = np.array([1.0, NAN, 3.0, 2.0]), np.array([1.0, 9.0, NAN, 2.0])
        assert picked(rewards, values, 2) == 2.0
        assert math.isnan(picked(np.array([NAN]), np.array([1.0]), 2))


class TestSolved:
    values = [np.array(v) for v in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [NAN, 1.0], [NAN, NAN])]

    def test_shares(self) -> None:
        found = solved(self.values, None, ARGS)
        assert found is not None
        shares = {name: found[name]["mean"] for name in ("always", "sometimes", "never")}
        assert shares == {"always": 0.5, "sometimes": 0.25, "never": 0.25}
        assert (found["at"], found["tries"], found["always"]["n"]) == (1.0, 2, 4)

    def test_of_fewer_tries(self) -> None:
        found = solved(self.values, 1.0, ARGS, tries=1)
        assert found is not None
        assert (found["sometimes"]["mean"], found["always"]["mean"]) == (0.0, 0.5)

    def test_continuous_scores_are_never_solved(self) -> None:
        drawn = np.random.default_rng(0).normal(size=(8, 16))
        assert full_marks(list(drawn)) is None
        assert solved(list(drawn), None, ARGS) is None
        assert full_marks([]) is None

    def test_scores_that_never_differ_are_not_solved(self) -> None:
        """An audit that is 0 on every answer must not read as "always solved"."""
        zeros = [np.zeros(16)] * 8
        assert full_marks(zeros) is None
        assert solved(zeros, None, ARGS) is None
        found = solved(zeros, 1.0, ARGS)
        assert found is not None
        assert found["never"]["mean"] == 1.0

    @given(st.lists(scores, min_size=1, max_size=6))
    def test_shares_sum_to_one(self, values: list[list[float]]) -> None:
        found = solved([np.array(v) for v in values], 1.0, ARGS)
        assert found is not None
        assert sum(found[kind]["mean"] for kind in ("always", "sometimes", "never")) == pytest.approx(1.0)


class TestFlat:
    def test_few_prompts_with_different_rewards(self) -> None:
        assert "on 1 of 64" in str(why_flat([1.0] + [0.0] * 63, 16, None))
        assert why_flat([1.0] * 4 + [0.0] * 60, 16, None) is None
        assert "on 0 of 4" in str(why_flat([0.0] * 4, 16, None))

    def test_prompts_that_nothing_is_known_of_do_not_count(self) -> None:
        assert why_flat([1.0] * 4 + [NAN] * 200, 16, None) is None
        assert "on 0 of 4" in str(why_flat([0.0] * 4 + [NAN] * 60, 16, None))
        assert str(why_flat([NAN] * 64, 16, None)).startswith("Nothing could be scored: ")

    def test_the_audit_has_the_last_word(self) -> None:
        doubtful = Interval(mean=0.02, low=-0.01, high=0.05, n=64)
        assert "the audit of the best of 16 is +0.020" in str(why_flat([1.0] * 64, 16, doubtful))
        assert why_flat([1.0] * 64, 16, Interval(mean=0.02, low=0.01, high=0.03, n=64)) is None

    def test_too_few_to_be_promoted(self) -> None:
        assert too_few(paired_difference([1.0] * 8, [0.0, 0.5] * 4)) is None
        assert "fewer than 8 held-out prompts" in (too_few(paired_difference([1.0] * 7, [0.0] * 7)) or "")

    def test_an_audit_that_says_nothing_forbids_nothing(self) -> None:
        assert why_flat([1.0] * 8, 16, Interval(mean=NAN, low=NAN, high=NAN, n=0)) is None


class TestInARun:
    def test_the_summary_holds_it(self, tmp_path: Path, tree: Tree) -> None:  # noqa: F811
        case = go(tmp_path / "run", tree)
        prediction = case.summary["prediction"]
        assert prediction == json.loads((case.directory / "prediction.json").read_text())
        base = case.summary["base"]
        assert prediction["first_try"] == base["first_try"]
        assert prediction["curve"] == base["best_of"]
        assert prediction["target"]["mean"] >= prediction["curve"]["4"]["mean"] - 1e-9
        assert any(
            "predicted, if all of best-of-4 (all that was sampled; target_n is 16) is baked" in note
            for note in case.notes
        )

    def test_flat_stops_before_any_training(self, tmp_path: Path, tree: Tree) -> None:  # noqa: F811
        asked: list[str] = []

        def no(why: str) -> bool:
            asked.append(why)
            return False

        case = go(tmp_path / "run", scored_by(tree, "constant"), go_on=no)
        assert len(asked) == 1
        assert asked[0].startswith("Nothing to learn from: on 0 of")
        assert case.summary["verdict"] == "keep base"
        assert case.summary["rounds"] == []
        assert case.summary["why"].startswith(asked[0])
        assert not (case.directory / "round-1").exists()
        assert "training would not pay" in (case.directory / "report.html").read_text()

    def test_a_curve_that_rises_asks_nobody(self, tmp_path: Path, tree: Tree) -> None:  # noqa: F811
        def fail(why: str) -> bool:
            raise AssertionError(why)

        assert go(tmp_path / "run", scored_by(tree, "letters"), go_on=fail).summary["rounds"]


class TestCommand:
    def test_predict_then_run_samples_the_base_once(
        self,
        tmp_path: Path,
        tree: Tree,  # noqa: F811
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from opentao.cli import app

        config = tmp_path / "tao.yaml"
        config.write_text(yaml.safe_dump(tree))
        arguments = [str(config), "--run", str(tmp_path / "run")]
        app(["predict", *arguments], standalone_mode=False)
        assert "best of 4, baked" in capsys.readouterr().out
        groups = next((tmp_path / "run/round-0/eval/groups").iterdir())
        before = groups.stat().st_mtime_ns
        app(["predict", *arguments, "--json"], standalone_mode=False)
        assert json.loads(capsys.readouterr().out)["target_n"] == 16
        assert groups.stat().st_mtime_ns == before

    def test_a_person_is_asked(self, tmp_path: Path, tree: Tree) -> None:  # noqa: F811
        """On a terminal: the question, an answer of no, and nothing is trained."""
        config = tmp_path / "tao.yaml"
        config.write_text(yaml.safe_dump(scored_by(tree, "constant")))
        ours, theirs = os.openpty()
        command = [sys.executable, "-m", "opentao", "run", str(config), "--run", str(tmp_path / "run"), "--json"]
        environment = os.environ | {"PYTHONPATH": str(HERE)}
        with subprocess.Popen(
            command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env=environment, text=True
        ) as running:
            os.close(theirs)
            seen = ""
            while "Train all the same? [y/N]" not in seen:
                seen += os.read(ours, 4096).decode(errors="replace")
            os.write(ours, b"n\n")
            summary = json.loads(str(running.communicate(timeout=120)[0]))
        os.close(ours)
        assert "Nothing to learn from" in seen
        assert summary["rounds"] == []
