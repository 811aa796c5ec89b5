"""Copies of run folders on object storage, wherever fsspec reaches: `--mirror URL`, and URLs in the place of runs.

maelab works in a folder on this machine. An object store knows neither renames nor locks, so a commit is sent in the
order in which it was written: what it replaced first, into previous/, and commit.json last. Whoever stops in between
leaves the commit before it whole.
"""

import atexit
import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maelab.errors import RunError, UsageError
from maelab.files import parse_json, read_json
from maelab.runs import folder as folders
from maelab.runs.checkpoints import COMMIT, MODEL, TRAINING
from maelab.runs.files import final_name, temporary, write_temporary

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):(/+)(.+)", re.DOTALL)  # one letter is a drive of Windows
_DISK = ("file:", "local:")
_COMMIT = f"checkpoints/{COMMIT}"
_FIRST, _LAST = ("config.json", "env.json"), (_COMMIT, "result.json")
_TRIAL = ".maelab.mirror"  # a file that is written to see whether that is allowed
_NOT_FOR_READERS = (TRAINING, "metrics.jsonl")


def as_url(place: str | Path) -> str | None:
    """The URL that this is, even where a Path has put its slashes together; None of a name on this machine."""
    found = _URL.fullmatch(str(place))
    if found is None:
        return None
    slashes = "///" if str(place).startswith(_DISK) else "//"
    return f"{found[1]}:{slashes}{found[3].rstrip('/')}"


def shown(url: str) -> str:
    """The URL without a user's name and password, for messages."""
    return re.sub(r"//[^/@]*@", "//", url)


@dataclass
class Mirror:
    """A copy of a folder on object storage, for one process that writes it.

    Args:
        url: of the copy, as fsspec takes it.
        patterns: of the files that belong there.
    """

    url: str
    patterns: tuple[str, ...] = folders.RUN
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> time of its last change, size
    _seen: tuple[bytes, ...] = (b"",)  # what commit.json there may be, as far as this process knows

    def check(self) -> None:
        """Ask for the storage, and whether files can be written there.

        Raises:
            UsageError: if fsspec or the storage does not know the URL, or something that is not maelab's lies there.
            RunError: if the storage does not answer, or refuses.
        """
        self._names()
        with self._storage() as (storage, root):
            storage.pipe_file(f"{root}/{_TRIAL}", b"")
            storage.rm_file(f"{root}/{_TRIAL}")

    def fetch(self, folder: Path, overwrite: bool = False) -> bool:
        """Bring what is there into the folder, if a run there is further than the folder's, or the folder has none.

        Args:
            folder: must be there.
            overwrite: whether another run than the folder's is removed there, and not refused.

        Returns:
            Whether the folder's run is further.

        Raises:
            UsageError, RunError: see `check`; also where another run than the folder's lies there.
        """
        names = self._names()
        theirs, their_env = (self._json(name) if name in names else {} for name in _FIRST)
        ours, our_env = (read_json(folder / name) for name in _FIRST)
        if ours and theirs and (ours != theirs or _inputs(our_env) != _inputs(their_env)):
            if not overwrite:
                raise folders.HoldsAnother(
                    f"--mirror {shown(self.url)} holds another run than {folder}; use --overwrite to replace it, or"
                    " another URL"
                )
            self.clear()
            names, theirs = [], {}
        commit = self._read(_COMMIT) if _COMMIT in names else b""
        self._seen = (commit,)
        there = ("result.json" in names, _step(commit))
        here = ((folder / "result.json").is_file(), _step(_bytes(folder / _COMMIT)))
        if theirs and (not ours or there > here):
            self._get(names, folder)
        return here > there

    def send(self, folder: Path) -> None:
        """Send the files of the folder that have changed since this process sent them.

        Raises:
            RunError: if the storage does not answer, or another process has sent a commit there in the meantime.
        """
        with self._storage() as (storage, root):
            try:
                now = storage.cat_file(f"{root}/{_COMMIT}")
            except FileNotFoundError:
                now = b""
            if now not in self._seen:
                raise Overtaken(
                    f"another process sends a run to {shown(self.url)}; this one stands in {folder} and stopped"
                )
            own = [name for name, inside in folders.entries(folder) if not inside and not (folder / name).is_symlink()]
            for name in _in_turn(own, self.patterns):
                file = folder / name
                about = (file.stat().st_mtime_ns, file.stat().st_size)
                if self._sent.get(name) != about:
                    if name == _COMMIT:  # which may arrive though nobody says so
                        self._seen = (now, file.read_bytes())
                    storage.put_file(str(file), f"{root}/{name}")
                    self._sent[name] = about

    def clear(self) -> None:
        """Remove the files there that are maelab's.

        Raises:
            UsageError, RunError: see `check`.
        """
        for name in reversed(self._names()):
            with self._storage() as (storage, root):
                storage.rm_file(f"{root}/{name}")
        self._sent, self._seen = {}, (b"",)

    def _names(self) -> list[str]:
        """Relative names of the files there, in the order in which they are copied."""
        with self._storage() as (storage, root):
            try:
                storage.invalidate_cache()
                found = storage.find(root)
            except FileNotFoundError:
                return []
        names = [path.removeprefix(root).lstrip("/") for path in found]
        known = _in_turn(names, self.patterns)
        if other := sorted({*names} - {*known, folders.LOCK, _TRIAL}):
            raise UsageError(
                f"{shown(self.url)} holds {other[0] or 'a file'!r}, which maelab did not write; choose another URL"
            )
        return known

    def _read(self, name: str) -> bytes:
        with self._storage() as (storage, root):
            return storage.cat_file(f"{root}/{name}")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return parse_json(self._read(name))
        except ValueError as error:
            raise RunError(f"{shown(self.url)}/{name} is damaged") from error

    def _get(self, names: list[str], folder: Path) -> None:
        """Bring all of these files, or none if the storage stops in between."""
        _say(f"fetching {shown(self.url)}")
        with contextlib.ExitStack() as stack, self._storage() as (storage, root):
            for name in names:
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.callback(temporary(file).unlink, missing_ok=True)
                write_temporary(file, lambda place, name=name: storage.get_file(f"{root}/{name}", str(place)))
            for name in names:
                os.replace(temporary(folder / name), folder / name)

    @contextmanager
    def _storage(self) -> Iterator[tuple[Any, str]]:
        """fsspec's file system, and the path of the folder in it; whatever goes wrong there is said in one line."""
        import fsspec  # its file systems take up to a second

        url = as_url(self.url)  # as readers of it understand it: file://backup is /backup, and no folder here
        if url is None:
            raise UsageError(f"{self.url} is no URL; write one such as s3://bucket/run")
        if "::" in url:
            raise UsageError(f"{shown(self.url)}: one storage at a time, please, without ::")
        try:
            folders_too = {"auto_mkdir": True} if url.startswith(_DISK) else {}  # such as a disk of the network
            storage, root = fsspec.core.url_to_fs(url, **folders_too)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{shown(self.url)}: {_line(error)}") from error
        try:
            yield storage, root.rstrip("/")
        except (UsageError, RunError):
            raise
        except Exception as error:  # each storage has errors of its own
            raise RunError(f"{shown(self.url)}: {_line(error)}") from error


class Overtaken(RunError):
    """Another process writes to the same URL."""


@functools.cache
def fetched(url: str) -> Path:
    """A copy on this machine of the run or checkpoint at a URL, for reading, until this process ends.

    Raises:
        UsageError, RunError: see `Mirror.check`; also if nothing is there.
    """
    mirror = Mirror(url, (*folders.RUN, MODEL))
    names = [name for name in mirror._names() if name.split("/")[-1] not in _NOT_FOR_READERS]
    if not names:
        raise UsageError(f"no run or checkpoint at {shown(url)}")
    folder = Path(tempfile.mkdtemp(prefix="maelab-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mirror._get(names, folder)
    return folder


def _in_turn(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that fit the patterns, in an order that leaves a whole commit wherever copying stops."""
    fitting = [
        name
        for name in names
        if folders.known(name, patterns) and "\\" not in name and final_name(name.split("/")[-1]) == name.split("/")[-1]
        if name != folders.LOCK
    ]

    def turn(name: str) -> tuple[int, str]:
        if name in _FIRST:
            return _FIRST.index(name), ""
        if name in _LAST:
            return 4 + _LAST.index(name), ""
        return (2 if name.startswith("checkpoints/previous/") else 3), name

    return sorted(fitting, key=turn)


def _inputs(environment: dict[str, Any]) -> list[Any]:
    """What a run begins from beside its config: with other images it is another run."""
    return [environment.get(name) for name in folders.INPUTS]


def _step(commit: bytes) -> int:
    """The step that a commit.json says, -1 of none or a damaged one."""
    try:
        step = parse_json(commit).get("step", -1)
    except (ValueError, AttributeError):
        return -1
    return step if isinstance(step, int) else -1


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _say(text: str) -> None:
    print(f"maelab: {text}", file=sys.stderr, flush=True)
