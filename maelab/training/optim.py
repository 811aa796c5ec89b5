"""Optimizers and the learning-rate schedule. The schedule is a function of the step, so there is no state to resume."""

import math
import re

import torch
from torch import nn

from maelab import native
from maelab.config import BlocksConfig, LoopConfig

BETA1 = 0.9
MUON_MOMENTUM = 0.95


def layer_index(name: str, depth: int) -> int:
    """Which layer a parameter of the encoder belongs to (BEiT, arXiv 2106.08254; He et al. 2021, section A.1).

    Embeddings are layer 0, block i is layer i + 1, everything above the blocks is layer depth + 1.
    """
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else depth + 1


def build_optimizers(
    model: nn.Module, config: LoopConfig, layer_decay: float = 1.0, share: tuple[int, int] = (0, 1)
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks (Jordan et al. 2024) with AdamW for the rest.

    Weight decay spares norms, biases and what `model.no_weight_decay()` names. Each group carries `base_lr`, its rate
    at the top of the schedule, already multiplied by layer_decay ** (layers below the head). For `share` see Muon.
    """
    depth = len(getattr(model, "blocks", ()))
    muon_lr = config.muon_lr if isinstance(config, BlocksConfig) and config.optimizer == "muon" else None
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    groups: dict[tuple[float | None, float, float], list[nn.Parameter]] = {}  # by Muon's rate, None for AdamW
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim == 2 and "blocks." in name
        decay = 0.0 if parameter.ndim < 2 or name in spared else config.weight_decay
        scale = layer_decay ** (depth + 1 - layer_index(name, depth))
        groups.setdefault((muon_lr if matrix else None, decay, scale), []).append(parameter)

    adamw, muon = [], []
    for (rate, decay, scale), parameters in groups.items():
        top = config.blr * config.batch_size / 256 if rate is None else rate
        group = {"params": parameters, "weight_decay": decay, "lr": top * scale, "base_lr": top * scale}
        (adamw if rate is None else muon).append(group)
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        fast = any(getattr(module, "fast", None) is not None for module in model.modules())
        optimizers.append(native.Muon(muon, momentum=MUON_MOMENTUM, kernels=fast, share=share))  # as the blocks want
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=(BETA1, config.beta2), fused=True))
    return optimizers


def schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the base learning rate at a step: linear warm-up, then half a cosine to zero (arXiv 1608.03983)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its `base_lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["base_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def keep_learning_rate(optimizers: list[torch.optim.Optimizer], device: torch.device | None) -> None:
    """Keep the rates in tensors on a device, where a captured step reads them anew each time; None: in numbers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = rate if device is None else torch.tensor(rate, dtype=torch.float32, device=device)
            if "capturable" in group:  # AdamW's name for it
                group["capturable"] = device is not None
