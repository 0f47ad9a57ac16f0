"""The verdict and `summary.json`: all rounds, which policy to keep, and why. A rule, not an impression."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from opentao.policy import Policy
from opentao.session import Session
from opentao.types import content_hash


def write_summary(
    session: Session,
    rounds: Sequence[dict[str, Any]],
    policies: Sequence[Policy],
    *,
    unscored: Counter[str],
    failures: Counter[str],
    prediction: dict[str, Any],
    stopped: str | None,
) -> dict[str, Any]:
    """Write and return the summary; `rounds[0]` is the base."""
    base, *tuned = rounds
    best, verdict, why = judge(base, tuned)
    chosen = policies[best]
    lines = session.run.path("set_aside.jsonl").read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line]
    reasons = Counter(re.split(" of (?:line|row) ", json.loads(line)["reason"])[0] for line in lines)
    summary = {
        "model": session.config.model,
        "base": base,
        "rounds": tuned,
        "verdict": verdict,
        "why": f"{stopped}. {why}" if stopped else why,
        "best_round": best,
        "policy": str(chosen.path.relative_to(session.run.root)) if chosen.path else None,
        "policy_hash": chosen.hash,
        "seconds": sum(sum(r["seconds"].values()) for r in rounds),
        "set_aside": {"rows": len(lines), "reasons": dict(reasons)},
        "scorers": [s.label for s in session.config.scorers],
        "audit": session.config.audit.label if session.config.audit else None,
        "unscored": dict(unscored),
        "failures": dict(failures),
        "prompts": {"train": len(session.train_prompts), "heldout": len(session.heldout)},
        "baselines": [],
        "prediction": prediction,
        "confidence": session.config.evaluate.confidence,
        "intervals_over": session.config.prompts.split_by or "prompt",
    }
    session.run.write_json("summary.json", content_hash(summary), summary)
    return summary


def judge(base: dict[str, Any], tuned: Sequence[dict[str, Any]]) -> tuple[int, str, str]:
    """(best round, verdict, one sentence why).

    Promote the round with the highest held-out first try, rounds that the guard stopped left out, if its paired gain
    over the base is above zero over the whole interval and, where there is an audit, the audit did not fall. The
    interval is of one round: with many rounds to choose from it is a little too narrow.
    """
    if tuned and all(r["train"] and r["train"]["steps"] == 0 for r in tuned):
        return 0, "keep base", f"No step was taken: {tuned[-1]['train']['idle']}."
    rounds = [r for r in tuned if r["first_try"]["mean"] is not None and not r["guard"]["tripped"]]
    if tuned and not rounds and any(r["guard"]["tripped"] for r in tuned):
        return 0, "keep base", "No other round was trained."
    if not tuned:
        return 0, "keep base", "No round was trained."
    if not rounds or base["first_try"]["mean"] is None:
        return 0, "keep base", "No round could be compared with the base."
    best = max(rounds, key=lambda r: (r["first_try"]["mean"], -r["round"]))
    gain, audit = best["improvement"], best["audit_improvement"]
    said = f"round {best['round']}'s first try scores {gain['mean']:+.3f} against the base ({_span(gain)})"
    if gain["low"] is None or gain["low"] <= 0:
        return 0, "keep base", f"No round beats the base beyond doubt: {said}."
    if audit is None or audit["mean"] is None:
        return best["round"], "promote", f"{said[0].upper()}{said[1:]}."
    heard = f"the audit moves {audit['mean']:+.3f} ({_span(audit)})"
    if audit["mean"] < 0:
        return 0, "keep base", f"The scorers were gamed: {said}, but {heard}."
    return best["round"], "promote", f"{said[0].upper()}{said[1:]}, and {heard}."


def _span(interval: dict[str, Any]) -> str:
    low, high = (("?" if v is None else f"{v:+.3f}") for v in (interval["low"], interval["high"]))
    return f"{low} to {high}, n = {interval['n']}"
