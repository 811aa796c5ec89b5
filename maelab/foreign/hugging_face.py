"""Folders of transformers, and our weights under their names."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maelab.errors import RunError, UsageError
from maelab.files import read_json
from maelab.foreign.tensors import (
    MAX_JSON,
    Foreign,
    State,
    checked_colours,
    classifier_arguments,
    encoder_arguments,
    fold_layer_scale,
    fold_normalisation,
    read_tensors,
    weights_in,
)

# The names on the hub, which transformers 4 and 5 both read.
_TO_HUGGING_FACE = (
    (r"^blocks\.", "vit.encoder.layer."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),
    (r"^(decoder_|mask_token)", r"decoder.\1"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
# Those, DINOv2's, and the names inside transformers 5, with or without the prefix of a whole model.
_FROM_HUGGING_FACE = (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_UNUSED = r"((vit|dinov2|dinov2_with_registers)\.)?(pooler\.|embeddings\.mask_token$)"  # no part of the result
_DINOV2 = ("dinov2", "dinov2_with_registers")


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def to_hugging_face(state: State) -> State:
    """Our state under the names of ViTMAEForPreTraining or ViTForImageClassification."""
    result = {}
    for name, value in state.items():
        name = _renamed(name, _TO_HUGGING_FACE)
        if ".attn.qkv." not in name:
            result[name] = value
            continue
        for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
            result[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
    return result


def from_hugging_face(tensors: State) -> State:
    """The inverse of `to_hugging_face`; names inside transformers 5 are known too.

    Raises:
        KeyError: if queries, keys or values of a block are missing.
    """
    state = {_renamed(n, _FROM_HUGGING_FACE): value for n, value in tensors.items() if not re.match(_UNUSED, n)}
    for name in [name for name in state if ".attn.q." in name]:
        joined = torch.cat([state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"])
        state[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return state


def from_hub(name: str) -> Path:
    """The folder in Hugging Face's own cache that holds the model, fetched if need be."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise UsageError(f"hf:{name} needs the package huggingface_hub: pip install 'maelab[export]'") from None
    try:
        folder = Path(hf_hub_download(name, "config.json")).parent
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, "preprocessor_config.json")
        try:
            hf_hub_download(name, "model.safetensors")
        except EntryNotFoundError:
            hf_hub_download(name, "pytorch_model.bin")
    except Exception as error:  # of the network, of the hub, of the name
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"cannot get hf:{name} from the Hugging Face hub or its cache: {why}") from error
    return folder


def read_hugging_face(folder: Path) -> Foreign:
    """A folder of transformers: ViTMAE (with or without decoder), ViT (with or without classifier) or DINOv2, whose
    classifier, which reads the class token and the mean of the patches, is left out."""
    config = read_json(folder / "config.json", MAX_JSON)
    kind = config.get("model_type")
    if kind not in ("vit_mae", "vit", *_DINOV2):
        raise UsageError(
            f"{folder} is a model of type {kind!r}; of transformers, maelab reads vit_mae, vit, {' and '.join(_DINOV2)}"
        )
    if config.get("use_swiglu_ffn"):
        raise UsageError(f"{folder} has gated MLPs (SwiGLU), which maelab's models do not have")
    tensors, _ = read_tensors(weights_in(folder))
    try:
        epsilon = float(config.get("layer_norm_eps", 1e-6 if kind in _DINOV2 else 1e-12))  # transformers' defaults
        if config.get("hidden_act", "gelu") != "gelu" or epsilon > 2e-6:
            raise UsageError(f"{folder} has another activation or layer norm than maelab's models (gelu, 1e-6)")
        notes = () if epsilon == 1e-6 else (f"layer norms with {epsilon:g} taken for 1e-06",)
        state = fold_layer_scale(from_hugging_face(tensors))
        if kind in _DINOV2:
            notes += () if state.pop("head.weight", None) is None else ("its classifier is left out",)
            state.pop("head.bias", None)
        arguments = encoder_arguments(state, _count(config, "num_attention_heads"))
        size = config["image_size"]
        arguments["img_size"] = tuple(size) if isinstance(size, list) else (size, size)
        if "decoder_pred.weight" not in state:
            labels = config.get("id2label") or {}
            names = tuple(str(labels[str(i)]) for i in range(len(labels))) if "head.bias" in state else ()
            found = Foreign("VisionTransformer", arguments | classifier_arguments(state), state, names)
        else:
            arguments["decoder_embed_dim"] = state["decoder_pred.weight"].shape[1]
            arguments["decoder_depth"] = _count(config, "decoder_num_hidden_layers")
            arguments["decoder_num_heads"] = _count(config, "decoder_num_attention_heads")
            arguments["norm_pix_loss"] = bool(config["norm_pix_loss"])
            ratio = float(config["mask_ratio"])
            if not 0 < ratio < 1 or arguments["decoder_depth"] > len(state):
                raise ValueError(f"mask_ratio {ratio}, {arguments['decoder_depth']} decoder blocks")
            found = Foreign("MaskedAutoencoderViT", arguments, state, (), ratio)
        found = _in_our_colours(found, folder / "preprocessor_config.json")
        return replace(found, notes=(*notes, *found.notes))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise RunError(f"{folder} is damaged or no {kind} model: {type(error).__name__}: {error}") from error


def _count(config: dict[str, Any], key: str) -> int:
    if not isinstance(config[key], int) or config[key] < 1:
        raise ValueError(f"{key} is {config[key]!r}")
    return config[key]


def _in_our_colours(found: Foreign, file: Path) -> Foreign:
    """The model for images in [-1, 1], as its image processor's file says what it was made for."""
    if not file.is_file():
        return replace(found, notes=("no preprocessor_config.json: colours assumed in [-1, 1]",))
    config, channels = read_json(file, MAX_JSON), found.arguments["in_chans"]
    plain = not config.get("do_normalize", True)
    colours = ([0.0] * channels, [1.0] * channels) if plain else (config["image_mean"], config["image_std"])
    checked, notes = checked_colours(*colours, channels)
    if checked is None:
        return found
    pixels_out = found.model == "MaskedAutoencoderViT" and not found.arguments["norm_pix_loss"]
    return replace(found, state=fold_normalisation(found.state, *checked, pixels_out), notes=tuple(notes))
