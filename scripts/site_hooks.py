"""Hooks of mkdocs: files of the repository outside docs/ become pages of the site, and links between them hold.

The same Markdown is read in a checkout, where `../README.md` is a file, and on the site, where it is a page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "readme.md",
    "benchmarks/RESULTS.md": "measured.md",
    "benchmarks/README.md": "measuring.md",
    "dev/LOG.md": "log.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that lead to a file of the repository lead to its page; to what has none, they become plain text."""
    sources = {name: source for source, name in PAGES.items()}
    here = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def resolved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(here, target))
        found = PAGES.get(path) or path.removeprefix("docs/")
        return f"[{text}]({found}{anchor})" if path in PAGES or path.startswith("docs/") else text

    return LINK.sub(resolved, markdown)
