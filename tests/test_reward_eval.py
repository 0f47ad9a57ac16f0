"""`tao reward eval`: every number by hand, every alarm set off on purpose, the page and the card."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reward_model import JSON, PROSE, toy_rankings, train
from typer.testing import CliRunner

from opentao.canaries import canaries
from opentao.cli import app
from opentao.errors import DataError
from opentao.preferences import Ranking, write_preferences
from opentao.progress import Progress
from opentao.reward_eval import (
    agreement_with_people,
    alarms,
    annotators,
    best_of_n,
    by_subset,
    calibration,
    evaluate_reward_model,
    length_bias,
    other_prompts,
)
from opentao.reward_model import RewardModel
from opentao.reward_report import model_card, write_reward_report
from opentao.reward_scale import comparisons, fit_scale
from opentao.truth import Truth, read_truths
from opentao.types import Prompt

QUIET = Progress(quiet=True)
SIGMOID_1 = 1 / (1 + math.exp(-1))


@pytest.fixture(autouse=True)
def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentao.policy.native_bf16", lambda device: False)
    monkeypatch.setattr("opentao.optimise.native_bf16", lambda device: False)


def pair(better: str, worse: str, prompt: str = "x", **more: Any) -> Ranking:
    return Ranking(prompt=Prompt.from_text(prompt), texts=(better, worse), ranks=(1.0, 2.0), **more)


# --- numbers by hand


def test_agreement_and_subsets() -> None:
    rankings = [pair("aa", "b", subset="s"), pair("a", "bb", subset="s"), pair("aaa", "b", subset="t"), pair("a", "b")]
    scores = [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]
    facts = agreement_with_people(rankings, scores)
    assert facts["accuracy"]["mean"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert facts["longer_wins"]["mean"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert facts["over_longer"]["mean"] == 0.0
    found = by_subset(rankings, scores)
    assert {name: own["accuracy"]["mean"] for name, own in found.items()} == {"s": 0.5, "t": 1.0}
    assert by_subset(rankings[3:], scores[3:]) == {}


def test_choices_of_one_prompt_count_together() -> None:
    """Four people on each of ten prompts say no more than ten do."""
    once = [pair("a", "b", prompt=str(i)) for i in range(10)]
    scores = [[float(i % 2), 0.5] for i in range(10)]
    one = agreement_with_people(once, scores)
    four = agreement_with_people([r for r in once for _ in range(4)], [s for s in scores for _ in range(4)])
    assert (four["prompts"], four["pairs"]) == (10, 40)
    width = [facts["accuracy"]["high"] - facts["accuracy"]["low"] for facts in (one, four)]
    assert width[1] == pytest.approx(width[0], abs=0.11)


def test_an_answer_to_another_prompt_is_to_another_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a prompt follow each other; instructions stay."""
    asked: list[Ranking] = []

    def scored(model: object, rankings: list[Ranking], *_: object) -> list[list[float]]:
        asked.extend(rankings)
        return [[0.0]] * len(rankings)

    monkeypatch.setattr("opentao.reward_eval.score_rankings", scored)
    monkeypatch.setattr("opentao.reward_eval._fits", lambda *_: True)
    rankings = [pair(f"{p}{i} good", f"{p}{i} bad", prompt=p, instruction="be kind") for p in "xyz" for i in range(3)]
    other_prompts(None, rankings, [[1.0, 0.0]] * 9, Progress(quiet=True))  # type: ignore[arg-type]
    assert len(asked) == 9
    assert all(not r.texts[0].startswith(r.prompt.text) and r.instruction == "be kind" for r in asked)


def test_calibration() -> None:
    """Three choices at confidence σ(1) = 0.731, two of them right; two at one half, of which a coin gets one."""
    scores = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    facts = calibration([pair("a", "b")] * 5, scores)
    assert [(c["pairs"], c["accuracy"]["mean"]) for c in facts["curve"]] == [(2, 0.5), (3, pytest.approx(2 / 3))]
    assert [c["confidence"] for c in facts["curve"]] == pytest.approx([0.5, SIGMOID_1])
    assert facts["error"] == pytest.approx((2 * 0 + 3 * (SIGMOID_1 - 2 / 3)) / 5)
    assert facts["loss"] == pytest.approx((2 * math.log(2) - 2 * math.log(SIGMOID_1) - math.log(1 - SIGMOID_1)) / 5)


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_a_calibrated_model_has_little_error(ties: float) -> None:
    """Calibrated on the same choices, ties among them: equally good answers count half, here as there."""
    rng = random.Random(0)
    rankings, raw = [], []
    for _ in range(4000):
        d = rng.gauss(0, 2)
        won = rng.random() < 1 / (1 + math.exp(-d))
        tied = rng.random() < ties
        rankings.append(replace(pair("a", "b"), ranks=(1.0, 1.0)) if tied else pair("a", "b"))
        raw.append([d, 0.0] if won else [0.0, d])
    found = comparisons(rankings, raw)
    scale = fit_scale(found.differences, found.wins)
    scores = [[scale * a, scale * b] for a, b in raw]
    assert calibration(rankings, scores)["error"] < (0.05 if ties else 0.03)
    steep = [[5 * a, 5 * b] for a, b in scores]
    assert calibration(rankings, steep)["error"] > 0.1


def test_few_prompts_prove_nothing() -> None:
    few = [pair("aa", "b", prompt=str(i)) for i in range(7)]
    facts: dict[str, Any] = agreement_with_people(few, [[1.0, 0.0]] * 7)
    facts |= {"score_spread": 1.0, "company": {"largest_move": 0.0}, "canaries": {}}
    facts["other_prompts"] = {"preferred_wins": {"mean": 1.0}}
    assert [alarm.split(":")[0] for alarm in alarms(facts)] == [
        "It is not shown to be better than a coin",
        "It is not shown to be better than “the longer answer wins”.",
    ]


def test_length() -> None:
    rankings = [pair("aaaa", "b"), pair("aaa", "b"), pair("a", "bbb"), pair("a", "b")]
    by_length = [[4.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 1.0]]
    facts = length_bias(rankings, by_length)
    assert facts["longer_preferred"]["mean"] == 1.0 and facts["longer_preferred"]["n"] == 2
    assert facts["shorter_preferred"]["mean"] == 0.0
    assert facts["correlation"] == pytest.approx(1.0)
    assert length_bias(rankings, [[-a, -b] for a, b in by_length])["correlation"] == pytest.approx(-1.0)
    assert length_bias(rankings[:1], [[1.0, 1.0]])["correlation"] is None


def test_annotators() -> None:
    """Two people on three pairs, one of them shown in the other order; ann alone on a fourth, which does not count."""
    rankings = [
        pair("a", "b", "1", annotator="ann"),
        pair("b", "a", "1", annotator="bo"),
        pair("a", "b", "2", annotator="ann"),
        pair("a", "b", "2", annotator="bo"),
        pair("a", "b", "3", annotator="ann"),
        pair("a", "b", "3", annotator="bo"),
        pair("a", "b", "4", annotator="ann"),
    ]
    scores: list[list[float] | None] = [
        [1.0, 0.0],
        [0.0, 1.0],
        [1.0, 0.0],
        [1.0, 0.0],
        [0.0, 1.0],
        [0.0, 1.0],
        [1.0, 0.0],
    ]
    facts = annotators(rankings, scores)
    assert facts["pairs"] == 3
    assert facts["human_human"]["mean"] == pytest.approx(2 / 3)
    assert facts["model_human"]["ann"]["mean"] == pytest.approx(2 / 3)
    assert facts["model_human"]["bo"]["mean"] == pytest.approx(1 / 3)
    assert facts["model_majority"] | {"low": 0, "high": 0} == {"mean": 0.5, "low": 0, "high": 0, "n": 2}
    nobody = annotators([pair("a", "b")], [[1.0, 0.0]])
    nothing = dict.fromkeys(("human_human", "model_majority", "longer_majority"))
    assert nobody == {"pairs": 0, "model_human": {}} | nothing


def test_best_of_n(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that rank the worth exactly backwards for one prompt and exactly for the other."""
    truths = [Truth(prompt=Prompt.from_text(p), texts=("a", "b"), values=(0.0, 1.0)) for p in "xy"]
    monkeypatch.setattr("opentao.reward_eval.score_rankings", lambda *_: [[0.0, 1.0], [1.0, 0.0]])
    facts = best_of_n(None, truths, QUIET)  # type: ignore[arg-type]
    assert [(c["n"], c["picked"]["mean"], c["oracle"]["mean"]) for c in facts["curve"]] == [
        (1, 0.5, 0.5),
        (2, 0.5, 1.0),
    ]
    assert facts["gain"]["mean"] == 0.0 and facts["groups"] == 2


# --- a whole evaluation


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy reward model that prefers JSON."""
    model = RewardModel.from_causal_lm(str(tiny_model_dir))
    train(model, toy_rankings(40), lr=3e-3, epochs=3)
    folder = tmp_path_factory.mktemp("reward") / "rm"
    model.save(folder)
    return folder


def test_a_good_model(trained: Path) -> None:
    facts = evaluate_reward_model(RewardModel.load(str(trained)).for_scoring(), toy_rankings(40, seed=3), QUIET)
    assert facts["accuracy"]["mean"] > 0.95
    assert facts["company"]["largest_move"] < 0.02 * facts["score_spread"]
    assert facts["company"]["answers"] == 2 * 2 * 20
    assert set(facts["canaries"]) == set(canaries("x", "yy"))
    assert not [a for a in facts["alarms"] if "coin" in a or "constant" in a or "what else" in a]
    json.dumps(facts, allow_nan=False)


def test_constant_scores_are_an_alarm(trained: Path) -> None:
    model = RewardModel.load(str(trained))
    with torch.no_grad():
        model.model.score.weight.zero_()
    facts = evaluate_reward_model(model, toy_rankings(10), QUIET)
    assert facts["alarms"] == ["Scores are constant: the model tells no answer from another."]
    assert facts["accuracy"]["mean"] == 0.5


def test_a_coin_is_an_alarm(trained: Path) -> None:
    flipped = [
        Ranking(prompt=r.prompt, texts=r.texts, ranks=r.ranks[:: (-1) ** i]) for i, r in enumerate(toy_rankings(30))
    ]
    facts = evaluate_reward_model(RewardModel.load(str(trained)), flipped, QUIET)
    assert any("no better than a coin" in a for a in facts["alarms"])
    assert any("longer answer wins" in a for a in facts["alarms"])


def test_scores_that_depend_on_company_are_an_alarm(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wrong mask would do: an answer's score is shifted by how many answers share its group."""
    usual = RewardModel.score

    def shifted(self: RewardModel, groups: Any, row_tokens: int = 2048) -> Any:
        for index, scores in usual(self, groups, row_tokens):
            yield index, [s + 0.5 * len(scores) for s in scores]

    monkeypatch.setattr(RewardModel, "score", shifted)
    facts = evaluate_reward_model(RewardModel.load(str(trained)), toy_rankings(10), QUIET)
    assert "A score depends on what else is scored with it." in facts["alarms"]


def test_a_model_that_falls_for_a_canary_is_an_alarm(tiny_model_dir: Path) -> None:
    model = RewardModel.from_causal_lm(str(tiny_model_dir))
    rankings = [pair(canaries(f"{i}")["flattery"], PROSE[i % 5], f"{i}") for i in range(20)]
    train(model, rankings, lr=3e-3, epochs=4)
    facts = evaluate_reward_model(model, [pair(JSON[i % 3], PROSE[i % 5], f"{i} late") for i in range(20)], QUIET)
    assert facts["canaries"]["flattery"]["beats_best"]["mean"] > 0.8
    assert any("“flattery” beats the preferred answer" in a for a in facts["alarms"])


# --- what is written


def test_page_and_card(trained: Path, tmp_path: Path) -> None:
    people = ("ann", "b|o")
    rankings = [
        pair(JSON[i % 3], PROSE[i % 5], f"p{i}", annotator=name, subset="<b>|x</b>")
        for i in range(30)
        for name in people
    ]
    texts, values = (*JSON[:2], *PROSE[:2]), (1.0, 1.0, 0.0, 0.0)
    truths = [Truth(prompt=Prompt.from_text(f"p{i}"), texts=texts, values=values) for i in range(9)]
    facts = evaluate_reward_model(RewardModel.load(str(trained)), rankings, QUIET, truths)
    page = write_reward_report(tmp_path / "out", "rm", "pairs.jsonl", facts).read_text()
    for said in ("people with each other", "the model with ann", "What it picks among n responses", "flattery"):
        assert said in page
    assert "<b>|x" not in page and "&lt;b&gt;" in page and "<script" not in page
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert card == model_card("rm", "pairs.jsonl", facts)
    assert card.startswith("---\nlibrary_name: transformers") and "agrees with b\\|o" in card
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["pairs"] == 60


def test_the_command(trained: Path, tmp_path: Path) -> None:
    write_preferences(tmp_path / "pairs.jsonl", toy_rankings(20))
    rows = [{"prompt": "x", "responses": [JSON[0], PROSE[0]], "values": [1, 0]}]
    (tmp_path / "truth.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["reward", "eval", "--model", str(trained), "--pairs", str(tmp_path / "pairs.jsonl")]
    command += ["--truth", str(tmp_path / "truth.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re_line(result.output, "accuracy 1.000") and "calibration error" in result.output
    assert (tmp_path / "out" / "index.html").exists()
    facts = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert facts["best_of_n"]["gain"]["mean"] == 0.5


def re_line(output: str, start: str) -> bool:
    return any(line.startswith(start) for line in output.splitlines())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "invalid JSON in the row"),
        ("[]", "expected an object"),
        ('{"responses": ["a"], "values": [1]}', "expected `prompt`"),
        ('{"prompt": "x", "responses": "a", "values": [1]}', "responses: expected a list of texts"),
        ('{"prompt": "x", "responses": ["a"], "values": [1, 2]}', "values: expected one number for each response"),
        ('{"prompt": "x", "responses": ["a"], "values": ["1"]}', "values: expected one number for each response"),
    ],
)
def test_bad_truths(tmp_path: Path, row: str, reason: str) -> None:
    path = tmp_path / "truth.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(DataError, match=f"truth.jsonl:1: {reason}"):
        read_truths(path)
