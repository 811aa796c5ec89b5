"""Feeds a parser with mutated inputs, in a process of its own, within limits of time, memory and files.

An input is a function of (target, seed, number), so each can be made again:

    python tests/torture/engine.py TARGET SEED NUMBER FILE      writes it into FILE
"""

import faulthandler
import functools
import importlib
import json
import mmap
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

INPUTS = int(os.environ.get("TORTURE_INPUTS", "100"))  # for each parser; `make torture` has 10,000
SEED = os.environ.get("TORTURE_SEED", "0")
LONG = INPUTS > 1_000
MEMORY = 3 << 30  # bytes of address space beyond what the process has at its start
KEPT = 20  # faults, after which a target ends

NUMBERS = (b"0", b"-1", b"1", b"1e400", b"-1e400", b"NaN", b"Infinity", b"9223372036854775807", b"18446744073709551616")
NUMBERS += (b"1e308", b"0.5", b"1000000", b"9" * 400, b"true", b"null", b'"x"', b"[]", b"{}", b"[[1]]", b'{"a":[1]}')
JSON_TOKENS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b'"\\ud800"', b'"\xff"', b'"<b>"')
BYTES = (0, 1, 0x7F, 0x80, 0xFF)
WORDS = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\x80\0\0\0",
    b"\0" * 8,
)


@dataclass(frozen=True)
class Target:
    """A parser of what comes from outside.

    Args:
        seeds: makes valid inputs, in an empty folder.
        feed: takes one input, in a folder that it may write into. Any exception but a MaelabError is a fault, as is
            an AssertionError of what must hold of the result.
        tokens: what its inputs are made of.
        says: how lines on stderr may begin.
        seconds, mebibytes: limits for one input: of the processor (ten times as many by the clock), and of memory.
        share: of the inputs that others get.
    """

    seeds: Callable[[Path], list[bytes]]
    feed: Callable[[bytes, Path], object]
    tokens: tuple[bytes, ...] = ()
    says: tuple[str, ...] = ("maelab: ",)
    seconds: float = 5.0
    mebibytes: int = 256
    share: float = 1.0


@dataclass
class Report:
    """What became of a target: inputs fed, how many were refused, the faults, seconds."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0  # of the processor
    faults: list[str] = field(default_factory=list)


class TooLong(BaseException):
    """An input took longer than it may."""


# ----------------------------------------------------------------------------------------------------------- mutation


def mutated(chance: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """One of the seeds, with one to six changes; now and then as it is, or nothing but noise."""
    kind = chance.random()
    if kind < 0.01:
        return chance.choice(seeds)
    if kind < 0.02:
        return chance.randbytes(chance.choice([0, 1, 7, 100, 3000]))
    content = bytearray(chance.choice(seeds))
    for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
        _change(chance, content, seeds, tokens)
    return bytes(content)


def _change(chance: random.Random, content: bytearray, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> None:
    near = min(len(content), 256) if chance.random() < 0.5 else len(content)  # headers matter most
    at = chance.randrange(near + 1)
    length = chance.choice([1, 1, 2, 4, 8, 64, len(content) // 2])
    match chance.randrange(11):
        case 0 | 1:
            if at < len(content):
                content[at] ^= 1 << chance.randrange(8)
        case 2:
            if at < len(content):
                content[at] = chance.choice(BYTES)
        case 3:
            content[at : at + 4] = chance.choice(WORDS)
        case 4:
            del content[at:]
        case 5:
            del content[at : at + length]
        case 6:
            content[at:at] = content[at : at + length] * chance.choice([1, 1, 2, 50])
        case 7:
            other = chance.choice(seeds)
            begin = chance.randrange(len(other) + 1)
            content[at : at + length] = other[begin : begin + length]
        case 8:
            content[at : at + chance.choice([0, length])] = chance.choice(tokens or WORDS)
        case 9:
            numbers = [found.span() for found in re.finditer(rb"-?\d+(\.\d+)?", bytes(content[: 1 << 14]))]
            if numbers:
                begin, end = chance.choice(numbers)
                content[begin:end] = chance.choice(NUMBERS)
        case 10:
            values = [found.span(1) for found in re.finditer(rb'[:\[,]\s*("[^"]*"|\w+)', bytes(content[: 1 << 14]))]
            if values:
                begin, end = chance.choice(values)
                content[begin:end] = chance.choice((*NUMBERS, b"[" * 2000, b'{"a":' * 50 + b"1" + b"}" * 50))


def made(name: str, seed: str, number: int, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Input number so and so of a target."""
    return mutated(random.Random(f"{name} {seed} {number}"), seeds, tokens)


# --------------------------------------------------------------------------------------------------------- one process


def _watch(scratch: Path, seen: list[str]) -> None:
    """Note whatever is written outside of `scratch`, started, connected to, or unpickled from here on."""
    inside = (str(scratch) + os.sep, os.devnull, "/proc/", "/dev/shm/")

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = given
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if not writes or isinstance(path, int):
                return
            paths: tuple[Any, ...] = (path,)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"):
            paths = given[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = given[:2]
        elif event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
            "pickle.find_class",
        ):
            seen.append(f"{event} {given!r}"[:300])
            return
        else:
            return
        for path in paths:
            full = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
            if full and not full.startswith(inside) and full != str(scratch):
                seen.append(f"{event} {full}")

    sys.addaudithook(note)


def _attack(module: str, name: str, seed: str, count: int, scratch: Path, answer: Any) -> NoReturn:
    """Feed a target; the process ends here."""
    sys.dont_write_bytecode = True
    target: Target = importlib.import_module(module).TARGETS[name]
    place = scratch / "work"
    place.mkdir()
    os.chdir(place)
    tempfile.tempdir = str(place)
    seeds = target.seeds(place)
    with open(scratch / "number", "w+b") as file:
        file.truncate(8)
        number = mmap.mmap(file.fileno(), 8)
    said = os.open(scratch / "stderr", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    warnings.simplefilter("always")
    seen: list[str] = []
    _watch(scratch, seen)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, stop)
    report, begun, read = Report(), time.process_time(), 0
    from maelab.errors import MaelabError

    for i in range(count):
        number[:8] = i.to_bytes(8, "little")
        content, problem = made(name, seed, i, seeds, target.tokens), ""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faulthandler.dump_traceback_later(10 * target.seconds, exit=True)
        signal.setitimer(signal.ITIMER_PROF, target.seconds)
        try:
            target.feed(content, place)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except MaelabError as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            report.refused += 1
            if len(str(error)) > 2000 or "should not happen" in str(error):
                problem = f"a message of {len(str(error))} characters: {str(error)[:200]}"
        except TooLong:
            problem = f"longer than {target.seconds:g} s\n{traceback.format_exc()[-1500:]}"
        except BaseException:
            signal.setitimer(signal.ITIMER_PROF, 0)
            problem = traceback.format_exc()[-1500:]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > target.mebibytes:
            problem = problem or f"took {grown} MiB"
        sys.stderr.flush()
        if os.fstat(said).st_size > read:
            text = os.pread(said, 1 << 20, read).decode(errors="replace")
            read = os.fstat(said).st_size
            if odd := [line for line in text.splitlines() if line.strip() and not line.startswith(target.says)]:
                problem = problem or f"on stderr: {odd[:5]}"
        if seen:
            problem = problem or f"did: {seen[:5]}"
            seen.clear()
        if problem:
            report.faults.append(f"{name} seed {seed} number {i}: {problem}")
            if len(report.faults) == KEPT:
                break
        report.inputs += 1
        if LONG and i % 2_000 == 1_999:
            answer.send(f"{name}: {i + 1} of {count}, {report.refused} refused, {len(report.faults)} faults")
    report.seconds = round(time.process_time() - begun, 1)
    answer.send(report)
    answer.close()
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------- from a test


def tell(text: str) -> None:
    """A line of progress, in the long version: past pytest's capture, which would keep it to the end."""
    if LONG and (place := os.environ.get("TORTURE_LOG")):
        with open(place, "a") as file:
            print(time.strftime("%H:%M:%S"), text, file=file)


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "maelab",
        "maelab.fitting",
        "maelab.cli",
        "maelab.tasks.features",
        "maelab.tasks.predict",
        "targets",
    ]
)


@functools.cache
def _serve() -> None:
    """Start the server that forks the processes, with the path of this one, without which it finds no targets."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ |= {} if before is None else {"PYTHONPATH": before}


def attack(module: str, name: str, scratch: Path, share: float) -> Report:
    """Feed a target in a process of its own.

    Returns:
        What became of it; a process that died is a fault, with the input it died of.
    """
    _serve()
    count = max(1, round(INPUTS * share))
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_attack, args=(module, name, SEED, count, scratch, theirs))
    process.start()
    theirs.close()
    report = None
    try:
        while not isinstance(report := ours.recv(), Report):
            tell(report)
    except EOFError:
        process.join()
        number = int.from_bytes((scratch / "number").read_bytes(), "little") if (scratch / "number").exists() else -1
        said = (scratch / "stderr").read_text(errors="replace")[-3000:] if (scratch / "stderr").exists() else ""
        fault = f"{name} seed {SEED} number {number}: the process ended with {process.exitcode}\n{said}"
        report = Report(inputs=number, faults=[fault])
    process.join()
    tell(f"{name}: done, {json.dumps(vars(report) | {'faults': len(report.faults)})}")
    return report


if __name__ == "__main__":
    name, seed, number, file = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    targets = importlib.import_module("targets").TARGETS
    out = Path(file).absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        content = made(name, seed, int(number), targets[name].seeds(Path(folder)), targets[name].tokens)
    out.write_bytes(content)
