"""Models from checkpoints and to them: a portable one (weights and their description), and what going on needs."""

import hashlib
import os
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import nn

from maelab.config import AS_IT_IS, DataConfig, DataOptions, Reading, check_count
from maelab.data import Dataset, ImageSet, compare_images, load, training_sets
from maelab.data.datasets import whole
from maelab.data.images import read_all
from maelab.data.splits import shared_images
from maelab.errors import RunError, UsageError
from maelab.foreign import Foreign, read_foreign
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.names import visible
from maelab.runs import (
    as_json,
    environment_of,
    find_checkpoint,
    listing_of,
    read_checkpoint,
    split_of,
    write_atomically,
)
from maelab.runs.checkpoints import CONFIG, MODEL

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
        reading: how the files of a folder became its images.
    """

    model: str
    arguments: dict[str, Any]
    data: str
    class_names: tuple[str, ...] = ()
    mask_ratio: float | None = None
    reading: Reading = AS_IT_IS

    def build(self) -> nn.Module:
        return MODELS[self.model](**self.arguments)


def portable(spec: ModelSpec, state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The two files of a portable checkpoint; the description holds the SHA-256 of the weights."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    weights = safetensors.torch.save(tensors)
    about = {"format": 1, **vars(spec), "sha256": hashlib.sha256(weights).hexdigest()}
    about["reading"] = vars(about.pop("reading"))
    return {MODEL: weights, CONFIG: as_json(about)}


def save_model(folder: Path, spec: ModelSpec, state: dict[str, torch.Tensor]) -> None:
    """Write a portable checkpoint into `folder`."""
    for name, content in portable(spec, state).items():
        write_atomically(folder / name, content)


def weights_sha256(model: nn.Module | None) -> str | None:
    """SHA-256 of the names and values of a model's weights; None of no model."""
    if model is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _foreign_spec(found: Foreign) -> ModelSpec:
    return ModelSpec(found.model, found.arguments, "", found.class_names, found.mask_ratio)


def read_spec(path: str | Path) -> ModelSpec:
    """The description of a checkpoint, or of a model of another library (see `maelab.foreign.read_foreign`).

    Raises:
        UsageError: if there is no checkpoint.
        RunError: if its config.json is damaged.
    """
    found = read_foreign(path)
    return ModelSpec(**read_checkpoint(find_checkpoint(path))[0]) if found is None else _foreign_spec(found)


def load_model(path: str | Path) -> tuple[nn.Module, ModelSpec]:
    """Build the model of a run folder or checkpoint and load its weights, in evaluation mode on the CPU.

    Args:
        path: run folder, of which the best checkpoint is taken (else the last), a checkpoint folder, or a model of
            another library (see `maelab.foreign.read_foreign`). Weights whose SHA-256 is not that of their description
            are refused.

    Returns:
        The model, and the description that it was built from.

    Raises:
        UsageError: if there is no checkpoint.
        RunError: if it is damaged.
    """
    if (found := read_foreign(path)) is not None:
        spec, file, wanted = _foreign_spec(found), Path(path), None
        for note in found.notes:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(visible(f"{path}: {note}"), file=sys.stderr)  # names in a file are anyone's
    else:
        checkpoint = find_checkpoint(path)
        fields, wanted = read_checkpoint(checkpoint)
        spec, file = ModelSpec(**fields), checkpoint.model
    try:
        state = found.state if found is not None else _read_weights(file, spec, wanted)
        with torch.device("meta"), warnings.catch_warnings():  # so that nothing large is allocated before shapes fit
            warnings.simplefilter("ignore")  # of widths of 0, which fit nothing
            model = spec.build()
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():  # neighbours of nan are anyone's, and no error follows
                raise ValueError(f"{name} has values that are no numbers")
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, RuntimeError, ArithmeticError, safetensors.SafetensorError) as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
        raise RunError(f"{file} is damaged or does not fit its config.json: {why}") from error
    return model.eval(), spec


def _read_weights(file: Path, spec: ModelSpec, wanted: str | None) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights with this SHA-256. Raises ValueError, before anything is built, if they are not.

    A model of a million blocks takes minutes to build, even without memory, so the blocks are counted first.
    """
    content = file.read_bytes()
    if wanted is not None and hashlib.sha256(content).hexdigest() != wanted:
        raise ValueError("the weights are not those that were saved (another SHA-256)")
    state = safetensors.torch.load(content)
    for field, prefix in (("depth", "blocks."), ("decoder_depth", "decoder_blocks.")):
        present = len({name.split(".")[1] for name in state if name.startswith(prefix)})
        if spec.arguments.get(field, present) != present:
            raise ValueError(f"{field} is {spec.arguments[field]}, and the weights are of {present} blocks")
    return state


def load_matching_data(spec: ModelSpec, name: str | None, data_dir: Path | None) -> Dataset:
    """The data set `name` (None: the one the model was trained on), checked to fit the model.

    Raises:
        UsageError: if no data set is named, or image size or channels do not fit.
    """
    if not (name or spec.data):
        raise UsageError("this model comes from another library; name the data set with --data")
    channels, size, reading = spec.arguments["in_chans"], tuple(spec.arguments["img_size"]), spec.reading
    if name and not _same(name, spec.data):  # the table and the groups are those of the model's own images
        reading = replace(reading, labels=None, group=None)
    data = load(name or spec.data, data_dir=data_dir, img_size=size, in_chans=channels, reading=reading, faults=False)
    if data.reading.value_range != spec.reading.value_range:
        raise UsageError(
            f"{data.name} has images of more than 8 bits, and the model was trained on images of 8 bits: save them so"
        )
    if data.train.images.shape[1] != channels:
        raise UsageError(
            f"{data.name} has images with {data.train.images.shape[1]} channels; the model was trained with {channels}"
        )
    return data


def choose_part(data: Dataset, split: Literal["train", "val", "test"], run: Path, trained_on: str) -> ImageSet:
    """The images of a part: those for testing, or all for training or validation as the run itself told them apart.

    Of another folder than the model was trained on, without a test/, all images are for testing: it saw none of them.
    Where the run's own images have changed since, stderr says what.

    Args:
        data: the data set.
        split: which part.
        run: the run folder, or a checkpoint, which does not know what it saw.
        trained_on: the name of the data set that the model was trained on.

    Raises:
        UsageError: if there are none, or the run does not know them.
    """
    cut, before = split_of(run), listing_of(run)
    own = _same(data.name, trained_on) or (bool(before) and shared_images(before, data.listing) > 0)
    if own and before and (said := compare_images(before, data.listing)):
        print(visible(f"{data.name} has changed since {run} was trained: {said}"), file=sys.stderr)
    if own and data.listing and "data_md5" in (env := environment_of(run)) and "files" not in env["data_md5"]:
        raise UsageError(
            f"{run} was trained when images were held out by their places in the folder, which no longer holds; name"
            " images that it never saw with --data, or train anew"
        )
    if split == "test":
        if not own and data.listing and (data.held_out or data.test is None):
            return whole(data)
        if data.test is None:
            raise UsageError(f"{data.name} has no test images; use --split val")
        return data.test
    if not cut:
        raise UsageError(f"--split {split} needs a run folder: its config.json says which images were held out")
    return training_sets(data, DataConfig(data=data.name, **cut))[split == "val"]


def _same(name: str, other: str) -> bool:
    """Whether two names mean one data set: a folder has many."""
    folders = [Path(one.removeprefix("folder:")).expanduser().resolve() for one in (name, other)]
    return name == other or (name.startswith("folder:") and other.startswith("folder:") and folders[0] == folders[1])


def images_to_show(
    model: VisionTransformer,
    spec: ModelSpec,
    images: Sequence[str | Path],
    *,
    count: int,
    seed: int,
    options: DataOptions,
) -> torch.Tensor:
    """Image files, folders or globs; or if there are none, a seeded choice of the test images of the data set that the
    model was trained on: uint8 (N, C, H, W).

    Raises:
        UsageError: if one cannot be read, or the count is not positive.
    """
    check_count("--count", count, 1)
    check_count("--seed", seed)
    if images:
        return read_all(images, model.img_size, model.in_chans, spec.reading)
    data = load_matching_data(spec, None, options.data_dir)
    pool = (data.test or data.train).images
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]


def read_training(file: Path) -> dict[str, Any]:
    """What going on needs, as `maelab.training.loop.train` saved it: tensors, numbers, strings, lists and dicts only.

    Raises:
        RunError: if the file is damaged, or would take more memory than it has bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed, which torch does not do")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not content.keys() >= {"position", "model", "optimizers", "average"}:
            raise ValueError("it holds something else")
        _check_position(content["position"])
        _check_tensors(content, file.stat().st_size)
        return content
    except Exception as error:
        raise damaged(file, error) from error


def _check_position(position: Any) -> None:
    """Refuse what the loop could not go on from. Raises ValueError."""

    def numbers(values: Any) -> bool:
        return isinstance(values, dict) and all(isinstance(k, str) and is_number(v) for k, v in values.items())

    def is_number(value: Any) -> bool:
        scalar = isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype.is_floating_point
        return scalar or (isinstance(value, int | float) and not isinstance(value, bool))

    good = isinstance(position, dict) and all(
        type(position.get(name)) is int and 0 <= position[name] < 2**63 for name in ("step", "images", "best_epoch")
    )
    good = good and is_number(position.get("seconds")) and isinstance(position.get("rows"), str)
    if not good or not all(numbers(position.get(name)) for name in ("sums", "best", "train")):
        raise ValueError("it does not say where the run stood")


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors that claim more bytes than the whole file has, by a stride of 0. Raises ValueError."""
    level = [content]
    while level:
        inside = []
        for part in level:
            if isinstance(part, torch.Tensor) and part.numel() * part.element_size() > size:
                raise ValueError("a tensor in it claims to be larger than the file")
            inside += part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        level = inside


def damaged(file: Path, error: Exception) -> RunError:
    """The error for a training state that cannot be read, or does not fit its run."""
    why = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return RunError(f"{file} is damaged ({why}); remove {file.parents[2]} to start anew")
