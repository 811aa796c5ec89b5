"""Masks: how many patches they hide, and which."""

import pytest
import torch

from maelab.model import MaskedAutoencoderViT
from maelab.model.masks import MaskKind, hidden_count, hide_first, hiding_order, len_keep, make_mask

GRIDS = [(4, 4), (7, 7), (8, 8), (5, 9)]


@pytest.mark.parametrize("kind", MaskKind.__args__)
@pytest.mark.parametrize("grid", GRIDS)
def test_masks_hide_what_training_hides_and_nest(kind, grid):
    patches = grid[0] * grid[1]
    order = hiding_order(kind, grid, 20, seed=1)
    assert order.sort(dim=1).values.eq(torch.arange(patches)).all(), "every patch vanishes once"
    before = torch.zeros(20, patches)
    for ratio in (0.1, 0.25, 0.5, 0.75, 0.9):
        mask = make_mask(kind, grid, 20, ratio, seed=1)
        count = int(mask[0].sum())
        assert mask.sum(dim=1).eq(count).all() and (mask >= before).all()
        assert count == patches - int(patches * (1 - ratio)) or kind == "grid"
        assert abs(count / patches - ratio) < (1 / patches if kind != "grid" else 0.09)
        assert torch.equal(mask, make_mask(kind, grid, 20, ratio, seed=1))
        assert torch.equal(mask, make_mask(kind, grid, 20, ratio, seed=2)) == (kind == "grid")
        before = mask


def test_random_masks_are_those_of_the_model():
    model, images = MaskedAutoencoderViT(img_size=28, patch_size=7, in_chans=1, depth=1), torch.rand(5, 1, 28, 28)
    noise = torch.rand(5, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(make_mask("random", (4, 4), 5, 0.6, seed=3), model(images, 0.6, noise)[2])


@pytest.mark.parametrize("grid", GRIDS)
def test_a_block_is_connected_nearly_square_and_everywhere(grid):
    for count in range(1, grid[0] * grid[1]):
        for row in hide_first(hiding_order("block", grid, 10, seed=count), count).reshape(10, *grid):
            cells = {tuple(cell) for cell in row.nonzero().tolist()}
            todo, seen = [min(cells)], set()
            while todo:
                if (cell := todo.pop()) in cells - seen:
                    seen.add(cell)
                    todo += [
                        (cell[0] + 1, cell[1]),
                        (cell[0] - 1, cell[1]),
                        (cell[0], cell[1] + 1),
                        (cell[0], cell[1] - 1),
                    ]
            assert seen == cells, "one piece"
            height, width = (len({cell[axis] for cell in cells}) for axis in (0, 1))
            assert height * width - count < max(height, width), "a rectangle, but for one row or column"
            assert abs(height - width) <= 1 or height == grid[0] or width == grid[1]
    first = hiding_order("block", grid, 400, seed=0)[:, 0]
    assert len(first.unique()) == grid[0] * grid[1]


def test_grids_are_regular():
    by_ratio = {ratio: make_mask("grid", (8, 8), 1, ratio, 0).reshape(8, 8) for ratio in (0.3, 0.5, 0.7)}
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(by_ratio[0.5], ((rows + columns) % 2 == 0).float())  # a chess board
    assert torch.equal(by_ratio[0.3], ((rows % 2 == 0) & (columns % 2 == 0)).float())  # one of every 2 x 2
    assert torch.equal(by_ratio[0.7], 1 - ((rows % 2 == 1) & (columns % 2 == 0)).float())  # all but one
    assert hidden_count("grid", (7, 7), 0.75) == 37 and hidden_count("grid", (8, 8), 0.1) == 8


def test_the_kept_count_is_floored():
    assert [len_keep(L, 0.75) for L in (4, 7, 49, 196)] == [1, 1, 12, 49]
