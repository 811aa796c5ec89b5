"""Transformer blocks in 16 bits on CPUs with AMX or AVX-512: the numbers of bfloat16 autocast or nearer, much faster.

Optional. `usable` says whether a block can run here; where it cannot (another processor, no C compiler, float32, a
shape that does not fit tiles) the plain code of `vit.py` runs, and `reason` says why in one line.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from maelab.model.vit import Block

SOURCE = Path(__file__).parents[1] / "native" / "kernels.c"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
NEEDS = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
MAX_TOKENS = 1024  # a head's scores have to stay in cache
CHUNK_ROWS = 260  # tokens that a thread takes through a block at a time

_INTS = ["B", "L", "T", "D", "H", "F", "threads", "rows"]
_PARAMETERS = ["n1w", "n1b", "qkvb", "projb", "n2w", "n2b", "fc1b", "fc2b", "qkvw", "projw", "fc1w", "fc2w"]
_POINTERS = ["x", "scale1", "scale2", *_PARAMETERS, "y", "packed", "kept", "dy", "dx", "grads", "work"]


class _BlockArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("need_weights", ctypes.c_int64),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ["weight", "momentum", "grad"]),
        *((name, ctypes.c_int64) for name in ["rows", "cols"]),
        *((name, ctypes.c_float) for name in ["lr", "decay"]),
    ]


def _cache_dir() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("MAELAB_DATA") or caches / "maelab") / "native"


def _cpu() -> dict[str, str]:
    """What Linux says of the first processor, by field."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _cpu_flags() -> set[str]:
    return set(_cpu().get("flags", "").split())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, or None, and in one line what was loaded or why not."""
    if os.environ.get("MAELAB_NATIVE") == "0":
        return None, "switched off by MAELAB_NATIVE=0"
    try:
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            return None, "only for Linux on x86-64"
        flags = _cpu_flags()
        if missing := NEEDS - flags:
            return None, f"this processor has no {sorted(missing)[0]}"
        source = SOURCE.read_bytes()
        # AMD's bfloat16 instruction does twice the work of a float32 multiply-add in the same time; Intel's, half.
        chosen = [*FLAGS, "-DFAST_BF16"] if _cpu().get("vendor_id") == "AuthenticAMD" else FLAGS
        key = hashlib.sha256(b"\0".join([source, *(f.encode() for f in [*chosen, *sorted(flags)])])).hexdigest()[:16]
        path = _cache_dir() / f"{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / "kernels.so"
                command = [os.environ.get("CC", "cc"), *chosen, str(SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(built, path)  # two processes at once: the last one wins, both are whole
        library = ctypes.CDLL(str(path))  # finds the OpenMP runtime that torch has loaded: one pool of threads
        for sizes in (library.block_workspace, library.block_kept, library.muon_workspace):
            sizes.restype = ctypes.c_int64
        if library.start():
            return None, "the system does not grant the use of AMX tiles"
        units = ctypes.c_char_p.in_dll(library, "units").value or b""
        return library, f"native kernels on {units.decode()}"
    except subprocess.CalledProcessError as error:
        return None, f"the C compiler failed: {error.stderr.decode(errors='replace').strip().splitlines()[-1:]}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"cannot build the kernels: {error}"


def available() -> bool:
    """Whether the kernels are there (built on the first call, in about two seconds)."""
    return _load()[0] is not None


def reason() -> str:
    """One line: which kernels serve bfloat16 blocks on this CPU ('native kernels on AMX'), or why none do."""
    return _load()[1]


def usable(block: "Block", x: torch.Tensor) -> bool:
    """Whether `run` can stand in for `block.forward` on x (B, L, D): CPU, bfloat16 autocast, float32 parameters."""
    D, H, F = x.shape[-1], block.attn.num_heads, block.mlp.fc1.out_features
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and x.dtype is torch.float32
        and block.norm1.weight.dtype is torch.float32
        and 0 < x.shape[1] <= MAX_TOKENS
        and x.shape[0] > 0
        and D % 32 == 0
        and F % 32 == 0
        and (D // H) % 16 == 0
        and not torch.compiler.is_compiling()
        and available()
    )


_local = threading.local()


def _workspace(size: int) -> torch.Tensor:
    """At least `size` bytes that this thread's calls share; kept, as fresh memory costs a page fault every 4 KB."""
    if getattr(_local, "work", None) is None or _local.work.numel() < size:
        _local.work = torch.empty(size, dtype=torch.uint8)
    return _local.work


class _RunBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tail, heads, eps, keep, scale1, scale2, *parameters):
        library = _load()[0]
        assert library is not None
        B, L, D = x.shape
        F = parameters[-2].shape[0]
        arguments = _BlockArguments(
            B=B, L=L, T=tail, D=D, H=heads, F=F, threads=min(torch.get_num_threads(), B), rows=CHUNK_ROWS, eps=eps
        )
        y = torch.empty(B, tail, D)
        packed = torch.empty(4 * D * D + 2 * D * F, dtype=torch.int16)  # as bits: bfloat16 or IEEE half
        kept = torch.empty(library.block_kept(ctypes.byref(arguments)), dtype=torch.int16) if keep else None
        tensors = dict(zip(["x", "scale1", "scale2", *_PARAMETERS], [x, scale1, scale2, *parameters], strict=True))
        for name, tensor in tensors.items():
            setattr(arguments, name, None if tensor is None else tensor.data_ptr())
        arguments.y, arguments.packed = y.data_ptr(), packed.data_ptr()
        arguments.kept = None if kept is None else kept.data_ptr()
        arguments.work = _workspace(library.block_workspace(ctypes.byref(arguments), ctypes.c_int64(0))).data_ptr()
        library.block_forward(ctypes.byref(arguments))
        ctx.save_for_backward(packed, kept, *tensors.values())
        ctx.arguments = arguments
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        library = _load()[0]
        assert library is not None
        _packed, _kept, x, _, _, *parameters = ctx.saved_tensors
        arguments = ctx.arguments
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        D = x.shape[-1]
        sizes = [D if p is None and i != 2 else 3 * D if p is None else p.numel() for i, p in enumerate(parameters)]
        need = ctx.needs_input_grad[7:]
        grads = torch.empty(sum(sizes))
        arguments.dy, arguments.dx, arguments.grads = dy.data_ptr(), dx.data_ptr(), grads.data_ptr()
        arguments.need_weights = any(need)
        arguments.work = _workspace(library.block_workspace(ctypes.byref(arguments), ctypes.c_int64(1))).data_ptr()
        library.block_backward(ctypes.byref(arguments))
        shaped = [
            g.view(p.shape) if n and p is not None else None
            for g, p, n in zip(grads.split(sizes), parameters, need, strict=True)
        ]
        return dx, None, None, None, None, None, None, *shaped


def run(block: "Block", x: torch.Tensor, tail: int | None = None) -> torch.Tensor:
    """What `block(x, tail)` computes: (B, L, D) -> (B, L or tail, D), float32."""
    scales = [block.drop_path.scale(x) for _ in range(2)]
    a, m = block.attn, block.mlp
    parameters = [
        block.norm1.weight, block.norm1.bias, a.qkv.bias, a.proj.bias, block.norm2.weight, block.norm2.bias,
        m.fc1.bias, m.fc2.bias, a.qkv.weight, a.proj.weight, m.fc1.weight, m.fc2.weight,
    ]  # fmt: skip
    tail = x.shape[1] if tail is None else tail
    return _RunBlock.apply(
        x.contiguous(), tail, a.num_heads, block.norm1.eps, torch.is_grad_enabled(), *scales, *parameters
    )


class Muon(torch.optim.Muon):
    """torch.optim.Muon whose step runs in the native kernels where they can: every matrix float32 on a CPU, its sides
    multiples of 32, and the defaults of Nesterov momentum and of the learning rate's adjustment."""

    @torch.no_grad()
    def step(self, closure=None):
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        matrices = [p for _, parameters in groups for p in parameters]
        library = _load()[0] if matrices and all(_fits(p) for p in matrices) else None
        first = self.param_groups[0]
        same = all(
            group["nesterov"] and group["ns_steps"] == 5 and group["adjust_lr_fn"] in (None, "original")
            and group["momentum"] == first["momentum"] and group["ns_coefficients"] == first["ns_coefficients"]
            for group, _ in groups
        )  # fmt: skip
        if library is None or closure is not None or not same:
            return super().step(closure)
        array = (_Matrix * len(matrices))()
        kept = []  # contiguous copies live until the call returns
        for slot, (group, p) in zip(array, [(group, p) for group, ps in groups for p in ps], strict=True):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            assert p.grad is not None
            kept.append(p.grad.contiguous())
            slot.weight, slot.momentum, slot.grad = (
                p.data_ptr(),
                state["momentum_buffer"].data_ptr(),
                kept[-1].data_ptr(),
            )
            slot.rows, slot.cols = p.shape
            slot.lr = group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            slot.decay = group["lr"] * group["weight_decay"]
        short, long = max(min(p.shape) for p in matrices), max(max(p.shape) for p in matrices)
        threads = min(torch.get_num_threads(), len(matrices))
        size = library.muon_workspace(ctypes.c_int64(short), ctypes.c_int64(long), ctypes.c_int64(threads))
        stride = (size - 4096) // threads
        library.muon(
            array, ctypes.c_int64(len(matrices)), ctypes.c_float(first["momentum"]),
            (ctypes.c_float * 3)(*first["ns_coefficients"]), ctypes.c_void_p(_workspace(size).data_ptr()),
            ctypes.c_int64(stride), ctypes.c_int64(threads),
        )  # fmt: skip
        return None


def _fits(p: torch.Tensor) -> bool:
    return (
        p.device.type == "cpu"
        and p.dtype is torch.float32
        and p.is_contiguous()
        and p.shape[0] % 32 == 0
        and p.shape[1] % 32 == 0
    )
