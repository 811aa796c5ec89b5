"""Which images of a folder are unlike the others, and where."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from maelab import figures
from maelab.config import ComputeOptions, check_count
from maelab.data import ImageSet
from maelab.data.batches import in_batches
from maelab.encoder import open_encoder, pictures, readable
from maelab.errors import UsageError
from maelab.inference import EVAL_BATCH, extract_features, patch_errors
from maelab.model import MaskedAutoencoderViT
from maelab.model.masks import hidden_count, hide_first, hiding_order

NEIGHBOURS = 5
# Half of the patches hidden tell more than the three quarters of training, and the worst patches more than the mean of
# all, as defects are small (docs/log.md).
HIDDEN, WORST = 0.5, 16


def odd(
    run: Path | str,
    folder: Path | str,
    *,
    like: Path | str | None = None,
    masks: int = 16,
    top: int = 8,
    seed: int = 0,
    out: Path | str = Path("odd.png"),
    options: ComputeOptions | None = None,
) -> dict[str, Any]:
    """Find the images of a folder that are unlike the others.

    Two things are measured, and the score is the larger of them: how far the image is from its neighbours (the mean
    cosine distance of its features to those of the 5 nearest), and of an autoencoder, how badly its worst patches (one
    in sixteen) are rebuilt from the others, half of them being hidden, under several masks. Both are in deviations
    above what is usual: (value - median) / (1.4826 x median absolute deviation) of the folder itself, or of `like`; of
    patches, of what is usual at their place. The picture shows where.

    Args:
        run: run folder or checkpoint of a masked autoencoder, or of a classifier, which gives distances alone.
        folder: images to judge.
        like: folder of images known to be as they should be; None compares the images with each other.
        masks: to rebuild each image under; more of them measure the error better.
        top: how many to draw, and to name without --json.
        seed: chooses the masks.
        out: picture to write.
        options: where to compute.

    Returns:
        {"run", "out", "images", "unreadable", "top", "ranked": [{"path", "score", "distance", "error"}]}, all images,
        the oddest first.

    Raises:
        UsageError: if the run cannot be read, or there are too few images to compare.
        RunError: if no image can be read, or the picture cannot be written.
    """
    out = figures.png(out)
    check_count("--masks", masks, 1, 1_000)
    check_count("--top", top, 1, 64)
    check_count("--seed", seed)
    model, spec, engine = open_encoder(run, "avg", options or ComputeOptions())
    decoder = model if isinstance(model, MaskedAutoencoderViT) else None
    unreadable: list[str] = []

    def errors(images: torch.Tensor) -> torch.Tensor:
        """Of each patch of (n, C, H, W), the mean over the masks that hide it: (n, L)."""
        assert decoder is not None
        total = torch.zeros(len(images), decoder.num_patches, device=images.device)
        times = torch.zeros(decoder.num_patches, device=images.device)
        for order in hiding_order("random", decoder.grid_size, masks, seed):  # (L,), the same for every image
            mask = hide_first(order[None], hidden_count("random", decoder.grid_size, HIDDEN)).to(images.device)
            total += patch_errors(decoder, images, mask.expand(len(images), -1)) * mask
            times += mask[0]
        return total / times.clamp(min=1)

    def measured(paths: Iterable[str | Path]) -> tuple[list[str], torch.Tensor, torch.Tensor | None]:
        names: list[str] = []
        features, maps = [], []
        for batch, read in readable(paths, model, spec, unreadable):
            names += batch
            images = ImageSet(read, None).to(engine.device)
            features.append(extract_features(model, images).cpu())
            if decoder is not None:
                maps += [part.cpu() for part in in_batches(errors, images, EVAL_BATCH)]
        return names, torch.cat(features), torch.cat(maps) if maps else None

    names, features, maps = measured([folder])
    usual = (features, maps) if like is None else measured([like])[1:]
    if len(usual[0]) < NEIGHBOURS + 1:
        raise UsageError(f"{like or folder} has {len(usual[0])} images; {NEIGHBOURS + 1} are the least to compare with")
    centre = usual[0].mean(dim=0)
    known, asked = F.normalize(usual[0] - centre), F.normalize(features - centre)
    distance = _distance(asked, known, itself=like is None)
    scores = [_above(distance, distance if like is None else _distance(known, known, itself=True))]
    rows: list[dict[str, Any]] = [{"path": p, "distance": d} for p, d in zip(names, distance.tolist(), strict=True)]
    if maps is not None and usual[1] is not None:
        maps, there = _above(maps, usual[1]), _above(usual[1], usual[1])
        error, expected = (x.topk(max(1, model.num_patches // WORST), dim=1).values.mean(dim=1) for x in (maps, there))
        scores.append(_above(error, expected))
        rows = [row | {"error": e} for row, e in zip(rows, error.tolist(), strict=True)]
    score = torch.stack(scores).amax(dim=0)
    order = score.argsort(descending=True, stable=True).tolist()
    read = pictures([names[i] for i in order[:top]], model, spec)
    shown = [i for i in order[:top] if names[i] in read]
    if shown:
        images = torch.stack([read[names[i]] for i in shown])
        lines = [[(f"{score[i]:.1f} {Path(names[i]).name}", read[names[i]]) for i in shown]]
        if maps is not None:
            heat = maps[shown].clamp(min=0).unflatten(1, model.grid_size)
            lines.append([("", picture) for picture in figures.overlay(images, heat)])
        figures.rows(out, lines)
    ranked = [{**rows[i], "score": float(score[i])} for i in order]
    return {
        "run": str(run), "out": str(out), "images": len(names), "unreadable": len(unreadable), "top": top,
        "ranked": ranked,
    }  # fmt: skip


def _distance(asked: torch.Tensor, known: torch.Tensor, itself: bool) -> torch.Tensor:
    """Mean cosine distance of unit vectors (N, D) to their nearest among (M, D): (N,). With `itself` the two are the
    same images, and the nearest is the image itself."""
    nearest = [(part @ known.T).topk(NEIGHBOURS + itself, dim=1).values[:, int(itself) :] for part in asked.split(1024)]
    return 1 - torch.cat(nearest).mean(dim=1)


def _above(values: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """Values (N, ...) as deviations above what is usual (M, ...), robustly: a few odd ones among it change nothing."""
    median = usual.median(dim=0).values
    return (values - median) / (1.4826 * (usual - median).abs().median(dim=0).values).clamp(min=1e-9)
