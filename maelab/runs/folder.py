"""What lies in a folder that maelab fills, whose it is, and who may work in it.

Only files whose names are listed here are ever removed, in a folder that held nothing else when maelab began there.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import filelock

from maelab.errors import RunError, UsageError
from maelab.runs.checkpoints import COMMIT, NAMES
from maelab.runs.files import final_name

LOCK = ".maelab.lock"
IMAGES = "images.list"
FIGURES = ("curves", "reconstructions", "neighbours", "predictions", "confusion")
EVENTS = ".maelab"  # ends the names of TensorBoard's files

# Every file of a run folder, by name or pattern, in the order in which they are removed: config.json comes last, so
# that what a killed process left is still known as a run. `wandb/` is a folder of that package's own and stays: its
# curves may not have been sent yet.
RUN = (
    "result.json", "metrics.jsonl", "env.json", IMAGES, "tracker.json", f"events.out.tfevents.*{EVENTS}",
    *(f"figures/{name}.png" for name in FIGURES),
    *(f"checkpoints/{place}{name}" for place in ("", "previous/") for name in (COMMIT, *NAMES)),
    LOCK, "config.json",
)  # fmt: skip
KEPT = ("wandb",)
INPUTS = {  # of env.json, what a run begins from beside its config -> what to say where it has changed
    "data_md5": "other images: the data have changed since it began",
    "init_sha256": "other initial weights: --init has changed since it began",
}


def figure_of(folder: Path, name: str) -> Path:
    """Where a figure of a run lies, whether it is there or not; `name` is one of `FIGURES`."""
    assert name in FIGURES
    return folder / "figures" / f"{name}.png"


def known(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file of this relative name may be maelab's: one of the names, or such a name while it was written."""
    *above, name = path.split("/")
    parts = [*above, final_name(name)]
    return any(_fits(parts, pattern.split("/")) for pattern in patterns)


def _known_folder(path: str, patterns: tuple[str, ...]) -> bool:
    parts = path.split("/")
    return any(_fits(parts, pattern.split("/")[:-1][: len(parts)]) for pattern in patterns)


def _fits(parts: list[str], pattern: list[str]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


def entries(folder: Path, below: str = "") -> Iterator[tuple[str, bool]]:
    """(relative name, whether it is a folder) of everything in `folder`, what lies in a folder before the folder.

    Links are followed nowhere: a link is a file, and none of maelab's.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = below + entry.name
        inside = entry.is_dir(follow_symlinks=False)
        if inside and name not in KEPT:
            yield from entries(folder / entry.name, f"{name}/")
        yield name, inside


def foreign(folder: Path, patterns: tuple[str, ...]) -> str | None:
    """The relative name of something in `folder` that is not maelab's, or None.

    Args:
        folder: must be there.
        patterns: of the files that maelab writes into it, relative and with "/".
    """
    for name, inside in entries(folder):
        link = (folder / name).is_symlink()
        ours = name in KEPT or (_known_folder(name, patterns) if inside else known(name, patterns) and not link)
        if not ours:
            return name
    return None


def remove(folder: Path, patterns: tuple[str, ...], *, keep: tuple[str, ...] = (LOCK,)) -> None:
    """Remove the files of `patterns`, and the folders below `folder` that are empty then. Everything else stays.

    Raises:
        OSError: if a file cannot be removed.
    """
    present = list(entries(folder))
    order = {pattern: number for number, pattern in enumerate(patterns)}

    def place(name: str) -> int:
        parts = [*name.split("/")[:-1], final_name(name.split("/")[-1])]
        return max((n for pattern, n in order.items() if _fits(parts, pattern.split("/"))), default=0)

    files = [name for name, inside in present if not inside and known(name, patterns) and name not in keep]
    for name in sorted(files, key=place):
        if not (folder / name).is_symlink():
            (folder / name).unlink(missing_ok=True)
    for name, inside in present:
        if inside and name not in KEPT and _known_folder(name, patterns):
            with contextlib.suppress(OSError):  # it holds something else
                (folder / name).rmdir()


def remove_leftovers(folder: Path, patterns: tuple[str, ...]) -> None:
    """Remove the parts of files that a killed process left under their temporary names."""
    for name, inside in list(entries(folder)):
        last = PurePosixPath(name).name
        if not inside and final_name(last) != last and known(name, patterns):
            (folder / name).unlink(missing_ok=True)


def is_empty(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether nothing lies there but the lock and parts of files of a process that ended before it had begun."""
    for name, inside in entries(folder):
        last = PurePosixPath(name).name
        started = name == LOCK or (final_name(last) != last and known(name, patterns))
        if not (inside and _known_folder(name, patterns)) and not started:
            return False
    return True


class HoldsAnother(UsageError):
    """The folder, or its copy, holds another run, or this one complete, and nobody asked to replace it."""


class Busy(UsageError):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Make the folder, if need be, and hold it for this process alone.

    Yields:
        Whether the folder is new.

    Raises:
        Busy: if another process holds it.
        UsageError: if it is a file.
        RunError: if it cannot be made or locked.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; give the name of a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = True
        try:
            folder.mkdir()
        except FileExistsError:
            new = False
        lock = filelock.FileLock(folder / LOCK)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise Busy(f"another process is working in {folder}; wait for it or choose another --out") from None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        why = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write the run folder {folder}: {why}; choose another with --out") from error
    try:
        yield new
    finally:
        lock.release()


def refuse_foreign(folder: Path, patterns: tuple[str, ...]) -> None:
    """Refuse to begin in a folder that holds anything that is not maelab's.

    Raises:
        UsageError: names one thing.
    """
    if folder.is_dir() and (other := foreign(folder, patterns)) is not None:
        shown = other.encode(errors="replace").decode()
        raise UsageError(
            f"--out {folder} holds {shown!r}, which maelab did not write; choose another name, or move it away"
        )


def take_back(folder: Path, patterns: tuple[str, ...], *, new: bool) -> None:
    """Remove what this process wrote into a folder before anything was worth keeping; and the folder, if it made it."""
    with contextlib.suppress(OSError):
        remove(folder, patterns, keep=())
        if new:
            folder.rmdir()
