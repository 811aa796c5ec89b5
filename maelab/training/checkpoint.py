"""Checkpoints: a portable one (model.safetensors and config.json) and, beside it, what resuming needs (training.pt)."""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from maelab.data import Dataset, load
from maelab.errors import RunError, UsageError
from maelab.model import MaskedAutoencoderViT, VisionTransformer

MODELS = {c.__name__: c for c in (MaskedAutoencoderViT, VisionTransformer, nn.Linear)}


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build a model again and to feed it.

    Args:
        model: 'MaskedAutoencoderViT', 'VisionTransformer' or, for a linear probe, 'Linear'.
        arguments: of its constructor.
        data: name of the data set it was trained on.
        class_names: of a classifier, in the order of its outputs.
        mask_ratio: that a masked autoencoder was trained with.
    """

    model: str
    arguments: dict[str, Any]
    data: str
    class_names: tuple[str, ...] = ()
    mask_ratio: float | None = None

    def build(self) -> nn.Module:
        return MODELS[self.model](**self.arguments)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        RunError: if it cannot be written, e.g. because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; what was there before stands") from error
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # above all where its folder could not be made
        temporary.unlink()


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def save_model(folder: Path, spec: ModelSpec, state: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors and config.json into `folder`."""
    write_json(folder / "config.json", {"format": 1, **vars(spec)})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the best (else the last) checkpoint of a run folder.

    Raises:
        UsageError: if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no run folder or checkpoint at {path}")
    for folder in (path, path / "checkpoints" / "best", path / "checkpoints" / "last"):
        if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
            return folder
    raise UsageError(f"{path} holds no checkpoint (looked for model.safetensors and config.json, and for checkpoints/)")


def read_spec(path: str | Path) -> ModelSpec:
    """The description of a checkpoint, without its weights.

    Raises:
        UsageError: if there is no checkpoint.
        RunError: if its config.json is damaged.
    """
    file = find_checkpoint(path) / "config.json"
    try:
        content = json.loads(file.read_text())
        if content.pop("format") != 1 or content["model"] not in MODELS or not isinstance(content["arguments"], dict):
            raise ValueError("not a format that this version knows")
        return ModelSpec(**{**content, "class_names": tuple(content["class_names"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} is damaged or not a maelab checkpoint ({type(error).__name__}: {error})") from error


def load_model(path: str | Path) -> tuple[nn.Module, ModelSpec]:
    """Build the model of a run folder or checkpoint and load its weights, in evaluation mode on the CPU.

    Args:
        path: run folder, of which the best checkpoint is taken (else the last), or a checkpoint folder.

    Returns:
        The model, and the description that it was built from.

    Raises:
        UsageError: if there is no checkpoint.
        RunError: if it is damaged.
    """
    spec = read_spec(path)
    file = find_checkpoint(path) / "model.safetensors"
    try:
        model = spec.build()
        model.load_state_dict(safetensors.torch.load_file(file))
    except (ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise RunError(f"{file} is damaged or does not fit its config.json: {str(error).splitlines()[0]}") from error
    return model.eval(), spec


def load_matching_data(spec: ModelSpec, name: str | None, data_dir: Path | None) -> Dataset:
    """The data set `name` (None: the one the model was trained on), checked to fit the model.

    Raises:
        UsageError: if image size or channels do not fit.
    """
    channels = spec.arguments["in_chans"]
    data = load(name or spec.data, data_dir=data_dir, img_size=tuple(spec.arguments["img_size"]), in_chans=channels)
    if data.train.images.shape[1] != channels:
        raise UsageError(
            f"{data.name} has images with {data.train.images.shape[1]} channels; the model was trained with {channels}"
        )
    return data


def save_training(file: Path, state: dict[str, Any]) -> None:
    """Write what resuming needs: tensors, numbers, strings, lists and dicts only."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        why = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise RunError(f"cannot write {file}: {why}; the checkpoint before it stands") from error
    finally:
        _remove(temporary)


def load_training(file: Path) -> dict[str, Any] | None:
    """Read what `save_training` wrote, or None if there is nothing.

    Raises:
        RunError: if the file is damaged.
    """
    if not file.exists():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{file} is damaged ({why}); remove {file.parents[2]} to start anew") from error
