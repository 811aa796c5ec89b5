"""Checkpoints: a portable one (model.safetensors and config.json) and, beside it, what resuming needs (training.pt)."""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import nn

from maelab.config import DataConfig, RunOptions
from maelab.data import Dataset, ImageSet, load, training_sets
from maelab.data.folder import read_all
from maelab.errors import RunError, UsageError
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.runs import find_checkpoint, read_checkpoint, write_atomically, write_json
from maelab.weights import Foreign, read_foreign

MODELS = {c.__name__: c for c in (MaskedAutoencoderViT, VisionTransformer, nn.Linear)}


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build a model again and to feed it.

    Args:
        model: 'MaskedAutoencoderViT', 'VisionTransformer' or, for a linear probe, 'Linear'.
        arguments: of its constructor.
        data: name of the data set it was trained on; empty for a model of another library.
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


def save_model(folder: Path, spec: ModelSpec, state: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors and config.json into `folder`."""
    write_json(folder / "config.json", {"format": 1, **vars(spec)})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors))


def _foreign_spec(found: Foreign) -> ModelSpec:
    return ModelSpec(found.model, found.arguments, "", found.class_names, found.mask_ratio)


def read_spec(path: str | Path) -> ModelSpec:
    """The description of a checkpoint, or of a model of another library (see `maelab.weights.read_foreign`).

    Raises:
        UsageError: if there is no checkpoint.
        RunError: if its config.json is damaged.
    """
    found = read_foreign(path)
    return ModelSpec(**read_checkpoint(path)) if found is None else _foreign_spec(found)


def load_model(path: str | Path) -> tuple[nn.Module, ModelSpec]:
    """Build the model of a run folder or checkpoint and load its weights, in evaluation mode on the CPU.

    Args:
        path: run folder, of which the best checkpoint is taken (else the last), a checkpoint folder, or a model of
            another library (see `maelab.weights.read_foreign`).

    Returns:
        The model, and the description that it was built from.

    Raises:
        UsageError: if there is no checkpoint.
        RunError: if it is damaged.
    """
    if (found := read_foreign(path)) is not None:
        spec, file = _foreign_spec(found), Path(path)
        for note in found.notes:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{path}: {note}", file=sys.stderr)
    else:
        spec, file = read_spec(path), find_checkpoint(path) / "model.safetensors"
    try:
        with torch.device("meta"):  # so that nothing large is allocated before the shapes are seen to fit
            model = spec.build()
        state = safetensors.torch.load_file(file) if found is None else found.state
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, safetensors.SafetensorError) as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
        raise RunError(f"{file} is damaged or does not fit its config.json: {why}") from error
    return model.eval(), spec


def load_matching_data(spec: ModelSpec, name: str | None, data_dir: Path | None) -> Dataset:
    """The data set `name` (None: the one the model was trained on), checked to fit the model.

    Raises:
        UsageError: if no data set is named, or image size or channels do not fit.
    """
    if not (name or spec.data):
        raise UsageError("this model comes from another library; name the data set with --data")
    channels = spec.arguments["in_chans"]
    data = load(name or spec.data, data_dir=data_dir, img_size=tuple(spec.arguments["img_size"]), in_chans=channels)
    if data.train.images.shape[1] != channels:
        raise UsageError(
            f"{data.name} has images with {data.train.images.shape[1]} channels; the model was trained with {channels}"
        )
    return data


def choose_part(data: Dataset, split: Literal["train", "val", "test"], run_config: dict[str, Any]) -> ImageSet:
    """The test images, or all training or validation images as the run itself told them apart.

    Raises:
        UsageError: if there are none, or it is no run folder that would know.
    """
    if split == "test":
        if data.test is None:
            raise UsageError(f"{data.name} has no test images; use --split val")
        return data.test
    if "val_fraction" not in run_config:
        raise UsageError(f"--split {split} needs a run folder: its config.json says which images were held out")
    cut = {k: run_config[k] for k in ("val_fraction", "split_seed") if k in run_config}
    return training_sets(data, DataConfig(data=data.name, **cut))[split == "val"]


def images_to_show(
    model: VisionTransformer,
    spec: ModelSpec,
    images: Sequence[str | Path],
    *,
    count: int,
    seed: int,
    options: RunOptions,
) -> torch.Tensor:
    """Image files, folders or globs; or if there are none, a seeded choice of the test images of the data set that the
    model was trained on: uint8 (N, C, H, W).

    Raises:
        UsageError: if one cannot be read, or the count is not positive.
    """
    if count < 1:
        raise UsageError(f"--count must be at least 1, got {count}")
    if images:
        return read_all(images, model.img_size, model.in_chans)
    data = load_matching_data(spec, None, options.data_dir)
    pool = (data.test or data.train).images
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]


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
        with contextlib.suppress(OSError):
            temporary.unlink()


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
