"""What in a folder of images ruins results without being an error, for people: one line for each kind of fault."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from maelab.data.layout import HEIF_SUFFIXES, File, Parts

FEW_TEST = 30  # test images, below which nothing can be said of a model
HINTS = {  # what to do with files of other kinds
    **dict.fromkeys(HEIF_SUFFIXES, "pip install 'maelab[heif]'"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"), "unpack them, or give one to maelab by itself"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv"), "take images out of them, and keep a video together by --group"),
    **dict.fromkeys((".dcm", ".nii", ".czi", ".nd2", ".lif", ".svs", ".cr2", ".nef"), "save them as TIFF or .npy"),
}  # fmt: skip
UNEVEN = 3  # times as many images in one class as in another
_DARK = 16  # the brightest value of an image that shows next to nothing
_CUT = 0.1  # share of an image
_THUMB = 16  # side, pixels
ALIKE = 0.997  # correlation of near-copies
_FLAT = 8.0  # deviation of a thumbnail that looks like any other
_PAIRS = 2 * 10**8  # of images that are compared: a second or two
_CHUNK = 512


def describe_ignored(ignored: dict[str, int], images: int) -> list[str]:
    """Files that are no images here, loudly if they are over a tenth of all.

    Args:
        ignored: suffix -> files.
        images: files that are.
    """
    if not ignored:
        return []
    named = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.items())
    lines = [f"other files, ignored: {named}"]
    total = images + sum(ignored.values())
    if sum(ignored.values()) > total / 10:
        lines[0] = f"LOOK: {sum(ignored.values())} of {total} files are no images here and are ignored: {named}"
    for suffix, count in ignored.items():
        if suffix in HINTS:
            loud = "LOOK: " if count > total / 10 else ""
            lines.append(f"{loud}{count} of {total} files are {suffix}: {HINTS[suffix]}")
    return lines


def describe_counts(parts: Parts, class_names: tuple[str, ...]) -> list[str]:
    """Uneven classes, and too few images to judge by."""
    if not class_names:
        return []
    lines = []
    train = parts.labels[~parts.val & ~parts.test & ~parts.left_out]
    count = train[train >= 0].bincount(minlength=len(class_names))
    if count.min() and count.max() >= UNEVEN * count.min():
        most, least = int(count.argmax()), int(count.argmin())
        lines.append(
            f"classes are uneven: {class_names[most]} has {int(count.max())} training images and {class_names[least]}"
            f" {int(count.min())}; --class-weights balanced makes each class count alike"
        )
    if 0 < (n := int(parts.test.sum())) < FEW_TEST:
        lines.append(f"only {n} test images: {FEW_TEST} are the least to say how good a model is, and 300 are better")
    return lines


def describe_cropping(sizes: list[tuple[int, int]], size: tuple[int, int]) -> list[str]:
    """What is cut off images of these sizes (height, width), where they are scaled until they cover `size`."""
    height, width = np.array(sizes, np.float64).T
    scale = np.minimum(height / size[0], width / size[1])
    cut = 1 - scale**2 * size[0] * size[1] / (height * width)
    if cut.mean() < _CUT:
        return []
    return [
        f"cropping to {size[0]}x{size[1]} cuts off {cut.mean():.0%} of an image, {cut.max():.0%} at most; --resize pad"
        " or --resize squash shows all of it"
    ]


def describe_pictures(images: np.ndarray, parts: Parts, files: list[File], root: Path) -> list[str]:
    """Images that show next to nothing, and test images that look like training images.

    Args:
        images: uint8 (N, C, H, W).
        parts: what each is for.
        files: where each lies.
        root: the folder.
    """
    thumbs, brightest = [], []
    for chunk in _chunks(images):
        brightest.append(chunk.amax(dim=(1, 2, 3)))
        grey = chunk.float().mean(dim=1, keepdim=True)
        thumbs.append(F.adaptive_avg_pool2d(grey, _THUMB)[:, 0])
    thumbnails = torch.cat(thumbs)  # (N, _THUMB, _THUMB)
    dark = (torch.cat(brightest) < _DARK).nonzero()[:, 0].tolist()
    lines = []
    if dark:
        named = files[dark[0]].path.relative_to(root)
        lines.append(f"nearly black: {len(dark)} of {len(files)} images, for example {named}")
    judges = parts.test | parts.val
    alike = _near_copies(thumbnails, judges, ~judges & ~parts.left_out)
    if alike:
        one, other = (files[i].path.relative_to(root) for i in alike[0])
        what = "test or validation" if parts.val.any() else "test"
        lines.append(
            f"{len(alike)} {what} images look like training images, for example {one} like {other}: a model seems"
            " better than it is; --group keeps images of one scene together"
        )
    return lines


def _chunks(images: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), _CHUNK):
        yield torch.from_numpy(np.array(images[start : start + _CHUNK]))


def _near_copies(thumbnails: torch.Tensor, judges: torch.Tensor, train: torch.Tensor) -> list[tuple[int, int]]:
    """(place of a judging image, place of the training image that looks most like it), where they look the same.

    They do if their thumbnails correlate by over ALIKE: of MNIST's 10,000 test images one does, of CIFAR-10's three; of
    CIFAR-10's images enlarged, shrunk back and encoded as JPEG of quality 90 with their originals 95 % (docs/log.md).
    """
    clear = thumbnails.flatten(1).std(dim=1) > _FLAT
    asked, known = (judges & clear).nonzero()[:, 0], (train & clear).nonzero()[:, 0]
    if not len(asked) or not len(known):
        return []
    asked = asked[:: -(-len(asked) * len(known) // _PAIRS)]  # of very many images some
    flat = thumbnails.flatten(1) - thumbnails.flatten(1).mean(dim=1, keepdim=True)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-6)
    found = []
    for some in asked.split(_CHUNK):
        best = (flat[some] @ flat[known].T).max(dim=1)
        near = best.values > ALIKE
        found += list(zip(some[near].tolist(), known[best.indices[near]].tolist(), strict=True))
    return found
