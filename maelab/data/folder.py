"""Images of the user's own: `folder:PATH`.

The layouts are those of `maelab.data.layout`, the formats those of `maelab.data.decode`. Whatever cannot be decoded is
named, skipped and counted.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import NamedTuple, cast

import numpy as np
import torch

from maelab.config import AS_IT_IS, Reading, ValueRange
from maelab.data.cache import cached_keys, read_cached
from maelab.data.decode import (
    RANGE_IMAGES,
    RANGE_PERCENTILES,
    Header,
    decode_each,
    each,
    find_value_range,
    header_of,
    read_header,
    read_numbers,
)
from maelab.data.faults import describe_counts, describe_cropping, describe_ignored, describe_pictures
from maelab.data.layout import (
    SUFFIXES,
    File,
    Parts,
    describe_copies,
    fingerprint_of,
    list_files,
    share_out,
    walk,
)
from maelab.data.sets import Dataset, ImageSet, UnreadImages, read_mapped
from maelab.data.shards import found_in, listing_of, load_shards, sharded
from maelab.data.splits import content_key, key_of, list_of_images
from maelab.data.table import FOUND
from maelab.data.unpack import find_root
from maelab.errors import RunError, UsageError
from maelab.progress import say_once, was_said

_MEMORY_SHARE = 0.8  # of what is free may be filled
_MAPPED_ABOVE = 2**29  # bytes of pixels; cutting off a validation part doubles for a moment what lies in memory


@dataclass(frozen=True)
class Found:
    """What a look at the headers of a folder's images says.

    Args:
        classes: class name -> its images, those for testing and their copies left out; {} without classes.
        unlabelled: images without a class, copies of those for testing left out.
        val: images for validation, where the folder says so.
        test: images for testing.
        held_out: whether they are held out by their content, because the folder has no test/.
        side: median shorter side of all images, in pixels.
        smallest, largest: (height, width) of the images with the fewest and the most pixels.
        modes: Pillow's name of the pixel format -> images.
        animated: images of several frames or pages, of which the first is used.
        broken: those without a readable header, each "PATH (reason)"; broken pixels show only on decoding.
        ignored: suffix -> files that are not looked at.
        notes: what else a person should know of the layout.
        fingerprint: of the names, sizes and times of change of all image files.
        channels: that the images have for a model.
        dangling: links to images that are not there.
    """

    classes: dict[str, int]
    unlabelled: int
    val: int
    test: int
    held_out: bool
    side: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    modes: dict[str, int]
    animated: int
    broken: tuple[str, ...]
    ignored: dict[str, int]
    notes: tuple[str, ...]
    fingerprint: str
    channels: int = 3
    dangling: int = 0

    @property
    def labelled(self) -> int:
        """Images to learn classes from."""
        return sum(self.classes.values())

    @property
    def grey(self) -> bool:
        """Whether no image has colours."""
        return self.channels == 1

    def lines(self) -> list[str]:
        """The same for people."""
        (a, b), (c, d) = self.smallest, self.largest
        modes = ", ".join(f"{count} {mode}" for mode, count in self.modes.items())
        total = self.labelled + self.unlabelled + self.val + self.test
        lines = [f"found {total} images, {a}x{b} to {c}x{d} (height x width)"]
        lines[0] += f", median shorter side {self.side}; {modes}"
        if self.classes:
            shown = [f"{name} {count}" for name, count in list(self.classes.items())[:20]]
            shown += [f"and {len(self.classes) - 20} more"] if len(self.classes) > 20 else []
            kept = f"{self.val} for validation; " if self.val else ""
            kept += f"{self.test} for testing, {'held out by their content' if self.held_out else 'in test/'}"
            lines.append(f"{len(self.classes)} classes: {', '.join(shown)}; {self.unlabelled} unlabelled; {kept}")
        else:
            lines.append("no classes: all images are unlabelled")
        if self.broken:
            named = "; ".join(self.broken[:3]) + ("; ..." if len(self.broken) > 3 else "")
            lines.append(f"unreadable, left out: {len(self.broken)}: {named}")
        if any(" x " in mode for mode in self.modes):
            shown = "channels 1, 2 and 3" if self.channels > 2 else "channel 1"
            said = "channels of an array are on the shorter of its first and last axis, (H, W, C) or (C, H, W)"
            lines.append(f"{said}: {self.channels} channels; pictures show {shown}")
        if self.animated:
            lines.append(f"of several frames or pages, only the first is used: {self.animated}")
        lines += describe_ignored(self.ignored, total + len(self.broken))
        if self.dangling:
            lines.append(f"links that lead nowhere: {self.dangling}")
        lines.extend(self.notes)
        return lines


class Examined(NamedTuple):
    """The images of a folder whose headers can be read, and their headers and keys; the rest as `Listing`."""

    root: Path
    files: list[File]
    headers: list[Header]
    keys: list[bytes]
    class_names: tuple[str, ...]
    given: bool
    notes: tuple[str, ...]
    fingerprint: str
    broken: list[str]


def scan(spec: str, reading: Reading = AS_IT_IS) -> Found:
    """Look at the images of "folder:PATH" without decoding them: their headers, and the bytes for the keys.

    Raises: UsageError (no such folder, no images, unclear layout).
    """
    if (root := sharded(spec)) is not None:
        return Found(**found_in(root, reading))
    examined = examine(spec, reading)
    for line in examined.notes:  # whoever asked says them
        was_said(line, spec)
    return found_of(examined, reading)


def examine(spec: str, reading: Reading, whole: bool = False) -> Examined:
    """Read headers and keys of a folder's images, or, with `whole`, all of each. Raises UsageError as `scan`."""
    root = find_root(spec)
    files, class_names, given, notes = list_files(root, reading)
    fingerprint = fingerprint_of(files, root)
    known = cached_keys(files, root, fingerprint)
    broken: list[str] = []

    def look(path: Path) -> tuple[Header, bytes]:
        if not whole:
            return read_header(path), known.get(path) or content_key(path)
        content = path.read_bytes()
        read_numbers(BytesIO(content))
        return header_of(BytesIO(content)), key_of(content)

    pairs = list(each(look, files, root, broken, "reading images" if whole else "looking at images"))
    if not pairs:
        raise UsageError(f"none of the images in {root} can be decoded, for example {broken[0]}")
    files, headers, keys = zip(*((file, header, key) for file, (header, key) in pairs), strict=True)
    fields = list(files), list(headers), list(keys), class_names, given, notes, fingerprint, broken
    return Examined(root, *fields)


def found_of(examined: Examined, reading: Reading) -> Found:
    """What a look at a folder's images says, for people and for plans."""
    root, files, headers, keys, class_names, given, notes, fingerprint, broken = examined
    parts = share_out(files, keys, class_names, given)
    dangling: list[Path] = []
    tables = (*FOUND, reading.labels or "")  # the latter with a column behind it
    others = (path for path in walk(root, dangling) if path.suffix.lower() not in SUFFIXES)
    others = (path for path in others if not any(path.name in table for table in tables))
    ignored = Counter(path.suffix.lower() for path in others)
    count = Counter(parts.labels[~parts.val & ~parts.test & ~parts.left_out].tolist())
    by_area = sorted(headers, key=lambda header: header.height * header.width)
    return Found(
        classes={name: count[label] for label, name in enumerate(class_names)},
        unlabelled=count[-1],
        val=int(parts.val.sum()),
        test=int(parts.test.sum()),
        held_out=bool(class_names) and not given,
        side=int(median(min(header.height, header.width) for header in headers)),
        smallest=(by_area[0].height, by_area[0].width),
        largest=(by_area[-1].height, by_area[-1].width),
        modes=dict(Counter(header.mode for header in headers).most_common()),
        animated=sum(header.animated for header in headers),
        broken=tuple(sorted(broken)),
        ignored=dict(ignored.most_common()),
        notes=notes,
        fingerprint=fingerprint,
        channels=channels_of(headers),
        dangling=len(dangling),
    )


def load_folder(
    spec: str,
    *,
    img_size: tuple[int, int] | None = None,
    in_chans: int | None = None,
    reading: Reading = AS_IT_IS,
    faults: bool = True,
) -> Dataset:
    """Load the images of "folder:PATH" into memory; the layouts are those of `maelab.data.layout`.

    More than half a gigabyte is decoded once into a file in the cache, and read from there a batch at a time; shards
    are decoded a batch at a time, in each epoch anew.

    Args:
        spec: "folder:PATH".
        img_size: (height, width) of the result. Each image is scaled, antialiased, until it covers this size, and
            cropped around its centre, unless `reading` says otherwise. Default: the size of the images if all have the
            same and no side exceeds 64; otherwise a square of the median shorter side, at most 224, rounded down to a
            multiple of 16 (at least 16).
        in_chans: channels. Default: those of most arrays that have neither 1 nor 3; without such, 1 if every image is
            stored as greyscale, otherwise 3.
        reading: how files become images and labels; a range of values that it lacks is found.
        faults: look for what ruins training: see `maelab.data.faults`.
    Raises: UsageError (no such folder, no images, unclear layout, a class without a decodable image), RunError (more
        than fits into memory).
    """
    if img_size is not None and min(img_size) < 1:
        raise UsageError(f"--img-size is {img_size[0]} x {img_size[1]}; both sides must be at least 1")
    if (root := sharded(spec)) is not None:
        return load_shards(root, spec, img_size, in_chans, reading)
    root = find_root(spec)
    listed, class_names, given, notes = list_files(root, reading)
    skipped: list[str] = []
    headers = list(each(read_header, listed, root, skipped, "looking at images"))
    if not headers:
        raise UsageError(f"none of the images in {root} can be decoded, for example {skipped[0]}")
    files = [file for file, _ in headers]
    height, width = img_size or default_size([header for _, header in headers])
    channels = in_chans or channels_of([header for _, header in headers])
    if reading.value_range is None:
        reading = replace(reading, value_range=range_of(headers, class_names, given, channels, root))
    needed, free = len(files) * channels * height * width, _available_memory()
    if mapped := needed > _MAPPED_ABOVE:
        images, kept, keys, image_md5 = read_cached(listed, files, root, (channels, height, width), reading, skipped)
    else:
        if needed > _MEMORY_SHARE * free:
            raise RunError(
                f"{len(files)} images of {height} x {width} x {channels} in {root} need {needed / 2**30:.1f} GiB of "
                f"memory and {free / 2**30:.1f} GiB are free; choose a smaller --img-size or fewer images"
            )
        images = np.empty((len(files), channels, height, width), np.uint8)
        kept, keys = [], []
        for file, (pixels, key) in decode_each(files, (height, width), channels, reading, root, skipped):
            images[len(kept)] = pixels
            kept.append(file)
            keys.append(key)
        images = images[: len(kept)]
        image_md5 = _md5(images)
    skipped.sort()
    if not kept:
        raise UsageError(f"none of the images in {root} can be decoded, for example {skipped[0]}")
    parts = share_out(kept, keys, class_names, given)
    for line in (*notes, *describe_copies(parts, kept, root)):
        say_once(line, spec)
    found: list[str] = []
    if faults:
        found += [*_describe_range(reading), *describe_counts(parts, class_names)]
        if reading.resize == "crop":
            found += describe_cropping([(header.height, header.width) for _, header in headers], (height, width))
        found += _look_at(images, parts, kept, root, image_md5)
    train = ~parts.val & ~parts.test & ~parts.left_out
    for label, class_name in enumerate(class_names):
        if not bool((train & (parts.labels == label)).any()):
            raise UsageError(f"class {class_name!r} in {root} has no good training image; every class needs two")
    if skipped:
        named = "; ".join(skipped[:5]) + (f"; and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        said = f"maelab: skipped {len(skipped)} of {len(skipped) + len(kept)} images: {named}"
        say_once(said.removeprefix("maelab: "), spec)
    checksums = {"images": image_md5, "files": _md5(parts.keys.numpy())}
    if class_names:
        checksums["labels"] = _md5(parts.labels.numpy())
    if parts.val.any():  # said by the folder, and so no share of the training images
        checksums["validation"] = _md5(parts.keys[parts.val].numpy())

    def part(chosen: torch.Tensor) -> ImageSet | None:
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            return None
        if mapped:
            pixels = cast(torch.Tensor, UnreadImages(read_mapped(cast(np.memmap, images)), images.shape[1:], rows))
        else:
            pixels = torch.from_numpy(images)[rows]
        return ImageSet(pixels, parts.labels[rows] if class_names else None, parts.keys[rows], parts.groups[rows])

    labelled = (parts.labels >= 0) | (not class_names)
    training = part(train & labelled)
    if training is None:
        raise UsageError(f"every image in {root / 'train'} is also in {root / 'test'}; none is left to train on")
    listing = list_of_images(zip((file.path.relative_to(root) for file in kept), keys, strict=True))
    val, test, unlabelled = part(parts.val), part(parts.test), part(train & ~labelled)
    held_out = bool(class_names) and not given
    return Dataset(
        spec, training, test, class_names, checksums, tuple(skipped), unlabelled, listing, held_out, val, reading,
        tuple(found),
    )  # fmt: skip


_looked: dict[str, tuple[str, ...]] = {}  # MD5 of a folder's images and parts -> what was said of them


def _look_at(images: np.ndarray, parts: Parts, files: list[File], root: Path, md5: str) -> tuple[str, ...]:
    """`describe_pictures`, once in a process: `maelab fit` loads its images for each of its runs."""
    key = md5 + _md5(torch.stack([parts.test, parts.val, parts.left_out]).numpy())
    if key not in _looked:
        _looked[key] = tuple(describe_pictures(images, parts, files, root))
    return _looked[key]


def list_folder(spec: str, reading: Reading = AS_IT_IS) -> bytes:
    """What `Dataset.listing` would be, without decoding; broken images are in it too. Raises UsageError."""
    if (root := sharded(spec)) is not None:
        return listing_of(root)
    root = find_root(spec)
    files = list_files(root, reading).files
    return list_of_images((file.path.relative_to(root), content_key(file.path)) for file in files)


def channels_of(headers: list[Header]) -> int:
    """Of the model: those of arrays, if there are any with neither 1 nor 3, else 1 for grey images and 3 for others."""
    counts = Counter(header.channels for header in headers)
    many = [channels for channels, _ in counts.most_common() if channels not in (1, 3)]
    return many[0] if many else max(counts)


def range_of(
    headers: list[tuple[File, Header]], class_names: tuple[str, ...], given: bool, channels: int, root: Path
) -> ValueRange | None:
    """The range of the images that have more than 8 bits; None if no image has. Those for testing have no say."""
    deep = {file for file, header in headers if header.deep}
    if not deep:
        return None
    read = each(content_key, [file for file, _ in headers], root, [], "reading images")
    files, keys = map(list, zip(*read, strict=True))
    parts = share_out(files, keys, class_names, given)
    train = (~parts.val & ~parts.test & ~parts.left_out).tolist()
    asked = [file for file, known in zip(files, train, strict=True) if known and file in deep] or [*deep]
    return find_value_range(asked[:: -(-len(asked) // RANGE_IMAGES)], channels, root)


def _describe_range(reading: Reading) -> list[str]:
    if not reading.value_range:
        return []
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in reading.value_range)
    of = "each channel" if len(reading.value_range) > 1 else "all images"
    low, high = RANGE_PERCENTILES
    return [
        f"numbers of more than 8 bits become 0 to 255 by one range of {of}, which the model keeps: {ranges}"
        f" (percentiles {low:g} and {high:g} of training images)"
    ]


def default_size(headers: list[Header]) -> tuple[int, int]:
    sizes = {(header.height, header.width) for header in headers}
    if len(sizes) == 1 and max(height_width := sizes.pop()) <= 64:
        return height_width
    side = min(224, int(median(min(header.height, header.width) for header in headers)))
    side = max(16, side // 16 * 16)
    return side, side


def _available_memory() -> int:
    """Bytes that can be had without swapping; all of the memory where the system does not say, and no limit where it
    says nothing (Windows)."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize


def _md5(array: np.ndarray) -> str:
    return hashlib.md5(np.ascontiguousarray(array).data, usedforsecurity=False).hexdigest()
