"""Archives and tables of images become a plain folder in the cache, which is read like any other.

Zip and tar files, WebDataset shards, Parquet files, and folders that Hugging Face's `datasets` saved. Nothing that an
archive says leads outside: only regular files with an image's suffix are written, under names that are checked.
"""

import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from maelab.data.layout import HEIF_SUFFIXES, PARTS, SUFFIXES, passed_over
from maelab.data.sources import cache_dir
from maelab.data.table import LABEL_COLUMNS
from maelab.errors import RunError, UsageError
from maelab.files import make_folder, read_json
from maelab.names import visible
from maelab.progress import heartbeat

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".parquet")
_IMAGES = {*SUFFIXES, *HEIF_SUFFIXES}
_TABLES = {".csv", ".jsonl"}
_LARGEST_IMAGE, _LARGEST_LABEL = 2**28, 2**16  # bytes of what is read as a whole
_NOTE = ".maelab.json"  # hidden, and so no image: where it came from
_LOOKED_AT = 2_000  # entries of a folder, until it is one of single images
_BOMB, _ALLOWED = 200, 2**30  # times its own size, and bytes that any archive may unpack to
_SPARE = 2**26  # bytes of the disk that stay free
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "photo", "picture")
_SPLIT = re.compile(rf"^({'|'.join(sorted(PARTS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_MAGIC = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif",
    b"\x93NUMPY": ".npy",
}  # fmt: skip


def find_root(spec: str) -> Path:
    """PATH of "folder:PATH"; of an archive or a table of images, the folder into which it is unpacked."""
    if not spec.startswith("folder:"):
        raise UsageError(f"--data {spec} is no folder of images; write --data folder:PATH")
    if not (path := spec.removeprefix("folder:")):
        raise UsageError("'folder:' names no folder; write folder:PATH")
    place = Path(path).expanduser()
    return unpacked(place) if is_archive(place) else place


def is_archive(path: Path) -> bool:
    """Whether a path is something to unpack, rather than a folder of image files."""
    if path.is_file():
        return path.name.lower().endswith(_ARCHIVES)
    return path.is_dir() and bool(_sources(path))


def _sources(path: Path) -> list[Path]:
    """The files to unpack: the path itself, or shards and tables in a folder with neither images nor other folders."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    parts = ("data", *PARTS)
    for folder in (path, *(path / name for name in parts)):
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if passed_over(entry.name):
                    continue
                suffix = PurePosixPath(entry.name).suffix.lower()
                other = entry.is_dir() and not (folder == path and entry.name in parts)
                if other or suffix in SUFFIXES or number > _LOOKED_AT:
                    return []
                if suffix in (".parquet", ".tar", ".arrow") and entry.is_file():
                    found.append(Path(entry.path))
    return sorted(found)


def unpacked(path: Path) -> Path:
    """The folder into which an archive is unpacked, once; again where it has changed since.

    Raises:
        UsageError: if it cannot be read, or nothing in it is an image.
        RunError: if it would fill the disk, or the cache cannot be written.
    """
    from filelock import FileLock

    sources = _sources(path)
    said = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    origin = str(path.resolve())
    name = hashlib.sha256(repr((origin, said)).encode(errors="surrogateescape")).hexdigest()[:32]
    place = cache_dir() / "unpacked" / name
    try:
        make_folder(place.parent)
        with FileLock(f"{place}.lock"):
            if not (place / _NOTE).is_file():
                part = place.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                try:
                    _unpack(sources, origin, part)
                    os.replace(part, place)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
                for note in place.parent.glob(f"*/{_NOTE}"):  # what the archive held before
                    if note.parent != place and _origin(note) == origin:
                        shutil.rmtree(note.parent, ignore_errors=True)
            inner = read_json(place / _NOTE).get("root", "")
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot unpack {path} into {place}: {why}; MAELAB_DATA names another cache") from error
    return place / inner


def _origin(note: Path) -> object:
    """Where an unpacked folder came from; None if nobody can say."""
    try:
        return read_json(note).get("origin")
    except RunError:
        return None


def _unpack(sources: list[Path], origin: str, part: Path) -> None:
    part.mkdir()
    size = sum(file.stat().st_size for file in sources)
    print(visible(f"maelab: unpacking {origin} once, into {part.with_suffix('')}"), file=sys.stderr, flush=True)
    writer = _Writer(part, max(_ALLOWED, _BOMB * size))
    splits = {file: _split_of(file) for file in sources}
    if len(set(splits.values())) < 2 or "train" not in splits.values():
        splits = dict.fromkeys(sources, "")  # one part alone is all of it
    writer.apart = len(sources) > 1 and not any(splits.values())
    for file in sources:
        try:
            read = _READERS[".tgz" if file.name.lower().endswith(".tar.gz") else file.suffix.lower()]
            read(file, splits[file], writer)
        except (UsageError, RunError):
            raise
        except Exception as error:  # whatever a reader raises on damaged bytes
            if isinstance(error, OSError) and error.errno is not None:  # the disk's; of pyarrow it has no number
                raise
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise UsageError(f"{file} is damaged, or no {file.suffix} file: {visible(why)}") from error
    if not writer.images:
        raise UsageError(f"nothing in {origin} is an image{writer.skipped()}")
    print(visible(f"maelab: unpacked {writer.images} images{writer.skipped()}"), file=sys.stderr, flush=True)
    root, inner = part, ""
    while not any(root.glob("*.*")) and len(below := [p for p in root.iterdir() if p.is_dir()]) == 1:
        deeper = [p for p in below[0].iterdir() if p.is_dir()]
        if not deeper:
            break  # a single class, which is said later
        root, inner = below[0], str(below[0].relative_to(part))
    (part / _NOTE).write_text(json.dumps({"origin": origin, "root": inner}))


def _split_of(file: Path) -> str:
    for text in (file.name, file.parent.name):
        if found := _SPLIT.match(text):
            return PARTS[found[1].casefold()]
    return ""


class _Writer:
    """Writes images below a folder, under checked names, as long as there is room."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.left = folder, most
        self.images, self.other = 0, Counter[str]()
        self.names: dict[str, str] = {}  # class -> the folder's name
        self.beat = heartbeat("unpacking images")
        self.apart = False  # whether each of several archives of loose images is a class

    def put(self, parts: Iterable[str], stream: IO[bytes]) -> None:
        """Copy a stream to a path of checked parts."""
        file = self.folder.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "xb") as out:
            while block := stream.read(2**20):
                self.left -= len(block)
                if self.left < 0:
                    raise RunError("it unpacks to far more than it has bytes, which no images do; unpack it by hand")
                if shutil.disk_usage(self.folder).free < len(block) + _SPARE:
                    raise RunError(f"no room left in {self.folder.parent}; MAELAB_DATA names another cache")
                out.write(block)
        self.images += file.suffix.lower() in _IMAGES
        self.beat(self.images)

    def class_folder(self, label: str | None) -> str:
        """A folder's name for a class: no path, not hidden, and another one for each class."""
        if label is None or not label.strip():
            return "unlabelled"
        if label not in self.names:
            name = unicodedata.normalize("NFC", re.sub(r'[\x00-\x1f\x7f/\\:<>"|?*]', "_", label.strip().rstrip(".")))
            name = name.encode(errors="replace")[:150].decode(errors="ignore") or "_"
            name = f"_{name}" if passed_over(name) or name.casefold() in (*PARTS, "unlabelled", "unlabeled") else name
            taken, number = {one.casefold() for one in self.names.values()}, 2  # to some systems "Cat" is "cat"
            free = name
            while free.casefold() in taken:
                free, number = f"{name}-{number}", number + 1
            self.names[label] = free
        return self.names[label]

    def skipped(self) -> str:
        return "; left out: " + ", ".join(f"{n} {what}" for what, n in self.other.most_common()) if self.other else ""


def _checked(name: str, writer: _Writer) -> list[str] | None:
    """The parts of a member's path; None, counted, if it is not to be written."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    suffix = PurePosixPath(name).suffix.lower()
    streams = os.name == "nt" and ":" in name
    if name.startswith(("/", "\\")) or ".." in parts or re.match("^[A-Za-z]:", name) or "\0" in name or streams:
        writer.other["paths that lead outside"] += 1
    elif (
        not parts
        or len(name.encode(errors="replace")) > 2_000
        or any(len(part.encode(errors="replace")) > 250 for part in parts)
    ):
        writer.other["names that are too long"] += 1
    elif any(map(passed_over, parts)):
        return None
    elif suffix not in _IMAGES | _TABLES:
        writer.other[suffix or "without suffix"] += 1
    else:
        return parts
    return None


# ------------------------------------------------------------------------------------------------------- zip and tar


def _zip(file: Path, split: str, writer: _Writer) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                writer.other["links"] += 1
            elif parts := _checked(member.filename, writer):
                if member.flag_bits & 1:
                    raise UsageError(f"{file} is encrypted; unpack it by hand")
                with archive.open(member) as stream:
                    _put_once([split] * bool(split) + parts, stream, writer)


def _put_once(parts: list[str], stream: IO[bytes], writer: _Writer) -> None:
    try:
        writer.put(parts, stream)
    except (FileExistsError, NotADirectoryError):
        writer.other["names that come twice"] += 1


def _tar(file: Path, split: str, writer: _Writer) -> None:
    """A tar file as it lies; or WebDataset's samples, whose members share all up to the first dot of their name."""
    with tarfile.open(file) as archive:
        samples = any(member.name.endswith((".cls", ".cls.txt")) for member in archive)
    with tarfile.open(file) as archive:
        if samples:
            _web_dataset(archive, file, split, writer)
            return
        for member in archive:
            if member.isdir():
                continue
            if not member.isfile():
                writer.other["links and devices"] += 1
            elif parts := _checked(member.name, writer):
                stream = archive.extractfile(member)
                assert stream is not None
                loose = [writer.class_folder(file.stem)] * (writer.apart and len(parts) == 1)
                _put_once([split] * bool(split) + loose + parts, stream, writer)


def _web_dataset(archive: tarfile.TarFile, file: Path, split: str, writer: _Writer) -> None:
    """The first image of each sample, in the folder of its class; samples are members that follow one another."""
    sample, number = "", 0
    image, label = None, None  # (suffix, content) and class of the sample

    def flush() -> None:
        nonlocal number, image, label
        if image:
            number += 1
            name = f"{_file_name(file)}-{number:07d}{image[0]}"
            _put_once([split] * bool(split) + [writer.class_folder(label), name], io.BytesIO(image[1]), writer)
        image, label = None, None

    for member in archive:
        folder, _, base = member.name.rpartition("/")
        stem, _, end = base.partition(".")
        if (key := f"{folder}/{stem}") != sample:
            flush()
            sample = key
        stream = archive.extractfile(member) if member.isfile() else None
        suffix = f".{end.lower()}"
        if stream and suffix in (".cls", ".cls.txt") and member.size <= _LARGEST_LABEL:
            label = stream.read().decode("utf-8", "replace")
        elif stream and image is None and suffix in _IMAGES and member.size <= _LARGEST_IMAGE:
            image = suffix, stream.read()
    flush()


# ------------------------------------------------------------------------------------------------- Parquet and Arrow


def _parquet(file: Path, split: str, writer: _Writer) -> None:
    _need_pyarrow(file)
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        image, label = _columns(schema, file)
        columns = [image] + [label] * bool(label)
        batches = table.iter_batches(batch_size=64, columns=columns)
        _rows(batches, image, label, _class_names(schema.metadata, file, label), file, split, writer)


def _arrow(file: Path, split: str, writer: _Writer) -> None:
    """A file that `datasets` saved: a stream of Arrow's batches."""
    _need_pyarrow(file)
    import pyarrow as pa

    with pa.memory_map(str(file)) as content, pa.ipc.open_stream(content) as stream:
        image, label = _columns(stream.schema, file)
        names = _class_names(stream.schema.metadata, file, label)
        _rows(stream, image, label, names, file, split, writer)


def _need_pyarrow(file: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(f"reading {file} needs pip install 'maelab[parquet]'") from None


def _columns(schema: Any, file: Path) -> tuple[str, str]:
    """The columns of the image and of its class; "" where there is none. Raises UsageError."""
    import pyarrow.types as kinds

    def holds_image(kind: Any) -> bool:
        struct = kinds.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
        return struct or kinds.is_binary(kind) or kinds.is_large_binary(kind)

    images = [field.name for field in schema if holds_image(field.type)]
    image = next((name for name in _IMAGE_COLUMNS if name in images), images[0] if len(images) == 1 else "")
    of = f"it has {', '.join(repr(visible(field.name)) for field in schema)}"
    if not image:
        raise UsageError(f"{file} has no column of images, or several; {of}")
    labels = [
        f.name for f in schema if kinds.is_integer(f.type) or kinds.is_string(f.type) or kinds.is_large_string(f.type)
    ]
    label = next((name for name in LABEL_COLUMNS if name in labels), labels[0] if len(labels) == 1 else "")
    if labels and not label:
        raise UsageError(f"which column of {file} is the class? name it 'label'; {of}")
    return image, label


def _class_names(metadata: dict[bytes, bytes] | None, file: Path, label: str) -> list[str]:
    """Of Hugging Face's ClassLabel, as Parquet and Arrow files carry it; [] if there are none."""
    texts = [(metadata or {}).get(b"huggingface", b"{}")]
    if (beside := file.with_name("dataset_info.json")).is_file():
        texts.append(json.dumps({"info": read_json(beside)}).encode())
    for text in texts:
        try:
            names = json.loads(text)["info"]["features"][label]["names"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return []


def _rows(
    batches: Iterable[Any], image: str, label: str, names: list[str], file: Path, split: str, writer: _Writer
) -> None:
    number = 0
    for batch in batches:
        values = batch.column(batch.schema.names.index(label)).to_pylist() if label else [None] * len(batch)
        for cell, value in zip(batch.column(batch.schema.names.index(image)).to_pylist(), values, strict=True):
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not content:
                writer.other["rows without the bytes of an image"] += 1
                continue
            if not (suffix := _suffix_of(content)):
                writer.other["rows of an unknown format"] += 1
                continue
            number += 1
            if isinstance(value, int):
                value = None if value < 0 else names[value] if value < len(names) else str(value)
            place = [split] * bool(split) + [writer.class_folder(value)] * bool(label)
            writer.put([*place, f"{_file_name(file)}-{number:07d}{suffix}"], io.BytesIO(content))


def _file_name(file: Path) -> str:
    return re.sub(r"[^\w-]", "_", file.stem)[:80]


def _suffix_of(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if content[4:8] == b"ftyp":
        return ".avif" if content[8:12] in (b"avif", b"avis") else ".heic"
    return next((suffix for magic, suffix in _MAGIC.items() if content.startswith(magic)), "")


_READERS: dict[str, Callable[[Path, str, _Writer], None]] = {
    ".zip": _zip, ".tar": _tar, ".tgz": _tar, ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip
