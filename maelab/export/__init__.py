"""Trained models in the formats of other tools: ONNX, transformers, timm, and maelab's own portable checkpoint."""

import contextlib
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

import maelab
from maelab.data import ImageSet
from maelab.data.batches import scale
from maelab.data.sources import cache_dir
from maelab.errors import MaelabError, RunError, UsageError
from maelab.export.graph import OPSET, graph_of
from maelab.foreign import to_hugging_face
from maelab.inference import attention_maps, attention_rollout, attention_to_patches
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.model.masks import len_keep
from maelab.model.vit import LAYER_NORM_EPS, Block
from maelab.names import encodable
from maelab.runs import split_of, write_atomically, write_json
from maelab.training.checkpoint import ModelSpec, choose_part, load_matching_data, load_model, save_model
from maelab.weights import PATCH_WEIGHT

ENDINGS = {"onnx": ".onnx", "timm": ".safetensors", "hf": "", "safetensors": ""}  # without one: a folder
TOLERANCE = 1e-4  # between torch and onnxruntime
LUMA = (0.299, 0.587, 0.114)  # what red, green and blue count in a grey image (ITU-R 601-2, as Pillow converts)
MEASURED = 5000  # images at most on which int8 is judged


def export(
    run: Path | str,
    *,
    format: Literal["onnx", "timm", "hf", "safetensors"] = "onnx",
    out: Path | str | None = None,
    part: Literal["encoder", "autoencoder", "attention"] = "encoder",
    int8: bool = False,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Write a model for ONNX, transformers or timm.

    The ONNX model takes float32 images (N, C, H, W) in [-1, 1] and gives logits (N, classes), or for an autoencoder the
    features of its encoder (N, D), the mean of the patch tokens; class names and preprocessing are in its metadata.
    transformers reads the folder as ViTMAEForPreTraining or ViTForImageClassification, the latter always of colours, so
    that its pipelines take any image; timm's file holds a
    VisionTransformer's weights, of an autoencoder those of its encoder.

    Args:
        run: run folder or checkpoint of a classifier or a masked autoencoder.
        format: onnx: one file for onnxruntime; hf: a folder for transformers; timm: a file of weights under timm's
            names; safetensors: maelab's own checkpoint, a folder.
        out: what to write, a new file or folder; None is named after the run, here.
        part: of an autoencoder, for onnx: its encoder, or all of it, which also takes int64 ids_keep (N, kept), the
            patches to see, and ids_restore (N, L), the place of each patch among those kept and then those hidden, and
            gives "pred" (N, L, p * p * C): of each patch the pixels row by row, channels last. Of a classifier, for
            onnx: attention adds where it looks, "attention" (N, rows, columns) of patches, by attention rollout.
        int8: onnx: matrices in 8 bits, and what that costs on the run's validation images (else test images), where the
            data are at hand.
        data_dir: folder that holds the data set's files already.

    Returns:
        {"run", "format", "out"}; for 'timm' "arguments" of its VisionTransformer; for 'onnx' "opset" and
        "max_difference" from torch's output, and with int8 "int8": what was measured (see `_cost_of_int8`), or why
        nothing was.

    Raises:
        UsageError: if the format cannot express the model, a package is missing, or `out` exists.
        RunError: if the model is damaged, or the result differs from it.
    """
    out = Path(out or f"{Path(run).resolve().name.replace(':', '-')}-{format}{ENDINGS[format]}")
    if out.exists():
        raise UsageError(f"--out {out} exists; remove it or choose another name")
    if out.suffix != ENDINGS[format] and ENDINGS[format]:
        raise UsageError(f"--out {out}: the format is a file; give a name that ends in {ENDINGS[format]}")
    if (int8 or part != "encoder") and format != "onnx":
        raise UsageError(f"--{'int8' if int8 else f'part {part}'} goes with --format onnx, not {format}")
    model, spec = load_model(run)
    if part == "autoencoder" and not isinstance(model, MaskedAutoencoderViT):
        raise UsageError(f"{run} is no autoencoder, which --part autoencoder asks for")
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{run} is a linear probe; export the run that it judged")
    if part == "attention" and not (model.num_classes and len(model.blocks)):
        raise UsageError(f"{run} is no classifier with attention, which --part attention asks for")
    result: dict[str, Any] = {"run": str(run), "format": format, "out": str(out)}
    if format == "safetensors":
        save_model(out, spec, model.state_dict())
        return result
    spec = replace(spec, class_names=tuple(map(encodable, spec.class_names)))  # other tools take text alone
    if format == "timm":
        result |= {"arguments": _to_timm(model, spec, out)}
    elif format == "hf":
        _to_folder(model, spec, out)
    else:
        content, difference = to_onnx(model, spec, part)
        result |= {"opset": OPSET, "max_difference": difference}
        if int8:
            exact, content = content, _in_8_bits(content)
            try:
                data, split = _images_at_hand(spec, Path(run), data_dir)
                kept = len_keep(model.num_patches, spec.mask_ratio or 0.75)
                ids = _some_patches(len(data), model.num_patches, kept) if part == "autoencoder" else {}
                result["int8"] = _cost_of_int8(exact, content, data, split, model.num_classes, ids)
            except MaelabError as error:
                result["int8"] = {"not_measured": str(error)}
        write_atomically(out, content)
    return result


def _preprocessing(model: VisionTransformer, spec: ModelSpec) -> dict[str, Any]:
    """What an image goes through first: see `maelab.data.decode`."""
    height, width = model.img_size
    return {
        "channels": model.in_chans,
        "height": height,
        "width": width,
        "value_range": spec.reading.value_range,  # (low, high) become 0 and 255 first, where numbers have over 8 bits
        "resize": spec.reading.resize,
        "resample": "bicubic, antialiased",
        "scale": "pixel / 127.5 - 1",
    }


# --------------------------------------------------------------------------------------------------------------- timm


def _to_timm(model: VisionTransformer, spec: ModelSpec, out: Path) -> dict[str, Any]:
    """Our names are timm's; what a state does not tell goes into the file's metadata and the returned arguments."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
    if model.reg_token is not None:  # timm gives registers positions, unless the class token has none either
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    about = {"num_heads": block.attn.num_heads, "img_size": model.img_size, "class_names": spec.class_names}
    metadata = {"format": "pt", "maelab": json.dumps(about)}
    write_atomically(out, safetensors.torch.save(_plain(state), metadata))
    kept = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "class_token", "reg_tokens")
    arguments = {name: spec.arguments[name] for name in kept if name in spec.arguments}
    hidden, width = block.mlp.fc1.out_features, model.embed_dim
    ratio = hidden / width  # timm takes the whole part of width * ratio, which can lose one
    arguments["mlp_ratio"] = ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
    arguments["qkv_bias"] = block.attn.qkv.bias is not None
    if model.reg_token is not None:
        arguments["no_embed_class"] = True
    pool = model.global_pool if model.num_classes else ""
    return {"img_size": model.img_size, **arguments, "num_classes": model.num_classes, "global_pool": pool}


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


# ------------------------------------------------------------------------------------------------------- transformers


def _to_folder(model: VisionTransformer, spec: ModelSpec, out: Path) -> None:
    """A folder for transformers. Its pipelines make every image one of three colours, so a classifier of grey images
    becomes one of colours that weighs them as the conversion to grey does.

    Raises:
        UsageError: if its ViT models cannot express this one.
    """
    height, width = model.img_size
    block = model.blocks[0]
    assert isinstance(block, Block)
    advice = "; --format timm and onnx take it as it is"
    if not model.num_prefix_tokens:
        raise UsageError(
            "transformers' ViT models always have a class token, which this model lacks: train with --class-token"
            + advice
        )
    if model.reg_token is not None:
        raise UsageError(f"transformers' ViT models have no registers, which this model has{advice}")
    if model.num_classes and model.global_pool == "avg":
        raise UsageError(
            "transformers' ViTForImageClassification reads the class token, this model the mean of the patches: train"
            f" with --global-pool token{advice}"
        )
    state = model.state_dict()
    channels = model.in_chans
    if channels == 1 and model.num_classes:
        channels, state[PATCH_WEIGHT] = 3, state[PATCH_WEIGHT] * torch.tensor(LUMA).reshape(1, 3, 1, 1)
    config: dict[str, Any] = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if isinstance(model, MaskedAutoencoderViT):
        if height != width:
            raise UsageError(f"transformers' ViTMAE takes square images, this model {height}x{width}{advice}")
        if not len(model.decoder_blocks):
            raise UsageError("transformers' ViTMAE has at least one decoder block, this model none")
        decoder = model.decoder_blocks[0]
        assert isinstance(decoder, Block)
        config |= {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "decoder_hidden_size": model.decoder_embed.out_features,
            "decoder_num_hidden_layers": len(model.decoder_blocks),
            "decoder_num_attention_heads": decoder.attn.num_heads,
            "decoder_intermediate_size": decoder.mlp.fc1.out_features,
            "mask_ratio": spec.mask_ratio or 0.75,
            "norm_pix_loss": model.norm_pix_loss,
        }
    else:
        names = spec.class_names or tuple(map(str, range(model.num_classes)))
        config |= {
            "architectures": ["ViTForImageClassification" if model.num_classes else "ViTModel"],
            "model_type": "vit",
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    square = height == width and spec.reading.resize == "crop"
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }
    write_json(out / "config.json", config)
    write_json(out / "preprocessor_config.json", processor)
    weights = safetensors.torch.save(_plain(to_hugging_face(state)), {"format": "pt"})
    write_atomically(out / "model.safetensors", weights)


# --------------------------------------------------------------------------------------------------------------- ONNX


def _computed(model: VisionTransformer, part: str, images: torch.Tensor, *ids: torch.Tensor) -> list[torch.Tensor]:
    """What the graph of `part` has to compute, by the model itself."""
    if part == "autoencoder":
        assert isinstance(model, MaskedAutoencoderViT)
        return [model.forward_decoder(model.encode(model.to_patches(images), ids[0]), ids[1])]
    if not model.num_classes:
        return [model.pool(model.forward_features(images), "avg")]
    logits = [model(images)]
    if part == "attention":
        logits.append(attention_to_patches(model, attention_rollout(attention_maps(model, images))))
    return logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the quantiser says about itself."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def to_onnx(model: VisionTransformer, spec: ModelSpec, part: str) -> tuple[bytes, float]:
    """The content of an ONNX file that has been seen to compute the same as the model, and the largest difference
    between the two. For `part` see `export`.

    Raises:
        UsageError: if a package is missing.
        RunError: if the result differs from the model.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"ONNX needs the package {error.name}: pip install 'maelab[export]'") from None
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, model.in_chans, *model.img_size, generator=generator) * 2 - 1
    inputs = {"images": images}
    about: dict[str, Any] = {"class_names": spec.class_names, "preprocessing": _preprocessing(model, spec)}
    about["maelab"] = maelab.__version__
    if part == "autoencoder":
        assert isinstance(model, MaskedAutoencoderViT)
        inputs |= _some_patches(5, model.num_patches, (model.num_patches + 1) // 2)
        about |= {"patch_size": model.patch_size, "norm_pix_loss": model.norm_pix_loss}
    proto = graph_of(model, part)
    with torch.no_grad():
        expected = _computed(model, part, *inputs.values())
    onnx.helper.set_model_props(proto, {k: json.dumps(v) for k, v in about.items()})
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = 0.0
    for n in (1, 5):
        found = session.run(None, {name: value[:n].numpy() for name, value in inputs.items()})
        for ours, theirs in zip(expected, found, strict=True):
            difference = max(difference, float(np.abs(np.asarray(theirs) - ours[:n].numpy()).max()))
    if not difference <= TOLERANCE:
        raise RunError(f"the ONNX model differs from the original by {difference:.1e}; nothing was written")
    return content, difference


def _in_8_bits(content: bytes) -> bytes:
    """An ONNX model with its matrices in 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        files = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        files[0].write_bytes(content)
        # Signed weights overflow sums of 16 bits on processors without VNNI; unsigned ones do not.
        quantize_dynamic(*files, weight_type=QuantType.QUInt8)
        return files[1].read_bytes()


def _some_patches(n: int, patches: int, kept: int) -> dict[str, torch.Tensor]:
    """Of n images the patches to see, drawn at random: {"ids_keep" (n, kept), "ids_restore" (n, patches)}."""
    shuffled = torch.rand(n, patches, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return {"ids_keep": shuffled[:, :kept].contiguous(), "ids_restore": shuffled.argsort(dim=1)}


def _run(content: bytes, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """The first output of an ONNX model for images (N, C, H, W) and what else it takes of each, in batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    batches = zip(*(values.split(256) for values in inputs.values()), strict=True)
    fed = ({name: value.numpy() for name, value in zip(inputs, batch, strict=True)} for batch in batches)
    return np.concatenate([np.asarray(session.run(None, feed)[0]) for feed in fed])


def _images_at_hand(spec: ModelSpec, run: Path, data_dir: Path | None) -> tuple[ImageSet, str]:
    """Images to measure on, and a name for them: the run's validation images, or test images if only a checkpoint is
    there. Nothing is downloaded.

    Raises:
        UsageError, RunError: if there are none.
    """
    if data_dir is None and not spec.data.startswith("folder:") and not (cache_dir() / spec.data).is_dir():
        raise UsageError(f"{spec.data or 'its data set'} is not on this machine")
    split = "val" if split_of(run) else "test"
    part = choose_part(load_matching_data(spec, None, data_dir), split, run, spec.data)
    return part[torch.arange(min(len(part), MEASURED))], split


def _cost_of_int8(
    exact: bytes, quantised: bytes, data: ImageSet, split: str, classes: int, ids: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """What 8 bits cost. `ids`: what a whole autoencoder takes beside images.

    Returns:
        {"images", "split"} and for a classifier "accuracy" (of int8), "float32_accuracy", "agreement" (share of the
        images with the same answer), else "relative_error": RMS difference of the features, or of what an autoencoder
        predicts, over their RMS.
    """
    inputs = {"images": scale(data.images[:]), **ids}
    before, after = _run(exact, inputs), _run(quantised, inputs)
    result: dict[str, Any] = {"images": len(data), "split": split}
    if not classes or data.labels is None:
        error = float(np.sqrt(np.square(after - before).mean() / np.square(before).mean()))
        return result | {"relative_error": error}
    labels, ours, theirs = data.labels.numpy(), after.argmax(axis=1), before.argmax(axis=1)
    return result | {
        "accuracy": float((ours == labels).mean()),
        "float32_accuracy": float((theirs == labels).mean()),
        "agreement": float((ours == theirs).mean()),
    }
