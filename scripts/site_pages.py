"""Pages of the site from what GitHub shows: pages outside docs, links to files, formulas as MathML. For mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_FORMULA = re.compile(  # or code, in which a dollar is a dollar
    r"^```math\n(?P<block>.*?)^```$|^```.*?^```$|^ {4}[^\n]*$|`[^`\n]+`"
    r"|(?<![\w\\$])\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\d)",
    re.M | re.S,
)
_LARGER = re.compile(r"\\[bB]ig[lr]?(?=\\[lr](?:vert|floor))")  # which the converter does not know beside these
_PLACE = "formula{}here"  # until the page is HTML: no character of it means anything in Markdown


def on_files(files: Files, config: Any) -> Files:
    """Beside the pages of docs: those of the repository, and each file that a page links to."""
    texts = {path: (ROOT / path).read_text("utf-8") for path in OUTSIDE}
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=relinked(texts[path], ROOT)))
    pages = [
        *((text, ROOT) for text in texts.values()),
        *((page.read_text("utf-8"), DOCS) for page in DOCS.glob("*.md")),
    ]
    for linked in sorted({file for text, folder in pages for file in linked_files(text, folder)}):
        name = linked.relative_to(ROOT).as_posix()
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(linked)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri not in OUTSIDE.values():
        markdown = relinked(markdown, DOCS)
    page.meta["formulas"] = []
    return _FORMULA.sub(lambda found: _kept(found, page.meta["formulas"]), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    for number, formula in enumerate(page.meta["formulas"]):
        html = html.replace(_PLACE.format(number), formula)
    return html


def _kept(found: re.Match[str], formulas: list[str]) -> str:
    block, inline = found["block"], found["inline"]
    if not (block or inline):
        return found.group()
    text = _LARGER.sub("", (block or inline).strip())
    formulas.append(convert(text, display="block" if block else "inline"))
    place = _PLACE.format(len(formulas) - 1)
    return f"\n{place}\n" if block else place


def relinked(markdown: str, folder: Path) -> str:
    """Links of a page in a folder of the repository, as the site has what they lead to; what it lacks is no link."""

    def link(found: re.Match[str]) -> str:
        words, target = found.groups()
        path, mark, anchor = target.partition("#")
        if "://" in target or not path:
            return found.group()
        place = (folder / path).resolve()
        if place.is_relative_to(DOCS):
            return f"{words}({place.relative_to(DOCS).as_posix()}{mark}{anchor})"
        name = place.relative_to(ROOT).as_posix()
        if name in OUTSIDE:
            return f"{words}({OUTSIDE[name]}{mark}{anchor})"
        return f"{words}(files/{name})" if _shown(place) else words.strip("[]")

    return _LINK.sub(link, markdown)


def linked_files(markdown: str, folder: Path) -> list[Path]:
    """Files of the repository, no pages, that a page links to."""
    places = [
        (folder / target.partition("#")[0]).resolve() for _, target in _LINK.findall(markdown) if "://" not in target
    ]
    return [place for place in places if not place.is_relative_to(DOCS) and _shown(place)]


def _shown(place: Path) -> bool:
    return place.is_file() and place.suffix != ".md"
