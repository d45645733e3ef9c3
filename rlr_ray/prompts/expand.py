"""Plain prompts into triples: what the coarse, the mid and the fine steps are to draw."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from rlr_ray.config.estimator import STAGES
from rlr_ray.errors import UserError
from rlr_ray.prompts.files import decoded, json_lines
from rlr_ray.prompts.prompt import NEGATIVE, WEIGHT, Prompt, prompt_of
from rlr_ray.rewards.http import Server, said_in
from rlr_ray.utils.files import append_file

Triple = dict[str, str]  # stage -> text
TEMPLATE: Triple = {
    "coarse": "the outline of {prompt}",
    "mid": "{prompt}, the right shape and proportions",
    "fine": "{prompt}, fine detail",
}
_ASKED = (
    "A diffusion model draws a picture in three stages: coarse (outline and layout), mid (shape and geometry), fine "
    "(detail and texture). Rewrite the user's prompt for each stage: name the same subject, stress what that stage "
    "decides, at most 30 words each. Answer with nothing but a JSON object with the texts 'coarse', 'mid' and 'fine'."
)
_AT_ONCE = 4
_BEGINNING = b'{"prompt": '  # of every row that `expand` writes
_TRIES = 3  # a language model's next answer may be better


def parse_template(parts: Sequence[str]) -> Triple:
    """`stage=text` of the command line over the default. Raises UserError for what is not that."""
    template = dict(TEMPLATE)
    for part in parts:
        stage, _, text = part.partition("=")
        if stage not in STAGES or "{prompt}" not in text:
            raise UserError(
                f"--template {part!r}; allowed: STAGE=TEXT with coarse, mid or fine and {{prompt}} in the text, e.g. "
                f"'coarse={TEMPLATE['coarse']}'"
            )
        template[stage] = text
    return template


def fill(template: Mapping[str, str], prompt: str) -> Triple:
    return {stage: text.replace("{prompt}", prompt) for stage, text in template.items()}


class Endpoint:
    """Any server that speaks OpenAI's chat completions, at `{url}/chat/completions`.

    One that is away is waited for, and one whose answer is no triple is asked up to 3 times.
    """

    def __init__(self, url: str, model: str, api_key: str | None, timeout_s: float = 60.0, patience_s: float = 60.0):
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.server = Server("--endpoint", self.url, timeout_s, patience_s, _AT_ONCE, headers)

    def __call__(self, prompt: str) -> Triple:
        """Raises UserError if no answer of the server's is a triple."""
        for _ in range(_TRIES):
            answer = self._ask(prompt)
            triple = _read(answer)
            if triple:
                return triple
        raise UserError(
            f"{self.url} answered {answer[:200]!r} for {prompt!r}; allowed: a JSON object with texts 'coarse', 'mid' "
            "and 'fine'; try another --model, or write the three into that prompt's row yourself"
        )

    def _ask(self, prompt: str) -> str:
        roles = [{"role": "system", "content": _ASKED}, {"role": "user", "content": prompt}]
        try:
            answer = self.server.answer({"model": self.model, "messages": roles})
        except requests.RequestException as error:
            raise UserError(
                f"{self.url} gave no answer ({error}); see whether the server runs, --endpoint is its address up to "
                "/v1, --model one that it has, and --api-key-env the variable of its key"
            ) from error
        return said_in(answer)


def _read(text: str) -> Triple | None:
    """The triple in a language model's answer, whatever it wrote around it; None if there is none."""
    try:
        answer = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except json.JSONDecodeError:
        return None
    if not isinstance(answer, dict) or not all(isinstance(answer.get(stage), str) for stage in STAGES):
        return None
    triple = {stage: answer[stage].strip() for stage in STAGES}
    return triple if all(triple.values()) else None


def expand(prompts: Sequence[Prompt], triple_of: Callable[[str], Triple]) -> Iterator[dict[str, Any]]:
    """Rows of a prompts file, each as soon as those before it are there; a prompt that has its stages keeps them."""

    def row(prompt: Prompt) -> dict[str, Any]:
        stages = dict(zip(STAGES, prompt.stages, strict=True)) if prompt.stages else triple_of(prompt.text)
        columns: dict[str, Any] = {NEGATIVE: prompt.negative} if prompt.negative else {}
        columns |= {WEIGHT: prompt.weight} if prompt.weight != 1 else {}
        return {"prompt": prompt.text, **stages, **columns, **prompt.metadata}

    pool, pending = ThreadPoolExecutor(_AT_ONCE), deque[Future[dict[str, Any]]]()
    with pool:
        for prompt in prompts:
            pending.append(pool.submit(row, prompt))
            if len(pending) == _AT_ONCE:  # no further ahead: what was asked after a failure is lost
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    append_file(path, (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode())


def remaining(prompts: Sequence[Prompt], path: Path) -> tuple[list[Prompt], int]:
    """Those without a row in the file of an earlier call, by text and negative; and how many rows there are of others.

    A last line that the earlier call was ended amid is cut off. Raises UserError for a file that is not `expand`'s,
    which stays as it is.
    """
    if not path.exists():
        return list(prompts), 0
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1  # of a last line that was not ended
    half = start < len(content) and not _is_json(content[start:])
    read = json_lines(decoded(content[:start] if half else content, str(path)), str(path))
    rows = [row for row in (prompt_of(line, place) for place, line in read) if row is not None]
    foreign = [f"its prompt {row.text!r} has no coarse, mid and fine" for row in rows if row.stages is None]
    if half and not content[start:].startswith(_BEGINNING[: len(content) - start]):
        foreign.append("its last line is no row")
    if foreign:
        raise UserError(
            f"--out {str(path)!r} is there, and {foreign[0]}; allowed: a new file, or one that this command began; "
            "give another --out"
        )
    if half:
        os.truncate(path, start)
    elif start < len(content):
        append_file(path, b"\n")
    there = Counter((row.text, row.negative) for row in rows)
    left = []
    for prompt in prompts:
        key = prompt.text, prompt.negative
        if there[key]:
            there[key] -= 1  # rows that differ in their metadata alone have each their own
        else:
            left.append(prompt)
    return left, there.total()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
