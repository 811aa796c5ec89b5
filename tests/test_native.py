"""Building and loading the native kernels: from private folders only, and with one line wherever that fails."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from maelab import native
from maelab.model.vit import Block
from maelab.native import library
from maelab.training import blocks

needs_kernels = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of this machine, as a file of the name that the cache expects."""
    folder = tmp_path_factory.mktemp("built")
    code = "from maelab import native; assert native.available(), native.reason()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MAELAB_DATA": str(folder)}, check=True)
    (file,) = (folder / "native").iterdir()
    return file


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that leaves a file, $MARK, as soon as it is loaded."""
    source = tmp_path_factory.mktemp("foreign") / "foreign.c"
    source.write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n"
        '__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("MARK"), "w")); }\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))], check=True)
    return source.with_suffix(".so")


def script(path: Path, commands: str) -> str:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return str(path)


def copying(built: Path) -> str:
    """What a compiler has to do, in a script's words, but at once."""
    return f'for last; do :; done\ncp "{built}" "$last"'


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a cache and temporary files of its own, in which nothing was loaded yet."""
    for name in ("above", "above/cache", "temporary"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path / "above" / "cache"))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    library.load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    library.load.cache_clear()


# ------------------------------------------------------------------------------------------------- what is not trusted


def mode(number: int, *names: str) -> Callable[[Path, Path], None]:
    def change(cache: Path, file: Path) -> None:
        for name in names:
            {"above": cache.parent, "cache": cache, "native": file.parent, "file": file}[name].chmod(number)

    return change


def linked(name: str) -> Callable[[Path, Path], None]:
    def change(cache: Path, file: Path) -> None:
        path = {"cache": cache, "native": file.parent, "file": file}[name]
        path.symlink_to(path.rename(cache.with_name("elsewhere")))

    return change


def given_away(name: str) -> Callable[[Path, Path], None]:
    return lambda cache, file: os.chown({"above": cache.parent, "native": file.parent, "file": file}[name], 12345, -1)


UNSAFE = {
    "a folder above that all can write to": mode(0o777, "above"),
    "a cache that all can write to": mode(0o777, "cache"),
    "a sticky cache, as /tmp, in which all can make 'native'": mode(0o1777, "cache", "native"),
    "a sticky folder of the file": mode(0o1777, "native"),
    "a cache of a group": mode(0o775, "cache"),
    "a folder of a group": mode(0o770, "native"),
    "a file of a group": mode(0o775, "file"),
    "a file that all can write to": mode(0o757, "file"),
    "a link for the cache": linked("cache"),
    "a link for the folder": linked("native"),
    "a link for the file": linked("file"),
}
GIVEN = {f"{name} of another user": given_away(name) for name in ("above", "native", "file")}


@needs_kernels
@pytest.mark.parametrize("case", [*UNSAFE, *(pytest.param(name, marks=needs_root) for name in GIVEN)])
def test_nothing_is_loaded_from_where_others_can_write(room, built, foreign, monkeypatch, capfd, case: str):
    file = room / "above" / "cache" / "native" / built.name
    file.parent.mkdir(mode=0o700)
    file.write_bytes(foreign.read_bytes())
    file.chmod(0o700)
    {**UNSAFE, **GIVEN}[case](room / "above" / "cache", file)
    monkeypatch.setenv("CC", script(room / "cc", copying(built)))
    assert native.available(), native.reason()
    assert not (room / "mark").exists(), "the foreign library has run"
    assert file.read_bytes() == foreign.read_bytes()
    assert not list((room / "temporary").iterdir())
    assert capfd.readouterr() == ("", "")  # no waiting, nothing to say


@needs_kernels
def test_from_a_private_folder_it_is_loaded(room, built, foreign):
    """Otherwise the test above would prove nothing."""
    file = room / "above" / "cache" / "native" / built.name
    file.parent.mkdir(mode=0o700)
    file.write_bytes(foreign.read_bytes())
    file.chmod(0o700)
    assert not native.available() and native.reason().startswith("cannot build the kernels: ")
    assert (room / "mark").exists()


@needs_kernels
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_built_stays_private_and_serves_again(room, built, monkeypatch, umask: int):
    (room / "shared").mkdir()
    (room / "shared").chmod(0o1777)
    monkeypatch.setenv("MAELAB_DATA", str(room / "shared" / "new" / "cache"))
    monkeypatch.setenv("CC", script(room / "cc", copying(built)))
    before = os.umask(umask)
    try:
        assert native.available(), native.reason()
    finally:
        os.umask(before)
    folder = room / "shared" / "new" / "cache" / "native"
    assert [path.name for path in folder.iterdir()] == [built.name]
    assert folder.stat().st_mode & 0o777 == 0o700 and not (folder / built.name).stat().st_mode & 0o022
    assert not (folder.parent.stat().st_mode | folder.parents[1].stat().st_mode) & 0o022
    library.load.cache_clear()
    monkeypatch.setenv("CC", "false")
    assert native.available(), native.reason()


@needs_kernels
def test_a_long_build_that_is_thrown_away_is_explained(room, built, monkeypatch, capfd):
    (room / "above" / "cache").chmod(0o777)
    monkeypatch.setenv("CC", script(room / "cc", copying(built)))
    monkeypatch.setattr(library, "NOTICED_SECONDS", 0.0)
    assert native.available()
    out, err = capfd.readouterr()
    why = f"{room / 'above' / 'cache'} is writable by others (chmod go-w)"
    assert (out, err) == ("", f"note: the native kernels were built for this process alone: {why}\n")
    assert native.available() and capfd.readouterr().err == ""


@needs_kernels
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", ""])
def test_without_a_cache_the_kernels_are_built_for_the_process(room, built, monkeypatch, place: str):
    (room / "file").touch()
    monkeypatch.setenv("MAELAB_DATA", str(room / place) if place else "")
    if not place:  # no home either
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setenv("CC", script(room / "cc", copying(built)))
    assert native.available(), native.reason()
    assert not list((room / "temporary").iterdir())


@needs_kernels
def test_without_any_private_folder_there_are_no_kernels(room, built, monkeypatch):
    for name in ("above/cache", "temporary"):
        (room / name).chmod(0o777)
    monkeypatch.setenv("CC", script(room / "cc", copying(built)))
    assert not native.available()
    assert native.reason().startswith("no private folder to build the kernels in: ")
    assert native.reason().count("writable by others") == 2 and "\n" not in native.reason()


# ----------------------------------------------------------------------------------------------------------- compilers


@needs_kernels
@pytest.mark.parametrize("words", ["{} --", "'{}' -pipe", "env X=1 {}"])
def test_a_compiler_of_several_words(room, built, monkeypatch, words: str):
    (room / "my tools").mkdir()
    compiler = script(room / ("my tools/cc" if "'" in words else "cc"), copying(built))
    monkeypatch.setenv("CC", words.format(compiler))
    assert native.available(), native.reason()


FAILING = {
    "no-such-compiler -O": "cannot start the C compiler 'no-such-compiler': No such file or directory; set CC",
    "'": "cannot read the command in CC: No closing quotation",
    "false": "the C compiler failed: exit status 1",
    "true": "the C compiler failed: exit status 0",
    "sh -c 'echo one >&2; echo two; echo three >&2; exit 3'": "the C compiler failed: three",
    "sh -c 'sleep 600 & sleep 600'": "the C compiler did not end within 0.2 s",
}


@needs_kernels
@pytest.mark.parametrize("compiler", FAILING)
def test_a_compiler_that_is_missing_fails_or_hangs_is_one_line(room, monkeypatch, capfd, compiler: str):
    monkeypatch.setenv("CC", compiler)
    if "sleep" in compiler:
        monkeypatch.setattr(library, "BUILD_SECONDS", 0.2)
    assert (native.available(), native.reason()) == (False, FAILING[compiler])
    assert capfd.readouterr() == ("", "")
    assert not list((room / "above" / "cache" / "native").iterdir())


@needs_kernels
def test_nothing_of_a_compiler_that_hangs_stays(room, monkeypatch):
    monkeypatch.setenv("CC", script(room / "cc", f"sleep 600 & echo $! > {room / 'child'}\nwait"))
    monkeypatch.setattr(library, "BUILD_SECONDS", 1.0)
    assert not native.available()
    status = Path(f"/proc/{(room / 'child').read_text().strip()}/status")
    assert not status.exists() or "zombie" in status.read_text()


@needs_kernels
def test_what_is_no_library_is_not_loaded(room, monkeypatch):
    monkeypatch.setenv("CC", script(room / "cc", 'for last; do :; done\necho nonsense > "$last"'))
    assert not native.available()
    assert native.reason().startswith("cannot build the kernels: ") and "\n" not in native.reason()


@pytest.mark.parametrize("setting", [("CC", "no-such-compiler"), ("MAELAB_NATIVE", "0")])
def test_without_kernels_the_plain_path_runs_and_says_why(room, monkeypatch, setting: tuple[str, str]):
    monkeypatch.setenv(*setting)
    native.start.cache_clear()
    block = Block(96, 3)
    try:
        assert blocks.install(block) == f"torch ({native.reason()})"
        block.fast = blocks.run
        with torch.autocast("cpu", torch.bfloat16):
            assert block(torch.randn(2, 5, 96)).shape == (2, 5, 96)
    finally:
        native.start.cache_clear()
    assert not native.available()


NO_AMX = "-mno-amx-tile -mno-amx-bf16"
OTHERS = {  # what leaves the compiler only these, and what the processor must have
    "AVX-512 FP16": (NO_AMX, "avx512_fp16"),
    "AVX-512 BF16": (f"{NO_AMX} -mno-avx512fp16 -DFAST_BF16", "avx512_bf16"),
    "AVX-512": (f"{NO_AMX} -mno-avx512bf16 -mno-avx512fp16", "avx512f"),
}


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("units", OTHERS)
def test_the_same_holds_on_lesser_units(tmp_path, units: str):
    options, needed = OTHERS[units]
    if needed not in library.cpu_flags():
        pytest.skip(f"this processor has no {needed}")
    compiler = script(tmp_path / "cc", f'exec cc "$@" {options}')
    environment = {**os.environ, "MAELAB_DATA": str(tmp_path / "cache"), "CC": compiler}
    code = "from maelab import native; print(native.reason())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"native kernels on {units}\n"
    chosen = "block_matches or any_size or muon_steps or same_bits or memory_held"
    tests = [sys.executable, "-m", "pytest", "-n", "0", "-k", chosen, str(Path(__file__).with_name("test_fast.py"))]
    done = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------------- processes


@needs_kernels
def test_processes_that_build_at_once_all_get_the_kernels(tmp_path, built):
    compiler = script(tmp_path / "cc", f"sleep 1\n{copying(built)}")  # slow enough for all to be in it
    code = "from maelab import native; print(native.available())"
    environment = {**os.environ, "MAELAB_DATA": str(tmp_path / "cache"), "CC": compiler}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=600)[0] for process in running] == ["True\n", "True\n"]
    assert [path.name for path in (tmp_path / "cache" / "native").iterdir()] == [built.name]


ALLOCATIONS = """
import ctypes, torch
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks u f k".split()]
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
def mapped():  # whether malloc asks the system for a large piece of memory, as it does unless it is told not to
    before = libc.mallinfo2().hblks
    libc.malloc(ctypes.c_size_t(1 << 27))
    return libc.mallinfo2().hblks > before
"""


USES = """
import os
from maelab import native
from maelab.training import blocks
from maelab.model.vit import Block
native.available(), native.reason(), native.refusal(96, 3, 384, 17)
assert mapped(), "asking"
def run():
    block = Block(96, 3)
    block.fast = blocks.run
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 5, 96))
def step():
    weight = torch.nn.Parameter(torch.randn(32, 32))
    weight.grad = torch.randn(32, 32)
    native.Muon([weight]).step()
torch.set_num_threads(1)
for use in (lambda: blocks.install(Block(96, 3)), run, step):
    pid = os.fork()
    if pid == 0:
        use()
        os._exit(mapped())
    assert os.waitpid(pid, 0)[1] == 0, use
"""


@needs_kernels
def test_asking_for_the_kernels_leaves_the_process_alone():
    subprocess.run([sys.executable, "-c", f"{ALLOCATIONS}assert mapped()\n{USES}"], check=True)
