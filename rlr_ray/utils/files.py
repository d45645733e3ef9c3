"""Files that outlive a kill and a full disk: replaced whole, and sealed with a checksum where a run depends on them."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlr_ray.errors import UserError

_SEAL = b"\nsha256 "  # and 64 hexadecimal digits: a sealed file's end
_SEAL_BYTES = len(_SEAL) + 64
PARTS = f".*.{'[0-9a-f]' * 32}.part"  # names of files that replace_file has begun to write


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, flush it to disk, then move it there: a reader never meets half a file.

    The part has a name of its own, since an orphan of a killed run may write the same file at the same time. Raises an
    OSError that names the file; then there is no part, and the file is as it was.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        write(part)
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def append_file(path: Path, content: bytes) -> None:
    """Append all of the content and flush it to disk; or nothing, and raise an OSError that names the file."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(content)
        _flush(path)
    except OSError as error:
        with suppress(FileNotFoundError):
            os.truncate(path, size)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on disk before anything that comes later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks flush no folders
            raise
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes had begun to write. One that still lives loses a part, and tries again."""
    for part in folder.rglob(PARTS):
        part.unlink(missing_ok=True)


def refuse_foreign(folder: Path, kind: str, own: Collection[str] = ()) -> None:
    """Raise UserError if a folder in which a `kind` is to begin has files of anyone else's.

    They would be mixed with its own, and deleted when it is overwritten. `own`: what a kill leaves of one that had not
    begun yet, its folders empty; hidden files do not count.
    """
    paths = sorted(folder.glob("[!.]*")) if folder.is_dir() else []
    foreign = [path.name for path in paths if path.name not in own or (path.is_dir() and any(path.glob("[!.]*")))]
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(
            f"{folder} holds no {kind}, but {shown}; a {kind} begins in a folder of its own and deletes nobody else's "
            "files, also with --overwrite; give another --set name=..., or move these away"
        )


def make_folder(folder: Path, *, anew: bool) -> None:
    """Make a folder. `anew`: what it holds goes, by a new name first, so that no kill leaves half of it."""
    folder = folder.resolve()  # a link to it stays
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():  # killed while it was deleted
        shutil.rmtree(old)
    if anew and folder.exists():
        folder.rename(old)
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)


class Unreadable(ValueError):
    """A sealed file that is not as it was written. The message goes on after the file's name."""


def save_sealed(path: Path, value: Any) -> None:
    """Write what torch.load reads, and its checksum behind it: torch.load itself notices few flipped bytes."""
    body = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(value, body)
    body.write(_SEAL + hashlib.sha256(body.getbuffer()).hexdigest().encode())
    replace_file(path, lambda part: part.write_bytes(body.getbuffer()))


def load_sealed(path: Path, device: torch.device) -> Any:
    """The value that was saved, its tensors on a device. Raises Unreadable."""
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    body, seal = content[:-_SEAL_BYTES], bytes(content[-_SEAL_BYTES:])
    if not seal.startswith(_SEAL):
        raise Unreadable("is cut off: its checksum is not at its end")
    if seal != _SEAL + hashlib.sha256(body).hexdigest().encode():
        raise Unreadable("is damaged: its checksum is of other bytes")
    return torch.load(io.BytesIO(body), map_location=device, weights_only=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise UserError where a file cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of an OSError
        raise UserError(
            f"could not save: {error}; free space or mend the disk, then run the same command again: train "
            "and tune with --resume, where there is something to go on with"
        ) from error
