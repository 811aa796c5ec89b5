"""Writing shards: the images of a folder as they are, in a few tar archives, and the index that training reads."""

import dataclasses
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from maelab.config import Reading, check_count
from maelab.data.folder import channels_of, default_size, examine, found_of, range_of
from maelab.data.layout import File
from maelab.data.shards import COLUMNS, PARTS, Index, sharded, write_index
from maelab.data.splits import hash_path, key_of, key_of_text
from maelab.data.table import absolute
from maelab.errors import RunError, UsageError
from maelab.files import make_folder
from maelab.progress import heartbeat, say_once

_HEADER = 512  # bytes before a member of a tar archive
_SPARE = 2**26  # bytes of the disk that stay free


def shard(
    folder: Path, out: Path, *, labels: str | None = None, group: str | None = None, shard_mb: int = 256
) -> dict[str, Any]:
    """Write the images of a folder into shards and their index; the arguments are those of `maelab data shard`.

    Returns:
        {"data": "folder:OUT", "shards", "images", "bytes", "unreadable"}.

    Raises:
        UsageError: if OUT holds anything, or the folder no images.
        RunError: if the disk has no room, or an image changes meanwhile.
    """
    check_count("--shard-mb", shard_mb)
    folder, out = Path(str(folder).removeprefix("folder:")).expanduser(), Path(out).expanduser()
    if not shard_mb:
        raise UsageError("--shard-mb must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} holds something already; shards go into a new folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{out} lies among your images in {folder}; name a folder elsewhere")
    if sharded(f"folder:{folder}") is not None:
        raise UsageError(f"{folder} holds shards already; name the folder that they were written from")
    reading = Reading(labels=None if labels is None else absolute(labels), group=group)
    examined = examine(f"folder:{folder}", reading, whole=True)
    found = found_of(examined, reading)
    for line in found.lines():
        say_once(line, str(folder))
    root, files, headers, keys, class_names, given, *_ = examined
    channels = channels_of(headers)
    pairs = list(zip(files, headers, strict=True))
    value_range = range_of(pairs, class_names, given, channels, root)
    # In a random order, so that whoever reads a shard alone gets images of every class.
    order = np.random.default_rng(0).permutation(len(files))
    order = order[np.argsort([PARTS.index(files[i].part) for i in order], kind="stable")].tolist()
    total = sum(file.path.stat().st_size + 4 * _HEADER for file in files)
    make_folder(out.absolute().parent)
    if total + _SPARE > (free := shutil.disk_usage(out.absolute().parent).free):
        raise RunError(f"the shards need {total / 2**30:.1f} GiB, and {out.parent} has {free / 2**30:.1f} GiB free")
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        # The index keeps the order of the folder, and so training that of its images.
        columns = {name: np.empty(len(files), kind) for name, kind in COLUMNS.items()}
        shards = _write(files, keys, order, root, part, shard_mb * 10**6, columns)
        about = {name: value for name, value in dataclasses.asdict(found).items() if name != "fingerprint"}
        asked = (reading.labels, reading.group)
        size = default_size(headers)
        write_index(part, Index(columns, shards, class_names, given, size, channels, value_range, asked, about))
        part.chmod(0o755)
        if out.is_dir():  # empty; and where it no longer is, this fails
            out.rmdir()
        os.replace(part, out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {
        "data": f"folder:{out}",
        "shards": len(shards),
        "images": len(files),
        "bytes": sum(shards.values()),
        "unreadable": list(found.broken),
    }


def _write(
    files: list[File],
    keys: list[bytes],
    order: list[int],
    root: Path,
    place: Path,
    largest: int,
    columns: dict[str, np.ndarray],
) -> dict[str, int]:
    """Write the images in this order, and fill the index at the place of each. File name -> bytes of the shards."""
    beat, done, shards = heartbeat("writing shards", len(files)), 0, {}
    for name, some in _in_shards(files, order, largest):
        with tarfile.open(place / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in some:
                file, key = files[i], keys[i]
                content = file.path.read_bytes()
                if key_of(content) != key:
                    raise RunError(f"{file.path} has changed while the shards were written; begin again")
                row = {
                    "shard": len(shards), "offset": tar.offset + _HEADER, "size": len(content), "label": file.label,
                    "part": PARTS.index(file.part), "key": _number(key),
                    "group": _number(key_of_text(f"group {file.group}") if file.group else key),
                    "path": _number(hash_path(file.path.relative_to(root))),
                }  # fmt: skip
                for column, value in row.items():
                    columns[column][i] = value
                _add(tar, f"{done:09d}{file.path.suffix.lower()}", content)
                if file.label >= 0:
                    _add(tar, f"{done:09d}.cls", str(file.label).encode())
                tar.members = []  # type: ignore[attr-defined]  # it would keep them for reading
                beat(done := done + 1)
        shards[name] = (place / name).stat().st_size
    return shards


def _in_shards(files: list[File], order: list[int], largest: int) -> Iterator[tuple[str, list[int]]]:
    """(name of a shard, the places of the images that go into it); one holds a single part."""
    some: list[int] = []
    length, number = 0, dict.fromkeys(PARTS, 0)

    def named() -> tuple[str, list[int]]:
        part = files[some[0]].part
        number[part] += 1
        return f"{part}-{number[part] - 1:06d}.tar", some

    for i in order:
        size = files[i].path.stat().st_size + 4 * _HEADER
        if some and (length + size > largest or files[some[0]].part != files[i].part):
            yield named()
            some, length = [], 0
        some.append(i)
        length += size
    yield named()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, BytesIO(content))


def _number(key: bytes) -> int:
    return int.from_bytes(key, "little", signed=True)
