"""The compiled kernels: built once by the machine's own compiler, loaded from no folder that others can write to."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from maelab.files import make_folder

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
NEEDS = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
BUILD_SECONDS = 120.0  # ten times what a slow machine takes
NOTICED_SECONDS = 1.0  # who waits longer than this for a build that is thrown away is told why


class _Refused(Exception):
    """Why there are no kernels, in one line."""


class _NotPrivate(Exception):
    """Why a folder or a file may not be trusted, in one line."""


def _cpu() -> dict[str, str]:
    """What Linux says of the first processor, by field."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_flags() -> set[str]:
    """The processor's features, as Linux names them."""
    return set(_cpu().get("flags", "").split())


def _cache_dir() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("MAELAB_DATA") or caches / "maelab").absolute()


# ---------------------------------------------------------------------------------------------------- what is private


def _check(path: Path, info: os.stat_result, above: bool = False) -> None:
    """Raise _NotPrivate where others could have written what `info` describes. Of a folder `above` the one that counts,
    root may be the owner, and others may write where the sticky bit keeps them from each other's entries."""
    if stat.S_ISLNK(info.st_mode):
        raise _NotPrivate(f"{path} is a symbolic link")
    if info.st_uid not in (0, os.geteuid()):
        raise _NotPrivate(f"{path} belongs to another user")
    if info.st_mode & 0o022 and not (above and info.st_mode & stat.S_ISVTX):
        raise _NotPrivate(f"{path} is writable by others (chmod go-w)")


def _check_folder(folder: Path) -> None:
    """Raise _NotPrivate unless nobody else can change what lies in `folder`, nor put another in its place.

    Each folder is opened inside the one above it, from the root on, and no link is followed: what is checked is what is
    used, however fast others rename. Once all are private nobody can rename any of them.
    """
    opened = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        path = Path("/")
        for name in folder.parts[1:]:
            _check(path, os.fstat(opened), above=True)
            path /= name
            inside = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=opened)  # of a link, this opens the link itself
            os.close(opened)
            opened = inside
        _check(path, os.fstat(opened))
    finally:
        os.close(opened)


def _private_cache() -> Path:
    """The folder that keeps what is built, made if it is missing. Links may lie above the cache folder, not in it.

    Raises:
        _NotPrivate: if others can write to it or to one above it.
        OSError: if it cannot be made or read.
    """
    cache = _cache_dir()
    folder = Path(os.path.realpath(cache.parent)) / cache.name / "native"
    make_folder(folder, 0o700)
    _check_folder(folder)
    return folder


# ----------------------------------------------------------------------------------------------------- build and load


def _compile(flags: list[str], out: Path) -> None:
    """Compile the kernels into the file `out`.

    Raises:
        _Refused: without a compiler, or where it fails or hangs.
    """
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise _Refused(f"cannot read the command in CC: {error}") from None
    log = out.with_suffix(".log")  # a pipe would stay open for as long as a child of the compiler lives
    with log.open("wb") as said:
        try:
            process = subprocess.Popen(
                [*compiler, *flags, str(SOURCE), "-o", str(out)],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise _Refused(f"cannot start the C compiler {compiler[0]!r}: {error.strerror}; set CC") from None
        try:
            status = process.wait(BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            raise _Refused(f"the C compiler did not end within {BUILD_SECONDS:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its children as well
                process.wait()
    if status or not out.exists():
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
        raise _Refused(f"the C compiler failed: {lines[-1]}")


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))  # finds the OpenMP runtime that torch has loaded: one pool of threads
    for function in (library.block_workspace, library.block_kept, library.muon_workspace):
        function.restype = ctypes.c_int64
    return library


def _from_cache(flags: list[str], name: str) -> ctypes.CDLL:
    """The kernels kept in the cache, built into it if they are missing.

    Raises:
        _NotPrivate, OSError: if the cache cannot be trusted or used.
    """
    folder = _private_cache()
    path = folder / name
    if not os.path.lexists(path):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            built = Path(place) / "kernels.so"
            _compile(flags, built)
            built.chmod(0o700)
            os.replace(built, path)  # two processes at once: the last one wins, both are whole
    _check(path, path.lstat())  # in a private folder: nobody can change it after this
    return _open(path)


def _for_this_process(flags: list[str], why: str) -> ctypes.CDLL:
    """The kernels built into a private folder that is gone afterwards."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="maelab-native-") as place:
        folder = Path(os.path.realpath(place))
        try:
            _check_folder(folder)
        except _NotPrivate as error:
            raise _Refused(f"no private folder to build the kernels in: {why}; {error}") from None
        _compile(flags, folder / "kernels.so")
        library = _open(folder / "kernels.so")
    if time.monotonic() - begun > NOTICED_SECONDS:
        print(f"note: the native kernels were built for this process alone: {why}", file=sys.stderr)
    return library


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, or None, and in one line what was loaded or why not. Nothing else changes."""
    if os.environ.get("MAELAB_NATIVE") == "0":
        return None, "switched off by MAELAB_NATIVE=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, "only for Linux on x86-64"
    try:
        processor = cpu_flags()
        if missing := NEEDS - processor:
            return None, f"this processor has no {sorted(missing)[0]}"
        # AMD's bfloat16 instruction does twice the work of a float32 multiply-add in the same time; Intel's, half.
        flags = [*FLAGS, "-DFAST_BF16"] if _cpu().get("vendor_id") == "AuthenticAMD" else FLAGS
        contents = [SOURCE.read_bytes(), *(f.encode() for f in [*flags, *sorted(processor)])]
        key = hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]
        try:
            library = _from_cache(flags, f"{key}.so")
        except (_NotPrivate, OSError, RuntimeError) as error:  # RuntimeError: no home folder
            library = _for_this_process(flags, str(error))
        if not library.granted():
            return None, "the system does not grant the use of AMX tiles"
        units = ctypes.c_char_p.in_dll(library, "units").value or b""
        return library, f"native kernels on {units.decode()}"
    except _Refused as refused:
        return None, str(refused)
    except (OSError, AttributeError, ValueError) as error:  # no library, or one without these functions
        return None, f"cannot build the kernels: {error}".splitlines()[0]


@functools.cache
def start() -> ctypes.CDLL | None:
    """The kernels ready to run, or None. From the first call on malloc keeps the memory that this process frees."""
    library = load()[0]
    return library if library is not None and library.start() == 0 else None


def available() -> bool:
    """Whether the kernels are there (built on the first call, in about two seconds). Asking changes nothing."""
    return load()[0] is not None


def reason() -> str:
    """One line: which kernels serve bfloat16 blocks on this CPU ('native kernels on AMX'), or why none do."""
    return load()[1]


_local = threading.local()


def workspace(size: int) -> torch.Tensor:
    """At least `size` bytes that this thread's calls share; kept, as fresh memory costs a page fault every 4 KB."""
    if getattr(_local, "work", None) is None or _local.work.numel() < size:
        _local.work = torch.empty(size, dtype=torch.uint8, device="cpu")
    return _local.work
