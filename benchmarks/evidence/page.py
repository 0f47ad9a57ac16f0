"""The evidence as Markdown: one section an experiment, from what evidence.json holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import small
from compute import GROUP_SIZES, ROUNDS, TARGETS
from decoders import SIZES as DECODERS
from lab import EXAMPLES, HERE, SEEDS, Facts, Lab
from labels import SIZES as LABELS
from objectives import REWARDS, VARIANTS
from peer import reached
from pooled import better, clear, first_try, gain, worst
from recipes import RECIPES, Recipe
from tasks import TASKS

from opentao.bestofn import Interval

Cells = dict[str, Facts]
DOCS = HERE.parents[1] / "docs"
PICTURES = DOCS / "pictures"
START, END = "<!-- measured:start -->", "<!-- measured:end -->"
MOST_CHARACTERS = 220  # of a prompt's end or an answer, in a transcript
INTRODUCTION = (
    "Means over three seeds, or over as many as are named; in brackets 95 % intervals over held-out prompts (databases"
    " or documents where these are held out whole), each prompt averaged over its seeds. *Worst seed*: the"
    " smallest gain of one of them."
    " *After*: the round that was kept, the last one if none was; it is chosen by the reward on the same prompts, which"
    " favours it where the reward is also the audit (model size, several tasks). Differences are paired, prompt by"
    " prompt.\n\nSeeds are of sampling, order and new heads: all seeds of a table start from one base, and those with a"
    " reward model share it. So intervals and worst seeds do not say how another decoder or another set of choices"
    " would do.\n\n"
    "What is not a recipe runs on small tasks with one right answer each (`benchmarks/evidence/tasks.py`), on decoders"
    " of so many weights that learnt them here from a corpus that is half wrong; where no size stands, 1M. The audit"
    " is then the exact answer, on questions held out; a run whose reward is exact was trained with the same judgement,"
    " on other questions. Objectives, compute and several tasks are of one 1M decoder, labels and sizes of a later one"
    " that the same script trained on another machine; its base is a little lower."
)


def sections(lab: Lab) -> list[str]:
    parts = {
        "recipes": recipes,
        "objectives": objectives,
        "labels": labels,
        "compute": compute,
        "multi-task": multi,
        "sizes": sizes,
        "peer": peer,
        "general text": general,
        "other tasks": others,
        "inference cost": inference,
    }
    found = [line for name, write in parts.items() if (cells := lab.kept(name)) for line in write(cells, lab)]
    shown = [f"![{name}](../docs/pictures/{name}.svg)\n" for name in parts if (PICTURES / f"{name}.svg").exists()]
    return ["## Evidence", "", INTRODUCTION, "", *shown, *found] if found else []


def recipes(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from ("### Recipes", "")
    yield from _head(
        "recipe",
        "audit before",
        "audit after",
        "apart",
        "worst seed",
        "reward before",
        "after",
        "best of 16, as predicted",
        "verdicts",
        "random reward",
        "minutes",
    )
    for recipe in RECIPES:
        own = of(cells, recipe.name)
        if not own:
            continue
        noise = of(lab.kept("random reward"), recipe.name)
        ks = max(own[0]["base"]["best_of"], key=int)
        best = sum(c["base"]["best_of"][ks]["mean"] for c in own) / len(own)
        yield _row(
            f"{recipe.name} ({seeds(own)})",
            number(first_try(own, "base", "audit")),
            number(first_try(own, "after", "audit")),
            "yes" if clear(own, "audit") else "no",
            f"{worst(own, 'audit'):+.3f}",
            number(first_try(own, "base", "reward")),
            number(first_try(own, "after", "reward")),
            f"{best:.3f}" + ("" if ks == "16" else f" (of {ks})"),
            verdicts(own),
            verdicts(noise) if noise else "not run",
            f"{sum(sum(c['seconds'].values()) for c in own) / len(own) / 60:.0f}",
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
    yield from _head(f"means over {seeds(own)}, 95 % intervals over what is held out", "base", "after")
    yield _row("audit of the first try", *(number(first_try(own, side, "audit")) for side in ("base", "after")))
    yield _row("reward of the first try", *(number(first_try(own, side, "reward")) for side in ("base", "after")))
    best = sum(c["base"]["best_of"][k]["mean"] for c in own) / len(own)
    yield _row(f"reward of the base's best of {k}: what `tao predict` expects", f"{best:.3f}", "")
    yield _row("tokens of an answer", f"{average(own, 'length', 'base'):.0f}", f"{average(own, 'length'):.0f}")
    yield ""
    yield f"Audit gain {signed(gain(own, 'audit'))}, paired over prompts; worst seed {worst(own, 'audit'):+.3f}."
    yield f"Verdicts: {verdicts(own)}{_noise(of(lab.kept('random reward'), recipe.name))}."
    minutes = sum(sum(c["seconds"].values()) for c in own) / len(own) / 60
    apart = "" if recipe.verified else ", the reward model's training not counted"
    yield f"A run takes {minutes:.0f} minutes on two cores{apart}."
    yield from (
        "",
        "## Transcript",
        "",
        "Seed 0, the first pairs of its report: drawn by chance, whatever came of them.",
        "",
    )
    yield from _head("held-out prompt, its end", "base", "tuned")
    for pair in own[0]["pairs"]:
        yield _row(_tail(pair["prompt"]), *(_answer(pair[side]) for side in ("before", "after")))
    yield ""


def _noise(noise: Sequence[Facts]) -> str:
    return f"; with a random reward {verdicts(noise)}" if noise else ""


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


def objectives(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from (
        "All objectives get the same stored groups and two passes over them, so GRPO and its kin are not fresh at "
        "every step here. Learning rates were chosen on seed 0 with the exact verifier, on these held-out questions, "
        "among two or three for each objective (dev/LOG.md); those of distill, prefer and regress value lie at the "
        "upper end of what was tried. So the order of those that lie close together is not settled.",
        "",
    )
    for task in sorted({name.split("/")[0] for name in cells}):
        for reward in REWARDS:
            found = {v: own for v in VARIANTS if (own := of(cells, f"{task}/{reward}/{v}"))}
            if not found:
                continue
            yield from (f"### Objectives at equal compute: {task}, reward {reward}", "")
            yield from _head(
                "objective",
                "reward",
                "audit",
                "audit gain",
                "audit less that of regress",
                "worst seed",
                "KL",
                "tokens",
                "training s",
                "verdicts",
            )
            for variant, own in found.items():
                yield _row(
                    variant,
                    number(first_try(own, "after", "reward")),
                    number(first_try(own, "after", "audit")),
                    signed(gain(own, "audit")),
                    _less(own, found.get("regress")),
                    f"{worst(own, 'audit'):+.3f}",
                    f"{average(own, 'kl'):.2f}",
                    f"{average(own, 'length'):.1f}",
                    f"{sum(c['seconds']['train'] for c in own) / len(own):.1f}",
                    verdicts(own),
                )
            yield ""
            if all("task" in own[0]["first_tries"]["base"] for own in found.values()):
                yield from _by_task(found)


def _by_task(found: dict[str, list[Facts]]) -> Iterator[str]:
    """The same runs, task by task."""
    yield from _head("audit gain of the same runs", *TASKS)
    for variant, own in found.items():
        yield _row(variant, *(signed(gain(own, "audit", task)) for task in TASKS))
    yield ""


def labels(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from (
        "### Against labels",
        "",
        f"TAO's {small.CONFIG['prompts_per_round']} prompts have no label, but its scorer is a program that knows "
        f"right from wrong; in the second row it is a reward model of {small.NUM_PREFERENCES} choices between right "
        "and wrong answers. Fine-tuning is at its best of the passes "
        "and rates that were tried for each number of labels, on these questions.",
        "",
    )
    yield from _head(
        "trained on", "audit of the first try", "gain", "less that of TAO", "worst seed", "KL", "passes, rate"
    )
    rows = {"prompts, exact verifier (TAO)": of(cells, "TAO")}
    rows |= {"prompts, reward model (TAO)": of(cells, "TAO by choices")}
    rows |= {f"{n} labels": of(cells, str(n)) for n in LABELS}
    for name, own in rows.items():
        if own:
            how = own[0].get("settings", small.TRAIN)
            yield _row(
                name,
                number(first_try(own, "after", "audit")),
                signed(gain(own, "audit")),
                _less(own, of(cells, "TAO")),
                f"{worst(own, 'audit'):+.3f}",
                f"{average(own, 'kl'):.2f}",
                f"{how['train.epochs']}, {how['train.learning_rate']:g}",
            )
    yield ""


def compute(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from ("### Tuning compute", "", "Audit of the first try; and how many answers were sampled to train on.", "")
    yield from _head("N", *(f"{r} round{'s' * (r > 1)}" for r in ROUNDS))
    for n in GROUP_SIZES:
        runs = of(cells, str(n))
        columns = []
        for r in ROUNDS:
            own = [run[str(r)] for run in runs if str(r) in run]
            answers = n * r * small.CONFIG["prompts_per_round"]
            columns.append(f"{number(first_try(own, 'after', 'audit'))}; {answers:,}" if own else "")
        yield _row(str(n), *columns)
    yield ""
    yield from _head("N, one round", *(f"target_n {t}" for t in TARGETS))
    for n in (8, 32):
        yield _row(str(n), *(_after(of(cells, f"{n}/target {t}")) for t in TARGETS))
    yield ""
    yield from _head("answers", "instead of", "audit of the first less the second")
    for first, second in (((8, 1), (2, 1)), ((8, 1), (2, 4)), ((2, 2), (2, 1)), ((32, 4), (8, 1))):
        own, other = ([run[str(r)] for run in of(cells, str(n)) if str(r) in run] for n, r in (first, second))
        yield _row(*(f"N = {n}, {r} round{'s' * (r > 1)}" for n, r in (first, second)), _less(own, other))
    yield ""


def multi(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from ("### One run over three tasks", "")
    yield from (
        f"A run of its own is judged on {small.CONFIG['prompts']['max_heldout']} held-out questions of its task, the "
        "run for all on its share of as many mixed ones.",
        "",
    )
    yield from _head("task", "before", "after, one run for all", "gain", "before", "after, a run of its own", "gain")
    together = of(cells, "all")
    for task in TASKS:
        own = of(cells, task)
        yield _row(
            task,
            number(first_try(together, "base", "audit", task)),
            number(first_try(together, "after", "audit", task)),
            signed(gain(together, "audit", task)),
            number(first_try(own, "base", "audit")) if own else "",
            _after(own),
            signed(gain(own, "audit")) if own else "",
        )
    yield ""


def sizes(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from (
        "### Model size",
        "",
        "Decoders of 1M and 3M weights learnt the tasks here; the 135M model, tuned at half their rate, is shown three "
        "solved examples in the prompt. So only the first two compare in everything but size.",
        "",
    )
    yield from _head(
        "model",
        "first try before",
        "best of 16",
        "first try after",
        "gain",
        "share of the headroom baked",
        "worst seed",
    )
    for size in (*DECODERS, "135M"):
        if own := of(cells, size):
            best = sum(c["base"]["best_of"]["16"]["mean"] for c in own) / len(own)
            before, after = (first_try(own, side, "audit") for side in ("base", "after"))
            yield _row(
                size,
                number(before),
                f"{best:.3f}",
                number(after),
                signed(gain(own, "audit")),
                f"{(after.mean - before.mean) / (best - before.mean):.2f}" if best > before.mean else "none to bake",
                f"{worst(own, 'audit'):+.3f}",
            )
    yield ""


def general(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from (
        "### What else changes: general text",
        "",
        "Paragraphs of Wikipedia, those that document_qa holds out (it trains on others of most of their articles).",
        "",
    )
    yield from _head("trained on", "texts", "perplexity before", "after", "nats a token more")
    for name, facts in cells.items():
        both = facts["perplexity"]
        more = Interval(**facts["nats"])
        yield _row(name, str(facts["texts"]), f"{both['base']:.2f}", f"{both['after']:.2f}", signed(more))
    yield ""


def others(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from ("### What else changes: tasks that were not trained", "")
    yield from _head("trained on", "judged on", "audit before", "after", "change")
    for name, facts in cells.items():
        sides = (number(Interval(**facts[side])) for side in ("before", "after"))
        yield _row(*name.split("/"), *sides, signed(Interval(**facts["change"])))
    yield ""


def inference(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from ("### What else changes: the cost of an answer", "")
    yield from ("Held-out prompts, one answer each, base and tuned policy in turns on the same machine.", "")
    yield from _head(
        "trained on", "tokens an answer before", "after", "tokens/s before", "after", "answers/s before", "after"
    )
    for name, facts in cells.items():
        sides = [facts["before"], facts["after"]]
        tokens = (Interval(**side["tokens"]) for side in sides)
        yield _row(
            name,
            *(f"{i.mean:.1f} ({i.low:.1f} to {i.high:.1f})" for i in tokens),
            *(f"{side['tokens_per_second']:.0f}" for side in sides),
            *(f"{side['answers_per_second']:.2f}" for side in sides),
        )
    yield ""


def peer(cells: Cells, lab: Lab) -> Iterator[str]:
    yield from (
        "### Against TRL's GRPOTrainer",
        "",
        "Seconds of training until the first policy that is as good as the base's best of 8, seed by seed; judged were "
        "ours after each round and four of TRL's, evenly over its time. OpenTAO multiplied in bf16, as it did by "
        "default on that machine; TRL in fp32. TRL's rate was tried on seed 0, constant; in so few steps it is partly "
        "luck.",
        "",
    )
    yield from _head("task", "best of 8", "OpenTAO: seconds", "TRL: seconds", "TRL's last first try", "sooner by")
    for task in sorted({name.split("/")[0] for name in cells}):
        ours, theirs = of(cells, f"{task}/opentao"), of(cells, f"{task}/trl")
        if not theirs:
            continue
        levels = [o["best_of"]["8"]["mean"] for o in ours]
        times = [
            [reached(run["points"], level) for run, level in zip(side, levels, strict=True)] for side in (ours, theirs)
        ]
        ends = [t["points"][-1] for t in theirs]
        yield _row(
            task,
            ", ".join(f"{level:.2f}" for level in levels),
            ", ".join("never" if s is None else f"{s:.0f}" for s in times[0]),
            ", ".join(
                f"not in {e['seconds']:.0f}" if s is None else f"{s:.0f}" for s, e in zip(times[1], ends, strict=True)
            ),
            ", ".join(f"{e['first_try']['mean']:.2f}" for e in ends),
            ", ".join(_sooner(o, t, e["seconds"]) for o, t, e in zip(*times, ends, strict=True)),
        )
    yield ""


def _sooner(ours: float | None, theirs: float | None, end: float) -> str:
    if ours is None:
        return "not reached"
    return f"more than {end / ours:.1f}×" if theirs is None else f"{theirs / ours:.1f}×"


def of(cells: Cells, name: str) -> list[Facts]:
    """The cells ``name/SEED`` that are there."""
    return [cells[f"{name}/{seed}"] for seed in SEEDS if f"{name}/{seed}" in cells]


def average(cells: Sequence[Facts], what: str, side: str = "after") -> float:
    return float(sum(c[side][what]["mean"] for c in cells) / len(cells))


def seeds(cells: Sequence[Facts]) -> str:
    return f"{len(cells)} seed{'s' * (len(cells) > 1)}"


def verdicts(cells: Sequence[Facts]) -> str:
    kept = sum(c["verdict"] == "promote" for c in cells)
    return f"promote {kept} of {len(cells)}"


def number(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def _after(cells: Sequence[Facts]) -> str:
    return number(first_try(cells, "after", "audit")) if cells else ""


def _less(cells: Sequence[Facts], others: Sequence[Facts] | None) -> str:
    if not cells or not others:
        return ""
    return "—" if cells[0] is others[0] else signed(better(cells, others, "audit"))


def _head(*columns: str) -> Iterator[str]:
    yield _row(*columns)
    yield "|" + "---|" * len(columns)


def _row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"
