"""Classes of image files that a fine-tuned model has never seen, with probabilities."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from maelab import figures
from maelab.config import ComputeOptions, check_count
from maelab.data import ImageSet, compare_images
from maelab.data.batches import scale
from maelab.data.folder import list_folder
from maelab.data.images import read_batches
from maelab.errors import UsageError
from maelab.inference import class_probabilities
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.runs import listing_of, locate
from maelab.training.checkpoint import ModelSpec, load_model
from maelab.training.parallel import prepare, start_engine
from maelab.training.runlog import say

PICTURED = 64


def predict(
    run: Path | str,
    paths: str | Path | Iterable[str | Path],
    *,
    top: int = 3,
    batch_size: int = 256,
    gallery: Path | str | None = None,
    options: ComputeOptions | None = None,
) -> Iterator[dict[str, Any]]:
    """Classify images with a fine-tuned model.

    They are prepared as those of a folder are for training: scaled to cover the model's image size, cropped around the
    centre, made grey or coloured. There may be any number: they are taken a batch at a time.

    Args:
        run: run folder or checkpoint of a classifier.
        paths: image files, folders, globs, or on the command line - for paths from stdin, one a line; scaled and
            cropped as in training, never inverted: a model of MNIST expects white digits on black.
        top: how many classes to name for each image, the likeliest first.
        batch_size: images in memory at a time.
        gallery: PNG to draw of the first 64 images with their classes.
        options: where to compute.

    Returns:
        An iterator over the images in order: {"path", "label", "probability", "top": [{"label", "probability"}, ...]},
        or {"path", "error"} for what cannot be read.

    Raises:
        UsageError, RunError: at once, if the run cannot be read or is no classifier; RunError on drawing the gallery.
    """
    model, spec = load_model(run)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{run} is a linear probe; predict needs a fine-tuned classifier")
    if isinstance(model, MaskedAutoencoderViT):
        raise UsageError(
            f"{run} is an autoencoder and knows no classes; make it a classifier with maelab finetune --init {run}"
        )
    check_count("--top", top, 1, 10_000)
    check_count("--batch-size", batch_size, 1, 2**20)
    gallery = None if gallery is None else figures.png(gallery, "--gallery")
    names = spec.class_names or tuple(map(str, range(model.num_classes)))
    options = options or ComputeOptions()
    engine = start_engine(options)
    prepare(model.to(engine.device), engine, options)

    def entries() -> Iterator[dict[str, Any]]:
        pictured: list[tuple[torch.Tensor, torch.Tensor]] = []
        inputs = _noted([paths] if isinstance(paths, str | Path) else paths, run, spec)
        for batch in read_batches(inputs, model.img_size, model.in_chans, spec.reading, batch_size):
            images = [image for _, image in batch if not isinstance(image, str)]
            rows = iter(())
            if images:
                with engine.autocast():
                    stacked = ImageSet(torch.stack(images), None).to(engine.device)
                    probabilities = class_probabilities(model, stacked).cpu()
                rows = zip(*(x.tolist() for x in probabilities.topk(min(top, len(names)))), strict=True)
                if gallery is not None and len(pictured) < PICTURED:
                    pictured += list(zip(images, probabilities, strict=True))[: PICTURED - len(pictured)]
                    shown, known = map(torch.stack, zip(*pictured, strict=True))
                    figures.predictions(gallery, scale(shown), None, known, names)
            for path, image in batch:
                if isinstance(image, str):
                    yield {"path": path, "error": image}
                    continue
                ranked = [{"label": names[i], "probability": p} for p, i in zip(*next(rows), strict=True)]
                yield {"path": path, **ranked[0], "top": ranked}

    return entries()


def _noted(inputs: Iterable[str | Path], run: str | Path, spec: ModelSpec) -> Iterator[str | Path]:
    """The same inputs; stderr says where one is the folder that the model was trained on, and what changed there."""
    trained_on = spec.data
    own = Path(trained_on.removeprefix("folder:")).expanduser().resolve() if trained_on.startswith("folder:") else None
    for given in inputs:
        if own is not None and Path(given).is_dir() and Path(given).resolve() == own:
            before = listing_of(locate(run))
            changes = compare_images(before, list_folder(trained_on, spec.reading)) if before else None
            since = f"; since then {changes}" if changes else ""
            say(f"{given} is the folder that {run} was trained on, so it has seen most of these images{since}")
        yield given
