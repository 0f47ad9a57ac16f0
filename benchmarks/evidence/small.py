"""The folder of a run over the small tasks of tasks.py or records.py: prompts, preferences, reward models, config."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import ModuleType

import records
import tasks
from lab import HERE, Facts, Lab, made, made_of, meaning, python, tao

from opentao.preferences import Ranking, read_preferences, write_preferences

KINDS: dict[str, ModuleType] = {task: module for module in (tasks, records) for task in module.TASKS}
NUM_PROMPTS = 2000
QUESTIONS = 2  # the draw of them that all tables are of
NUM_PREFERENCES = 300
FLIPPED = 0.25
REWARD = ("--epochs", "4", "--learning-rate", "3e-4", "--head", "random")
CONFIG: Facts = {
    "prompts": {
        "path": "prompts.jsonl",
        "heldout_fraction": 0.2,
        "max_heldout": 120,
        "near_duplicate": 1.0,  # the questions of a task are alike by nature
    },
    "audit": {"type": "python", "name": "right", "args": {"function": "tasks:audit"}},
    "rounds": 1,
    "prompts_per_round": 96,
    "generate": {"group_size": 8, "temperature": 1.0, "max_new_tokens": 24},
    "evaluate": {"base_group_size": 16, "group_size": 8},
}
RECORDS: Facts = CONFIG | {
    "audit": {"type": "python", "name": "whole", "args": {"function": "records:audit"}},
    "generate": CONFIG["generate"] | {"max_new_tokens": 64},
}
TRAIN: Facts = {  # of all experiments but `objectives`; how it was found stands in dev/LOG.md
    "train.objective": "distill",
    "train.learning_rate": 4e-4,
    "train.schedule": "linear",
    "train.epochs": 2,
}
SHOWN = [  # to the 135M model, which would answer in sentences; the decoders know nothing but these tasks
    turn
    for question, answer in (
        ("Write as YYYY-MM-DD: 7 October 2003", "2003-10-07"),
        ("Sort by name: wallet, bridge, mirror", "bridge, mirror, wallet"),
        ("Which order? Invoice K204: please send the candle of order F518 to Porto.", "F518"),
    )
    for turn in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
]
EXACT: list[Facts] = [{"type": "python", "name": "exact", "args": {"function": "tasks:right"}}]
EXACT_RECORDS: list[Facts] = [{"type": "python", "name": "exact", "args": {"function": "records:right"}}]


def model(lab: Lab, size: str, kind: ModuleType = tasks) -> Path:
    code = [meaning(HERE / name) for name in ("decoders.py", f"{kind.__name__}.py")]
    return made(
        lab.work / ("decoders" if kind is tasks else f"decoders-{kind.__name__}") / size,
        code,
        lambda out: python(HERE / "decoders.py", out.parent, kind.__name__, size, cwd=lab.work),
    )


def folder(lab: Lab, size: str, names: tuple[str, ...] = tasks.TASKS, draw: int = QUESTIONS) -> Path:
    """Everything a run of a decoder of this size needs, made once. `names`: of tasks. `draw`: of the questions."""
    kind = KINDS[names[0]]
    name = "-".join((size, *names)) + (f"-{draw}" if draw != QUESTIONS else "")
    where = str(model(lab, size, kind)) if size != "135M" else "smollm2-135m-instruct"
    weights = meaning(Path(where) / "model.safetensors") if size != "135M" else size
    config = RECORDS if kind is records else CONFIG
    of = [config, NUM_PROMPTS, SHOWN, meaning(HERE / f"{kind.__name__}.py"), names, draw, weights]
    return made(lab.work / "small" / name, of, lambda out: _write(out, size, {"model": where} | config, names, draw))


def _write(out: Path, size: str, config: Facts, names: tuple[str, ...], draw: int) -> None:
    shutil.copy(HERE / f"{KINDS[names[0]].__name__}.py", out)
    taken = {question for _, question, _ in questions(names, QUESTIONS)} if draw != QUESTIONS else set[str]()
    shown = SHOWN if size == "135M" else []
    rows = [
        {"messages": [*shown, {"role": "user", "content": question}], "task": task, "label": right}
        for task, question, right in questions(names, draw, taken)
    ]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "tao.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML


def questions(names: tuple[str, ...], draw: int, taken: AbstractSet[str] = frozenset()) -> list[tuple[str, str, str]]:
    """NUM_PROMPTS of (task, question, right answer), tasks in turn; none twice, none of those taken."""
    rng = random.Random(draw)
    found: dict[str, tuple[str, str, str]] = {}
    while len(found) < NUM_PROMPTS:
        task = names[len(found) % len(names)]
        question, right, _ = KINDS[task].make(task, rng)
        if question not in taken:
            found.setdefault(question, (task, question, right))
    return list(found.values())


def preferences(lab: Lab, size: str, names: tuple[str, ...] = tasks.TASKS) -> Path:
    """Two reward models of choices on other questions: `reward`, and `flipped`, whose choices lie in one of four."""
    out, kind = folder(lab, size, names), KINDS[names[0]]

    def train(out: Path) -> None:
        folder(lab, size, names)  # which was just removed, if choices or settings are others
        rng = random.Random(3)
        taken = {question for _, question, _ in questions(names, QUESTIONS)}
        lines: list[Facts] = []
        while len(lines) < NUM_PREFERENCES:
            question, right, wrong = kind.make(names[len(lines) % len(names)], rng)
            if question in taken:
                continue
            lines.append({"prompt": question, "responses": [right, *wrong], "ranks": [1, 2, 2, 2], "ties": "unknown"})
        (out / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_preferences(out / "flipped.jsonl", flip(read_preferences(out / "pairs.jsonl").rankings, FLIPPED))
        for pairs, reward in (("pairs.jsonl", "reward"), ("flipped.jsonl", "flipped")):
            if not (out / reward / "config.json").exists():
                given = ("--pairs", pairs, "--out", reward, "--model", str(model(lab, size, kind)), *REWARD)
                tao("reward", "train", *given, cwd=out)

    return made(out, [made_of(out), NUM_PREFERENCES, FLIPPED, REWARD], train, mark="rewards_of")


def flip(rankings: list[Ranking], share: float) -> list[Ranking]:
    """So large a share of the rankings turned round, drawn by their order."""
    chosen = set(random.Random(0).sample(range(len(rankings)), round(share * len(rankings))))
    return [_turned(r) if i in chosen else r for i, r in enumerate(rankings)]


def _turned(r: Ranking) -> Ranking:
    ranks = tuple(max(r.ranks) + min(r.ranks) - rank for rank in r.ranks)
    return Ranking(prompt=r.prompt, texts=r.texts, ranks=ranks, ties_equal=r.ties_equal)
