"""A pre-norm Transformer block as one autograd function over tensors: the numbers of bfloat16 autocast or nearer.

The parameters of a block go in one order everywhere here, that of PARAMETERS; only `qkvb`, the bias of queries, keys
and values, may be None.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch

from maelab.native.library import start, workspace

MAX_TOKENS = 1024  # a head's scores have to stay in cache
CHUNK_ROWS = 260  # tokens that a thread takes through a block at a time
PARAMETERS = ("n1w", "n1b", "qkvb", "projb", "n2w", "n2b", "fc1b", "fc2b", "qkvw", "projw", "fc1w", "fc2w")

_INTS = ["B", "L", "T", "D", "H", "F", "threads", "rows"]
_INPUTS = ["x", "scale1", "scale2", *PARAMETERS]
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _BlockArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in [*_INPUTS, "y", "packed", "kept", "dy", "dx", "grads", "work"]),
        ("need_weights", ctypes.c_int64),
    ]


def refusal(width: int, heads: int, hidden: int, tokens: int) -> str | None:
    """Why the kernels do not serve a block of this shape.

    Args:
        width: D; heads: how many share it; hidden: width of the MLP between its layers; tokens: L, of one sample.

    Returns:
        A few words, e.g. 'width 40 is no multiple of 32'; None where it is served.
    """
    if width % 32 or width < 1:
        return f"width {width} is no multiple of 32"
    if hidden % 32 or hidden < 1:
        return f"the MLP's width {hidden} is no multiple of 32"
    if width % heads or width // heads % 16:
        return f"the heads' width {width / heads:g} is no multiple of 16"
    if tokens > MAX_TOKENS:
        return f"{tokens} tokens are more than {MAX_TOKENS}"
    return None


def _held(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can read a tensor of this shape, once it is contiguous: float32, in this process's memory."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.shape == shape
        and not tensor.is_neg()
    )


def _fits(x: torch.Tensor, parameters: Sequence[torch.Tensor | None], heads: int, tail: int) -> bool:
    if x.ndim != 3 or parameters[-1] is None:
        return False
    (B, L, D), F = x.shape, parameters[-1].shape[-1]
    if B < 1 or not 0 < tail <= L or refusal(D, heads, F, L) is not None or not _held(x, (B, L, D)):
        return False
    shapes = ((D,), (D,), (3 * D,), (D,), (D,), (D,), (F,), (D,), (3 * D, D), (D, D), (F, D), (D, F))
    return all(
        _held(p, shape) if p is not None else name == "qkvb"
        for name, p, shape in zip(PARAMETERS, parameters, shapes, strict=True)
    )


def _arguments(numbers: dict[str, int | float], tensors: Sequence[torch.Tensor | None]) -> _BlockArguments:
    """What the kernels read; `tensors` in the order of _INPUTS, contiguous, and alive until the call has returned."""
    arguments = _BlockArguments(**numbers)
    for name, tensor in zip(_INPUTS, tensors, strict=True):
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())
    return arguments


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and where torch itself would put it: the kernels read packed weights by whole lines of 64 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


class _RunBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tail, heads, eps, keep, scale1, scale2, *parameters):
        library = start()
        assert library is not None
        B, L, D = x.shape
        F, threads = parameters[-2].shape[0], min(torch.get_num_threads(), B)
        sizes = {"B": B, "L": L, "T": tail, "D": D, "H": heads, "F": F, "threads": threads, "rows": CHUNK_ROWS}
        ctx.numbers = {**sizes, "eps": eps}
        tensors = [x, scale1, scale2, *parameters]
        arguments = _arguments(ctx.numbers, tensors)
        y = x.new_empty(B, tail, D)
        bits = {"dtype": torch.int16, "device": "cpu"}  # bfloat16 or IEEE half
        packed = torch.empty(4 * D * D + 2 * D * F, **bits)
        kept = torch.empty(library.block_kept(ctypes.byref(arguments)), **bits) if keep else None
        arguments.y, arguments.packed = y.data_ptr(), packed.data_ptr()
        arguments.kept = None if kept is None else kept.data_ptr()
        arguments.work = workspace(library.block_workspace(ctypes.byref(arguments), ctypes.c_int64(0))).data_ptr()
        library.block_forward(ctypes.byref(arguments))
        ctx.save_for_backward(packed, kept, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        library = start()
        assert library is not None
        # What was saved may come back from elsewhere: checkpointing computes it anew, other hooks fetch it.
        packed, kept, x, *others = ctx.saved_tensors  # asked for once: checkpointing gives them once
        packed, kept, x = _aligned(packed), _aligned(kept), _aligned(x)
        tensors = [x, *(None if t is None else _aligned(t) for t in others)]
        parameters = tensors[3:]
        arguments = _arguments(ctx.numbers, tensors)
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        D = x.shape[-1]
        sizes = [3 * D if p is None else p.numel() for p in parameters]
        need = ctx.needs_input_grad[7:]
        grads = x.new_empty(sum(sizes))
        arguments.packed, arguments.kept = packed.data_ptr(), kept.data_ptr()
        arguments.dy, arguments.dx, arguments.grads = dy.data_ptr(), dx.data_ptr(), grads.data_ptr()
        arguments.need_weights = any(need)
        arguments.work = workspace(library.block_workspace(ctypes.byref(arguments), ctypes.c_int64(1))).data_ptr()
        library.block_backward(ctypes.byref(arguments))
        shaped = [
            g.view(p.shape) if n and p is not None else None
            for g, p, n in zip(grads.split(sizes), parameters, need, strict=True)
        ]
        return dx, None, None, None, None, None, None, *shaped


def run_block(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor | None],
    heads: int,
    eps: float,
    tail: int | None = None,
    scale: Callable[[torch.Tensor], torch.Tensor | None] = lambda x: None,
) -> torch.Tensor | None:
    """Run a block, if all tensors are float32 on a CPU and in shapes that are served.

    Args:
        x: tokens (B, L, D).
        parameters: in the order of PARAMETERS; one that is not contiguous is copied.
        heads: number of attention heads.
        eps: of both norms.
        tail: compute the last `tail` tokens only, which still attend to all; None means all.
        scale: draws the factor of each sample of x, (B, 1, 1), None being one; called for each of the two branches, and
            only where the kernels run.

    Returns:
        (B, tail, D), float32; None where the kernels do not serve these tensors.

    Raises:
        ValueError: where `scale` gives anything else.
    """
    tail = x.shape[1] if tail is None else tail
    if not _fits(x, parameters, heads, tail) or start() is None:
        return None
    scales = [scale(x), scale(x)]
    if not all(s is None or _held(s, (x.shape[0], 1, 1)) for s in scales):
        raise ValueError(f"scale must give float32 factors of shape {(x.shape[0], 1, 1)} on the CPU, or None")
    tensors = [None if t is None else t.contiguous() for t in (*scales, *parameters)]  # a copy passes its gradient on
    return _RunBlock.apply(x.contiguous(), tail, heads, eps, torch.is_grad_enabled(), *tensors)
