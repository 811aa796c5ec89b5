"""Which patches are hidden: how many, and in what order."""

from typing import Literal

import torch

MaskKind = Literal["random", "block", "grid"]
# Ordered dithering's matrix (Bayer 1973): the first 1, 2, 4, 8, 12, 14 or 15 cells in its order are a regular lattice
# or leave one; 12 keep one patch of every 2 x 2, the grid of He et al. 2021, figure 6.
_BAYER = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
_REGULAR = (1, 2, 4, 8, 12, 14, 15)


def len_keep(L: int, mask_ratio: float) -> int:
    """Of L patches, how many stay visible: floored, as in the original."""
    return int(L * (1 - mask_ratio))


def hiding_order(kind: MaskKind, grid: tuple[int, int], n: int, seed: int) -> torch.Tensor:
    """The order in which patches vanish, so that a mask of few is contained in a mask of more: int64 (n, L).

    Args:
        kind: 'random': as in training; 'block': one connected block for each image, which grows from a random place by
            whole rows and columns and stays as square as the border allows; 'grid': Bayer's order.
        grid: rows and columns of patches.
        n: masks.
        seed: of the first two kinds.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":  # the smallest noise is kept, as in `random_masking`
        return torch.argsort(torch.rand(n, grid[0] * grid[1], generator=generator), dim=1, stable=True).flip(1)
    if kind == "grid":
        tiles = _BAYER.tile(-(-grid[0] // 4), -(-grid[1] // 4))[: grid[0], : grid[1]]
        return tiles.flatten().argsort(stable=True).expand(n, -1)
    return torch.tensor([_growing_block(grid, generator) for _ in range(n)])


def _growing_block(grid: tuple[int, int], generator: torch.Generator) -> list[int]:
    """All places of the grid in the order in which a block comes to cover them."""
    low = [int(torch.randint(side, (), generator=generator)) for side in grid]
    high = [place + 1 for place in low]  # the block is low[0]:high[0] x low[1]:high[1]
    order = [low[0] * grid[1] + low[1]]
    while len(order) < grid[0] * grid[1]:
        axis = 1 if high[1] - low[1] <= high[0] - low[0] else 0  # widen the shorter side, if it is not full
        axis = axis if high[axis] - low[axis] < grid[axis] else 1 - axis
        after = bool(torch.rand((), generator=generator) < 0.5)
        after = (after or low[axis] == 0) and high[axis] < grid[axis]
        line = high[axis] if after else low[axis] - 1
        for along in range(low[1 - axis], high[1 - axis]):
            order.append(along * grid[1] + line if axis else line * grid[1] + along)
        low[axis], high[axis] = (low[axis], line + 1) if after else (line, high[axis])
    return order


def hidden_count(kind: MaskKind, grid: tuple[int, int], mask_ratio: float) -> int:
    """How many patches a ratio hides: as many as in training, or for 'grid' what the nearest regular pattern hides."""
    patches = grid[0] * grid[1]
    if kind != "grid":
        return patches - len_keep(patches, mask_ratio)
    tiles = _BAYER.tile(-(-grid[0] // 4), -(-grid[1] // 4))[: grid[0], : grid[1]]
    counts = [int((tiles < cells).sum()) for cells in _REGULAR]
    return min((c for c in counts if 0 < c < patches), key=lambda c: abs(c / patches - mask_ratio))


def hide_first(order: torch.Tensor, hidden: int) -> torch.Tensor:
    """The mask that hides the first `hidden` patches of an order (n, L): float32 (n, L), 1 = hidden."""
    return torch.zeros(order.shape).scatter_(1, order[:, :hidden], 1.0)


def make_mask(kind: MaskKind, grid: tuple[int, int], n: int, mask_ratio: float, seed: int) -> torch.Tensor:
    """Masks of a kind, see `hiding_order` and `hidden_count`: float32 (n, L), 1 = hidden."""
    return hide_first(hiding_order(kind, grid, n, seed), hidden_count(kind, grid, mask_ratio))
