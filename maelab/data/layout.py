"""What a folder of images means: which files are images, what their classes are, and what each is for.

One sub-folder per class; `train/` and `test/`, each with one sub-folder per class; or images without classes directly
in the folder. Beside classes, a sub-folder `unlabelled/` holds images without a class. Without `test/`, about a tenth
of the images with a class is held out as the test part, each by what its file holds, whatever lies beside it (see
`maelab.data.splits`). Training leaves out copies of test images.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from maelab.data.splits import hold_out
from maelab.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TEST_FRACTION = 0.1
_UNLABELLED = ("unlabelled", "unlabeled")


class File(NamedTuple):
    """An image of a folder."""

    path: Path
    label: int  # -1 without a class
    test: bool  # in test/


def find_root(spec: str) -> Path:
    """PATH of "folder:PATH"."""
    if not spec.startswith("folder:"):
        raise UsageError(f"--data {spec} is no folder of images; write --data folder:PATH")
    if not (path := spec.removeprefix("folder:")):
        raise UsageError("'folder:' names no folder; write folder:PATH")
    return Path(path).expanduser()


def list_files(root: Path) -> tuple[list[File], tuple[str, ...], bool]:
    """(files sorted by class and name, class names, whether the folder itself says which are for testing)."""
    if not root.exists():
        raise UsageError(f"there is no folder {root}")
    if not root.is_dir():
        raise UsageError(f"{root} is a file; folder:PATH takes a folder of images")
    parts = {path.name for path in root.iterdir() if path.is_dir()} if not list_images(root, deep=False) else set()
    without = sorted(name for name in parts & set(_UNLABELLED) if list_images(root / name))
    more = [File(path, -1, False) for name in without for path in list_images(root / name)]
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
        files = [File(path, class_names.index(name) if name else -1, False) for path, name in train]
        files += [File(path, class_names.index(name) if name else -1, True) for path, name in test]
        return files + more, class_names, True
    if "train" in parts and parts <= {"train", "val", "valid", "validation"}:
        raise UsageError(
            f"{root} holds {' and '.join(f'{name}/' for name in sorted(parts))}: name the two parts train/ and test/, "
            f"or use folder:{root / 'train'}"
        )
    found, class_names = _list_classes(root)
    files = [File(path, class_names.index(name) if name else -1, False) for path, name in found]
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


def fingerprint_of(files: list[File], root: Path) -> str:
    """Changes when a file comes, goes, moves to another class or is written: SHA-256 of names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.path.stat()
        line = (str(file.path.relative_to(root)), file.label, file.test, stat.st_size, stat.st_mtime_ns)
        digest.update(repr(line).encode(errors="surrogateescape"))
    return digest.hexdigest()


class Parts(NamedTuple):
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


def share_out(files: list[File], keys: list[bytes], class_names: tuple[str, ...], given: bool) -> Parts:
    """Share out the images; `given`: by test/ of the folder itself."""
    number = torch.from_numpy(np.frombuffer(b"".join(keys), "<i8").astype(np.int64))
    labels = torch.tensor([file.label for file in files])
    test = torch.tensor([file.test for file in files])
    if class_names and not given:
        labelled = labels >= 0
        test[labelled] = hold_out(number[labelled], labels[labelled], _TEST_FRACTION, "test")
    return Parts(number, labels, test, ~test & torch.isin(number, number[test]))


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
        copied = next(i for i in groups[int(which[left_out[0]])] if parts.test[i])
        named = " as ".join(str(files[i].path.relative_to(root)) for i in (left_out[0], copied))
        lines.append(f"left {len(left_out)} images out of training, which are also test images: for example {named}")
    return lines
