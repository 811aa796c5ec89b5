"""Pictures of what a masked autoencoder sees, and what it makes of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maelab import figures
from maelab.config import RunOptions
from maelab.data.batches import scale
from maelab.data.folder import read_all
from maelab.errors import UsageError
from maelab.inference import caption, check_masking, reconstruct_images
from maelab.model import MaskedAutoencoderViT
from maelab.training.checkpoint import load_matching_data, load_model
from maelab.training.parallel import prepare, start_engine


def reconstruct(
    run: str | Path,
    images: Sequence[str | Path] = (),
    *,
    mask_ratios: Sequence[float] | None = None,
    count: int = 8,
    seed: int = 0,
    out: Path,
    options: RunOptions | None = None,
) -> dict[str, Any]:
    """Draw original, masked and rebuilt images.

    Args:
        run: run folder or checkpoint of a masked autoencoder.
        images: image files; none takes test images of the data set that the model was trained on.
        mask_ratios: one group of rows for each; None is the ratio of training.
        count: how many images of the data set.
        seed: chooses images and masks.
        out: PNG to write.
        options: where to run.

    Returns:
        {"run", "out", "images", "masked_mse": {ratio: error over the hidden pixels of the images shown}}.

    Raises:
        UsageError, RunError: if the run or an image cannot be read, or a ratio hides nothing or everything.
    """
    options = options or RunOptions()
    model, spec = load_model(run)
    if not isinstance(model, MaskedAutoencoderViT):
        raise UsageError(f"{run} is a {spec.model}; only a pretraining run can reconstruct")
    ratios = list(mask_ratios or (spec.mask_ratio or 0.75,))
    for ratio in ratios:
        check_masking(model.num_patches, ratio)
    if count < 1:
        raise UsageError(f"--count must be at least 1, got {count}")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    if images:
        shown = read_all(images, model.img_size, model.in_chans)
    else:
        data = load_matching_data(spec, None, options.data_dir)
        pool = (data.test or data.train).images
        shown = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]
    engine = start_engine(options)
    prepare(model.to(engine.device), engine, options)
    groups, errors = [], {}
    for ratio in ratios:
        with engine.autocast():
            x = scale(shown.to(engine.device))
            masked, rebuilt, error = reconstruct_images(model, x, ratio, seed)
        errors[ratio] = error
        groups.append((caption(model, ratio, error), x.cpu(), masked.cpu(), rebuilt.cpu()))
    figures.reconstructions(out, groups)
    return {"run": str(run), "out": str(out), "images": len(shown), "masked_mse": errors}
