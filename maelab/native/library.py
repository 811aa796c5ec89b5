"""The kernels: built with the package in a variant for each kind of processor, the best of which is chosen here."""

import ctypes
import functools
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_kernels.so")
VARIANTS = ("amx", "avx512_fp16", "avx512_bf16", "avx512", "avx2", "neon", "portable")  # the fastest first


@dataclass(frozen=True)
class Kernels:
    """The functions of one variant, as in kernels/block.h, muon.h and peak.h, and the processor's units it runs on."""

    units: str
    block_forward: Any
    block_backward: Any
    block_workspace: Any
    block_kept: Any
    muon: Any
    muon_workspace: Any
    start: Any
    peak: Any


def _variant(library: ctypes.CDLL, name: str) -> Kernels:
    functions = {field: getattr(library, f"{field}_{name}") for field in Kernels.__annotations__ if field != "units"}
    for field in ("block_workspace", "block_kept", "muon_workspace", "start"):
        functions[field].restype = ctypes.c_int64
    functions["peak"].restype = ctypes.c_double
    return Kernels((ctypes.c_char_p.in_dll(library, f"units_{name}").value or b"").decode(), **functions)


@functools.cache
def _served() -> tuple[ctypes.CDLL, list[str]]:
    """The library, and the variants in it that this processor runs well, of those that MAELAB_NATIVE allows.

    Raises:
        OSError, AttributeError: if it is none for this machine, or not of this version.
    """
    library = ctypes.CDLL(str(LIBRARY))  # finds the OpenMP runtime that torch has loaded: one pool of threads
    library.serves.restype = ctypes.c_int64
    asked = os.environ.get("MAELAB_NATIVE", "")
    allowed = [asked] if asked in VARIANTS else VARIANTS
    built = [name for name in allowed if hasattr(library, f"block_forward_{name}")]
    return library, [name for name in built if library.serves(name.encode()) or name == asked == "portable"]


@functools.cache
def load() -> tuple[Kernels | None, str]:
    """The kernels for this processor, or None, and in one line which they are or why there are none.

    MAELAB_NATIVE=0 switches them off; the name of a variant asks for that one. Nothing else changes.
    """
    asked = os.environ.get("MAELAB_NATIVE", "")
    if asked == "0":
        return None, "switched off by MAELAB_NATIVE=0"
    if asked and asked not in VARIANTS:
        return None, f"MAELAB_NATIVE is {asked!r}, neither 0 nor one of {', '.join(VARIANTS)}"
    if not LIBRARY.exists():
        return None, "no kernels were built at the installation: install a C compiler, then maelab again"
    try:
        library, names = _served()
        if not names:
            return None, f"this processor has no units for {asked}" if asked else "this processor has no AVX2"
        kernels = _variant(library, names[0])
        return kernels, f"native kernels on {kernels.units}"
    except (OSError, AttributeError) as error:  # not a library for this machine, or not of this version
        return None, f"cannot load the kernels: {error}".splitlines()[0]


@functools.cache
def start() -> Kernels | None:
    """The kernels ready to run, or None. From the first call on malloc keeps the memory that this process frees."""
    kernels = load()[0]
    return kernels if kernels is not None and kernels.start() == 0 else None


def available() -> bool:
    """Whether the kernels are there. Asking changes nothing."""
    return load()[0] is not None


def reason() -> str:
    """One line: which kernels serve bfloat16 blocks on this CPU ('native kernels on AMX'), or why none do."""
    return load()[1]


def torch_multiplies_bf16() -> bool:
    """Whether this CPU has units with which torch's products in bfloat16 are faster than those in float32.

    AMX's are, and AMD's instruction of AVX-512. Intel's without AMX does half the work of a float32 multiply-add in the
    same time, and where there is none, bfloat16 is ten or more times slower.
    """
    try:
        return not {"amx", "avx512_bf16"}.isdisjoint(_served()[1])
    except (OSError, AttributeError):
        return torch.cpu._is_amx_tile_supported()


def peak_flops() -> float | None:
    """Floating-point operations a second of one core in the units that the kernels use, measured; None without kernels.

    A multiply-add counts as two. It is the bound of any product: factors and sums stay in registers.
    """
    kernels = start()
    return kernels.peak() if kernels else None


_local = threading.local()


def workspace(size: int) -> torch.Tensor:
    """At least `size` bytes that this thread's calls share; kept, as fresh memory costs a page fault every 4 KB."""
    if getattr(_local, "work", None) is None or _local.work.numel() < size:
        _local.work = torch.empty(size, dtype=torch.uint8, device="cpu")
    return _local.work
