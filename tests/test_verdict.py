"""The rule of the verdict, on rounds made up by hand."""

from __future__ import annotations

from typing import Any

import pytest

from opentao.verdict import judge

NOTHING = {"mean": None, "low": None, "high": None, "n": 0}
UP, DOUBT, DOWN = (0.1, 0.05), (0.02, -0.01), (-0.1, -0.15)


def interval(mean: float, low: float) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": 2 * mean - low, "n": 64}


def round_(number: int, gain: Any, audit: Any = None, *, steps: int = 4, tripped: str | None = None) -> dict[str, Any]:
    return {
        "round": number,
        "first_try": interval(0.5 + (gain[0] or 0), 0.4) if gain else NOTHING,
        "improvement": interval(*gain) if gain else NOTHING,
        "audit_improvement": interval(*audit) if isinstance(audit, tuple) else audit,
        "train": {"steps": steps, "idle": None if steps else "nothing differs"},
        "guard": {"tripped": tripped},
    }


FEW = round_(1, UP) | {"improvement": {"mean": 0.3, "low": None, "high": None, "n": 60}}
BASE = {"first_try": interval(0.5, 0.4)}


@pytest.mark.parametrize(
    ("rounds", "best", "said"),
    [
        ([round_(1, UP)], 1, "Round 1's first try scores +0.100 against the base (+0.050 to +0.150, n = 64)."),
        ([round_(1, UP, UP)], 1, "and the audit moves +0.100"),
        ([round_(1, UP, (0.0, -0.05))], 1, "and the audit moves +0.000"),
        ([round_(1, UP), round_(2, (0.2, 0.15))], 2, "Round 2"),
        ([round_(1, UP), round_(2, UP)], 1, "Round 1"),
        ([round_(1, UP, UP), round_(2, (0.2, 0.15), (-0.001, -0.03))], 1, "Round 1"),  # 2 does not pass, 1 does
        ([round_(1, UP), round_(2, (0.2, -0.01))], 1, "Round 1"),
        ([round_(1, UP), round_(2, (0.2, 0.1), tripped="stopped")], 1, "Round 1"),
        ([round_(1, None), round_(2, UP)], 2, "Round 2"),
    ],
)
def test_promoted(rounds: list[dict[str, Any]], best: int, said: str) -> None:
    found, verdict, why = judge(BASE, rounds)
    assert (found, verdict) == (best, "promote")
    assert said in why


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([], "No round was trained."),
        ([round_(1, DOUBT)], "No round beats the base beyond doubt: round 1's first try scores +0.020"),
        ([round_(1, DOWN), round_(2, DOUBT)], "beyond doubt: round 2's"),
        (
            [FEW],
            "Fewer than 8 held-out prompts, or clusters of like ones, are no proof: round 1's first try scores +0.3",
        ),
        ([round_(1, UP, DOWN)], "but the audit moves -0.100"),
        ([round_(1, UP, (-0.1, -0.12)), round_(2, (0.2, -0.01), UP)], "The scorers were gamed: round 1"),
        ([round_(1, UP, (-0.1, -0.12))], "The scorers were gamed: round 1"),
        ([round_(1, UP, (-0.01, -0.05))], "The audit does not confirm it: round 1"),
        ([round_(1, UP, NOTHING)], "The audit could not score the answers: round 1"),
        ([round_(1, UP, {"mean": -0.1, "low": None, "high": None, "n": 1})], "The audit does not confirm it"),
        ([round_(1, None)], "No round could be compared with the base."),
        ([round_(1, UP, steps=0)], "No step was taken: nothing differs."),
        ([round_(1, UP, tripped="stopped")], "No other round was trained."),
    ],
)
def test_the_base_is_kept(rounds: list[dict[str, Any]], said: str) -> None:
    found, verdict, why = judge(BASE, rounds)
    assert (found, verdict) == (0, "keep base")
    assert said in why


def test_a_base_without_a_score_is_never_beaten() -> None:
    assert judge({"first_try": NOTHING}, [round_(1, UP)])[1] == "keep base"
