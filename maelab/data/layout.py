"""What a folder of images means: which files are images, what their classes are, and what each is for.

One sub-folder per class; `train/`, `test/` and `val/`, each with one sub-folder per class; or images without classes
directly in the folder. Parts may be written otherwise (`Training`, `valid`, `Testing`). Beside classes, a sub-folder
`unlabelled/` holds images without a class. Without `test/`, about a tenth of the training images with a class is held
out as the test part, each by what its file holds, whatever lies beside it (see `maelab.data.splits`). Training leaves
out copies of test and validation images, and validation those of test images. Hidden files and what systems leave
behind are passed over, at every depth. A layout that may be meant otherwise is refused, with the command that is right.
"""

import hashlib
import importlib.util
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from maelab.data.splits import hold_out
from maelab.errors import UsageError

HEIF = importlib.util.find_spec("pillow_heif") is not None
HEIF_SUFFIXES = (".heic", ".heif")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".npy")
SUFFIXES += HEIF_SUFFIXES * HEIF
_TEST_FRACTION = 0.1
_UNLABELLED = ("unlabelled", "unlabeled")
Part = Literal["train", "val", "test"]
_PARTS: dict[str, Part] = {  # how a part's folder may be called, in any case
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_LEFT_BEHIND = ("__macosx", "$recycle.bin", "@eadir")  # by macOS, Windows and Synology


class File(NamedTuple):
    """An image of a folder."""

    path: Path
    label: int  # -1 without a class
    part: Part


class Listing(NamedTuple):
    """What a folder holds.

    Args:
        files: sorted by part, class and name.
        class_names: by label; () without classes.
        given: whether the folder itself says which images are for testing.
        notes: what a person should know of it, each in a line.
    """

    files: list[File]
    class_names: tuple[str, ...]
    given: bool
    notes: tuple[str, ...] = ()


def find_root(spec: str) -> Path:
    """PATH of "folder:PATH"."""
    if not spec.startswith("folder:"):
        raise UsageError(f"--data {spec} is no folder of images; write --data folder:PATH")
    if not (path := spec.removeprefix("folder:")):
        raise UsageError("'folder:' names no folder; write folder:PATH")
    return Path(path).expanduser()


def list_files(root: Path) -> Listing:
    """The images of a folder, their classes, and what they are for. Raises UsageError for an unclear layout."""
    if not root.exists():
        raise UsageError(f"there is no folder {root}")
    if not root.is_dir():
        raise UsageError(f"{root} is a file; folder:PATH takes a folder of images")
    subs = _sub_folders(root) if not list_images(root, deep=False) else []
    without = [sub for sub in subs if sub.name in _UNLABELLED]
    more = [File(path, -1, "train") for sub in without for path in list_images(sub)]
    others = [sub for sub in subs if sub.name not in _UNLABELLED and _has_images(sub)]
    if more and not others:
        return Listing(more, (), False)
    parts: dict[str, Path] = {}
    for sub in others:
        if (part := _PARTS.get(sub.name.casefold())) and parts.setdefault(part, sub) != sub:
            raise UsageError(f"{root} holds {parts[part].name}/ and {sub.name}/: leave only one of them there")
    if parts and "train" not in parts and len(parts) == len(others) > 1:
        raise UsageError(f"{root} holds {' and '.join(f'{sub.name}/' for sub in others)}, and no train/ beside them")
    divided = "train" in parts and any(map(_has_images, _sub_folders(parts["train"])))
    if "train" not in parts or (len(parts) == 1 < len(others) and not divided):  # a class may be called test, or train
        classes, notes = _list_classes(root)
        names = tuple(name for name in classes if name)
        files = [File(path, k if names else -1, "train") for k, name in enumerate(classes) for path in classes[name]]
        return Listing(files + more, names, False, notes)
    if len(others) == 1:
        raise UsageError(
            f"{root} holds {parts['train'].name}/ alone: use folder:{parts['train']}, or put test/ or val/ beside it"
        )
    if extra := [sub.name for sub in others if sub not in parts.values()]:
        raise UsageError(
            f"{root} holds {', '.join(f'{sub.name}/' for sub in parts.values())} and also {extra[0]}/ with images;"
            f" move {extra[0]}/ elsewhere, or use folder:{parts['train']}"
        )
    classes, notes = _list_classes(parts["train"])
    names = tuple(name for name in classes if name)
    files = []
    for part in dict.fromkeys(_PARTS.values()):
        if part not in parts:
            continue
        own, said = _list_classes(parts[part], several=part == "train")
        notes += said if part != "train" else ()
        if bool(names) != any(own):
            raise UsageError(
                f"{parts[part]} has {'no ' if names else ''}classes, but {parts['train']} has{' none' * (not names)}"
            )
        if names and (unknown := sorted(set(own) - set(names))):
            raise UsageError(f"class {unknown[0]!r} is in {parts[part]} but not in {parts['train']}")
        files += [File(path, names.index(name) if names else -1, part) for name in own for path in own[name]]
    return Listing(files + more, names, "test" in parts, notes)


def _list_classes(folder: Path, several: bool = True) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Class name -> its images, both sorted, and what a person should know; the name is "" in a flat folder. A single
    class is refused if there should be `several`."""
    loose = list_images(folder, deep=False)
    subs = [sub for sub in _sub_folders(folder) if sub.name not in _UNLABELLED]
    by_class: dict[str, list[Path]] = {}
    for sub in subs:  # a name may be spelt with letters and accents apart, and is the same
        by_class.setdefault(unicodedata.normalize("NFC", sub.name), []).extend(list_images(sub))
    full = {name: by_class[name] for name in sorted(by_class) if by_class[name]}
    if loose and full:
        raise UsageError(
            f"{folder} holds both images and sub-folders with images ({loose[0].name}, {next(iter(full))}/): "
            "put every image into the sub-folder of its class, images without one into unlabelled/, or all of them "
            "directly into one folder"
        )
    if not loose and not full:
        raise UsageError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    if loose:
        return {"": loose}, ()
    if several and len(full) == 1:
        only = next(filter(_has_images, subs))
        inner = [sub.name for sub in _sub_folders(only) if _has_images(sub)]
        if inner and not list_images(only, deep=False):
            raise UsageError(
                f"{folder} holds {only.name}/ alone, whose sub-folders hold images ({', '.join(inner[:3])}): if these"
                f" are the classes, use folder:{only}"
            )
        raise UsageError(
            f"{folder} holds a single class, {only.name}/, and a classifier needs two; to pretrain on its images"
            f" without classes, use folder:{only}"
        )
    notes = []
    if empty := [name for name in by_class if name not in full]:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        notes.append(f"no images, so no class: {', '.join(f'{name}/' for name in empty[:5])}{more}")
    spelt: dict[str, str] = {}
    for name in full:
        if (other := spelt.setdefault(name.casefold(), name)) != name:
            notes.append(f"classes {other!r} and {name!r} differ in case alone; if they are one class, join them")
    return full, tuple(notes)


def _passed_over(name: str) -> bool:
    """Whether a file or folder is hidden (".x", "._x.png" of macOS), or left behind by a system."""
    return name[0] == "." or name.casefold() in _LEFT_BEHIND


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _passed_over(path.name))


def walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and below, but for what is passed over; a folder that links lead to twice counts once."""
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        shown = sorted(name for name in folders if not _passed_over(name))
        real = {os.path.realpath(os.path.join(place, name)): name for name in shown}
        folders[:] = [real[path] for path in real if path not in seen]
        seen |= real.keys()
        paths = (Path(place, name) for name in sorted(names) if not _passed_over(name))
        yield from filter(Path.is_file, paths)


def list_images(folder: Path, deep: bool = True) -> list[Path]:
    """Files of `folder` with an image's suffix, and of what lies below it if `deep`, sorted; see `walk`."""
    here = (path for path in folder.iterdir() if not _passed_over(path.name) and path.is_file())
    return sorted(filter(_is_image, walk(folder) if deep else here), key=lambda path: path.as_posix())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, walk(folder)))


def fingerprint_of(files: list[File], root: Path) -> str:
    """Changes when a file comes, goes, moves to another class or is written: SHA-256 of names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.path.stat()
        part = {"train": False, "test": True}.get(file.part, file.part)  # as it was before there was a third
        line = (str(file.path.relative_to(root)), file.label, part, stat.st_size, stat.st_mtime_ns)
        digest.update(repr(line).encode(errors="surrogateescape"))
    return digest.hexdigest()


class Parts(NamedTuple):
    """What each image of a folder is for.

    Args:
        keys, labels: int64 (N,); label -1 without a class.
        val: bool (N,), for validation, as the folder says; none where it does not.
        test: bool (N,), for testing.
        left_out: bool (N,), for nothing, since a copy is for testing, or for validation.
    """

    keys: torch.Tensor
    labels: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    left_out: torch.Tensor


def _numbers(keys: list[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(keys), "<i8").astype(np.int64))


def tested(keys: list[bytes]) -> torch.Tensor:
    """Which images are held out for testing wherever no class makes an exception: bool (N,)."""
    return hold_out(_numbers(keys), None, _TEST_FRACTION, "test")


def share_out(files: list[File], keys: list[bytes], class_names: tuple[str, ...], given: bool) -> Parts:
    """Share out the images; `given`: the folder itself says which are for testing."""
    number = _numbers(keys)
    labels = torch.tensor([file.label for file in files])
    val, test = (torch.tensor([file.part == part for file in files]) for part in ("val", "test"))
    if class_names and not given:
        free = (labels >= 0) & ~val
        test[free] = hold_out(number[free], labels[free], _TEST_FRACTION, "test")
    copied = ~test & torch.isin(number, number[test])
    val &= ~copied
    return Parts(number, labels, val, test, copied | ~test & ~val & torch.isin(number, number[val]))


def describe_copies(parts: Parts, files: list[File], root: Path) -> list[str]:
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
        copied = next(i for i in groups[int(which[left_out[0]])] if parts.test[i] or parts.val[i])
        named = " as ".join(str(files[i].path.relative_to(root)) for i in (left_out[0], copied))
        judges = "test or validation" if parts.val.any() else "test"
        said = f"left {len(left_out)} images out of training, which are also {judges} images"
        lines.append(f"{said}: for example {named}")
    return lines
