"""The verdict and `summary.json`: all rounds, which policy to keep, and why. A rule, not an impression."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from opentao.bestofn import FEWEST
from opentao.config import dump_config
from opentao.policy import Policy
from opentao.session import Session
from opentao.types import content_hash

ALIKE = "clusters of like prompts"  # what intervals are over if some held-out prompts are near-duplicates


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
        "seconds": sum(
            sum(session.spent(f"round-{k}")["seconds"].values()) for k in range(session.config.rounds + 1)
        ),  # of a round that was not judged, too
        "set_aside": {"rows": len(lines), "reasons": dict(reasons)},
        "scorers": [s.label for s in session.config.scorers],
        "audit": session.config.audit.label if session.config.audit else None,
        "unscored": dict(unscored),
        "failures": dict(failures),
        "prompts": _prompts(session, len(tuned), len(lines)),
        "baselines": [],
        "prediction": prediction,
        "confidence": session.config.evaluate.confidence,
        "config": dump_config(session.config),
        "intervals_over": session.config.prompts.split_by or (ALIKE if session.alike else "prompt"),
    }
    session.run.write_json("summary.json", content_hash(summary), summary)
    return summary


def _prompts(session: Session, rounds: int, num_set_aside: int) -> dict[str, int]:
    """How many there are on each side, and how many of all were of no use."""
    sampled = {p.id for round_ in range(1, rounds + 1) for p in session.prompts_of_round(round_)}
    read = session.run.read_json("import.json")["rows"] - num_set_aside
    return {
        "train": len(session.train_prompts),
        "heldout": len(session.heldout),
        "sampled": len(sampled),
        "unused": read - len(session.heldout) - len(sampled),
    }


def judge(base: dict[str, Any], tuned: Sequence[dict[str, Any]]) -> tuple[int, str, str]:
    """(best round, verdict, one sentence why).

    Promote, of the rounds that pass, the one with the largest paired gain over the base. A round passes if the guard
    did not stop it, its gain is above zero over the whole interval and, where there is an audit, the audit's mean did
    not fall. An audit that scored nothing promotes nothing. The interval is of one round: with many rounds to choose
    from, chance lets one of them pass more often than the interval says.
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
    verdicts = [(r, *_pass(r)) for r in sorted(rounds, key=_gain, reverse=True)]
    passed = [(r["round"], "promote", why) for r, passes, why in verdicts if passes]
    return passed[0] if passed else (0, "keep base", verdicts[0][2])


def _gain(round_: dict[str, Any]) -> tuple[bool, float, int]:
    """Order of rounds: those that gain beyond doubt first, then by how much, then the earlier one."""
    gain = round_["improvement"]
    mean = -math.inf if gain["mean"] is None else gain["mean"]
    return gain["low"] is not None and gain["low"] > 0, mean, -round_["round"]


def _pass(round_: dict[str, Any]) -> tuple[bool, str]:
    """May this round be promoted, and the sentence why, or why not."""
    gain, audit = round_["improvement"], round_["audit_improvement"]
    scores = "?" if gain["mean"] is None else f"{gain['mean']:+.3f}"
    said = f"round {round_['round']}'s first try scores {scores} against the base ({_span(gain)})"
    if gain["low"] is None and gain["mean"] is not None:
        return False, f"Fewer than {FEWEST} held-out prompts, or clusters of like ones, are no proof: {said}."
    if gain["low"] is None or gain["low"] <= 0:
        return False, f"No round beats the base beyond doubt: {said}."
    if audit is None:
        return True, f"{said[0].upper()}{said[1:]}."
    if audit["mean"] is None:
        return False, f"The audit could not score the answers: {said}, but nothing else says so."
    heard = f"the audit moves {audit['mean']:+.3f} ({_span(audit)})"
    if audit["mean"] < 0:
        beyond_doubt = audit["high"] is not None and audit["high"] < 0
        fault = "The scorers were gamed" if beyond_doubt else "The audit does not confirm it"
        return False, f"{fault}: {said}, but {heard}."
    return True, f"{said[0].upper()}{said[1:]}, and {heard}."


def _span(interval: dict[str, Any]) -> str:
    low, high = (("?" if v is None else f"{v:+.3f}") for v in (interval["low"], interval["high"]))
    return f"{low} to {high}, n = {interval['n']}"
