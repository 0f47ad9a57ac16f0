"""Token counts worked out by hand; the measurement runs on the tiny model."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opentao.config import Config
from opentao.cost import Probe, Stage, count_tokens, estimate, split_sizes
from opentao.errors import DataError
from opentao.objectives import OBJECTIVES
from opentao.types import Prompt


def config(**changes: Any) -> Config:
    tree = {
        "prompts": {"path": "prompts.jsonl", "heldout_fraction": 0.2, "max_heldout": 10},
        "scorers": [{"type": "length"}],
        "rounds": 2,
        "generate": {"group_size": 4, "max_new_tokens": 10},
        "evaluate": {"base_group_size": 8, "group_size": 2, "kl_responses": 1},
    }
    return Config.model_validate(tree | changes)


def test_split_sizes() -> None:
    assert split_sizes(config(), 100) == (10, 40)
    assert split_sizes(config(prompts_per_round=7), 100) == (10, 7)
    assert split_sizes(config(prompts_per_round=7), 10) == (2, 7)
    held = config().model_copy(update={"prompts": config().prompts.model_copy(update={"heldout_path": "h.jsonl"})})
    assert split_sizes(held, 100) == (held.prompts.max_heldout, 50)


def test_tokens_by_hand() -> None:
    """100 prompts of 5 tokens: 10 held out, 40 in each of 2 rounds; 4 responses of 10 tokens."""
    stages = count_tokens(config(train={"objective": "regress", "epochs": 1}), 100, 5.0)
    assert stages["generate"] == Stage(forward=80 * 5, decode=80 * 4 * 10)
    assert stages["score"] == Stage()
    assert stages["train"] == Stage(forward=80 * 45, train=80 * 45, steps=2 * 10)
    # Base: 8 responses, each round 2, all 1 greedy, prompt computed twice; KL: 2 policies on 1 response.
    assert stages["evaluate"] == Stage(forward=10 * (6 * 5 + 2 * 2 * 15), decode=10 * (9 + 2 * 3) * 10)


def test_later_rounds_by_hand() -> None:
    """The first round as above with distill (3 of 4 responses, twice); the second: 3 responses of 20, all, once."""
    later = {"generate": {"group_size": 3, "max_new_tokens": 20}, "train": {"objective": "online", "epochs": 1}}
    stages = count_tokens(config(train={"epochs": 2}, later_rounds=later), 100, 5.0)
    assert stages["generate"] == Stage(forward=80 * 5, decode=40 * (4 * 10 + 3 * 20))
    assert stages["train"] == Stage(train=40 * (2 * (5 + 3 * 10) + 5 + 3 * 20), steps=2 * 10 + 10)
    assert stages["evaluate"] == count_tokens(config(), 100, 5.0)["evaluate"]


def test_a_reward_model_reads_every_group() -> None:
    stages = count_tokens(config(scorers=[{"type": "reward_model"}]), 100, 5.0)
    assert stages["score"] == Stage(forward=80 * 45)
    assert stages["evaluate"].forward == 10 * (6 * 5 + 2 * 2 * 15) + 10 * (6 * 5 + 15 * 10)


def test_an_audit_by_a_reward_model_reads_what_is_held_out() -> None:
    plain, audited = (count_tokens(config(audit=a), 100, 5.0) for a in (None, {"type": "reward_model"}))
    judged = count_tokens(config(scorers=[{"type": "reward_model"}]), 100, 5.0)
    assert audited["score"] == plain["score"]
    assert audited["evaluate"] == judged["evaluate"] != plain["evaluate"]


def test_rounds_share_prompts_as_the_run_does() -> None:
    """8 prompts to train on, 20 rounds: one each, around the end."""
    assert split_sizes(config(rounds=20), 10) == (2, 1)


@pytest.mark.parametrize(
    ("objective", "num_chosen", "reference"), [("regress", 4, 1), ("online", 4, 0), ("prefer", 2, 1), ("distill", 3, 0)]
)
def test_training_computes_what_the_objective_chooses(objective: str, num_chosen: int, reference: int) -> None:
    """distill, of 4 of which 3 are right: those 3; the others look at as many whatever the rewards."""
    stage = count_tokens(config(train={"objective": objective, "epochs": 3}), 100, 5.0)["train"]
    tokens = 80 * (5 + num_chosen * 10)
    assert stage == Stage(forward=reference * tokens, train=3 * tokens, steps=2 * 3 * 10)


def test_a_reward_model_gives_no_ties() -> None:
    """distill with target_n 16 and 4 ranks: weights 0.990, 0.010, then under a thousandth."""
    train = {"objective": "distill", "epochs": 3}
    stage = count_tokens(config(train=train, scorers=[{"type": "reward_model"}]), 100, 5.0)["train"]
    assert stage.train == 3 * 80 * (5 + 2 * 10)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_no_rewards_make_more_work_than_is_counted(objective: str) -> None:
    settings = config(train={"objective": objective}, generate={"group_size": 6, "max_new_tokens": 10})
    counted = count_tokens(settings, 100, 5.0)["train"].train
    chosen = OBJECTIVES[objective].choose
    most = max(len(chosen(np.array(rewards, dtype=float), settings.train)) for rewards in product(range(3), repeat=6))
    assert counted == settings.train.epochs * 80 * (5 + most * 10)


def test_what_is_not_kept_is_not_counted() -> None:
    train = {"objective": "regress", "epochs": 1, "keep": {"strategy": "max_variance", "responses": 2}}
    assert count_tokens(config(train=train), 100, 5.0)["train"].train == 80 * (5 + 2 * 10)


def test_a_group_over_a_row_is_computed_once_more() -> None:
    stage = count_tokens(config(train={"objective": "regress", "row_tokens": 44, "epochs": 3}), 100, 5.0)["train"]
    assert stage == Stage(forward=4 * 80 * 45, train=3 * 80 * 45, steps=60)


def test_seconds_and_memory_by_hand() -> None:
    probe = Probe(
        forward=100.0,
        decode=10.0,
        train=20.0,
        step_s=0.5,
        loaded_bytes=1000,
        state_bytes=3000,
        row_bytes=500,
        cache_bytes=2,
        cache_budget_bytes=15_000,
    )
    assert probe.seconds(Stage(forward=200, decode=30, train=40, steps=4)) == 2 + 3 + 2 + 2
    few = config(generate={"batch_responses": 9, "max_new_tokens": 10}, train={"row_tokens": 1024})
    assert probe.peak_bytes(few) == 1000 + 3000 + 2 * 500
    many = config(generate={"batch_responses": 1000, "max_new_tokens": 10})
    assert probe.peak_bytes(many) == 1000 + 15_000  # not 2 * 1000 * 10: the engine takes fewer side by side
    some = config(generate={"batch_responses": 500, "max_new_tokens": 10})
    assert probe.peak_bytes(some) == 1000 + 2 * 500 * 10


@pytest.mark.parametrize("method", ["full", "lora"])
def test_measures_the_tiny_model(tiny_model_dir: Path, method: str) -> None:
    prompts = [Prompt.from_text("My parcel is late.")] * 20
    cost = estimate(config(model=str(tiny_model_dir), train={"method": method}), prompts)
    json.dumps(cost, allow_nan=False)
    assert cost["prompts"] == {"total": 20, "heldout": 4, "per_round": 8, "mean_tokens": pytest.approx(22, abs=10)}
    assert all(0 < cost["measured"][kind] < 1e9 for kind in ("forward", "decode", "train"))
    assert cost["measured"]["cache_bytes"] == 2 * 2 * 2 * 8 * 4  # K and V, 2 layers, 2 heads of 8, fp32
    assert set(cost["minutes"]) == {"generate", "score", "train", "evaluate"}


def test_no_prompt() -> None:
    with pytest.raises(DataError, match=r"prompts\.jsonl: no prompt"):
        estimate(config(), [])
