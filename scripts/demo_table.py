"""Write the README's demo table from finished demo runs: python scripts/demo_table.py DIR [DIR ...]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- demo:start -->", "<!-- demo:end -->"
HEAD = (
    "| seed | base first try | base best of 8 | tuned first try | baked fraction "
    "| audit: base | audit: one category | audit: tuned | minutes |"
)


def row(summary: dict[str, Any]) -> str:
    """One seed; intervals are 95 % over held-out tickets."""
    base = summary["base"]
    best = next((r for r in summary["rounds"] if r["round"] == summary["best_round"]), base)
    majority = next(b["value"] for b in summary["baselines"] if b["on"] == "audit")
    cells = [
        str(summary["demo"]["seed"]),
        _span(base["first_try"]),
        _span(base["best_of"]["8"]),
        _span(best["first_try"]),
        _span(best["baked_fraction"]),
        _span(base["audit"]["first_try"]),
        _span(majority),
        _span(best["audit"]["first_try"]),
        f"{summary['demo']['wall_seconds'] / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _span(mean: dict[str, Any]) -> str:
    mean_, low, high = ("–" if mean[k] is None else f"{mean[k]:.2f}" for k in ("mean", "low", "high"))
    return f"{mean_} ({low} to {high})"


def main() -> None:
    summaries = [json.loads((Path(d) / "summary.json").read_text()) for d in sys.argv[1:]]
    table = "\n".join([HEAD, "|" + "---|" * HEAD.count(" | ") + "---|", *(row(s) for s in summaries)])
    text = README.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    README.write_text(f"{before}{START}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
