"""Files that are whole or not there: written under a temporary name, synced and renamed."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from maelab.errors import RunError

_TEMPORARY = re.compile(r"\.(.+)\.\d+\.maelab", re.DOTALL)


def temporary(path: Path) -> Path:
    """The name under which this process writes the file before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.maelab")


def final_name(name: str) -> str:
    """The name of the file that a temporary name stands for; any other name is itself."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else name


def write_atomically(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that a reader, a crash or a loss of power sees the old content or the new, never a part.

    Args:
        path: the file; its folder is made if need be.
        content: the bytes, or a function that writes them into the file it is given.

    Raises:
        RunError: if it cannot be written, e.g. because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, content)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def put(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file under its temporary name, sync it and rename it. The folder must be there. Raises OSError."""
    try:
        os.replace(write_temporary(path, content), path)
    finally:
        with contextlib.suppress(OSError):
            temporary(path).unlink()


def write_temporary(path: Path, content: bytes | Callable[[Path], object]) -> Path:
    """Write and sync the content under the temporary name of `path`, and return that. Raises OSError."""
    place = temporary(path)
    if callable(content):
        content(place)
    else:
        place.write_bytes(content)
    with open(place, "rb+") as file:
        os.fsync(file.fileno())
    return place


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; where the system knows no such thing, nothing is done."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, as_json(content))


def as_json(content: object) -> bytes:
    """The bytes of a JSON file."""
    return (json.dumps(content, indent=1) + "\n").encode()


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
