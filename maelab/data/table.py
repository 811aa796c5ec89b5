"""Labels in a table: a CSV file or JSON lines with a row for each image, in the folder or beside it.

`labels.csv`, `metadata.csv` and `metadata.jsonl` are found in the folder, or in its `train/`, `val/` and `test/`, as in
the ImageFolder convention of Hugging Face's `datasets`; `--labels` names another. A column says the file, one the
class, and one, if there is such, whether the image is for training, validation or testing.
"""

import csv
import io
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from maelab.errors import UsageError
from maelab.files import parse_json, read_limited
from maelab.names import visible

FOUND = ("labels.csv", "metadata.csv", "metadata.jsonl")
_FILE = ("file_name", "filename", "file", "image", "path", "image_path", "image_name", "name", "image_id", "id")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
_SPLIT = ("split", "subset", "part", "set")
_LARGEST = 2**30  # bytes


class Table(NamedTuple):
    """Rows, and which of their columns says what.

    Args:
        path: where it lies.
        rows: column -> text.
        file, label, split: names of columns; split is "" if there is none.
    """

    path: Path
    rows: list[dict[str, str]]
    file: str
    label: str
    split: str


def find_tables(folder: Path, parts: Iterable[Path]) -> list[Table]:
    """The tables with labels that lie in a folder, or in the folders of its parts; no other table is one."""
    for places in ([folder], list(parts)):
        tables = []
        for path in (place / name for place in places for name in FOUND if (place / name).is_file()):
            columns, rows = _read(path)
            file, label = _first(_FILE, columns), _first(LABEL_COLUMNS, columns)
            if file and label:
                tables.append(Table(path, rows, file, label, _first(_SPLIT, columns)))
        if tables:
            return tables
    return []


def read_table(asked: str, folder: Path) -> Table:
    """The table that `--labels PATH` or `--labels PATH:COLUMN` names, here or in the folder of images.

    Raises:
        UsageError: if it cannot be read, or does not say which column is the file, or the class.
    """
    path, column = _find(asked, folder)
    columns, rows = _read(path)
    if column and column not in columns:
        raise UsageError(f"--labels: {path} has no column {column!r}; {_of(columns)}")
    file = _first(_FILE, [name for name in columns if name != column]) or (columns[0] if column != columns[0] else "")
    rest = [name for name in columns if name not in (file, _first(_SPLIT, columns))]
    label = column or _first(LABEL_COLUMNS, rest) or (rest[0] if len(rest) == 1 else "")
    if not file or not label:
        raise UsageError(f"--labels: which column of {path} is the class? write {path}:COLUMN; {_of(columns)}")
    return Table(path, rows, file, label, _first(_SPLIT, [name for name in columns if name != label]))


def absolute(asked: str) -> str:
    """The same `--labels`, from whatever folder it is read later; one that lies in the folder of images stays."""
    for text, column in ((asked, ""), (asked.rpartition(":")[0], asked.rpartition(":")[2])):
        if text and (path := Path(text).expanduser()).is_file():
            return f"{path.resolve()}{':' if column else ''}{column}"
    return asked


def _find(asked: str, folder: Path) -> tuple[Path, str]:
    for text, column in ((asked, ""), (asked.rpartition(":")[0], asked.rpartition(":")[2])):
        for place in (Path(), folder):
            if text and (path := place / Path(text).expanduser()).is_file():
                return path, column
    raise UsageError(f"--labels {asked}: there is no such file, here or in {folder}")


def _of(columns: list[str]) -> str:
    named = ", ".join(repr(visible(name)) for name in columns[:12])
    return f"it has {named}{' and more' if len(columns) > 12 else ''}"


def _first(wanted: Iterable[str], columns: Iterable[str]) -> str:
    """The first of some names that is a column, in any case; "" if none is."""
    known = {name.strip().casefold(): name for name in columns}
    return next((known[name] for name in wanted if name in known), "")


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows. Raises UsageError."""
    try:
        text = read_limited(path, _LARGEST).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # of size or encoding
        raise UsageError(f"cannot read {path}: {_why(error)}") from error
    return _json_lines(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv(path, text)


def _why(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8 text; save it as UTF-8"
    return str(error)


def _csv(path: Path, text: str) -> tuple[list[str], list[dict[str, str]]]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV file: {error}") from error
    lines = [(number, line) for number, line in enumerate(lines, 1) if any(cell.strip() for cell in line)]
    if len(lines) < 2:
        raise UsageError(f"{path} holds no rows: a line of column names, then a line for each image")
    (_, columns), *rest = lines
    columns = [name.strip() for name in columns]
    if len(set(columns)) < len(columns) or len(columns) < 2:
        raise UsageError(f"the first line of {path} must name two columns or more, each once; {_of(columns)}")
    for number, line in rest:
        if len(line) != len(columns):
            raise UsageError(f"line {number} of {path} has {len(line)} cells, and the first one {len(columns)}")
    return columns, [dict(zip(columns, line, strict=True)) for _, line in rest]


def _json_lines(path: Path, text: str) -> tuple[list[str], list[dict[str, str]]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode())
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"line {number} of {path} is no JSON object")
        rows.append({str(k): "" if v is None else v if isinstance(v, str) else str(v) for k, v in row.items()})
    if not rows:
        raise UsageError(f"{path} holds no rows")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [{name: row.get(name, "") for name in columns} for row in rows]


class Matched(NamedTuple):
    """Which row each image has.

    Args:
        rows: of each image, None where no row names it.
        missing: names in the table of which no image is there.
    """

    rows: list[dict[str, str] | None]
    missing: list[str]


def match(table: Table, images: list[Path], folder: Path) -> Matched:
    """Find the row of each image: by its path below the table's folder or below `folder`, else by its name, else by its
    name without suffix.

    Raises:
        UsageError: if two rows name one image and say different things of it, or a name is that of several images.
    """
    exact, by_name, by_stem = {}, {}, {}  # spelling -> images
    for i, path in enumerate(images):
        for base in dict.fromkeys((folder, table.path.parent)):
            if path.is_relative_to(base):
                exact.setdefault(_normal(path.relative_to(base).as_posix()), []).append(i)
        by_name.setdefault(_normal(path.name), []).append(i)
        by_stem.setdefault(_normal(path.stem), []).append(i)
    rows: list[dict[str, str] | None] = [None] * len(images)
    missing = []
    for row in table.rows:
        name = _normal(row[table.file])
        found = dict.fromkeys(exact.get(name) or by_name.get(name) or by_stem.get(name) or ())
        if not found:
            missing.append(row[table.file])
            continue
        if len(found) > 1:
            raise UsageError(
                f"{table.path} names {visible(name)!r}, and there are {len(found)} such images: write their paths below"
                f" {folder}"
            )
        (i,) = found
        before = rows[i]
        if before is not None and before != row:
            raise UsageError(f"{table.path} names {visible(name)!r} twice, in rows that say different things")
        rows[i] = row
    return Matched(rows, missing)


def _normal(name: str) -> str:
    """A path as it is compared: "/" between parts, nothing in front, letters and accents composed."""
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    return name.removeprefix("./")
