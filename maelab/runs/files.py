"""Files that are whole or not there: written under a temporary name, synced and renamed; and JSON of limited size."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maelab.errors import RunError

LARGEST_JSON = 2**26  # bytes; what is larger was not written by maelab
LARGEST_INT = 2**64  # more digits were not written by maelab either, and no float holds them
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


def parse_json(text: bytes) -> Any:
    """What JSON text says, within limits that keep what was not written by maelab from doing harm.

    Raises:
        ValueError: if it is none, is nested too deeply, or holds a number that no file of maelab's holds.
    """

    def parse_int(digits: str) -> int:
        if len(digits) > 20 or abs(number := int(digits)) >= LARGEST_INT:
            raise ValueError(f"the number {digits[:20]}... is too large")
        return number

    try:
        return json.loads(text, parse_int=parse_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON object, {} when the file is missing.

    Raises:
        RunError: if it is damaged, or larger than `largest` bytes.
    """
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > largest:
            raise ValueError(f"it is larger than {largest >> 20} MiB")
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged: it holds no JSON object")
    return content


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
