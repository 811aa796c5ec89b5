"""The run folder: who may write in it, what lies in it, and what a person sees while it fills."""

import contextlib
import dataclasses
import glob
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import maelab
from maelab.config import RunOptions
from maelab.errors import RunError, UsageError
from maelab.runs import is_complete, read_json, write_json
from maelab.training.parallel import Engine, Tracker, tensorboard

_OURS = re.compile(r"\.lock|\..+\.\d+")  # the lock, and files under their temporary names

console = Console(stderr=True, highlight=False, soft_wrap=True)


_whole = ""  # what the runs of the moment are a part of


@contextmanager
def part_of(whole: str) -> Iterator[None]:
    """Let the runs inside show one bar, headed `whole`, and no lines of their own."""
    global _whole
    _whole = whole
    try:
        yield
    finally:
        _whole = ""


def say(text: str) -> None:
    """Print a line for people, on stderr; of several processes only the first speaks, and none as part of a whole."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and not _whole:
        console.print(text, markup=False)


def in_words(seconds: float) -> str:
    """A time as people say it: '3 h 05 min', '2 min 10 s', '7 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def resolved(task: str, recipe: str, config: object) -> dict[str, Any]:
    """What config.json holds: task, recipe and every field, as JSON gives it back."""
    fields = dataclasses.asdict(config)  # type: ignore[call-overload]
    return json.loads(json.dumps({"task": task, "recipe": recipe, **fields}))


def _lock(folder: Path) -> filelock.BaseFileLock | None:
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(blocking=False).lock
    except filelock.Timeout:
        return None


def _default_folder(wanted: dict[str, Any]) -> Path:
    """The last runs/TASK-RECIPE-N if it is this very run, unfinished and idle; otherwise the next free N."""
    stem = f"{wanted['task']}-{wanted['recipe']}-"
    present = Path("runs").glob(glob.escape(stem) + "*")
    taken = [int(p.name[len(stem) :]) for p in present if p.name[len(stem) :].isdecimal()]
    last = Path("runs") / f"{stem}{max(taken, default=0)}"
    with contextlib.suppress(RunError):  # a damaged folder is left alone
        if not is_complete(last) and read_json(last / "config.json") == wanted:
            lock = _lock(last)
            if lock is not None:
                lock.release()
                return last
    return Path("runs") / f"{stem}{max(taken, default=0) + 1}"


class _Busy(UsageError):
    """Another process works in the folder."""


@contextmanager
def open_run(
    engine: Engine,
    task: str,
    recipe: str,
    config: object,
    options: RunOptions,
    checksums: dict[str, str],
    hardware: str,
) -> Iterator[Path]:
    """Open the run folder for this run alone.

    An unfinished folder with the same config is opened as it is, to go on; a complete one, or another run's, is
    emptied with `overwrite`. A run that fails before its first checkpoint leaves nothing behind. `checksums` of the
    data and the line on `hardware` go into env.json.

    Yields:
        The folder, which holds config.json and env.json.

    Raises:
        UsageError: if the folder is complete, holds another run, is in use, or is no run folder at all.
        RunError: if it cannot be written, or its config.json is damaged.
    """
    wanted = resolved(task, recipe, config)
    folder, lock, error = options.out or Path(), None, None
    if engine.is_global_zero:
        try:
            while lock is None:
                folder = options.out or _default_folder(wanted)
                try:
                    lock = _claim(folder, wanted, checksums, options.overwrite)
                except _Busy:
                    if options.out:
                        raise
            write_json(folder / "config.json", wanted)
            write_json(folder / "env.json", environment(hardware, checksums))
        except (UsageError, RunError) as problem:
            error = problem
        except OSError as problem:
            error = RunError(f"cannot write the run folder {folder}: {problem.strerror}; choose another with --out")
    folder, error = engine.broadcast((folder, error))  # every process learns it, and none waits for another
    try:
        if error is not None:
            raise error
        yield folder
    finally:
        if lock is not None:
            if not is_complete(folder) and not (folder / "checkpoints" / "last" / "training.pt").exists():
                with contextlib.suppress(OSError):
                    _empty(folder)
                    (folder / ".lock").unlink(missing_ok=True)
                    folder.rmdir()
            lock.release()


def _claim(folder: Path, wanted: dict[str, Any], checksums: dict[str, str], overwrite: bool) -> filelock.BaseFileLock:
    """Check that the folder may be written for the run `wanted`, and lock it."""
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file; give the name of a folder")
    present = read_json(folder / "config.json")
    if folder.is_dir() and "task" not in present and any(not _OURS.fullmatch(p.name) for p in folder.iterdir()):
        raise UsageError(f"--out {folder} exists and is not a run folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if lock is None:
        raise _Busy(f"another process is working in {folder}; wait for it or choose another --out")
    try:
        images_changed = read_json(folder / "env.json").get("data_md5", checksums) != checksums
        other = [k for k in sorted(wanted.keys() | present.keys()) if wanted.get(k) != present.get(k)]
        if present and (is_complete(folder) or other or images_changed):
            if not overwrite:
                if is_complete(folder):
                    what = "a complete run"
                elif other:
                    fields = ", ".join(f"{k} {present.get(k)} instead of {wanted.get(k)}" for k in other[:3])
                    what = f"an unfinished run with {fields}{', ...' if other[3:] else ''}"
                else:
                    what = "an unfinished run on other images: the data have changed since it began"
                raise UsageError(f"{folder} holds {what}; use --overwrite to replace it, or another --out")
            _empty(folder)
        for path in folder.rglob(".*"):  # a killed process may have left a part of a file under its temporary name
            if path.name != ".lock" and _OURS.fullmatch(path.name) and path.is_file():
                path.unlink()
    except BaseException:
        lock.release()
        raise
    return lock


def _empty(folder: Path) -> None:
    """Remove everything but the lock; config.json last, so that what is left of it stays known as a run folder."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def environment(hardware: str, checksums: dict[str, str]) -> dict[str, Any]:
    """What a result depends on beside the config: versions, hardware, threads, commit, checksums of the data."""
    package = Path(maelab.__file__).parent
    git = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    tracked = (package.parent / ".git").exists() and shutil.which("git") is not None
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if tracked else ""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "maelab": maelab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "hardware": hardware,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "git_commit": commit or None,
        "data_md5": checksums,
    }


class RunLog:
    """Writes metrics.jsonl and TensorBoard's events, and shows progress on stderr.

    Args:
        folder: the run folder; None shows nothing and writes nothing (any process but the first).
        length: bytes of metrics.jsonl to keep: what came after them was not covered by the checkpoint.
        epoch: epochs done so far.
        total_steps: for the bar.
        tracker: gets the metrics too.
    """

    def __init__(
        self, folder: Path | None, length: int, epoch: int, total_steps: int, tracker: Tracker | None = None
    ) -> None:
        self._file = None
        if folder is not None:
            self._file = open(folder / "metrics.jsonl", "a+b")  # noqa: SIM115 - closed by close()
            self._file.truncate(min(length, self._file.tell()))  # not longer: that would fill it with zeros
            self._file.seek(0, os.SEEK_END)
            self._tensorboard = tensorboard(folder, purge_from=epoch + 1)
            self._trackers = [self._tensorboard, *([tracker] if tracker else [])]
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(compact=True))
        silent = folder is None or not console.is_terminal
        self._bar = Progress(*columns, console=console, transient=True, disable=silent)
        self._total = self._bar.add_task(f"{_whole} starting".lstrip(), total=total_steps)
        self._bar.start()

    @property
    def length(self) -> int:
        """Bytes written to metrics.jsonl so far."""
        return self._file.tell() if self._file else 0

    def step(self, step: int, text: str) -> None:
        """Move the bar to `step` and show `text` beside it."""
        self._bar.update(self._total, completed=step, description=f"{_whole}  {text}".lstrip())

    def epoch(self, epoch: int, split: str, **values: float) -> None:
        """Write one row: the metrics of one split after an epoch (counted from 1)."""
        if self._file is None:
            return
        self._file.write((json.dumps({"epoch": epoch, "split": split, **values}) + "\n").encode())
        self._file.flush()
        for tracker in self._trackers:
            tracker.log_metrics({f"{split}/{k}": v for k, v in values.items()}, step=epoch)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._file is not None:
            say(text)

    def close(self) -> None:
        """Take the bar away and close the files."""
        self._bar.stop()
        if self._file is not None:
            self._file.close()
            self._tensorboard.finalize("success")
