"""Runs as data: what is small of a run as one JSON object, and many of them as one file with a line for each.

A record is {"config", "env", "result", "metrics"}, the content of a run folder's files; that of a sweep is {"sweep"}.
In the file, a record says once what would be said often: "metrics" is {"columns", "rows"}, with null where a row lacks
a column, and "env" may be the name of an earlier record that has the same.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from maelab.errors import RunError
from maelab.files import parse_json
from maelab.runs.checkpoints import PORTABLE, commit, find_checkpoint
from maelab.runs.ensure import CONFIG, ENVIRONMENT, RESULT, config_of, environment_of, is_complete, result_of
from maelab.runs.files import write_atomically, write_json
from maelab.runs.listing import METRICS, SWEEP, find_runs, find_sweeps, read_metrics, sweep_of

Record = dict[str, Any]


def record_of(run: Path) -> Record:
    """The record of a run folder. Raises RunError if a file of it is damaged."""
    parts = {"config": config_of(run), "env": environment_of(run), "result": result_of(run)}
    return {**parts, "metrics": read_metrics(run)}


def records_under(folder: Path) -> dict[str, Record]:
    """The records of a sweep, or of a run, and of all complete runs in it.

    Args:
        folder: a run folder, a sweep, or a folder of such.

    Returns:
        Name -> record. The name is the path below the folder that holds this one: "sweep", "sweep/CELL/pretrain".
    """

    def name(place: Path) -> str:
        return place.relative_to(folder.parent).as_posix()

    found = {name(place): {"sweep": sweep_of(place)} for place in find_sweeps(folder)}
    return found | {name(run): record_of(run) for run in find_runs(folder) if is_complete(run)}


def restore(record: Record, folder: Path, weights: str | None = None) -> None:
    """Make a run folder, or a sweep's, of a record.

    Args:
        record: as `record_of` gives it.
        folder: where to write it; of what lies there already only the files of the record are replaced.
        weights: the checkpoint that becomes its best, e.g. maelab:NAME. Without it the folder holds none.

    Raises:
        RunError: if it cannot be written.
    """
    if "sweep" in record:
        write_json(folder / SWEEP, record["sweep"])
        return
    write_json(folder / CONFIG, record["config"])
    write_json(folder / ENVIRONMENT, record["env"])
    write_atomically(folder / METRICS, "".join(json.dumps(row) + "\n" for row in record["metrics"]).encode())
    if weights:
        found = find_checkpoint(weights)
        files = {file.name: file.read_bytes() for file in (found.config, found.model)}
        commit(folder, {f"best/{name}": files[name] for name in PORTABLE}, {})
    write_json(folder / RESULT, record["result"])  # last, as a run writes it


def write_records(file: Path, records: Mapping[str, Record]) -> None:
    """Write records, by name, as JSON lines. Raises RunError if it cannot be written."""
    lines, first = [], dict[str, str]()
    for name, record in sorted(records.items()):
        packed = {"run": name, **record}
        if "sweep" not in record:
            env, rows = json.dumps(record["env"]), record["metrics"]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = {"columns": columns, "rows": [[row.get(column) for column in columns] for row in rows]}
            packed |= {"env": first.get(env, record["env"]), "metrics": table}
            first.setdefault(env, name)
        lines.append(json.dumps(packed, separators=(",", ":")) + "\n")
    write_atomically(file, "".join(lines).encode())


def read_records(file: Path) -> dict[str, Record]:
    """What `write_records` wrote: name -> record.

    Raises:
        RunError: if the file cannot be read, is damaged, or holds a name that leads out of the folder.
    """
    records: dict[str, Record] = {}
    try:
        for number, text in enumerate(file.read_bytes().splitlines(), 1):
            try:
                record = parse_json(text)
                name = record.pop("run")
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise ValueError(f"{name!r} is no name of a run")
                if "sweep" not in record:
                    if isinstance(record["env"], str):
                        record["env"] = records[record["env"]]["env"]
                    columns, rows = record["metrics"]["columns"], record["metrics"]["rows"]
                    pairs = (zip(columns, row, strict=True) for row in rows)
                    record["metrics"] = [{key: value for key, value in row if value is not None} for row in pairs]
                records[name] = record
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(f"{file} is damaged in line {number} ({type(error).__name__}: {error})") from error
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    return records
