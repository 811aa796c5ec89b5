"""The native kernels: built with the package, chosen by the processor, equal in every variant."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import setup
from maelab import native
from maelab.model.vit import Block
from maelab.native import library
from maelab.training import blocks

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "maelab" / "native" / "kernels"
X86 = tuple(setup.VARIANTS["x86_64"])
needs_kernels = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.reason()}")


def compare(tmp_path: Path, compiler: str = "cc") -> Path:
    """The program that runs two variants on the same random blocks, compiled."""
    program = tmp_path / "compare"
    source = ROOT / "tests" / "native" / "compare.c"
    command = [compiler, "-O2", "-Wall", "-Werror", f"-I{KERNELS}", str(source), "-o", str(program), "-ldl", "-lm"]
    subprocess.run(command, check=True)
    return program


@needs_kernels
@pytest.mark.parametrize("variant", [name for name in X86 if name != "portable"])
def test_every_variant_computes_the_same(tmp_path, variant: str):
    done = subprocess.run([compare(tmp_path), library.LIBRARY, variant, "portable"], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0 and done.stdout.count("\n") == 15, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None or shutil.which("qemu-aarch64") is None,
    reason="needs a compiler for aarch64 and qemu-aarch64",
)
def test_neon_computes_the_same_on_an_emulated_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "aarch64-linux-gnu-gcc")
    monkeypatch.chdir(ROOT)
    setup.compile_kernels(tmp_path / "kernels.so", tmp_path / "objects")
    program = compare(tmp_path, "aarch64-linux-gnu-gcc")
    emulated = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program, tmp_path / "kernels.so", "neon", "portable"]
    done = subprocess.run(emulated, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 15, done.stdout + done.stderr


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("variant", X86)
def test_the_tests_of_the_block_hold_for_every_variant(variant: str):
    environment = {**os.environ, "MAELAB_NATIVE": variant}
    code = "from maelab import native; print(native.reason())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if not done.stdout.startswith("native kernels on "):
        pytest.skip(done.stdout.strip())
    tests = [sys.executable, "-m", "pytest", "-n", "0", str(Path(__file__).with_name("test_fast.py"))]
    done = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


# ------------------------------------------------------------------------------------------------------------- building


@pytest.mark.slow
def test_a_wheel_trains_fast_where_there_is_no_compiler(tmp_path):
    """Built, unpacked into an empty folder, and used with nothing on the path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"maelab-[0-9.]+-py3-none-manylinux_2_28_(x86_64|aarch64)\.whl", wheel.name)
    place = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(place)], check=True)
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(place), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = "import maelab; from maelab import native; print(maelab.__file__); print(native.reason())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(place / "maelab" / "__init__.py"), native.reason()], done.stderr


@needs_kernels
def test_the_library_needs_no_newer_glibc_than_its_wheel_says():
    symbols = subprocess.run(["objdump", "-T", library.LIBRARY], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([0-9.]+)", symbols)}
    assert versions and max(versions) <= tuple(map(int, setup.MANYLINUX.removeprefix("manylinux_").split("_")))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_package_is_built_and_says_that_it_is_slow(tmp_path, compiler: str):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path,
        "--build-temp",
        tmp_path / "work",
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CC": compiler}, capture_output=True, text=True)
    assert done.returncode == 0 and not list(tmp_path.rglob("*.so"))
    assert f"cannot start the C compiler {compiler!r}" in done.stderr
    assert "Without kernels, training on this CPU is several times slower." in done.stderr


def test_a_variant_that_the_compiler_does_not_know_is_left_out(tmp_path, monkeypatch, capfd):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mamx-tile*) echo unknown >&2; exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("CFLAGS", "-O0")
    monkeypatch.chdir(ROOT)
    setup.compile_kernels(tmp_path / "kernels.so", tmp_path / "work")
    assert f"{compiler} cannot compile the kernels for amx: left out" in capfd.readouterr().err
    symbols = subprocess.run(["nm", "-D", tmp_path / "kernels.so"], capture_output=True, text=True, check=True).stdout
    assert "block_forward_portable" in symbols and "block_forward_amx" not in symbols


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was loaded yet, nor will it be."""
    monkeypatch.delenv("MAELAB_NATIVE", raising=False)
    for function in (library._served, library.load, library.start):
        function.cache_clear()
    yield
    for function in (library._served, library.load, library.start):
        function.cache_clear()


REFUSED = {
    "0": "switched off by MAELAB_NATIVE=0",
    "avx": "MAELAB_NATIVE is 'avx', neither 0 nor one of " + ", ".join(library.VARIANTS),
    "neon": "this processor has no units for neon",
}


@needs_kernels
@pytest.mark.parametrize("setting", REFUSED)
def test_without_kernels_the_plain_path_runs_and_says_why(anew, monkeypatch, setting: str):
    monkeypatch.setenv("MAELAB_NATIVE", setting)
    assert (native.available(), native.reason()) == (False, REFUSED[setting])
    block = Block(96, 3)
    assert blocks.install(block) == f"torch ({native.reason()})"
    block.fast = blocks.run_under_autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 5, 96)).shape == (2, 5, 96)


@needs_kernels
def test_a_variant_can_be_asked_for(anew, monkeypatch):
    monkeypatch.setenv("MAELAB_NATIVE", "portable")
    assert native.reason() == "native kernels on plain C"


@needs_kernels
def test_nothing_is_loaded_but_what_was_installed(anew, monkeypatch, tmp_path):
    """No folder of the user's, such as the cache, and no working directory is looked into."""
    for folder in (tmp_path, tmp_path / "native"):
        folder.mkdir(exist_ok=True)
        (folder / "_kernels.so").write_bytes(b"nonsense")
    monkeypatch.setenv("MAELAB_DATA", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert native.available()


@pytest.mark.parametrize("held", [None, b"", b"nonsense", "another"])
def test_a_library_that_is_missing_or_another_is_one_line(anew, monkeypatch, tmp_path, held: bytes | str | None):
    place = tmp_path / "_kernels.so"
    monkeypatch.setattr(library, "LIBRARY", place)
    if isinstance(held, bytes):
        place.write_bytes(held)
    elif held:
        subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", place], check=True)
    assert not native.available() and "\n" not in native.reason()
    if held is None:
        assert native.reason().startswith("no kernels were built at the installation: ")
    else:
        assert native.reason().startswith("cannot load the kernels: ")


# ----------------------------------------------------------------------------------------------------------- processes


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
    block.fast = blocks.run_under_autocast
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
