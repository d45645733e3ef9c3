"""Every class of diffusers' pipelines that is tried, examined: `make models` writes the table in docs/models.md.

python -m tests.models.table CLASS ... examines those alone, and replaces their lines. Exits with 1 if a figure is not
as it must be.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import diffusers
import torch

from rlr_ray.errors import UserError
from rlr_ray.models.facts import REFUSED
from tests.models.examine import Line, line_of
from tests.models.zoo import CASES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- classes -->\n", "<!-- end -->\n"
HEAD = """| class | picture | gradient | restart | thetas | bfloat16 | saved | updates |
|---|---|---|---|---|---|---|---|
"""


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    page = PAGE.read_text("utf-8")
    before, shown, after = page.split(BEGIN)[0], page.split(BEGIN)[1].split(END)[0], page.split(END)[1]
    rows = {line.split("`")[1]: f"{line}\n" for line in shown.splitlines() if line.startswith("| `")} if names else {}
    refused, wrong = dict(REFUSED), 0
    for name in names or sorted(CASES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                line = line_of(name, Path(folder))
            except UserError as error:
                refused[name] = str(error).partition(";")[0]
                continue
        print(name, line, *line.wrong, flush=True)
        wrong += bool(line.wrong)
        rows[name] = row_of(name, line)
    if names:
        refused = {name: why for name, why in said(shown).items() if name not in rows} | refused
    table = HEAD + "".join(rows[name] for name in sorted(rows))
    PAGE.write_text(before + BEGIN + table + others(refused) + END + after, "utf-8")
    return int(wrong > 0)


def said(shown: str) -> dict[str, str]:
    """Which classes a page says are refused, and why."""
    lines = [line.removeprefix("- `").split("`: ", 1) for line in shown.splitlines() if line.startswith("- `")]
    return {name: why for name, why in lines}


def row_of(name: str, line: Line) -> str:
    yes = {True: "same bits", False: "no", None: ""}
    figures = [f"{line.picture:.0e}", f"{line.gradient:.0e}", yes[line.replayed], f"{line.rows:.0e}"]
    figures += [yes[line.bfloat16], yes[line.saved], f"+{line.raised:.4f}"]
    return f"| `{name}` | {' | '.join(figures)} |\n"


def others(refused: dict[str, str]) -> str:
    """The classes that have no line: refused, or not tried."""
    classes = {name for name in dir(diffusers) if name.endswith("Pipeline") and name != "DiffusionPipeline"}
    pipelines = {name: kind for name in classes if isinstance(kind := getattr(diffusers, name), type)}
    tried = {name.removesuffix("A14B").removesuffix("TI2V") for name in CASES}
    left = {name for name in pipelines if name not in refused and name not in tried}
    old = {name for name in left if ".deprecated." in getattr(pipelines[name], "__module__", "")}
    lines = [f"- `{name}`: {why}\n" for name, why in sorted(refused.items())]
    return (
        f"\nRefused:\n\n{''.join(lines)}\nNot tried, of diffusers {diffusers.__version__}: {_listed(left - old)}. "
        f"Not tried, and deprecated there: {_listed(old)}.\n"
    )


def _listed(names: set[str]) -> str:
    return ", ".join(name.removesuffix("Pipeline") for name in sorted(names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
