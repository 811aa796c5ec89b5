"""Images of the user's own: `folder:PATH`.

Layouts: one sub-folder per class; `train/` and `test/`, each with one sub-folder per class; or images without classes
directly in the folder, for pretraining. Beside classes, a sub-folder `unlabelled/` holds images without a class, which
only pretraining sees. Without `test/`, about a tenth of the images with a class is held out as the test part, each by
what its file holds, whatever lies beside it (see `maelab.data.splits`). Training leaves out copies of test images.

Decoding: PNG, JPEG, WebP and BMP (the first frame); EXIF orientation is applied; transparent pixels are shown on
white; 16-bit grey is scaled to 8 bits. Whatever cannot be decoded is named, skipped and counted.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageOps

from maelab.data.datasets import Dataset, ImageSet, MappedImages
from maelab.data.sources import cache_dir
from maelab.data.splits import KEY_BYTES, content_key, hold_out, list_of_images
from maelab.errors import RunError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
_TEST_FRACTION = 0.1
_MEMORY_SHARE = 0.8  # of what is free may be filled
_MAPPED_ABOVE = 2**29  # bytes of pixels; cutting off a validation part doubles for a moment what lies in memory
_UNLABELLED = ("unlabelled", "unlabeled")
_Result = TypeVar("_Result")


class _File(NamedTuple):
    path: Path
    label: int  # -1 without a class
    test: bool  # in test/


class _Header(NamedTuple):
    height: int  # as shown, after EXIF orientation
    width: int
    mode: str
    animated: bool


@dataclass(frozen=True)
class Found:
    """What a look at the headers of a folder's images says.

    Args:
        classes: class name -> its images, those for testing and their copies left out; {} without classes.
        unlabelled: images without a class, copies of those for testing left out.
        test: images for testing.
        held_out: whether they are held out by their content, because the folder has no test/.
        side: median shorter side of all images, in pixels.
        smallest, largest: (height, width) of the images with the fewest and the most pixels.
        modes: Pillow's name of the pixel format -> images.
        animated: images of which only the first frame is used.
        broken: those without a readable header, each "PATH (reason)"; broken pixels show only on decoding.
        ignored: suffix -> files that are not looked at.
        fingerprint: of the names, sizes and times of change of all image files.
    """

    classes: dict[str, int]
    unlabelled: int
    test: int
    held_out: bool
    side: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    modes: dict[str, int]
    animated: int
    broken: tuple[str, ...]
    ignored: dict[str, int]
    fingerprint: str

    @property
    def labelled(self) -> int:
        """Images to learn classes from."""
        return sum(self.classes.values())

    @property
    def grey(self) -> bool:
        """Whether no image has colours."""
        return self.modes.keys() <= set(_GREY_MODES)

    def lines(self) -> list[str]:
        """The same for people."""
        (a, b), (c, d) = self.smallest, self.largest
        modes = ", ".join(f"{count} {mode}" for mode, count in self.modes.items())
        lines = [f"found {self.labelled + self.unlabelled + self.test} images, {a}x{b} to {c}x{d} (height x width)"]
        lines[0] += f", median shorter side {self.side}; {modes}"
        if self.classes:
            shown = [f"{name} {count}" for name, count in list(self.classes.items())[:20]]
            shown += [f"and {len(self.classes) - 20} more"] if len(self.classes) > 20 else []
            kept = f"{self.test} for testing, {'held out by their content' if self.held_out else 'in test/'}"
            lines.append(f"{len(self.classes)} classes: {', '.join(shown)}; {self.unlabelled} unlabelled; {kept}")
        else:
            lines.append("no classes: all images are unlabelled")
        if self.broken:
            named = "; ".join(self.broken[:3]) + ("; ..." if len(self.broken) > 3 else "")
            lines.append(f"unreadable, left out: {len(self.broken)}: {named}")
        if self.animated:
            lines.append(f"animated, only the first frame is used: {self.animated}")
        if self.ignored:
            named = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.ignored.items())
            lines.append(f"other files, ignored: {named}")
        return lines


def scan(spec: str) -> Found:
    """Look at the images of "folder:PATH" without decoding them: their headers, and the bytes for the keys.

    Raises: UsageError (no such folder, no images, unclear layout).
    """
    root = _root(spec)
    files, class_names, given = _list_files(root)
    fingerprint = _fingerprint(files, root)
    known = _cached_keys(files, root, fingerprint)
    broken: list[str] = []

    def look(path: Path) -> tuple[_Header, bytes]:
        return _read_header(path), known.get(path) or content_key(path)

    pairs = list(_each(look, files, root, broken))
    if not pairs:
        raise UsageError(f"none of the images in {root} can be decoded, for example {broken[0]}")
    files, headers = [file for file, _ in pairs], [header for _, (header, _) in pairs]
    parts = _parts(files, [key for _, (_, key) in pairs], class_names, given)
    other = (path for path in root.rglob("*") if path.is_file() and path.name[0] != ".")
    ignored = Counter(path.suffix.lower() for path in other if path.suffix.lower() not in SUFFIXES)
    count = Counter(parts.labels[~parts.test & ~parts.left_out].tolist())
    by_area = sorted(headers, key=lambda header: header.height * header.width)
    return Found(
        classes={name: count[label] for label, name in enumerate(class_names)},
        unlabelled=count[-1],
        test=int(parts.test.sum()),
        held_out=bool(class_names) and not given,
        side=int(median(min(header.height, header.width) for header in headers)),
        smallest=(by_area[0].height, by_area[0].width),
        largest=(by_area[-1].height, by_area[-1].width),
        modes=dict(Counter(header.mode for header in headers).most_common()),
        animated=sum(header.animated for header in headers),
        broken=tuple(sorted(broken)),
        ignored=dict(ignored.most_common()),
        fingerprint=fingerprint,
    )


def _fingerprint(files: list[_File], root: Path) -> str:
    """Changes when a file comes, goes, moves to another class or is written: SHA-256 of names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.path.stat()
        line = (str(file.path.relative_to(root)), file.label, file.test, stat.st_size, stat.st_mtime_ns)
        digest.update(repr(line).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _root(spec: str) -> Path:
    if not spec.startswith("folder:"):
        raise UsageError(f"--data {spec} is no folder of images; write --data folder:PATH")
    if not (path := spec.removeprefix("folder:")):
        raise UsageError("'folder:' names no folder; write folder:PATH")
    return Path(path).expanduser()


def load_folder(spec: str, *, img_size: tuple[int, int] | None = None, in_chans: int | None = None) -> Dataset:
    """Load the images of "folder:PATH" into memory; the layouts are those of the module's docstring.

    More than half a gigabyte is decoded once into a file in the cache, and read from there a batch at a time.

    Args:
        spec: "folder:PATH".
        img_size: (height, width) of the result. Each image is scaled, antialiased, until it covers this size, and
            cropped around its centre. Default: the size of the images if all have the same and no side exceeds 64;
            otherwise a square of the median shorter side, at most 224, rounded down to a multiple of 16 (at least 16).
        in_chans: 1 or 3. Default: 1 if every image is stored as greyscale, otherwise 3.
    Raises: UsageError (no such folder, no images, unclear layout, a class without a decodable image), RunError (more
        than fits into memory).
    """
    root = _root(spec)
    if in_chans not in (None, 1, 3):
        raise UsageError(f"in_chans is {in_chans}; images of a folder can be had with 1 or 3 channels")
    if img_size is not None and min(img_size) < 1:
        raise UsageError(f"--img-size is {img_size[0]} x {img_size[1]}; both sides must be at least 1")
    listed, class_names, given = _list_files(root)
    skipped: list[str] = []
    headers = list(_each(_read_header, listed, root, skipped))
    if not headers:
        raise UsageError(f"none of the images in {root} can be decoded, for example {skipped[0]}")
    files = [file for file, _ in headers]
    height, width = img_size or _default_size([header for _, header in headers])
    channels = in_chans or (1 if all(header.mode in _GREY_MODES for _, header in headers) else 3)
    needed, free = len(files) * channels * height * width, _available_memory()
    if mapped := needed > _MAPPED_ABOVE:
        images, kept, keys, image_md5 = _read_cached(listed, files, root, (channels, height, width), skipped)
    else:
        if needed > _MEMORY_SHARE * free:
            raise RunError(
                f"{len(files)} images of {height} x {width} x {channels} in {root} need {needed / 2**30:.1f} GiB of "
                f"memory and {free / 2**30:.1f} GiB are free; choose a smaller --img-size or fewer images"
            )
        images = np.empty((len(files), channels, height, width), np.uint8)
        kept, keys = [], []
        for file, (pixels, key) in _decode_each(files, (height, width), channels, root, skipped):
            images[len(kept)] = pixels
            kept.append(file)
            keys.append(key)
        images = images[: len(kept)]
        image_md5 = _md5(images)
    skipped.sort()
    if not kept:
        raise UsageError(f"none of the images in {root} can be decoded, for example {skipped[0]}")
    parts = _parts(kept, keys, class_names, given)
    for line in _copies(parts, kept, root):
        print(f"maelab: {line}", file=sys.stderr)
    train = ~parts.test & ~parts.left_out
    for label, class_name in enumerate(class_names):
        if not bool((train & (parts.labels == label)).any()):
            raise UsageError(f"class {class_name!r} in {root} has no good training image; every class needs two")
    if skipped:
        named = "; ".join(skipped[:5]) + (f"; and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        print(f"maelab: skipped {len(skipped)} of {len(skipped) + len(kept)} images: {named}", file=sys.stderr)
    checksums = {"images": image_md5, "files": _md5(parts.keys.numpy())}
    if class_names:
        checksums["labels"] = _md5(parts.labels.numpy())

    def part(chosen: torch.Tensor) -> ImageSet | None:
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            return None
        if mapped:
            pixels = cast(torch.Tensor, MappedImages(cast(np.memmap, images), rows))
        else:
            pixels = torch.from_numpy(images)[rows]
        return ImageSet(pixels, parts.labels[rows] if class_names else None, parts.keys[rows])

    labelled = (parts.labels >= 0) | (not class_names)
    training = part(train & labelled)
    if training is None:
        raise UsageError(f"every image in {root / 'train'} is also in {root / 'test'}; none is left to train on")
    listing = list_of_images(zip((file.path.relative_to(root) for file in kept), keys, strict=True))
    test, unlabelled = part(parts.test), part(train & ~labelled)
    return Dataset(spec, training, test, class_names, checksums, tuple(skipped), unlabelled, listing)


# -------------------------------------------------------------------------------------------------------------- cache


def _read_cached(
    listed: list[_File], files: list[_File], root: Path, shape: tuple[int, int, int], skipped: list[str]
) -> tuple[np.memmap, list[_File], list[bytes], str]:
    """All images from their file in the cache, decoded into it if they have changed since, or never were.

    The file's name depends on `_fingerprint` and shape; an older one of the same folder and shape is removed. Two
    processes wait for each other; a reader whose file is removed keeps it until its end.

    Args:
        listed, files: all of the folder, and those of them to decode.

    Returns:
        The images, memory-mapped, uint8 (N, *shape), those of `files` that they are, their keys, and their MD5.
    """
    from filelock import FileLock

    folder = cache_dir() / "folders"
    fingerprint = _fingerprint(listed, root)
    about = {"folder": str(root.resolve()), "shape": list(shape)}
    name = hashlib.sha256(f"{about} {fingerprint}".encode(errors="surrogateescape")).hexdigest()[:32]
    pixels, note = folder / f"{name}.uint8", folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            known = _read_note(note)
            if not _is_whole(known, pixels):
                for old in folder.glob("*.json"):
                    if about.items() <= _read_note(old).items():
                        old.unlink()
                        old.with_suffix(".uint8").unlink(missing_ok=True)
                place = {file: i for i, file in enumerate(listed)}
                known = {**about, "fingerprint": fingerprint, **_decode_into(pixels, files, place, root, shape)}
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


def _cached_keys(listed: list[_File], root: Path, fingerprint: str) -> dict[Path, bytes]:
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
    """What was noted of a file of images, {} if nothing was."""
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


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
    pixels: Path, files: list[_File], place: dict[_File, int], root: Path, shape: tuple[int, int, int]
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
            for file, (image, key) in _decode_each(files, shape[1:], shape[0], root, skipped):
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


# ------------------------------------------------------------------------------------------------------------- layout


def _list_files(root: Path) -> tuple[list[_File], tuple[str, ...], bool]:
    """(files sorted by class and name, class names, whether the folder itself says which are for testing)."""
    if not root.exists():
        raise UsageError(f"there is no folder {root}")
    if not root.is_dir():
        raise UsageError(f"{root} is a file; folder:PATH takes a folder of images")
    parts = {path.name for path in root.iterdir() if path.is_dir()} if not list_images(root, deep=False) else set()
    without = sorted(name for name in parts & set(_UNLABELLED) if list_images(root / name))
    more = [_File(path, -1, False) for name in without for path in list_images(root / name)]
    parts -= set(_UNLABELLED)
    if more and not any(list_images(root / name) for name in parts):
        return more, (), False
    if {"train", "test"} <= parts:
        if extra := sorted(name for name in parts - {"train", "test"} if list_images(root / name)):
            raise UsageError(f"{root} holds train/, test/ and also {extra[0]}/; leave only train/ and test/ there")
        train, class_names = _list_classes(root / "train")
        test, test_classes = _list_classes(root / "test")
        if unknown := sorted(set(test_classes) - set(class_names)):
            raise UsageError(f"class {unknown[0]!r} is in {root / 'test'} but not in {root / 'train'}")
        if bool(class_names) != bool(test_classes):
            raise UsageError(f"{root / 'test'} has no classes, but {root / 'train'} has")
        files = [_File(path, class_names.index(name) if name else -1, False) for path, name in train]
        files += [_File(path, class_names.index(name) if name else -1, True) for path, name in test]
        return files + more, class_names, True
    if "train" in parts and parts <= {"train", "val", "valid", "validation"}:
        raise UsageError(
            f"{root} holds {' and '.join(f'{name}/' for name in sorted(parts))}: name the two parts train/ and test/, "
            f"or use folder:{root / 'train'}"
        )
    found, class_names = _list_classes(root)
    files = [_File(path, class_names.index(name) if name else -1, False) for path, name in found]
    return files + more, class_names, False


def _list_classes(folder: Path) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    """Sorted (path, class name) of the images in `folder`, and its classes; the name is "" in a flat folder."""
    loose = list_images(folder, deep=False)
    subs = (path for path in folder.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in _UNLABELLED)
    subs = sorted(subs, key=lambda path: path.name)
    by_class = {sub.name: list_images(sub) for sub in subs}
    full = [name for name, images in by_class.items() if images]
    if loose and full:
        raise UsageError(
            f"{folder} holds both images and sub-folders with images ({loose[0].name}, {full[0]}/): "
            "put every image into the sub-folder of its class, images without one into unlabelled/, or all of them "
            "directly into one folder"
        )
    if not loose and not full:
        raise UsageError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    if loose:
        return [(path, "") for path in loose], ()
    if empty := [name for name in by_class if name not in full]:
        raise UsageError(f"class {empty[0]!r} in {folder} holds no images; remove the sub-folder or fill it")
    return [(path, name) for name in full for path in by_class[name]], tuple(full)


def list_images(folder: Path, deep: bool = True) -> list[Path]:
    """Files of `folder` with an image's suffix, sorted; hidden ones (".x", "._x.png" of macOS) are left out."""
    paths = folder.rglob("*") if deep else folder.iterdir()
    found = (path for path in paths if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file())
    return sorted(found, key=lambda path: path.as_posix())


class _Parts(NamedTuple):
    """What each image of a folder is for.

    Args:
        keys, labels: int64 (N,); label -1 without a class.
        test: bool (N,), for testing.
        left_out: bool (N,), for nothing, since a copy is for testing.
    """

    keys: torch.Tensor
    labels: torch.Tensor
    test: torch.Tensor
    left_out: torch.Tensor


def _copies(parts: _Parts, files: list[_File], root: Path) -> list[str]:
    """What identical files do to the parts, for people."""
    _, which, count = parts.keys.unique(return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for i in (count[which] > 1).nonzero()[:, 0].tolist():
        groups.setdefault(int(which[i]), []).append(i)
    lines = []
    labelled = [[i for i in group if files[i].label >= 0] for group in groups.values()]
    torn = [group for group in labelled if len({files[i].label for i in group}) > 1]
    if torn:
        named = " and ".join(str(files[i].path.relative_to(root)) for i in (torn[0][0], torn[0][-1]))
        lines.append(f"{sum(map(len, torn))} identical files lie in different classes, for example {named}")
    if left_out := parts.left_out.nonzero()[:, 0].tolist():
        copied = next(i for i in groups[int(which[left_out[0]])] if parts.test[i])
        named = " as ".join(str(files[i].path.relative_to(root)) for i in (left_out[0], copied))
        lines.append(f"left {len(left_out)} images out of training, which are also test images: for example {named}")
    return lines


def _parts(files: list[_File], keys: list[bytes], class_names: tuple[str, ...], given: bool) -> _Parts:
    """Share out the images; `given`: by test/ of the folder itself."""
    number = torch.from_numpy(np.frombuffer(b"".join(keys), "<i8").astype(np.int64))
    labels = torch.tensor([file.label for file in files])
    test = torch.tensor([file.test for file in files])
    if class_names and not given:
        labelled = labels >= 0
        test[labelled] = hold_out(number[labelled], labels[labelled], _TEST_FRACTION, "test")
    return _Parts(number, labels, test, ~test & torch.isin(number, number[test]))


# ------------------------------------------------------------------------------------------------------------ decoding


def _each(
    work: Callable[[Path], _Result], files: list[_File], root: Path, skipped: list[str]
) -> Iterator[tuple[_File, _Result]]:
    """(file, work(file.path)) in order, in threads; a file that fails goes into `skipped` with its reason instead."""

    def attempt(file: _File) -> tuple[_Result | None, str]:
        try:
            return work(file.path), ""
        except Exception as error:  # decoders raise anything on damaged bytes, and one file must not end the run
            return None, _reason(error, file.path)

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # of decoders, about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's limit refuses, not only warns
        for start in range(0, len(files), 256):  # results wait in memory
            some = files[start : start + 256]
            for file, (result, reason) in zip(some, pool.map(attempt, some), strict=True):
                if result is None:
                    skipped.append(f"{file.path.relative_to(root)} ({reason})")
                else:
                    yield file, result


def _decode_each(
    files: list[_File], size: tuple[int, int], channels: int, root: Path, skipped: list[str]
) -> Iterator[tuple[_File, tuple[np.ndarray, bytes]]]:
    """(file, (pixels, key)) as `_each`."""
    return _each(lambda path: (_decode(path, size, channels), content_key(path)), files, root, skipped)


def _reason(error: Exception, path: Path) -> str:
    """Why an image could not be decoded."""
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {(Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty" if path.stat().st_size == 0 else f"not a {', '.join(_FORMATS)} image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def find_images(inputs: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """The image files that `inputs` name, one after the other, each input looked up only when its turn comes.

    Args:
        inputs: a file is itself; a folder is the images in it and below, sorted; a glob is what it matches, sorted.

    Yields:
        (path as it was given, ""), or (the input, why it names none).
    """
    for path in map(os.path.expanduser, map(str, inputs)):  # os.path's tests raise no error, whatever a path holds
        literal = os.path.exists(path) or not glob.has_magic(path)
        matches = [path] if literal else sorted(glob.glob(path, recursive=True))
        if not matches:
            yield path, "matches no file"
        for match in matches:
            try:
                images = list(map(str, list_images(Path(match)))) if os.path.isdir(match) else [match]
            except OSError as error:
                yield match, error.strerror or str(error)
                continue
            if not images:
                yield match, f"a folder without images ({', '.join(SUFFIXES)})"
            yield from ((image, "") for image in images)


def read_batches(
    inputs: Iterable[str | Path], size: tuple[int, int], channels: int, batch_size: int
) -> Iterator[list[tuple[str, torch.Tensor | str]]]:
    """The image files that `inputs` name (see `find_images`), prepared as those of a folder are and decoded in threads,
    so many at a time.

    Yields:
        (path, uint8 (channels, *size)), or (path, why it cannot be read) for each file of a batch, in order.
    """

    def read(path: str, reason: str) -> torch.Tensor | str:
        if reason or (os.path.exists(path) and not os.path.isfile(path)):  # reading a pipe might wait for ever
            return reason or "not a file"
        try:
            return torch.from_numpy(_decode(Path(path), size, channels).copy())
        except Exception as error:  # decoders raise anything on damaged bytes
            return _reason(error, Path(path))

    found = find_images(inputs)
    while batch := list(islice(found, batch_size)):
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            images = list(pool.map(read, *zip(*batch, strict=True)))
        yield [(path, image) for (path, _), image in zip(batch, images, strict=True)]


def read_all(inputs: Iterable[str | Path], size: tuple[int, int], channels: int) -> torch.Tensor:
    """All image files that `inputs` name (see `find_images`): uint8 (N, channels, *size).

    Raises:
        UsageError: if one cannot be decoded, or there is none.
    """
    images = []
    for path, image in (pair for batch in read_batches(inputs, size, channels, 64) for pair in batch):
        if isinstance(image, str):
            raise UsageError(f"cannot read the image {path}: {image}")
        images.append(image)
    return torch.stack(images)


def decode_image(content: bytes, channels: int) -> Image.Image:
    """The image that `content` holds, upright, as "L" (1 channel) or "RGB" (3), within the limits of a folder's files.

    Raises:
        UsageError: if it has more than Pillow's limit of pixels, or cannot be decoded.
    """
    limit = Image.MAX_IMAGE_PIXELS or 0
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            warnings.simplefilter("ignore")
            if opened.width * opened.height > limit:
                raise Image.DecompressionBombError
            return to_eight_bits(ImageOps.exif_transpose(opened), channels)
    except Image.DecompressionBombError:
        reason = f"it has more than {limit // 1_000_000} megapixels"
    except Image.UnidentifiedImageError:
        reason = f"it is no {', '.join(_FORMATS)} image" if content else "it is empty"
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = str(error) or type(error).__name__
    raise UsageError(f"cannot read the image: {reason}")


def read_mask(path: Path, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """A mask that someone drew: an image whose dark parts, or a text of 0 and 1 whose 1s, are to be hidden.

    Args:
        path: the file, with a cell for each patch or for each pixel; of a patch the larger part decides.
        grid: rows and columns of patches.
        size: height and width in pixels.

    Returns:
        float32 (L,), 1 = hidden.

    Raises:
        UsageError: if it is neither, has another size, or hides nothing or everything.
    """
    try:
        content = path.read_bytes() if path.stat().st_size < 2**20 else b""  # a text of cells is small
        if content and not content.strip(b"01 ,;\t\r\n"):
            lines = [[int(cell) for cell in line if cell in "01"] for line in content.decode().splitlines()]
            lines = [line for line in lines if line]
            if len({len(line) for line in lines}) != 1:
                raise ValueError("its lines have no cells or different numbers of them")
            dark = np.array(lines, np.float32)
        else:
            with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as opened:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                dark = 1 - np.asarray(to_eight_bits(ImageOps.exif_transpose(opened), 1), np.float32) / 255
    except Exception as error:
        raise UsageError(f"cannot read the mask {path}: {_reason(error, path)}") from error
    if dark.shape not in (grid, size):
        raise UsageError(
            f"the mask {path} has {dark.shape[0]} x {dark.shape[1]} cells; it needs {grid[0]} x {grid[1]}, one for each"
            f" patch, or {size[0]} x {size[1]}, one for each pixel"
        )
    cells = dark.reshape(grid[0], dark.shape[0] // grid[0], grid[1], dark.shape[1] // grid[1]).mean(axis=(1, 3))
    mask = torch.from_numpy((cells > 0.5).astype(np.float32)).flatten()
    if not 0 < int(mask.sum()) < len(mask):
        raise UsageError(f"the mask {path} hides {'every patch' if mask.any() else 'no patch'}")
    return mask


def _read_header(path: Path) -> _Header:
    with Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        # A PNG's EXIF data may follow the pixels, and looking for it would decode them here.
        if image.format != "PNG" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # on its side
            width, height = height, width
        return _Header(height, width, image.mode, getattr(image, "is_animated", False))


def _default_size(headers: list[_Header]) -> tuple[int, int]:
    sizes = {(header.height, header.width) for header in headers}
    if len(sizes) == 1 and max(height_width := sizes.pop()) <= 64:
        return height_width
    side = min(224, int(median(min(header.height, header.width) for header in headers)))
    side = max(16, side // 16 * 16)
    return side, side


def _decode(path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """The image as uint8 (channels, *size), upright, covering `size` and cropped around its centre."""
    with Image.open(path, formats=_FORMATS) as opened:
        image = to_eight_bits(ImageOps.exif_transpose(opened), channels)
    if image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)  # (H, W) or (H, W, C)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """`image` of any mode as "L" (1 channel) or "RGB" (3): 16-bit grey scaled to 8 bits, transparency put on white."""
    if image.mode.startswith("I"):  # 16-bit grey: 65535 / 257 = 255
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _available_memory() -> int:
    """Bytes that can be had without swapping; all of the memory where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _md5(array: np.ndarray) -> str:
    return hashlib.md5(np.ascontiguousarray(array).data, usedforsecurity=False).hexdigest()
