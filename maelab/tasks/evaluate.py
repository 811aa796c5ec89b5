"""Evaluation of a finished run: accuracy of a classifier, error on hidden pixels of a masked autoencoder."""

from pathlib import Path
from typing import Any, Literal

from maelab.config import DataOptions
from maelab.errors import UsageError
from maelab.inference import check_masking, class_probabilities, classification_scores, masked_mse, scores_by_class
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.runs import locate
from maelab.training.checkpoint import choose_part, load_matching_data, load_model
from maelab.training.parallel import prepare, start_engine


def evaluate(
    run: Path | str,
    *,
    data: str | None = None,
    split: Literal["test", "val"] = "test",
    mask_ratio: float | None = None,
    options: DataOptions | None = None,
) -> dict[str, Any]:
    """Measure a finished run on its test or validation images.

    Args:
        run: run folder or checkpoint of a masked autoencoder or a classifier.
        data: data set; None is the one it was trained on.
        split: which images.
        mask_ratio: share of patches to hide from an autoencoder; None is that of its training.
        options: where to compute.

    Returns:
        {"run", "data", "split", "images"} and for a classifier "accuracy", "loss" and what
        `maelab.inference.scores_by_class` says, for an autoencoder "masked_mse", "loss" and "mask_ratio".

    Raises:
        UsageError, RunError: if the run cannot be read or the data does not fit it.
    """
    options = options or DataOptions()
    model, spec = load_model(run)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{run} is a linear probe; its figures are in its result.json")
    ratio = mask_ratio if mask_ratio is not None else spec.mask_ratio or 0.75
    if isinstance(model, MaskedAutoencoderViT):
        check_masking(model.num_patches, ratio)
    dataset = load_matching_data(spec, data, options.data_dir)
    engine = start_engine(options)
    prepare(model.to(engine.device), engine, options)
    part = choose_part(dataset, split, locate(run), spec.data).to(engine.device)
    result: dict[str, Any] = {"run": str(run), "data": dataset.name, "split": split, "images": len(part)}
    with engine.autocast():
        if isinstance(model, MaskedAutoencoderViT):
            return result | {"mask_ratio": ratio} | masked_mse(model, part, ratio, seed=0)
        if part.labels is None:
            raise UsageError(f"{dataset.name} has no labels to evaluate a classifier with")
        if dataset.class_names != spec.class_names:
            ours, theirs = (
                f"{len(names)} ({', '.join(names[:3])}, ...)" for names in (spec.class_names, dataset.class_names)
            )
            raise UsageError(
                f"{dataset.name} has other classes than the model was trained on: {theirs} instead of {ours}"
            )
        probabilities = class_probabilities(model, part)
    scores = classification_scores(probabilities, part.labels)
    return result | scores | scores_by_class(probabilities, part.labels, dataset.class_names)
