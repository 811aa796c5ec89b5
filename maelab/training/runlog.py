"""What a run writes as it goes, and what a person sees of it."""

import html
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import maelab
from maelab.config import RunOptions
from maelab.names import visible
from maelab.progress import in_words
from maelab.runs import Run, open_run, write_atomically
from maelab.runs.checkpoints import gone
from maelab.runs.listing import METRICS
from maelab.training.checkpoint import weights_sha256
from maelab.training.parallel import Engine
from maelab.training.trackers import Events, Tracker, open_tracker

console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


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


def whole() -> str:
    """What the runs of the moment are a part of; "" where they stand alone."""
    return _whole


def first_process() -> bool:
    """Whether this process is the one that speaks and writes, of all that work on a run, on whatever machine."""
    return os.environ.get("RANK", os.environ.get("NODE_RANK", "0")) == "0"


def say(text: str) -> None:
    """Print a line for people, on stderr; of several processes only the first speaks, and none as part of a whole."""
    if first_process() and not _whole:
        console.print(visible(text), markup=False)


@contextmanager
def open_task(
    engine: Engine,
    task: str,
    recipe: str,
    config: object,
    options: RunOptions,
    environment: dict[str, Any],
    listing: bytes = b"",
) -> Iterator[tuple[Run, Tracker | None]]:
    """Open the run folder of a training, and its tracker; see `maelab.runs.open_run`.

    Yields:
        The folder, and what else gets the metrics: nothing where the run was complete before.
    """
    with open_run(engine, task, recipe, config, options, environment, listing) as run:
        for note in run.notes:
            say(note)
        if run.result:
            say(f"{task}: done before, in {run.folder}")
            yield run, None
        else:
            with open_tracker(options.logger, run.folder, engine) as tracker:
                yield run, tracker


def environment(hardware: str, checksums: dict[str, str], source: nn.Module | None = None) -> dict[str, Any]:
    """What a result depends on beside the config: versions, hardware, threads, commit, checksums of what it began from.

    Args:
        hardware: as `maelab.training.parallel.prepare` says it.
        checksums: of the images.
        source: the model that gives the initial weights, if there is one.
    """
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
        "init_sha256": weights_sha256(source),
    }


class _TerminalBar:
    """The bar in a terminal, which goes away at the end."""

    def __init__(self, total: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def update(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, description=text)

    def stop(self) -> None:
        self._bar.stop()


class _NotebookBar:
    """The bar in the output of a notebook's cell. Plain HTML that is replaced, so that no widgets are needed."""

    def __init__(self, total: int) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports] - a notebook has it

        self._html, self._total, self._begun, self._due = HTML, total, time.monotonic(), 0.0
        self._from: int | None = None
        self._handle: Any = display(HTML(""), display_id=True)

    def update(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + 0.25  # a message to the browser each
        self._from = step if self._from is None else self._from
        done = step - self._from
        left = f", {in_words((self._total - step) * (now - self._begun) / done)} left" if done else ""
        bar = f'<progress value="{step}" max="{self._total}"></progress>'
        self._handle.update(self._html(f"{html.escape(visible(text))} {bar}{left}"))

    def stop(self) -> None:
        self._handle.update(self._html(""))


class RunLog:
    """Writes metrics.jsonl and TensorBoard's events, and shows progress on stderr.

    Args:
        folder: the run folder; None shows nothing and writes nothing (any process but the first).
        rows: what the checkpoint says that metrics.jsonl holds. Rows after these are done again and go away; where
            the file lacks any of them, it is written anew, and the person is told.
        epoch: epochs done so far.
        total_steps: for the bar.
        tracker: gets the metrics too.
    """

    def __init__(
        self, folder: Path | None, rows: str, epoch: int, total_steps: int, tracker: Tracker | None = None
    ) -> None:
        self.rows, self._folder, self._file = rows, folder, None
        if folder is not None:
            place, kept = folder / METRICS, rows.encode()
            before = place.read_bytes() if place.is_file() else b""
            if not before.startswith(kept):
                write_atomically(place, kept)
                say(f"{place} was cut or changed since the checkpoint: its rows are written again from there")
            self._file = open(place, "a+b")  # noqa: SIM115 - closed by close()
            self._file.truncate(len(kept))
            self._events = Events(folder, purge_from=epoch + 1)
            self._tracker = tracker
        self._bar: _TerminalBar | _NotebookBar | None = None
        if folder is not None and console.is_jupyter:
            self._bar = _NotebookBar(total_steps)
        elif folder is not None and console.is_terminal:
            self._bar = _TerminalBar(total_steps)
        self.step(0, "starting")

    def step(self, step: int, text: str) -> None:
        """Move the bar to `step` and show `text` beside it."""
        if self._bar is not None:
            self._bar.update(step, f"{_whole}  {text}".lstrip())

    def epoch(self, epoch: int, split: str, **values: float) -> None:
        """Write one row: the metrics of one split after an epoch (counted from 1).

        Raises:
            RunError: if the run folder has gone.
        """
        row = json.dumps({"epoch": epoch, "split": split, **values}) + "\n"
        self.rows += row
        if self._file is None or self._folder is None:
            return
        if not self._folder.is_dir():
            raise gone(self._folder)
        self._file.write(row.encode())
        self._file.flush()
        named = {f"{split}/{k}": v for k, v in values.items()}
        self._events.log(named, epoch)
        if self._tracker is not None:
            self._tracker.log(named, epoch)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._file is not None:
            say(text)

    def close(self) -> None:
        """Take the bar away and close the files."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
            self._events.close()
