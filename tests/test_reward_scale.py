"""Calibration of any scorer to people's choices, the file it leaves, and gates."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from opentao.cli import app
from opentao.config import ScorerConfig
from opentao.errors import ConfigError, DataError
from opentao.preferences import Ranking, write_preferences
from opentao.progress import Progress
from opentao.reward_scale import calibrate_scorer, comparisons, log_loss
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import Gate, combine, run_scorer, run_scorer_many
from opentao.types import NAN, Group, Prompt, Response, Score


def choices(number: int, steepness: float, seed: int = 0) -> list[Ranking]:
    """Two answers of different length; people prefer the longer one with probability σ(steepness · words more)."""
    rng = np.random.default_rng(seed)
    rankings = []
    for i in range(number):
        a, b = (int(n) for n in rng.integers(1, 12, 2))
        first = rng.random() < 1 / (1 + math.exp(-steepness * (a - b)))
        texts = (" ".join("w" * a), " ".join("w" * b) + " !")
        rankings.append(
            Ranking(prompt=Prompt.from_text(f"p{i}"), texts=texts, ranks=(1.0, 2.0) if first else (2.0, 1.0))
        )
    return rankings


def words() -> Any:
    args = {"function": "toy_scorers:longer"}
    return build_scorer(ScorerConfig(type="python", name="words", args=args))


def test_the_scale_of_simulated_people_is_found() -> None:
    """The toy scorer counts characters: two a word, and the second answer has one mark more."""
    facts = calibrate_scorer(words(), choices(2000, 0.5), Progress(quiet=True))
    assert facts["scale"] == pytest.approx(0.25, rel=0.15)
    assert facts["pairs"] == 2000 and facts["unscored"] == {}
    assert facts["log_loss"] < facts["log_loss_uncalibrated"] < 5
    assert facts["log_loss"] < facts["log_loss_coin"]
    assert 0.7 < facts["accuracy"]["low"] < facts["accuracy"]["high"] < 0.95


def test_what_is_unscored_is_counted_and_left_out() -> None:
    scorer = build_scorer(ScorerConfig(type="python", args={"function": "toy_scorers:letters_or_nothing"}))
    rankings = [Ranking(prompt=Prompt.from_text("unscorable"), texts=("a", "1"), ranks=(1.0, 2.0))] * 3
    facts = calibrate_scorer(scorer, rankings, Progress(quiet=True))
    assert facts == {"scale": None, "pairs": 0, "other_instructions": 0, "unscored": {"no_score": 6}}


def test_choices_by_other_instructions_do_not_count() -> None:
    """Short answers are good by one and bad by the other: together they would say that nothing is."""
    by_length = choices(400, 0.5)
    turned = [replace(r, ranks=r.ranks[::-1], instruction="Prefer short answers.") for r in by_length]
    alone, mixed = (calibrate_scorer(words(), rows, Progress(quiet=True)) for rows in (by_length, by_length + turned))
    assert mixed == alone | {"other_instructions": 400}
    with pytest.raises(DataError, match="no rows have none, as the scorer has"):
        calibrate_scorer(words(), [*turned, replace(turned[0], instruction="Prefer long ones.")], Progress(quiet=True))


def test_comparisons_by_hand() -> None:
    prompt = Prompt.from_text("x")
    ranking = Ranking(prompt=prompt, texts=("a", "b", "c"), ranks=(1.0, 2.0, 2.0))
    found = comparisons([ranking], [[3.0, 1.0, NAN]])
    assert (found.differences, found.wins) == ([2.0], [1.0])
    found = comparisons([ranking], [[3.0, 1.0, 0.5]])
    assert (found.differences, found.wins, found.prompts) == ([2.0, 2.5, 0.5], [1.0, 1.0, 0.5], [0, 0, 0])
    assert log_loss([0.0, 0.0], [1.0, 0.5], 3.0) == pytest.approx(math.log(2))
    assert log_loss([2.0], [1.0], 0.5) == pytest.approx(math.log(1 + math.exp(-1)))


def group_of(*texts: str) -> Group:
    responses = tuple(
        Response(id=str(i), text=t, tokens_R=(7,), sampler_logprobs_R=(-1.0,), finish="stop")
        for i, t in enumerate(texts)
    )
    return Group(prompt=Prompt.from_text("x"), responses=responses)


def test_from_file_to_scorer(tmp_path: Path) -> None:
    """The command, its file, and a config that names it."""
    write_preferences(tmp_path / "pairs.jsonl", choices(60, 0.5))
    (tmp_path / "scorer.yaml").write_text("type: length\nargs: {min: 20, slack: 20}\n")
    command = ["reward", "calibrate", "--scorer", str(tmp_path / "scorer.yaml"), "--json"]
    command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "scale.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert json.loads((tmp_path / "scale.json").read_text())["scale"] == facts["scale"] > 0
    config = ScorerConfig(type="length", args={"min": 20, "slack": 20})
    plain = run_scorer(build_scorer(config), group_of("w " * 5, "w " * 30))
    named = config.model_copy(update={"calibration": str(tmp_path / "scale.json")})
    scaled = run_scorer(build_scorer(named), group_of("w " * 5, "w " * 30))
    assert [s.value for s in scaled] == pytest.approx([s.value * facts["scale"] for s in plain])


def test_choices_of_one_prompt_stay_together() -> None:
    """Or one half would know the other half's pairs."""
    rankings = [choice for choice in choices(6, 0.5) for _ in range(3)]
    found = comparisons(rankings, [[1.0, 0.0]] * len(rankings))
    assert found.prompts == [i for i in range(6) for _ in range(3)]


def test_scores_inside_a_group_have_no_scale(tmp_path: Path) -> None:
    (tmp_path / "scorer.yaml").write_text("{type: judge, args: {url: 'http://127.0.0.1:9/v1', model: m}}")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    command = ["reward", "calibrate", "--scorer", str(tmp_path / "scorer.yaml")]
    result = CliRunner().invoke(app, [*command, "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "c")])
    assert result.exit_code == 2
    assert "judges inside a group" in result.output.replace("\n", " ")


def test_a_calibrated_scorer_keeps_reasons_and_batches(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    path.write_text('{"scale": 2}')
    config = ScorerConfig(type="exact", args={"key": "label"}, calibration=str(path))
    (score,) = run_scorer(build_scorer(config), group_of("a"))
    assert (score.error or "").startswith("missing_key")
    judge = ScorerConfig(type="judge", args={"url": "http://127.0.0.1:9/v1", "model": "m"}, calibration=str(path))
    built = build_scorer(judge)
    assert hasattr(built, "score_many")
    assert all(len(scores) == 1 for scores in run_scorer_many(built, [group_of("a"), group_of("b")]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "scale: expected a number above 0, got None"),
        ('{"scale": 0}', "scale: expected a number above 0, got 0"),
        ('{"scale": true}', "scale: expected a number above 0, got True"),
    ],
)
def test_bad_calibration_files(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "scale.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=reason):
        build_scorer(ScorerConfig(type="length", args={"min": 1}, calibration=str(path)))


def test_bad_commands(tmp_path: Path) -> None:
    write_preferences(tmp_path / "pairs.jsonl", choices(3, 0.5))
    (tmp_path / "scorer.yaml").write_text("type: length\nweigth: 2\n")
    command = ["reward", "calibrate", "--scorer", str(tmp_path / "scorer.yaml")]
    command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "scale.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert f"{tmp_path}/scorer.yaml:2: weigth: unknown key; expected one of: type, name, weight" in result.output
    (tmp_path / "scorer.yaml").write_text("type: exact\nargs: {key: label}\n")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "no two compared answers have a score: {'missing_key': 6}" in result.output


# --- gates


def test_a_failed_gate_caps_the_reward() -> None:
    scores = {
        "a": [Score(value=v) for v in (5.0, 2.0, -1.0, 4.0)],
        "rule": [Score(value=v) for v in (0.0, 1.0, 0.0, NAN)],
    }
    gates = {"rule": Gate(at_least=1.0, cap=0.5)}
    found = combine(scores, {"a": 1.0, "rule": 0.0}, gates)
    assert found[:3] == [0.5, 2.0, -1.0] and math.isnan(found[3])
    with pytest.raises(ValueError, match="weights name"):
        combine(scores, {"a": 1.0}, {"other": Gate(at_least=1.0, cap=0.0)})
