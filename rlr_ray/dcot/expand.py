"""Plain prompts into triples: what the coarse, the mid and the fine steps are to draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from rlr_ray.dcot_config import STAGES
from rlr_ray.disk import replace_file
from rlr_ray.errors import UserError
from rlr_ray.prompts import Prompt
from rlr_ray.prompts.prompt import NEGATIVE, WEIGHT

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

    Asked again, a little later each time, if it cannot be reached, is overloaded (429, 502, 503, 504) or does not
    answer within `timeout_s`; and up to 3 times if what it says is no triple.
    """

    def __init__(self, url: str, model: str, api_key: str | None, timeout_s: float = 60.0, retries: int = 5):
        self.url, self.model, self.timeout_s = f"{url.rstrip('/')}/chat/completions", model, timeout_s
        again = Retry(retries, backoff_factor=0.5, status_forcelist=[429, 502, 503, 504], allowed_methods=None)
        self.session = requests.Session()
        self.session.headers.update({"Authorization": f"Bearer {api_key}"} if api_key else {})
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=again))

    def __call__(self, prompt: str) -> Triple:
        """Raises UserError if no answer of the server's is a triple."""
        for _ in range(_TRIES):
            said = self._ask(prompt)
            triple = _read(said)
            if triple:
                return triple
        raise UserError(
            f"{self.url} answered {said[:200]!r} for {prompt!r}; allowed: a JSON object with texts 'coarse', 'mid' and "
            "'fine'; try another --model, or leave out --endpoint for the template"
        )

    def _ask(self, prompt: str) -> str:
        roles = [{"role": "system", "content": _ASKED}, {"role": "user", "content": prompt}]
        try:
            answer = self.session.post(self.url, json={"model": self.model, "messages": roles}, timeout=self.timeout_s)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["message"]["content"])
        except requests.RequestException as error:
            raise UserError(
                f"{self.url} gave no answer ({error}); see whether the server runs, --endpoint is its address up to "
                "/v1, --model one that it has, and --api-key-env the variable of its key"
            ) from error
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{self.url} answered {answer.text[:200]!r}; allowed: what OpenAI's /chat/completions answers; give an "
                "--endpoint that speaks it"
            ) from error


def _read(said: str) -> Triple | None:
    """The triple in a language model's answer, whatever it wrote around it; None if there is none."""
    try:
        found = json.loads(said[said.find("{") : said.rfind("}") + 1])
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(stage), str) for stage in STAGES):
        return None
    triple = {stage: found[stage].strip() for stage in STAGES}
    return triple if all(triple.values()) else None


def expand(prompts: Sequence[Prompt], triple_of: Callable[[str], Triple]) -> list[dict[str, Any]]:
    """Rows of a prompts file; a prompt that has its stages keeps them."""

    def row(prompt: Prompt) -> dict[str, Any]:
        own = prompt.stages and dict(zip(STAGES, prompt.stages, strict=True))
        columns: dict[str, Any] = {NEGATIVE: prompt.negative} if prompt.negative else {}
        columns |= {WEIGHT: prompt.weight} if prompt.weight != 1 else {}
        return {"prompt": prompt.text, **(own or triple_of(prompt.text)), **columns, **prompt.metadata}

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(row, prompts))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write_text(text, "utf-8"))
