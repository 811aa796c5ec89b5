"""Moving encoder weights between models that differ in channels, patches, grid or head, and between libraries:
Hugging Face's ViTMAE and ViT, timm's ViT, the original MAE."""

import argparse
import contextlib
import math
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
import torch.nn.functional as F

from maelab.errors import RunError, UsageError
from maelab.files import parse_json, read_json
from maelab.model import VisionTransformer, interpolate_pos_embed, sincos_pos_embed
from maelab.model.vit import Block

PATCH_WEIGHT, PATCH_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation that the original MAE's images have
MAX_WEIGHTS, MAX_JSON = 16 * 2**30, 2**24  # bytes of a file
# A file of weights does not tell its heads. They are 64 wide in published ViTs, but in these: ViT-SO400M, H, g and G.
WIDER_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
NESTED = ("model", "state_dict", "model_ema", "state_dict_ema", "module")  # where training scripts keep the weights
State = dict[str, torch.Tensor]


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
        if key.startswith(("head.", "fc_norm.")) or key not in given:
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


# ----------------------------------------------------------------------------------------------- from other libraries


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


def read_foreign(path: str | Path) -> Foreign | None:
    """Read a model that another library saved; None if `path` is no such thing.

    Args:
        path: 'hf:NAME' for a model of the Hugging Face hub, a folder of transformers (ViTMAE or ViT) or of timm, or a
            file (.safetensors, .pth, .pt, .bin, .pth.tar) with timm's names or the original MAE's. Pickles are read
            with weights_only=True.

    The weights are changed, exactly, to take images in [-1, 1]: see `fold_normalisation`.

    Raises:
        UsageError: if it is a model that maelab's cannot express.
        RunError: if it is damaged, too large, or cannot be fetched.
    """
    path = _from_hub(str(path).removeprefix("hf:")) if str(path).startswith("hf:") else Path(path)
    if path.is_file() and path.name.endswith((".safetensors", ".pth", ".pt", ".bin", ".pth.tar")):
        return _read_timm(path)
    try:
        config = read_json(path / "config.json", MAX_JSON)
    except RunError:  # for others to name
        return None
    if "architecture" in config and "model_type" not in config:
        return _read_timm(_weights_in(path), config)
    return _read_hugging_face(path) if "model_type" in config else None


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


def _weights_in(folder: Path) -> Path:
    file = next((f for f in (folder / "model.safetensors", folder / "pytorch_model.bin") if f.is_file()), None)
    if file is None:
        raise UsageError(f"{folder} has neither model.safetensors nor pytorch_model.bin (a model in parts is not read)")
    return file


def _read_tensors(file: Path) -> tuple[State, dict[str, str]]:
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


def _depth(state: State, prefix: str) -> int:
    """How many blocks there are; refused before any is built if that cannot be."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith(prefix))
    if depth > len(state):
        raise ValueError(f"{prefix}{depth - 1} without those before it")
    return depth


def _encoder_arguments(state: State, num_heads: int) -> dict[str, Any]:
    """Arguments of the encoder in `state`, under our names, as its shapes tell them; square images are assumed."""
    embed_dim, in_chans, patch_size, _ = state[PATCH_WEIGHT].shape
    class_token = "cls_token" in state
    return {
        "img_size": (math.isqrt(state["pos_embed"].shape[1] - class_token) * patch_size,) * 2,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": _depth(state, "blocks."),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "class_token": class_token,
    }


def _classifier_arguments(state: State) -> dict[str, Any]:
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    pool = "avg" if "fc_norm.weight" in state or "cls_token" not in state else "token"
    return {"num_classes": classes, "global_pool": pool, "learned_pos_embed": True}


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


def _read_timm(file: Path, config: dict[str, Any] | None = None) -> Foreign:
    """A file with timm's names, which the original MAE shares. Its decoder is read where the file holds the original
    MAE's command: otherwise nothing says what the decoder predicts.

    Args:
        file: the weights.
        config: config.json of a folder of timm's.
    """
    found, metadata = _read_tensors(file)
    found, notes = _unwrapped(found)
    own_mae = "norm_pix_loss" in metadata and "decoder_pred.weight" in found
    state = {n: value for n, value in found.items() if own_mae or not n.startswith(("decoder_", "mask_token"))}
    if len(state) < len(found):
        notes.append("its decoder is left out")
    try:
        own = parse_json(metadata.get("maelab", "{}"))
        embed_dim = state[PATCH_WEIGHT].shape[0]
        guessed = WIDER_HEADS.get(embed_dim, 0 if embed_dim % 64 else embed_dim // 64)
        num_heads = own["num_heads"] if own else guessed
        if not num_heads:
            raise UsageError(
                f"{file} does not say how many heads its blocks of width {embed_dim} have;"
                " give a folder of transformers or of maelab export --format safetensors"
            )
        if not own:
            notes.append(f"{num_heads} attention heads, GELU and layer norms with 1e-6 assumed")
        tokens = state["pos_embed"].shape[1]
        if not own and "cls_token" in state and math.isqrt(tokens) ** 2 == tokens:  # timm's no_embed_class
            state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
        arguments = _encoder_arguments(state, num_heads)
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
            arguments |= _classifier_arguments(state)
            if not own and arguments["num_classes"] and arguments["global_pool"] == "token":
                notes.append("classification from the class token assumed")
        colours, said = _colours_of_timm(state, arguments, metadata, config)
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
        "decoder_depth": _depth(state, "decoder_blocks."),
        "decoder_num_heads": 16,
        "norm_pix_loss": command["norm_pix_loss"] == "True",
    }


def _colours_of_timm(
    state: State, arguments: dict[str, Any], command: dict[str, str], config: dict[str, Any] | None
) -> tuple[tuple[Sequence[float], Sequence[float]] | None, list[str]]:
    """Mean and deviation that the images of a file of timm's or the original MAE's had, if not 0.5, and how that is
    known."""
    channels, cfg = arguments["in_chans"], (config or {}).get("pretrained_cfg", {})
    if "mean" in cfg and "std" in cfg:
        return _checked_colours(cfg["mean"], cfg["std"], channels)
    if channels != 3:
        return None, []
    grid = (arguments["img_size"][0] // arguments["patch_size"],) * 2
    fixed = sincos_pos_embed(arguments["embed_dim"], grid, arguments["class_token"])
    still = fixed.shape == state["pos_embed"].shape and torch.allclose(fixed, state["pos_embed"], atol=1e-3)
    if still or {"norm_pix_loss", "nb_classes"} & command.keys():
        return IMAGENET, ["colours as in the original MAE, by ImageNet's mean and deviation"]
    return None, ["colours assumed in [-1, 1]"]


# ------------------------------------------------------------------------------------------------------- Hugging Face

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
# Those and the names inside transformers 5, with or without the prefix of a whole model.
_FROM_HUGGING_FACE = (
    (r"^vit\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
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
)
_UNUSED = ("pooler.", "vit.pooler.", "embeddings.mask_token", "vit.embeddings.mask_token")  # no part of the result


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
    state = {_renamed(n, _FROM_HUGGING_FACE): value for n, value in tensors.items() if not n.startswith(_UNUSED)}
    for name in [name for name in state if ".attn.q." in name]:
        joined = torch.cat([state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"])
        state[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return state


def _from_hub(name: str) -> Path:
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


def _read_hugging_face(folder: Path) -> Foreign:
    """A folder of transformers: ViTMAE (with or without decoder) or ViT (with or without classifier)."""
    config = read_json(folder / "config.json", MAX_JSON)
    kind = config.get("model_type")
    if kind not in ("vit_mae", "vit"):
        raise UsageError(f"{folder} is a model of type {kind!r}; of transformers, maelab reads vit_mae and vit")
    tensors, _ = _read_tensors(_weights_in(folder))
    try:
        epsilon = float(config.get("layer_norm_eps", 1e-12))  # transformers' default
        if config.get("hidden_act", "gelu") != "gelu" or epsilon > 2e-6:
            raise UsageError(f"{folder} has another activation or layer norm than maelab's models (gelu, 1e-6)")
        notes = () if epsilon == 1e-6 else (f"layer norms with {epsilon:g} taken for 1e-06",)
        state = from_hugging_face(tensors)
        arguments = _encoder_arguments(state, _count(config, "num_attention_heads"))
        size = config["image_size"]
        arguments["img_size"] = tuple(size) if isinstance(size, list) else (size, size)
        if "decoder_pred.weight" not in state:
            labels = config.get("id2label") or {}
            names = tuple(str(labels[str(i)]) for i in range(len(labels))) if "head.bias" in state else ()
            found = Foreign("VisionTransformer", arguments | _classifier_arguments(state), state, names)
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
    checked, notes = _checked_colours(*colours, channels)
    if checked is None:
        return found
    pixels_out = found.model == "MaskedAutoencoderViT" and not found.arguments["norm_pix_loss"]
    return replace(found, state=fold_normalisation(found.state, *checked, pixels_out), notes=tuple(notes))


def _checked_colours(mean: Any, std: Any, channels: int) -> tuple[tuple[list[float], list[float]] | None, list[str]]:
    """Mean and deviation that images were normalised by, a number for each channel, and the same in words; None where
    they bring images to [-1, 1], as here."""
    mean, std = ([float(v) for v in (vs if isinstance(vs, list) else [vs] * channels)] for vs in (mean, std))
    if not len(mean) == len(std) == channels or not all(
        abs(m) < 1e3 and 1e-3 < s < 1e3 for m, s in zip(mean, std, strict=True)
    ):
        raise ValueError(f"image_mean {mean} and image_std {std} for {channels} channels")
    return None if set(mean + std) == {0.5} else (mean, std), [f"colours normalised by {mean} and {std}"]
