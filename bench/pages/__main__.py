"""Write docs/benchmarks.md, its figures, the tables of other pages, and the tree of docs/architecture.md.

python -m bench.pages
"""

from __future__ import annotations

from pathlib import Path

from bench.common import DOCS, IMAGES, options, text
from bench.pages.actors import actors
from bench.pages.bias import bias
from bench.pages.learning import defaults, learning, sensitivity
from bench.pages.peers import peers
from bench.pages.plans import break_even, lab, planner, workers
from bench.pages.scale import kills, scale, sharded, true_memory, update_memory
from bench.pages.speed import speed
from bench.pages.sweeps import ablation, lengths, rewards, surrogate
from bench.pages.tree import tree

LEARNING = (learning, defaults, sensitivity)
SECTIONS = (
    *LEARNING,
    ablation,
    lab,
    bias,
    planner,
    break_even,
    lengths,
    surrogate,
    peers,
    rewards,
    speed,
    update_memory,
    true_memory,
)


def fill(page: Path, name: str, block: str) -> None:
    """Put a block between `<!-- name -->` and `<!-- end -->`."""
    start, stop = f"<!-- {name} -->\n", "<!-- end -->"
    head, _, rest = page.read_text("utf-8").partition(start)
    page.write_text(head + start + block.strip() + "\n" + stop + rest.partition(stop)[2], "utf-8")


def main() -> None:
    options(__doc__).parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    page = [text("head"), *filter(None, (section() for section in SECTIONS))]
    (DOCS / "benchmarks.md").write_text("\n".join(page), "utf-8")
    fill(DOCS / "estimators.md", "workers", workers())
    fill(DOCS / "scaling.md", "scale", scale())
    fill(DOCS / "scaling.md", "actors", actors())
    fill(DOCS / "scaling.md", "shard", sharded())
    fill(DOCS / "scaling.md", "kills", kills())
    fill(DOCS / "architecture.md", "tree", tree())
    print(DOCS / "benchmarks.md")


if __name__ == "__main__":
    main()
