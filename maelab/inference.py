"""What a trained model says about images: features, neighbours, reconstructions, errors, probabilities."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from maelab.data import ImageSet
from maelab.data.batches import in_batches
from maelab.errors import UsageError
from maelab.model import MaskedAutoencoderViT, VisionTransformer, patchify, unpatchify
from maelab.model.mae import NORM_PIX_EPS
from maelab.model.masks import len_keep
from maelab.model.vit import Block

EVAL_BATCH = 512  # images at a time, and fewer where memory does not hold so many
MATRIX = 1_000  # classes at most of a confusion matrix as a whole


def check_masking(num_patches: int, mask_ratio: float) -> None:
    """Refuse a ratio that would hide every patch or none.

    Raises:
        UsageError: if it does.
    """
    if not 0 < mask_ratio < 1:
        raise UsageError(f"--mask-ratio must lie between 0 and 1, got {mask_ratio}")
    kept = len_keep(num_patches, mask_ratio)
    if not 0 < kept < num_patches:
        what = "no patch to see" if kept == 0 else "no patch hidden"
        raise UsageError(f"--mask-ratio {mask_ratio} leaves {what}: the image has {num_patches} patches")


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def extract_features(model: VisionTransformer, data: ImageSet, pool: Literal["token", "avg"] = "avg") -> torch.Tensor:
    """Pooled features of every image, float32 (N, D): the class token, or the mean of the patch tokens, after `norm`.

    Unmasked and deterministic.

    Args:
        model: a classifier or a masked autoencoder, of which the encoder is used; it is put in evaluation mode.
        data: images of the model's size and channels, on its device.
        pool: 'token' or 'avg'.

    Raises:
        ValueError: if the class token is asked for and the model has none.
    """
    if pool == "token" and not model.num_prefix_tokens:
        raise ValueError("this encoder has no class token; use pool='avg'")
    model.eval()

    def pooled(images: torch.Tensor) -> torch.Tensor:
        return model.pool(model.forward_features(images), pool).float()

    return torch.cat(list(in_batches(pooled, data, EVAL_BATCH)))


@torch.no_grad()
def attention_maps(model: VisionTransformer, imgs: torch.Tensor) -> torch.Tensor:
    """What every token attends to in every block of the encoder, unmasked: softmax(q k^T / sqrt(d)).

    Args:
        model: a classifier or a masked autoencoder; it is put in evaluation mode.
        imgs: (B, C, H, W) in [-1, 1].

    Returns:
        (depth, B, heads, L, L) float32, L = prefix + patches; a row belongs to the token that attends, and sums to 1.
    """
    maps, x = [], model.eval().embed(model.to_patches(imgs))
    for block in model.blocks:
        assert isinstance(block, Block)
        qkv = block.attn.qkv(block.norm1(x)).float().unflatten(2, (3, block.attn.num_heads, -1))  # (B, L, 3, heads, d)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        maps.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1))
        x = block(x)
    return torch.stack(maps)


def attention_rollout(maps: torch.Tensor) -> torch.Tensor:
    """How much of each token of the input reaches each token of the output, if attention were all there is (Abnar and
    Zuidema 2020, arXiv 2005.00928, section 3): heads averaged, the identity added for the residual connection, rows
    made to sum to 1 again, and the layers multiplied.

    Args:
        maps: (depth, B, heads, L, L) of `attention_maps`.

    Returns:
        (B, L, L); a row belongs to the token of the output, and sums to 1.
    """
    maps = maps.mean(dim=2) + torch.eye(maps.shape[-1], device=maps.device)  # (depth, B, L, L)
    maps = maps / maps.sum(dim=-1, keepdim=True)
    rolled = maps[0]
    for layer in maps[1:]:
        rolled = layer @ rolled
    return rolled


def attention_to_patches(model: VisionTransformer, attention: torch.Tensor) -> torch.Tensor:
    """Attention (B, L, L) as a picture, (B, rows, columns): that of the class token where the model's features are
    taken from it; otherwise what each patch receives from all patches, whose mean is taken then."""
    prefix = model.num_prefix_tokens
    rows = attention[:, :1] if model.global_pool == "token" else attention[:, prefix:]
    return rows.mean(dim=1)[:, prefix:].unflatten(1, model.grid_size)


def knn_accuracy(
    features: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, query_labels: torch.Tensor, k: int = 20
) -> float:
    """Share of queries whose class wins the vote of their k nearest neighbours.

    Cosine similarity of centred features; a vote weighs exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978,
    section 3.4).

    Args:
        features: (N, D), float32, with labels (N,).
        queries: (M, D) with query_labels (M,).
        k: neighbours; at most N are used.
    """
    classes = int(torch.cat([labels, query_labels]).max()) + 1
    right = 0
    found = zip(*(x.split(1024) for x in (*neighbours(features, queries, k), query_labels)), strict=True)
    for similarity, nearest, truth in found:
        votes = torch.zeros(len(truth), classes, device=truth.device)
        votes.scatter_add_(1, labels[nearest], (similarity / 0.07).exp())
        right += int((votes.argmax(dim=1) == truth).sum())
    return right / len(queries)


def neighbours(features: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of features (N, D) for queries (M, D), by the cosine of centred features.

    Returns:
        similarity (M, k) in [-1, 1], falling, and place (M, k) among the N; at most N.
    """
    centre = features.mean(dim=0)
    features, queries = F.normalize(features - centre), F.normalize(queries - centre)
    with torch.autocast(queries.device.type, enabled=False):  # 8 bits of bf16 cannot tell near neighbours apart
        found = [(chunk @ features.T).topk(min(k, len(features)), dim=1) for chunk in queries.split(1024)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def effective_rank(features: torch.Tensor) -> float:
    """How many directions features (N, D) spread over: exp of the entropy of their singular values' shares, between 1
    and D (RankMe: Garrido et al. 2023, arXiv 2210.02885, section 3)."""
    features = features.cpu().double()  # MPS has no float64
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(features.T @ features).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=1e-30) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def denormalise(model: MaskedAutoencoderViT, pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Prediction (B, L, p * p * C) as pixels. With norm_pix_loss this takes the true mean and deviation of each patch,
    which the model cannot know: figures and pictures made so are better than they deserve, and must say it."""
    pred = pred.float()
    if not model.norm_pix_loss:
        return pred
    return pred * (patches.var(-1, keepdim=True) + NORM_PIX_EPS).sqrt() + patches.mean(-1, keepdim=True)


def caption(model: MaskedAutoencoderViT, hidden: int, error: float, visible_mean: float | None = None) -> str:
    """What to write over reconstructions: how many patches were hidden, the error, that of `visible_mean_mse`, what
    `denormalise` took, and which channels a picture shows."""
    text = f"{hidden} of {model.num_patches} patches hidden, masked MSE {error:.4f}"
    text += f", mean of the visible pixels {visible_mean:.4f}" if visible_mean is not None else ""
    text += " (with the true mean and deviation of each patch)" * model.norm_pix_loss
    if model.in_chans in (1, 3):
        return text
    shown = "channels 1, 2 and 3" if model.in_chans > 3 else "channel 1"
    return f"{text}; {shown} of {model.in_chans} shown as colours"


@torch.no_grad()
def masked_mse(model: MaskedAutoencoderViT, data: ImageSet, mask_ratio: float, seed: int) -> dict[str, float]:
    """Error on the hidden pixels of a whole set, under masks fixed by the seed.

    Returns:
        masked_mse: mean squared error on the [-1, 1] scale, see `denormalise`; loss: what training minimises.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    noise = torch.empty(0, model.num_patches)  # of the images that are next

    def sums(images: torch.Tensor) -> tuple[float, float, float]:
        nonlocal noise
        if len(noise) < len(images):  # a batch that is tried again, smaller, has the same masks
            noise = torch.cat([noise, torch.rand(len(images) - len(noise), model.num_patches, generator=generator)])
        loss, pred, mask = model(images, mask_ratio, noise[: len(images)].to(images.device))
        patches = patchify(images, model.patch_size)  # (B, L, p * p * C)
        errors = (denormalise(model, pred, patches) - patches).square().mean(dim=-1)  # (B, L)
        found = float((errors * mask).sum()), float(loss) * float(mask.sum()), float(mask.sum())
        noise = noise[len(images) :]
        return found

    squares, losses, hidden = map(sum, zip(*in_batches(sums, data, EVAL_BATCH), strict=True))
    return {"masked_mse": squares / hidden, "loss": losses / hidden}


@torch.no_grad()
def reconstruct_images(
    model: MaskedAutoencoderViT, images: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Hide patches of images (B, C, H, W) in [-1, 1] and rebuild them.

    Args:
        mask: (B, L), 1 = hidden, in every row the same number.

    Returns:
        masked: the images with grey in the hidden places, (B, C, H, W).
        rebuilt: the originals with the predictions pasted into the hidden places, since the loss never trained the
            visible ones, (B, C, H, W); see `denormalise`.
        masked_mse: over the hidden pixels of these images.
    """
    mask = mask.to(images.device)
    _, pred, _ = model.eval()(images, mask=mask)
    patches, hidden = patchify(images, model.patch_size), mask.unsqueeze(-1)
    pred = denormalise(model, pred, patches)
    error = float(((pred - patches).square().mean(dim=-1) * mask).sum() / mask.sum())
    rebuilt = patches * (1 - hidden) + pred.clamp(-1, 1) * hidden
    masked, rebuilt = (unpatchify(x, model.patch_size, model.grid_size) for x in (patches * (1 - hidden), rebuilt))
    return masked, rebuilt, error


@torch.no_grad()
def patch_errors(model: MaskedAutoencoderViT, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each patch of images (B, C, H, W) in [-1, 1]: (B, L); see `denormalise`.

    Args:
        mask: (B, L), 1 = hidden, in every row the same number.
    """
    _, pred, _ = model.eval()(images, mask=mask)
    patches = patchify(images, model.patch_size)
    return (denormalise(model, pred, patches) - patches).square().mean(dim=-1)


def visible_mean_mse(model: MaskedAutoencoderViT, images: torch.Tensor, mask: torch.Tensor) -> float:
    """Error over the hidden pixels of predicting, for each image and channel, the mean of its visible pixels: what can
    be known without training. (The mean predictor of pretraining knows the training images, and is better.)

    Args:
        images: (B, C, H, W) in [-1, 1].
        mask: (B, L), 1 = hidden, in every row the same number.
    """
    mask = mask.to(images.device)
    patches = patchify(images, model.patch_size).unflatten(2, (-1, model.in_chans))  # (B, L, p * p, C)
    seen = (1 - mask)[:, :, None, None]
    mean = (patches * seen).sum(dim=(1, 2), keepdim=True) / (seen.sum(dim=(1, 2), keepdim=True) * patches.shape[2])
    return float(((patches - mean).square().mean(dim=(2, 3)) * mask).sum() / mask.sum())


@torch.no_grad()
def class_probabilities(model: VisionTransformer, data: ImageSet) -> torch.Tensor:
    """Probabilities of every image, float32 (N, num_classes).

    Args:
        model: a classifier; it is put in evaluation mode.
        data: images of the model's size and channels, on its device.
    """
    model.eval()
    return torch.cat(list(in_batches(lambda images: model(images).float().softmax(dim=1), data, EVAL_BATCH)))


def scores_by_class(probabilities: torch.Tensor, labels: torch.Tensor, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What probabilities (N, classes) say of each class.

    Returns:
        per_class: name -> share of its images that is recognised.
        confusion: images [[...], ...], rows are true classes; of more than MATRIX classes cells, those that are not 0:
            [[true class, predicted class, images], ...].
    """
    n = len(class_names)
    cells, images = (labels * n + probabilities.argmax(dim=1)).cpu().unique(return_counts=True)
    truth, guesses = cells // n, cells % n
    of = torch.zeros(n, dtype=torch.long).index_add_(0, truth, images)
    right = torch.zeros(n, dtype=torch.long).index_add_(0, truth, images * (truth == guesses))
    found: dict[str, Any] = {"per_class": dict(zip(class_names, (right / of.clamp(min=1)).tolist(), strict=True))}
    if n > MATRIX:
        return found | {"cells": torch.stack([truth, guesses, images], dim=1).tolist()}
    matrix = torch.zeros(n * n, dtype=torch.long).index_add_(0, cells, images).reshape(n, n)
    return found | {"confusion": matrix.tolist()}


def classification_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy (a fraction) and cross-entropy of probabilities (N, classes) against labels (N,)."""
    right = int((probabilities.argmax(dim=1) == labels).sum())
    return {"accuracy": right / len(labels), "loss": float(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels))}
