"""`tao demo`: the whole method on a support desk, with the built-in model.

1. The base model's best-of-N curve on held-out tickets: the right answer is in reach, the first try misses it.
2. People's choices on best-of-N results for a small set of tickets train a reward model. Known labels stand in for the
   people here: a valid answer with the right category is preferred to one with a wrong category, and that to no JSON.
3. Rounds of TAO on other tickets, without any label, scored by that reward model and a JSON schema.
4. The true labels of held-out tickets are the audit; nothing was trained on them.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from opentao import loop
from opentao.bestofn import bootstrap
from opentao.config import Config
from opentao.errors import StoreError
from opentao.evaluate import Evaluation, evaluate
from opentao.generate import generate
from opentao.optimise import NO_CHECKPOINT, num_steps
from opentao.policy import Policy
from opentao.preferences import Ranking, read_preferences, write_preferences
from opentao.progress import Progress
from opentao.report import write_report
from opentao.reward_model import RewardModel
from opentao.reward_train import RewardTraining, train_reward_model
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import run_scorer
from opentao.session import Session, open_session
from opentao.split import split
from opentao.store import Run, table_to_groups, table_to_prompts, write_whole
from opentao.types import Group, Prompt, content_hash

CATEGORIES = ("billing", "bug", "account", "delivery", "cancellation", "sales")
SYSTEM = (
    "Sort support tickets. Reply with JSON only: category (billing, bug, account, delivery, cancellation, sales),"
    " priority (low, medium, high), summary (one sentence)."
)
EXAMPLES = (
    ("The invoice of May is missing.", ("billing", "low", "Invoice missing.")),
    ("The app closes when I open it!", ("bug", "high", "App crashes.")),
)
SCHEMA = {
    "type": "object",
    "required": ["category", "priority", "summary"],
    "additionalProperties": False,
    "properties": {
        "category": {"enum": list(CATEGORIES)},
        "priority": {"enum": ["low", "medium", "high"]},
        "summary": {"type": "string", "minLength": 8},
    },
}
NUM_PREFERENCE_TICKETS = 110
NUM_TRAIN_TICKETS = 96
NUM_HELDOUT_TICKETS = 40
REWARD_TRAINING = RewardTraining(
    lr=2e-3, epochs=3, rankings_per_step=4, lora_rank=16, lora_layers="attention", loss="bradley_terry"
)


def messages_of(ticket: str) -> tuple[dict[str, str], ...]:
    """The prompt that the desk's application sends: instruction, two examples, the ticket."""
    turns = [{"role": "system", "content": SYSTEM}]
    for example, (category, priority, summary) in EXAMPLES:
        answer = json.dumps({"category": category, "priority": priority, "summary": summary})
        turns += [{"role": "user", "content": example}, {"role": "assistant", "content": answer}]
    return (*turns, {"role": "user", "content": ticket})


def tickets() -> list[dict[str, str]]:
    """The tickets that come with the package: ticket, category, priority."""
    text = resources.files("opentao").joinpath("data/tickets.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def config_of(directory: Path, seed: int) -> Config:
    """The demo's config: what a user would write for this task."""
    return Config.model_validate(
        {
            "prompts": {
                "path": str(directory / "tickets.jsonl"),
                "heldout_fraction": 0.3,
                "max_heldout": NUM_HELDOUT_TICKETS,
                "max_train": NUM_TRAIN_TICKETS,
            },
            "scorers": [
                {"type": "json_schema", "name": "schema", "weight": 2.0, "args": {"schema": SCHEMA, "partial": True}},
                {
                    "type": "reward_model",
                    "name": "preference",
                    "weight": 1.0,
                    "args": {"model": str(directory / "reward"), "squash": True},
                },
            ],
            "audit": {
                "type": "json_field",
                "name": "right category in valid JSON",
                "args": {"field": "category", "key": "category", "schema": SCHEMA},
            },
            "rounds": 2,
            "seed": seed,
            "generate": {
                "temperature": 0.5,
                "max_new_tokens": 40,
                "strategies": [
                    *({"name": c, "answer_prefix": f'{{"category": "{c}", "priority": "'} for c in CATEGORIES),
                    {"name": "plain"},
                ],
                "group_size": len(CATEGORIES) + 1,
                "batch_responses": 384,  # a round's groups at once
            },
            "train": {
                "objective": "distill",
                "target_n": 64,
                "learning_rate": 2e-4,
                "schedule": "linear",
                "epochs": 3,
                "temperature": 1.0,
                "train_embeddings": False,
            },
            "evaluate": {"base_group_size": 8, "group_size": 3, "kl_responses": 1},
        }
    )


def write_tickets(directory: Path, config: Config, seed: int) -> list[dict[str, str]]:
    """Write `tickets.jsonl`, labels only on the held-out side (the audit's). Returns the preference tickets.

    Raises:
        StoreError: the directory is of another seed, whose held-out tickets may be among this one's preference tickets.
    """
    rows = tickets()
    random.Random(seed).shuffle(rows)
    chosen, rest = rows[:NUM_PREFERENCE_TICKETS], rows[NUM_PREFERENCE_TICKETS:]
    by_id = {_prompt(r).id: r for r in rest}
    heldout = {p.id for p in split([_prompt(r) for r in rest], config.prompts).heldout}
    lines = []
    for prompt_id, row in by_id.items():
        line: dict[str, Any] = {"messages": list(messages_of(row["ticket"]))}
        if prompt_id in heldout:
            line["category"] = row["category"]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path, text = directory / "tickets.jsonl", "".join(lines)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise StoreError(f"{path}: of another seed, or changed by hand; name another directory with --run")
    write_whole(path, text)
    return chosen


def _prompt(row: dict[str, str]) -> Prompt:
    return Prompt(messages=messages_of(row["ticket"]), meta={"category": row["category"]})


def prefer(group: Group, judge: Callable[[Group], list[int]]) -> Ranking | None:
    """What a person who knows the answer would say of a group: the right response before up to three wrong ones.

    `judge` gives each response's grade: 2 right, 1 wrong category, 0 not the asked JSON. A group without a right
    response would teach form only, and the schema scorer knows the form: it is passed over, as are broken responses.
    """
    grades = judge(group)
    right = [r.text for r, grade in zip(group.responses, grades, strict=True) if grade == 2]
    wrong = list(dict.fromkeys(r.text for r, grade in zip(group.responses, grades, strict=True) if grade == 1))
    if not right or not wrong:
        return None
    shown = random.Random(group.prompt.id).sample(wrong, min(3, len(wrong)))
    return Ranking(prompt=group.prompt, texts=(right[0], *shown), ranks=(1.0, *[2.0] * len(shown)), ties_equal=False)


def collect_preferences(run: Run, config: Config, rows: list[dict[str, str]], session: Session) -> Path:
    """Sample best-of-N groups for the preference tickets and write what people choose to `preferences.jsonl`."""
    base = Policy.of_base(config.model)
    prompts = [_prompt(r) for r in rows]
    plan = config.generate.plan(config.seed + 2)
    covering = replace(plan, group_size=len(CATEGORIES), strategies=plan.strategies[: len(CATEGORIES)])
    shards = generate(session, "preferences/groups", prompts, base, covering, "preferences: generate")
    schema, audit = build_scorer(config.scorers[0]), build_scorer(config.audit or config.scorers[0])

    def judge(group: Group) -> list[int]:
        form, right = run_scorer(schema, group), run_scorer(audit, group)
        return [int(f.value == 1.0) + int(r.value == 1.0) for f, r in zip(form, right, strict=True)]

    groups = [g for name in shards for g in table_to_groups(run.read_table(name))]
    rankings = [r for g in groups if (r := prefer(g, judge))]
    key = content_hash([run.hash(name) for name in shards])
    session.progress.note(f"preferences: {len(rankings)} of {len(groups)} tickets have a right answer to prefer")
    return run.commit("preferences.jsonl", key, lambda path: write_preferences(path, rankings))


def train_reward(run: Run, config: Config, pairs: Path, progress: Progress) -> None:
    """Train the reward model on the preferences into `reward/`."""
    key = content_hash(run.hash("preferences.jsonl"), asdict(REWARD_TRAINING))
    if run.have("reward", key):
        return
    rankings = read_preferences(pairs).rankings
    reward_model = RewardModel.from_causal_lm(config.model)
    total = num_steps(len(rankings), REWARD_TRAINING.epochs, REWARD_TRAINING.rankings_per_step)
    with progress.stage("reward model", total=total, unit="steps", label="preferences: train reward model") as step:
        train_reward_model(
            reward_model, rankings, REWARD_TRAINING, NO_CHECKPOINT, lambda m: step.advance(1, tokens=m.tokens)
        )
    run.commit("reward", key, reward_model.save)


def run_demo(directory: Path, seed: int, progress: Progress) -> dict[str, Any]:
    """Run the four steps; started again, it goes on where it stopped. Returns the content of `summary.json`."""
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    config = config_of(directory, seed)
    rows = write_tickets(directory, config, seed)
    schema_only = config.model_copy(update={"scorers": config.scorers[:1]})
    with open_session(schema_only, directory, progress) as session:
        if not session.run.have("reward"):
            base = Policy.of_base(config.model)
            _say_headroom(evaluate(session, 0, base, base), progress)
        pairs = collect_preferences(session.run, config, rows, session)
        train_reward(session.run, config, pairs, progress)
    summary = loop.run(config, directory, progress)
    with Run(directory) as run:
        wall = time.monotonic() - started
        facts = {"seed": seed, "preference_tickets": len(rows), "wall_seconds": wall}
        # The loop knows its own stages only; the demo's time is also that of the preferences and the reward model.
        summary |= {"baselines": [_majority(run)], "demo": facts, "seconds": max(wall, summary["seconds"])}
        run.write_json("summary.json", content_hash(summary), summary)
    write_report(directory)
    return summary


def _say_headroom(base: Evaluation, progress: Progress) -> None:
    """Step 1 in one line: how often a valid answer with the right category is among k tries of the base."""
    curve = ", ".join(f"best of {k} {np.nanmean(v):.2f}" for k, v in base.audit_best_P.items())
    progress.note(f"base model, right category in valid JSON on held-out tickets: {curve}")


def _majority(run: Run) -> dict[str, Any]:
    """The audit of always answering the most frequent category of the held-out tickets, in valid JSON."""
    labels = [p.meta["category"] for p in table_to_prompts(run.read_table("prompts/heldout.parquet"))]
    [(most, _)] = Counter(labels).most_common(1)
    hits = np.array([float(label == most) for label in labels])
    return {"name": f"always “{most}”", "value": bootstrap(hits).as_dict(), "on": "audit"}
