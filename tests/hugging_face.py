"""Our parameter names and layout in Hugging Face's (transformers 5: ViT and ViTMAE), for the parity tests.

Written apart from `maelab.foreign`, so that one mistake cannot hide in both.
"""

import re

import torch
from torch import nn

RENAMES = (
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^blocks\.", "vit.layers."),
    (r"^(decoder_(?!blocks)|mask_token)", r"decoder.\1"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
)


def to_hugging_face(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state (or gradients, by parameter name) under Hugging Face's names, queries, keys and values apart."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = value
        else:
            result[name] = tensor
    return result


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every trainable parameter a random value: after the usual start biases are 0 and norms are 1, and a
    mistake in one of them would not show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of `loss` by the name of every trainable parameter; zeros where there is none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}
