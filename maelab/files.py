"""Folders that others cannot write to; and JSON of limited size and depth, the one way in which maelab reads what
somebody else may have written."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from maelab.errors import RunError

LARGEST_JSON = 2**26  # bytes; what is larger was not written by maelab
LARGEST_INT = 2**64  # more digits were not written by maelab either, and no float holds them
DEEPEST = 32  # objects and lists inside each other; functions that go through them call themselves as often


def make_folder(folder: Path, mode: int = 0o755) -> None:
    """Make a folder and those above it that are missing, so that nobody else may write there, whatever the umask.

    Args:
        folder: may be there already, and then stays as it is.
        mode: of the folder itself, at the most.

    Raises:
        OSError: if it cannot be made.
    """
    for place in [*reversed(folder.parents), folder]:
        if not os.path.lexists(place):
            with contextlib.suppress(FileExistsError):  # another process was faster
                place.mkdir(mode=mode if place == folder else 0o755)


def parse_json(text: bytes | str) -> Any:
    """What JSON text says, within limits that keep what was not written by maelab from doing harm.

    Raises:
        ValueError: if it is none, is nested too deeply, or holds a number that no file of maelab's holds.
    """

    def parse_int(digits: str) -> int:
        if len(digits) > 20 or abs(number := int(digits)) >= LARGEST_INT:
            raise ValueError(f"the number {digits[:20]}... is too large")
        return number

    try:
        content = json.loads(text, parse_int=parse_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [content]
    for _ in range(DEEPEST + 1):
        inside = [part for part in level if isinstance(part, dict | list)]
        level = [value for part in inside for value in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


def read_limited(file: Path, largest: int = LARGEST_JSON) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: if it has more than `largest` bytes.
        OSError: if it cannot be read.
    """
    with open(file, "rb") as opened:
        content = opened.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MiB")
    return content


def read_json(file: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON object, {} when the file is missing.

    Raises:
        RunError: if it is damaged, or larger than `largest` bytes.
    """
    if not file.is_file():
        return {}
    try:
        content = parse_json(read_limited(file, largest))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged: it holds no JSON object")
    return content
