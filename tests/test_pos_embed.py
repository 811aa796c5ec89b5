import math
from typing import Any

import pytest
import torch

from maelab.model import MaskedAutoencoderViT, VisionTransformer, interpolate_pos_embed, sincos_pos_embed


def naive_sincos(dim: int, rows: int, columns: int) -> list[list[float]]:
    """The formula, number by number: column first, then row; of each the sines, then the cosines."""
    table = []
    for row in range(rows):
        for column in range(columns):
            line = []
            for position in (column, row):
                for function in (math.sin, math.cos):
                    line += [function(position / 10000 ** (i / (dim / 4))) for i in range(dim // 4)]
            table.append(line)
    return table


@pytest.mark.parametrize(("dim", "grid"), [(8, (3, 3)), (16, (2, 5)), (12, (5, 2)), (192, (8, 8)), (4, (1, 7))])
def test_sincos_is_the_formula(dim, grid):
    expected = torch.tensor(naive_sincos(dim, *grid))
    embed = sincos_pos_embed(dim, grid, class_token=False)
    assert embed.shape == (1, grid[0] * grid[1], dim)
    assert embed.dtype == torch.float32
    torch.testing.assert_close(embed[0], expected, atol=1e-6, rtol=0)


def test_sincos_puts_zeros_first_for_the_class_token():
    without, with_token = (sincos_pos_embed(16, (2, 3), class_token=c) for c in (False, True))
    assert with_token.shape == (1, 7, 16)
    assert not with_token[:, 0].any()
    assert torch.equal(with_token[:, 1:], without)


def test_sincos_tells_transposed_grids_apart():
    wide, tall = sincos_pos_embed(16, (2, 3), False)[0], sincos_pos_embed(16, (3, 2), False)[0]
    swapped = torch.cat([tall[:, 8:], tall[:, :8]], dim=1).reshape(3, 2, 16).transpose(0, 1).reshape(6, 16)
    assert not torch.equal(wide, tall)
    torch.testing.assert_close(wide, swapped, atol=0, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 6, 190])
def test_sincos_needs_a_multiple_of_four(dim):
    with pytest.raises(ValueError, match=f"4 divides, got {dim}"):
        sincos_pos_embed(dim, (2, 2))


def test_models_start_from_sincos_on_their_own_grid():
    model = MaskedAutoencoderViT(
        img_size=(8, 12), patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=8, decoder_num_heads=2
    )
    assert torch.equal(model.pos_embed.detach(), sincos_pos_embed(16, (2, 3)))
    assert torch.equal(model.decoder_pos_embed.detach(), sincos_pos_embed(8, (2, 3)))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_positions_are_learned_only_when_asked(learned, class_token):
    kw: dict[str, Any] = dict(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, class_token=class_token)
    vit = VisionTransformer(**kw, global_pool="avg", learned_pos_embed=learned)
    mae = MaskedAutoencoderViT(
        **kw, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, learned_pos_embed=learned
    )
    imgs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vit(imgs).square().sum().backward()
    mae.training_loss(imgs, 0.5).backward()
    for embed in (vit.pos_embed, mae.pos_embed, mae.decoder_pos_embed):
        assert embed.shape[1] == 4 + class_token
        assert embed.requires_grad is learned
        assert (embed.grad is not None and bool(embed.grad.any())) is learned
    assert "pos_embed" in vit.state_dict()  # fixed ones are saved too


def test_interpolation_to_the_same_grid_changes_nothing():
    embed = torch.randn(1, 7, 8)
    assert torch.equal(interpolate_pos_embed(embed, (2, 3), (2, 3)), embed)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((2, 3), (5, 4)), ((6, 6), (3, 3)), ((2, 6), (6, 2))])
def test_interpolation_shape_and_prefix(old, new, prefix):
    embed = torch.randn(1, prefix + old[0] * old[1], 8)
    result = interpolate_pos_embed(embed, old, new, prefix_tokens=prefix)
    assert result.shape == (1, prefix + new[0] * new[1], 8)
    assert torch.equal(result[:, :prefix], embed[:, :prefix])


def keys_weight(distance: float, a: float = -0.75) -> float:
    """The cubic convolution kernel (Keys 1981) with the constant that torch uses."""
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def bicubic_matrix(old: int, new: int) -> torch.Tensor:
    """(new, old) weights along one axis: cell centres are aligned, the border is repeated."""
    weights = torch.zeros(new, old)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(j, 0), old - 1)] += keys_weight(centre - j)
    return weights


@pytest.mark.parametrize(("old", "new"), [((4, 6), (8, 12)), ((4, 6), (3, 5)), ((2, 5), (5, 2)), ((3, 3), (3, 4))])
def test_interpolation_is_the_cubic_convolution(old, new):
    embed = torch.randn(*old, 3, generator=torch.Generator().manual_seed(0))
    result = interpolate_pos_embed(embed.reshape(1, -1, 3), old, new, prefix_tokens=0)
    rows, columns = (bicubic_matrix(o, n) for o, n in zip(old, new, strict=True))
    expected = torch.einsum("ry,cx,yxd->rcd", rows, columns, embed)
    torch.testing.assert_close(result.reshape(*new, 3), expected, atol=1e-5, rtol=1e-5)


def test_interpolation_is_close_to_sincos_of_a_stretched_grid():
    """From 8x8 to 16x16 the result is the sine-cosine embedding at half steps."""
    embed = interpolate_pos_embed(sincos_pos_embed(32, (8, 8)), (8, 8), (16, 16))[0, 1:].reshape(16, 16, 32)
    column = (torch.arange(16) + 0.5) / 2 - 0.5
    slow = torch.sin(column * 10000 ** -(1 / 8))  # channel 1 of the column's sines
    torch.testing.assert_close(embed[8, 4:12, 1], slow[4:12], atol=2e-2, rtol=0)
