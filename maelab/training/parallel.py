"""Devices, processes and precision: the only module that knows torch's distributed package.

`maelab.training.ranks` starts the processes of a run; here each of them finds the others.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import P2POp, batch_isend_irecv, irecv, isend
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from maelab import native
from maelab.config import ComputeOptions, RunOptions
from maelab.errors import MaelabError, UsageError
from maelab.model.vit import Attention, Block
from maelab.training import blocks

MEETING = "MAELAB_MEETING"  # environment variable: where the processes of a run find each other, as a URL
_PATIENCE = timedelta(days=7)  # who started the processes notices one that has gone, and ends the others

# The gradient of a patch embedding of one channel has a dimension of size 1, whose stride means nothing.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


@dataclass(frozen=True)
class Engine:
    """What a process computes with, and its way to the other processes of the run.

    Args:
        device: its own.
        precision: 'fp32'; 'bf16' for matrix products in bfloat16; or 'native' for those of the native kernels alone.
        captures: whether whole training steps become CUDA graphs.
        sharded: whether the processes share the parameters out.
        global_rank: its number, from 0.
        world_size: how many processes there are.
    """

    device: torch.device
    precision: str
    global_rank: int = 0
    world_size: int = 1
    captures: bool = False
    sharded: bool = False

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.global_rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products inside are computed in the engine's precision."""
        return (
            torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, one process computes and the others wait: on CPUs it has the threads of all on its machine."""
        threads = torch.get_num_threads()
        shared = self.world_size > 1 and self.device.type == "cpu"
        torch.set_num_threads(threads * (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if shared else 1))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def joined(self, model: nn.Module) -> Any:
        """What a step calls in the place of a model on the device: itself, or with several processes a stand-in.

        The stand-in's methods are the model's; the gradients of what they return are averaged over the processes.
        """
        if self.world_size == 1:
            return model
        if self.sharded:  # block by block, so that one at a time is whole (Zhao et al. 2023, section 3.2)
            from torch.distributed.fsdp import fully_shard  # takes a second

            for block in (module for module in model.modules() if isinstance(module, Block)):
                fully_shard(block)
            return _Joined(fully_shard(_Named(model)))
        device_ids = None if self.device.type == "cpu" else [self.device]
        ddp = DistributedDataParallel(_Named(model), device_ids=device_ids, gradient_as_bucket_view=True)
        in_16_bits = torch.tensor(float(self.device.type == "cpu" and self.precision != "fp32"), device=self.device)
        if self.mean(in_16_bits) == 1:  # everywhere: processors may differ, and messages have to fit
            ddp.register_comm_hook(None, _averaged_in_16_bits)
        return _Joined(ddp)

    def apart(self, joined: Any) -> contextlib.AbstractContextManager[Any]:
        """Gradients made inside wait for those of the next part, before they are averaged over the processes."""
        if not isinstance(joined, _Joined):
            return contextlib.nullcontext()
        return _unsynchronised(joined.ddp) if self.sharded else joined.ddp.no_sync()

    def whole(self, state: Any) -> Any:
        """A state with every tensor on the CPU, and whole where it was shared out; then all processes have to ask."""
        whole = (lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t) if self.sharded else (lambda t: t)
        return tree_map_only(torch.Tensor, lambda t: whole(t).cpu(), state)

    def shared_out(self, tensor: torch.Tensor, like: Any) -> torch.Tensor:
        """A whole tensor, shared out as another of its shape is."""
        if not self.sharded or not hasattr(like, "placements") or tensor.shape != like.shape:
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(self.device), like.device_mesh, like.placements)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes, by element; every process gets the same."""
        if self.world_size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
            values /= self.world_size
        return values

    def exchange(self, shares: list[list[torch.Tensor]]) -> None:
        """Give every process the tensors of each: the first list holds those of process 0, and so on."""
        mine = self.global_rank
        others = [peer for peer in range(self.world_size) if peer != mine]
        # Each straight from place to place, both ways at once: nothing is packed.
        ways = [P2POp(isend, t.detach(), peer) for peer in others for t in shares[mine]]
        ways += [P2POp(irecv, t.detach(), peer) for peer in others for t in shares[peer]]
        for way in batch_isend_irecv(ways) if ways else ():
            way.wait()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What process `src` gave, anything that can be pickled, in every process."""
        if self.world_size == 1:
            return obj
        box = [obj]
        cpu = torch.device("cpu")  # a device may have no room for a whole training state beside the model
        torch.distributed.broadcast_object_list(box, src, device=cpu)
        return box[0]

    def first(self, read: Callable[[], Any]) -> Any:
        """What `read` returns in the first process, in every process; only there does anything have to lie on a disk.

        Raises:
            MaelabError: what `read` raises there, in every process.
        """
        found = error = None
        if self.is_global_zero:
            try:
                found = read()
            except MaelabError as problem:
                error = problem
        found, error = self.broadcast((found, error))
        if error is not None:
            raise error
        return found

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.mean(torch.zeros(1, device=self.device)).cpu()


def _averaged_in_16_bits(
    _: Any,
    bucket: torch.distributed.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    """Average gradients of products in 16 bits in 16 bits too: half as many bytes for the slow way between processes.

    As torch's bf16_compress_hook, which refuses CPUs.
    """
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(torch.distributed.get_world_size())
    work: Any = torch.distributed.all_reduce(sent, async_op=True)
    return work.get_future().then(lambda averaged: gradients.copy_(averaged.value()[0]))


@contextlib.contextmanager
def _unsynchronised(sharded: Any) -> Iterator[None]:
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


class _Named(nn.Module):
    """A model whose methods are called by name through `forward`, the only one that DistributedDataParallel watches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, name: str, *arguments: Any, **named: Any) -> Any:
        return getattr(self.model, name)(*arguments, **named)


class _Joined:
    """See `Engine.joined`."""

    def __init__(self, ddp: Any) -> None:
        self.ddp = ddp

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.ddp("__call__", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return partial(self.ddp, name)


def choose_precision(wanted: str, device: str, kernels: str = "auto") -> str:
    """What computes the matrix products: 'fp32', 'bf16' or 'native', see Engine.

    Args:
        wanted: 'fp32' or 'bf16', as asked for; or 'auto' for the fastest: bfloat16 where the GPU or the CPU has units
            for it, else float32 around the native kernels, whose numbers are of 16 bits.
        device: its type.
        kernels: 'torch' where the native kernels are not wanted.
    """
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device == "cpu" and native.torch_multiplies_bf16():
        return "bf16"
    return "native" if device == "cpu" and kernels == "auto" and native.available() else "fp32"


def _slowness() -> str:
    """How many times slower than float32 torch multiplies bfloat16 on this CPU, measured in a moment, in words."""

    def seconds(dtype: torch.dtype) -> float:
        factor, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(5):
            begun = time.perf_counter()
            torch.mm(factor, factor)
            times.append(time.perf_counter() - begun)
        return min(times)

    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    return f"{ratio:.0f} times slower than fp32 in torch on this processor"


def start_engine(options: ComputeOptions, precision: str = "auto") -> Engine:
    """Choose device and precision, and meet the other processes of the run if it has any.

    Args:
        options: device and threads; for a training devices and num_nodes, which else are 1.
        precision: 'auto', 'fp32' or 'bf16'.

    Raises:
        UsageError: if the device is not there, or there are several processes to meet and nobody started them.
    """
    options = options if isinstance(options, RunOptions) else RunOptions(**vars(options))
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < options.devices:
        raise UsageError(f"--devices {options.devices}: found {torch.cuda.device_count()} CUDA devices")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has none; use --device cpu")
    world_size = options.devices * options.num_nodes
    sharded = options.strategy == "fsdp" and world_size > 1
    if device == "mps" and world_size > 1:
        raise UsageError("--device mps: it serves one process; leave out --devices, or use --device cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif options.devices > 1 and device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.devices))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    precision = choose_precision(precision, device, "torch" if sharded else options.kernels)
    if world_size == 1:
        here = torch.device(device, 0) if device == "cuda" else torch.device(device)
        return Engine(here, precision, captures=device == "cuda" and options.compile != "off")
    here = torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    _meet(here, world_size)
    return Engine(here, precision, torch.distributed.get_rank(), world_size, sharded=sharded)


def _meet(device: torch.device, world_size: int) -> None:
    """Join the processes that `maelab.training.ranks` or torchrun started; it has been done if a run went before."""
    if not torch.distributed.is_initialized():
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        if "RANK" not in os.environ:
            raise UsageError(f"{world_size} processes were asked for, and nobody started them")
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, _, _ = next(rendezvous(os.environ.get(MEETING, "env://"), rank, size, timeout=_PATIENCE))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may still know processes that died
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"attempt-{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
    if (there := torch.distributed.get_world_size()) != world_size:
        raise UsageError(f"{there} processes were started; --devices times --num-nodes says {world_size}")


def leave() -> None:
    """Wait until all processes have done their work, and let go of them. Where there are no others, nothing happens."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def prepare(model: nn.Module, engine: Engine, options: ComputeOptions) -> str:
    """Set how the blocks of a model compute, for the hardware at hand or as forced by the options.

    Returns:
        One line that says what was chosen, e.g. 'cpu, bf16, native kernels on AMX, 2 threads'.
    """
    device, precision = engine.device.type, engine.precision
    several = device == "cuda" and engine.world_size > 1 and not engine.sharded  # whose steps are not captured
    compiled = options.compile == "on" or (options.compile == "auto" and several)
    for module in model.modules():
        if isinstance(module, Block):
            module.fast = None
            if compiled:
                module.compile()  # block by block: equal blocks share one compilation
        elif isinstance(module, Attention):
            module.form = options.attention
    kernels = ""
    if options.kernels == "auto" and device == "cpu" and precision != "fp32" and not (compiled or engine.sharded):
        kernels = blocks.install(model, always=precision == "native")  # a compiled block would pass them over
    attention = options.attention
    if attention == "auto":
        attention = "matmul" if device == "cpu" else "fused"
    in_torch = any(isinstance(module, Block) and module.fast is None for module in model.modules())
    if precision == "native":
        served = any(isinstance(module, Block) and module.fast is not None for module in model.modules())
        precision = "fp32, blocks in 16 bits" if served else "fp32"
    elif precision == "bf16" and device == "cpu" and in_torch and not native.torch_multiplies_bf16():
        precision = f"bf16 ({_slowness()})"
    chosen = [f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device, precision]
    chosen += [kernels] if kernels else []
    if in_torch:
        chosen += [f"{attention} attention"]
    chosen += ["compiled"] if compiled else []
    chosen += ["steps captured"] if engine.captures else []
    if device == "cpu":
        chosen += [f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"]
    if engine.world_size > 1:
        chosen += [f"{engine.world_size} processes" + ", which share the model out" * engine.sharded]
    return ", ".join(chosen)
