"""A device for machines that have none: its tensors are apart from the CPU's, as those of CUDA, and know no float64, as
those of MPS. What these refuse raises here too. The CPU computes underneath.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("strict", backend_module=_Module())
DEVICE = torch.device("strict:0")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}  # the only ways from one device to the other
INDEXING = {aten.index.Tensor, aten.index_put_.default}  # by places on the CPU too


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` is where it really is."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = {id(x.held): x for x in tensors if isinstance(x, OnDevice)}
    wanted = kwargs.get("device")
    if not ours and (wanted is None or torch.device(wanted).type != DEVICE.type):
        return func(*args, **kwargs)
    allowed = func in COPIES or (func in INDEXING and isinstance(args[0], OnDevice))
    if ours and not allowed and any(not isinstance(x, OnDevice) and x.dim() for x in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found strict and cpu")
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: expected a strict generator, but found cpu")
    to_cpu = wanted is not None and torch.device(wanted).type == "cpu"
    args, kwargs = tree_map_only(OnDevice, lambda x: x.held, (args, kwargs))
    result = func(*args, **(kwargs | ({"device": "cpu"} if wanted is not None else {})))
    if to_cpu or (func is aten.copy_.default and id(args[0]) not in ours):
        return result

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.float64:
            raise TypeError(f"{func}: the device has no float64")
        return ours[id(x)] if id(x) in ours else OnDevice(x)

    return tree_map_only(torch.Tensor, wrapped, result)


@contextmanager
def device() -> Iterator[torch.device]:
    """Inside, tensors and models can be moved to the device."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a moved parameter stays the same object, as usual
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) then begins on the CPU
    try:
        with _Device():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
