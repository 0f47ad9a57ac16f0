"""Pieces of Markdown: rows of tables, numbers with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lab import Facts
from pooled import better, first_try

from opentao.bestofn import Interval


def number(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def after(cells: Sequence[Facts]) -> str:
    return number(first_try(cells, "after", "audit")) if cells else ""


def less(cells: Sequence[Facts], others: Sequence[Facts] | None) -> str:
    if not cells or not others:
        return ""
    return "—" if cells[0] is others[0] else signed(better(cells, others, "audit"))


def head(*columns: str) -> Iterator[str]:
    yield row(*columns)
    yield "|" + "---|" * len(columns)


def row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"
