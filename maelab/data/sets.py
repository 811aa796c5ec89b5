"""Images with their labels, in memory or in a file, and the data set that they make up."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from maelab.config import AS_IT_IS, Reading

_EXPECTED = 16  # batches at most that are read before they are asked for


class UnreadImages:
    """Images that stay where they are, in the place of a tensor (N, C, H, W): indexing reads what it names.

    Args:
        read: int64 (n,), rows -> uint8 (n, C, H, W), which the caller may write to.
        shape: (C, H, W).
        rows: int64 (N,), which images these are.
        device: where what is read goes.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...],
        rows: torch.Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        self._read, self._shape, self._rows, self.device = read, shape, rows, torch.device(device)
        self._pool: ThreadPoolExecutor | None = None
        self._expected: dict[bytes, Future[np.ndarray]] = {}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._rows), *self._shape))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        rows = self._at(index).numpy()
        expected = self._expected.pop(rows.tobytes(), None)
        return torch.from_numpy(self._read(rows) if expected is None else expected.result()).to(self.device)

    def expect(self, index: torch.Tensor) -> None:
        """Begin to read what `self[index]` will ask for soon, in a thread."""
        self._pool = self._pool or ThreadPoolExecutor(1)
        rows = self._at(index).numpy()
        while len(self._expected) >= _EXPECTED:  # nobody asked for the oldest
            self._expected.pop(next(iter(self._expected))).cancel()
        if (key := rows.tobytes()) not in self._expected:
            self._expected[key] = self._pool.submit(self._read, rows)

    def _at(self, index: torch.Tensor | slice) -> torch.Tensor:
        return self._rows[index if isinstance(index, slice) else index.cpu()]

    def subset(self, index: torch.Tensor | slice) -> UnreadImages:
        """Those at `index`, unread."""
        return UnreadImages(self._read, self._shape, self._at(index), self.device)

    def joined(self, other: UnreadImages) -> UnreadImages:
        """These and others that lie in the same place, unread."""
        return UnreadImages(self._read, self._shape, torch.cat([self._rows, other._rows]), self.device)

    def to(self, device: torch.device | str) -> UnreadImages:
        return UnreadImages(self._read, self._shape, self._rows, device)


def read_mapped(file: np.memmap) -> Callable[[np.ndarray], np.ndarray]:
    """Reads rows of a memory-mapped file, for `UnreadImages`."""

    def read(rows: np.ndarray) -> np.ndarray:
        images = np.asarray(file[rows])  # a list of rows is a copy
        with contextlib.suppress(AttributeError, OSError):  # pages stay in the system's cache, but are no longer ours
            file._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        return images

    return read


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels.

    Args:
        images: uint8 (N, C, H, W), contiguous; `UnreadImages` where they are too large for memory: `images[:]` is a
            tensor in either case.
        labels: int64 (N,), or None where there are no labels.
        keys: int64 (N,), on the CPU: equal for equal files of a folder (see `maelab.data.splits`); None in a set that
            never changes.
        groups: int64 (N,), on the CPU: equal for images of a folder that stay on one side of a split.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    keys: torch.Tensor | None = None
    groups: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        labels = "without labels" if self.labels is None else "labelled"
        return f"ImageSet({len(self)} images of {' x '.join(map(str, self.images.shape[1:]))}, {labels})"

    def __getitem__(self, index: torch.Tensor) -> ImageSet:
        """The subset at the positions `index`, int64 (n,), in that order."""
        images: Any = self.images.subset(index) if isinstance(self.images, UnreadImages) else self.images[index]
        keys, groups = (None if rows is None else rows[index.cpu()] for rows in (self.keys, self.groups))
        return ImageSet(images, None if self.labels is None else self.labels[index], keys, groups)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return ImageSet(self.images.to(device), labels, self.keys, self.groups)


@dataclass(frozen=True)
class Dataset:
    """A data set with its test part.

    Args:
        name: the spec it was loaded by: "mnist", "fashion-mnist", "cifar10" or "folder:PATH".
        train: all training images; where there is no `val`, a validation part is cut from it with `split`.
        test: None for a folder without classes.
        class_names: by label; () without labels.
        checksums: file or array name -> MD5.
        skipped: images that could not be decoded, each "PATH (reason)".
        unlabelled: training images without a class, beside those with one; only pretraining takes them.
        listing: the files of a folder, 16 bytes each, for `maelab.data.compare_images`; empty for a built-in set.
        held_out: whether the test part was held out of the training images, because the folder has no test/.
        val: the validation part, where the folder itself has one.
        reading: how the files of a folder became these images, with the range of values that was found.
        faults: what in a folder ruins training, each in a line; see `maelab.data.faults`.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]
    checksums: dict[str, str]
    skipped: tuple[str, ...] = ()
    unlabelled: ImageSet | None = None
    listing: bytes = b""
    held_out: bool = False
    val: ImageSet | None = None
    reading: Reading = AS_IT_IS
    faults: tuple[str, ...] = ()

    def __repr__(self) -> str:
        parts = {"train": self.train, "unlabelled": self.unlabelled, "val": self.val, "test": self.test}
        said = "".join(f", {name}={part}" for name, part in parts.items() if part is not None)
        return f"Dataset({self.name!r}{said}, {len(self.class_names)} classes)"
