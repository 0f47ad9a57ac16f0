"""Markdown by a stranger as HTML that does nothing: no raw HTML, no images, no scripts, links that wait for a click."""

from __future__ import annotations

from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markupsafe import Markup, escape

from opentao.show import visible

MAX_CHARACTERS = 30_000  # longer text is shown as it is written
SCHEMES = ("http://", "https://", "mailto:")


def _link_open(renderer: RendererHTML, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    token.attrSet("rel", "noopener noreferrer nofollow")
    token.attrSet("target", "_blank")
    return renderer.renderToken(tokens, index, options, env)


def _build() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "maxNesting": 20}).enable(
        ["table", "strikethrough"]
    )
    parser.disable(["image", "html_block", "html_inline", "entity"])
    parser.validateLink = lambda url: url.strip().lower().startswith(SCHEMES)  # type: ignore[method-assign]
    parser.add_render_rule("link_open", _link_open)
    return parser


_PARSER = _build()


def safe_html(text: str) -> Markup:
    """The text rendered; control characters and those that turn the reading direction are spelled out."""
    text = visible(text)
    if len(text) > MAX_CHARACTERS:
        return Markup("<pre class=long>{}</pre>").format(text)
    if not text.strip():
        return Markup("<p class=empty>{}</p>").format("(empty)" if not text else "(white space only)")
    return Markup(_PARSER.render(text))  # every token of it is escaped by the renderer


def plain_html(text: str) -> Markup:
    """As it is written."""
    return Markup("<pre>{}</pre>").format(escape(visible(text)))
