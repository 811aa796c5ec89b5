"""Shards: the images of a folder in a few large files, read a batch at a time while a model trains.

The files are WebDataset's: tar archives with NUMBER.png beside NUMBER.cls. An index says of each image where it lies,
what it is for, and what its bytes hash to. So a batch is read by the positions of its images, as from memory: the order
is the same seeded permutation of all images, every image comes once in an epoch over all processes, and training goes
on at any step. WebDataset's own reader goes through a shard from its beginning and shuffles what is near, and LitData
unpickles what an index tells it to (docs/log.md).
"""

import hashlib
import io
import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import torch
from safetensors.numpy import save

from maelab.config import Reading
from maelab.data.decode import careful, decode_file
from maelab.data.faults import describe_counts
from maelab.data.layout import Parts, share
from maelab.data.sets import Dataset, ImageSet, UnreadImages
from maelab.data.splits import KEY_BYTES, key_of
from maelab.errors import RunError, UsageError
from maelab.files import parse_json
from maelab.progress import say_once

INDEX = "shards.safetensors"
PARTS = ("train", "val", "test")
COLUMNS: dict[str, type] = {  # one entry for each image
    "shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int64, "part": np.int8, "key": np.int64,
    "group": np.int64, "path": np.int64,
}  # fmt: skip
NAME = re.compile(rf"({'|'.join(PARTS)})-[0-9]{{6}}\.tar")
_THREADS = os.cpu_count() or 1
_LARGEST = 2**28  # bytes of an image
_COUNTED, _LINES, _SIZES = ("classes", "modes", "ignored"), ("broken", "notes"), ("smallest", "largest")  # of `Found`


@dataclass(frozen=True)
class Index:
    """What the index of shards says.

    Args:
        columns: name -> (N,), in the order of the folder: shard (its number), offset and size in bytes, label (-1
            without a class), part (its place in PARTS), key (hash of its bytes), group (equal for images that stay
            together), path (hash of its name).
        shards: file name -> bytes.
        class_names: by label.
        given: whether the folder said which images are for testing.
        size, channels, value_range: of the images as a model gets them, where nobody asks for others.
        asked: labels and group that the shards were written with.
        found: what a scan of the folder found.
    """

    columns: dict[str, np.ndarray]
    shards: dict[str, int]
    class_names: tuple[str, ...]
    given: bool
    size: tuple[int, int]
    channels: int
    value_range: tuple[tuple[float, float], ...] | None
    asked: tuple[str | None, str | None]
    found: dict[str, Any]


def sharded(spec: str) -> Path | None:
    """The folder of "folder:PATH", where it holds shards with their index; otherwise None."""
    path = spec.removeprefix("folder:")
    place = Path(path).expanduser()
    return place if path not in (spec, "") and (place / INDEX).is_file() else None


def write_index(folder: Path, index: Index) -> None:
    about = {
        "shards": index.shards, "class_names": index.class_names, "given": index.given, "size": index.size,
        "channels": index.channels, "value_range": index.value_range, "asked": index.asked, "found": index.found,
    }  # fmt: skip
    (folder / INDEX).write_bytes(save(index.columns, metadata={"maelab": json.dumps(about)}))


def read_index(folder: Path) -> Index:
    """The index of shards, checked: it may come from anywhere.

    Raises:
        UsageError: if it is none.
    """
    wrong = safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError
    try:
        with safetensors.safe_open(folder / INDEX, "numpy") as file:
            columns = {name: file.get_tensor(name) for name in COLUMNS}
            about = parse_json((file.metadata() or {})["maelab"])
        index = Index(columns, **about)
        _check_about(index)
        _check_columns(index)
        _check_found(index.found)
        (height, width), ranges = index.size, index.value_range
        return replace(
            index, class_names=tuple(index.class_names), size=(height, width), asked=(index.asked[0], index.asked[1]),
            value_range=ranges and tuple((float(low), float(high)) for low, high in ranges),
        )  # fmt: skip
    except wrong as error:
        raise UsageError(f"{folder / INDEX} is no index of shards ({error}); maelab data shard writes one") from error


def _check_about(index: Index) -> None:
    if not all(NAME.fullmatch(name) and type(length) is int for name, length in index.shards.items()):
        raise ValueError("the name or length of a shard")
    if not isinstance(index.class_names, list) or not all(isinstance(name, str) for name in index.class_names):
        raise ValueError("its classes")
    if len(index.size) != 2 or any(type(k) is not int or not 0 < k <= 2**14 for k in (*index.size, index.channels)):
        raise ValueError("its sizes")
    if not all(math.isfinite(number) for limits in index.value_range or () for number in limits):
        raise ValueError("its range of values")
    texts = len(index.asked) == 2 and all(text is None or isinstance(text, str) for text in index.asked)
    if not texts or not isinstance(index.given, bool):
        raise ValueError("how it was written")


def _check_columns(index: Index) -> None:
    columns, n = index.columns, len(index.columns["key"])
    if not n or any(columns[name].shape != (n,) or columns[name].dtype != kind for name, kind in COLUMNS.items()):
        raise ValueError("its columns")
    shard, offset, size = (columns[name].astype(np.int64) for name in ("shard", "offset", "size"))

    def check(what: str, good: np.ndarray) -> None:
        if not good.all():
            raise ValueError(what)

    check("the number of a shard", (shard >= 0) & (shard < len(index.shards)))
    check("a size", (size > 0) & (size <= _LARGEST))
    check("a place", (offset >= 0) & (offset <= np.array([*index.shards.values()], np.int64)[shard] - size))
    check("a label", (columns["label"] >= -1) & (columns["label"] < len(index.class_names)))
    check("a part", (columns["part"] >= 0) & (columns["part"] < len(PARTS)))


def _check_found(found: dict[str, Any]) -> None:
    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**53

    counts = ("unlabelled", "val", "test", "side", "animated", "channels", "dangling")
    good = found.keys() == {*counts, *_COUNTED, *_LINES, *_SIZES, "held_out"} and isinstance(found["held_out"], bool)
    good = good and all(is_count(found[name]) for name in counts)
    good = good and all(isinstance(found[name], dict) and all(map(is_count, found[name].values())) for name in _COUNTED)
    good = good and all(
        isinstance(found[name], list) and all(isinstance(x, str) for x in found[name]) for name in _LINES
    )
    good = good and all(
        isinstance(found[name], list) and [*map(is_count, found[name])] == [True] * 2 for name in _SIZES
    )
    if not good:
        raise ValueError("what a scan found")


def found_in(folder: Path, reading: Reading) -> dict[str, Any]:
    """What a scan found when the shards were written. Raises UsageError, where other labels or groups are asked for."""
    index = read_index(folder)
    _as_written(index, folder, reading)
    found = {name: tuple(value) if name in (*_LINES, *_SIZES) else value for name, value in index.found.items()}
    return found | {"fingerprint": _digest(index.columns["key"], index.columns["label"], index.columns["part"])}


def listing_of(folder: Path) -> bytes:
    """As `maelab.data.splits.list_of_images`, of the files that the shards were written from."""
    return _listing(read_index(folder).columns)


def _listing(columns: dict[str, np.ndarray]) -> bytes:
    entries = np.stack([columns["path"], columns["key"]], axis=1).astype("<i8").view("S16")[:, 0]  # (N,)
    return b"".join(entry.ljust(2 * KEY_BYTES, b"\0") for entry in np.sort(entries).tolist())


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _as_written(index: Index, folder: Path, reading: Reading) -> None:
    for name, asked, written in zip(("labels", "group"), (reading.labels, reading.group), index.asked, strict=True):
        if asked not in (None, written):
            raise UsageError(
                f"{folder} holds shards, written with --{name} {written}: they have their {name} inside, and to change"
                f" them the shards have to be written again"
            )


def load_shards(
    folder: Path, spec: str, img_size: tuple[int, int] | None, in_chans: int | None, reading: Reading
) -> Dataset:
    """The data set in shards, its images unread; see `maelab.data.folder.load_folder`.

    A shard that is missing or has another length is named and left out. An image whose bytes are not those that were
    written is named when it is read, and the next good one of its class and part takes its place.

    Raises:
        UsageError: if the index is damaged, other labels are asked for, or a class has no image left to train on.
    """
    index = read_index(folder)
    _as_written(index, folder, reading)
    columns, class_names = index.columns, index.class_names
    reading = replace(reading, value_range=reading.value_range or index.value_range)
    here = np.array([_is_whole(folder / name, length) for name, length in index.shards.items()])
    for name, whole in zip(index.shards, here.tolist(), strict=True):
        if not whole:
            say_once(
                f"{folder / name} is missing or has another length than was written; its images are left out", spec
            )
    columns = {name: column[here[columns["shard"]]] for name, column in columns.items()}
    if not len(columns["key"]):
        raise UsageError(f"no shard in {folder} is whole")

    key, group, label = (torch.from_numpy(columns[name]) for name in ("key", "group", "label"))
    of_part = torch.from_numpy(columns["part"])
    parts = share(key, group, label, of_part == 1, of_part == 2, hold=bool(class_names) and not index.given)
    shape = (in_chans or index.channels, *(img_size or index.size))
    read = _Reader(folder, spec, tuple(index.shards), columns, parts, shape, reading)

    def part(chosen: torch.Tensor) -> ImageSet | None:
        rows = chosen.nonzero()[:, 0]
        images = cast(torch.Tensor, UnreadImages(read, shape, rows))
        return ImageSet(images, label[rows] if class_names else None, key[rows], group[rows]) if len(rows) else None

    train = ~parts.val & ~parts.test & ~parts.left_out
    for number, class_name in enumerate(class_names):
        if not bool((train & (label == number)).any()):
            raise UsageError(f"class {class_name!r} in {folder} has no good training image; every class needs two")
    labelled = (label >= 0) | (not class_names)
    training = part(train & labelled)
    if training is None:
        raise UsageError(f"no image in {folder} is left to train on")
    checksums = {"images": _digest(columns["key"], np.array(shape)), "files": _digest(columns["key"])}
    if class_names:
        checksums["labels"] = _digest(columns["label"])
    if parts.val.any():
        checksums["validation"] = _digest(columns["key"][parts.val.numpy()])
    return Dataset(
        spec, training, part(parts.test), class_names, checksums, (), part(train & ~labelled), _listing(columns),
        bool(class_names) and not index.given, part(parts.val), reading, tuple(describe_counts(parts, class_names)),
    )  # fmt: skip


def _is_whole(file: Path, length: int) -> bool:
    return file.is_file() and file.stat().st_size == length


class _Reader:
    """Rows of the index -> their images, uint8 (n, C, H, W); see `load_shards`."""

    def __init__(
        self,
        folder: Path,
        spec: str,
        names: tuple[str, ...],
        columns: dict[str, np.ndarray],
        parts: Parts,
        shape: tuple[int, int, int],
        reading: Reading,
    ) -> None:
        self._folder, self._spec, self._names, self._columns = folder, spec, names, columns
        self._parts, self._shape, self._reading = parts, shape, reading
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(_THREADS)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self._shape), np.uint8)
        pieces = np.array_split(np.arange(len(rows)), min(len(rows), 2 * _THREADS) or 1)

        def fill(piece: np.ndarray) -> None:
            for place in piece.tolist():
                images[place] = self._image(int(rows[place]))

        with self._lock, careful():  # the filters of warnings are everyone's
            list(self._pool.map(fill, pieces))
        return images

    def _image(self, row: int) -> np.ndarray:
        image = self._whole(row)
        if image is not None:
            return image
        file = self._folder / self._names[self._columns["shard"][row]]
        say_once(
            f"{file} is damaged: images in it are not what was written; the next good one of the same class takes the"
            " place of each",
            self._spec,
        )
        for other in self._alike(row):
            image = self._whole(int(other))
            if image is not None:
                return image
        raise RunError(f"{file} is damaged, and no image of the same class can be read; write the shards again")

    def _whole(self, row: int) -> np.ndarray | None:
        """The image, or None if its bytes are not those that were written."""
        shard, offset, size, key = (int(self._columns[name][row]) for name in ("shard", "offset", "size", "key"))
        try:
            with open(self._folder / self._names[shard], "rb", buffering=0) as file:
                file.seek(offset)
                content = file.read(size)
            if key_of(content) != key.to_bytes(KEY_BYTES, "little", signed=True):
                return None
            channels, height, width = self._shape
            return decode_file(io.BytesIO(content), (height, width), channels, self._reading)
        except Exception:  # decoders raise anything, and another version of one may read less
            return None

    def _alike(self, row: int) -> np.ndarray:
        """Rows of the same class and part, the one behind `row` first."""
        label, parts = self._columns["label"], self._parts
        same = label == label[row]
        for part in (parts.val, parts.test, parts.left_out):
            same &= part.numpy() == bool(part[row])
        rows = same.nonzero()[0]
        return np.roll(rows[rows != row], -int(np.searchsorted(rows, row)))
