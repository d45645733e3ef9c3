"""An HTML page that needs no network: its head and style, tables, and figures that one can point at."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from rlr_ray.utils.files import replace_file

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; overflow-wrap: break-word }
h2 { margin-top: 2.5rem } progress { width: 100%; height: .5rem; accent-color: #1f77b4 }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #ddd }
td:first-child, th:first-child { padding-left: 0; text-align: left }
td:first-child, td:last-child { white-space: normal } .scroll td:first-child { min-width: 9rem }
.facts td:last-child { padding-right: 0; text-align: left } .facts td { vertical-align: top }
.facts td:first-child { white-space: nowrap } .facts td:last-child { overflow-wrap: anywhere }
@media (max-width: 30rem) { td, th { padding: .25rem .4rem } th:first-child { white-space: normal } }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem 1.5rem }
.plots > * { min-width: 0 } .plots h3 { margin: 1rem 0 .2rem; font-size: 1rem }
.warnings { border-left: 4px solid #c60; background: #fff6e8; padding: .5rem 1rem; margin: 1rem 0 }
.warnings ul { margin: .3rem 0; padding-left: 1.2rem }
.pairs { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--wide, 18rem), 100%), 1fr)) }
.pairs figure { margin: 0; min-width: 0 }
.pairs figcaption { font-weight: 600; margin-bottom: .3rem; overflow: hidden;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4 }
.pair { display: grid; gap: .5rem; font-size: .85rem }
.pair > div { min-width: 0 } .pair img { width: 100%; display: block } img.small { image-rendering: pixelated }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .85rem }
summary { cursor: pointer; font-size: 1.2rem; font-weight: 600 } details { margin: 2.5rem 0 }"""

# A finger that passes over a figure scrolls the page; a mouse zooms in, and out by a double click.
_DRAW = """function draw(root) {
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"
  for (const place of root.querySelectorAll(".figure")) {
    const { data, layout } = JSON.parse(place.querySelector("script").textContent)
    const options = { responsive: true, displayModeBar: false }
    Plotly.react(place, data, { ...layout, template, dragmode, uirevision: "kept" }, options)
  }
}
addEventListener("load", () => draw(document))"""


def page(title: str, parts: Iterable[str], script: str = "") -> str:
    """The parts of a body, in a page that holds plotly once for all its figures, and a script of the page's own."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    template = to_json_plotly(plotly.io.templates["plotly_white"])
    head += f"<script>{get_plotlyjs()}</script><script>const template = {template}\n{_DRAW}\n{script}</script>"
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def write_page(path: Path, title: str, parts: Mapping[str, str]) -> None:
    """A page of parts by their names. Raises OSError."""
    text = page(title, parts.values())
    replace_file(path, lambda part: part.write_text(text, "utf-8"))


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Scrolls sideways where it is wider than the page."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{_body(lines)}</table></div>'


def facts(lines: Iterable[tuple[str, str]]) -> str:
    """Names and what is to be said of each, which may be long."""
    return f'<table class="facts">{_body(lines)}</table>'


def _body(lines: Iterable[Iterable[str]]) -> str:
    cells = ("".join(f"<td>{html.escape(text)}</td>" for text in line) for line in lines)
    return "".join(f"<tr>{line}</tr>" for line in cells)


def drawn(figure: go.Figure, height: int = 460, name: str = "") -> str:
    """A figure as wide as its place, height in pixels; the page's script draws it, a live page's again by its name."""
    shown = figure.to_dict()
    shown["layout"].pop("template", None)  # the page has one for all
    script = f'<script type="application/json">{to_json_plotly(shown)}</script>'
    return f'<div class="figure" data-name="{html.escape(name)}" style="height:{height}px">{script}</div>'
