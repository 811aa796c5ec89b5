"""docs/how.png: what pretraining, fine-tuning and transfer do, drawn with a digit and the weights that come along.

python results/how.py docs/how.png
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import maelab
from maelab.data.batches import scale
from maelab.figures import save_figure
from maelab.inference import reconstruct_images

NUMBER, SEED = 1, 0  # which of the test images; of the mask
BLUE, ORANGE, GREY, GAP = "#4c72b0", "#dd8452", "#cfcfcf", 1.3
PANEL = 7 * GAP


def patches_of(image: np.ndarray, p: int) -> np.ndarray:
    """(H, W) -> (rows, columns, p, p)."""
    return image.reshape(image.shape[0] // p, p, image.shape[1] // p, p).swapaxes(1, 2)


def show(ax: Axes, patches: np.ndarray, x: float, y: float, seen: np.ndarray | None = None, text: str = "") -> None:
    """Patches apart from each other, the lower left corner at (x, y); hidden ones are grey."""
    rows, columns = patches.shape[:2]
    for row in range(rows):
        for column in range(columns):
            left, low = x + column * GAP, y + (rows - 1 - row) * GAP
            place = (left, left + 1.15, low, low + 1.15)
            if seen is None or seen[row, column]:
                ax.imshow(patches[row, column], cmap="gray", vmin=0, vmax=1, extent=place)
            else:
                ax.add_patch(FancyBboxPatch((left, low), 1.15, 1.15, boxstyle="square,pad=0", color=GREY))
    ax.text(x + columns * GAP / 2, y - 0.5, text, ha="center", va="top", fontsize=8)


def box(ax: Axes, x: float, y: float, text: str, colour: str, width: float = 6.5, height: float = 7.0) -> None:
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.2,rounding_size=0.6", color=colour))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=9)


def arrow(ax: Axes, start: float, end: float, y: float) -> None:
    ax.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.2})


def main() -> None:
    model: Any = maelab.load_model("maelab:mnist-mae")[0].eval()
    classifier: Any = maelab.load_model("maelab:mnist-classifier")[0].eval()
    test = maelab.load_data("mnist").test
    assert test is not None
    images = scale(test.images[NUMBER : NUMBER + 1])
    with torch.no_grad():
        torch.manual_seed(SEED)
        _, _, mask = model(images, 0.75)
        chances = classifier(images)[0].softmax(0).numpy()
    digit = images[0, 0].numpy()
    p = model.patch_size
    _, rebuilt, _ = reconstruct_images(model, images, mask)
    whole = patches_of((digit - digit.min()) / np.ptp(digit), p)
    rows, columns = whole.shape[:2]
    seen = mask[0].numpy().reshape(rows, columns) == 0
    rebuilt = patches_of((rebuilt[0, 0].numpy() - digit.min()) / np.ptp(digit), p)

    figure = Figure(figsize=(11, 5.6))
    ax = figure.add_axes((0, 0, 1, 1))
    few, high, low = whole[seen][:, None], 17.0, 1.5
    ax.text(0, high + PANEL + 1.6, "Pretraining: images alone, no labels", fontsize=11, weight="bold")
    show(ax, whole, 0, high, text=f"an image, cut into\n{whole[..., 0, 0].size} patches")
    arrow(ax, 9.6, 11.4, high + 4.5)
    show(ax, whole, 12, high, seen, "three quarters\nare hidden")
    arrow(ax, 21.6, 23.4, high + 4.5)
    show(ax, few[: (len(few) + 1) // 2], 24, high + 0.6)
    show(ax, few[(len(few) + 1) // 2 :], 25.6, high + 0.6)
    ax.text(25.5, high - 0.5, "the encoder sees\nonly the others", ha="center", va="top", fontsize=8)
    arrow(ax, 27.4, 28.8, high + 4.5)
    box(ax, 29.3, high + 1, "encoder", BLUE)
    arrow(ax, 36.4, 37.8, high + 4.5)
    box(ax, 38.4, high + 1, "decoder", ORANGE, 4.2)
    ax.text(40.5, high - 0.5, "gets a mask token\nfor each hidden patch", ha="center", va="top", fontsize=8)
    arrow(ax, 43.2, 44.8, high + 4.5)
    show(ax, rebuilt, 45.4, high, text="it rebuilds what was hidden;\nthe loss counts nothing else")

    ax.text(0, low + PANEL + 1.6, "Fine-tuning: the decoder goes, a head comes", fontsize=11, weight="bold")
    show(ax, whole, 12, low, text="all patches")
    arrow(ax, 21.6, 28.8, low + 4.5)
    box(ax, 29.3, low + 1, "the same\nencoder", BLUE)
    arrow(ax, 36.4, 37.8, low + 4.5)
    box(ax, 38.4, low + 1, "mean,\nhead", "#55a868", 4.2)
    arrow(ax, 43.2, 44.8, low + 4.5)
    for name, chance in enumerate(chances):
        y = low + PANEL - 0.6 - name * 0.9
        ax.text(46, y, str(name), ha="center", va="center", fontsize=8)
        ax.barh(y, 7 * chance, 0.6, left=46.8, color=BLUE)
    ax.text(50, low - 0.5, "one probability\nfor each class", ha="center", va="top", fontsize=8)
    ax.text(
        0, low + 4.5, "Transfer: the same with\nother images. One channel\nbecomes three, and the\npositions are"
        " interpolated.", va="center", fontsize=9,
    )  # fmt: skip
    ax.set(xlim=(-0.8, 55.5), ylim=(-2, 29.5), aspect="equal")
    ax.axis("off")
    save_figure(figure, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
