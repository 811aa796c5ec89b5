"""Which images of a folder are unlike the others, and where."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from maelab import figures
from maelab.config import ComputeOptions, check_count
from maelab.data import ImageSet
from maelab.data.batches import in_batches, scale
from maelab.encoder import open_encoder, pictures, readable
from maelab.errors import UsageError
from maelab.inference import EVAL_BATCH, extract_features, patch_errors
from maelab.model import MaskedAutoencoderViT, VisionTransformer, patchify
from maelab.model.masks import hidden_count, hide_first, hiding_order
from maelab.training.checkpoint import ModelSpec

NEIGHBOURS = 5
# Half of the patches hidden tell more than the three quarters of training, and the worst patches more than the mean of
# all, as defects are small (docs/log.md).
HIDDEN, WORST = 0.5, 16
KNOWN = 8_000  # patches to compare with


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

    Up to three things are measured. Distance: the mean cosine distance of the encoder's features to those of the 5
    nearest other images. Patch: how far the worst patches are, in pixels, from the nearest patch of another image.
    Error, of an autoencoder: how badly the worst patches are rebuilt from the others, half of them being hidden, under
    several masks. The worst are one in sixteen. Each is put in deviations above what is usual: (value - median) /
    (1.4826 x median absolute deviation) of the folder itself, or of `like`. The score is the largest of them.

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
        {"run", "out", "images", "unreadable", "top", "ranked": [{"path", "score", "distance", "patch", "error"}]}, all
        images, the oddest first. Distance is that of the features; the others are in deviations.

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

    known, owners = _known_patches(like or folder, model, spec, seed)

    def distances(path: str, image: torch.Tensor) -> torch.Tensor:
        """Of each patch of (C, H, W) to the nearest known one of another image: (L,)."""
        near = torch.cdist(patchify(scale(image[None]), model.patch_size)[0], known)  # (L, patches)
        near[:, owners.get(path, [])] = math.inf
        return near.amin(dim=1)

    def measured(paths: Iterable[str | Path], said: list[str]) -> tuple[list[str], torch.Tensor, list[torch.Tensor]]:
        """The images' paths, their features (N, D), and maps (N, L) of the distances and, if there are, the errors."""
        names: list[str] = []
        features, far, wrong = [], [], []
        for batch, read in readable(paths, model, spec, said):
            images = ImageSet(read, None).to(engine.device)
            features.append(extract_features(model, images).cpu())
            far += [distances(path, image)[None] for path, image in zip(batch, read, strict=True)]
            if decoder is not None:
                wrong += [part.cpu() for part in in_batches(errors, images, EVAL_BATCH)]
            names += batch
        return names, torch.cat(features), [torch.cat(part) for part in (far, wrong) if part]

    names, features, maps = measured([folder], unreadable)
    usual, usual_maps = (features, maps) if like is None else measured([like], [])[1:]
    if len(usual) < NEIGHBOURS + 1:
        raise UsageError(f"{like or folder} has {len(usual)} images; {NEIGHBOURS + 1} are the least to compare with")
    centre = usual.mean(dim=0)
    there, here = F.normalize(usual - centre), F.normalize(features - centre)
    distance = _distance(here, there, itself=like is None)
    scores = [_above(distance, distance if like is None else _distance(there, there, itself=True))]
    columns = {"distance": distance}
    heat = torch.zeros(len(names), model.num_patches)
    for name, one, other in zip(("patch", "error"), maps, usual_maps, strict=False):
        one, other = _above(one, other), _above(other, other)
        heat = torch.maximum(heat, one)
        worst, expected = (x.topk(max(1, model.num_patches // WORST), dim=1).values.mean(dim=1) for x in (one, other))
        columns[name] = _above(worst, expected)
        scores.append(columns[name])
    score = torch.stack(scores).amax(dim=0)
    order = score.argsort(descending=True, stable=True).tolist()
    read = pictures([names[i] for i in order[:top]], model, spec)
    shown = [i for i in order[:top] if names[i] in read]
    if shown:
        images = torch.stack([read[names[i]] for i in shown])
        lines = [[(f"{score[i]:.1f} {Path(names[i]).name}", read[names[i]]) for i in shown]]
        lines.append([("", picture) for picture in figures.overlay(images, heat[shown].unflatten(1, model.grid_size))])
        figures.rows(out, lines)
    columns["score"] = score
    ranked = [{"path": names[i]} | {name: float(column[i]) for name, column in columns.items()} for i in order]
    return {
        "run": str(run), "out": str(out), "images": len(names), "unreadable": len(unreadable), "top": top,
        "ranked": ranked,
    }  # fmt: skip


def _known_patches(
    folder: Path | str, model: VisionTransformer, spec: ModelSpec, seed: int
) -> tuple[torch.Tensor, dict[str, list[int]]]:
    """A seeded choice of the patches of a folder's images, float32 (n, p * p * C), and which of them are whose."""
    generator = torch.Generator().manual_seed(seed)
    pool, lots, paths = torch.empty(0, model.patch_size**2 * model.in_chans), torch.empty(0), []
    for names, images in readable([folder], model, spec, []):
        pool = torch.cat([pool, patchify(scale(images), model.patch_size).flatten(0, 1)])
        lots = torch.cat([lots, torch.rand(len(pool) - len(lots), generator=generator)])
        paths += [name for name in names for _ in range(model.num_patches)]
        keep = lots.argsort()[:KNOWN]  # the smallest of all so far: each patch has the same chance
        pool, lots, paths = pool[keep], lots[keep], [paths[k] for k in keep.tolist()]
    owners: dict[str, list[int]] = {}
    for k, path in enumerate(paths):
        owners.setdefault(path, []).append(k)
    return pool, owners


def _distance(asked: torch.Tensor, known: torch.Tensor, itself: bool) -> torch.Tensor:
    """Mean cosine distance of unit vectors (N, D) to their nearest among (M, D): (N,). With `itself` the two are the
    same images, and the nearest is the image itself."""
    nearest = [(part @ known.T).topk(NEIGHBOURS + itself, dim=1).values[:, int(itself) :] for part in asked.split(1024)]
    return 1 - torch.cat(nearest).mean(dim=1)


def _above(values: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """Values (N,) or maps (N, L) as deviations above what is usual (M, ...), robustly: a few odd ones among it change
    nothing. A place of maps where nothing ever varies, an empty corner say, counts as one of mean spread."""
    median = usual.median(dim=0).values
    spread = 1.4826 * (usual - median).abs().median(dim=0).values
    return (values - median) / spread.clamp(min=max(1e-9, float(spread.mean())))
