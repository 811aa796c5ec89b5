"""Pretraining: a masked autoencoder learns to rebuild hidden patches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maelab import figures
from maelab.config import PretrainConfig, RunOptions
from maelab.data import Dataset, ImageSet, limit, load, reading_of, training_sets
from maelab.data.augment import augment
from maelab.data.batches import batch_index, expect_batch, rank_slice, scale, step_generator, to_device
from maelab.errors import UsageError
from maelab.inference import (
    caption,
    check_masking,
    count_parameters,
    effective_rank,
    extract_features,
    knn_accuracy,
    masked_mse,
    neighbours,
    reconstruct_images,
)
from maelab.model import MaskedAutoencoderViT, VisionTransformer, patchify
from maelab.model.masks import hidden_count, make_mask
from maelab.progress import say_once
from maelab.runs import check_out, read_metrics
from maelab.runs.commands import ENCODER
from maelab.training.checkpoint import ModelSpec, load_model
from maelab.training.loop import Step, Task, train
from maelab.training.parallel import prepare, start_engine
from maelab.training.ranks import in_processes
from maelab.training.runlog import environment, open_task, say
from maelab.training.trackers import log_outcome
from maelab.weights import load_autoencoder

# k-NN during training compares so many validation images with so many training images at most: 3% of the time of an
# epoch of the recipe mnist, 0.34 s of 11.4 s on 2 cores with AMX.
KNN_QUERIES, KNN_IMAGES = 1_000, 2_000
PICTURED = 8
RETRIEVED = 6, 8  # validation images, and neighbours of each, on a picture
SHAPE = (
    "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "learned_pos_embed",
    "decoder_embed_dim", "decoder_depth", "decoder_num_heads",
)  # fmt: skip
_MEAN_OF = 2**27  # pixels at most for the mean predictor: half a gigabyte


def model_spec(config: PretrainConfig, data: Dataset) -> ModelSpec:
    """The masked autoencoder that `config` asks for on this data.

    Raises:
        UsageError: if patch size, image size and mask ratio do not go together.
    """
    _, in_chans, height, width = data.train.images.shape
    if height % config.patch_size or width % config.patch_size:
        raise UsageError(
            f"--patch-size {config.patch_size} does not divide the image size {height}x{width}; give an --img-size of"
            " multiples of it"
        )
    check_masking(height * width // config.patch_size**2, config.mask_ratio)
    arguments = {field: getattr(config, field) for field in (*SHAPE, "norm_pix_loss")}
    arguments |= {"img_size": (height, width), "in_chans": in_chans}
    return ModelSpec("MaskedAutoencoderViT", arguments, data.name, mask_ratio=config.mask_ratio, reading=data.reading)


def with_shape_of(config: PretrainConfig, init: ModelSpec) -> PretrainConfig:
    """The config with the shape of the initial weights: an autoencoder's, or an encoder's and the decoder of `config`.

    Raises:
        UsageError: if there is no encoder in them, or one that an autoencoder cannot have.
    """
    arguments = init.arguments
    if not set(ENCODER) - {"reg_tokens"} <= arguments.keys():
        raise UsageError(f"--init {config.init} is a {init.model} and has no encoder; name a run or an encoder")
    if arguments.get("reg_tokens", 0):
        raise UsageError(f"--init {config.init} has register tokens, which maelab does not pretrain; fine-tune it")
    return replace(config, **{field: arguments[field] for field in SHAPE if field in arguments})


def some(data: ImageSet, n: int, seed: int) -> ImageSet:
    """A seeded choice of at most n images; the first n would be of one class where images lie class by class."""
    return limit(data, min(n, len(data)), seed)


def mean_predictor_mse(data: ImageSet, norm_pix_loss: bool, patch_size: int) -> float:
    """The loss of predicting, at each place, its mean over the images (at most 10,000, and
    fewer of large ones): what a model has to beat."""
    largest = _MEAN_OF // data.images[:1].numel()  # pixels
    patches = patchify(scale(some(data, min(10_000, largest), seed=0).images[:]), patch_size)
    if norm_pix_loss:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return float(patches.var(dim=0, correction=0).mean())


def make_step(config: PretrainConfig, train_set: ImageSet, num_patches: int) -> Step:
    """A training step on `train_set`: its batch and loss."""

    def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = batch_index(len(train_set), config.batch_size, config.seed, step)
        generator = step_generator(config.seed, step)
        noise = rank_slice(torch.rand(len(index), num_patches, generator=generator), part, parts)
        images = augment(train_set.images, index, config, generator, part, parts)
        expect_batch(train_set, config.batch_size, config.seed, step + 1, part, parts)
        return images, to_device(noise, images.device)  # (b, C, H, W), (b, L)

    def loss(model: Any, images: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": model.training_loss(images, config.mask_ratio, noise)}

    return Step(batch, loss)


@in_processes
def pretrain(
    config: PretrainConfig, *, options: RunOptions | None = None, recipe: str = "custom"
) -> tuple[Path, dict[str, Any]]:
    """Pretrain a masked autoencoder.

    Every `config.knn_every` epochs, where there are labels, the unmasked encoder is judged by k-NN: a fixed choice of
    at most 1,000 validation images looks for its neighbours among at most 2,000 training images; and the effective rank
    of all their features is measured. Both are followed, and choose nothing.

    Args:
        config: what to do, e.g. `maelab.recipes.pretrain_mnist()`.
        options: where to run, and where to keep it.
        recipe: a name for the default run folder.

    Returns:
        The run folder and the content of its result.json.

    Raises:
        UsageError, RunError: see maelab.errors.
        Interrupted: after saving, on Ctrl-C or SIGTERM.
    """
    options = options or RunOptions()
    check_out(options)
    source, init = (None, None) if config.init == "none" else load_model(config.init)
    if init is not None:
        config = with_shape_of(config, init)
    engine = start_engine(options, config.precision)
    data = load(config.data, data_dir=options.data_dir, img_size=config.img_size, reading=reading_of(config))
    spec = model_spec(config, data)
    torch.manual_seed(config.seed)
    model = spec.build()
    assert isinstance(model, MaskedAutoencoderViT)
    adapted: list[str] = []
    if source is not None:
        assert isinstance(source, VisionTransformer)
        adapted = load_autoencoder(model, source)
    num_patches, hardware = model.num_patches, prepare(model, engine, options)
    hidden = hidden_count("random", model.grid_size, config.mask_ratio)
    begun_from = environment(hardware, data.checksums, source)
    with open_task(engine, "pretrain", recipe, config, options, begun_from, data.listing) as (run, tracker):
        folder = run.folder
        if run.result:
            return folder, run.result
        for line in data.faults:
            say_once(line, data.name)
        train_set, val_set = (part.to(engine.device) for part in training_sets(data, config, unlabelled=True))
        trivial = mean_predictor_mse(train_set, config.norm_pix_loss, config.patch_size)
        say(
            f"pretrain on {data.name}: {len(train_set)} images, {len(val_set)} more for validation;"
            f" {num_patches} patches of {config.patch_size}x{config.patch_size}, {hidden} of them hidden;"
            f" {count_parameters(model) / 1e6:.2f}M parameters{f' from {config.init}' if source else ''}"
            f"{''.join(f'; {a}' for a in adapted)}; {hardware};"
            f" {folder}"
        )

        following = config.knn_every > 0 and train_set.labels is not None
        known, queries = some(train_set, KNN_IMAGES, config.split_seed), some(val_set, KNN_QUERIES, config.split_seed)
        if following and data.unlabelled is not None:
            assert train_set.labels is not None
            known = some(train_set[(train_set.labels >= 0).nonzero()[:, 0]], KNN_IMAGES, config.split_seed)
            following = len(known) > 0

        def validate(model: Any, epoch: int) -> dict[str, float]:
            values = masked_mse(model, val_set, config.mask_ratio, config.split_seed)
            if following and epoch % config.knn_every == 0:
                values |= _follow(model, known, queries)
            return values

        outcome = train(
            engine,
            run,
            Task(
                model=model,
                spec=spec,
                items=len(train_set),
                step=make_step(config, train_set, num_patches),
                validate=validate,
                metric="loss",
                higher_is_better=False,
                note=f" (mean predictor {trivial:.4f})",
            ),
            config,
            tracker,
        )
        sample = some(train_set, max(len(val_set), 1000), config.split_seed)
        with engine.autocast():
            train_scores = masked_mse(model, sample, config.mask_ratio, config.split_seed)
            if following and "knn_accuracy" not in outcome.val:  # the best epoch was not one of those
                outcome.val.update(_follow(model, known, queries))
        result = {
            "task": "pretrain",
            "data": data.name,
            "seed": config.seed,
            "epochs": outcome.epochs,
            "init": config.init,
            "adapted": adapted,
            "patch_size": config.patch_size,
            "mask_ratio": config.mask_ratio,
            "patches": num_patches,
            "hidden": hidden,
            "params": count_parameters(model),
            "train": {"masked_mse": train_scores["masked_mse"], "loss": outcome.train["loss"]},
            "val": outcome.val,
            "best_epoch": outcome.best_epoch,
            "mean_predictor_loss": trivial,
            "masked_mse_uses": "true patch mean and deviation" if config.norm_pix_loss else "the prediction alone",
            "train_time_s": outcome.train_time_s,
            "images_per_s": outcome.images_per_s,
        }
        if engine.is_global_zero:
            with figures.optional("the picture reconstructions.png could not be drawn"):
                shown = scale(some(val_set, PICTURED, config.split_seed).images[:])
                mask = make_mask("random", model.grid_size, len(shown), config.mask_ratio, config.seed)
                masked, rebuilt, error = reconstruct_images(model, shown, mask)
                group = (caption(model, hidden, error), shown.cpu(), masked.cpu(), rebuilt.cpu())
                figures.reconstructions(run.figure("reconstructions"), [group])
            with figures.optional("the picture neighbours.png could not be drawn"):
                figures.rows(run.figure("neighbours"), _neighbours(model, known, queries))
            with figures.optional("the picture curves.png could not be drawn"):
                figures.curves(run.figure("curves"), read_metrics(folder))
            with figures.optional("the tracker did not get the whole outcome"):
                log_outcome(tracker, folder, result)
            run.finish(result)
        return folder, result


def _follow(model: MaskedAutoencoderViT, known: ImageSet, queries: ImageSet) -> dict[str, float]:
    assert known.labels is not None and queries.labels is not None
    features, asked = extract_features(model, known), extract_features(model, queries)
    accuracy = knn_accuracy(features, known.labels, asked, queries.labels)
    return {"knn_accuracy": accuracy, "effective_rank": effective_rank(torch.cat([features, asked]))}


def _neighbours(model: MaskedAutoencoderViT, known: ImageSet, queries: ImageSet) -> list[list[tuple[str, Any]]]:
    """Rows of a validation image and the training images that are nearest to it."""
    queries = queries[torch.arange(min(RETRIEVED[0], len(queries)))]
    similarity, places = neighbours(extract_features(model, known), extract_features(model, queries), RETRIEVED[1])
    rows: list[list[tuple[str, Any]]] = []
    for image, near, found in zip(scale(queries.images[:]), similarity.tolist(), places.cpu(), strict=True):
        nearest = zip(near, scale(known[found].images[:]).cpu(), strict=True)
        rows.append([("validation", image.cpu()), *((f"{cosine:.2f}", other) for cosine, other in nearest)])
    return rows
