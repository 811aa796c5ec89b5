"""What a run folder holds: reading, finding and listing runs and their checkpoints, without torch."""

import contextlib
import difflib
import json
import operator
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maelab.errors import RunError, UsageError

MODELS = ("MaskedAutoencoderViT", "VisionTransformer", "Linear")  # what a checkpoint may hold
PRETRAINED = Path(__file__).parent / "pretrained"  # a folder for each name of maelab:NAME
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


def locate(path: str | Path) -> Path:
    """The folder that `path` means: maelab:NAME is one that comes with maelab, anything else is itself.

    Raises:
        UsageError: if none of that name comes with maelab.
    """
    if not str(path).startswith("maelab:"):
        return Path(path)
    name = str(path).removeprefix("maelab:")
    names = sorted(file.parent.name for file in PRETRAINED.glob("*/model.safetensors"))
    if name not in names:
        there = f"choose from {', '.join(f'maelab:{other}' for other in names)}" if names else "this copy holds none"
        raise UsageError(f"no pretrained weights are called {path}; {there}")
    return PRETRAINED / name


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the best (else the last) checkpoint of a run folder.

    Args:
        path: run folder, checkpoint folder, or maelab:NAME for one that comes with maelab.

    Raises:
        UsageError: if there is none.
    """
    path = locate(path)
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


def select(
    rows: list[dict[str, Any]], conditions: Sequence[str] = (), sort: str | None = None, descending: bool = False
) -> list[dict[str, Any]]:
    """The rows that meet every condition.

    Args:
        rows: as `summaries` gives them.
        conditions: 'field=value', or with != and, for numbers, <, >, <=, >=. A missing field is none.
        sort: field to sort by; rows without it come last.
        descending: from the highest to the lowest.

    Raises:
        UsageError: if a condition cannot be read, or no row has its field.
    """
    kept = list(rows)
    for condition in conditions:
        if not (parts := re.fullmatch(r"([^<>=!]+)(<=|>=|!=|=|<|>)(.*)", condition)):
            raise UsageError(f"--filter {condition}: write field=value, or with !=, <, >, <=, >=")
        field, sign, wanted = known_field(parts[1].strip(), rows), parts[2], parts[3].strip()
        compare, number = _SIGNS[sign], _number(wanted)
        if sign in ("=", "!="):
            kept = [row for row in kept if compare(_comparable(row.get(field)), _comparable(wanted))]
        elif number is None:
            raise UsageError(f"--filter {condition}: {sign} compares numbers, got {wanted!r}")
        else:
            kept = [row for row in kept if (value := _number(row.get(field))) is not None and compare(value, number)]
    if sort is not None:
        field = known_field(sort, rows)
        have = [row for row in kept if row.get(field) is not None]
        order = sorted(have, key=lambda row: _sortable(row[field]), reverse=descending)
        kept = order + [row for row in kept if row.get(field) is None]
    return kept


def known_field(name: str, rows: list[dict[str, Any]]) -> str:
    """The field that `name` means, val.masked-mse for val.masked_mse.

    Raises:
        UsageError: if there are rows and none has it; names the nearest.
    """
    field, known = name.replace("-", "_"), dict.fromkeys(key for row in rows for key in row)
    if rows and field not in known:
        near = difflib.get_close_matches(field, known, 1, cutoff=0.5)
        raise UsageError(f"no run has a field {name!r}; " + (f"did you mean {near[0]}?" if near else "see --json"))
    return field


_SIGNS = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip


def _number(value: Any) -> float | None:
    """None where it is no number; true and false are none."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    return None


def _comparable(value: Any) -> float | str:
    number = _number(value)
    return as_text(value).lower() if number is None else number


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = _number(value)
    return number is None, number or 0.0, as_text(value)


def as_text(value: Any) -> str:
    """A field as a person writes it: none, true, 28,28."""
    if isinstance(value, list):
        return ",".join(as_text(item) for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


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
        if isinstance(value, dict):
            flat |= _flatten(value, f"{before}{name}.")
        elif not isinstance(value, list):  # a confusion matrix is nothing to list
            flat[before + name] = value
    return flat
