"""Every recipe on every seed, and again with a reward that knows nothing, which must not be reported as a gain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lab import EXAMPLES, SEEDS, Facts, Lab, essence_alone, made, made_of, meaning, python, tao

from opentao import demo
from opentao.report import compare
from opentao.store import Run
from opentao.summary import Evaluation, read
from opentao.types import content_hash

NUM_PAIRS = 4  # shown in a recipe's README

NOISE = '''"""A reward that knows nothing: a number of its own for each answer, the same for the same answer."""

import hashlib


def draw(prompt, text):
    return int(hashlib.sha256((prompt.id + text).encode()).hexdigest()[:8], 16) / 16**8
'''
RANDOM: Facts = {"rounds": 1, "scorers": [{"type": "python", "name": "random", "args": {"function": "noise:draw"}}]}


@dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
    """A folder under examples/, and what it runs before `tao run`. `verified`: its reward is a verifier's alone."""

    name: str
    before: tuple[tuple[str, ...], ...] = ()  # tao's arguments; "preferences.py": that script's
    verified: bool = False


def adapter(rate: str, *, epochs: int) -> tuple[str, ...]:
    return ("--learning-rate", rate, "--epochs", str(epochs), "--lora-rank", "16", "--lora-layers", "attention")


RECIPES = (
    Recipe(name="support_triage"),
    Recipe(name="instruction_following", verified=True),
    Recipe(
        name="text_to_sql",
        before=(
            ("generate", "preferences.yaml", "--run", "choices"),
            ("score", "preferences.yaml", "--run", "choices"),
            ("preferences.py", "choices", "--out", "pairs.jsonl"),
            ("reward", "train", "--pairs", "pairs.jsonl", "--out", "reward", *adapter("2e-3", epochs=3)),
        ),
    ),
    Recipe(
        name="document_qa",
        before=(("reward", "train", "--pairs", "preferences.jsonl", "--out", "reward", *adapter("1e-3", epochs=1)),),
    ),
)


def measure(lab: Lab, names: list[str]) -> None:
    for recipe in (r for r in RECIPES if r.name in names):
        for seed in SEEDS:
            name = f"{recipe.name}/{seed}"
            of = [_prompts_of(lab, recipe), _steps(lab, recipe)]
            lab.cell("recipes", name, lambda r=recipe, s=seed: _recipe(lab, r, s), of, run_of(lab, recipe, seed))
        for seed in SEEDS:
            name, of = f"{recipe.name}/{seed}", [_prompts_of(lab, recipe), NOISE, RANDOM]
            directory = run_of(lab, recipe, seed, "random")
            lab.cell("random reward", name, lambda r=recipe, s=seed: _random(lab, r, s), of, directory)


def run_of(lab: Lab, recipe: Recipe, seed: int, kind: str = "seed") -> Path:
    return lab.work / recipe.name / f"{kind}-{seed}"


def _prompts_of(lab: Lab, recipe: Recipe) -> list[str]:
    """The recipe's prompts, code and config."""
    if recipe.name == "support_triage":
        config = demo.config_of(Path("demo"), 0).model_dump(mode="json")
        return [content_hash(config, demo.tickets(), demo.NUM_PREFERENCE_TICKETS, asdict(demo.REWARD_TRAINING))]
    return [made_of(folder := lab.folder(recipe.name)), meaning(folder / "tao.yaml")]


def _steps(lab: Lab, recipe: Recipe) -> list[str]:
    """What is done before its run, with the files that say how."""
    files = {word for step in recipe.before for word in step if word.endswith((".yaml", ".py"))}
    code = [meaning(p) for n in sorted(files) for p in (lab.folder(recipe.name) / n, EXAMPLES / n) if p.exists()]
    return [content_hash(recipe.before), *code]


def _recipe(lab: Lab, recipe: Recipe, seed: int) -> Facts:
    directory = run_of(lab, recipe, seed)
    first = seed == SEEDS[0]  # its policy is kept, for `unbroken`
    if recipe.name == "support_triage":
        tao("demo", "--run", str(directory), "--seed", str(seed), cwd=lab.work / recipe.name)
        found = essence_alone(directory, keep_policy=first)
    else:
        folder = _before(lab, recipe)
        found = lab.run("tao.yaml", directory, {"seed": seed}, cwd=folder, keep_policy=first)
    return found | ({"pairs": _pairs(directory, found["after"]["round"])} if first else {})


def _pairs(directory: Path, round_: int) -> list[Facts]:
    """The first pairs that the report shows: drawn by chance, whatever came of them."""
    base, after = (read(Evaluation, directory / f"round-{r}" / "eval.json").samples for r in (0, round_))
    return [
        {"prompt": p.prompt, "before": p.before and p.before.model_dump(), "after": p.after and p.after.model_dump()}
        for p in compare(base, after).pairs[:NUM_PAIRS]
    ]


def _before(lab: Lab, recipe: Recipe) -> Path:
    """The recipe's folder, with what is made before its run."""

    def make(folder: Path) -> None:
        lab.folder(recipe.name)  # which was just removed, if the steps are others
        for command, *arguments in recipe.before:
            if command == "preferences.py":
                python(EXAMPLES / command, *arguments, cwd=folder)
            else:
                tao(command, *arguments, cwd=folder)

    folder = lab.folder(recipe.name)
    return made(folder, [made_of(folder), _steps(lab, recipe)], make, mark="ready_of")


def _random(lab: Lab, recipe: Recipe, seed: int) -> Facts:
    """One round from the recipe's own first groups: only what they are worth differs."""
    source, directory = run_of(lab, recipe, seed), run_of(lab, recipe, seed, "random")
    if not (source / "summary.json").exists():  # its cell is kept, its run is not
        _recipe(lab, recipe, seed)
    demo = recipe.name == "support_triage"
    folder = source if demo else lab.folder(recipe.name)
    (folder / "noise.py").write_text(NOISE)
    config = "config.yaml" if demo else "tao.yaml"
    with Run(source, read_only=True) as run:
        prompts = sum(len(run.read_table(name)) for name in run.names("round-1/groups/"))
    settings = RANDOM | {"seed": seed, "prompts_per_round": prompts}
    return lab.run(config, directory, settings, cwd=folder, start=source)
