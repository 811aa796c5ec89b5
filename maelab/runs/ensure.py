"""One place decides what a run is: the same one is used or goes on, another one is refused or replaced."""

import contextlib
import dataclasses
import glob
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maelab.config import DataConfig, FinetuneConfig, LoopConfig, PretrainConfig, ProbeConfig, RunOptions
from maelab.errors import RunError, UsageError
from maelab.files import read_json
from maelab.runs import checkpoints as saved
from maelab.runs import folder as folders
from maelab.runs.checkpoints import COMMIT, Content, checkpoints, gone, settle
from maelab.runs.files import write_atomically, write_json
from maelab.runs.mirror import Mirror, Overtaken, as_url, shown

CONFIG, ENVIRONMENT, RESULT = "config.json", "env.json", "result.json"
CONFIGS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "probe": ProbeConfig}
_SHARED = {field.name for kind in (DataConfig, LoopConfig) for field in dataclasses.fields(kind)}


class Ranks(Protocol):
    """The processes of a run, of which the first alone writes."""

    @property
    def is_global_zero(self) -> bool: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any: ...


@dataclass(frozen=True)
class Run:
    """A run folder that is open.

    Args:
        folder: where it is.
        result: of the run, if it was complete before; else {}.
        notes: what was found damaged in it, for the person to read.
        mirror: its copy on object storage, which gets what is committed.
    """

    folder: Path
    result: dict[str, Any]
    notes: tuple[str, ...] = ()
    mirror: Mirror | None = None

    def figure(self, name: str) -> Path:
        """Where a figure goes: one of the names in `maelab.runs.folder.FIGURES`.

        Raises:
            RunError: if the folder has gone.
        """
        self.check()
        return folders.figure_of(self.folder, name)

    def check(self) -> None:
        """Raise RunError if somebody removed the folder."""
        if not self.folder.is_dir():
            raise gone(self.folder)

    def commit(self, files: Mapping[str, Content], about: Mapping[str, Any]) -> str:
        """Commit checkpoints, see `maelab.runs.checkpoints.commit`, and send them to the mirror.

        Returns:
            Why they could not be sent, "" where they were: the next commit will send them.

        Raises:
            RunError: if they cannot be written here, or another process writes to the mirror.
        """
        saved.commit(self.folder, files, about)
        try:
            self._send()
        except Overtaken:
            raise
        except RunError as error:
            return f"{error}; the next save tries again"
        return ""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which makes the run complete: it must come last.

        Raises:
            RunError: if it cannot be written; or sent to the mirror: then it is complete here all the same.
        """
        self.check()
        write_json(self.folder / RESULT, result)
        try:
            self._send()
        except RunError as error:
            raise RunError(f"{error}; the run is complete in {self.folder}, and the same command sends it") from error

    def _send(self) -> None:
        if self.mirror is not None:
            self.mirror.send(self.folder)


def is_complete(folder: Path) -> bool:
    """Whether the run finished: its result is written last."""
    return (folder / RESULT).is_file()


def config_of(folder: Path) -> dict[str, Any]:
    """The whole config of a run, with its task and recipe; {} where there is none. Raises RunError if damaged."""
    config = read_json(folder / CONFIG)
    if config.get("task") == "probe":  # once had these too, which nothing read
        for name in ("optimizer", "muon_lr"):
            config.pop(name, None)
    return config


def split_of(folder: Path) -> dict[str, Any]:
    """How a run told its validation images from those for training: fields of `DataConfig`; {} if it does not say."""
    config = config_of(folder)
    return {name: config[name] for name in ("val_fraction", "split_seed") if name in config}


def result_of(folder: Path) -> dict[str, Any]:
    """The result of a run, {} of an unfinished one. Raises RunError if damaged."""
    return read_json(folder / RESULT)


def environment_of(folder: Path) -> dict[str, Any]:
    """Versions, hardware and checksums of a run; {} where there are none. Raises RunError if damaged."""
    return read_json(folder / ENVIRONMENT)


def listing_of(folder: Path) -> bytes:
    """The list of the images that a run was given, as `maelab.data.compare_images` takes it; empty if it has none."""
    file = folder / folders.IMAGES
    return file.read_bytes() if file.is_file() else b""


def is_run(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of a run, whole enough that nobody else's file is taken for one."""
    return config.get("task") in CONFIGS and "recipe" in config and config.keys() >= _SHARED


def resolved(task: str, recipe: str, config: object) -> dict[str, Any]:
    """What config.json holds: task, recipe and every field, as JSON gives it back."""
    fields = dataclasses.asdict(config)  # type: ignore[call-overload]
    return json.loads(json.dumps({"task": task, "recipe": recipe, **fields}))


def check_out(options: RunOptions) -> None:
    """Refuse a folder in which no run can begin or go on, before any work.

    Raises:
        UsageError: if --out is a file, or holds what is not maelab's.
    """
    if (folder := options.out) is None:
        return
    refuse_url(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; give the name of a folder")
    if options.overwrite or not is_run(config_of(folder)):
        _refuse(folder)


def refuse_url(folder: Path) -> None:
    """Refuse a URL as a folder to write into. Raises UsageError."""
    if (url := as_url(folder)) is not None:
        raise UsageError(f"--out is a folder on this machine; --mirror {shown(url)} keeps a copy of a run there")


def _refuse(folder: Path) -> None:
    """Refuse a folder that is neither empty nor a run folder, or that holds anything of somebody else's."""
    folders.refuse_foreign(folder, folders.RUN)
    if not folders.is_empty(folder, folders.RUN) and not is_run(config_of(folder)):
        raise UsageError(f"--out {folder} exists and is not a run folder; choose another name")


@contextmanager
def open_run(
    ranks: Ranks,
    task: str,
    recipe: str,
    config: object,
    options: RunOptions,
    environment: Mapping[str, Any],
    listing: bytes = b"",
) -> Iterator[Run]:
    """Open the run folder for this run alone: use, go on, begin, replace or refuse.

    1. The same run, complete, is used as it is: `Run.result` is what it came to. With `overwrite` it is done again.
    2. The same run, unfinished, goes on.
    3. An empty folder, or none, begins it.
    4. Another run is refused, and what differs is said; with `overwrite` its files are replaced.

    The same means: every field of the config, the images and the initial weights. A run that fails before its first
    checkpoint takes back what it wrote.

    Args:
        ranks: the processes.
        task, recipe, config: what to do.
        options: where to keep it.
        environment: for env.json; of its entries those in `folder.INPUTS` are compared.
        listing: of the images of a folder (`maelab.data.Dataset.listing`), to say later what has changed.

    Raises:
        UsageError: if the folder holds another run, is in use, or is no run folder at all.
        RunError: if it cannot be written, or is damaged.
    """
    wanted = resolved(task, recipe, config)
    with contextlib.ExitStack() as stack:
        run, error = Run(Path(), {}), None
        if ranks.is_global_zero:
            try:
                run = _claim_free(stack, wanted, environment, options)
                if listing and not run.result:
                    write_atomically(run.folder / folders.IMAGES, listing)
            except (UsageError, RunError) as problem:
                error = problem
            except OSError as problem:
                error = RunError(f"cannot write the run folder {options.out}: {problem.strerror}; choose another --out")
        run, error = ranks.broadcast((run, error))  # every process learns it, and none waits for another
        if error is not None:
            raise error
        yield run


@contextmanager
def open_collection(
    out: Path, patterns: tuple[str, ...], marker: str, entries: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """Hold a folder of several runs, such as a fit or a sweep, for this process alone.

    Args:
        out: the folder. It must be new or empty, or hold the marker.
        patterns: of all files that belong there, those of the runs with them.
        marker: the JSON file that tells what the collection is. Without it at the end nothing had begun, and what was
            written is taken back.
        entries: that the marker has; a file of that name without them is somebody else's.

    Yields:
        What the marker says, {} of a new folder.

    Raises:
        UsageError: if the folder holds something else, or is in use.
        RunError: if the marker is damaged, or the folder cannot be made.
    """
    refuse_url(out)
    if out.is_dir() and not entries <= read_json(out / marker).keys():
        folders.refuse_foreign(out, patterns)
        if not folders.is_empty(out, patterns):
            raise UsageError(f"--out {out} exists and holds something else; choose another name")
    with folders.locked(out) as new:
        try:
            yield read_json(out / marker)
        finally:
            if not (out / marker).is_file():
                folders.take_back(out, patterns, new=new)


def replace_collection(out: Path, patterns: tuple[str, ...]) -> None:
    """Remove a collection of runs that is held, but nothing else.

    Raises:
        UsageError: if there is anything else in it; then nothing is removed.
        RunError: if a file cannot be removed.
    """
    folders.refuse_foreign(out, patterns)
    try:
        folders.remove(out, patterns)
    except OSError as error:
        raise RunError(f"cannot remove {error.filename}: {error.strerror}") from error


def _claim_free(
    stack: contextlib.ExitStack, wanted: dict[str, Any], environment: Mapping[str, Any], options: RunOptions
) -> Run:
    """Claim --out, or the first default folder that no other process works in."""
    while True:
        folder = options.out or _default_folder(wanted, environment)
        try:
            return stack.enter_context(_claimed(folder, wanted, environment, options))
        except folders.Busy:
            if options.out:
                raise


@contextmanager
def _claimed(
    folder: Path, wanted: dict[str, Any], environment: Mapping[str, Any], options: RunOptions
) -> Iterator[Run]:
    overwrite, mirror = options.overwrite, Mirror(options.mirror) if options.mirror else None
    if folder.is_dir() and not is_run(config_of(folder)):
        _refuse(folder)  # before anything is written, be it a lock
    with folders.locked(folder) as new:
        begun = unsent = False
        try:
            if mirror is not None:
                mirror.check()
                unsent = mirror.fetch(folder, overwrite)
            present = config_of(folder)
            if not is_run(present):
                _refuse(folder)
            elif found := _what_differs(folder, present, wanted, environment, overwrite):
                if not overwrite:
                    raise folders.HoldsAnother(
                        f"{folder} holds {found}; use --overwrite to replace it, or another --out"
                    )
                _replace(folder, mirror)
            if is_complete(folder):
                if mirror is not None and unsent:
                    mirror.send(folder)
                yield Run(folder, result_of(folder))
                return
            begun = True
            folders.remove_leftovers(folder, folders.RUN)
            try:
                notes = settle(folder)
            except RunError as error:
                if not overwrite:
                    raise RunError(f"{error}; --overwrite starts anew") from error
                _replace(folder, mirror)
                notes = []
            write_json(folder / CONFIG, wanted)
            write_json(folder / ENVIRONMENT, environment)
            yield Run(folder, {}, tuple(notes), mirror)
        finally:
            kept = is_complete(folder) or (checkpoints(folder) / COMMIT).exists()
            if folder.is_dir() and not kept and (begun or new):
                folders.take_back(folder, folders.RUN, new=new)


def _replace(folder: Path, mirror: Mirror | None) -> None:
    """Remove a run, and its copy."""
    folders.refuse_foreign(folder, folders.RUN)
    folders.remove(folder, folders.RUN)
    if mirror is not None:
        mirror.clear()


def _what_differs(
    folder: Path, present: dict[str, Any], wanted: dict[str, Any], environment: Mapping[str, Any], overwrite: bool
) -> str:
    """In words, the run in the folder if it is not the wanted one, or is to be done again; "" where it is."""
    kind = "a complete run" if is_complete(folder) else "an unfinished run"
    other = [key for key in sorted(wanted.keys() | present.keys()) if wanted.get(key) != present.get(key)]
    if other:
        fields = ", ".join(f"{key} {present.get(key)} instead of {wanted.get(key)}" for key in other[:3])
        return f"{kind} with {fields}{', ...' if other[3:] else ''}"
    before = environment_of(folder)
    for name, said in folders.INPUTS.items():
        if before.get(name, environment.get(name)) != environment.get(name):
            return f"{kind} on {said}"
    return kind if overwrite and is_complete(folder) else ""


def _default_folder(wanted: dict[str, Any], environment: Mapping[str, Any]) -> Path:
    """The last runs/TASK-RECIPE-N if it is this very run, unfinished and idle; otherwise the next free N."""
    stem = f"{wanted['task']}-{wanted['recipe']}-"
    present = Path("runs").glob(glob.escape(stem) + "*")
    taken = [int(p.name[len(stem) :]) for p in present if p.name[len(stem) :].isdecimal()]
    last = Path("runs") / f"{stem}{max(taken, default=0)}"
    with contextlib.suppress(RunError, UsageError):  # a damaged folder, or one at work, is left alone
        there = config_of(last)
        if there == wanted and not is_complete(last) and not _what_differs(last, there, wanted, environment, False):
            with folders.locked(last):
                return last
    return Path("runs") / f"{stem}{max(taken, default=0) + 1}"
