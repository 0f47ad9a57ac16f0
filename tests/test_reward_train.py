"""Training of reward models beyond the plain case: ensembles, held-out prompts, calibration, instructions, length."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reward_model import ANSWERS, JSON, MESSAGES, PROSE, SMALL, foreign_folder, toy_rankings, train
from tiny import CHATML
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from opentao.cli import app
from opentao.config import ScorerConfig
from opentao.errors import ModelError
from opentao.optimise import NO_CHECKPOINT
from opentao.preferences import Ranking, write_preferences
from opentao.progress import Progress
from opentao.reward_eval import accuracy, evaluate_reward_model
from opentao.reward_model import RewardModel
from opentao.reward_scale import fit_scale
from opentao.reward_train import (
    LEAST_HELDOUT,
    RewardTraining,
    calibrate,
    split_by_prompt,
    train_reward_model,
    train_to_folder,
    uses_plackett_luce,
)
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import run_scorer
from opentao.types import Group, Prompt, Response


@pytest.fixture(autouse=True)
def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentao.policy.native_bf16", lambda device: False)
    monkeypatch.setattr("opentao.optimise.native_bf16", lambda device: False)


@pytest.fixture
def guided(tiny_model_dir: Path) -> RewardModel:
    return RewardModel.from_causal_lm(str(tiny_model_dir))


def heads_of(reward_model: RewardModel, answers: list[str] = ANSWERS) -> list[list[float]]:
    [(_, heads)] = reward_model.score_heads([reward_model.encode(MESSAGES, answers)])
    return heads


def group_of(*answers: str) -> Group:
    responses = tuple(
        Response(id=str(i), text=text, tokens_R=(1,), sampler_logprobs_R=(-1.0,), finish="stop")
        for i, text in enumerate(answers)
    )
    return Group(prompt=Prompt(messages=tuple(MESSAGES)), responses=responses)


# --- ensembles


def test_an_ensemble_is_several_labels_whose_mean_is_the_score(tiny_model_dir: Path, tmp_path: Path) -> None:
    ensemble = RewardModel.from_causal_lm(str(tiny_model_dir), ensemble=4)
    heads = heads_of(ensemble)
    assert np.array(heads).shape == (len(ANSWERS), 4)
    [(_, scores)] = ensemble.score([ensemble.encode(MESSAGES, ANSWERS)])
    assert scores == pytest.approx([sum(h) / 4 for h in heads])
    ensemble.save(tmp_path / "rm")
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["opentao_ensemble"] == 4
    again = RewardModel.load(str(tmp_path / "rm"))
    np.testing.assert_allclose(heads_of(again), heads, atol=1e-6)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    ids = ensemble.tokenizer.apply_chat_template(
        [*MESSAGES, {"role": "assistant", "content": ANSWERS[0]}], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        assert plain(**ids).logits[0].tolist() == pytest.approx(heads[0], abs=1e-5)


def test_heads_start_apart_and_are_trained_on_bootstraps_of_their_own(tiny_model_dir: Path) -> None:
    ensemble = RewardModel.from_causal_lm(str(tiny_model_dir), ensemble=3)
    before = ensemble.model.score.weight.detach().clone()
    assert torch.linalg.matrix_rank(before) == 3
    train(ensemble, toy_rankings(24), lr=3e-3, epochs=4)
    heads = np.array(heads_of(ensemble, [*JSON[:2], *PROSE[:2]]))
    assert (heads[:2].min(0) > heads[2:].max(0)).all()  # each head has learned it
    assert len({round(float(s), 4) for s in heads[0]}) == 3  # and each in its own way


def test_a_ranking_that_no_bootstrap_holds_teaches_nothing(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoDraws:
        def poisson(self, rate: float, size: tuple[int, int]) -> Any:
            return np.zeros(size)

    monkeypatch.setattr("opentao.reward_train.np.random.default_rng", lambda seed: NoDraws())
    monkeypatch.setattr("opentao.reward_train.batches", lambda items, *_: iter([list(items)]))
    ensemble = RewardModel.from_causal_lm(str(tiny_model_dir), ensemble=2)
    [metrics] = train(ensemble, toy_rankings(4))
    assert metrics.loss == 0.0 and metrics.grad_norm == 0.0


def test_the_scorer_is_pessimistic(tiny_model_dir: Path, tmp_path: Path) -> None:
    ensemble = RewardModel.from_causal_lm(str(tiny_model_dir), ensemble=3)
    ensemble.save(tmp_path / "rm")
    heads = np.array(heads_of(ensemble))
    for k in (0.0, 1.5):
        args = {"model": str(tmp_path / "rm"), "pessimism": k}
        found = run_scorer(build_scorer(ScorerConfig(type="reward_model", args=args)), group_of(*ANSWERS))
        expected = heads.mean(1) - k * heads.std(1)
        assert [s.value for s in found] == pytest.approx(expected.tolist(), abs=1e-5)


def test_what_is_too_long_is_left_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    long = Ranking(prompt=Prompt.from_text("long " * 300), texts=("a", "b"), ranks=(1.0, 2.0))
    progress, config = Progress(quiet=True), RewardTraining(heldout=0.0, max_tokens=200)
    facts = train_to_folder(str(tiny_model_dir), [*toy_rankings(4), long], config, tmp_path / "rm", progress)
    assert (facts["rankings"], facts["too_long"]) == (4, 1)
    [note] = progress.notes
    assert re.match(r"1 rankings are longer than 200 tokens and left out, first: [\d,]+ tokens with .*'long long", note)
    with pytest.raises(ModelError, match="no ranking has at most 200 tokens"):
        train_to_folder(str(tiny_model_dir), [long], config, tmp_path / "none", progress)


def test_what_an_encoder_cannot_read_is_left_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_labels=1, pad_token_id=0)
    folder = foreign_folder(tiny_model_dir, tmp_path / "bert", BertForSequenceClassification(config), CHATML)
    long = Ranking(prompt=Prompt.from_text("x"), texts=("long " * 600, "b"), ranks=(1.0, 2.0))
    progress = Progress(quiet=True)
    settings = RewardTraining(heldout=0.0)
    facts = train_to_folder(str(folder), [*toy_rankings(9), long], settings, tmp_path / "rm", progress)
    assert (facts["rankings"], facts["too_long"]) == (9, 1)
    found = evaluate_reward_model(RewardModel.load(str(tmp_path / "rm")), [*toy_rankings(9), long], progress)
    assert (found["too_long"], found["pairs"]) == (1, sum(len(r.pairs) for r in toy_rankings(9)))
    assert "1 of 10 rankings are longer than the model reads, and left out" in progress.notes


def test_margins_are_of_pairs(tmp_path: Path) -> None:
    write_preferences(tmp_path / "pairs.jsonl", toy_rankings(2))
    given = ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "rm")]
    for option in (["--margin", "1"], ["--label-smoothing", "0.1"], ["--balance-length"]):
        result = CliRunner().invoke(app, ["reward", "train", *given, "--loss", "plackett_luce", *option])
        assert result.exit_code == 2
        assert "--loss plackett_luce: has no --margin" in result.output


def test_a_random_head_is_as_long_as_the_guided_one_and_elsewhere(tiny_model_dir: Path) -> None:
    guided, random_ = (RewardModel.from_causal_lm(str(tiny_model_dir), head=h) for h in ("guided", "random"))
    a, b = (m.model.score.weight.detach()[0] for m in (guided, random_))
    assert 0.5 < float(b.norm() / a.norm()) < 2
    assert abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) < 0.6


# --- which loss


def test_rankings_of_more_than_two_are_plackett_luce_unless_something_needs_pairs() -> None:
    prompt = Prompt.from_text("x")
    two = Ranking(prompt=prompt, texts=("a", "b"), ranks=(1.0, 2.0))
    three = Ranking(prompt=prompt, texts=("a", "b", "c"), ranks=(1.0, 2.0, 3.0))
    auto = RewardTraining()
    assert not uses_plackett_luce(two, auto) and uses_plackett_luce(three, auto)
    for pairwise in ({"margin": 1.0}, {"label_smoothing": 0.1}, {"balance_length": True}, {"loss": "bradley_terry"}):
        assert not uses_plackett_luce(three, RewardTraining(**pairwise))  # type: ignore[arg-type]
    assert uses_plackett_luce(two, RewardTraining(loss="plackett_luce"))


def test_balanced_lengths_take_the_reward_from_length(tiny_model_dir: Path) -> None:
    """Long answers win four of five times: unbalanced, length is learned; balanced, it earns nothing."""
    rng = random.Random(0)
    rankings = []
    for i in range(100):
        short, long = rng.choice(PROSE), " ".join(rng.choice(PROSE) for _ in range(3))
        better, worse = (short, long) if i % 5 == 0 else (long, short)
        rankings.append(Ranking(prompt=Prompt.from_text(f"{i}"), texts=(better, worse), ranks=(1.0, 2.0)))
    gaps = {}
    for balance in (False, True):
        model = RewardModel.from_causal_lm(str(tiny_model_dir))
        train(model, rankings, lr=2e-3, epochs=2, balance_length=balance)
        [(_, scores)] = model.score([model.encode(MESSAGES, [" ".join(PROSE[:3]), PROSE[0]])])
        gaps[balance] = scores[0] - scores[1]
    assert gaps[False] > 0.5
    assert abs(gaps[True]) < 0.6 * gaps[False]


def test_ties_pull_scores_together(tiny_model_dir: Path) -> None:
    """A model that prefers JSON is told that JSON and prose are equally good."""
    model = RewardModel.from_causal_lm(str(tiny_model_dir))
    probe = [model.encode(MESSAGES, [JSON[0], PROSE[0]])]
    train(model, toy_rankings(24), lr=3e-3, epochs=3)
    [(_, before)] = model.score(probe)
    tied = [Ranking(prompt=r.prompt, texts=r.texts, ranks=(1.0, 1.0)) for r in toy_rankings(24, seed=4)]
    train(model, tied, lr=3e-3, epochs=3)
    [(_, after)] = model.score(probe)
    assert before[0] - before[1] > 1
    assert abs(after[0] - after[1]) < 0.5 * (before[0] - before[1])


# --- held-out prompts


def test_the_split_is_by_prompt() -> None:
    rankings = [r for i in range(100) for r in toy_rankings(100)[i : i + 1] * 3]
    train_side, held = split_by_prompt(rankings, 0.2, seed=1)
    assert len(held) == 60 and len(train_side) == 240
    assert not {r.prompt.id for r in held} & {r.prompt.id for r in train_side}
    assert split_by_prompt(rankings, 0.2, seed=1) == (train_side, held)
    assert split_by_prompt(rankings, 0.2, seed=2)[1] != held
    assert split_by_prompt(rankings[: 3 * LEAST_HELDOUT], 0.5, seed=1)[1] == []
    assert split_by_prompt(rankings, 0.0, seed=1)[1] == []


def test_training_stops_early_and_keeps_the_best_weights(guided: RewardModel) -> None:
    """Held-out choices that are the opposite: every step makes them worse, so the first look's weights are kept."""
    opposite = [
        Ranking(prompt=r.prompt, texts=r.texts, ranks=tuple(3.0 - rank for rank in r.ranks))
        for r in toy_rankings(10, seed=9)
    ]
    config = RewardTraining(lr=3e-3, epochs=10, patience=2, evaluate_times=20)
    history = train_reward_model(guided, toy_rankings(16), config, NO_CHECKPOINT, lambda m: None, opposite)
    assert len(history) == 6  # 40 steps, a look every 2: the first is the best, two more are not
    # The kept weights are those after two steps.
    again = RewardModel.from_causal_lm(guided.tokenizer.name_or_path)
    short = RewardTraining(lr=3e-3, epochs=10)
    stop_after_two = train_reward_model(again, toy_rankings(16), short, NO_CHECKPOINT, lambda m: m.step == 1)
    assert len(stop_after_two) == 2
    for (name, a), (_, b) in zip(guided.model.named_parameters(), again.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# --- calibration


@given(st.floats(0.05, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_scale_of_simulated_choices_is_found(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = rng.normal(0, 2 / scale, 4000)
    wins = (rng.random(4000) < 1 / (1 + np.exp(-scale * d))).astype(float)
    assert fit_scale(d.tolist(), wins.tolist()) == pytest.approx(scale, rel=0.25)


def test_scale_at_the_edges() -> None:
    assert fit_scale([], []) == 1.0
    assert fit_scale([0.0, 0.0], [1.0, 0.0]) == 1.0
    assert 1 < fit_scale([1.0] * 50, [1.0] * 50) < 10  # all right: sure, not infinitely so
    assert fit_scale([1.0] * 50, [0.0] * 50) < 0.01  # all wrong: worth nothing
    d, w = [1.0, 2.0, -1.0], [1.0, 1.0, 1.0]
    assert fit_scale(d, w) == pytest.approx(fit_scale([-x for x in d], [1 - x for x in w]))  # sides do not matter


def test_scale_is_the_least_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0, 1, 200)
    w = rng.choice([0.0, 0.5, 1.0], 200)
    mean = float(np.abs(d).mean())
    all_d, all_w = np.append(d, [mean, mean]), np.append(w, [1.0, 0.0])

    def loss(b: float) -> float:
        return float((np.logaddexp(0, -b * all_d) * all_w + np.logaddexp(0, b * all_d) * (1 - all_w)).sum())

    best = fit_scale(d.tolist(), w.tolist())
    assert loss(best) <= min(loss(b) for b in np.geomspace(1e-3, 1e3, 2001)) + 1e-9


def test_calibration_is_folded_into_the_head(guided: RewardModel, tmp_path: Path) -> None:
    train(guided, toy_rankings(24), lr=3e-3, epochs=2)
    before = heads_of(guided)
    scale = calibrate(guided, toy_rankings(20, seed=3))
    assert scale is not None and scale > 0
    np.testing.assert_allclose(heads_of(guided), np.array(before) * scale, rtol=1e-4)


# --- instructions


def asked(instruction: str, number: int, seed: int) -> list[Ranking]:
    """The same answers, ranked by what was asked for."""
    rng = random.Random(seed)
    rankings = []
    for i in range(number):
        texts = (rng.choice(JSON), rng.choice(PROSE))
        ranks = (1.0, 2.0) if instruction == "JSON" else (2.0, 1.0)
        rankings.append(
            Ranking(prompt=Prompt.from_text(f"{seed} {i}"), texts=texts, ranks=ranks, instruction=instruction)
        )
    return rankings


def test_one_reward_model_serves_two_tasks(guided: RewardModel) -> None:
    rankings = [*asked("JSON", 30, 1), *asked("prose", 30, 2)]
    train(guided, rankings, lr=3e-3, epochs=6, instruction_dropout=0.0)
    for instruction in ("JSON", "prose"):
        facts = accuracy(guided, asked(instruction, 10, 5), Progress(quiet=True))
        assert facts["accuracy"]["mean"] > 0.9, instruction


def test_instructions_are_left_out_now_and_then(guided: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    usual = RewardModel.rows

    def rows(self: RewardModel, groups: Any, row_tokens: int) -> Any:
        seen.extend(len(g.prompt_P) for g in groups)
        return usual(self, groups, row_tokens)

    monkeypatch.setattr(RewardModel, "rows", rows)
    rankings = asked("a rather long instruction about what counts", 1, 1)
    train(guided, rankings, epochs=100, instruction_dropout=0.3, lr=1e-6)
    lengths = sorted(set(seen))
    assert len(lengths) == 2
    assert 15 <= seen.count(lengths[0]) <= 45


def test_an_instruction_changes_the_score_and_no_instruction_changes_nothing(
    guided: RewardModel, tmp_path: Path
) -> None:
    plain = guided.encode(MESSAGES, ANSWERS)
    assert guided.encode(MESSAGES, ANSWERS, "") == plain
    assert guided.encode(MESSAGES, ANSWERS, "short").prompt_P != plain.prompt_P
    guided.save(tmp_path / "rm")
    args = {"model": str(tmp_path / "rm")}
    without = run_scorer(build_scorer(ScorerConfig(type="reward_model", args=args)), group_of(*ANSWERS))
    with_one = run_scorer(
        build_scorer(ScorerConfig(type="reward_model", args=args | {"instruction": "short"})), group_of(*ANSWERS)
    )
    assert [s.value for s in without] != [s.value for s in with_one]


def test_a_model_without_a_place_for_instructions_says_so(guided: RewardModel) -> None:
    guided.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ModelError, match="has no `instruction`"):
        guided.encode(MESSAGES, ANSWERS, "short")


# --- the folder


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_train_to_folder_with_everything_on(tiny_model_dir: Path, tmp_path: Path, lora_rank: int) -> None:
    config = RewardTraining(lr=5e-3 if lora_rank else 3e-3, epochs=2, ensemble=2, heldout=0.2, lora_rank=lora_rank)
    facts = train_to_folder(str(tiny_model_dir), toy_rankings(60), config, tmp_path / "rm", Progress(quiet=True))
    assert (facts["rankings"], facts["heldout"]) == (48, 12)
    assert facts["calibration"] > 0 and facts["steps"] <= facts["steps_planned"] == 24
    loaded = RewardModel.load(str(tmp_path / "rm"))
    assert loaded.num_heads == 2
    held = toy_rankings(40, seed=8)
    assert accuracy(loaded, held, Progress(quiet=True))["accuracy"]["mean"] > 0.9
    more = RewardTraining(ensemble=4)
    with pytest.raises(ModelError, match="has 2 heads of its own, not 4"):
        train_to_folder(str(tmp_path / "rm"), held, more, tmp_path / "again", Progress(quiet=True))


def test_few_prompts_are_all_trained_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    facts = train_to_folder(
        str(tiny_model_dir), toy_rankings(12), RewardTraining(), tmp_path / "rm", Progress(quiet=True)
    )
    assert (facts["rankings"], facts["heldout"], facts["calibration"]) == (12, 0, None)
    assert math.isfinite(facts["loss_last"])
