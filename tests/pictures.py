"""Folders of small one-coloured images, and broken ones."""

from pathlib import Path

import torch
from PIL import Image

from maelab.data import load


def save(path: Path, value: int | tuple[int, ...] = 128, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    """A one-coloured image; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def classes(root: Path, names: str = "ab", n: int = 10) -> Path:
    for k, name in enumerate(names):
        for i in range(n):
            save(root / name / f"{i:02d}.png", 100 * k + i)
    return root


def bad(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n damaged")


def one(path: Path, **options: object) -> torch.Tensor:
    """The only image of a flat folder, uint8 (C, H, W)."""
    data = load(f"folder:{path.parent}", **options)  # type: ignore[arg-type]
    assert len(data.train) == 1
    return data.train.images[0]
