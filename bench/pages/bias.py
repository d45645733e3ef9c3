"""The table of biased gradients' cosines and lengths."""

from __future__ import annotations

from typing import Any

from bench.common import MACHINE, read_json, table, text

TITLES = {
    "digits, start": "embedded digits, at the start",
    "digits, trained": "embedded digits, trained",
    "early-stopped, start": "a model stopped early, at the start",
    "early-stopped, trained": "a model stopped early, trained",
}


def bias() -> str:
    results = read_json("bias.json")
    if results is None:
        return ""
    places = [name for name in TITLES if name in results]
    forms = [form for form in results[places[0]]["forms"] if all(form in results[place]["forms"] for place in places)]
    heads = ["form", *(TITLES[place] for place in places)]
    return text("bias").format(
        chains=results[places[0]]["chains"],
        branched=results[places[0]]["branched"],
        updates=max(results[place]["updates"] for place in places),
        rewards=", ".join(f"{results[place]['reward']:.2f} ({TITLES[place]})" for place in places),
        rows=table(heads, [[form, *(_cell(results[place], form) for place in places)] for form in forms]),
        raw=table(heads, [["full backpropagation, clipped", *(_of_clipped(results[place]) for place in places)]]),
        machine=MACHINE,
    )


def _cell(place: dict[str, Any], form: str) -> str:
    told = place["forms"][form]
    noise = place["noise scale"][form]
    if told["clipped"]["cosine_se"] is None or noise < 0:
        return "too noisy"
    return f"{_cosine(told['clipped'])}; {_cosine(told['raw'])}; {noise:.0f}"


def _of_clipped(place: dict[str, Any]) -> str:
    told, noise = place["clipped beside raw"], place["noise scale"]
    length = f"{told['length']:.2g} ± {told['length_se']:.1g}"
    return f"{_cosine(told)}; {length}; {noise['clipped']:.0f} instead of {noise['raw']:.0f}"


def _cosine(told: dict[str, float]) -> str:
    return f"{told['cosine']:.2f} ± {told['cosine_se']:.2f}"
