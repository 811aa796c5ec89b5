"""Finding, reading and listing run folders."""

import contextlib
import difflib
import operator
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maelab.errors import RunError, UsageError
from maelab.files import parse_json, read_json, read_limited
from maelab.runs.ensure import CONFIG, config_of, is_complete, result_of
from maelab.runs.mirror import as_url, shown

METRICS, SWEEP = "metrics.jsonl", "sweep.json"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: epoch, split and numbers. What was cut off while being written is left out, and so is
    what maelab does not write.

    Raises:
        RunError: if the file is too large to be one of maelab's, or cannot be read.
    """
    rows = []
    file = folder / METRICS
    try:
        lines = read_limited(file).splitlines() if file.is_file() else []
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    for line in lines:
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and _is_row(row):
                rows.append(row)
    return rows


def _is_row(row: dict[str, Any]) -> bool:
    numbers = [value for name, value in row.items() if name != "split"]
    good = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    return good and isinstance(row.get("epoch"), int) and isinstance(row.get("split"), str)


def find_runs(folder: str | Path) -> list[Path]:
    """Every run folder at or under `folder`, sorted, run-2 before run-10. Links to folders are not followed.

    A config.json that cannot be read is reported on stderr, in one line, and its folder skipped.

    Raises:
        UsageError: if there is no such folder.
    """
    found = []
    for run in run_folders(folder):
        with _reported():
            if "task" in config_of(run):
                found.append(run)
    return found


def run_folders(folder: str | Path) -> list[Path]:
    """As `find_runs`, and every other folder with a config.json, which may be damaged or somebody else's."""
    found = _holding(CONFIG, folder)
    return sorted(found, key=lambda run: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", str(run))])


def find_sweeps(folder: str | Path) -> list[Path]:
    """Every sweep at or under `folder`, as the system lists them. Links to folders are not followed.

    Raises:
        UsageError: if there is no such folder.
    """
    return _holding(SWEEP, folder)


def sweep_of(folder: Path) -> dict[str, Any]:
    """What a sweep says of itself: "complete", "best", "lowest_masked_mse", "cells"; {} where there is none.

    Raises:
        RunError: if it is damaged.
    """
    if not (folder / SWEEP).is_file():
        return {}
    content = read_json(folder / SWEEP)
    cells = content.get("cells")
    if not isinstance(cells, list):
        raise RunError(f"{folder / SWEEP} is damaged: it lists no cells")
    if not all(isinstance(cell, dict) and isinstance(cell.get("settings"), dict) for cell in cells):
        raise RunError(f"{folder / SWEEP} is damaged: a cell has no settings")
    return content


def _holding(name: str, folder: str | Path) -> list[Path]:
    """The folders at or under this one that hold a file of that name, those of checkpoints left out."""
    if not Path(folder).is_dir():
        if (url := as_url(folder)) is not None:
            raise UsageError(f"{shown(url)}: many runs are read from a folder on this machine; copy them there")
        raise UsageError(f"there is no folder {folder}")
    found = []
    for place, inside, files in os.walk(folder):
        inside[:] = [other for other in inside if other != "checkpoints"]
        if name in files:
            found.append(Path(place))
    return found


def summary(run: Path) -> dict[str, Any]:
    """A run in flat fields, for listing.

    Returns:
        path, task, recipe, data, init, seed, epochs (that it was to make), complete, epochs_done; then every field of
        its config, and the numbers of result.json, where those of a split are called val.accuracy and the like.

    Raises:
        RunError: if a file of it is damaged.
    """
    config, result = config_of(run), result_of(run)
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
