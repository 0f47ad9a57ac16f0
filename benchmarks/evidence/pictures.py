"""The evidence as pictures, docs/pictures/*.svg: readable on a light and on a dark page, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import small
from compute import GROUP_SIZES, ROUNDS
from decoders import SIZES as DECODERS
from lab import Cells, Facts, Lab
from labels import SIZES as LABELS
from objectives import REWARD_NAMES, REWARDS, VARIANTS
from page import PICTURES
from pooled import first_try, of, tasks_of
from recipes import RECIPES

from opentao.bestofn import Interval

BEFORE, AFTER, LIMIT = "#8a8f98", "#0d9488", "#d97706"
GREY = "#808690"


def draw_all(lab: Lab) -> None:
    """Draws what there are figures for."""
    pictures: dict[str, tuple[str, Callable[[Any, Cells], None]]] = {
        "recipes": ("Audit of the first try before and after, by recipe", recipes),
        "labels": ("Labels, or a judge of answers to prompts without them", labels),
        "compute": ("First try against group size and rounds", compute),
        "sizes": ("First try before and after by model size", sizes),
        "peer": ("From the base's first try (0) to its best of 8 (1), seed by seed", peer),
    }
    for name, (title, draw) in pictures.items():
        if cells := lab.kept(name):
            _picture(PICTURES / f"{name}.svg", title, draw, cells)
    cells = lab.kept("objectives")
    for task in tasks_of(cells):
        title = f"Audit of the first try by objective and reward ({task})"
        _picture(PICTURES / f"objectives-{task}.svg", title, partial(objectives, task=task), cells)


def recipes(axes: Any, cells: Cells) -> None:
    found = [(r.name, own) for r in RECIPES if (own := of(cells, r.name))]
    _before_after(axes, found)
    axes.set_xlabel("audit of the first try")


def objectives(axes: Any, cells: Cells, task: str) -> None:
    for place, reward in enumerate(REWARDS):
        for i, variant in enumerate(VARIANTS):
            if own := of(cells, f"{task}/{reward}/{variant}"):
                x = place + (i - len(VARIANTS) / 2) * 0.1
                label = variant if place == 0 else None
                _whisker(axes, x, first_try(own, "after", "audit"), f"C{i}", label, upright=True)
                base = first_try(own, "base", "audit").mean
        axes.plot([place - 0.45, place + 0.4], [base, base], color=BEFORE, lw=1, label="base" if place == 0 else None)
    axes.set_xticks(range(len(REWARDS)), [f"reward: {REWARD_NAMES[r]}" for r in REWARDS])
    axes.set_ylabel("audit of the first try")
    _legend(axes)


def labels(axes: Any, cells: Cells) -> None:
    sizes = [n for n in LABELS if of(cells, str(n))]
    values = [first_try(of(cells, str(n)), "after", "audit") for n in sizes]
    _line(axes, sizes, values, BEFORE, "fine-tuned on labels")
    if own := of(cells, "TAO"):
        tao, base = first_try(own, "after", "audit"), first_try(own, "base", "audit")
        axes.axhspan(tao.low, tao.high, color=AFTER, alpha=0.15, lw=0)
        label = f"TAO, one round of {small.CONFIG['prompts_per_round']} prompts, exact verifier"
        axes.axhline(tao.mean, color=AFTER, label=label)
        axes.axhline(base.mean, color=GREY, lw=1, ls=":", label="base")
    if own := of(cells, "TAO by choices"):
        label = "TAO, reward model of 300 right answers above wrong ones"
        axes.axhline(first_try(own, "after", "audit").mean, color=LIMIT, ls="--", label=label)
    axes.set_xscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xlabel("labels")
    axes.set_ylabel("audit of the first try")
    _legend(axes)


def compute(axes: Any, cells: Cells) -> None:
    for i, r in enumerate(ROUNDS):
        found = {n: [run[str(r)] for run in of(cells, str(n)) if str(r) in run] for n in GROUP_SIZES}
        there = {n: first_try(own, "after", "audit") for n, own in found.items() if own}
        answers = [n * r * small.CONFIG["prompts_per_round"] for n in there]
        label = f"{r} round{'s' * (r > 1)}, N from {min(there)} to {max(there)}"
        _line(axes, answers, list(there.values()), f"C{i}", label)
    axes.set_xscale("log")
    axes.set_xlabel("answers sampled to train on")
    axes.set_ylabel("audit of the first try")
    _legend(axes)


def sizes(axes: Any, cells: Cells) -> None:
    _before_after(axes, [(size, own) for size in (*DECODERS, "135M") if (own := of(cells, size))])
    axes.set_xlabel("audit of the first try; right end of the thin line: best of 16")


def peer(axes: Any, cells: Cells) -> None:
    for task, line in zip(tasks_of(cells), ("-", "--", ":"), strict=False):
        ours = of(cells, f"{task}/opentao")
        for system, runs, colour in (("OpenTAO", ours, AFTER), ("TRL", of(cells, f"{task}/trl"), LIMIT)):
            for i, (run, own) in enumerate(zip(runs, ours, strict=False)):
                tries = [point["first_try"]["mean"] for point in run["points"]]
                way = own["best_of"]["8"]["mean"] - tries[0]
                minutes = [point["seconds"] / 60 for point in run["points"]]
                label = f"{system}, {task}" if i == 0 else None
                axes.plot(minutes, [(t - tries[0]) / way for t in tries], f"o{line}", ms=3, color=colour, label=label)
    axes.axhline(1, color=GREY, lw=1, ls=":")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("share of the way")
    _legend(axes)


def _before_after(axes: Any, found: Sequence[tuple[str, list[Facts]]]) -> None:
    for y, (_, own) in enumerate(found):
        best = sum(c["base"]["best_of"]["16"]["mean"] for c in own if "16" in c["base"]["best_of"]) / len(own)
        before, after = (first_try(own, side, "audit") for side in ("base", "after"))
        if all(c["base"]["first_try"]["mean"] == c["base"]["audit"]["first_try"]["mean"] for c in own):
            label = "to the base's best of 16" if y == 0 else None
            axes.plot([before.mean, best], [y, y], color=LIMIT, lw=1, label=label)
        _whisker(axes, y - 0.12, before, BEFORE, "before" if y == 0 else None)
        _whisker(axes, y + 0.12, after, AFTER, "after" if y == 0 else None)
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    _legend(axes)


def _whisker(axes: Any, at: float, value: Interval, colour: str, label: str | None, *, upright: bool = False) -> None:
    reach = [[value.mean - value.low], [value.high - value.mean]]
    x, y = (at, value.mean) if upright else (value.mean, at)
    axes.errorbar(
        [x], [y], **{"yerr" if upright else "xerr": reach}, fmt="o", ms=4, color=colour, capsize=2, lw=1.2, label=label
    )


def _line(axes: Any, x: Sequence[float], values: Sequence[Interval], colour: str, label: str) -> None:
    axes.plot(x, [v.mean for v in values], "o-", ms=4, color=colour, label=label)
    axes.fill_between(x, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.15, lw=0)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _picture(path: Path, title: str, draw: Callable[[Any, Cells], None], cells: Cells) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    style = {"svg.hashsalt": "opentao", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
        draw(axes, cells)
        axes.set_title(title, color=GREY, fontsize=10, loc="left")
        axes.tick_params(colors=GREY)
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
