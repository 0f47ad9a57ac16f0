"""What `tao reward eval` leaves: `eval.json`, a page with pictures, and a model card, in one folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentao.charts import Chart, Level, Series, draw
from opentao.pages import load_template
from opentao.report import Picture
from opentao.summary import Mean, interval, number, percent

Facts = Mapping[str, Any]


def write_reward_report(folder: Path, model: str, source: str, facts: Facts) -> Path:
    """Write the three files; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(dict(facts), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(model_card(model, source, facts), encoding="utf-8")
    page = load_template("reward.html.j2", {"mean": as_mean}).render(
        model=model, source=source, facts=facts, pictures=pictures(facts), canaries=worst_first(facts["canaries"])
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def as_mean(value: Facts | None) -> Mean:
    return Mean.model_validate(dict(value)) if value else Mean(mean=None, low=None, high=None, n=0)


def pictures(facts: Facts) -> list[Picture]:
    """The calibration curve, and the best-of-n gain if there are groups of known worth."""
    curve = facts["calibration"]["curve"]
    points = {100 * c["confidence"]: as_mean(c["accuracy"]) for c in curve}
    ideal = {100 * c["confidence"]: Mean(mean=c["confidence"], low=None, high=None, n=c["pairs"]) for c in curve}
    series = [
        Series(name="ideal", points=ideal, style="faint"),
        Series(name="measured", points=points, style="tuned", whiskers=True),
    ]
    ticks = {float(x): f"{x} %" for x in (50, 60, 70, 80, 90, 100)}
    chart = Chart(
        title="Share of people who agree, by how sure the model is",
        x_label="confidence",
        x_ticks=ticks,
        series=series,
    )
    found = [Picture(heading="Is it as sure as it should be?", svg=draw(chart), n=sum(c["pairs"] for c in curve))]
    return found + ([_best_of_n(facts["best_of_n"])] if facts["best_of_n"] else [])


def _best_of_n(facts: Facts) -> Picture:
    curve = facts["curve"]
    lines = [
        Series(name=name, points={math.log2(c["n"]): as_mean(c[key]) for c in curve}, style=style)
        for name, key, style in (("the best there is", "oracle", "base"), ("picked by the model", "picked", "tuned"))
    ]
    first = as_mean(curve[0]["picked"]).mean
    levels = [Level(name="first try", y=first, style="baseline")] if first is not None else []
    chart = Chart(
        title="Known worth of the response that is picked among n",
        x_label="n",
        x_ticks={math.log2(c["n"]): str(c["n"]) for c in curve},
        series=lines,
        levels=levels,
    )
    return Picture(heading="What it picks among n responses", svg=draw(chart), n=facts["groups"])


def worst_first(canaries: Mapping[str, Facts]) -> list[tuple[str, Mean, Mean]]:
    rows = [(name, as_mean(own["beats_best"]), as_mean(own["beats_worst"])) for name, own in canaries.items()]
    return sorted(rows, key=lambda row: -(row[1].mean or 0.0))


def model_card(model: str, source: str, facts: Facts) -> str:
    """Markdown in the form of a Hugging Face model card."""
    accuracy, longer = as_mean(facts["accuracy"]), as_mean(facts["longer_wins"])
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags: [reward-model, opentao]",
        "---",
        "",
        f"# Reward model {model}",
        "",
        "Scores an answer to a prompt: higher means that people are more likely to prefer it. Trained and tested with"
        " OpenTAO.",
        "",
        f"Tested on {facts['pairs']} compared pairs over {facts['prompts']} prompts from {source};"
        " each ranking counts once.",
        "",
        "| | mean | interval |",
        "|---|---|---|",
        f"| agrees with people | {percent(accuracy)} | {_span(accuracy)} |",
        f"| “the longer answer wins” | {percent(longer)} | {_span(longer)} |",
        f"| calibration error | {number(facts['calibration']['error'], 3)} | |",
        f"| loss a choice (a coin: 0.693) | {number(facts['calibration']['loss'], 3)} | |",
    ]
    lines += _rows(facts)
    lines += ["", "## Alarms", ""]
    lines += [f"* {alarm}" for alarm in facts["alarms"]] or ["None. That is good news, and no proof."]
    lines += [
        "",
        "## Limits",
        "",
        "It knows what the people who chose knew, on prompts like theirs. A policy that is trained against it will find"
        " what it overlooks: keep an audit that it never saw.",
        "",
    ]
    return "\n".join(lines)


def _rows(facts: Facts) -> list[str]:
    length = facts["length"]
    rows: list[tuple[str, Mean]] = [
        ("agrees where people preferred the longer answer", as_mean(length["longer_preferred"])),
        ("agrees where people preferred the shorter answer", as_mean(length["shorter_preferred"])),
    ]
    rows += [(f"agrees on {name}", as_mean(own["accuracy"])) for name, own in facts["subsets"].items()]
    people = facts["annotators"]
    if people["human_human"]:
        rows.append(("people agree with each other", as_mean(people["human_human"])))
        rows += [(f"agrees with {name}", as_mean(own)) for name, own in people["model_human"].items()]
    return [f"| {_cell(name)} | {percent(value)} | {_span(value)} |" for name, value in rows]


def _cell(text: str) -> str:
    """Names of subsets and people come from a file."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _span(mean: Mean) -> str:
    return f"{interval(mean, 3)}, n = {mean.n}"


def headline(facts: Facts) -> str:
    """One line for the terminal."""
    a, b = as_mean(facts["accuracy"]), as_mean(facts["longer_wins"])
    error = f"calibration error {number(facts['calibration']['error'], 3)}"
    counted = f"{len(facts['alarms'])} alarms" if facts["alarms"] else "no alarms"
    text = f"accuracy {number(a.mean, 3)} ({interval(a, 3)}, {facts['pairs']} pairs)"
    return f"{text}; the longer answer wins {number(b.mean, 3)}; {error}; {counted}"
