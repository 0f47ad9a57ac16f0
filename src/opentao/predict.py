"""What a run can gain, from the base's groups alone: ``tao predict``, and the first thing that `tao run` says.

Baking best-of-n makes the first try what the best of n was, at most: the prediction is the base's expected best of
`target_n` on the held-out prompts, and beside it what the audit makes of the answers that the reward would pick. Runs
get part of that way (the baked fraction); afterwards the report shows predicted against achieved.

A curve is *flat* if there is nothing to learn from (rewards hardly differ inside groups), or if the picked answers are
not better by the audit beyond doubt: then training would spend compute on noise. Left out: a prediction of the baked
fraction itself, which depends on the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from opentao.bestofn import FEWEST, Interval, bootstrap, paired_difference, selection_probabilities
from opentao.evaluate import Evaluation, Values
from opentao.session import Session
from opentao.show import visible
from opentao.solved import solved
from opentao.summary import Mean, Prediction, Solved, interval, measured, parse, share, signed
from opentao.types import NAN, content_hash

LEAST_INFORMATIVE = 0.05  # share of prompts whose answers must differ in reward


def picked(rewards_N: Values, values_N: Values, n: int) -> float:
    """Expected value of the answer that the reward picks among n; of the reward itself: best-of-n.

    Unbiased (draws without replacement) up to the number of scored answers; a larger n counts as that number, since the
    group cannot show what it does not hold, so the result is a little low. NaN: nothing is scored.

    >>> picked(np.array([0.0, 1.0]), np.array([3.0, 5.0]), 1), picked(np.array([0.0, 1.0]), np.array([3.0, 5.0]), 4)
    (4.0, 5.0)
    """
    both = np.where(np.isnan(values_N), NAN, rewards_N)
    scored = ~np.isnan(both)
    if not scored.any():
        return NAN
    shares = selection_probabilities(both, min(n, int(scored.sum())))
    return float(np.dot(shares[scored], values_N[scored]))


def predict(session: Session, base: Evaluation) -> dict[str, Any]:
    """The `prediction` of summary.json, a PREDICTION: curve, shares solved, gain of best-of-target_n, `flat`.

    Raises:
        ValueError: `base` is not an evaluation of round 0.
    """
    if base.round != 0:
        raise ValueError(f"predictions are made from the base, this is round {base.round}")
    settings, n = session.config.evaluate, session.config.train.target_n
    args = session.interval_args
    target_P = np.array([picked(r, r, n) for r in base.rewards_PN])
    informative = [_differ(r) for r in base.rewards_PN]
    found: dict[str, Any] = {
        "target_n": n,
        "responses": settings.base_group_size,
        "first_try": bootstrap(base.first_P, **args).as_dict(),
        "curve": {str(k): bootstrap(own, **args).as_dict() for k, own in base.best_P.items()},
        "target": bootstrap(target_P, **args).as_dict(),
        "gain": (gain := paired_difference(target_P, base.first_P, **args)).as_dict(),
        "informative": bootstrap(informative, **args).as_dict(),
        "solved": solved(base.rewards_PN, settings.solved_at, args),
        "audit": None,
    }
    audit_gain = None
    if session.audit is not None:
        picked_P = np.array([picked(r, a, n) for r, a in zip(base.rewards_PN, base.audits_PN, strict=True)])
        audit_gain = paired_difference(picked_P, base.audit_first_P, **args)
        found["audit"] = {
            "first_try": bootstrap(base.audit_first_P, **args).as_dict(),
            "curve": {str(k): bootstrap(own, **args).as_dict() for k, own in base.audit_selected_P.items()},
            "target": bootstrap(picked_P, **args).as_dict(),
            "gain": audit_gain.as_dict(),
            "solved": solved(base.audits_PN, None, args),
        }
    found["flat"] = why_flat(informative, min(n, settings.base_group_size), audit_gain) or too_few(gain)
    session.run.write_json("prediction.json", content_hash(found), found)
    return found


def _differ(rewards_N: Values) -> float:
    """1 if the answers differ in reward, 0 if not, NaN if fewer than two are scored."""
    scored = rewards_N[~np.isnan(rewards_N)]
    return float(len(set(scored.tolist())) > 1) if len(scored) > 1 else NAN


def why_flat(informative: Sequence[float], n: int, audit_gain: Interval | None) -> str | None:
    """Why training would not pay, in one sentence, or None.

    Args:
        informative: of each held-out prompt, 1 if its answers differ in reward, 0 if not, NaN if that is not known.
        n: of so many answers the reward picks.
        audit_gain: of the answers that it picks, against the first try; None: there is no audit.

    >>> why_flat([0.0, 0.0, 1.0, 0.0] * 8, 16, None)
    >>> why_flat([0.0] * 32, 16, None)
    'Nothing to learn from: on 0 of 32 held-out prompts do the answers differ in reward'
    """
    known = [value for value in informative if not np.isnan(value)]
    if not known:
        return f"Nothing could be scored: two answers have a reward on none of {len(informative)} held-out prompts"
    differ = int(sum(known))
    if differ < LEAST_INFORMATIVE * len(known) or not differ:
        return f"Nothing to learn from: on {differ} of {len(known)} held-out prompts do the answers differ in reward"
    if audit_gain is not None and np.isfinite(audit_gain.low) and not audit_gain.low > 0:
        return (
            f"The reward does not pick better answers beyond doubt: the audit of the best of {n} is"
            f" {audit_gain.mean:+.3f} against the first try ({audit_gain.low:+.3f} to {audit_gain.high:+.3f},"
            f" n = {audit_gain.n})"
        )
    return None


def too_few(gain: Interval) -> str | None:
    """A gain without bounds is one that no verdict can be built on."""
    if not np.isfinite(gain.mean) or np.isfinite(gain.low):
        return None
    return f"On fewer than {FEWEST} held-out prompts that are scored, or clusters of like ones, nothing can be promoted"


def said(prediction: dict[str, Any]) -> list[str]:
    """The prediction in a few lines, for the progress of a run."""
    p = parse(Prediction, prediction, "prediction")
    by_audit = [] if p.audit is None else [f"audit {_arrow(p.audit.first_try, p.audit.target)}"]
    lines = [f"predicted, if all of best-of-{p.best_of} is baked: reward {_arrow(p.first_try, p.target)}"]
    lines[0] = "; ".join([lines[0], *by_audit])
    if p.solved is not None:
        lines.append(f"base solves, of {p.responses} tries a prompt: {_shares(p.solved)}")
    return [*lines, *([f"flat: {p.flat}"] if p.flat else [])]


def _arrow(first: Mean, target: Mean) -> str:
    return f"{measured(first)} → {measured(target)} ({interval(target)})"


def _shares(solved_: Solved) -> str:
    kinds = {"always": solved_.always, "sometimes": solved_.sometimes, "never": solved_.never}
    return ", ".join(f"{name} {share(mean.mean)}" for name, mean in kinds.items())


def prediction_table(prediction: dict[str, Any], model: str) -> Table:
    """What `tao predict` prints."""
    p = parse(Prediction, prediction, "prediction")
    table = Table(
        title=Text(f"{visible(model)}, before any training: {p.first_try.n} held-out prompts"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("", "reward", "interval", *(("audit of pick", "interval") if p.audit else ())):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for k, mean in p.curve.items():
        name = "first try" if k == 1 else f"best of {k}"
        _row(table, name, mean, p.audit.curve.get(k) if p.audit else None, p)
    table.add_section()
    _row(table, f"best of {min(p.target_n, p.responses)}, baked", p.target, p.audit.target if p.audit else None, p)
    gains = [f"reward {signed(p.gain)} ({interval(p.gain)})"]
    gains += [f"audit {signed(p.audit.gain)} ({interval(p.audit.gain)})"] if p.audit else []
    lines = [
        f"gain if all of best-of-{p.best_of} is baked, on the same prompts: {', '.join(gains)}",
        f"prompts whose answers differ in reward: {share(p.informative.mean)}",
    ]
    for by, own in (("reward", p.solved), ("audit", p.audit.solved if p.audit else None)):
        if own is not None:
            lines.append(f"solved by {by} (at least {own.at:g}), of {p.responses} tries: {_shares(own)}")
    verdict = f"flat: {visible(p.flat)}." if p.flat else "worth a run: there is a better answer to learn."
    table.caption = Text("\n").join([*map(Text, lines), Text(verdict, style="bold" if p.flat else "bold green")])
    table.caption_justify = "left"
    return table


def _row(table: Table, name: str, mean: Mean, audit: Mean | None, p: Prediction) -> None:
    cells = [name, measured(mean), interval(mean)]
    if p.audit:
        cells += [measured(audit), interval(audit)]
    table.add_row(*cells)
