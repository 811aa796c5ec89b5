"""Moving encoder weights between models that differ in channels, patches, grid or head."""

from typing import Literal

import torch
import torch.nn.functional as F

from maelab.errors import UsageError
from maelab.model import MaskedAutoencoderViT, VisionTransformer, interpolate_pos_embed
from maelab.model.vit import Block

PATCH_WEIGHT = "patch_embed.proj.weight"
DECODER = ("decoder_", "mask_token")


def _shape(model: VisionTransformer) -> dict[str, int]:
    """What two encoders must share for the weights of one to mean the same in the other."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    return {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "MLP width": block.mlp.fc1.out_features,
        "register tokens": model.num_prefix_tokens - (model.cls_token is not None),
        "patch_size": model.patch_size,
    }


def adapt_channels(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Patch embedding (D, C, p, p) for another channel count: the sum over channels, spread evenly over the new
    ones, so that a grey image embeds as before. Nothing happens when the count fits."""
    if weight.shape[1] == in_chans:
        return weight
    grey = weight.sum(dim=1, keepdim=True)  # what a grey image, equal in all channels, meets
    return grey.repeat(1, in_chans, 1, 1) / in_chans


def resize_patch_embed(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Patch embedding (D, C, p, p) for patches of another size, (D, C, patch_size, patch_size), such that a patch and
    its bilinear enlargement B x to the larger of the two sizes give the same token, exactly.

    To larger patches this is the pseudo-inverse resize of FlexiViT (Beyer et al. 2022, arXiv 2212.08013, section 3.4),
    <B x, w_new> = <x, w>; to smaller ones it follows from <x, w_new> = <B x, w>, where FlexiViT would fit white noise.
    Resampling the weights themselves, bicubically say, would scale the tokens with the area of the patch.
    """
    D, C, p, _ = weight.shape
    if p == patch_size:
        return weight
    small, large = sorted((p, patch_size))
    pixels = torch.eye(small * small).reshape(-1, 1, small, small)
    enlarged = F.interpolate(pixels, size=(large, large), mode="bilinear", align_corners=False)
    transposed = enlarged.reshape(small * small, -1).double()  # B^T: (small^2, large^2)
    change = transposed.T if patch_size == small else torch.linalg.pinv(transposed).T  # (p^2, patch_size^2)
    new = weight.double().reshape(D * C, p * p) @ change
    return new.to(weight.dtype).reshape(D, C, patch_size, patch_size)


def load_encoder(
    model: VisionTransformer,
    source: VisionTransformer,
    *,
    patch_embed: Literal["inflate", "resize", "reinit"] = "inflate",
    pos_embed: Literal["interpolate", "reinit"] = "interpolate",
) -> list[str]:
    """Copy the encoder of `source` (a masked autoencoder or a classifier) into `model`, in place.

    Embedding, class token, blocks and, where both have one, the final norm are copied; head and decoder are not.

    Args:
        model: what to load into; it keeps its own initialisation where nothing fits.
        source: where from.
        patch_embed: when the channels differ, 'inflate' (see `adapt_channels`) or keep the new initialisation; with
            'resize' the patch size may differ too (see `resize_patch_embed`).
        pos_embed: when the grid differs, 'interpolate' or keep the new initialisation.

    Returns:
        What had to be adapted, one phrase each.

    Raises:
        UsageError: if width, depth, heads, MLP width or, unless it is resized, patch size differ.
    """
    given_shape = _shape(source)
    for name, ours in _shape(model).items():
        if ours != given_shape[name] and not (name == "patch_size" and patch_embed == "resize"):
            raise UsageError(
                f"the initial weights have {name} {given_shape[name]}, the new model {ours}; they must be equal"
            )
    adapted = []
    own, given = model.state_dict(), source.state_dict()
    for key in own:
        if key.startswith(("head.", "fc_norm.", *DECODER)) or key not in given:
            continue
        value = given[key]
        if key == PATCH_WEIGHT and model.patch_size != source.patch_size:
            old, new = source.patch_size, model.patch_size
            adapted.append(f"patches {old}x{old} -> {new}x{new} pixels: {patch_embed}")
            value = resize_patch_embed(value, new)
        if key.startswith("patch_embed.") and source.in_chans != model.in_chans:
            if key == PATCH_WEIGHT:
                adapted.append(f"patch embedding {source.in_chans} -> {model.in_chans} channels: {patch_embed}")
                value = adapt_channels(value, model.in_chans)
            if patch_embed == "reinit":
                continue
        if key == "pos_embed":
            new, old = int(model.cls_token is not None), int(source.cls_token is not None)
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


def load_autoencoder(model: MaskedAutoencoderViT, source: VisionTransformer) -> list[str]:
    """Copy what `source` has, encoder and decoder if it is an autoencoder, into `model`, in place.

    Args:
        model: what to load into. Where the source has no decoder, or one of another shape, it keeps its own.
        source: where from.

    Returns:
        What had to be adapted, one phrase each.

    Raises:
        UsageError: if the encoders do not fit; see `load_encoder`.
    """
    adapted = load_encoder(model, source)
    if not isinstance(source, MaskedAutoencoderViT) or _decoder(source) != _decoder(model):
        return [*adapted, "a new decoder"]
    own, given = model.state_dict(), source.state_dict()
    for key in own:
        if not key.startswith(DECODER):
            continue
        value = given[key]
        if key == "decoder_pos_embed":
            value = interpolate_pos_embed(value, source.grid_size, model.grid_size, model.num_prefix_tokens)
        if key.startswith("decoder_pred.") and source.in_chans != model.in_chans:
            value = value.unflatten(0, (-1, source.in_chans))  # rows lie as (row, column, channel) of a patch
            value = value.mean(dim=1, keepdim=True).repeat_interleave(model.in_chans, dim=1).flatten(0, 1)
        own[key] = value
    model.load_state_dict(own)
    return adapted


def _decoder(model: MaskedAutoencoderViT) -> tuple[int, ...]:
    """What two decoders must share."""
    block = model.decoder_blocks[0]
    assert isinstance(block, Block)
    width, heads, mlp = model.decoder_embed.out_features, block.attn.num_heads, block.mlp.fc1.out_features
    return width, len(model.decoder_blocks), heads, mlp, model.patch_size, model.num_prefix_tokens
