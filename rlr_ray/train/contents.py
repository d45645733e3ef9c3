"""Digests of a run's prompts, reward modules and weights, which may change under the same names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.models.names import with_path
from rlr_ray.prompts.load import prompt_sets
from rlr_ray.utils.environment import module_file, path_of

_WHOLE = 64 * 2**20  # bytes of a file that is read as a whole; of a larger one as many, in blocks evenly apart
_BLOCK = 2**20
_JUDGE = "judge"


def contents_of(config: RunConfig) -> dict[str, str]:
    """Digests of a run's prompts, of its own rewards' and judges' modules, and of weights, by what each is called.

    Weights are folders of the user's, or repositories of the hub, of which the commit is taken that is here; what
    cannot be found here is left out. Raises UserError if the prompts cannot be read.
    """
    sets = prompt_sets(config)
    digests = {"prompts": _digest(repr((sets.train, sets.held_out)).encode())}
    model = with_path(config.model)
    files = model.single_file if isinstance(model.single_file, dict) else {"": model.single_file}
    places = {f"model.single_file.{part}".rstrip("."): file for part, file in files.items()}
    places |= {"model.path": model.path, "model.motion_adapter": model.motion_adapter}
    places |= {"adapter.from": _lora_of(config.adapter.from_)}
    places |= {f"model.merge {place}": _lora_of(place) for place in model.merge}
    for kind, rewards in (("reward", config.rewards), (_JUDGE, config.evaluation.judges)):
        for label, reward in rewards.items():
            places |= _places(f"{kind} {label}", reward)
    for name, place in places.items():
        revision = model.revision if name == "model.path" else None
        digest = None if place is None else _of_place(place, revision or "main")
        if digest is not None:
            digests[name] = digest
    return digests


def trained_on(contents: Mapping[str, str]) -> dict[str, str]:
    """Those that training rewards depend on."""
    return {name: digest for name, digest in contents.items() if not name.startswith(f"{_JUDGE} ")}


def _places(name: str, reward: JudgeConfig) -> dict[str, str | None]:
    """A reward's module, and the options that name files, folders or repositories."""
    module = module_file(reward.name.rpartition(":")[0]) if ":" in reward.name else None
    texts = {key: value for key, value in reward.options.items() if isinstance(value, str) and "\n" not in value}
    return {name: module} | {f"{name}, option {key}": value for key, value in texts.items()}


def _lora_of(place: str | None) -> str | None:
    """Of a run's folder, whose other files change with every report of it, what is read there."""
    lora = None if place is None else path_of(place) / "lora"
    return str(lora) if lora is not None and lora.is_dir() else place


def _of_place(place: str, revision: str) -> str | None:
    with suppress(OSError):
        path = path_of(place)
        if path.exists():
            return _of_path(path)
        if place.count("/") == 1:
            return _of_repository(place, revision)
    return None


def _of_path(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("[!.]*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
        for block in _blocks(file):
            total.update(block)
    return total.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            yield file.read()
            return
        count = _WHOLE // _BLOCK
        for number in range(count):
            file.seek((size - _BLOCK) * number // (count - 1))
            yield file.read(_BLOCK)


def _of_repository(name: str, revision: str) -> str | None:
    """The commit of a revision of the hub that is in the cache; None if none is, or it is a commit itself."""
    from huggingface_hub import constants  # only here: a start need not pay for it

    head = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / revision
    return head.read_text().strip() if head.is_file() else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
