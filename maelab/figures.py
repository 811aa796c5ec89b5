"""Pictures of a run, from arrays and metrics. Needs no torch: anything that numpy takes is an image."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from maelab.errors import RunError

DPI = 150
COLOURS = {"train": "#4c72b0", "val": "#dd8452", "test": "#55a868"}


def save_figure(figure: Figure, file: Path) -> None:
    """Write a PNG atomically and release the figure.

    Raises:
        RunError: if it cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
        os.replace(temporary, file)
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error
    finally:
        plt.close(figure)
        with contextlib.suppress(OSError):
            temporary.unlink()


def to_picture(image: Any) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> (H, W, 3) in [0, 1]."""
    picture = np.clip((np.asarray(image, dtype=np.float32) + 1) / 2, 0, 1).transpose(1, 2, 0)
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture[:, :, :3]


def reconstructions(file: Path, groups: Sequence[tuple[str, Any, Any, Any]]) -> None:
    """Rows of original, masked and rebuilt images, a group of three rows after the other.

    Args:
        file: PNG to write.
        groups: (title, original, masked, rebuilt), the images (N, C, H, W) in [-1, 1].
    """
    columns = max(len(original) for _, original, _, _ in groups)
    figure, axes = plt.subplots(
        3 * len(groups), columns, figsize=(columns + 1.2, 3.1 * len(groups)), squeeze=False, layout="compressed"
    )
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.axis("off")
    for g, (title, *rows) in enumerate(groups):
        for r, (name, images) in enumerate(zip(("original", "masked", "rebuilt"), rows, strict=True)):
            for c, image in enumerate(images):
                axes[3 * g + r, c].imshow(to_picture(image), interpolation="nearest")
            axes[3 * g + r, 0].text(-0.12, 0.5, name, ha="right", va="center", transform=axes[3 * g + r, 0].transAxes)
        if title:
            axes[3 * g, 0].set_title(title, loc="left", fontsize=10)
    save_figure(figure, file)


def curves(file: Path, metrics: Sequence[dict[str, Any]], best_epoch: int = 0) -> None:
    """One panel for each measured quantity over the epochs, training and validation in one panel.

    Args:
        file: PNG to write.
        metrics: rows of metrics.jsonl.
        best_epoch: marked by a line; 0 marks none.
    """
    hidden = {"epoch", "split", "seconds", "images_per_s"}
    names = list(dict.fromkeys(k for row in metrics for k in row if k not in hidden))
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 2.8), squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], names, strict=True):
        for split, colour in COLOURS.items():
            points = [(row["epoch"], row[name]) for row in metrics if row["split"] == split and name in row]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker=".", label=split)
        if best_epoch:
            ax.axvline(best_epoch, color="grey", linewidth=0.8, linestyle=":", label="best epoch")
        ax.set(title=name.replace("_", " "), xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    save_figure(figure, file)


def predictions(
    file: Path, images: Any, labels: Sequence[int] | None, probabilities: Any, class_names: Sequence[str]
) -> None:
    """A gallery of images with the predicted class and its probability; wrong ones in red, with the true class.

    Args:
        file: PNG to write.
        images: (N, C, H, W) in [-1, 1].
        labels: true classes (N,), or None.
        probabilities: (N, classes).
        class_names: of the classes.
    """
    probabilities = np.asarray(probabilities)
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.85 * rows), squeeze=False, layout="compressed")
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        guess = int(probabilities[i].argmax())
        wrong = labels is not None and guess != int(labels[i])
        title = f"{class_names[guess]} {probabilities[i, guess]:.0%}"
        if wrong:
            title += f"\nis {class_names[int(labels[i])]}"  # type: ignore[index]
        ax.imshow(to_picture(image), interpolation="nearest")
        ax.set_title(title, fontsize=8, color="#c44e52" if wrong else "black")
    save_figure(figure, file)


def confusion(file: Path, counts: Any, class_names: Sequence[str]) -> None:
    """Confusion matrix: counts (classes, classes), rows are true classes; the diagonal carries each class's recall."""
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(class_names)
    side = max(3.5, 0.45 * n + 1.5)
    figure, ax = plt.subplots(figsize=(side, side), layout="constrained")
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if n <= 20:
        for i in range(n):
            for j in range(n):
                if counts[i, j]:
                    text = f"{share[i, j]:.1%}".replace("100.0%", "100%") if i == j else str(counts[i, j])
                    ax.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if i == j else "black")
    ax.set_xticks(range(n), class_names, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(n), class_names, fontsize=7)
    ax.set(xlabel="predicted", ylabel="true")
    save_figure(figure, file)
