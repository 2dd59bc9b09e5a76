"""The finish of built pages: formulas as MathML, and the promise that a page asks the network for nothing."""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)
_FETCHED = re.compile(
    r'<(?:script|img|iframe|source|video)\b[^>]*\ssrc="(https?:)?//[^"]*"|<link\b[^>]*\shref="(https?:)?//[^"]*"'
)
_STYLE_FETCHED = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*")


def with_formulas(page: str) -> str:
    """A page's HTML with its formulas as MathML, which browsers draw without a library."""

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")

    return _FORMULA.sub(formula, page)


def fetched(site: Path) -> list[str]:
    """What the pages and styles of a built site would fetch from the network: each file with the tag or rule."""
    found = []
    for pattern, suffix in ((_FETCHED, "*.html"), (_STYLE_FETCHED, "*.css")):
        for path in sorted(site.rglob(suffix)):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(site)}: {match[0][:120]}" for match in pattern.finditer(text)]
    return found
