"""The run folder: who may write in it, what lies in it, and what a person sees while it fills."""

import dataclasses
import json
import os
import platform
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
from maelab.errors import UsageError
from maelab.training.checkpoint import write_json
from maelab.training.parallel import Engine, describe, tensorboard

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line for people, on stderr; of several processes only the first speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        console.print(text, markup=False)


def is_complete(folder: Path) -> bool:
    """Whether the run finished: result.json is written last."""
    return (folder / "result.json").is_file()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of the run folder, {} when it is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a row that was cut off while being written is left out."""
    rows = []
    file = folder / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


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


def _default_folder(wanted: dict[str, Any], overwrite: bool) -> Path:
    """The last runs/TASK-RECIPE-N if it is this very run, unfinished and idle; otherwise the next free N."""
    stem = f"{wanted['task']}-{wanted['recipe']}-"
    taken = [int(p.name[len(stem) :]) for p in Path("runs").glob(stem + "*") if p.name[len(stem) :].isdecimal()]
    if taken and not overwrite:
        last = Path("runs") / f"{stem}{max(taken)}"
        if not is_complete(last) and read_json(last / "config.json") == wanted:
            lock = _lock(last)
            if lock is not None:
                lock.release()
                return last
    return Path("runs") / f"{stem}{max(taken, default=0) + 1}"


@contextmanager
def open_run(
    engine: Engine, task: str, recipe: str, config: object, options: RunOptions, checksums: dict[str, str]
) -> Iterator[Path]:
    """Open the run folder for this run alone.

    An unfinished folder with the same config is opened as it is, to go on; a complete one only with `overwrite`.

    Yields:
        The folder, which holds config.json and env.json.

    Raises:
        UsageError: if the folder is complete, holds another run, is in use, or is no run folder at all.
    """
    wanted = resolved(task, recipe, config)
    folder, lock, error = Path(), None, None
    if engine.is_global_zero:
        try:
            folder = options.out or _default_folder(wanted, options.overwrite)
            lock = _claim(folder, wanted, options.overwrite)
            write_json(folder / "config.json", wanted)
            write_json(folder / "env.json", environment(describe(engine), checksums))
        except (UsageError, OSError) as problem:
            error = problem
    folder, error = engine.broadcast((folder, error))  # every process learns it, and none waits for another
    if error is not None:
        raise error
    try:
        yield folder
    finally:
        if lock is not None:
            lock.release()


def _claim(folder: Path, wanted: dict[str, Any], overwrite: bool) -> filelock.BaseFileLock:
    """Check that the folder may be written for the run `wanted`, and lock it."""
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file; give the name of a folder")
    present = read_json(folder / "config.json")
    if folder.is_dir() and "task" not in present and any(p.name != ".lock" for p in folder.iterdir()):
        raise UsageError(f"--out {folder} exists and is not a run folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if lock is None:
        raise UsageError(f"another process is working in {folder}; wait for it or choose another --out")
    if present and overwrite:
        for path in folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif is_complete(folder):
        raise UsageError(f"{folder} holds a complete run; use --overwrite to replace it, or another --out")
    elif present and present != wanted:
        other = sorted(k for k in wanted.keys() | present.keys() if wanted.get(k) != present.get(k))
        shown = ", ".join(f"{k} {present.get(k)} instead of {wanted.get(k)}" for k in other[:3])
        raise UsageError(f"{folder} holds an unfinished run with {shown}; use --overwrite or another --out")
    return lock


def environment(device: str, checksums: dict[str, str]) -> dict[str, Any]:
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
        "engine": device,
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
    """

    def __init__(self, folder: Path | None, length: int, epoch: int, total_steps: int) -> None:
        self._file = None
        if folder is not None:
            self._file = open(folder / "metrics.jsonl", "a+b")  # noqa: SIM115 - closed by close()
            self._file.truncate(length)
            self._tensorboard = tensorboard(folder, purge_from=epoch + 1)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(compact=True))
        silent = folder is None or not console.is_terminal
        self._bar = Progress(*columns, console=console, transient=True, disable=silent)
        self._total = self._bar.add_task("starting", total=total_steps)
        self._bar.start()

    @property
    def length(self) -> int:
        """Bytes written to metrics.jsonl so far."""
        return self._file.tell() if self._file else 0

    def step(self, step: int, text: str) -> None:
        """Move the bar to `step` and show `text` beside it."""
        self._bar.update(self._total, completed=step, description=text)

    def epoch(self, epoch: int, split: str, **values: float) -> None:
        """Write one row: the metrics of one split after an epoch (counted from 1)."""
        if self._file is None:
            return
        self._file.write((json.dumps({"epoch": epoch, "split": split, **values}) + "\n").encode())
        self._file.flush()
        self._tensorboard.log_metrics({f"{split}/{k}": v for k, v in values.items()}, step=epoch)

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
