"""The numbers behind the demo's page, against formulas, for models of which no two layers, classes or patches agree."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maelab import figures
from maelab.data import ImageSet
from maelab.data.batches import scale
from maelab.demo import logic
from maelab.inference import (
    attention_maps,
    attention_rollout,
    attention_to_patches,
    class_probabilities,
    reconstruct_images,
)
from maelab.model import MaskedAutoencoderViT, VisionTransformer
from maelab.training.checkpoint import ModelSpec

SHAPE: dict[str, Any] = {
    "img_size": (28, 28), "patch_size": 7, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2
}  # fmt: skip


def loaded(kind: type[VisionTransformer], **changes: Any) -> logic.Loaded:
    torch.manual_seed(3)
    model = kind(**SHAPE, **changes).eval()
    for matrix in (p for p in model.parameters() if p.ndim > 1 and p.requires_grad):
        torch.nn.init.normal_(matrix, std=0.5)
    names = tuple(f"class {i}" for i in range(changes.get("num_classes", 0)))
    return logic.Loaded("x", model, ModelSpec(kind.__name__, SHAPE | changes, "x", names))


@pytest.fixture(scope="module")
def digit(mnist_small) -> Image.Image:
    return Image.fromarray(mnist_small.test.images[0, 0].numpy())


@pytest.mark.parametrize("classes", [3, 9, 10, 11, 30])
def test_up_to_ten_classes_come_in_their_order_and_more_by_their_share(classes, digit):
    chosen = loaded(VisionTransformer, num_classes=classes)
    shares = class_probabilities(chosen.model, ImageSet(logic.fit(chosen, digit), None))[0].tolist()
    pairs = [(f"class {i}", share) for i, share in enumerate(shares)]
    expected = pairs if classes <= 10 else sorted(pairs, key=lambda pair: pair[1], reverse=True)[:10]
    found = logic.guess(chosen, digit)
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [share for _, share in found] == pytest.approx([share for _, share in expected], abs=1e-6)
    assert sorted(shares) != shares != sorted(shares, reverse=True)


def test_a_look_is_at_the_last_block_or_through_all_of_them(digit):
    chosen = loaded(VisionTransformer, num_classes=3)
    x = scale(logic.fit(chosen, digit))
    with torch.no_grad():
        maps = attention_maps(chosen.model, x)
    pictures = []
    for of, attention in (("last", maps[-1].mean(dim=1)), ("rollout", attention_rollout(maps))):
        expected = figures.overlay(x, attention_to_patches(chosen.model, attention))[0]
        pictures.append(logic.look(chosen, digit, of))  # type: ignore[arg-type]
        np.testing.assert_allclose(pictures[-1], expected, atol=1e-5)
    assert np.abs(pictures[0] - pictures[1]).max() > 0.1
    assert np.array_equal(logic.look(chosen, digit), pictures[1])


def test_the_picture_of_errors_is_the_root_of_their_share(digit):
    chosen = loaded(MaskedAutoencoderViT, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
    assert isinstance(chosen.model, MaskedAutoencoderViT)
    mask = torch.zeros(1, 16)
    mask[0, [1, 6, 7, 12]] = 1
    x = scale(logic.fit(chosen, digit))
    _, rebuilt, error = reconstruct_images(chosen.model, x, mask)
    found = logic.rebuild(chosen, digit, mask)
    torch.testing.assert_close(found.picture, rebuilt[0])
    expected = ((rebuilt - x)[0, 0].abs() / 2).sqrt() * 255
    assert np.abs(found.error.astype(float) - expected.numpy()).max() <= 0.51 and found.error.max() > 60
    assert found.masked_mse == pytest.approx(error)


def test_masks_move_by_the_larger_part_and_stay_masks():
    mask = torch.tensor([[1.0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1]])  # 4 x 4
    assert logic.move_mask(mask, (4, 4), (2, 2)).tolist() == [[1, 0, 0, 1]], "all, a quarter, none, three quarters"
    half = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]])
    assert logic.move_mask(half, (4, 4), (2, 2)).tolist() == [[0, 0, 0, 0]]
    for ratio, hidden in ((0.0, 1), (0.001, 1), (0.5, 8), (0.999, 15), (1.0, 15)):
        assert int(logic.choose_mask("random", (4, 4), ratio, 0).sum()) == hidden


def test_a_drawing_fills_20_pixels_and_faint_ink_is_not_its_box():
    ink = np.zeros((200, 300), np.uint8)
    ink[40:140, 100:150] = 200
    ink[10:12, 20:22] = 25  # fainter than a tenth: no part of the box
    field = logic.centre_drawing(ink)
    assert field is not None
    rows, columns = np.flatnonzero(field.any(axis=1)), np.flatnonzero(field.any(axis=0))
    assert (len(rows), len(columns)) == (20, 10)
    ink[10:12, 20:22] = 26
    field = logic.centre_drawing(ink)
    assert field is not None and np.flatnonzero(field.any(axis=0))[-1] - np.flatnonzero(field.any(axis=0))[0] >= 18
