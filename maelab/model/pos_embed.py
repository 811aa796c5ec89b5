"""Position embeddings: fixed sine-cosine, and interpolation of any embedding to another grid."""

import torch
import torch.nn.functional as F


def sincos_pos_embed(embed_dim: int, grid: tuple[int, int], class_token: bool = True) -> torch.Tensor:
    """Fixed two-dimensional sine-cosine position embedding (He et al. 2021, section A.1; Vaswani et al. 2017).

    The first half of the channels encodes the column, the second half the row; frequency i is 10000 ** -(i / (D / 4)).

    Args:
        embed_dim: D, a multiple of 4.
        grid: rows and columns of patches.
        class_token: put a row of zeros first, for the class token.

    Returns:
        (1, L [+ 1], D) float32, L = rows * columns in row-major order.

    Raises:
        ValueError: if D is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"sine-cosine position embeddings need an embed_dim that 4 divides, got {embed_dim}")
    if (
        torch.get_default_device().type == "meta"
    ):  # shapes alone are wanted; to compute there loads the compiler: seconds
        return torch.empty(1, grid[0] * grid[1] + class_token, embed_dim)
    quarter = embed_dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # (D/4,)
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]  # two of (L, D/4)
    embed = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)  # (L, D)
    if class_token:
        embed = torch.cat([torch.zeros(1, embed_dim, dtype=embed.dtype), embed])
    return embed.float().unsqueeze(0)


def interpolate_pos_embed(
    pos_embed: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix_tokens: int = 1
) -> torch.Tensor:
    """Resample a position embedding to another grid of patches (Dosovitskiy et al. 2020, section 3.2), bicubically.

    Args:
        pos_embed: (1, prefix_tokens + L_old, D); the prefix (class token) is kept as it is.
        old_grid, new_grid: rows and columns.
        prefix_tokens: how many leading tokens are not part of the grid.

    Returns:
        (1, prefix_tokens + L_new, D).
    """
    if old_grid == new_grid:
        return pos_embed
    prefix, grid = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)
