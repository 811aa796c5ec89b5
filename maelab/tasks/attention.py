"""Pictures of where a model looks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maelab import figures
from maelab.config import DataOptions
from maelab.data import ImageSet
from maelab.data.batches import scale
from maelab.errors import UsageError
from maelab.inference import attention_maps, attention_rollout, attention_to_patches, class_probabilities
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.checkpoint import images_to_show, load_model
from maelab.training.parallel import prepare, start_engine


def attention(
    run: Path | str,
    images: Sequence[str | Path] = (),
    *,
    count: int = 8,
    seed: int = 0,
    out: Path | str = Path("attention.png"),
    options: DataOptions | None = None,
) -> dict[str, Any]:
    """Draw where a model looks.

    That is the attention of its last block over images, and attention rollout.

    Args:
        run: run folder or checkpoint of a classifier or a masked autoencoder; the encoder is used, unmasked.
        images: image files, folders, globs; none takes test images of the data it was trained on.
        count: how many images of the data set.
        seed: chooses them.
        out: picture to write.
        options: where to compute.

    Returns:
        {"run", "out", "images", "of": whose attention it is, "labels": the predicted classes, [] for an autoencoder}.

    Raises:
        UsageError, RunError: if the run or an image cannot be read, or the model has no blocks.
    """
    out, options = figures.png(out), options or DataOptions()
    model, spec = load_model(run)
    if not isinstance(model, VisionTransformer) or not len(model.blocks):
        raise UsageError(f"{run} is a {spec.model} without attention; name the run that it judged")
    shown = images_to_show(model, spec, images, count=count, seed=seed, options=options)
    engine = start_engine(options, "fp32")
    prepare(model.to(engine.device), engine, options)
    shown = shown.to(engine.device)
    last, rolled = [], []
    for x in scale(shown).split(1):  # one at a time: the maps of all heads and layers are large
        maps = attention_maps(model, x)
        last.append(attention_to_patches(model, maps[-1].mean(dim=1)).cpu())
        rolled.append(attention_to_patches(model, attention_rollout(maps)).cpu())
    titles: list[str] = []
    labels: list[str] = []
    if not isinstance(model, MaskedAutoencoderViT):
        names = spec.class_names or tuple(map(str, range(model.num_classes)))
        shares, best = class_probabilities(model, ImageSet(shown, None)).max(dim=1)
        labels = [names[i] for i in best.tolist()]
        titles = [f"{label} ({share:.0%})" for label, share in zip(labels, shares.tolist(), strict=True)]
    of = "the class token" if model.global_pool == "token" else "all patches, averaged"
    x = scale(shown).cpu()
    rows = (x, figures.overlay(x, torch.cat(last)), figures.overlay(x, torch.cat(rolled)))
    title = f"attention of {of}; mean of the heads; bright: the most of its image"
    figures.reconstructions(out, [(title, *rows)], ("image", "last block", "rollout"), titles)
    return {"run": str(run), "out": str(out), "images": len(shown), "of": of, "labels": labels}
