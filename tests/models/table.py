"""Every class of diffusers' pipelines that is tried, examined: `make models` writes the table in docs/models.md.

python -m tests.models.table [CLASS ...] prints those classes alone. Exits with 1 if a figure is not as it must be.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import diffusers
import torch

from rlr_ray.errors import UserError
from rlr_ray.models.arguments import REFUSED
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
    rows, refused, wrong = [], dict(REFUSED), 0
    for name in names or sorted(CASES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                line = line_of(name, Path(folder))
            except UserError as error:
                refused[name] = str(error).partition(";")[0]
                continue
        print(name, line, *line.wrong, flush=True)
        wrong += bool(line.wrong)
        rows.append(row_of(name, line))
    if not names:
        text = PAGE.read_text("utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(before + BEGIN + HEAD + "".join(rows) + others(refused) + END + after, "utf-8")
    return int(wrong > 0)


def row_of(name: str, line: Line) -> str:
    yes = {True: "same bits", False: "no", None: ""}
    figures = [f"{line.picture:.0e}", f"{line.gradient:.0e}", yes[line.replayed], f"{line.rows:.0e}"]
    figures += [yes[line.bfloat16], yes[line.saved], f"+{line.raised:.4f}"]
    return f"| `{name}` | {' | '.join(figures)} |\n"


def others(refused: dict[str, str]) -> str:
    """The classes that have no line: refused, or not tried."""
    classes = {name for name in dir(diffusers) if name.endswith("Pipeline") and name != "DiffusionPipeline"}
    pipelines = {name: kind for name in classes if isinstance(kind := getattr(diffusers, name), type)}
    left = {name for name in pipelines if name not in refused and name not in CASES}
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
