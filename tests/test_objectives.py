"""The objectives that results/objectives.py compares are what their names say."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maelab.model import MaskedAutoencoderViT, patchify


@pytest.fixture
def objectives(monkeypatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "results"), *sys.path])
    return importlib.import_module("objectives")


def autoencoder(side: int, in_chans: int, norm_pix_loss: bool) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        img_size=side, patch_size=4, in_chans=in_chans, embed_dim=32, depth=1, num_heads=2, class_token=False,
        decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=norm_pix_loss,
    )  # fmt: skip


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_only_the_recipe_has_its_loss(objectives, data):
    side, channels = {"mnist": (28, 1), "cifar10": (32, 3)}[data]
    model = autoencoder(side, channels, data == "cifar10")
    imgs, noise = torch.rand(4, channels, side, side) * 2 - 1, torch.rand(4, model.num_patches)
    own = float(model.training_loss(imgs, 0.75, noise).detach())
    for name, objective in objectives.OBJECTIVES[data].items():
        with objectives.swapped(objective):
            loss = float(model.training_loss(imgs, 0.75, noise).detach())
        assert math.isfinite(loss)
        only_of_the_config = objective == objectives.Objective(objective.changes)
        assert (loss == pytest.approx(own, rel=1e-6)) == only_of_the_config, name
    assert float(model.training_loss(imgs, 0.75, noise).detach()) == own


@pytest.mark.parametrize("grid", [(7, 7), (8, 8)])
def test_squares_and_blocks_are_hidden_whole(objectives, grid):
    noise = torch.rand(50, grid[0] * grid[1], generator=torch.Generator().manual_seed(1))
    keep = noise.shape[1] // 4

    def hidden(hide) -> torch.Tensor:
        ids = hide(noise, grid).argsort(dim=1, stable=True)
        return torch.ones_like(noise).scatter_(1, ids[:, :keep], 0).unflatten(1, grid).bool()  # (B, rows, columns)

    for side in (2, 4):
        cut = []
        for mask in hidden(objectives.tiles(side)):
            squares = [part for rows in mask.split(side) for part in rows.split(side, dim=1)]
            cut.append(sum(bool(part.any()) and not bool(part.all()) for part in squares))
        # The number that has to be hidden cuts one; two that drew nearly the same number may both be cut.
        assert max(cut) <= 2 and sum(number > 1 for number in cut) <= 1
    distances = torch.arange(max(grid))
    for mask, place in zip(hidden(objectives.one_block), noise.argmax(1).tolist(), strict=True):
        down, across = distances[: grid[0]] - place // grid[1], distances[: grid[1]] - place % grid[1]
        away = torch.maximum(down.abs()[:, None], across.abs()[None])
        assert away[mask].max() <= away[~mask].min()


def test_oriented_gradients_are_those_of_a_loop(objectives):
    imgs, p = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)), 4
    expected = torch.zeros(2, 2 * 3, 3, 9)
    for b, c, y, x in ((b, c, y, x) for b in range(2) for c in range(3) for y in range(8) for x in range(12)):
        image = imgs[b, c]
        across = float(image[y, min(x + 1, 11)] - image[y, max(x - 1, 0)])
        down = float(image[min(y + 1, 7), x] - image[max(y - 1, 0), x])
        place = math.floor(math.atan2(down, across) / math.pi * 9) % 9
        expected[b, y // p * 3 + x // p, c, place] += math.hypot(across, down)
    expected /= expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(objectives.oriented_gradients(imgs, p), expected.flatten(2))


def test_visible_patches_count_as_much_as_is_said(objectives):
    model = autoencoder(16, 1, False)
    imgs, noise = torch.rand(3, 1, 16, 16) * 2 - 1, torch.rand(3, 16)
    _, pred, mask = model(imgs, 0.75, noise)
    errors = (pred - patchify(imgs, 4)).square().mean(-1)  # (B, L)
    weights = torch.where(mask.bool(), 1.0, 0.1)
    with objectives.swapped(objectives.Objective(visible=0.1)):
        loss = model.training_loss(imgs, 0.75, noise)
    torch.testing.assert_close(loss, (errors * weights).sum() / weights.sum())


def test_each_objective_gets_the_same_time(objectives):
    for images in (1_000, 53_999, 54_000, 54_001, 131_234):
        config = objectives.pretraining("mnist", objectives.Objective(), images)
        assert (
            config.limit <= objectives.IMAGES["mnist"]
            and images - config.epochs < config.limit * config.epochs <= images
        )
