"""Fine-tuning: the encoder, from pretrained weights or from scratch, learns to classify."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from maelab import figures
from maelab.config import FinetuneConfig, RunOptions
from maelab.data import Dataset, ImageSet, load, reading_of, training_sets
from maelab.data.augment import augment, mix
from maelab.data.batches import batch_index, expect_batch, rank_slice, scale, step_generator, to_device
from maelab.errors import UsageError
from maelab.inference import class_probabilities, classification_scores, count_parameters, scores_by_class
from maelab.model import VisionTransformer
from maelab.progress import say_once
from maelab.runs import check_out, read_metrics
from maelab.runs.commands import ENCODER
from maelab.training.checkpoint import ModelSpec, load_model
from maelab.training.loop import Step, Task, train
from maelab.training.parallel import prepare, start_engine
from maelab.training.ranks import in_processes
from maelab.training.runlog import environment, open_task, say
from maelab.training.trackers import log_outcome
from maelab.weights import load_encoder

PICTURED = 24


def with_encoder_of(config: FinetuneConfig, init: ModelSpec) -> FinetuneConfig:
    """The config with the encoder's shape taken from the initial weights, but for a patch size to resize to.

    Raises:
        UsageError: if there is no encoder in them.
    """
    arguments = {"reg_tokens": 0, **init.arguments}
    if not set(ENCODER) <= arguments.keys():
        raise UsageError(
            f"--init {config.init} is a {init.model} and has no encoder; name a pretraining or fine-tuning run"
        )
    resized = {"patch_size"} if config.adapt_patch_embed == "resize" else set()
    return replace(config, **{field: arguments[field] for field in ENCODER if field not in resized})


def model_spec(config: FinetuneConfig, data: Dataset) -> ModelSpec:
    """The classifier that `config` asks for on this data.

    Raises:
        UsageError: if the data has no labels, or patch size and image size do not go together.
    """
    if data.train.labels is None or data.test is None:
        raise UsageError(
            f"{data.name} has no labels: to fine-tune, put the images of each class in a folder of its own"
        )
    _, in_chans, height, width = data.train.images.shape
    if height % config.patch_size or width % config.patch_size:
        raise UsageError(
            f"--patch-size {config.patch_size} does not divide the image size {height}x{width};"
            " give another --img-size or --patch-size"
        )
    arguments = {field: getattr(config, field) for field in (*ENCODER, "learned_pos_embed", "global_pool")}
    arguments |= {"img_size": (height, width), "in_chans": in_chans, "num_classes": len(data.class_names)}
    arguments |= {"drop_path_rate": config.drop_path, "patch_drop_rate": config.patch_drop}
    return ModelSpec("VisionTransformer", arguments, data.name, data.class_names, reading=data.reading)


def balanced_weights(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """What an image of each class weighs so that all classes weigh alike and the mean image 1, as scikit-learn's
    "balanced": N / (num_classes * images of the class).

    Args:
        labels: int64 (N,).
        num_classes: how many there are; one without an image weighs nothing.

    Returns:
        float32 (num_classes,), on the device of the labels.
    """
    count = labels.bincount(minlength=num_classes)
    return torch.where(count > 0, len(labels) / (num_classes * count.clamp(min=1)), 0.0).float()


def make_step(config: FinetuneConfig, train_set: ImageSet, num_classes: int, others: ImageSet | None = None) -> Step:
    """A training step on `train_set`: its batch and loss. `others`: what `unlabelled` means."""
    labels = train_set.labels
    assert labels is not None
    weight = balanced_weights(labels, num_classes) if config.class_weights == "balanced" else None

    def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor, ...]:
        index = batch_index(len(train_set), config.batch_size, config.seed, step)
        generator = step_generator(config.seed, step)
        images = augment(train_set.images, index, config, generator, part, parts)
        expect_batch(train_set, config.batch_size, config.seed, step + 1, part, parts)
        truth = labels[to_device(rank_slice(index, part, parts), labels.device)]
        mixed = mix(
            images, truth, num_classes, generator, mixup=config.mixup, cutmix=config.cutmix,
            label_smoothing=config.label_smoothing, rank=part, world=parts,
        )  # fmt: skip
        if others is None:
            return mixed
        index = batch_index(len(others), config.unlabelled * len(index), config.seed, step)
        varied = augment(others.images, index, config, generator, part, parts)
        plain = scale(others.images[to_device(rank_slice(index, part, parts), labels.device)])
        return *mixed, varied, plain

    def loss(model: Any, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = model(images).float()  # (b, classes)
        right = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        return {"loss": F.cross_entropy(logits, targets, weight), "accuracy": right}

    def loss_with_others(
        model: Any, teacher: Any, images: torch.Tensor, targets: torch.Tensor, varied: torch.Tensor, plain: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """As `loss`, and what the teacher says of images as they are, the model has to find in the same images varied
        (Cai et al. 2022, section 3.1). An image weighs as much as the teacher prefers its class to the second: a limit
        of certainty, as they have, shuts out all images where smoothed or mixed labels taught it to be modest."""
        with torch.no_grad():
            best, guesses = teacher(plain).float().softmax(dim=1).topk(2)  # (b, 2): the two most probable classes
            sure, guesses = best[:, 0] - best[:, 1], guesses[:, 0]
        logits, of_others = model(torch.cat([images, varied])).float().split([len(images), len(varied)])
        values = loss(lambda _: logits, images, targets)
        values["loss"] = values["loss"] + (F.cross_entropy(of_others, guesses, weight, reduction="none") * sure).mean()
        return {**values, "sure": sure.mean()}

    return Step(batch, loss) if others is None else Step(batch, loss_with_others, teacher=True)


@in_processes
def finetune(
    config: FinetuneConfig, *, options: RunOptions | None = None, recipe: str = "custom"
) -> tuple[Path, dict[str, Any]]:
    """Train a classifier, on a pretrained encoder or from scratch.

    The best epoch on validation is kept, or the last (`keep`); the test set is read once, with that epoch's weights.

    Args:
        config: what to do, e.g. `maelab.recipes.finetune_mnist()`; `init` says where the encoder comes from, and
            then decides its shape.
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
        config = with_encoder_of(config, init)
    engine = start_engine(options, config.precision)
    data = load(config.data, data_dir=options.data_dir, img_size=config.img_size, reading=reading_of(config))
    spec = model_spec(config, data)
    torch.manual_seed(config.seed)
    model = spec.build()
    assert isinstance(model, VisionTransformer)
    adapted: list[str] = []
    if source is not None:
        assert isinstance(source, VisionTransformer)
        adapted = load_encoder(model, source, patch_embed=config.adapt_patch_embed, pos_embed=config.adapt_pos_embed)
    if config.unlabelled:  # the teacher has to know something from the start
        given = {} if source is None or init is None or init.class_names != data.class_names else source.state_dict()
        head = {name: value for name, value in given.items() if name.startswith(("head.", "fc_norm."))}
        if not head.keys() >= {name for name in model.state_dict() if name.startswith(("head.", "fc_norm."))}:
            raise UsageError(
                f"--unlabelled begins from a classifier of the same classes, which --init {config.init} is not:"
                " fine-tune without it first, and name that run"
            )
        model.load_state_dict(head, strict=False)
        adapted.append("head kept")
    hardware = prepare(model, engine, options)
    begun_from = environment(hardware, data.checksums, source)
    with open_task(engine, "finetune", recipe, config, options, begun_from, data.listing) as (run, tracker):
        folder = run.folder
        if run.result:
            return folder, run.result
        for line in data.faults:
            say_once(line, data.name)
        train_set, val_set = (
            part.to(engine.device) for part in training_sets(data, config, fraction=config.label_fraction)
        )
        others = None
        if config.unlabelled:
            others = training_sets(data, config, unlabelled=True)[0].to(engine.device)
            if data.unlabelled is None and config.label_fraction == 1:
                raise UsageError(
                    f"all images of {data.name} to train on have labels, so --unlabelled adds nothing: put those"
                    " without a label into unlabelled/, or leave labels out by --label-fraction"
                )
        also = f" with labels, {len(others)} without" if others else ""
        say(
            f"finetune on {data.name}: {len(train_set)} images{also}, {len(val_set)} more for validation;"
            f" {len(data.class_names)} classes; {count_parameters(model) / 1e6:.2f}M parameters from"
            f" {'scratch' if config.init == 'none' else config.init}{''.join(f'; {a}' for a in adapted)};"
            f" {hardware}; {folder}"
        )
        num_classes = len(data.class_names)

        def scores(model: Any, part: ImageSet) -> dict[str, float]:
            assert part.labels is not None
            return classification_scores(class_probabilities(model, part), part.labels)

        task = Task(
            model=model,
            spec=spec,
            items=len(train_set),
            step=make_step(config, train_set, num_classes, others),
            validate=lambda model, epoch: scores(model, val_set),
            metric="accuracy",
            higher_is_better=True,
            patience=config.patience,
            keep_last=config.keep == "last",
            layer_decay=config.layer_decay,
        )
        outcome = train(engine, run, task, config, tracker)

        assert data.test is not None and data.test.labels is not None
        test_set = data.test.to(engine.device)
        with engine.autocast():
            probabilities = class_probabilities(model, test_set)
        assert test_set.labels is not None
        by_class = scores_by_class(probabilities, test_set.labels, data.class_names)
        result = {
            "task": "finetune",
            "data": data.name,
            "init": config.init,
            "adapted": adapted,
            "seed": config.seed,
            "epochs": outcome.epochs,
            "params": count_parameters(model),
            "train_images": len(train_set),
            "test": classification_scores(probabilities, test_set.labels) | by_class,
            "val": outcome.val,
            "train": outcome.train,
            "best_epoch": outcome.best_epoch,
            "train_time_s": outcome.train_time_s,
            "images_per_s": outcome.images_per_s,
        }
        if engine.is_global_zero:
            with figures.optional("the picture curves.png could not be drawn"):
                figures.curves(run.figure("curves"), read_metrics(folder), outcome.best_epoch)
            with figures.optional("the picture predictions.png could not be drawn"):
                guesses, truth = probabilities.argmax(dim=1), test_set.labels
                order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0)).to(truth.device)
                fits = (guesses == truth)[order]  # shuffled, since the images of a folder lie class by class
                wrong, right = order[~fits], order[fits]
                shown = torch.cat([right[: PICTURED - min(len(wrong), PICTURED // 3)], wrong[: PICTURED // 3]])
                figures.predictions(
                    run.figure("predictions"), scale(test_set.images[shown]).cpu(), truth[shown].tolist(),
                    probabilities[shown].cpu(), data.class_names,
                )  # fmt: skip
            if "confusion" in by_class:
                with figures.optional("the picture confusion.png could not be drawn"):
                    figures.confusion(run.figure("confusion"), by_class["confusion"], data.class_names)
            with figures.optional("the tracker did not get the whole outcome"):
                log_outcome(tracker, folder, result)
            run.finish(result)
        return folder, result
