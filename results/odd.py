"""How well `maelab odd` finds what does not belong: AUROC, beside neighbours in pixels.

    pip install scikit-image   # for its textures
    python results/odd.py textures WORK      # scratches and blots drawn into patches of brick, grass and gravel
    python results/odd.py digits WORK        # nines among the other digits of MNIST
    python results/odd.py textures WORK 300  # so many epochs instead of the recipe's

writes folders of images into WORK, pretrains on the good ones alone, judges test images that were not among them, and
prints a line of JSON for each set.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from maelab import recipes
from maelab.config import ComputeOptions, RunOptions
from maelab.data import load
from maelab.tasks.odd import odd
from maelab.tasks.pretrain import pretrain

SIDE, STEP = 64, 16
GOOD, BAD = 200, 100  # test images
OPTIONS = ComputeOptions(threads=1)


def auroc(bad: np.ndarray, good: np.ndarray) -> float:
    """How often a bad image has the higher score; ties count half (Mann and Whitney 1947)."""
    above = (bad[:, None] > good[None]).mean() + 0.5 * (bad[:, None] == good[None]).mean()
    return round(float(above), 4)


def write(folder: Path, pictures: list[Image.Image]) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:04}.png")


def with_defect(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """A scratch of 12 to 30 pixels, or a blot of 8 to 16, 60 grey levels lighter or darker than what is there."""
    mask = Image.new("L", picture.size)
    draw, (x, y) = ImageDraw.Draw(mask), random.integers(8, SIDE - 8, 2).tolist()
    if random.random() < 0.5:
        angle, length = random.uniform(0, 2 * np.pi), random.uniform(12, 30)
        draw.line((x, y, x + length * np.cos(angle), y + length * np.sin(angle)), fill=255, width=2)
    else:
        width, height = random.uniform(4, 8, 2).tolist()
        draw.ellipse((x - width, y - height, x + width, y + height), fill=255)
    change = random.choice([-60, 60])
    pixels = np.asarray(picture, dtype=np.int16)
    return Image.fromarray(np.where(np.asarray(mask) > 0, pixels + change, pixels).clip(0, 255).astype(np.uint8))


def textures(work: Path) -> dict[str, Path]:
    """The left three quarters of each are for training; the rest, which shares no pixel with them, is for testing."""
    from skimage import data  # pyright: ignore[reportMissingImports]

    for name in ("brick", "grass", "gravel"):
        if (work / name).exists():
            continue
        random, whole = np.random.default_rng(0), getattr(data, name)()
        whole = whole if whole.ndim == 2 else np.asarray(Image.fromarray(whole).convert("L"))
        height, width = whole.shape
        places = [(y, x) for y in range(0, height - SIDE + 1, STEP) for x in range(0, 3 * width // 4 - SIDE + 1, STEP)]
        cut = [Image.fromarray(whole[y : y + SIDE, x : x + SIDE]) for y, x in places]
        rest = whole[:, 3 * width // 4 :]
        corners = random.integers(0, np.array(rest.shape) - SIDE + 1, (GOOD + BAD, 2)).tolist()
        test = [Image.fromarray(rest[y : y + SIDE, x : x + SIDE]) for y, x in corners]
        write(work / name / "train", cut)
        write(work / name / "test" / "good", test[:GOOD])
        write(work / name / "test" / "bad", [with_defect(one, random) for one in test[GOOD:]])
    return {name: work / name for name in ("brick", "grass", "gravel")}


def digits(work: Path) -> dict[str, Path]:
    """5,000 training images without nines; of the test images 200 without, and 100 nines."""
    if not (work / "nines").exists():
        found = load("mnist")
        assert found.test is not None and found.train.labels is not None and found.test.labels is not None

        def some(images: torch.Tensor, labels: torch.Tensor, nine: bool, count: int) -> list[Image.Image]:
            rows = ((labels == 9) == nine).nonzero()[:count, 0]
            return [Image.fromarray(image[0].numpy()) for image in images[rows]]

        test = found.test.images[:], found.test.labels
        write(work / "nines" / "train", some(found.train.images[:], found.train.labels, False, 5_000))
        write(work / "nines" / "test" / "good", some(*test, False, GOOD))
        write(work / "nines" / "test" / "bad", some(*test, True, BAD))
    return {"nines": work / "nines"}


def judged(name: str, folder: Path, epochs: int) -> dict[str, Any]:
    run, train = folder / "run", folder / "train"
    count = len(list(train.iterdir()))
    side = Image.open(next(train.iterdir())).width
    config = replace(recipes.pretrain_folder(count, side, grey=True), data=f"folder:{train}", knn_every=0)
    config = replace(config, epochs=epochs or config.epochs)
    pretrain(config, options=RunOptions(**vars(OPTIONS), out=run))
    found = odd(run, folder / "test", like=train, out=folder / "odd.png", options=OPTIONS)
    ranked = found["ranked"]
    bad = np.array(["/bad/" in one["path"] for one in ranked])
    result: dict[str, Any] = {"set": name, "train": count, "good": int((~bad).sum()), "bad": int(bad.sum())}
    for key in ("score", "distance", "patch", "error"):
        values = np.array([one[key] for one in ranked])
        result[key] = auroc(values[bad], values[~bad])
    known = [str(path) for path in sorted(train.iterdir())]
    tests, goods = (
        np.stack([np.asarray(Image.open(path).convert("L")) for path in paths]).reshape(len(paths), -1) / 255.0
        for paths in ([one["path"] for one in ranked], known)
    )
    squares = (tests**2).sum(1)[:, None] + (goods**2).sum(1) - 2 * tests @ goods.T
    nearest = np.sqrt(np.sort(squares, axis=1)[:, :5].clip(0)).mean(axis=1)
    result["pixels"] = auroc(nearest[bad], nearest[~bad])
    return result


def main(which: str, work: str, epochs: str = "0") -> None:
    for name, folder in {"textures": textures, "digits": digits}[which](Path(work).resolve()).items():
        print(json.dumps(judged(name, folder, int(epochs))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
