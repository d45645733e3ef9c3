"""Prompts: where they are read from, and which are trained on and which held out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlr_ray.assets import PROMPTS
from rlr_ray.config.prompts import PromptsConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.core.seeds import permutation
from rlr_ray.errors import UserError
from rlr_ray.prompts.files import ENDINGS, conversion, rows_of
from rlr_ray.prompts.prompt import Prompt, prompt_of
from rlr_ray.utils.environment import path_of

logger = logging.getLogger(__name__)
Say = Callable[[str], None]  # is given what a person should know of the prompts


@dataclass(frozen=True)
class PromptSets:
    train: list[Prompt]
    held_out: list[Prompt]


def shipped_lists() -> list[str]:
    """Names of the lists in the package."""
    return sorted(path.stem for path in PROMPTS.glob("*.txt"))


def prompt_sets(config: RunConfig, say: Say = lambda text: None) -> PromptSets:
    """A run's prompts. Raises UserError if they cannot be had, or do not work with its sampler."""
    keys = config.prompts if isinstance(config.prompts, PromptsConfig) else PromptsConfig(source=config.prompts)
    prompts = load_prompts(keys.source, say, keys.column)
    if isinstance(keys.held_out, float):
        sets = _split(prompts, keys.held_out, config.seed)
    elif keys.held_out is None:
        sets = PromptSets(prompts, prompts)
    else:
        sets = PromptSets(prompts, _others(prompts, load_prompts(keys.held_out, say, keys.column), say))
    _check_guidance(sets, config.sampler.guidance_scale)
    _check_stages((*sets.train, *sets.held_out), staged=config.dcot is not None)
    return sets


def _check_guidance(sets: PromptSets, guidance_scale: float) -> None:
    negative = next((prompt for prompt in (*sets.train, *sets.held_out) if prompt.negative), None)
    if negative is not None and guidance_scale == 1:
        raise UserError(
            f"prompt {negative.text!r} has the negative prompt {negative.negative!r}, which does nothing at "
            "sampler.guidance_scale 1; raise sampler.guidance_scale, or drop the column negative_prompt"
        )


def _check_stages(prompts: Sequence[Prompt], *, staged: bool) -> None:
    """Refuse stages that the run would not heed, and none where it asks for them."""
    with_stages = next((prompt for prompt in prompts if prompt.stages is not None), None)
    if with_stages is not None and not staged:
        raise UserError(
            f"prompt {with_stages.text!r} has texts for coarse, mid and fine steps, but no dcot says which steps those "
            "are; set dcot: {mid: FIRST_STEP, fine: FIRST_STEP}, or take the three out of the prompts"
        )
    if with_stages is None and staged:
        raise UserError(
            "dcot is set, but no prompt has texts for coarse, mid and fine steps; write them into the prompts file "
            "with `rlr-ray dcot expand`, or leave out dcot"
        )


def _split(prompts: list[Prompt], share: float, seed: int) -> PromptSets:
    """A random share of the prompts held out, at least one on each side; both in the prompts' order.

    Rows that differ in their metadata alone are one prompt, so that training has none that is held out.
    """
    distinct = list(dict.fromkeys(prompt.drawn for prompt in prompts))
    if len(distinct) < 2:
        raise UserError(
            f"prompts.held_out is {share:g}, but prompts.source holds 1 prompt; allowed: 2 or more to split; add "
            "prompts, or leave held_out out"
        )
    count = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    held_out = {distinct[i] for i in permutation(len(distinct), seed, "held-out prompts")[:count]}
    sides = [[prompt for prompt in prompts if (prompt.drawn in held_out) is side] for side in (False, True)]
    return PromptSets(*sides)


def _others(train: list[Prompt], held_out: list[Prompt], say: Say) -> list[Prompt]:
    """Held-out prompts of their own source; `say` is told how many of them are trained on."""
    trained = {prompt.drawn for prompt in train}
    both = sum(prompt.drawn in trained for prompt in held_out)
    if both:
        say(f"{both} of {_many(len(held_out), 'held-out prompt')} {'is' if both == 1 else 'are'} in prompts.source too")
    return held_out


def load_prompts(source: str | Sequence[str], say: Say = lambda text: None, column: str | None = None) -> list[Prompt]:
    """Prompts of a list, of a shipped list by its name, or of a file of the kind that its ending says.

    `column`: of a file's rows, which has the texts. Empty and repeated ones are left out; `say` is told how many.
    Raises UserError if none is left.
    """
    rows, name = _rows(source, column)
    read = [prompt_of(row, place, column) for place, row in _watched(rows, name)]
    folder = Path(source).expanduser().absolute().parent if isinstance(source, str) else Path.cwd()
    read = [prompt if prompt is None or not prompt.metadata else prompt.seen_from(folder) for prompt in read]
    prompts = [prompt for prompt in read if prompt is not None]
    distinct = list(_distinct(prompts))
    if not distinct:
        raise UserError(f"{name} holds no prompt; write one a line, or one a row in a column 'prompt'")
    if len(prompts) < len(read):
        say(f"{name}: {_many(len(read) - len(prompts), 'empty line')} left out")
    if len(distinct) < len(prompts):
        say(f"{name}: {_many(len(prompts) - len(distinct), 'duplicate')} left out")
    return distinct


_SAY_S = 5.0  # between two words of how far a long file is read


def _watched(rows: Iterable[tuple[str, Any]], name: str) -> Iterator[tuple[str, Any]]:
    due = time.monotonic() + _SAY_S
    for count, row in enumerate(rows):
        if count % 10_000 == 0 and time.monotonic() > due:
            due += _SAY_S
            logger.info(f"{name}: {count:,} rows read")
        yield row


def _rows(source: str | Sequence[str], column: str | None) -> tuple[Iterable[tuple[str, Any]], str]:
    """Rows with their places, and what to call the whole."""
    if not isinstance(source, str):
        return ((f"prompts, entry {number}", text) for number, text in enumerate(source, 1)), "the list of prompts"
    shipped = source in shipped_lists()
    path = PROMPTS / f"{source}.txt" if shipped else path_of(source)
    if path.suffix.lower() not in ENDINGS:
        remedy = conversion(path.suffix.lower(), source)
        raise UserError(
            f"prompts file {source!r} ends in {path.suffix!r}; allowed: {', '.join(ENDINGS)}, or the name of a shipped "
            f"list: {', '.join(shipped_lists())}" + (f"; {remedy}" if remedy else "")
        )
    if not path.is_file():
        raise UserError(f"prompts file {source!r} was not found (looked in {Path.cwd()}); write its path from there")
    return rows_of(path, source, column), f"prompts file {source!r}"


def _distinct(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The first of those that are equal but for their weight."""
    seen: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for prompt in prompts:
        alike = seen.setdefault(prompt.drawn, [])
        if prompt.metadata not in alike:
            alike.append(prompt.metadata)
            yield prompt


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def describe_prompts(config: RunConfig) -> str:
    """Numbers of prompts trained on, held out and left out, in words. Raises UserError for bad ones."""
    notes: list[str] = []
    sets = prompt_sets(config, notes.append)
    held_out = "held-out chains have the same" if sets.held_out is sets.train else f"{len(sets.held_out)} held out"
    return "\n".join([f"prompts: {len(sets.train)} to train on; {held_out}", *(f"note: {note}" for note in notes)])
