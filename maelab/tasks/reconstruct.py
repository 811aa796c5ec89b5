"""Pictures of what a masked autoencoder sees, and what it makes of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from maelab import figures
from maelab.config import DataOptions, check_count
from maelab.data.batches import scale
from maelab.data.images import read_mask
from maelab.errors import UsageError
from maelab.inference import (
    caption,
    check_masking,
    reconstruct_images,
    visible_mean_mse,
)
from maelab.model import MaskedAutoencoderViT
from maelab.model.masks import hidden_count, hide_first, hiding_order
from maelab.training.checkpoint import images_to_show, load_model
from maelab.training.parallel import prepare, start_engine

FRAMES = 60


def reconstruct(
    run: Path | str,
    images: Sequence[str | Path] = (),
    *,
    mask_ratios: Sequence[float] | None = None,
    mask_kind: Literal["random", "block", "grid"] = "random",
    mask_file: Path | str | None = None,
    sweep: bool = False,
    count: int = 8,
    seed: int = 0,
    out: Path | str = Path("reconstruction.png"),
    options: DataOptions | None = None,
) -> dict[str, Any]:
    """Draw original, masked and rebuilt images.

    Args:
        run: run folder or checkpoint of a masked autoencoder.
        images: image files, folders, globs; none takes test images of the data it was trained on.
        mask_ratios: one group of rows for each share of hidden patches; None is the ratio of training.
        mask_kind: block: one block for each image; grid: the regular pattern nearest to the ratio.
        mask_file: what to hide: the dark parts of an image or the 1s of a text, with a cell for each patch or pixel.
        sweep: draw the ratios 0.1 to 0.9, or into a .gif an animation of vanishing patches, each mask within the next.
        count: how many images of the data set.
        seed: chooses images and masks.
        out: picture to write.
        options: where to compute.

    Returns:
        {"run", "out", "images", "patches"} and by ratio "masked_mse" (error over the hidden pixels of the images
        shown), "visible_mean_mse" (that of the mean of each image's visible pixels) and "hidden" (patches). The ratio
        is the one asked for, or for a grid, a file and an animation the one that results.

    Raises:
        UsageError, RunError: if the run or an image cannot be read, or a ratio hides nothing or everything.
    """
    out, options = Path(out), options or DataOptions()
    model, spec = load_model(run)
    if not isinstance(model, MaskedAutoencoderViT):
        raise UsageError(f"{run} is a {spec.model}; only a pretraining run can reconstruct")
    check_count("--seed", seed)
    ratios = list(mask_ratios or (spec.mask_ratio or 0.75,))
    for ratio in ratios:
        check_masking(model.num_patches, ratio)
    if sum((mask_ratios is not None, mask_file is not None, sweep)) > 1:
        raise UsageError("--mask-ratio, --mask-file and --sweep exclude each other")
    if mask_file is not None and mask_kind != "random":
        raise UsageError("--mask-kind and --mask-file exclude each other")
    animated = out.suffix.lower() == ".gif"
    if animated and not sweep:
        raise UsageError(f"--out {out}: only --sweep makes an animation; give a name that ends in .png")
    if out.suffix.lower() != ".png" and not animated:
        also = " (or in .gif, for an animation)" * sweep
        raise UsageError(f"--out {out}: the picture is a PNG; give a name that ends in .png{also}")
    grid, total = model.grid_size, model.num_patches
    drawn = read_mask(Path(mask_file), grid, model.img_size) if mask_file is not None else None
    shown = images_to_show(model, spec, images, count=count, seed=seed, options=options)

    if drawn is not None:
        masks = {round(float(drawn.mean()), 4): drawn.expand(len(shown), -1)}
    else:
        order = hiding_order(mask_kind, grid, len(shown), seed)
        if animated:
            steps = min(FRAMES, total - 1)
            asked = {count / total: count for count in torch.linspace(1, total - 1, steps).round().int().tolist()}
        else:
            ratios = [tenths / 10 for tenths in range(1, 10)] if sweep else ratios
            asked = {ratio: hidden_count(mask_kind, grid, ratio) for ratio in ratios}
        exact = animated or mask_kind == "grid"
        masks = {
            round(hidden / total, 4) if exact else ratio: hide_first(order, hidden)
            for ratio, hidden in asked.items()
            if 0 < hidden < total  # of a sweep over few patches
        }
    engine = start_engine(options)
    prepare(model.to(engine.device), engine, options)
    result: dict[str, Any] = {"run": str(run), "out": str(out), "images": len(shown), "patches": total}
    result |= {"masked_mse": {}, "visible_mean_mse": {}, "hidden": {}}
    x = scale(shown.to(engine.device))

    def groups() -> Iterator[tuple[str, Any, Any, Any]]:
        for ratio, mask in masks.items():
            with engine.autocast():
                masked, rebuilt, error = reconstruct_images(model, x, mask)
            mean = visible_mean_mse(model, x, mask)
            found = {"masked_mse": error, "visible_mean_mse": mean, "hidden": int(mask[0].sum())}
            for name, value in found.items():
                result[name][ratio] = value
            yield caption(model, found["hidden"], error, mean), x.cpu(), masked.cpu(), rebuilt.cpu()

    if animated:
        figures.animation(out, groups())
    elif sweep:
        figures.ratio_sweep(out, list(groups()), result["masked_mse"], result["visible_mean_mse"])
    else:
        figures.reconstructions(out, list(groups()))
    return result
