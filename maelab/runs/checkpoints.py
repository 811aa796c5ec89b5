"""The checkpoints of a run folder: the best and the last are committed together, and every file is checked on reading.

    checkpoints/best/model.safetensors, config.json                the best weights, portable
    checkpoints/last/model.safetensors, config.json, training.pt   the last ones, and what going on needs
    checkpoints/commit.json                                        the SHA-256 of each of these files
    checkpoints/previous/                                          the same five and their commit.json, one commit older

`commit.json` is replaced last, and that alone makes a commit: it says by their sums which files belong together. A
file that it replaced lies in `previous/`, so after a crash at any moment the files of one commit are all there, at
one of the two places.
"""

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from maelab.config import LARGEST, LARGEST_SIDE, Reading, Resize
from maelab.errors import RunError, UsageError
from maelab.files import parse_json, read_json, read_limited
from maelab.runs.files import as_json, put, sha256, sync_folder, temporary, write_temporary

MODELS = ("MaskedAutoencoderViT", "VisionTransformer", "Linear")  # what a checkpoint may hold
PRETRAINED = Path(__file__).parents[1] / "pretrained"  # a folder for each name of maelab:NAME
LARGEST_CONFIG = 2**24  # bytes; a hundred thousand class names fit
MODEL, CONFIG, TRAINING, COMMIT = "model.safetensors", "config.json", "training.pt", "commit.json"
PORTABLE = (CONFIG, MODEL)
NAMES = tuple(f"best/{name}" for name in PORTABLE) + tuple(f"last/{name}" for name in (*PORTABLE, TRAINING))
_LARGEST = LARGEST | {"in_chans": 2**16, "num_classes": 2**20, "in_features": 2**20, "out_features": 2**20}
_MAX_PATCHES = 2**20
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")  # of other libraries

Content = bytes | Callable[[Path], object]


def checkpoints(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def run_of(path: str | Path) -> Path:
    """The run folder that a path means which leads to it, or to one of its checkpoints. The path need not exist."""
    path = Path(path)
    if path.name in ("best", "last") and path.parent.name == "checkpoints":
        path = path.parent
    return path.parent if path.name == "checkpoints" else path


# ------------------------------------------------------------------------------------------------------------- writing


def commit(run: Path, files: Mapping[str, Content], about: Mapping[str, Any]) -> None:
    """Replace some of the checkpoints' files, all of them or none, whatever happens on the way.

    Args:
        run: the run folder, which must be there.
        files: what to write, by names of `NAMES`. The others stay.
        about: what else commit.json says, e.g. the step.

    Raises:
        RunError: if they cannot be written; the checkpoint before them stands.
    """
    folder = checkpoints(run)
    previous, old = folder / "previous", _sums(folder)
    path = folder
    try:
        for part in ("", "best", "last", "previous", "previous/best", "previous/last"):
            (folder / part).mkdir(exist_ok=True)  # not its parents: a run folder that has gone is not made again
        sums = {name: old[name] for name in NAMES if name in old and name not in files}
        for name, content in files.items():
            path = folder / name
            sums[name] = sha256(write_temporary(path, content))
        for name in sums.keys() - files.keys():  # so that previous/ holds all of its commit
            path = folder / name
            copied = _sums(previous).get(name) == sums[name]
            if not (copied and (previous / name).is_file()):
                put(previous / name, path.read_bytes())
        for name in files:
            path = folder / name
            if path.exists():
                os.replace(path, previous / name)
            os.replace(temporary(path), path)
        for part in ("best", "last", "previous/best", "previous/last"):
            sync_folder(folder / part)
        path = folder / COMMIT
        if path.exists():
            put(previous / COMMIT, path.read_bytes())
        put(path, as_json({"format": 1, **about, "sha256": sums}))
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        for name in files:
            with contextlib.suppress(OSError):
                temporary(folder / name).unlink()
        if not run.is_dir():
            raise gone(run) from error
        why = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise RunError(f"cannot write {path}: {why}; the checkpoint before it stands") from error


def gone(run: Path) -> RunError:
    """The error for a run folder that somebody removed."""
    return RunError(f"the run folder {run} has gone: it was moved or removed while the run went on")


# ------------------------------------------------------------------------------------------------------------- reading


def intact(run: Path, names: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """Where the files of the last commit that is whole lie.

    Args:
        run: the run folder.
        names: which files of `NAMES` are needed; a commit that has none of them is passed over.

    Returns:
        Name -> file, each with the SHA-256 that its commit gives, {} if nothing was ever committed; and in words what
        was found damaged on the way.

    Raises:
        RunError: if every commit is damaged.
    """
    folder, names, notes = checkpoints(run), tuple(names), list[str]()
    seen = False
    for place in (folder, folder / "previous"):
        if not (place / COMMIT).is_file():
            if place == folder and (folder / "previous" / COMMIT).is_file():
                notes.append(f"{place / COMMIT} is missing")
            continue
        try:
            sums = _sums(place)
            wanted = {name: sums[name] for name in names if name in sums}
        except RunError as error:
            seen = True
            notes.append(str(error))
            continue
        if not wanted:
            continue
        seen, files = True, dict[str, Path]()
        for name, wanted_sum in wanted.items():
            for candidate in (folder / name, folder / "previous" / name):
                with contextlib.suppress(OSError):
                    if sha256(candidate) == wanted_sum:
                        files[name] = candidate
                        break
        missing = [name for name in wanted if name not in files]
        if not missing:
            return files, notes
        notes.append(f"{folder / missing[0]} is damaged: it is not what was saved (another SHA-256)")
    if seen:
        raise RunError(f"{'; '.join(notes[:1])}; and there is no checkpoint before it that is whole")
    return {}, notes


def _sums(place: Path) -> dict[str, str]:
    """Name -> SHA-256, as commit.json in `place` says; {} where there is none. Raises RunError if it is damaged."""
    content = read_json(place / COMMIT)
    sums = content.get("sha256", None if content else {})
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise RunError(f"{place / COMMIT} is damaged")
    return sums


def settle(run: Path) -> list[str]:
    """Put the files of the last whole commit in their places, as a run that goes on needs them.

    Returns:
        In words what was found damaged, for the person to read.

    Raises:
        RunError: see `intact`.
    """
    folder = checkpoints(run)
    files, notes = intact(run, NAMES)
    if files and notes:  # the commit before the last is the last from here on
        put(folder / COMMIT, (folder / "previous" / COMMIT).read_bytes())
    for name, file in files.items():
        if file != folder / name:
            put(folder / name, file.read_bytes())
    return [f"{note}; going on from the checkpoint before it" for note in notes]


def last_commit(run: Path) -> dict[str, Any]:
    """What the last commit says of itself, {} if there is none."""
    return read_json(checkpoints(run) / COMMIT)


def locate(path: str | Path) -> Path:
    """The folder that `path` means: of maelab:NAME the one that comes with maelab, of a URL a copy, else itself.

    Raises:
        UsageError: if none of that name comes with maelab, or there is nothing at the URL.
        RunError: if the storage does not answer.
    """
    from maelab.runs import mirror  # which knows the files of this module

    if url := mirror.as_url(path):
        return mirror.fetched(url)
    if not str(path).startswith("maelab:"):
        return Path(path)
    name = str(path).removeprefix("maelab:")
    names = sorted(file.parent.name for file in PRETRAINED.glob(f"*/{MODEL}"))
    if name not in names:
        there = f"choose from {', '.join(f'maelab:{other}' for other in names)}" if names else "this copy holds none"
        raise UsageError(f"no pretrained weights are called {path}; {there}")
    return PRETRAINED / name


@dataclass(frozen=True)
class Checkpoint:
    """A portable checkpoint that was found: its two files."""

    config: Path
    model: Path


def saved_elsewhere(path: str | Path) -> bool:
    """Whether another library saved this model, as its name or its config.json tells; no weights are read."""
    if str(path).startswith("hf:") or (str(path).endswith(_WEIGHTS) and Path(path).is_file()):
        return True
    try:
        config = read_json(Path(path) / CONFIG, LARGEST_CONFIG)
    except RunError:  # for others to name
        return False
    return not {"model_type", "architecture", "model_args"}.isdisjoint(config)


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that `path` means: the one in the folder itself, or the best (else the last) of a run folder.

    In a run folder the files are checked by their sums. Where one is damaged, the checkpoint before it is taken, and
    stderr says so.

    Args:
        path: run folder, checkpoint folder, or maelab:NAME for one that comes with maelab.

    Raises:
        UsageError: if there is none.
        RunError: if it is damaged and no other is there.
    """
    path = locate(path)
    if not path.exists():
        raise UsageError(f"no run folder or checkpoint at {path}")
    run, kinds = path, ("best", "last")
    if (path.parent / COMMIT).is_file() and path.name in kinds:  # a part of a run folder
        run, kinds = path.parents[1], (path.name,)
    for kind in kinds:
        names = [f"{kind}/{name}" for name in PORTABLE]
        try:
            files, notes = intact(run, names)
        except RunError:
            time.sleep(0.5)  # a run at work may have committed twice in the meantime
            files, notes = intact(run, names)
        if files:
            if lacking := [name for name in names if name not in files]:
                raise RunError(f"{checkpoints(run) / COMMIT} is damaged: it does not name {lacking[0]}")
            for note in notes:
                _say_once(f"maelab: {note}; the checkpoint before it is used")
            return Checkpoint(*(files[name] for name in names))
    for folder in (path, *(checkpoints(path) / kind for kind in kinds)):
        if all((folder / name).is_file() for name in PORTABLE):
            return Checkpoint(*(folder / name for name in PORTABLE))
    raise UsageError(f"{path} holds no checkpoint (looked for {MODEL} and {CONFIG}, and for checkpoints/)")


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Any], str | None]:
    """What a checkpoint's config.json says.

    Returns:
        The fields of `maelab.training.checkpoint.ModelSpec`, and the SHA-256 that its weights should have (None if it
        does not say).

    Raises:
        RunError: if it is damaged.
    """
    file = checkpoint.config
    try:
        content = parse_json(read_limited(file, LARGEST_CONFIG))
        if content.pop("format") != 1 or content["model"] not in MODELS:
            raise ValueError("not a format that this version knows")
        wanted_sum = content.pop("sha256", None)
        if wrong := (content.keys() ^ {"model", "arguments", "data", "class_names"}) - {"mask_ratio", "reading"}:
            raise ValueError(f"wrong or missing field {min(wrong)}")
        _check_fields(content)
        reading = read_reading(content.get("reading", {}))
        return {**content, "class_names": tuple(content["class_names"]), "reading": reading}, wanted_sum
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged or not a maelab checkpoint ({type(error).__name__}: {error})") from error


def read_reading(content: Any) -> Reading:
    """How a model's images were read, from its config.json. Raises ValueError or TypeError."""
    ranges = content.get("value_range")
    texts = [content.get(name) for name in ("labels", "group")]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError("labels or group are no text")
    if content.get("resize", "crop") not in get_args(Resize):
        raise ValueError(f"resize is {str(content['resize'])[:20]}")
    if ranges is None:
        return Reading(**content)
    if not isinstance(ranges, list) or not 0 < len(ranges) <= _LARGEST["in_chans"]:
        raise ValueError("value_range is no list of ranges")
    if not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) in (int, float) and math.isfinite(number) for number in pair)
        and pair[0] < pair[1]
        for pair in ranges
    ):
        raise ValueError("value_range holds what is no range")
    return Reading(**{**content, "value_range": tuple((float(low), float(high)) for low, high in ranges)})


def _check_fields(content: dict[str, Any]) -> None:
    """Refuse what would take long to build, or fail far from here. Raises ValueError."""
    arguments, names, ratio = content["arguments"], content["class_names"], content.get("mask_ratio")
    if not isinstance(arguments, dict) or not isinstance(content["data"], str):
        raise ValueError("arguments or data are of the wrong kind")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is no list of names")
    if ratio is not None and not (isinstance(ratio, float) and 0 < ratio < 1):
        raise ValueError(f"mask_ratio is {str(ratio)[:20]}")
    for name, largest in _LARGEST.items():
        value = arguments.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
            raise ValueError(f"{name} is {str(value)[:20]}, which is not between 0 and {largest}")
    sides = arguments.get("img_size", [])
    sides = sides if isinstance(sides, list) else [sides]
    if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise ValueError(f"img_size is {str(sides)[:40]}")
    if len(sides) == 2 and sides[0] * sides[1] > _MAX_PATCHES * max(1, arguments.get("patch_size", 1)) ** 2:
        raise ValueError(f"{sides[0]} x {sides[1]} pixels make too many patches")
