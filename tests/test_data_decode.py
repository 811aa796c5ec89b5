"""Any image file becomes pixels: modes, formats, orientation, size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import one, save
from PIL import Image

from maelab.data.folder import scan


def test_resize_covers_and_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((10, 40), np.uint8)
    pixels[:, 15:25] = 200  # the middle square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (one(tmp_path / "wide.png", img_size=(10, 10)) == 200).all()
    assert one(tmp_path / "wide.png", img_size=(5, 20)).shape == (1, 5, 20)


def test_resize_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = one(tmp_path / "stripes.png", img_size=(8, 8)).float()
    assert (small - 127.5).abs().max() < 8


@pytest.mark.parametrize(
    ("mode", "value", "grey", "colour"),
    [
        ("L", 77, 77, [77, 77, 77]),
        ("1", 1, 255, [255, 255, 255]),
        ("I;16", 65535, 255, [255, 255, 255]),
        ("LA", (40, 0), 255, [255, 255, 255]),
        ("RGB", (255, 0, 0), 76, [255, 0, 0]),
        ("RGBA", (255, 0, 0, 255), 76, [255, 0, 0]),
        ("RGBA", (255, 0, 0, 0), 255, [255, 255, 255]),
    ],
)
def test_modes(mode: str, value: int | tuple[int, ...], grey: int, colour: list[int], tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", value, mode=mode)
    with Image.open(path) as image:
        assert image.mode == mode, "the file really has this mode"
    assert one(path, in_chans=1)[0, 0, 0].item() == grey
    assert one(path, in_chans=3)[:, 0, 0].tolist() == colour
    assert len(one(path)) == (1 if mode in ("L", "1", "I;16", "LA") else 3)


def test_palette_and_its_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "x.png")
    assert one(tmp_path / "x.png")[:, 0, 0].tolist() == [10, 200, 30]
    image.save(tmp_path / "x.png", transparency=1)
    assert one(tmp_path / "x.png")[:, 0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", (0, 255, 255, 0), mode="CMYK")  # no cyan, all magenta and yellow: red
    red, green, blue = one(path)[:, 4, 4].tolist()
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif", "JPG"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    pixel = one(save(tmp_path / f"x.{suffix}", (200, 100, 50), mode="RGB"))[:, 4, 4]
    assert (pixel.int() - torch.tensor([200, 100, 50])).abs().max() <= 4


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize(("mode", "value", "shown"), [("L", 90, 90), ("I;16", 500, 255), ("RGB", (90, 91, 92), 90)])
def test_tiff(compression, mode: str, value: Any, shown: int, tmp_path: Path) -> None:
    page = Image.new(mode, (8, 8), value)
    page.save(tmp_path / "x.tif", compression=compression, save_all=True, append_images=[Image.new(mode, (8, 8))])
    assert one(tmp_path / "x.tif")[0, 4, 4].item() == shown
    assert "of several frames or pages, only the first is used: 1" in scan(f"folder:{tmp_path}").lines()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(suffix: str, tmp_path: Path) -> None:
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: white on top
    Image.fromarray(pixels).convert("RGB").save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    image = one(tmp_path / f"x.{suffix}", img_size=(32, 16))[0].float()
    assert image[:14].mean() > 240 and image[18:].mean() < 15
    if suffix != "png":
        assert one(tmp_path / f"x.{suffix}").shape == (3, 32, 16), "the default size is that of the upright image"
