"""What another library saved, as tensors under our names; and what its shapes tell."""

import argparse
import math
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from maelab.errors import RunError, UsageError
from maelab.weights import PATCH_WEIGHT

PATCH_BIAS = "patch_embed.proj.bias"
MAX_WEIGHTS, MAX_JSON = 16 * 2**30, 2**24  # bytes of a file
NESTED = ("model", "state_dict", "model_ema", "state_dict_ema", "module")  # where training scripts keep the weights
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Foreign:
    """What another library saved, under our names.

    Args:
        model: 'MaskedAutoencoderViT' or 'VisionTransformer'.
        arguments: of its constructor.
        state: its weights, float32.
        class_names: of a classifier, if the source names them.
        mask_ratio: of a masked autoencoder.
        notes: what had to be assumed or changed, one phrase each.
    """

    model: str
    arguments: dict[str, Any]
    state: State
    class_names: tuple[str, ...] = ()
    mask_ratio: float | None = None
    notes: tuple[str, ...] = ()


def fold_normalisation(state: State, mean: Sequence[float], std: Sequence[float], pixels_out: bool = False) -> State:
    """A model for images (v - mean) / std, v in [0, 1], as one for images x = 2 v - 1: since nothing is padded, the
    patch embedding takes up the difference exactly.

    Args:
        state: our names.
        mean, std: one number per channel.
        pixels_out: the decoder predicts such pixels: its last layer is changed too.
    """
    middle, spread = torch.tensor(mean), torch.tensor(std)  # (C,)
    scale, shift = 0.5 / spread, (0.5 - middle) / spread  # theirs = ours * scale + shift
    weight, state = state[PATCH_WEIGHT], dict(state)
    state[PATCH_BIAS] = state[PATCH_BIAS] + torch.einsum("dcij,c->d", weight, shift)
    state[PATCH_WEIGHT] = weight * scale.reshape(1, -1, 1, 1)
    if pixels_out:  # rows of the prediction: row, column, channel
        repeats = weight.shape[2] * weight.shape[3]
        state["decoder_pred.weight"] = state["decoder_pred.weight"] / scale.repeat(repeats)[:, None]
        state["decoder_pred.bias"] = (state["decoder_pred.bias"] - shift.repeat(repeats)) / scale.repeat(repeats)
    return state


def fold_layer_scale(state: State) -> State:
    """A state whose blocks multiply what they add to the tokens, LayerScale's gamma (D,) (Touvron et al. 2021, arXiv
    2103.17239, section 2), as one without: the layers before take it up exactly."""
    state = dict(state)
    for name in [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block, gamma = name[: -len(".ls1.gamma")], state.pop(name)
        layer = f"{block}.attn.proj" if ".ls1." in name else f"{block}.mlp.fc2"
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * gamma[:, None]  # (D, K): one factor for each output
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * gamma
    return state


def weights_in(folder: Path) -> Path:
    file = next((f for f in (folder / "model.safetensors", folder / "pytorch_model.bin") if f.is_file()), None)
    if file is None:
        raise UsageError(f"{folder} has neither model.safetensors nor pytorch_model.bin (a model in parts is not read)")
    return file


def read_tensors(file: Path) -> tuple[State, dict[str, str]]:
    """The weights in a file, float32, and its metadata. Nothing larger than the file itself comes out of it.

    Of a pickle of the original MAE the metadata are its command's arguments, as text.
    """
    try:
        size = file.stat().st_size
        if size > MAX_WEIGHTS:
            raise ValueError(f"{size / 2**30:.0f} GiB, more than the {MAX_WEIGHTS >> 30} that are read")
        metadata: dict[str, str] = {}
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                content: Any = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        else:
            zipped = zipfile.is_zipfile(file)
            if zipped:
                with zipfile.ZipFile(file) as archive:
                    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                        raise ValueError("compressed records, which torch does not write")
            # The original MAE keeps its command's arguments, plain values, in a Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd pickles
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
            if isinstance(content, dict) and isinstance(content.get("args"), argparse.Namespace):
                metadata = {str(name): str(value) for name, value in vars(content["args"]).items()}
            for key in NESTED:
                if isinstance(content, dict) and isinstance(content.get(key), dict):
                    content = content[key]
        if not isinstance(content, dict) or not content:
            raise ValueError("no state dict")
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise ValueError(f"{str(name)[:80]!r} is no plain tensor")
            if value.numel() * value.element_size() > size:  # repeated by a stride of 0
                raise ValueError(f"{name[:80]!r} claims to be larger than the file")
    except Exception as error:  # decoders raise anything on damaged bytes
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"{file} is damaged or not safe to read: {why}") from error
    return {name: value.float() for name, value in content.items()}, metadata


def depth_of(state: State, prefix: str) -> int:
    """How many blocks there are; refused before any is built if that cannot be."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith(prefix))
    if depth > len(state):
        raise ValueError(f"{prefix}{depth - 1} without those before it")
    return depth


def encoder_arguments(state: State, num_heads: int) -> dict[str, Any]:
    """Arguments of the encoder in `state`, under our names, as its shapes tell them; square images are assumed."""
    embed_dim, in_chans, patch_size, _ = state[PATCH_WEIGHT].shape
    class_token = "cls_token" in state
    return {
        "img_size": (math.isqrt(state["pos_embed"].shape[1] - class_token) * patch_size,) * 2,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth_of(state, "blocks."),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "class_token": class_token,
    } | ({"reg_tokens": state["reg_token"].shape[1]} if "reg_token" in state else {})


def classifier_arguments(state: State) -> dict[str, Any]:
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    pool = "avg" if "fc_norm.weight" in state or "cls_token" not in state else "token"
    return {"num_classes": classes, "global_pool": pool, "learned_pos_embed": True}


def checked_colours(mean: Any, std: Any, channels: int) -> tuple[tuple[list[float], list[float]] | None, list[str]]:
    """Mean and deviation that images were normalised by, a number for each channel, and the same in words; None where
    they bring images to [-1, 1], as here."""
    mean, std = ([float(v) for v in (vs if isinstance(vs, list) else [vs] * channels)] for vs in (mean, std))
    if not len(mean) == len(std) == channels or not all(
        abs(m) < 1e3 and 1e-3 < s < 1e3 for m, s in zip(mean, std, strict=True)
    ):
        raise ValueError(f"image_mean {mean} and image_std {std} for {channels} channels")
    return None if set(mean + std) == {0.5} else (mean, std), [f"colours normalised by {mean} and {std}"]
