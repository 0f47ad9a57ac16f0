"""Check what `tao demo` must show, on its summary.json: python scripts/check_demo.py DIR/summary.json

On held-out tickets: the tuned first try by reward is at least the base's best of 8; the audit (right category in valid
JSON) is above the base's first try and above always answering one category, intervals not overlapping. Time is printed,
not judged: it is the machine's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def checks(summary: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each claim with whether it holds."""
    base, best = summary["base"], next(r for r in summary["rounds"] if r["round"] == summary["best_round"])
    tuned, before = best["audit"]["first_try"], base["audit"]["first_try"]
    majority = next(b for b in summary["baselines"] if b["on"] == "audit")
    first, best_of_8 = best["first_try"]["mean"], base["best_of"]["8"]["mean"]
    return [
        (f"first try by reward {first:.3f} >= base best of 8 {best_of_8:.3f}", first >= best_of_8),
        (f"audit {_span(tuned)} above the base's {_span(before)}", tuned["low"] > before["high"]),
        (
            f"audit {_span(tuned)} above {majority['name']} {_span(majority['value'])}",
            tuned["low"] > majority["value"]["high"],
        ),
    ]


def _span(mean: dict[str, Any]) -> str:
    return f"{mean['mean']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]"


def main() -> int:
    summary = json.loads(Path(sys.argv[1]).read_text())
    if summary["verdict"] != "promote":
        print(f"FAILED: verdict {summary['verdict']}: {summary['why']}")
        return 1
    results = checks(summary)
    for text, holds in results:
        print(f"{'ok    ' if holds else 'FAILED'} {text}")
    print(f"seed {summary['demo']['seed']}, {summary['demo']['wall_seconds']:.0f} s")
    return 0 if all(holds for _, holds in results) else 1


if __name__ == "__main__":
    sys.exit(main())
