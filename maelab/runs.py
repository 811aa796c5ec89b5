"""What a run folder holds: reading, finding and listing runs and their checkpoints, without torch."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from maelab.errors import RunError, UsageError

MODELS = ("MaskedAutoencoderViT", "VisionTransformer", "Linear")  # what a checkpoint may hold
LARGEST_JSON = 2**26  # bytes; what is larger was not written by maelab


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        RunError: if it cannot be written, e.g. because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; what was there before stands") from error
    finally:
        with contextlib.suppress(OSError):  # above all where its folder could not be made
            temporary.unlink()


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def is_complete(folder: Path) -> bool:
    """Whether the run finished: result.json is written last."""
    return (folder / "result.json").is_file()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of the run folder, {} when it is missing.

    Raises:
        RunError: if it is damaged.
    """
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MiB")
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged: it holds no JSON object")
    return content


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a row that was cut off while being written is left out."""
    rows = []
    file = folder / "metrics.jsonl"
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("epoch"), int) and "split" in row:
                rows.append(row)
    return rows


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the best (else the last) checkpoint of a run folder.

    Raises:
        UsageError: if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no run folder or checkpoint at {path}")
    for folder in (path, path / "checkpoints" / "best", path / "checkpoints" / "last"):
        if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
            return folder
    raise UsageError(f"{path} holds no checkpoint (looked for model.safetensors and config.json, and for checkpoints/)")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The description of the checkpoint that `path` means: the fields of `maelab.training.checkpoint.ModelSpec`.

    Raises:
        UsageError: if there is no checkpoint.
        RunError: if its config.json is damaged.
    """
    file = find_checkpoint(path) / "config.json"
    try:
        content = json.loads(file.read_text())
        if content.pop("format") != 1 or content["model"] not in MODELS or not isinstance(content["arguments"], dict):
            raise ValueError("not a format that this version knows")
        if wrong := (content.keys() ^ {"model", "arguments", "data", "class_names"}) - {"mask_ratio"}:
            raise ValueError(f"wrong or missing field {min(wrong)}")
        return {**content, "class_names": tuple(content["class_names"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} is damaged or not a maelab checkpoint ({type(error).__name__}: {error})") from error


def find_runs(folder: str | Path) -> list[Path]:
    """Every run folder at or under `folder`, sorted, run-2 before run-10. Links to folders are not followed.

    A config.json that cannot be read is reported on stderr, in one line, and its folder skipped.

    Raises:
        UsageError: if there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"there is no folder {folder}")
    found = []
    for name, inside, files in os.walk(folder):
        inside[:] = [other for other in inside if other != "checkpoints"]
        if "config.json" in files:
            with _reported():
                if "task" in read_json(Path(name) / "config.json"):
                    found.append(Path(name))
    return sorted(found, key=lambda run: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", str(run))])


def summary(run: Path) -> dict[str, Any]:
    """A run in flat fields, for listing.

    Returns:
        path, task, recipe, data, init, seed, epochs (that it was to make), complete, epochs_done; then every field of
        its config, and the numbers of result.json, where those of a split are called val.accuracy and the like.

    Raises:
        RunError: if a file of it is damaged.
    """
    config, result = read_json(run / "config.json"), read_json(run / "result.json")
    flat = dict.fromkeys(("path", "task", "recipe", "data", "init", "seed", "epochs", "complete", "epochs_done"))
    flat |= config | {"path": str(run), "complete": is_complete(run)}
    flat["epochs_done"] = max((row["epoch"] for row in read_metrics(run)), default=0)
    flat["data"] = result.get("data", flat["data"])  # a probe's config may say "same"
    return flat | {name: value for name, value in _flatten(result).items() if name not in flat}


def summaries(folder: str | Path) -> list[dict[str, Any]]:
    """The summary of every run at or under `folder`; a damaged one is reported on stderr, in one line, and skipped.

    Raises:
        UsageError: if there is no such folder.
    """
    rows = []
    for run in find_runs(folder):
        with _reported():
            rows.append(summary(run))
    return rows


@contextlib.contextmanager
def _reported():
    try:
        yield
    except RunError as error:
        print(f"maelab: skipped: {error}", file=sys.stderr)
    except OSError as error:
        print(f"maelab: skipped: {error.filename}: {error.strerror}", file=sys.stderr)


def _flatten(content: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in content.items():
        flat |= _flatten(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat
