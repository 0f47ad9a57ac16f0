"""Docs are executed: docs/cli.md equals the command line's help, marked snippets run, docstring examples hold.

    python scripts/check_docs.py            check; exit 1 on the first difference or failure
    python scripts/check_docs.py --write    renew docs/cli.md

A fenced ``bash`` or ``python`` block of README.md or docs/ is run if the line before it is ``<!-- run -->``. The blocks
of one file share an empty working directory and run in order.
"""

from __future__ import annotations

import difflib
import doctest
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
DOCTESTS = tuple(
    f"opentao.{name}"
    for name in ("types", "bestofn", "predict", "solved", "report", "optimise", "progress", "scorers.plugin")
)
SNIPPET = re.compile(r"^<!-- run -->\n```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def cli_page() -> str:
    """Markdown of every command: usage, help, one row an argument or option."""
    from typer.main import get_command

    from opentao.cli import app

    intro = "# Commands\n\nMade from the command line's help by `scripts/check_docs.py --write`; do not edit.\n"
    return "\n".join([intro, *_sections(get_command(app), "tao", None)])


def _sections(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=name.split()[-1], parent=parent)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"## `{name}`\n\n```\n{usage}\n```\n"
    if command.help:
        yield _plain(command.help) + "\n"
    rows = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
    if rows:
        yield "| | |\n|---|---|\n" + "".join(f"| `{_cell(what)}` | {_cell(text)} |\n" for what, text in rows)
    for sub, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _sections(child, f"{name} {sub}", context)


def _plain(text: str) -> str:
    """Help without click's control characters and without indentation."""
    return "\n".join(line.strip() for line in text.replace("\b", "").split("\f")[0].strip().splitlines())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def check_cli_page(*, write: bool) -> list[str]:
    made = cli_page()
    if write:
        CLI_PAGE.parent.mkdir(exist_ok=True)
        CLI_PAGE.write_text(made)
    found = CLI_PAGE.read_text() if CLI_PAGE.exists() else ""
    lines = difflib.unified_diff(found.splitlines(), made.splitlines(), "docs/cli.md", "tao --help", lineterm="")
    difference = "\n".join(lines)
    return [f"{difference}\nrun: python scripts/check_docs.py --write"] if difference else []


def check_snippets() -> list[str]:
    problems: list[str] = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        with tempfile.TemporaryDirectory() as folder:
            for match in SNIPPET.finditer(page.read_text()):
                problems += _run_snippet(page, match, folder)
    return problems


def _run_snippet(page: Path, match: re.Match[str], folder: str) -> list[str]:
    language, code = match.groups()
    line = match.string.count("\n", 0, match.start()) + 2
    where = f"{page.relative_to(ROOT)}:{line}"
    print(f"{where}: running {language}", flush=True)
    result = subprocess.run([*RUN[language], code], cwd=folder, capture_output=True, text=True, check=False)
    return [f"{where}: exit {result.returncode}\n{result.stdout}{result.stderr}"] if result.returncode else []


def check_doctests() -> list[str]:
    results = {name: doctest.testmod(importlib.import_module(name)) for name in DOCTESTS}
    return [f"{name}: {r.failed} of {r.attempted} docstring examples failed" for name, r in results.items() if r.failed]


def main() -> int:
    problems = [*check_cli_page(write="--write" in sys.argv[1:]), *check_doctests(), *check_snippets()]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
