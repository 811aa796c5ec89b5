"""Sets of images that are no photographs, to see whether weights from larger data still win there.

    python results/larger.py bands WORK      # digits of two materials over one another, in 13 bands
    python results/larger.py strokes WORK    # MNIST's digits as they are
    python results/larger.py photos WORK     # CIFAR-10, for comparison

writes a folder for `maelab fit`: 10,000 training images, 900 of them with their class, and 2,000 test images. Then
`maelab fit WORK/bands --minutes M --init WEIGHTS` compares the three ways to begin, and

    python results/larger.py frozen WORK/bands ENCODER

says how far the features of an encoder carry as they are, by k-NN and logistic regression on the labelled images. An
encoder of patches of 14 sees them at 112 x 112, and of bands the first three principal components.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from maelab.config import DataConfig
from maelab.data import ImageSet, load, training_sets
from maelab.inference import extract_features, knn_accuracy
from maelab.model import VisionTransformer
from maelab.training.checkpoint import load_model
from maelab.weights import load_encoder

TRAINING, LABELLED, TEST, BANDS = 10_000, 900, 2_000, 13


def spectra(random: np.random.Generator, count: int = 5) -> np.ndarray:
    """(count, BANDS): how much light each material returns; smooth from band to band, as measured spectra are."""
    raw = random.uniform(0, 1, (count, BANDS + 4))
    smooth = np.stack([np.convolve(one, np.full(5, 0.2), mode="valid") for one in raw])
    low, high = smooth.min(1, keepdims=True), smooth.max(1, keepdims=True)
    return 0.2 + 0.8 * (smooth - low) / (high - low)


def in_bands(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Of grey digits (N, 28, 28) in 0 to 255 make (N, 28, 28, BANDS): each is of the first material, and another digit
    of one of the other four lies over it. Light adds up (linear mixing), and each number has noise of 8 of 255."""
    materials = spectra(np.random.default_rng(0))  # the same for training and test
    other = (
        images[random.permutation(len(images))][..., None] * materials[random.integers(1, 5, len(images)), None, None]
    )
    mixed = 20 + 0.45 * (images[..., None] * materials[0] + other)
    return (mixed + random.normal(0, 8, mixed.shape)).clip(0, 255).astype(np.uint8)


def in_three(parts: list[ImageSet], side: int) -> list[ImageSet]:
    """The first three principal components of the first part's pixels as colours, enlarged."""
    pixels = parts[0].images[:].float().movedim(1, -1).flatten(0, -2)  # (pixels, BANDS)
    mean, axes = pixels.mean(0), torch.linalg.eigh(torch.cov(pixels.T)).eigenvectors[:, -3:]
    ranked = ((pixels - mean) @ axes).sort(dim=0).values
    low, high = ranked[len(ranked) // 1000], ranked[-len(ranked) // 1000]

    def shown(images: torch.Tensor) -> torch.Tensor:
        three = ((images.float().movedim(1, -1) - mean) @ axes - low) / (high - low) * 255
        large = F.interpolate(three.movedim(-1, 1), size=(side, side), mode="bicubic")
        return large.round().clamp(0, 255).to(torch.uint8)

    return [ImageSet(shown(part.images[:]), part.labels) for part in parts]


def frozen(folder: Path, encoder: str) -> None:
    torch.set_num_threads(1)
    model, spec = load_model(encoder)
    assert isinstance(model, VisionTransformer)
    large = model.patch_size == 14
    bands = folder.name == "bands"
    data = load(f"folder:{folder}", img_size=model.img_size if not large else (28, 28) if bands else (112, 112))
    assert data.test is not None
    parts = [*training_sets(data, DataConfig(data=data.name, val_fraction=0.2)), data.test]
    if large:
        parts, source = in_three(parts, 112) if bands else parts, model
        model = VisionTransformer(**{**spec.arguments, "img_size": (112, 112), "num_classes": 0})
        load_encoder(model, source)
    known, wanted, truth = (part.labels for part in parts)
    assert known is not None and wanted is not None and truth is not None

    def right(linear: torch.nn.Linear, rows: torch.Tensor, labels: torch.Tensor) -> float:
        return float((linear(rows).argmax(1) == labels).float().mean())

    for pool in ("token", "avg") if model.num_prefix_tokens else ("avg",):
        train, val, test = (extract_features(model.eval(), part, pool) for part in parts)
        near = knn_accuracy(train, known, test, truth, 20)
        train, val, test = ((rows - train.mean(0)) / (train.std(0) + 1e-6) for rows in (train, val, test))
        found = []
        for strength in torch.logspace(1, -4, 11).tolist():
            linear = torch.nn.Linear(train.shape[1], 10)
            torch.nn.init.zeros_(linear.weight)
            optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

            def closure(train=train, linear=linear, optimizer=optimizer, strength=strength) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(linear(train), known) + strength / 2 * linear.weight.square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            found.append((right(linear, val, wanted), right(linear, test, truth)))
        on_val, on_test = max(found)
        where = f"{on_test:.4f} on test, {on_val:.4f} on validation"
        print(f"{encoder}, {pool}: k-NN {near:.4f} on test, logistic regression {where}")


def main(kind: str, work: Path) -> None:
    found, random = load("cifar10" if kind == "photos" else "mnist"), np.random.default_rng(0)
    assert found.test is not None and found.train.labels is not None and found.test.labels is not None
    for part, images, labels, count in (
        ("train", found.train.images, found.train.labels, TRAINING),
        ("test", found.test.images, found.test.labels, TEST),
    ):
        rows = np.sort(random.permutation(len(labels))[:count])
        pixels = images[:][rows].numpy()  # (count, C, H, W), uint8
        pixels = in_bands(pixels[:, 0].astype(float), random) if kind == "bands" else pixels.transpose(0, 2, 3, 1)
        known = set(random.permutation(count)[:LABELLED].tolist()) if part == "train" else set(range(count))
        for number, (one, label) in enumerate(zip(pixels, labels[rows].tolist(), strict=True)):
            folder = work / kind / part / (str(label) if number in known else "unlabelled")
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "bands":
                np.save(folder / f"{number:05}.npy", one)
            else:
                Image.fromarray(one.squeeze()).save(folder / f"{number:05}.png")


if __name__ == "__main__":
    if sys.argv[1] == "frozen":
        frozen(Path(sys.argv[2]), sys.argv[3])
    else:
        main(sys.argv[1], Path(sys.argv[2]))
