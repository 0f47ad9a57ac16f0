"""The evidence as Markdown: one section an experiment, from what evidence.json holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import sections
from lab import EXAMPLES, HERE, Cells, Facts, Lab
from pooled import audited_tasks, average, clear, first_try, gain, of, seeds, verdicts, worst
from recipes import RECIPES, Recipe
from rows import head, number, row, signed

DOCS = HERE.parents[1] / "docs"
PICTURES = DOCS / "pictures"
START, END = "<!-- measured:start -->", "<!-- measured:end -->"
MOST_TASKS = 12  # a table of more says nothing at a glance
MOST_CHARACTERS = 220  # of a prompt's end or an answer, in a transcript
INTRODUCTION = (
    "Means over three seeds, or over as many as are named; in brackets 95 % intervals over held-out prompts (databases"
    " or documents where these are held out whole), each prompt averaged over its seeds. *Worst seed*: the"
    " smallest gain of one of them."
    " *After*: the round that was kept, the last one if none was; it is chosen by the reward on the same prompts, which"
    " favours it where the reward is also the audit (model size, several tasks). Differences are paired, prompt by"
    " prompt.\n\nSeeds are of sampling, order and new heads: all seeds of a table start from one base, and those with a"
    " reward model share it (but for the demo, support_triage, whose seeds have tickets and choices of their own). So"
    " intervals and worst seeds do not say how another decoder or another set of choices"
    " would do.\n\n"
    "What is not a recipe runs on small tasks with one right answer each (`benchmarks/evidence/tasks.py`), on decoders"
    " of so many weights that learnt them here from a corpus that is half wrong; where no size stands, 1M. The audit"
    " is then the exact answer, on questions held out; a run whose reward is exact was trained with the same judgement,"
    " on other questions. Objectives are compared on a second task too, `records` (`records.py`): its exact reward is"
    " the share of a record's fields that are right, its audit asks for the whole record."
)


def evidence(lab: Lab) -> list[str]:
    parts = {
        "recipes": recipes,
        "objectives": sections.objectives,
        "labels": sections.labels,
        "compute": sections.compute,
        "multi-task": sections.multi,
        "sizes": sections.sizes,
        "peer": sections.peer,
        "general text": sections.general,
        "other tasks": sections.others,
        "inference cost": sections.inference,
    }
    found = [line for name, write in parts.items() if (cells := lab.kept(name)) for line in write(cells, lab)]
    pictures = [path.stem for name in parts for path in sorted(PICTURES.glob(f"{name}*.svg"))]
    shown = [f"![{name}](../docs/pictures/{name}.svg)\n" for name in pictures]
    return ["## Evidence", "", INTRODUCTION, "", *shown, *found] if found else []


def recipes(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from ("### Recipes", "")
    yield from head(
        "recipe",
        "prompts audited / rewarded",
        "audit before",
        "audit after",
        "apart",
        "worst seed",
        "reward before",
        "after",
        "best of 16, as predicted",
        "verdicts",
        "random reward, one round",
        "minutes of `tao run`",
    )
    for recipe in RECIPES:
        own = of(cells, recipe.name)
        if not own:
            continue
        prompts = {what: first_try(own, "after", what).n for what in ("audit", "reward")}
        noise = of(lab.kept("random reward"), recipe.name)
        ks = max(own[0]["base"]["best_of"], key=int)
        best = sum(c["base"]["best_of"][ks]["mean"] for c in own) / len(own)
        yield row(
            f"{recipe.name} ({seeds(own)})",
            " / ".join(map(str, prompts.values())),
            number(first_try(own, "base", "audit")),
            number(first_try(own, "after", "audit")),
            "yes" if clear(own, "audit") else "no",
            f"{worst(own, 'audit'):+.3f}",
            number(first_try(own, "base", "reward")),
            number(first_try(own, "after", "reward")),
            f"{best:.3f}" + ("" if ks == "16" else f" (of {ks})"),
            verdicts(own),
            f"{verdicts(noise)}; audit {signed(gain(noise, 'audit'))}" if noise else "not run",
            f"{sum(sum(c['seconds'].values()) for c in own) / len(own) / 60:.0f}",
        )
    yield ""
    yield (
        "Random reward: one round on the recipe's own first groups, whatever its own number of rounds; what the audit "
        "gains there is no merit of a reward, but of the examples with which document_qa samples. Minutes are "
        "without the reward model's training. The audit of instruction_following is over prompts of the types that "
        "stand in its README, each with what became of it: its interval says nothing of other types."
    )
    yield ""


def documents(lab: Lab) -> dict[Path, str]:
    """What stands between the marks of each recipe's README and of docs/recipes.md becomes what was measured."""
    cells = lab.kept("recipes")
    blocks = {DOCS / "recipes.md": list(recipes(cells, lab))[2:]}
    for recipe in RECIPES:
        if own := of(cells, recipe.name):
            blocks[EXAMPLES / recipe.name / "README.md"] = list(readme(recipe, own, lab))
    return {path: _between_marks(path.read_text(encoding="utf-8"), block) for path, block in blocks.items()}


def readme(recipe: Recipe, own: Sequence[Facts], lab: Lab) -> Iterator[str]:
    """The recipe's numbers, and the first pairs of its first seed's report."""
    k = max(own[0]["base"]["best_of"], key=int)
    yield from head(f"means over {seeds(own)}, 95 % intervals over what is held out", "base", "after")
    yield row("audit of the first try", *(number(first_try(own, side, "audit")) for side in ("base", "after")))
    yield row("reward of the first try", *(number(first_try(own, side, "reward")) for side in ("base", "after")))
    best = sum(c["base"]["best_of"][k]["mean"] for c in own) / len(own)
    yield row(f"reward of the base's best of {k}: what `tao predict` expects", f"{best:.3f}", "")
    yield row("tokens of an answer", f"{average(own, 'length', 'base'):.0f}", f"{average(own, 'length'):.0f}")
    yield ""
    yield f"Audit gain {signed(gain(own, 'audit'))}, paired over prompts; worst seed {worst(own, 'audit'):+.3f}."
    yield f"Verdicts: {verdicts(own)}{_noise(of(lab.kept('random reward'), recipe.name))}."
    if flat := [c["prediction"]["flat"] for c in own if c["prediction"] and c["prediction"]["flat"]]:
        yield f"`tao predict` called {len(flat)} of {seeds(own)} flat, and they were run all the same: {flat[0]}."
    minutes = sum(sum(c["seconds"].values()) for c in own) / len(own) / 60
    apart = "" if recipe.verified else ", the reward model's training not counted"
    yield f"A run takes {minutes:.0f} minutes on two cores{apart}."
    yield ""
    yield from _by_task(own)
    if "pairs" not in own[0]:  # the first seed is not measured
        return
    yield from (
        "## Transcript",
        "",
        "Seed 0, the first pairs of its report: drawn by chance, whatever came of them.",
        "",
    )
    yield from head("held-out prompt, its end", "base", "tuned")
    for pair in own[0]["pairs"]:
        yield row(_tail(pair["prompt"]), *(_answer(pair[side]) for side in ("before", "after")))
    yield ""


def _by_task(own: Sequence[Facts]) -> Iterator[str]:
    """The audit of each kind of prompt, where there are several and few."""
    tasks = audited_tasks(own)
    if not 2 <= len(tasks) <= MOST_TASKS:
        return
    yield from head("audit of the first try, by kind of prompt", "prompts", "base", "after", "gain")
    for task in tasks:
        sides = [first_try(own, side, "audit", task) for side in ("base", "after")]
        yield row(f"`{task}`", str(sides[0].n), *map(number, sides), signed(gain(own, "audit", task)))
    yield ""


def _noise(noise: Sequence[Facts]) -> str:
    return f"; with a random reward {verdicts(noise)}, audit {signed(gain(noise, 'audit'))}" if noise else ""


def _tail(text: str) -> str:
    return _in_cell(text if len(text) <= MOST_CHARACTERS else "… " + text[-MOST_CHARACTERS:])


def _answer(answer: Facts | None) -> str:
    if answer is None:
        return ""
    text = answer["text"]
    audit = "" if answer["audit"] is None else f" ({answer['audit']:.2g})"
    return _in_cell(text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …") + audit


def _in_cell(text: str) -> str:
    """As code, on one line, whatever it holds."""
    fence = "``" if "`" in text else "`"
    return f"{fence} {' '.join(text.split())} {fence}".replace("|", "¦")


def _between_marks(text: str, lines: Sequence[str]) -> str:
    before, after = text.split(START)[0], text.split(END)[1]
    return f"{before}{START}\n" + "\n".join(lines).strip() + f"\n{END}{after}"
