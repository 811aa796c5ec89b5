"""Recipes: functions that return a whole config. `maelab pretrain mnist` takes `pretrain_mnist`, and so on.

Each docstring says the command, the time it takes and what comes out; a variant changes the few fields it is about.
"""

import difflib
import math
from dataclasses import replace
from typing import Any

from maelab.config import FinetuneConfig, PretrainConfig
from maelab.errors import UsageError

# Of fine-tuning, for an encoder that another library trained: AdamW, and the less of a step the earlier the block. Muon
# at the rates that suit own encoders makes such a one forget: a DINOv2 ViT-S/14 with 1,900 labels of CIFAR-10 was at
# 0.34 on validation after 4 epochs of it, and at 0.71 with these (docs/log.md).
FOR_FOREIGN: dict[str, Any] = {"optimizer": "adamw", "blr": 1e-3, "layer_decay": 0.75}


def pretrain_mnist() -> PretrainConfig:
    """`maelab pretrain mnist`: a small masked autoencoder for digits.

    65 s on 2 cores with AMX, 2 min with AVX-512 BF16, 4 with AVX2; masked MSE 0.113 on validation, where the mean image
    has 0.269.
    """
    return PretrainConfig(
        data="mnist",
        patch_size=4,
        embed_dim=96,
        depth=6,
        num_heads=3,
        class_token=False,
        decoder_embed_dim=64,
        decoder_depth=2,
        decoder_num_heads=2,
        epochs=6,
        optimizer="muon",
    )


def finetune_mnist() -> FinetuneConfig:
    """`maelab finetune mnist --init RUN`: a digit classifier.

    2 min on 2 cores with AMX, 5 with AVX-512 BF16, 9 with AVX2; from `pretrain mnist` 0.994 on test.
    """
    return FinetuneConfig(
        data="mnist",
        patch_size=4,
        embed_dim=96,
        depth=6,
        num_heads=3,
        class_token=False,
        epochs=6,
        optimizer="muon",
        muon_lr=0.01,
        label_smoothing=0.1,
        affine_degrees=10,
        affine_scale=0.1,
        affine_translate=0.07,
        affine_shear=5,
    )


def pretrain_quickstart() -> PretrainConfig:
    """`maelab pretrain quickstart`: recipe mnist in half the epochs and half the batch, where steps teach more.

    77 s on 2 cores with AVX-512 BF16, 127 s with AVX2; masked MSE 0.124 on validation.
    """
    return replace(pretrain_mnist(), epochs=3, batch_size=128, warmup_epochs=0.3)


def finetune_quickstart() -> FinetuneConfig:
    """`maelab finetune quickstart --init RUN`: what `make quickstart` does after it.

    A quarter of the patches is left out of each step. 4 min on 2 cores with AVX2; 0.9914 ± 0.0008 on test (3 seeds of
    both).
    """
    return replace(finetune_mnist(), epochs=3, batch_size=128, warmup_epochs=0.3, patch_drop=0.25)


def pretrain_cifar10() -> PretrainConfig:
    """`maelab pretrain cifar10`: a small masked autoencoder for CIFAR-10, with normalised pixels as the target.

    12 min on one core with AMX; on 2 cores 16 min with AVX-512 BF16, 30 with AVX2; under a minute on a GPU. k-NN
    accuracy of its features 0.475 on validation.
    """
    return PretrainConfig(
        data="cifar10",
        patch_size=4,
        embed_dim=192,
        depth=6,
        num_heads=3,
        class_token=False,
        decoder_embed_dim=96,
        decoder_depth=2,
        decoder_num_heads=3,
        norm_pix_loss=True,
        epochs=15,
        optimizer="muon",
        crop_padding=4,
        flip=True,
    )


def finetune_cifar10() -> FinetuneConfig:
    """`maelab finetune cifar10 --init RUN`: a CIFAR-10 classifier; from an MNIST autoencoder this is the transfer.

    17 min on one core with AMX; on 2 cores 26 min with AVX-512 BF16, 50 with AVX2; under a minute on a GPU. From
    `pretrain cifar10` 0.868 on test, from an MNIST autoencoder 0.836.
    """
    return FinetuneConfig(
        data="cifar10",
        patch_size=4,
        embed_dim=192,
        depth=6,
        num_heads=3,
        class_token=False,
        epochs=10,
        optimizer="muon",
        muon_lr=0.01,
        label_smoothing=0.1,
        crop_padding=4,
        flip=True,
    )


def pretrain_folder(
    images: int = 1_000,
    side: int = 64,
    grey: bool = False,
    patch_size: int | None = None,
    img_size: tuple[int, int] | None = None,
) -> PretrainConfig:
    """`maelab pretrain folder --data folder:PHOTOS`: images of your own; the command finds out the arguments itself.

    Takes minutes to hours, as `maelab fit` does within a time you give. The image size is the median side of the
    images as a multiple of the patch size, between 32 and 224, the patch size the smallest that gives at most 14 x 14
    patches; fewer images get a smaller model, smaller batches and more epochs.

    Args:
        images: how many there are to train on.
        side: the median of their shorter sides, in pixels.
        grey: whether they have no colours; those are not mirrored, for they may be letters.
        patch_size: to have another.
        img_size: height and width, to have others.
    """
    side = min(224, max(32, side if img_size is None else min(img_size)))
    patch_size = patch_size or next(p for p in (4, 8, 12, 16) if round(side / p) <= 14)
    side = patch_size * max(2, round(side / patch_size))
    patches = (side // patch_size) ** 2
    batch = 2 ** max(4, min(8 if patches <= 100 else 7, int(math.log2(max(1, images / 16)))))
    return PretrainConfig(
        data="folder:PATH",
        val_fraction=_val_fraction(images),
        img_size=img_size or (side, side),
        patch_size=patch_size,
        embed_dim=96 if images < 5_000 else 192,
        depth=6 if images < 50_000 else 12,
        num_heads=3,
        class_token=False,
        decoder_embed_dim=96,
        decoder_depth=2,
        decoder_num_heads=3,
        batch_size=batch,
        epochs=round(min(400, max(20, 600_000 / max(1, images)))),
        optimizer="muon",
        crop_padding=side // 8,
        flip=not grey,
    )


def finetune_folder(
    images: int = 1_000,
    side: int = 64,
    grey: bool = False,
    patch_size: int | None = None,
    img_size: tuple[int, int] | None = None,
) -> FinetuneConfig:
    """`maelab finetune folder --init RUN --data folder:LABELLED`: a classifier of your own images.

    Takes minutes to an hour. The arguments are those of `pretrain_folder`, `images` counting the labelled ones.
    """
    before = pretrain_folder(images, side, grey, patch_size, img_size)
    kept = ("data", "val_fraction", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "class_token")
    kept += ("batch_size", "optimizer", "crop_padding", "flip")
    return FinetuneConfig(
        **{field: getattr(before, field) for field in kept},
        epochs=round(min(60, max(10, 100_000 / max(1, images)))),
        muon_lr=0.01,
        label_smoothing=0.1,
    )


def explain_folder(
    config: PretrainConfig | FinetuneConfig, images: int, side: int, channels: int, val: int = 0, init: str = "none"
) -> str:
    """What recipe folder chose and why, in one line: `images` were found, of this median `side` and with so many
    `channels`; `val` counts the validation images that the folder itself has."""
    assert config.img_size is not None
    (height, width), patch = config.img_size, config.patch_size
    judge = f"{val} images of the folder" if val else f"{config.val_fraction:.0%} held out by seed"
    size = f"from --init {init}" if init != "none" else f"near the median side {side}, between 32 and 224"
    return (
        f"chosen for {images} images: {height}x{width} pixels ({size}), {height // patch * (width // patch)} patches of"
        f" {patch}x{patch}; {channels} channel{'s' * (channels > 1)}; width {config.embed_dim}, {config.depth} blocks;"
        f" {config.epochs} epochs in batches of {config.batch_size} (fewer images: a smaller model, more epochs);"
        f" {judge} for validation; mirrored: {'yes' if config.flip else 'no'}"
    )


def _val_fraction(images: int) -> float:
    """A fifth of few images and a twentieth of many: about 1,000 in between."""
    return round(min(0.2, max(0.05, 1_000 / max(1, images))), 4)


def pretrain_smoke() -> PretrainConfig:
    """`maelab pretrain smoke`: two narrow blocks and a few steps, to see every command work within seconds."""
    return replace(
        pretrain_mnist(),
        limit=1024,
        epochs=2,
        patch_size=7,
        embed_dim=32,
        depth=2,
        num_heads=2,
        decoder_embed_dim=32,
        decoder_depth=1,
        optimizer="adamw",
    )


def finetune_smoke() -> FinetuneConfig:
    """`maelab finetune smoke --init RUN`: the same for the classifier."""
    return replace(
        finetune_mnist(), limit=1024, epochs=2, patch_size=7, embed_dim=32, depth=2, num_heads=2, optimizer="adamw"
    )


def names(task: str) -> list[str]:
    """The recipes of a task, 'pretrain' or 'finetune'."""
    return [name.removeprefix(f"{task}_") for name in globals() if name.startswith(f"{task}_")]


def get(task: str, name: str, **found: Any) -> PretrainConfig | FinetuneConfig:
    """The config of a recipe; `found` are its arguments, if it takes any.

    Raises:
        UsageError: if there is no such recipe; names the nearest.
    """
    if name not in names(task):
        near = difflib.get_close_matches(name, names(task), 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names(task))}"
        raise UsageError(f"there is no {task} recipe {name!r}; {hint}")
    return globals()[f"{task}_{name}"](**found)
