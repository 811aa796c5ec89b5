"""Decoded pixels of large folders, kept in a file of the cache and read from there."""

import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

from maelab.config import Reading
from maelab.data.decode import decode_each
from maelab.data.layout import File, fingerprint_of
from maelab.data.sources import cache_dir
from maelab.data.splits import KEY_BYTES
from maelab.errors import RunError
from maelab.files import make_folder, read_json

_LARGEST_NOTE = 2**30  # bytes; an image takes about 40


def read_cached(
    listed: list[File],
    files: list[File],
    root: Path,
    shape: tuple[int, int, int],
    reading: Reading,
    skipped: list[str],
) -> tuple[np.memmap, list[File], list[bytes], str]:
    """All images from their file in the cache, decoded into it if they have changed since, or never were.

    The file's name depends on `fingerprint_of`, shape and reading; an older one of the same folder, shape and resizing
    is removed. Two
    processes wait for each other; a reader whose file is removed keeps it until its end.

    Args:
        listed, files: all of the folder, and those of them to decode.

    Returns:
        The images, memory-mapped, uint8 (N, *shape), those of `files` that they are, their keys, and their MD5.
    """
    from filelock import FileLock

    folder = cache_dir() / "folders"
    fingerprint = fingerprint_of(listed, root)
    about = {"folder": str(root.resolve()), "shape": list(shape), "resize": reading.resize}
    name = f"{about} {reading.value_range} {fingerprint}".encode(errors="surrogateescape")
    name = hashlib.sha256(name).hexdigest()[:32]
    pixels, note = folder / f"{name}.uint8", folder / f"{name}.json"
    try:
        make_folder(folder)
        with FileLock(folder / f"{name}.lock"):
            known = _read_note(note)
            if not _is_whole(known, pixels):
                for old in folder.glob("*.json"):
                    if about.items() <= _read_note(old).items():
                        old.unlink()
                        old.with_suffix(".uint8").unlink(missing_ok=True)
                place = {file: i for i, file in enumerate(listed)}
                decoded = _decode_into(pixels, files, place, root, shape, reading)
                known = {**about, "fingerprint": fingerprint, **decoded}
                part = note.with_suffix(".part")
                part.write_text(json.dumps(known))
                os.replace(part, note)
            rows = (len(known["kept"]), *shape)
            # Copy on write: nobody's mistake changes the file.
            images = np.memmap(pixels, np.uint8, "c", shape=rows) if known["kept"] else np.empty(rows, np.uint8)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"cannot keep decoded images in {folder}: {reason}; set MAELAB_DATA to another folder"
        ) from error
    skipped += known["skipped"]
    return cast(np.memmap, images), [listed[i] for i in known["kept"]], _keys_of(known), known["md5"]


def cached_keys(listed: list[File], root: Path, fingerprint: str) -> dict[Path, bytes]:
    """The keys of the files of a folder that lies decoded in the cache: reading them all again would take too long."""
    for file in (cache_dir() / "folders").glob("*.json"):
        note = _read_note(file)
        if (note.get("folder"), note.get("fingerprint")) == (str(root.resolve()), fingerprint):
            return {listed[i].path: key for i, key in zip(note["kept"], _keys_of(note), strict=True)}
    return {}


def _keys_of(note: dict[str, Any]) -> list[bytes]:
    keys = bytes.fromhex(note["keys"])
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _read_note(note: Path) -> dict[str, Any]:
    """What was noted of a file of images, {} if nothing was, or what nobody notes here."""
    try:
        known = read_json(note, _LARGEST_NOTE)
        good = all(isinstance(known[name], str) for name in ("folder", "fingerprint", "md5", "sample", "keys"))
        good = good and all(type(number) is int and number >= 0 for name in ("kept", "shape") for number in known[name])
        good = good and all(isinstance(text, str) for text in known["skipped"])
        return known if good and len(_keys_of(known)) == len(known["kept"]) else {}
    except (RunError, KeyError, TypeError, ValueError):
        return {}


def _is_whole(known: dict[str, Any], pixels: Path) -> bool:
    """Whether a file of images is what was noted."""
    try:
        return known["sample"] == _sample(pixels, len(known["kept"]), math.prod(known["shape"])) and "keys" in known
    except (OSError, KeyError, TypeError):
        return False


def _sample(pixels: Path, n: int, size: int) -> str:
    """MD5 of the length of a file of images and of 64 of them: reading 15 GB at each start would take too long."""
    digest = hashlib.md5(str(pixels.stat().st_size).encode(), usedforsecurity=False)
    with open(pixels, "rb") as file:
        for i in range(0, n, max(1, n // 64)):
            file.seek(i * size)
            digest.update(file.read(size))
    return digest.hexdigest()


def _decode_into(
    pixels: Path, files: list[File], place: dict[File, int], root: Path, shape: tuple[int, int, int], reading: Reading
) -> dict[str, Any]:
    """Decode all images into one file, put in place when it is whole.

    Returns:
        What to note: "kept" (the place of each), "keys" (of each, in one text of hexadecimals), "skipped", "md5",
        "sample".
    """
    needed, free = len(files) * math.prod(shape), shutil.disk_usage(pixels.parent).free
    if needed > free:
        raise RunError(
            f"{len(files)} decoded images need {needed / 2**30:.1f} GiB in {pixels.parent} and {free / 2**30:.1f} GiB"
            " are free; set MAELAB_DATA to another folder, or choose a smaller --img-size"
        )
    print(f"maelab: decoding {len(files)} images once, into {pixels} ({needed / 2**30:.1f} GiB)", file=sys.stderr)
    kept: list[int] = []
    keys: list[bytes] = []
    skipped: list[str] = []
    digest, part = hashlib.md5(usedforsecurity=False), pixels.with_suffix(".part")
    try:
        with open(part, "wb") as out:
            for file, (image, key) in decode_each(files, shape[1:], shape[0], reading, root, skipped):
                content = image.tobytes()
                digest.update(content)
                out.write(content)
                kept.append(place[file])
                keys.append(key)
        os.replace(part, pixels)
    finally:
        part.unlink(missing_ok=True)
    sample = _sample(pixels, len(kept), math.prod(shape))
    return {"kept": kept, "keys": b"".join(keys).hex(), "skipped": skipped, "md5": digest.hexdigest(), "sample": sample}
