"""Run directories for the tests of report and summary: realistic numbers, made by formulas, no model."""

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = (
    '</title></style></script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
    "<svg onload=\"document.title='owned'\"> {{ 7 * 7 }} \"quotes' &amp; "
    '\x1b[2J \u202e<a href="javascript:alert(1)">x</a>'
    '<meta http-equiv="refresh" content="0;url=https://evil.example/"><base href="https://evil.example/">'
)
CATEGORIES = ("billing", "delivery", "account", "returns", "technical", "praise")
TICKETS = (
    "hi, parcel was supposed to come tuesday, its friday now and nobody picks up the phone. order 55-1203",
    "Ich wurde zweimal belastet (2x 49,90 €), bitte eine Buchung zurück. Danke!",
    "app crashes evry time i open settings on my pixel, reinstalled twice allready",
    "How do I change the mail address of my account? The link you sent has expired.",
    "The shoes are a size too small. Can I swap them for a 42, or do I get the money back first?",
    "just wanted to say: the new checkout is so much quicker, thanks to the team :)",
)


def mean(value: float, half: float = 0.06, n: int = 64) -> dict[str, Any]:
    return {"mean": value, "low": value - half, "high": value + half, "n": n}


NOTHING = {"mean": None, "low": None, "high": None, "n": 0}


def curve(first: float, top: float, ks: int, half: float = 0.06) -> dict[str, Any]:
    return {str(k): mean(first + (top - first) * (1 - 0.58 ** math.log2(k)), half) for k in range(1, ks + 1)}


def solved(always: float, never: float, tries: int = 4) -> dict[str, Any]:
    shares = {"always": always, "sometimes": 1 - always - never, "never": never}
    return {"at": 1.0, "tries": tries} | {name: mean(value) for name, value in shares.items()}


def prediction() -> dict[str, Any]:
    """As the base of `summary` would predict."""
    return {
        "target_n": 16,
        "responses": 16,
        "first_try": mean(0.14),
        "curve": curve(0.14, 0.93, 16),
        "target": mean(0.86),
        "gain": mean(0.72),
        "informative": mean(0.9),
        "solved": solved(0.02, 0.1, 16),
        "audit": {
            "first_try": mean(0.21),
            "curve": {"1": mean(0.21), "8": mean(0.39)},
            "target": mean(0.62),
            "gain": mean(0.41),
            "solved": solved(0.03, 0.2, 16),
        },
        "flat": None,
    }


def round_numbers(round_: int, first: float, audit: float, ks: int) -> dict[str, Any]:
    best_of = curve(first, max(0.93, first + 0.03), ks)
    return {
        "round": round_,
        "first_try": best_of["1"],
        "greedy": mean(first + 0.05),
        "best_of": best_of,
        "audit": {
            "first_try": mean(audit),
            "greedy": mean(audit + 0.02),
            "best_of": curve(audit, max(0.88, audit + 0.05), ks),
            "solved": solved(audit * 0.7, 0.8 * (1 - audit)),
            "selected_of": {"1": mean(audit), "8": mean(audit + 0.18)} if round_ == 0 else {"1": mean(audit)},
        },
        "kl": mean(0.9 * round_, 0.12 * round_),
        "length": mean(46 - 4 * round_, 2.0),
        "distinct": mean(0.94 - 0.02 * round_, 0.01),
        "guard": {
            "canaries": {"empty": 0.0, "flattery": 0.125 * (4 - round_), "very long": 0.0625},
            "canary_share": 0.1,
            "tripped": None,
        },
        "baked_fraction": mean((first - 0.14) / 0.636, 0.09) if round_ else mean(0.0, 0.0),
        "baked_k": 8,
        "solved": solved(first * 0.8, 0.7 * (1 - first)),
        "improvement": mean(first - 0.14, 0.07) if round_ else None,
        "audit_improvement": mean(audit - 0.21, 0.08) if round_ else None,
        "tokens": {
            "generate": 48211 if round_ else 0,
            "score": 61200,
            "train": 93410 if round_ else 0,
            "evaluate": 35880,
        },
        "seconds": {"generate": 41.0 if round_ else 0, "score": 12.5, "train": 63.2 if round_ else 0, "evaluate": 38.9},
        "train": {"steps": 8, "informative": 27, "groups": 32, "loss_first": 1.412, "loss_last": 0.683}
        if round_
        else None,
    }


def summary(rounds: int = 2) -> dict[str, Any]:
    """A run as the demo makes it: the last round is the kept one."""
    firsts, audits = [0.14, 0.52, 0.74, 0.83], [0.21, 0.47, 0.66, 0.71]
    tuned = [round_numbers(k, firsts[k], audits[k], 4) for k in range(1, rounds + 1)]
    return {
        "model": "smollm2-135m-instruct",
        "base": round_numbers(0, firsts[0], audits[0], 16),
        "rounds": tuned,
        "verdict": "promote" if rounds else "keep base",
        "why": "First try by reward rose from 0.14 to 0.74, and the audit rose with it; both intervals are above zero."
        if rounds
        else "No round was run.",
        "best_round": rounds,
        "policy": f"round-{rounds}/policy" if rounds else None,
        "seconds": 402.7,
        "set_aside": {"rows": 3, "reasons": {"`prompt` is empty": 2, "not JSON: Expecting value": 1}},
        "scorers": ["json_schema", "reward_model"],
        "audit": "right category in valid JSON",
        "unscored": {"json_schema": 0, "reward_model": 4},
        "failures": {"prompt_too_long": 1},
        "prompts": {"train": 240, "heldout": 64},
        "confidence": 0.95,
        "prediction": prediction(),
        "baselines": [{"name": "majority class", "value": mean(0.24, 0.0), "on": "audit"}],
    }


def _answer(rng: random.Random, quality: float) -> dict[str, Any]:
    good = rng.random() < quality
    record = {"category": rng.choice(CATEGORIES), "priority": "high", "summary": "The customer waits for a parcel."}
    text = (
        json.dumps(record, indent=2) if good else "Sure! I am sorry to hear that. Here is the JSON you asked for:\n```"
    )
    reward = round(0.5 + 0.5 * rng.random(), 3) if good else round(0.2 * rng.random(), 3)
    return {"text": text, "reward": reward, "audit": float(good), "finish": "stop" if good else "length"}


def evaluation(round_: int, quality: float, num_prompts: int = 64) -> dict[str, Any]:
    rng = random.Random(round_)
    samples = [
        {
            "prompt_id": f"{i:016x}",
            "prompt": f"{TICKETS[i % len(TICKETS)]}\n(ticket {i})",
            "responses": [_answer(rng, quality) for _ in range(4)],
            "greedy": _answer(rng, quality),
        }
        for i in range(num_prompts)
    ]
    return {"round": round_, "samples": samples}


def write_run(directory: Path, numbers: dict[str, Any], evals: dict[int, dict[str, Any]] | None = None) -> Path:
    """Write the files that a report reads."""
    if evals is None:
        evals = {k: evaluation(k, 0.2 + 0.3 * k) for k in range(len(numbers["rounds"]) + 1)}
    _write(directory / "summary.json", json.dumps(numbers))
    for k, value in evals.items():
        _write(directory / f"round-{k}" / "eval.json", json.dumps(value))
    row = {"file": "tickets.jsonl", "line": 7, "reason": "`prompt` is empty"}
    _write(directory / "set_aside.jsonl", json.dumps(row) + "\n")
    _write(directory / "config.yaml", "model: smollm2-135m-instruct\nrounds: 2\n")
    return directory


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def hostile_run(directory: Path) -> Path:
    """Every text that comes from outside tries to become markup."""
    numbers = summary()
    numbers |= {"model": HOSTILE, "why": HOSTILE, "policy": HOSTILE, "scorers": [HOSTILE], "audit": HOSTILE}
    numbers |= {"unscored": {HOSTILE: 1}, "failures": {HOSTILE: 1}, "set_aside": {"rows": 1, "reasons": {HOSTILE: 1}}}
    numbers["baselines"] = [{"name": HOSTILE, "value": mean(0.3), "on": on} for on in ("audit", "reward")]
    numbers["base"]["seconds"][HOSTILE] = 1.0
    evals = {k: evaluation(k, 0.5) for k in range(3)}
    for value in evals.values():
        for sample in value["samples"]:
            sample["prompt"] = HOSTILE
            for answer in sample["responses"]:
                answer |= {"text": HOSTILE + "\ud800", "finish": HOSTILE}
    write_run(directory, numbers, evals)
    row = {"file": HOSTILE, "line": 1, "reason": HOSTILE}
    _write(directory / "set_aside.jsonl", json.dumps(row) + "\n")
    _write(directory / "config.yaml", HOSTILE)
    return directory
