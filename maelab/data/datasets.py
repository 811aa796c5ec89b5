"""Whole data sets in memory as uint8 tensors, and the seeded ways to cut them."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from maelab.config import AS_IT_IS, DataConfig, Reading, ReadingConfig
from maelab.data import formats, sources
from maelab.data.folder import load_folder
from maelab.data.sets import Dataset, ImageSet, UnreadImages
from maelab.data.splits import hold_out
from maelab.data.table import absolute
from maelab.errors import UsageError

_DIGITS = tuple("0123456789")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def reading_of(config: ReadingConfig) -> Reading:
    """How a run reads the files of its folder; the range of values is to be found."""
    labels = None if config.labels is None else absolute(config.labels)
    return Reading(config.resize, labels=labels, group=config.group)


def load(
    spec: str,
    *,
    data_dir: Path | None = None,
    img_size: tuple[int, int] | None = None,
    in_chans: int | None = None,
    reading: Reading = AS_IT_IS,
    faults: bool = True,
) -> Dataset:
    """Load a whole data set into memory, after downloading and verifying it if it must be.

    Args:
        spec: "mnist", "fashion-mnist", "cifar10" or "folder:PATH".
        data_dir: folder that already holds the files of a built-in set (nothing is downloaded then).
        img_size: (height, width) to bring the images to; None keeps a built-in set's own (28 x 28, 32 x 32), or for a
            folder what `maelab.data.folder.load_folder` finds.
        in_chans: channels for the images of a folder; built-in sets keep their own.
        reading: how the files of a folder become images and labels.
        faults: look for what in a folder ruins training, and say it.
    Raises: UsageError (unknown spec, unusable folder), RunError (no source delivered, too large for memory).
    """
    if spec.startswith("folder:"):
        return load_folder(spec, img_size=img_size, in_chans=in_chans, reading=reading, faults=faults)
    if spec not in sources.NAMES:
        raise UsageError(f"there is no data set {spec!r}; {_nearest(spec)}")
    data = _load_built_in(spec, data_dir)
    if img_size is None or img_size == tuple(data.train.images.shape[2:]):
        return data
    assert data.test is not None
    return replace(data, train=_resized(data.train, img_size), test=_resized(data.test, img_size))


def _resized(data: ImageSet, size: tuple[int, int]) -> ImageSet:
    """All images scaled to `size`, bicubic and antialiased; in chunks, since it takes float32 in between."""
    chunks = (F.interpolate(x.float(), size, mode="bicubic", antialias=True) for x in data.images.split(1000))
    return ImageSet(torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in chunks]), data.labels)


def _load_built_in(spec: str, data_dir: Path | None) -> Dataset:
    files = sources.read(spec, data_dir)
    checksums = dict(sources.FILES[spec])
    if spec == "cifar10":
        batches = [file for file in files if file.startswith("data_batch")]
        train = cifar_set([files[file] for file in sorted(batches)])
        return Dataset(spec, train, cifar_set([files["test_batch.bin"]]), _CIFAR10, checksums)
    end = ".gz" if spec == "fashion-mnist" else ""
    train, test = (
        idx_set(files[f"{part}-images-idx3-ubyte{end}"], files[f"{part}-labels-idx1-ubyte{end}"])
        for part in ("train", "t10k")
    )
    return Dataset(spec, train, test, FASHION_CLASSES if spec == "fashion-mnist" else _DIGITS, checksums)


def _nearest(spec: str) -> str:
    if spec and Path(spec).expanduser().exists():
        return f"for images of your own write 'folder:{spec}'"
    near = difflib.get_close_matches(spec.lower().replace("_", "-"), (*sources.NAMES, "folder:"), n=1, cutoff=0.4)
    if near:
        return f"did you mean {'folder:PATH' if near[0] == 'folder:' else near[0]!r}?"
    return f"there are {', '.join(sources.NAMES)} and folder:PATH"


def idx_set(images: bytes, labels: bytes) -> ImageSet:
    """An MNIST-like set from its two IDX files, gzipped or not."""
    pixels = torch.from_numpy(formats.read_idx(images).copy())  # (N, H, W)
    return ImageSet(pixels[:, None], torch.from_numpy(formats.read_idx(labels).astype(np.int64)))


def cifar_set(batches: Sequence[bytes]) -> ImageSet:
    """A CIFAR-10-like set from binary batches."""
    images, labels = zip(*(formats.read_cifar_binary(batch) for batch in batches), strict=True)
    return ImageSet(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels).astype(np.int64)))


def split(data: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Cut a validation part off a training set: disjoint and seeded.

    The images of a folder decide each by its own key and the seed, so that it may grow: `maelab.data.splits.hold_out`.
    Those of other sets are chosen by their positions, class-balanced if there are labels.

    Args:
        fraction: share of the validation part, 0 <= fraction < 1; of a folder about so many, otherwise
            round(fraction * N) images, at least one.
    Returns: (training part, validation part), each in the original order. Fraction 0 gives an empty validation part.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the validation fraction is {fraction}; it must be at least 0 and less than 1")
    if data.groups is not None:
        held = hold_out(data.groups, None if data.labels is None else data.labels.cpu(), fraction, f"validation {seed}")
        return data[(~held).nonzero()[:, 0]], data[held.nonzero()[:, 0]]
    n = len(data)
    order, rank, count = _class_ranks(data.labels, n, seed)
    # Sorted by how far each image is through its own class, every prefix is class-balanced.
    balanced = order[torch.argsort((rank + 0.5) / count, stable=True)]
    k = max(round(n * fraction), 1 if fraction > 0 and n > 1 else 0)
    return data[balanced[k:].sort().values], data[balanced[:k].sort().values]


def limit(data: ImageSet, n: int, seed: int) -> ImageSet:
    """The first `n` images of a seeded shuffle."""
    if not 1 <= n <= len(data):
        raise UsageError(f"--limit {n} is not between 1 and {len(data)}, the number of images to train on")
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n]]


def label_fraction(data: ImageSet, fraction: float, seed: int) -> ImageSet:
    """A seeded share of the images of every class, at least one of each, in the original order.

    Args:
        fraction: 0 < fraction <= 1. For one seed, a smaller share is contained in a larger one.
    """
    if data.labels is None:
        raise UsageError("a label fraction needs labels: put the images into one sub-folder per class")
    if not 0 < fraction <= 1:
        raise UsageError(f"the label fraction is {fraction}; it must be more than 0 and at most 1")
    order, rank, count = _class_ranks(data.labels, len(data), seed)
    return data[order[rank < (count * fraction + 0.5).floor().clamp(min=1)].sort().values]


def _class_ranks(labels: torch.Tensor | None, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A seeded shuffle, int64 (n,), and for each entry its rank within its class and its class's size, (n,)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if labels is None or n == 0:
        return order, torch.arange(n), torch.full((n,), n)
    shuffled = labels.cpu()[order]
    sizes = torch.bincount(shuffled)
    rank = torch.empty(n, dtype=torch.int64)
    by_class = torch.argsort(shuffled, stable=True)
    rank[by_class] = torch.arange(n) - (sizes.cumsum(0) - sizes)[shuffled[by_class]]
    return order, rank, sizes[shuffled]


def whole(data: Dataset) -> ImageSet:
    """All images of a folder whose test part was held out of them, or that has none."""
    own = data.train if data.val is None else _joined(data.train, data.val, None)
    return own if data.test is None else _joined(own, data.test, None)


def _joined(train: ImageSet, more: ImageSet, val: ImageSet | None) -> ImageSet:
    """Both sets in one, without those of `more` that also are in `val`, or of a group there."""
    keys = groups = None
    if val is not None and more.keys is not None and val.keys is not None:
        assert more.groups is not None and val.groups is not None
        near = torch.isin(more.keys, val.keys) | torch.isin(more.groups, val.groups)
        more = more[(~near).nonzero()[:, 0]]
    if train.keys is not None and more.keys is not None:
        keys = torch.cat([train.keys, more.keys])
    if train.groups is not None and more.groups is not None:
        groups = torch.cat([train.groups, more.groups])
    labels = None
    if train.labels is not None and more.labels is not None:
        labels = torch.cat([train.labels, more.labels])
    images: Any = more.images
    if isinstance(train.images, UnreadImages):
        images = train.images.joined(images)
    else:
        images = torch.cat([train.images, images])
    return ImageSet(images, labels, keys, groups)


def training_sets(
    data: Dataset, config: DataConfig, fraction: float = 1.0, unlabelled: bool = False
) -> tuple[ImageSet, ImageSet]:
    """The training and validation parts that a run's config asks for.

    Args:
        data: the whole data set.
        config: val_fraction (where the data has no validation part of its own), split_seed and limit are read.
        fraction: share of the training labels to keep, class-balanced.
        unlabelled: train on the unlabelled images as well, apart from copies of validation images; their label is -1.
    """
    train, val = (data.train, data.val) if data.val else split(data.train, config.val_fraction, config.split_seed)
    if fraction < 1:
        train = label_fraction(train, fraction, config.split_seed)
    if unlabelled and data.unlabelled is not None:
        train = _joined(train, data.unlabelled, val)
    if config.limit is not None:
        train = limit(train, config.limit, config.split_seed)
    if not len(train) or not len(val):
        raise UsageError(f"{data.name} has too few images ({len(data.train)}) for --val-fraction {config.val_fraction}")
    return train, val
