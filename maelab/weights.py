"""Moving encoder weights between models that differ in channels, patch grid or head."""

from typing import Literal

import torch

from maelab.errors import UsageError
from maelab.model import VisionTransformer, interpolate_pos_embed
from maelab.model.vit import Block

PATCH_WEIGHT = "patch_embed.proj.weight"


def _shape(model: VisionTransformer) -> dict[str, int]:
    """What two encoders must share for the weights of one to mean the same in the other."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    return {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "MLP width": block.mlp.fc1.out_features,
        "patch_size": model.patch_size,
    }


def adapt_channels(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Patch embedding (D, C, p, p) for another channel count: the sum over channels, spread evenly over the new
    ones, so that a grey image embeds as before. Nothing happens when the count fits."""
    if weight.shape[1] == in_chans:
        return weight
    grey = weight.sum(dim=1, keepdim=True)  # what a grey image, equal in all channels, meets
    return grey.repeat(1, in_chans, 1, 1) / in_chans


def load_encoder(
    model: VisionTransformer,
    source: VisionTransformer,
    *,
    patch_embed: Literal["inflate", "reinit"] = "inflate",
    pos_embed: Literal["interpolate", "reinit"] = "interpolate",
) -> list[str]:
    """Copy the encoder of `source` (a masked autoencoder or a classifier) into `model`, in place.

    Embedding, class token, blocks and, where both have one, the final norm are copied; head and decoder are not.

    Args:
        model: what to load into; it keeps its own initialisation where nothing fits.
        source: where from.
        patch_embed: when the channels differ, 'inflate' (see `adapt_channels`) or keep the new initialisation.
        pos_embed: when the grid differs, 'interpolate' or keep the new initialisation.

    Returns:
        What had to be adapted, one phrase each.

    Raises:
        UsageError: if width, depth, heads, MLP width or patch size differ.
    """
    given_shape = _shape(source)
    for name, ours in _shape(model).items():
        if ours != given_shape[name]:
            raise UsageError(
                f"the initial weights have {name} {given_shape[name]}, the new model {ours}; they must be equal"
            )
    adapted = []
    own, given = model.state_dict(), source.state_dict()
    for key in own:
        if key.startswith(("head.", "fc_norm.")) or key not in given:
            continue
        value = given[key]
        if key.startswith("patch_embed.") and source.in_chans != model.in_chans:
            if key == PATCH_WEIGHT:
                adapted.append(f"patch embedding {source.in_chans} -> {model.in_chans} channels: {patch_embed}")
                value = adapt_channels(value, model.in_chans)
            if patch_embed == "reinit":
                continue
        if key == "pos_embed":
            new, old = model.num_prefix_tokens, source.num_prefix_tokens
            if source.grid_size != model.grid_size:
                shapes = "x".join(map(str, source.grid_size)) + " -> " + "x".join(map(str, model.grid_size))
                adapted.append(f"position embedding {shapes}: {pos_embed}")
                if pos_embed == "reinit":
                    continue
            grid = interpolate_pos_embed(value[:, old:], source.grid_size, model.grid_size, prefix_tokens=0)
            prefix = value[:, :old] if old == new else own[key][:, :new]
            value = torch.cat([prefix, grid], dim=1)
        own[key] = value
    model.load_state_dict(own)
    return adapted
