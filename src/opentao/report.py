"""One page about a run, for people: `report.html`, readable without a network.

It is made from `summary.json`, the two `eval.json` of base and shown round, `set_aside.jsonl` and `config.yaml` only,
so it can be made again at any time (`tao report DIR`). What models and users wrote is hostile: the template engine
escapes every value, `visible` spells out control characters, and the page's own policy forbids scripts and requests.

Left out: scripts, even our own. Everything works as plain HTML with inline SVG.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from opentao.charts import Chart, Level, Series, draw
from opentao.errors import DataError
from opentao.pages import load_template
from opentao.summary import (
    NO_MEAN,
    Answer,
    Audit,
    Evaluation,
    Guard,
    Mean,
    Round,
    Sample,
    Solved,
    Summary,
    read,
)

NUM_PAIRS = 20
PAIRS_SEED = 0
MOST_CHARACTERS = 4000  # of one response on the page
MOST_ROUNDS_NAMED = 8  # under a picture; more would touch
MOST_SET_ASIDE = 20  # rows listed; the file has them all


def write_report(directory: Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Raises:
        DataError: a file of the run is missing or lacks a key.
    """
    summary = read(Summary, directory / "summary.json")
    base = read(Evaluation, directory / "round-0" / "eval.json")
    after = summary.shown
    tuned = read(Evaluation, directory / f"round-{after.round}" / "eval.json") if after else None
    config = directory / "config.yaml"
    rewards = {"reward": lambda value: "unscored" if value is None else f"{value:.3g}".replace("-", "−")}
    page = load_template("report.html.j2", rewards | {"worst_canary": worst_canary}).render(
        run=summary,
        base=summary.base,
        after=after,
        equal=_equal_sentence(summary.base, after),
        curves=_curves(summary),
        histories=_histories(summary),
        forecasts=_forecasts(summary),
        solves=_solves(summary),
        costs=_costs(summary),
        compared=compare(base.samples, tuned.samples if tuned else None),
        set_aside=_set_aside(directory / "set_aside.jsonl"),
        config=summary.config or (config.read_text(encoding="utf-8") if config.exists() else None),
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------- best of k


def equal_k(curve: Mapping[int, Mean], value: float) -> float | None:
    """The k whose best-of-k equals `value`, interpolated in log2 k; None outside the curve.

    >>> curve = {k: Mean(mean=m, low=None, high=None, n=9) for k, m in {1: 0.0, 2: 0.4, 4: 0.6}.items()}
    >>> round(equal_k(curve, 0.5), 3)
    2.828
    """
    points = [(math.log2(k), m.mean) for k, m in sorted(curve.items()) if m.mean is not None]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 <= value <= y1 and y1 > y0:
            return float(2 ** (x0 + (x1 - x0) * (value - y0) / (y1 - y0)))
    return None


def _equal_sentence(base: Round, after: Round | None) -> str | None:
    """What the first try is worth, in tries of the base."""
    if after is None or after.first_try.mean is None or base.first_try.mean is None:
        return None
    value, most = after.first_try.mean, max(base.best_of)
    k, top = equal_k(base.best_of, value), base.best_of[most].mean
    if value < base.first_try.mean:
        return "By reward, its first try is below the base’s."
    if k is not None:
        return f"By reward, its first try is worth the best of {k:.1f} tries of the base."
    if top is not None and value > top:
        return f"By reward, its first try is above the base’s best of {most}, the most that was measured."
    return None


@dataclass(kw_only=True, slots=True, frozen=True)
class Picture:
    """One drawn panel. So many prompts are behind it: "64", or "39 to 64" where some points have fewer."""

    heading: str
    svg: Markup
    n: str


def _picture(heading: str, chart: Chart) -> Picture:
    counts = {mean.n for series in chart.series for mean in series.points.values() if mean.mean is not None}
    least, most = min(counts, default=0), max(counts, default=0)
    return Picture(heading=heading, svg=draw(chart), n=f"{most}" if least == most else f"{least} to {most}")


def _curves(run: Summary) -> list[Picture]:
    """Best of k before and after, by the reward and by the audit."""
    pictures = [_reward_curve(run)]
    if run.base.audit is not None:
        pictures.append(_audit_curve(run, run.base.audit))
    return [p for p in pictures if p.svg]


def _log2(curve: Mapping[int, Mean]) -> dict[float, Mean]:
    return {math.log2(k): mean for k, mean in curve.items()}


def _k_chart(title: str, series: Sequence[Series], levels: Sequence[Level]) -> Chart:
    last = max((x for s in series for x in s.points), default=0.0)
    powers = {float(p): str(2**p) for p in range(math.floor(last) + 1)}
    return Chart(title=title, x_label="best of k tries", x_ticks=powers, series=series, levels=levels)


def _reward_curve(run: Summary) -> Picture:
    base, after = run.base, run.shown
    series = [Series(name="base", points=_log2(base.best_of), style="base")]
    levels = _baselines(run, "reward")
    eight = base.best_of.get(base.baked_k)
    if eight is not None and eight.mean is not None:
        levels.append(Level(name=f"base best of {base.baked_k}", y=eight.mean, style="base"))
    if after is not None:
        series.append(Series(name=after.name, points=_log2(after.best_of), style="tuned"))
        levels += _first_try(
            after, equal_k(base.best_of, math.nan if after.first_try.mean is None else after.first_try.mean)
        )
    return _picture("Reward", _k_chart(f"Reward of the best of k tries{_sides(after)}", series, levels))


def _sides(after: Round | None) -> str:
    return ", before and after" if after is not None else ""


def _first_try(after: Round, k: float | None) -> list[Level]:
    """The tuned first try as a line to the point of the base's curve that it equals."""
    if after.first_try.mean is None:
        return []
    end, drop = (None, None) if k is None else (math.log2(k), f"k = {k:.1f}")
    name = f"{after.name} first try" if k is None else ""
    return [Level(name=name, y=after.first_try.mean, style="tuned", end=end, drop=drop)]


def _audit_curve(run: Summary, audit: Audit) -> Picture:
    """The audit's own best of k shows what is in reach; the picked points show what the reward finds of it."""
    after = run.shown
    series = [
        Series(name="base", points=_log2(audit.best_of), style="base"),
        Series(name="picked by reward", points=_log2(audit.selected_of), style="faint", whiskers=True),
    ]
    if after is not None and after.audit is not None:
        series.append(Series(name=after.name, points=_log2(after.audit.best_of), style="tuned"))
    chart = _k_chart(f"Audit of the best of k tries{_sides(after)}", series, _baselines(run, "audit"))
    return _picture(f"Audit: {run.audit}" if run.audit else "Audit", chart)


def _baselines(run: Summary, on: str) -> list[Level]:
    means = [(b.name, b.value.mean) for b in run.baselines if b.on == on]
    return [Level(name=name, y=mean, style="baseline") for name, mean in means if mean is not None]


# --------------------------------------------------------------------------------------------------- prediction


@dataclass(kw_only=True, slots=True, frozen=True)
class Forecast:
    """First try by one scale: before, predicted if all is baked, achieved."""

    by: str  # "reward" or "audit"
    first: Mean
    target: Mean
    achieved: Mean
    way: float | None  # (achieved − first) / (target − first)


def _forecasts(run: Summary) -> list[Forecast]:
    if run.prediction is None:
        return []
    after = run.shown
    rows = [("reward", run.prediction.first_try, run.prediction.target, after.first_try if after else NO_MEAN)]
    if (audit := run.prediction.audit) is not None:
        achieved = after.audit.first_try if after and after.audit else NO_MEAN
        rows.append(("audit", audit.first_try, audit.target, achieved))
    return [Forecast(by=by, first=f, target=t, achieved=a, way=_way(f, t, a)) for by, f, t, a in rows]


def _way(first: Mean, target: Mean, achieved: Mean) -> float | None:
    """How far the first try came; None where there was no way to go."""
    if first.mean is None or target.mean is None or achieved.mean is None or target.mean <= first.mean:
        return None
    return (achieved.mean - first.mean) / (target.mean - first.mean)


@dataclass(kw_only=True, slots=True, frozen=True)
class Solve:
    """One bar: who solves how many prompts."""

    who: str
    solved: Solved


def _solves(run: Summary) -> list[Solve]:
    """By reward and by audit, before and after; nothing where scores are continuous."""
    rounds = [run.base, *([run.shown] if run.shown else [])]
    bars = [Solve(who=f"{r.name}, by reward", solved=r.solved) for r in rounds if r.solved]
    return bars + [
        Solve(who=f"{r.name}, by audit", solved=r.audit.solved) for r in rounds if r.audit and r.audit.solved
    ]


# --------------------------------------------------------------------------------------------------- rounds and cost


def worst_canary(guard: Guard) -> tuple[str, float] | None:
    """The canary that scores high most often, if any does."""
    known = {name: value for name, value in guard.canaries.items() if value}
    return max(known.items(), key=lambda item: item[1]) if known else None


def _histories(run: Summary) -> list[Picture]:
    """First try, audit and KL over the rounds; nothing without rounds."""
    every = [run.base, *run.rounds]
    audits = {r.round: r.audit.first_try for r in every if r.audit is not None}
    levels = {by: _baselines(run, by) for by in ("reward", "audit")}
    for row in _forecasts(run):
        levels[row.by] += _predicted(row.target)
    pictures = [
        _history("First try by reward", {r.round: r.first_try for r in every}, levels["reward"]),
        _history("First try by audit", audits, levels["audit"]),
        _history("KL from the base, nats a response", {r.round: r.kl for r in every}, []),
    ]
    return [p for p in pictures if p.svg] if run.rounds else []


def _predicted(target: Mean) -> list[Level]:
    return [] if target.mean is None else [Level(name="predicted", y=target.mean, style="base")]


def _history(heading: str, means: Mapping[int, Mean], levels: Sequence[Level]) -> Picture:
    series = Series(name="", points={float(k): m for k, m in means.items()}, style="tuned", whiskers=True)
    every = -(-len(means) // MOST_ROUNDS_NAMED)
    names = {float(k): "base" if k == 0 else str(k) for k in means if k % every == 0}
    chart = Chart(title=f"{heading}, by round", x_label="round", x_ticks=names, series=[series], levels=levels)
    return _picture(heading, chart)


@dataclass(kw_only=True, slots=True, frozen=True)
class Cost:
    """One stage over the whole run."""

    stage: str
    tokens: int
    seconds: float
    share: float  # of the longest stage's seconds, 0 to 1


def _costs(run: Summary) -> list[Cost]:
    totals = run.stage_totals()
    longest = max((seconds for _, seconds in totals.values()), default=0.0) or 1.0
    return [Cost(stage=name, tokens=t, seconds=s, share=s / longest) for name, (t, s) in totals.items()]


# --------------------------------------------------------------------------------------------------- side by side


@dataclass(kw_only=True, slots=True, frozen=True)
class Pair:
    """One held-out prompt before and after. `after` is None without rounds, or where there is no response."""

    prompt: str
    before: Answer | None
    after: Answer | None
    outcome: str  # "better", "worse", "equal", "unscored"


@dataclass(kw_only=True, slots=True, frozen=True)
class Comparison:
    """The pairs that are shown, and how all of them fell."""

    pairs: list[Pair]
    shown: Counter[str]
    every: Counter[str]
    num_prompts: int
    seed: int = PAIRS_SEED


def compare(base: Sequence[Sample], tuned: Sequence[Sample] | None) -> Comparison:
    """First responses of the same prompts. The choice depends on ids and seed only, never on how a pair fell."""
    by_id = {s.prompt_id: s for s in (base if tuned is None else tuned)}
    common = sorted((s for s in base if s.prompt_id in by_id), key=lambda s: s.prompt_id)
    pairs = [_pair(s, None if tuned is None else by_id[s.prompt_id]) for s in common]
    chosen = random.Random(PAIRS_SEED).sample(pairs, min(NUM_PAIRS, len(pairs)))
    return Comparison(
        pairs=chosen,
        shown=Counter(p.outcome for p in chosen),
        every=Counter(p.outcome for p in pairs),
        num_prompts=len(pairs),
    )


def _pair(base: Sample, tuned: Sample | None) -> Pair:
    before, after = _first(base), _first(tuned)
    return Pair(prompt=_cut(base.prompt), before=before, after=after, outcome=_outcome(before, after))


def _first(sample: Sample | None) -> Answer | None:
    if sample is None or not sample.responses:
        return None
    answer = sample.responses[0]
    return answer.model_copy(update={"text": _cut(answer.text)})


def _cut(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]} … ({left_out:,} more characters)"


def _outcome(before: Answer | None, after: Answer | None) -> str:
    if before is None or after is None or before.reward is None or after.reward is None:
        return "unscored"
    if math.isclose(before.reward, after.reward, rel_tol=1e-9, abs_tol=1e-12):
        return "equal"
    return "better" if after.reward > before.reward else "worse"


def _set_aside(path: Path) -> list[dict[str, Any]]:
    """The first rows that were set aside; no file means none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:MOST_SET_ASIDE]  # a reason may hold other line ends
    try:
        return [{key: json.loads(line)[key] for key in ("file", "line", "reason")} for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected rows with file, line and reason: {error}") from error
