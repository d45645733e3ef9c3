"""Reading a run's configuration: a YAML recipe, overrides from the command line, and errors that name the key."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rlr_ray.config.base import holder, read_yaml
from rlr_ray.config.checks import check_together
from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.rewards import is_differentiable, is_video
from rlr_ray.utils.environment import path_of

Checked = TypeVar("Checked", bound=BaseModel)
Judge = TypeVar("Judge", bound=JudgeConfig)
_PART = re.compile(r'"([^"]*)"|([^."]+)')  # of a key with dots
_SHORT = (  # a key that may have a value in place of a section, and the key in there which that value is of
    ("estimator", "preset"),
    ("reward|evaluation.judge", "name"),
    (r"rewards\..*", "weight"),
    ("prompts", "source"),
)
# Keys, or values of one, that recipes had before: what to write now. A * is any label.
GONE = {
    "estimator.first_order_steps": "write estimator.first_order.steps",
    "estimator.sub_chain.temperature": "the law of place: importance has no temperature any more; leave it out",
    "estimator.zeroth_order.span=guides": "write a number of principal components, or leave it out",
    "rewards.*.actors.batch_wait_s": "calls wait 0.01 s for others to share a batch; leave it out",
    "evaluation.judges.*.actors.batch_wait_s": "calls wait 0.01 s for others to share a batch; leave it out",
    "cluster.resize_every_s": "elastic workers look for room every 15 s; leave it out",
    "cluster.rollouts.max_retries": "a chunk is run again 4 times; leave it out",
    "closed_form": "leave it out; `rlr-ray plan` shows the paper's closed form for a memory budget",
    "scheduler.name=hyperband": "write asha, which halves as hyperband does, without its brackets",
    "scheduler.name=median": "write asha, or none",
}
_KEY = re.compile(r"(?!(int|str|float)$)[a-z_]+")  # a key's name; not pydantic's name of a type


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """Read a YAML recipe, apply `key.sub=value` overrides and check it. Raises UserError naming every bad key."""
    return parse_config(overridden(read_recipe(path), overrides))


def read_recipe(path: str) -> dict[str, Any]:
    """A recipe's keys, unchecked. Raises UserError if it holds none."""
    file = path_of(path)
    if not file.is_file():
        raise UserError(f"config {path!r} was not found (looked in {Path.cwd()}); write its path from there")
    try:
        values = read_yaml(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path!r} holds {type(values).__name__}; allowed: keys and values, as in configs/")
    return values


def overridden(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Unchecked values, in which each `key.sub=value` is set, in place. Raises UserError for one that says nothing."""
    for text in overrides:
        put(values, *split_override(text))
    return values


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Check values, with what the package's own rewards say of themselves. Raises UserError naming every bad key."""
    return _with_facts(checked(RunConfig, values), own=False)


def resolve(config: RunConfig) -> RunConfig:
    """The config with what the user's own rewards say of themselves: whether they have gradients, and see videos.

    Imports them, so only what is about to run them asks. Raises UserError if one is not found, or if what it says does
    not go with the rest.
    """
    return _with_facts(config, own=True)


def _with_facts(config: RunConfig, *, own: bool) -> RunConfig:
    rewards = {label: with_facts(reward, own=own) for label, reward in config.rewards.items()}
    judges = {label: with_facts(judge, own=own) for label, judge in config.evaluation.judges.items()}
    evaluation = config.evaluation.model_copy(update={"judges": judges})
    config = config.model_copy(update={"rewards": rewards, "evaluation": evaluation})
    estimator = config.estimator.decided(black_box=bool(config.black_box))
    config = config.model_copy(update={"estimator": estimator})
    surrogate = config.estimator.surrogate
    if surrogate is not None and surrogate.name != "online" and (own or ":" not in surrogate.name):
        if not is_differentiable(surrogate.name):
            raise UserError(
                f"estimator.surrogate.name {surrogate.name!r} is black-box (differentiable: false), but first order "
                "passes through the surrogate; allowed: 'online' or a differentiable reward; set "
                "estimator.surrogate.name: online"
            )
        known = surrogate.model_copy(update={"video": is_video(surrogate.name, surrogate.video)})
        config = config.model_copy(update={"estimator": config.estimator.model_copy(update={"surrogate": known})})
    check_together(config)
    return config


def with_facts(reward: Judge, *, own: bool = True) -> Judge:
    """A reward with what it says of itself where the recipe does not; of a user's own, if `own` may be imported."""
    if ":" in reward.name and not own:
        return reward
    stated = reward.differentiable if reward.input == "tensor" else False
    facts = {"differentiable": is_differentiable(reward.name, stated)}
    return reward.model_copy(update=facts | {"video": is_video(reward.name, reward.video)})


def checked(model: type[Checked], values: dict[str, Any]) -> Checked:
    """Values as a model of theirs. Raises UserError naming every bad key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(model, error.errors())) from error


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `key.sub`, in place; whatever the last key had goes, also if it was a dictionary, and all beside it stays.

    Keys that are there may hold dots themselves, as a reward's label `package.module:name` does: the longest is meant.
    A new one is quoted: `rewards."package.module:name".weight`. Raises UserError where a key on the way has a value
    that is no short form of a section, which would be lost.
    """
    parts, above = [quoted or plain for quoted, plain in _PART.findall(key.strip())], ""
    while True:
        size = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in values), 1)
        name, parts = ".".join(parts[:size]), parts[size:]
        if not parts:
            values[name] = value
            return
        values[name] = _section(f"{above}{name}", values.get(name), key)
        values, above = values[name], f"{above}{name}."


def _section(name: str, value: Any, key: str) -> dict[str, Any]:
    """A key's value as a dictionary, also if it is written in a short form."""
    short = next((long for pattern, long in _SHORT if re.fullmatch(pattern, name)), None)
    if isinstance(value, dict):
        return value
    if value is None or (name == "cluster" and value == "none"):
        return {}
    if short is None:
        raise UserError(f"{key} lies in {name}, which is {value!r} and holds no keys; set {name} as a whole")
    return {short: value}


def split_override(text: str) -> tuple[str, Any]:
    """Key and value of `key.sub=value`. Raises UserError if it has none."""
    key, separator, after = text.partition("=")
    if not separator:
        raise UserError(f"--set {text!r} has no '='; write --set key.sub=value, e.g. --set train.iterations=10")
    try:
        return key.strip(), read_yaml(after)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text!r}: the value is not YAML: {error}") from error


def _describe(model: type[BaseModel], errors: Sequence[Any]) -> str:
    """A line for every key; of one that allows several kinds of values, the error of the kind that came furthest."""
    by_place: dict[tuple[Any, ...], list[Any]] = {}
    for item in errors:
        *above, last = item["loc"] or [""]
        unknown = item["type"] == "extra_forbidden"  # and named whatever it looks like
        place = (*_walk(model, above)[0], last) if unknown else _walk(model, item["loc"])[0]
        by_place.setdefault(place, []).append(item)
    shallow = {place[:depth] for place in by_place for depth in range(1, len(place))}
    return "\n".join(_line(model, place, items) for place, items in by_place.items() if place not in shallow)


def _walk(model: type[BaseModel], location: Sequence[int | str]) -> tuple[tuple[int | str, ...], Any]:
    """The keys on the way to an error, without pydantic's names for the kinds of values that a key allows.

    And what holds the keys that come next: a model, a dictionary's type, or None.
    """
    place: list[int | str] = []
    within: Any = model
    for part in location:
        if get_origin(within) is dict:  # a label, whatever it looks like
            place.append(part)
            within = holder(get_args(within)[1])
        elif isinstance(part, int) or _KEY.fullmatch(part):
            place.append(part)
            field = getattr(within, "model_fields", {}).get(part)
            within = field and holder(field.annotation)
    return tuple(place), within


def _line(model: type[BaseModel], place: tuple[Any, ...], items: Sequence[Any]) -> str:
    item, key = items[0], ".".join(map(str, place))
    for gone, instead in GONE.items():
        if fnmatchcase(key, gone) or f"{key}={item['input']}" == gone:
            return f"{gone.replace('=', ': ')} is no more: {instead}"
    if item["type"] == "extra_forbidden":
        within = _walk(model, item["loc"][:-1])[1]
        allowed = ", ".join(sorted(getattr(within, "model_fields", ())))
        return f"{key or repr(key)}: no such key; allowed here: {allowed}"
    message = " or ".join(dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in items))
    said_already = item["type"] in ("value_error", "missing") or isinstance(item["input"], dict)
    shown = "" if said_already else f"found {item['input']!r}; "
    return f"{key}: {shown}{message}" if key else message


def config_of(recipe: str | None, overrides: list[str], run: str | None) -> RunConfig:
    """The config of a recipe, or of the run that --resume names, whose own config.yaml then is the recipe.

    A run's name and output_dir are where its folder lies now. Raises UserError if recipe and run do not agree.
    """
    if not run:
        if recipe is None:
            raise UserError(
                "train was given no recipe; write --config RECIPE to start a run, or --resume RUN to go on with one"
            )
        return load_config(recipe, overrides)
    if recipe is None:
        folder, named_by = find_run(run, output_dir_of(overrides)), "--set"
        config = run_config(folder, overrides)
    else:
        config, named_by = load_config(recipe, overrides), "--config"
        folder = find_run(run, config.output_dir)
    if not (config.folder.exists() and config.folder.samefile(folder)):
        raise UserError(
            f"--resume {run!r} is the run in {folder}, but {named_by} names the one in {config.folder}; leave out "
            f"{named_by}: the recipe of a run that is resumed is its own config.yaml"
        )
    return config


def run_config(folder: Path, overrides: list[str]) -> RunConfig:
    """A run's own config.yaml with overrides, its name and output_dir where its folder lies now.

    Keys that are gone are left out: an earlier version wrote them with all others, asked or not.
    """
    values = as_now(read_recipe(str(folder / "config.yaml")))
    return parse_config(overridden(values | {"name": folder.name, "output_dir": str(folder.parent)}, overrides))


def as_now(values: dict[str, Any]) -> dict[str, Any]:
    """A config that an earlier version wrote, in the keys of this one; those that are gone are left out.

    It holds every key that there was, so a preset would only fill those that came since then: it is custom. And where
    it has no adapter.off_below, the adapter was on at every step.
    """
    values = values | {"adapter": {"off_below": None} | (values.get("adapter") or {})}
    estimator = values.get("estimator")
    if isinstance(estimator, dict) and "first_order_steps" in estimator:
        estimator = estimator | {"preset": "custom", "first_order": {"steps": estimator["first_order_steps"]}}
        if estimator.get("surrogate"):
            estimator["surrogate"] = {"use": "residual"} | estimator["surrogate"]
        values = values | {"estimator": estimator}
    return _without_gone(values)


def _without_gone(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if not any(fnmatchcase(f"{above}{key}", gone) for gone in GONE)}
    return {
        key: _without_gone(value, f"{above}{key}.") if isinstance(value, dict) else value for key, value in kept.items()
    }


def output_dir_of(overrides: list[str]) -> str:
    """The folder of runs by the overrides, or else by default."""
    return str(overridden({}, overrides).get("output_dir", RunConfig.model_fields["output_dir"].default))


def find_run(run: str, output_dir: str, asked_by: str = "--resume") -> Path:
    """The folder of a run, by its name under output_dir or by its path. Raises UserError if there is none."""
    root = path_of(output_dir)
    places = [Path(os.path.abspath(place)) for place in (root / run, path_of(run))]
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    names = sorted(file.parent.name for file in root.glob("[!.]*/config.yaml"))
    raise UserError(
        f"{asked_by} {run!r}: no run lies in {' or in '.join(map(str, dict.fromkeys(places)))}; allowed: a run of "
        f"{root} ({', '.join(names) or 'there is none'}), or the path of a run's folder"
        + ("; leave out --resume to begin one" if asked_by == "--resume" else "")
    )
