"""Files and folders with timm's names, which the original MAE shares."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from maelab.errors import RunError, UsageError
from maelab.files import parse_json
from maelab.foreign.tensors import (
    Foreign,
    State,
    checked_colours,
    classifier_arguments,
    depth_of,
    encoder_arguments,
    fold_layer_scale,
    fold_normalisation,
    read_tensors,
)
from maelab.model import sincos_pos_embed
from maelab.weights import PATCH_WEIGHT

# Mean and deviation that the images of the original MAE and of DINOv2 have.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# A file of weights does not tell its heads. They are 64 wide in published ViTs, but in these: ViT-SO400M, H, g and G.
WIDER_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


def _unwrapped(found: State) -> tuple[State, list[str]]:
    """The model without what it was wrapped in (module. by data parallel training, encoder. or model. as a part of a
    larger one), and what that leaves out, in words."""
    prefixes = {name.removesuffix(PATCH_WEIGHT) for name in found if name.endswith("." + PATCH_WEIGHT)}
    if PATCH_WEIGHT in found or len(prefixes) != 1:
        return found, []
    (prefix,) = prefixes
    state = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    outside = sorted(name for name in found if not name.startswith(prefix))
    return state, [f"left out, not under {prefix!r}: {', '.join(outside)[:100]}"] if outside else []


def read_timm(file: Path, config: dict[str, Any] | None = None) -> Foreign:
    """A file with timm's names, which the original MAE shares. Its decoder is read where the file holds the original
    MAE's command: otherwise nothing says what the decoder predicts.

    Args:
        file: the weights.
        config: config.json of a folder of timm's.
    """
    found, metadata = read_tensors(file)
    found, notes = _unwrapped(found)
    scaled = any(name.endswith(".ls1.gamma") for name in found)
    if gated := next((name for name in found if ".mlp.w12." in name or ".mlp.fc1_g." in name), None):
        raise UsageError(f"{file} has gated MLPs ({gated}), which maelab's models do not have")
    own_mae = "norm_pix_loss" in metadata and "decoder_pred.weight" in found
    state = {n: value for n, value in found.items() if own_mae or not n.startswith(("decoder_", "mask_token"))}
    if any(name.startswith("decoder_") for name in found.keys() - state.keys()):
        notes.append("its decoder is left out")
    if "register_tokens" in state:  # DINOv2's own name
        state["reg_token"] = state.pop("register_tokens")
    try:
        state = fold_layer_scale(state)
        own = parse_json(metadata.get("maelab", "{}"))
        asked = {**(config or {}), **(config or {}).get("model_args", {})}
        embed_dim = state[PATCH_WEIGHT].shape[0]
        guessed = WIDER_HEADS.get(embed_dim, 0 if embed_dim % 64 else embed_dim // 64)
        num_heads = (own or asked).get("num_heads", guessed)
        if not num_heads:
            raise UsageError(
                f"{file} does not say how many heads its blocks of width {embed_dim} have; lay it into a folder of its"
                ' own with a config.json beside it, {"model_args": {"num_heads": N}}'
            )
        if (activation := asked.get("act_layer", "gelu")) != "gelu":
            raise UsageError(f"{file} has {activation} for an activation; maelab's models have GELU")
        if not own:
            assumed = "" if "num_heads" in asked else f"{num_heads} attention heads, "
            notes.append(f"{assumed}GELU and layer norms with 1e-6 assumed")
        tokens = state["pos_embed"].shape[1]
        no_embed_class = "reg_token" in state if own else math.isqrt(tokens) ** 2 == tokens
        if "cls_token" in state and no_embed_class:
            state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
        arguments = encoder_arguments(state, num_heads)
        positions, side = state["pos_embed"].shape[1] - arguments["class_token"], arguments["img_size"][0]
        if own:
            arguments["img_size"] = tuple(own["img_size"])
        elif (side // arguments["patch_size"]) ** 2 != positions:
            raise UsageError(
                f"{file} has {positions} positions, no square, and does not say how high and wide its grid is"
            )
        ratio = None
        if own_mae:
            arguments |= _original_decoder(state, metadata)
            ratio = float(metadata["mask_ratio"])
        else:
            arguments |= classifier_arguments(state)
            pool = arguments["global_pool"]
            if not own and arguments["num_classes"] and asked.get("global_pool", pool) != pool:
                raise UsageError(
                    f"{file} classifies from {asked['global_pool']!r}, which maelab's models do not do with its norms"
                )
            if not own and arguments["num_classes"] and pool == "token" and "global_pool" not in asked:
                notes.append("classification from the class token assumed")
        colours, said = _colours_of_timm(state, arguments, scaled, metadata, config)
        if not own:
            notes += said
            if colours:
                state = fold_normalisation(state, *colours, own_mae and not arguments["norm_pix_loss"])
        names = tuple(map(str, own.get("class_names", ())))
        kind = "MaskedAutoencoderViT" if own_mae else "VisionTransformer"
        return Foreign(kind, arguments, state, names, ratio, tuple(notes))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise RunError(
            f"{file} holds no Vision Transformer under timm's names ({type(error).__name__}: {error}); a model of"
            " transformers is given by its folder"
        ) from error


def _original_decoder(state: State, command: dict[str, str]) -> dict[str, Any]:
    """Arguments of the original MAE's decoder; all of its decoders have 16 heads."""
    if not 0 < float(command["mask_ratio"]) < 1:
        raise ValueError(f"mask_ratio {command['mask_ratio']}")
    return {
        "decoder_embed_dim": state["decoder_pred.weight"].shape[1],
        "decoder_depth": depth_of(state, "decoder_blocks."),
        "decoder_num_heads": 16,
        "norm_pix_loss": command["norm_pix_loss"] == "True",
    }


def _colours_of_timm(
    state: State, arguments: dict[str, Any], scaled: bool, command: dict[str, str], config: dict[str, Any] | None
) -> tuple[tuple[Sequence[float], Sequence[float]] | None, list[str]]:
    """Mean and deviation that the images of a file of timm's, the original MAE's or DINOv2's had, if not 0.5, and how
    that is known. `scaled`: it had layer scales."""
    channels, cfg = arguments["in_chans"], (config or {}).get("pretrained_cfg", {})
    if "mean" in cfg and "std" in cfg:
        return checked_colours(cfg["mean"], cfg["std"], channels)
    if channels != 3:
        return None, []
    grid = (arguments["img_size"][0] // arguments["patch_size"],) * 2
    fixed = sincos_pos_embed(arguments["embed_dim"], grid, arguments["class_token"])
    still = fixed.shape == state["pos_embed"].shape and torch.allclose(fixed, state["pos_embed"], atol=1e-3)
    if still or {"norm_pix_loss", "nb_classes"} & command.keys():
        return IMAGENET, ["colours as in the original MAE, by ImageNet's mean and deviation"]
    if scaled and arguments["patch_size"] == 14:
        return IMAGENET, ["colours as in DINOv2, by ImageNet's mean and deviation"]
    return None, ["colours assumed in [-1, 1]"]
