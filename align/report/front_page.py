"""A front as one HTML file: no script, nothing fetched, images inside; readable in light and dark."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from align.report.front import DARK, LIGHT, front_png

if TYPE_CHECKING:
    from align.experiments.front import Front

_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #ffffff; --line: #d0d7de; --soft: #57606a; --best: #eaf1fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d8dee4; --paper: #15191f; --line: #3a424c; --soft: #9aa4af; --best: #1d2b3f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.soft, figcaption { color: var(--soft); } figure { margin: 1rem 0; } figcaption { font-size: .9rem; }
img { max-width: min(100%, 46rem); height: auto; } img.wide { max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr.best td { background: var(--best); }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .8rem; font-size: .85rem; }
summary { cursor: pointer; }
"""


def write_page(
    front: Front,
    path: Path,
    *,
    title: str,
    how: Sequence[str],
    rows: Sequence[Sequence[str]],
    recipes: Mapping[str, str],
) -> None:
    """Write the page, whole or not at all.

    how: paragraphs: what was judged, by what, and what speaks against it. rows: the table, its head first, one row per
    model in the front's order. recipes: YAML by the name of what it made.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="soft">{escape(line)}</p>' for line in how),
        _figure(front),
        "<h2>Models</h2>",
        _table(front, rows),
        "<h2>Recipes</h2>",
        *(f"<details><summary>{escape(k)}</summary><pre>{escape(v)}</pre></details>" for k, v in recipes.items()),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n', encoding="utf-8"
    )
    os.replace(aside, path)


def _figure(front: Front) -> str:
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(front_png(front, theme)).decode()}" for theme in (LIGHT, DARK)
    )
    wide = ' class="wide"' if len(front.names) > 2 else ""
    names = " against ".join(front.names)
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img{wide} src="{light}" alt="{escape(names)}"></picture>'
        "<figcaption>Better is to the right and up. Numbers are those of the table; bars are the intervals; filled "
        "points are on the front.</figcaption></figure>"
    )


def _table(front: Front, rows: Sequence[Sequence[str]]) -> str:
    head, *lines = rows
    marked = (_row(line, "td", "best" if best else "") for line, best in zip(lines, front.best, strict=True))
    return '<div class="scroll"><table>' + "\n".join([_row(head, "th"), *marked]) + "</table></div>"


def _row(cells: Iterable[str], tag: str, kind: str = "") -> str:
    inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"
