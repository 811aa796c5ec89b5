"""Has the blocks of a model run in the native kernels, as long as they are as `maelab.model` builds them."""

import torch
from torch import nn

from maelab import native
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.model.vit import Attention, Block, DropPath, Mlp

LAYERS = tuple(  # what a block is made of, the outer before the inner
    (tuple(name.split(".")), kind)
    for name, kind in {
        "norm1": nn.LayerNorm, "attn": Attention, "attn.qkv": nn.Linear, "attn.proj": nn.Linear,
        "norm2": nn.LayerNorm, "mlp": Mlp, "mlp.fc1": nn.Linear, "mlp.fc2": nn.Linear, "drop_path": DropPath,
    }.items()
)  # fmt: skip


def changed(block: Block) -> str | None:
    """What of a block the native kernels would pass over: a layer of another kind (LoRA's, a parametrized one), a hook,
    or a forward of its own; None where there is nothing. Asked at every call: by dictionaries, in few microseconds."""
    for path, kind in LAYERS:
        layer: nn.Module = block
        for name in path:
            layer = layer.__dict__["_modules"][name]
        own = layer.__dict__
        if type(layer) is not kind:
            return f"{'.'.join(path)} is a {type(layer).__name__}"
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return f"{'.'.join(path)} has a hook"
        if "forward" in own:
            return f"{'.'.join(path)} has a forward of its own"
    if block.norm1.eps != block.norm2.eps:
        return "its norms differ in eps"
    return "there is a hook on all modules" if nn.modules.module._has_any_global_hook() else None


def _parameters(block: Block) -> list[torch.Tensor | None]:
    a, m = block.attn, block.mlp
    return [
        block.norm1.weight, block.norm1.bias, a.qkv.bias, a.proj.bias, block.norm2.weight, block.norm2.bias,
        m.fc1.bias, m.fc2.bias, a.qkv.weight, a.proj.weight, m.fc1.weight, m.fc2.weight,
    ]  # fmt: skip


def _refusal(block: Block, tokens: int) -> str | None:
    """Why the kernels do not serve a block, in a few words; None where they do."""
    if (what := changed(block)) is not None:
        return what
    width, heads, hidden = block.norm1.normalized_shape[0], block.attn.num_heads, block.mlp.fc1.out_features
    if (what := native.refusal(width, heads, hidden, tokens)) is not None:
        return what
    with torch.no_grad():  # one token tells
        y = native.run_block(
            torch.zeros(1, 1, width, dtype=torch.float32, device="cpu"), _parameters(block), heads, 1.0
        )
    return "its parameters are not float32 on the CPU in their usual shapes" if y is None else None


def run(block: Block, x: torch.Tensor, tail: int | None = None) -> torch.Tensor | None:
    """What `block(x, tail)` computes in the native kernels, where they serve it, and None elsewhere.

    Args:
        x: tokens (B, L, D).
        tail: how many of the last tokens to compute; None means all.

    Returns:
        (B, L or tail, D), float32; or None.
    """
    if torch.compiler.is_compiling() or changed(block) is not None:
        return None
    return native.run_block(x, _parameters(block), block.attn.num_heads, block.norm1.eps, tail, block.drop_path.scale)


def run_under_autocast(block: Block, x: torch.Tensor, tail: int | None = None) -> torch.Tensor | None:
    """`run` under bfloat16 autocast, None elsewhere."""
    asked = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return run(block, x, tail) if asked else None


def install(model: nn.Module, always: bool = False) -> str:
    """Have the blocks of a model run in the native kernels wherever their shapes allow.

    Args:
        model: with Blocks anywhere in it.
        always: they run natively from then on; or else, under bfloat16 autocast only.

    Returns:
        What computes them, e.g. 'native kernels on AMX' or 'torch (width 40 is no multiple of 32)'.
    """
    found = [(name, block) for name, block in model.named_modules() if isinstance(block, Block)]
    tokens, some_hidden = 1, False
    if isinstance(model, VisionTransformer):
        tokens = model.num_prefix_tokens + model.num_patches
        some_hidden = isinstance(model, MaskedAutoencoderViT) or model.patch_drop_rate > 0
    here = native.start() is not None
    without = native.reason() if not native.available() else "the system does not grant the use of AMX tiles"
    refusals: dict[str, str | None] = {}
    for name, block in found:
        seen = 1 if some_hidden and name.startswith("blocks.") else tokens  # an encoder may see fewer than all
        refusals[name] = _refusal(block, seen) if here else without
        block.fast = None if refusals[name] else run if always else run_under_autocast
    why = ", ".join(dict.fromkeys(reason for reason in refusals.values() if reason is not None))
    served = sum(reason is None for reason in refusals.values())
    if not served:
        return f"torch ({why or 'no blocks'})"
    text = native.reason()
    if tokens > native.MAX_TOKENS:
        text += f" up to {native.MAX_TOKENS} tokens"
    return text if served == len(found) else f"{text} in {served} of {len(found)} blocks, torch in the rest ({why})"
