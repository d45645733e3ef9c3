"""The environment of a process: installed versions, variables and secrets, users' modules, and its settings."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

from rlr_ray.errors import UserError

_VERSIONS = ("rlr-ray", "torch", "diffusers", "transformers", "peft", "ray")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a run's numbers may depend on."""
    numbers = {"python": platform.python_version()}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            numbers[name] = version(name)
    return numbers


VARIABLE = re.compile(r"\$\{(\w+)\}")  # in a recipe: a variable of the environment, so that no file holds its value


_SECRET = re.compile(
    r"(.*[_-])?(token|authorization|cookie|secret|password|credentials?|(api|access|private)[_-]?key)([_-].*)?"
)
_SHORTEST = 4  # letters of a value that messages hide; shorter ones stand in many a word
_UNQUOTED = "!#$%&'()*+,/:;=?@[]~"  # in a URL that requests quotes
_names: dict[str, str] = {}  # of variables, by the values that this process has put in their place


def names_secret(key: str) -> bool:
    """Whether a key's value is secret, by its name."""
    return _SECRET.fullmatch(key.lower()) is not None


def concealed(text: object) -> str:
    """A message with `${NAME}` again where this process put in a variable's value, as errors of servers quote it."""
    message = str(text)
    for value in sorted(_names, key=len, reverse=True):
        message = message.replace(value, f"${{{_names[value]}}}")
    return message


def expanded(value: Any, whose: str) -> Any:
    """A value with what the environment of this process has in place of each `${NAME}`; see `concealed`.

    Raises UserError for one that is not set; `whose` is what that calls the value.
    """
    if isinstance(value, dict):
        return {key: expanded(one, whose) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [expanded(one, whose) for one in value]
    if not isinstance(value, str):
        return value
    missing = [name for name in VARIABLE.findall(value) if name not in os.environ]
    if missing:
        raise UserError(
            f"{whose} names ${{{missing[0]}}}, which the environment on {platform.node()} lacks; export {missing[0]} "
            "wherever it is built before the run starts"
        )
    for name in VARIABLE.findall(value):
        text = os.environ[name].strip()
        _names.update({form: name for form in (text, quote(text, _UNQUOTED)) if len(form) >= _SHORTEST})
    return VARIABLE.sub(lambda match: os.environ[match[1]], value)


def own_module(name: str) -> ModuleType:
    """A user's module, also one in the working folder, as `python -m` finds it and console scripts do not.

    Or a file, by `folder/file` or `file.py`. What it sets while it is imported is set for it alone; see `apart`. Raises
    UserError if there is no such file, and whatever the import raises.
    """
    from rlr_ray.utils.settings import apart  # only here, as below: it needs torch

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with apart(name):
        return _file_module(name) if _is_file(name) else importlib.import_module(name)


def path_of(text: str) -> Path:
    """A path as people write it: `~` and `$HOME`, or another variable of the environment, are what they stand for."""
    return Path(os.path.expandvars(text)).expanduser()


def module_file(name: str) -> str | None:
    """The file of a user's module, which is not imported; None if it is not found here."""
    if _is_file(name):
        return str(_file_of(name))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with suppress(ImportError, ValueError):  # the latter: a module without a spec
        spec = importlib.util.find_spec(name)
        return spec.origin if spec else None
    return None


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith(".py")


def _file_of(name: str) -> Path:
    return Path(os.path.abspath(path_of(name).with_suffix(".py")))


def _file_module(name: str) -> ModuleType:
    file = _file_of(name)
    if not file.is_file():
        raise UserError(f"{name}: there is no file {file}; write its path from {os.getcwd()}, or as a whole")
    key = "".join(letter if letter.isalnum() else "_" for letter in str(file))
    if key not in sys.modules:
        if str(file.parent) not in sys.path:  # for what it imports from beside it
            sys.path.append(str(file.parent))
        spec = importlib.util.spec_from_file_location(key, file)
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[key])
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon Ray Train hands a report on
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no message per worker on the driver's screen
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 Ray Tune's old output is silent
    # For the processes of a Ray that is started here: if they were told as the job's environment, Ray could not use the
    # processes that it has ready.
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TRANSFORMERS_VERBOSITY": "error",  # it warns of processors that no run uses
    "KINETO_LOG_LEVEL": "99",  # torch's profiler writes to the terminal otherwise
}


def set_variables() -> None:
    """Set the environment of this process and those that it starts, where a user has not. Before Ray is imported."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)


def prepare_process(threads: int) -> None:
    """The same, and the number of CPU threads of torch, which changes the last bits. Before an engine is built."""
    import torch  # only here: much imports this file that needs no torch

    set_variables()
    torch.set_num_threads(threads)
