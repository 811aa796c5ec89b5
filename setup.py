"""Builds the native kernels with the package: one library that holds a variant for each kind of processor.

CC is the compiler, for another machine too (with _PYTHON_HOST_PLATFORM, of which the wheel takes its name). CFLAGS
comes last. Without a compiler the package is whole but for the library, and says at run time that it is slow and why.
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("maelab/native/kernels")
FLAGS = ["-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
VARIANTS = {
    "x86_64": {
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        "avx512_fp16": [*AVX512, "-mavx512bf16", "-mavx512fp16"],
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
        "avx512": AVX512,
        "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mtune=haswell"],
        "portable": ["-DPORTABLE"],
    },
    "aarch64": {"neon": [], "portable": ["-DPORTABLE"]},
}
MANYLINUX = "manylinux_2_28"  # the newest glibc symbols that the kernels use are older than this


def compile_kernels(out: Path, work: Path) -> None:
    """Compile every variant for the machine that the compiler compiles for, and link them into the library `out`.

    A variant that the compiler does not know is left out.

    Raises:
        CompileError: without a compiler, or where it cannot compile the portable variant.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    more = shlex.split(os.environ.get("CFLAGS", ""))
    try:
        said = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"cannot start the C compiler {compiler[0]!r}: {error}") from error
    machine = said.stdout.split("-")[0]
    if machine not in VARIANTS:
        raise CompileError(f"there are no kernels for {machine}")
    work.mkdir(parents=True, exist_ok=True)
    tasks = {"dispatch": [str(SOURCES / "dispatch.c")]}
    for name, flags in VARIANTS[machine].items():
        tasks[name] = [*flags, f"-DVARIANT={name}", str(SOURCES / "kernels.c")]
    running = {
        name: subprocess.Popen([*compiler, *FLAGS, *arguments, *more, "-c", "-o", str(work / f"{name}.o")])
        for name, arguments in tasks.items()
    }
    failed = [name for name, process in running.items() if process.wait()]
    if "portable" in failed or "dispatch" in failed:
        raise CompileError(f"{compiler[0]} cannot compile the kernels")
    for name in failed:
        print(f"maelab: {compiler[0]} cannot compile the kernels for {name}: left out", file=sys.stderr)
    objects = [str(work / f"{name}.o") for name in tasks if name not in failed]
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*compiler, *FLAGS, *more, "-shared", *objects, "-lm", "-o", str(out)], check=True)


class BuildKernels(build_ext):
    """A library for ctypes: its name tells no version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            compile_kernels(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "kernels")
        except CompileError as error:
            print(f"maelab: {error}. Without kernels, training on this CPU is several times slower.", file=sys.stderr)
            raise


class Wheel(bdist_wheel):
    """py3-none: any Python 3 of this system."""

    def get_tag(self) -> tuple[str, str, str]:
        system = super().get_tag()[2]
        if not list(Path(self.bdist_dir or ".").rglob("_kernels.so")):
            return "py3", "none", "any"
        if platform.libc_ver()[0] == "glibc":
            system = system.replace("linux_", f"{MANYLINUX}_", 1)
        return "py3", "none", system


if __name__ == "__main__":
    kernels = Extension("maelab.native._kernels", [], depends=[str(p) for p in SOURCES.glob("*")], optional=True)
    setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
