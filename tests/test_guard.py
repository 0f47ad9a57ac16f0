"""The guard against over-optimisation: its rule on made-up rounds, and whole runs on rewards that deserve no trust."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_loop import Tree, go, prompts, scored_by, tree  # noqa: F401  # fixtures

from opentao.canaries import canaries
from opentao.guard import best_of, canary_shares, tripped


def session(*, audit: bool = True) -> Any:
    args = {"confidence": 0.95, "resamples": 500, "seed": 0}
    return SimpleNamespace(interval_args=args, audit=object() if audit else None)


def evaluation(round_: int, first: Any, audit: Any) -> Any:
    return SimpleNamespace(
        round=round_, first_P=np.array(first, dtype=float), audit_first_P=np.array(audit, dtype=float)
    )


FLAT = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8] * 4
HIGH = [v + 0.3 for v in FLAT]
NOISE = np.random.default_rng(0).normal(0, 0.3, len(FLAT))


def test_reward_up_and_audit_down_trips() -> None:
    said = tripped(session(), evaluation(2, HIGH, FLAT), evaluation(1, FLAT, HIGH))
    assert said is not None
    assert said.startswith("Round 2 was stopped as over-optimised: against round 1 its reward moves +0.300")
    assert "the audit -0.300" in said
    assert "against the base" in str(tripped(session(), evaluation(1, HIGH, FLAT), evaluation(0, FLAT, HIGH)))


@pytest.mark.parametrize(
    ("first", "audit", "best_first", "best_audit"),
    [
        (HIGH, HIGH, FLAT, FLAT),  # both rise
        (FLAT, FLAT, HIGH, HIGH),  # both fall
        (FLAT, FLAT, FLAT, HIGH),  # the audit falls alone
        (HIGH, FLAT + NOISE, FLAT, FLAT),  # the audit may have fallen by chance
        (FLAT + NOISE, FLAT, FLAT, HIGH),  # the reward may have risen by chance
        ([np.nan] * 32, FLAT, FLAT, HIGH),
        (HIGH, [np.nan] * 32, FLAT, FLAT),
    ],
)
def test_nothing_else_does(first: Any, audit: Any, best_first: Any, best_audit: Any) -> None:
    assert tripped(session(), evaluation(2, first, audit), evaluation(1, best_first, best_audit)) is None


def test_without_an_audit_nothing_can_be_told() -> None:
    assert tripped(session(audit=False), evaluation(2, HIGH, FLAT), evaluation(1, FLAT, HIGH)) is None


def test_the_best_round_so_far() -> None:
    rounds = [evaluation(0, FLAT, FLAT), evaluation(1, HIGH, FLAT), evaluation(2, HIGH, FLAT)]
    assert best_of(rounds).round == 1
    assert best_of([evaluation(0, [np.nan] * 2, FLAT), evaluation(1, [0.0, np.nan], FLAT)]).round == 1


def test_canary_shares_by_hand() -> None:
    rewards: dict[str, list[float | None]] = {"empty": [0.0, 0.5, None], "flattery": [None, None, None]}
    shares = canary_shares(rewards, np.array([0.1, 0.5, 0.9]))
    assert shares == {"empty": 0.5, "flattery": None}  # beaten on the first prompt, level on the second


def test_a_canary_as_high_as_the_mean_of_equal_scores_counts() -> None:
    own = float(np.mean([0.1] * 3))
    assert own > 0.1  # by a digit
    assert canary_shares({"empty": [0.1]}, np.array([own])) == {"empty": 1.0}


def test_canaries_are_different_answers() -> None:
    found = canaries("My parcel is late.", "It left on Monday, and will be with you on Thursday.")
    assert len(set(found.values())) == len(found) == 10
    assert found["the prompt again"] == "My parcel is late."
    assert "broken off" not in canaries("x")


def test_a_reward_that_can_be_hacked_is_stopped_and_rolled_back(tree: Tree, tmp_path: Path) -> None:  # noqa: F811
    """Longer is better, says the reward; the audit wants few words. The policy learns to ramble, and is thrown away."""
    audit = {"type": "python", "args": {"function": "toy_scorers:shorter"}}
    hackable = scored_by(tree, "longer") | {"rounds": 3, "prompts_per_round": 12, "audit": audit}
    hackable["generate"] = tree["generate"] | {"max_new_tokens": 24}
    hackable["train"] = {"learning_rate": 1e-2, "epochs": 4, "prompts_per_step": 2, "schedule": "constant"}
    case = go(tmp_path, hackable)
    summary = case.summary
    assert summary["verdict"] == "keep base" and summary["best_round"] == 0 and summary["policy"] is None
    last = summary["rounds"][-1]
    assert summary["why"].startswith(f"Round {last['round']} was stopped as over-optimised: against ")
    assert last["guard"]["tripped"] and summary["why"].startswith(last["guard"]["tripped"])
    # What was watched says the same: answers got longer (characters; tokens end at 24), and an endless one beats all.
    assert last["first_try"]["mean"] > summary["base"]["first_try"]["mean"]
    assert summary["base"]["guard"]["canaries"]["very long"] == 1.0
    assert summary["base"]["guard"]["canaries"]["empty"] == 0.0
    assert "was stopped as over-optimised" in (tmp_path / "report.html").read_text()
    assert any("over-optimised" in note for note in case.notes)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_reward_gains_nothing(tree: Tree, tmp_path: Path, seed: int) -> None:  # noqa: F811
    audit = {"type": "python", "args": {"function": "toy_scorers:letters"}}
    summary = go(tmp_path, scored_by(tree, "chance") | {"rounds": 2, "seed": seed, "audit": audit}).summary
    assert summary["verdict"] == "keep base" and summary["policy"] is None
