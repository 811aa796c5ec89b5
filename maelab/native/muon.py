"""Muon (Jordan et al. 2024) with its products in the native kernels, or in what the processor multiplies fast."""

# pyright: reportPrivateImportUsage=false
# torch documents its operations on lists of tensors under their names with an underscore.

import ctypes

import torch

from maelab.native.library import start, torch_multiplies_bf16, workspace


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ["weight", "momentum", "grad"]),
        *((name, ctypes.c_int64) for name in ["rows", "cols"]),
        *((name, ctypes.c_float) for name in ["lr", "decay"]),
    ]


class Muon(torch.optim.Muon):
    """torch.optim.Muon, which multiplies in bfloat16, where the device has units for that.

    On a CPU its step runs in the native kernels, if `kernels` and they can: every matrix float32, its sides multiples
    of 32, and the defaults of Nesterov momentum and of the learning rate's adjustment. Elsewhere matrices of one shape
    are orthogonalised together, in float32 on CPUs whose products in bfloat16 are slower; a rate may be a tensor.

    Of several processes each moves its share of the matrices alone, and they exchange what they moved.
    """

    def __init__(self, params, *, kernels: bool = True, share: tuple[int, int] = (0, 1), **settings) -> None:
        """`share`: the number of this process, and how many there are."""
        super().__init__(params, **settings)
        self.kernels = kernels
        self.shares: list[list[torch.Tensor]] = [[] for _ in range(share[1])]  # of each process: its matrices
        work = [0] * share[1]
        for p in sorted((p for group in self.param_groups for p in group["params"]), key=lambda p: -p.numel()):
            least = work.index(min(work))
            self.shares[least].append(p)
            work[least] += p.numel() * min(p.shape)  # of the products, but for a factor
        self._mine = {id(p) for p in self.shares[share[0]]}

    def momenta(self) -> list[list[torch.Tensor]]:
        """Of each process: the momentum of its matrices."""
        return [[self._momentum(p) for p in share] for share in self.shares]

    @torch.no_grad()
    def step(self, closure=None):
        groups = [
            (group, [p for p in group["params"] if p.grad is not None and id(p) in self._mine])
            for group in self.param_groups
        ]
        matrices = [p for _, parameters in groups for p in parameters]
        first = self.param_groups[0]
        usual = closure is None and all(group["adjust_lr_fn"] in (None, "original") for group, _ in groups)
        same = all(
            group["nesterov"] and group["ns_steps"] == 5 and group["momentum"] == first["momentum"]
            and group["ns_coefficients"] == first["ns_coefficients"]
            for group, _ in groups
        )  # fmt: skip
        served = self.kernels and usual and same and matrices and all(self._fits(p) for p in matrices)
        library = start() if served else None
        if library is None:
            slow = any(p.is_cpu and p.dtype is torch.float32 for p in matrices) and not torch_multiplies_bf16()
            return self._step_in_torch(groups, None if slow else torch.bfloat16) if usual else super().step(closure)
        array = (_Matrix * len(matrices))()
        kept = []  # contiguous copies live until the call returns
        for slot, (group, p) in zip(array, [(group, p) for group, ps in groups for p in ps], strict=True):
            assert p.grad is not None
            kept.append(p.grad.contiguous())
            slot.weight, slot.momentum, slot.grad = p.data_ptr(), self._momentum(p).data_ptr(), kept[-1].data_ptr()
            slot.rows, slot.cols = p.shape
            slot.lr = group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            slot.decay = group["lr"] * group["weight_decay"]
        short, long = max(min(p.shape) for p in matrices), max(max(p.shape) for p in matrices)
        threads = min(torch.get_num_threads(), len(matrices))
        size = library.muon_workspace(ctypes.c_int64(short), ctypes.c_int64(long), ctypes.c_int64(threads))
        stride = (size - 4096) // threads
        library.muon(
            array, ctypes.c_int64(len(matrices)), ctypes.c_float(first["momentum"]),
            (ctypes.c_float * 3)(*first["ns_coefficients"]), ctypes.c_void_p(workspace(size).data_ptr()),
            ctypes.c_int64(stride), ctypes.c_int64(threads),
        )  # fmt: skip
        # Autograd sees no write through a pointer: a graph that holds an old value has to notice.
        torch.autograd.graph.increment_version([*matrices, *(self.state[p]["momentum_buffer"] for p in matrices)])
        return None

    def _momentum(self, p: torch.Tensor) -> torch.Tensor:
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return self.state[p]["momentum_buffer"]

    def _step_in_torch(self, groups, dtype: torch.dtype | None) -> None:
        """A step with the products in `dtype`; None: in that of the matrices."""
        for group, parameters in groups:
            if not parameters:
                continue
            a, b, c = group["ns_coefficients"]
            gradients, momenta = [p.grad for p in parameters], [self._momentum(p) for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            wanted = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for shape in dict.fromkeys(p.shape for p in parameters):
                same = [i for i, p in enumerate(parameters) if p.shape == shape]
                tall = shape[0] > shape[1]
                x = torch.stack([wanted[i] for i in same]).to(dtype)  # (matrices, rows, columns)
                x = x.mT if tall else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):
                    gram = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                moves = (x.mT if tall else x).to(parameters[same[0]].dtype) * -rate
                torch._foreach_add_([parameters[i] for i in same], list(moves.unbind()))

    def _fits(self, p: torch.Tensor) -> bool:
        momentum = self.state[p].get("momentum_buffer", p) if p in self.state else p
        assert p.grad is not None
        return (
            all(
                t.device.type == "cpu" and t.dtype is torch.float32 and t.shape == p.shape
                for t in (p, p.grad, momentum)
            )
            and all(t.layout is torch.strided and t.is_contiguous() for t in (p, momentum))
            and p.grad.layout is torch.strided
            and p.ndim == 2
            and p.numel() > 0
            and p.shape[0] % 32 == 0
            and p.shape[1] % 32 == 0
        )
