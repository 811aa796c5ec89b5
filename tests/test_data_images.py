"""Masks that someone drew."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maelab.data.images import read_mask
from maelab.errors import UsageError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"10\n01\n11\n", "has 3 x 2 cells; it needs 2 x 2, one for each patch, or 8 x 8, one for each pixel"),
        (b"1,0\n1\n", "its lines have no cells or different numbers of them"),
        (b"\n \n", "its lines have no cells or different numbers of them"),
        (b"00\n00\n", "hides no patch"),
        (b"11\n11\n", "hides every patch"),
        (b"1 2\n0 0\n", "not a PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF, HEIF image"),
        (b"", "empty"),
    ],
)
def test_masks_that_cannot_be(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mask").write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        read_mask(tmp_path / "mask", (2, 2), (8, 8))


def test_a_mask_is_hidden_where_it_is_1_or_dark(tmp_path: Path) -> None:
    (tmp_path / "mask.txt").write_text("0; 1; 0\n\n1; 0; 0\n")
    assert read_mask(tmp_path / "mask.txt", (2, 3), (8, 12)).tolist() == [0, 1, 0, 1, 0, 0]
    pixels = np.full((8, 12), 255, np.uint8)
    pixels[:4, 4:8], pixels[4:, :3], pixels[4:, 4:6] = 0, 30, 0  # whole, three quarters dark, half
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", (2, 3), (8, 12)).tolist() == [0, 1, 0, 1, 0, 0]
