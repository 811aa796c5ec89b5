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
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from maelab.config import AS_IT_IS, Reading
from maelab.data.splits import hold_out, key_of_text
from maelab.data.table import Table, find_tables, match, read_table
from maelab.errors import UsageError
from maelab.names import visible

HEIF = importlib.util.find_spec("pillow_heif") is not None
HEIF_SUFFIXES = (".heic", ".heif")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".npy")
SUFFIXES += HEIF_SUFFIXES * HEIF
_TEST_FRACTION = 0.1
_UNLABELLED = ("unlabelled", "unlabeled")
Part = Literal["train", "val", "test"]
PARTS: dict[str, Part] = {  # how a part's folder may be called, in any case
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_LEFT_BEHIND = ("__macosx", "$recycle.bin", "@eadir")  # by macOS, Windows and Synology


class File(NamedTuple):
    """An image of a folder."""

    path: Path
    label: int  # -1 without a class
    part: Part
    group: str = ""  # images of one stay on one side of every split; "" is a group of its own


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


def list_files(root: Path, reading: Reading = AS_IT_IS) -> Listing:
    """The images of a folder, their classes, and what they are for.

    Args:
        root: the folder.
        reading: the table with labels and the groups that were asked for, if any.

    Raises:
        UsageError: if the layout, the table or the groups are unclear.
    """
    if not root.exists():
        raise UsageError(f"there is no folder {root}")
    if not root.is_dir():
        raise UsageError(f"{root} is a file; folder:PATH takes a folder of images")
    if reading.labels:
        tables, notes = [read_table(reading.labels, root)], ()
    else:
        tables, notes = _tables_of(root)
    if tables:
        return _with_groups(*_list_rows(root, tables), reading.group, root)
    listing = _list_folders(root)
    listing = listing._replace(notes=listing.notes + notes)
    return _with_groups(listing, {}, reading.group, root)


def _tables_of(root: Path) -> tuple[list[Table], tuple[str, ...]]:
    """The tables that lie in a folder; none, and a note, where sub-folders already say the classes."""
    subs = _sub_folders(root)
    parts = [sub for sub in subs if sub.name.casefold() in PARTS]
    tables = find_tables(root, parts)
    if tables:
        inside = [inner for part in parts or [root] for inner in _sub_folders(part) if _has_images(inner)]
        if len(inside) > 1 and not any(list_images(part, deep=False) for part in parts or [root]):
            path = tables[0].path.relative_to(root)
            return [], (f"sub-folders are the classes, and {path} is not used; --labels {path} uses it instead",)
    return tables, ()


def _list_rows(root: Path, tables: list[Table]) -> tuple[Listing, dict[Path, dict[str, str]]]:
    """The images of a folder whose labels stand in tables, and the row of each."""
    images = list_images(root)
    if not images:
        raise UsageError(f"{root} holds no images ({', '.join(SUFFIXES)})")
    rows: dict[Path, dict[str, str]] = {}
    labels: dict[Path, str] = {}
    parts: dict[Path, Part] = {path: _part_of(path.relative_to(root)) for path in images}
    notes = []
    for table in tables:
        own = [path for path in images if len(tables) == 1 or path.is_relative_to(table.path.parent)]
        matched = match(table, own, root)
        named = {path: row for path, row in zip(own, matched.rows, strict=True) if row is not None}
        rows |= named
        labels |= {path: unicodedata.normalize("NFC", row[table.label].strip()) for path, row in named.items()}
        for path, row in named.items():
            if table.split and (said := row[table.split].strip()):
                if said.casefold() not in PARTS:
                    where = f"column {table.split!r} of {table.path}"
                    raise UsageError(f"{where} says {visible(said)!r}; it must be train, val or test")
                parts[path] = PARTS[said.casefold()]
        lacking = sum(not labels.get(path) for path in own)
        said = f"labels from {table.path}, column {table.label!r}, {len(named)} of {len(own)} images"
        said += f"; {lacking} images have none and count as unlabelled" if lacking else ""
        if matched.missing:
            example = visible(matched.missing[0])[:80]
            said += f"; {len(matched.missing)} rows name no image here, for example {example!r}"
        notes.append(said)
    names = sorted({label for label in labels.values() if label}, key=_in_order)
    if not names:
        raise UsageError(f"{tables[0].path} gives no image in {root} a label: {notes[0]}")
    if len(names) == 1:
        raise UsageError(f"{tables[0].path} gives a single class, {visible(names[0])!r}, and a classifier needs two")
    number = {name: k for k, name in enumerate(names)}
    files = [File(path, number.get(labels.get(path, ""), -1), parts[path]) for path in images]
    for part in ("val", "test"):  # what has no label judges nothing
        files = [file._replace(part="train") if file.part == part and file.label < 0 else file for file in files]
    if not any(file.part == "train" for file in files):
        raise UsageError(f"{tables[0].path} leaves no image in {root} to train on")
    order = {"train": 0, "val": 1, "test": 2}
    files.sort(key=lambda file: (order[file.part], file.label < 0, file.label))
    given = any(file.part == "test" for file in files)
    return Listing(files, tuple(names), given, tuple(notes)), rows


def _in_order(name: str) -> tuple[int, str]:
    """Numbers by their size, before words."""
    return (int(name), "") if name.isascii() and name.isdigit() and len(name) < 19 else (2**63, name)


def _part_of(path: Path) -> Part:
    return PARTS.get(path.parts[0].casefold(), "train") if len(path.parts) > 1 else "train"


def _with_groups(listing: Listing, rows: dict[Path, dict[str, str]], asked: str | None, root: Path) -> Listing:
    """The listing with the group of each image: a column of the table, or what a regular expression finds in its path
    below the folder: its first bracket, else all of it. An image in which it finds nothing is a group of its own."""
    if not asked:
        return listing
    columns = next(iter(rows.values()), {})
    if asked in columns:
        groups = [rows.get(file.path, {}).get(asked, "").strip() for file in listing.files]
    else:
        try:
            pattern = re.compile(asked)
        except re.error as error:
            raise UsageError(f"--group {asked} is neither a column nor a regular expression: {error}") from error
        found = [pattern.search(file.path.relative_to(root).as_posix()) for file in listing.files]
        groups = [(hit[1] if hit.re.groups else hit[0]) or "" if hit else "" for hit in found]
    sizes = Counter(filter(None, groups))
    if len(sizes) < 2 or max(sizes.values()) < 2:
        raise UsageError(
            f"--group {asked} finds {len(sizes)} groups in {len(groups)} images, of {max(sizes.values(), default=0)} at"
            f" most: it takes a column{' (' + ', '.join(columns) + ')' if columns else ''}, or a regular expression for"
            f" the part of {listing.files[0].path.relative_to(root)} that images of a group share"
        )
    files = [file._replace(group=group) for file, group in zip(listing.files, groups, strict=True)]
    alone = len(groups) - sizes.total()
    few, many = min(sizes.values()), max(sizes.values())
    said = f"{len(sizes)} groups by --group, of {few} to {many} images; each stays together"
    said += f"; {alone} images are in none" if alone else ""
    return listing._replace(files=files, notes=(*listing.notes, said))


def _list_folders(root: Path) -> Listing:
    """The images of a folder whose sub-folders say what they are."""
    subs = _sub_folders(root) if not list_images(root, deep=False) else []
    without = [sub for sub in subs if sub.name in _UNLABELLED]
    more = [File(path, -1, "train") for sub in without for path in list_images(sub)]
    others = [sub for sub in subs if sub.name not in _UNLABELLED and _has_images(sub)]
    if more and not others:
        return Listing(more, (), False)
    parts: dict[str, Path] = {}
    for sub in others:
        if (part := PARTS.get(sub.name.casefold())) and parts.setdefault(part, sub) != sub:
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
    for part in dict.fromkeys(PARTS.values()):
        if part not in parts:
            continue
        own, said = _list_classes(parts[part], several=part == "train")
        notes += said if part != "train" else ()
        classless = [path for sub in _sub_folders(parts[part]) if sub.name in _UNLABELLED for path in list_images(sub)]
        if part == "train":
            more += [File(path, -1, part) for path in classless]
        elif classless:
            notes += (f"LOOK: {len(classless)} images without a class in {parts[part].name}/ are left out",)
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
        raise UsageError(f"{folder} holds no images ({', '.join(SUFFIXES)}){_instead(folder)}")
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
        held = [_instead(folder / name) for name in empty[:5]]
        named = ", ".join(f"{name}/{other}" for name, other in zip(empty, held, strict=False))
        notes.append(f"{'LOOK: ' * any(held)}no images, so no class: {named}{more}")
    spelt: dict[str, str] = {}
    for name in full:
        if (other := spelt.setdefault(name.casefold(), name)) != name:
            notes.append(f"classes {other!r} and {name!r} differ in case alone; if they are one class, join them")
    return full, tuple(notes)


def _instead(folder: Path) -> str:
    """What files a folder without images holds."""
    counts = Counter(path.suffix.lower() for path in walk(folder)) if folder.is_dir() else Counter()
    held = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in counts.most_common(3))
    needs = " (pip install 'maelab[heif]')" if counts.keys() & set(HEIF_SUFFIXES) else ""
    return f", but {held}{needs}" if held else ""


def passed_over(name: str) -> bool:
    """Whether a file or folder is hidden (".x", "._x.png" of macOS), or left behind by a system."""
    return name[0] == "." or name.casefold() in _LEFT_BEHIND


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not passed_over(path.name))


def walk(folder: Path, dangling: list[Path] | None = None) -> Iterator[Path]:
    """All files in a folder and below, but for what is passed over; a folder that links lead to twice counts once.
    Links that lead nowhere go into `dangling`."""
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        shown = sorted(name for name in folders if not passed_over(name))
        real = {os.path.realpath(os.path.join(place, name)): name for name in shown}
        folders[:] = [real[path] for path in real if path not in seen]
        seen |= real.keys()
        for path in (Path(place, name) for name in sorted(names) if not passed_over(name)):
            if path.is_file():
                yield path
            elif dangling is not None and path.is_symlink() and not path.exists():
                dangling.append(path)


def list_images(folder: Path, deep: bool = True) -> list[Path]:
    """Files of `folder` with an image's suffix, and of what lies below it if `deep`, sorted; see `walk`."""
    here = (path for path in folder.iterdir() if not passed_over(path.name) and path.is_file())
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
        line += (file.group,) if file.group else ()
        digest.update(repr(line).encode(errors="surrogateescape"))
    return digest.hexdigest()


class Parts(NamedTuple):
    """What each image of a folder is for.

    Args:
        keys, labels: int64 (N,); label -1 without a class.
        groups: int64 (N,), equal for images that stay on one side of a split: the keys, or those of groups.
        val: bool (N,), for validation, as the folder says; none where it does not.
        test: bool (N,), for testing.
        left_out: bool (N,), for nothing, since a copy or one of the same group is for testing, or for validation.
    """

    keys: torch.Tensor
    groups: torch.Tensor
    labels: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    left_out: torch.Tensor


def share_out(files: list[File], keys: list[bytes], class_names: tuple[str, ...], given: bool) -> Parts:
    """Share out the images; `given`: the folder itself says which are for testing."""

    def numbers(keys: list[bytes]) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(b"".join(keys), "<i8").astype(np.int64))

    number = numbers(keys)
    own = [key_of_text(f"group {file.group}") if file.group else key for file, key in zip(files, keys, strict=True)]
    groups = numbers(own)
    labels = torch.tensor([file.label for file in files])
    val, test = (torch.tensor([file.part == part for file in files]) for part in ("val", "test"))
    return share(number, groups, labels, val, test, hold=bool(class_names) and not given)


def share(
    keys: torch.Tensor, groups: torch.Tensor, labels: torch.Tensor, val: torch.Tensor, test: torch.Tensor, *, hold: bool
) -> Parts:
    """Share out images by what is known of each, as `Parts` has it; `hold`: nobody says which are for testing."""
    val, test = val.clone(), test.clone()
    if hold:
        free = (labels >= 0) & ~val
        test[free] = hold_out(groups[free], labels[free], _TEST_FRACTION, "test")

    def near(part: torch.Tensor) -> torch.Tensor:
        return torch.isin(keys, keys[part]) | torch.isin(groups, groups[part])

    tested = ~test & near(test)
    val &= ~tested
    return Parts(keys, groups, labels, val, test, tested | ~test & ~val & near(val))


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
        judges = parts.test | parts.val
        named = "test or validation" if parts.val.any() else "test"
        copies = [i for i in left_out if bool(torch.isin(parts.keys[i], parts.keys[judges]))]
        if copies:
            copied = next(i for i in groups[int(which[copies[0]])] if judges[i])
            pair = " as ".join(str(files[i].path.relative_to(root)) for i in (copies[0], copied))
            said = f"left {len(copies)} images out of training, which are also {named} images"
            lines.append(f"{said}: for example {pair}")
        if others := len(left_out) - len(copies):
            lines.append(f"left {others} images out of training, whose groups have {named} images")
    return lines
